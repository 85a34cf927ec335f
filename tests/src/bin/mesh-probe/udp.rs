//! UDP: an echo server, and clients that keep a window of datagrams under way and check whose answers they get.

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use mesh_tests::report::Datagrams;
use std::collections::BTreeSet;
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// What asks the server how it sees the client.
const WHO: &[u8] = b"who am I?";
/// What asks the server for its name.
const NAME: &[u8] = b"who are you?";
/// From one datagram of a chatter to the next.
const CHATTER: Duration = Duration::from_millis(20);
const LONGEST: usize = 65_535;
/// A client's and a datagram's number, before the filling.
const HEADER: usize = 12;

#[derive(Debug, Subcommand)]
pub(crate) enum Udp {
    /// Give every datagram back, until killed.
    Echo {
        #[arg(long)]
        port: u16,
        #[arg(long, default_value = "")]
        name: String,
    },
    /// Ask the server how it sees this client; say how this client sees the server.
    Who(Options),
    /// Send and expect back; count what comes back, what does not, and what is another one's.
    Calls(Options),
    /// Ask the server for its name, `count` times from each of `clients` sockets, one after the other.
    Names(Options),
    /// Send now and then from one socket until the end of input; say `answered` at the first answer.
    Chatter(Options),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Each client's datagrams go to all of these in turn, from one socket.
    #[arg(required = true)]
    destinations: Vec<SocketAddr>,
    /// Connect the sockets, which allows one destination only.
    #[arg(long)]
    connected: bool,
    #[arg(long, default_value_t = 1)]
    clients: u32,
    /// Datagrams of each client.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Datagrams under way of each client.
    #[arg(long, default_value_t = 8)]
    window: usize,
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// After this long without an answer what is under way counts as lost.
    #[arg(long, default_value_t = 3_000)]
    patience_millis: u64,
}

pub(crate) fn run(udp: Udp) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let report = match udp {
        Udp::Echo { port, name } => match runtime.block_on(echo(port, &name)) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                return ExitCode::FAILURE;
            }
        },
        Udp::Who(options) => runtime.block_on(who(&options)),
        Udp::Calls(options) => runtime.block_on(calls(&options)),
        Udp::Names(options) => runtime.block_on(names(&options)),
        Udp::Chatter(options) => runtime.block_on(chatter(&options)),
    };
    let report = report.unwrap_or_else(|error| Datagrams {
        errno: error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error),
        error: Some(format!("{error:#}")),
        ..Datagrams::default()
    });
    println!("{}", serde_json::to_string(&report).expect("a report is JSON"));
    if report.error.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn echo(port: u16, name: &str) -> Result<()> {
    // Both families.
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
    println!("listening");
    let mut buffer = vec![0; LONGEST];
    loop {
        // An answer that nobody takes any more shows as an error here.
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let text = SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string();
        let answer = match &buffer[..length] {
            WHO => text.as_bytes(),
            NAME => name.as_bytes(),
            other => other,
        };
        if let Err(error) = socket.send_to(answer, peer).await {
            eprintln!("cannot answer {text}: {error}");
        }
    }
}

async fn open(options: &Options) -> Result<UdpSocket> {
    let first = options.destinations[0];
    let any = if first.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind::<SocketAddr>(any).await?;
    if options.connected {
        ensure!(options.destinations.len() == 1, "a connected socket has one destination");
        socket.connect(first).await?;
    }
    Ok(socket)
}

async fn send(socket: &UdpSocket, options: &Options, payload: &[u8], to: SocketAddr) -> Result<()> {
    if options.connected {
        socket.send(payload).await?
    } else {
        socket.send_to(payload, to).await?
    };
    Ok(())
}

async fn who(options: &Options) -> Result<Datagrams> {
    let socket = open(options).await?;
    send(&socket, options, WHO, options.destinations[0]).await?;
    let mut buffer = [0; 128];
    let patience = Duration::from_millis(options.patience_millis);
    let (length, from) = timeout(patience, socket.recv_from(&mut buffer)).await.context("no answer")??;
    Ok(Datagrams {
        sent: 1,
        answered: 1,
        seen_as: Some(std::str::from_utf8(&buffer[..length])?.to_owned()),
        from: Some(from.to_string()),
        getpeername: if options.connected { Some(socket.peer_addr()?.to_string()) } else { None },
        local_port: Some(socket.local_addr()?.port()),
        ..Datagrams::default()
    })
}

