//! What an attacker with every capability in its pod does: around the connect hook, and under another's address.

use crate::ConnectOptions;
use crate::connect::set_option;
use crate::packet::{self, Segment};
use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use mesh_tests::report::Call;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

#[derive(Debug, Subcommand)]
pub(crate) enum Attack {
    /// A connection that `TCP_REPAIR` declares established: no SYN, only data.
    Repair {
        #[command(flatten)]
        options: ConnectOptions,
    },
    /// A connect with the mark that the daemon's own sockets have.
    Marked {
        #[command(flatten)]
        options: ConnectOptions,
        #[arg(long)]
        mark: u32,
    },
    /// A connect from `--source`, an address that is not the pod's, by `IP_TRANSPARENT`.
    Transparent {
        #[command(flatten)]
        options: ConnectOptions,
    },
    /// Packets of a connection from any address, made by hand: a SYN, and data as if it had been answered.
    Forge(ForgeOptions),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ForgeOptions {
    destination: SocketAddr,
    /// Whose packets these are said to be.
    #[arg(long)]
    source: IpAddr,
    #[arg(long, default_value_t = 40_000)]
    first_port: u16,
    #[arg(long, default_value_t = 40_000)]
    last_port: u16,
    /// How often to go through the ports.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// What the data says.
    #[arg(long, default_value = "forged")]
    message: String,
}

pub(crate) fn run(attack: &Attack, call: &mut Call) -> Result<()> {
    match attack {
        Attack::Repair { options } => {
            let socket = socket(options)?;
            let repair = |mode| set_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, mode).context("TCP_REPAIR");
            socket.bind(&options.source_or_any().into()).context("bind")?;
            repair(1)?;
            socket.connect(&SockAddr::from(options.destination)).context("connect")?;
            repair(0)?;
            exchange(socket, options, call)
        }
        Attack::Marked { options, mark } => {
            let socket = socket(options)?;
            socket.set_mark(*mark).context("SO_MARK")?;
            socket.connect(&SockAddr::from(options.destination)).context("connect")?;
            exchange(socket, options, call)
        }
        Attack::Transparent { options } => {
            let socket = socket(options)?;
            match options.destination {
                SocketAddr::V4(_) => set_option(&socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1),
                SocketAddr::V6(_) => set_option(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1),
            }
            .context("IP_TRANSPARENT")?;
            socket.bind(&options.source_or_any().into()).context("bind")?;
            socket.connect_timeout(&SockAddr::from(options.destination), options.timeout()).context("connect")?;
            exchange(socket, options, call)
        }
        Attack::Forge(options) => forge(options, call),
    }
}

fn socket(options: &ConnectOptions) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(options.destination), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_tcp_user_timeout(Some(options.timeout()))?;
    socket.set_read_timeout(Some(options.timeout()))?;
    socket.set_write_timeout(Some(options.timeout()))?;
    Ok(socket)
}

/// Says the message and waits for any answer.
fn exchange(socket: Socket, options: &ConnectOptions, call: &mut Call) -> Result<()> {
    let mut stream = TcpStream::from(socket);
    stream.write_all(options.message.as_bytes()).context("write")?;
    call.bytes_sent = options.message.len() as u64;
    let received = stream.read(&mut [0; 64]).context("read")?;
    call.bytes_received = received as u64;
    ensure!(received > 0, "nobody answered");
    Ok(())
}

/// Sends without waiting for anything; `connections` is how many were feigned.
fn forge(options: &ForgeOptions, call: &mut Call) -> Result<()> {
    let domain = Domain::for_address(options.destination);
    // With this protocol the kernel takes packets with their IP header, of either family.
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).context("raw socket")?;
    let to = SockAddr::from(SocketAddr::new(options.destination.ip(), 0));
    for _ in 0..options.rounds {
        for port in options.first_port..=options.last_port {
            let source = SocketAddr::new(options.source, port);
            let sequence = rand::random();
            let message = options.message.as_bytes();
            for segment in [Segment::syn(sequence), Segment::data(sequence.wrapping_add(1), rand::random(), message)] {
                let bytes = packet::encode(source, options.destination, &segment)?;
                let sent = socket.send_to(&bytes, &to).with_context(|| format!("a packet from {source}"))?;
                call.bytes_sent += sent as u64;
            }
            call.connections += 1;
        }
    }
    Ok(())
}