async fn names(options: &Options) -> Result<Datagrams> {
    let (mut report, mut buffer) = (Datagrams::default(), [0; 128]);
    let patience = Duration::from_millis(options.patience_millis);
    // Kept, so that no two of them have one port.
    let mut sockets = Vec::new();
    for _ in 0..options.clients {
        let socket = open(options).await?;
        let mut first = None;
        for _ in 0..options.count {
            send(&socket, options, NAME, options.destinations[0]).await?;
            report.sent += 1;
            let Ok(received) = timeout(patience, socket.recv(&mut buffer)).await else {
                report.lost += 1;
                continue;
            };
            report.answered += 1;
            let name = std::str::from_utf8(&buffer[..received?])?.to_owned();
            // A socket stays with its server.
            report.mixed_up += u64::from(first.get_or_insert_with(|| name.clone()) != &name);
        }
        *report.servers.entry(first.unwrap_or_default()).or_default() += 1;
        sockets.push(socket);
    }
    Ok(report)
}

async fn chatter(options: &Options) -> Result<Datagrams> {
    let (mut report, mut buffer) = (Datagrams::default(), [0; 128]);
    let socket = open(options).await?;
    report.local_port = Some(socket.local_addr()?.port());
    let (input, mut ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        drop(input);
    });
    let mut ticker = tokio::time::interval(CHATTER);
    loop {
        tokio::select! {
            _ = ticker.tick() => {
                if let Err(error) = send(&socket, options, NAME, options.destinations[0]).await {
                    report.errno = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
                    report.error = Some(format!("{error:#}"));
                    return Ok(report);
                }
                report.sent += 1;
            }
            received = socket.recv(&mut buffer) => {
                let name = std::str::from_utf8(&buffer[..received?])?.to_owned();
                report.answered += 1;
                if report.answered == 1 {
                    eprintln!("answered");
                }
                *report.servers.entry(name).or_default() += 1;
            }
            _ = &mut ended => return Ok(report),
        }
    }
}

async fn calls(options: &Options) -> Result<Datagrams> {
    let mut clients = JoinSet::new();
    for client in 0..options.clients {
        let options = options.clone();
        clients.spawn(async move { one_client(&options, client).await });
    }
    let mut report = Datagrams::default();
    while let Some(outcome) = clients.join_next().await {
        let one = outcome??;
        report.sent += one.sent;
        report.answered += one.answered;
        report.lost += one.lost;
        report.mixed_up += one.mixed_up;
    }
    Ok(report)
}

fn payload(size: usize, client: u32, number: u64) -> Vec<u8> {
    let mut payload: Vec<u8> = client.to_be_bytes().into_iter().chain(number.to_be_bytes()).collect();
    // Too short for a number: then there is one datagram under way at a time.
    payload.resize(size, (number as u8).wrapping_mul(31).wrapping_add(client as u8));
    payload
}

async fn one_client(options: &Options, client: u32) -> Result<Datagrams> {
    let socket = open(options).await?;
    let patience = Duration::from_millis(options.patience_millis);
    let window = if options.size < HEADER { 1 } else { options.window };
    let (mut report, mut under_way, mut next) = (Datagrams::default(), BTreeSet::new(), 0);
    let mut buffer = vec![0; LONGEST];
    let to = |number: u64| options.destinations[usize::try_from(number).unwrap_or(0) % options.destinations.len()];
    while next < options.count || !under_way.is_empty() {
        while next < options.count && under_way.len() < window {
            send(&socket, options, &payload(options.size, client, next), to(next)).await?;
            under_way.insert(next);
            report.sent += 1;
            next += 1;
        }
        let Ok(received) = timeout(patience, socket.recv_from(&mut buffer)).await else {
            report.lost += under_way.len() as u64;
            under_way.clear();
            continue;
        };
        let (length, from) = received?;
        let is_expected =
            |number: &&u64| buffer[..length] == payload(options.size, client, **number) && from == to(**number);
        match under_way.iter().find(is_expected).copied() {
            Some(number) => {
                under_way.remove(&number);
                report.answered += 1;
            }
            None => report.mixed_up += 1,
        }
    }
    Ok(report)
}
