//! The server: one port, both families, several manners.

use crate::pattern::{Hash, Pattern};
use clap::{Args, ValueEnum};
use mesh_tests::report::{End, Greeting, Served};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

/// Seed of the bytes that a server sends by itself.
pub(crate) const SEED: u64 = 42;
const BUFFER: usize = 64 << 10;
/// Room for thousands of connections that arrive at once.
const BACKLOG: u32 = 8_192;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[arg(long)]
    port: u16,
    /// One address instead of all of both families.
    #[arg(long)]
    bind: Option<std::net::IpAddr>,
    /// The server's name in its greeting.
    #[arg(long, default_value = "")]
    name: String,
    /// Speak first: one line of JSON that says how the server sees the connection.
    #[arg(long)]
    greet: bool,
    #[arg(long, default_value = "echo")]
    mode: Mode,
    /// How much to send, for the modes that send by themselves.
    #[arg(long, default_value_t = 1 << 20)]
    bytes: u64,
    /// At SIGTERM take no more connections, and end when the last one has.
    #[arg(long)]
    graceful: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Send back what arrives; finish when the client does.
    Echo,
    /// Swallow everything; at the client's end answer with its SHA-256.
    Sink,
    /// Send `--bytes` and finish; then read to the client's end.
    Source,
    /// Read to the client's end; then send `--bytes` and finish.
    FinishLast,
    /// Reset the connection at the first byte.
    Reset,
    /// Read `--bytes`, then nothing until SIGUSR1; from then on as `sink`.
    Hold,
}

/// Serves until killed, or told to end.
pub(crate) fn serve(options: Options) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(accept(options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-probe echo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn accept(options: Options) -> io::Result<()> {
    let listener = listen_on(options.bind, options.port)?;
    let options = Arc::new(options);
    let mut connections = JoinSet::new();
    let told = async {
        if !options.graceful {
            return std::future::pending().await;
        }
        signal(SignalKind::terminate())?.recv().await;
        Ok::<(), io::Error>(())
    };
    let accepting = async {
        loop {
            let (stream, peer) = listener.accept().await?;
            connections.spawn(connection(stream, peer, Arc::clone(&options)));
            while connections.try_join_next().is_some() {}
        }
    };
    tokio::select! {
        told = told => told?,
        failed = accepting => return failed,
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Listens on one address, or on all of both families.
pub(crate) fn listen_on(bind: Option<std::net::IpAddr>, port: u16) -> io::Result<TcpListener> {
    let address = SocketAddr::new(bind.unwrap_or(Ipv6Addr::UNSPECIFIED.into()), port);
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn connection(mut stream: TcpStream, peer: SocketAddr, options: Arc<Options>) {
    let local = stream.local_addr().map(canonical).unwrap_or_default();
    let greeting = Greeting { server: options.name.clone(), peer: canonical(peer), local };
    print(&Served { connection: greeting.clone(), end: None });
    let mut end = End::default();
    if let Err(error) = converse(&mut stream, &options, &greeting, &mut end).await {
        end.errno = Some(errno(&error));
    }
    print(&Served { connection: greeting, end: Some(end) });
}

async fn converse(stream: &mut TcpStream, options: &Options, greeting: &Greeting, end: &mut End) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if options.greet {
        let mut line = serde_json::to_string(greeting)?;
        line.push('\n');
        stream.write_all(line.as_bytes()).await?;
    }
    match options.mode {
        Mode::Echo => receive(stream, end, true).await?,
        Mode::Sink => {
            receive(stream, end, false).await?;
            stream.write_all(end.received_hash.as_bytes()).await?;
        }
        Mode::Source => {
            send(stream, options.bytes, end).await?;
            stream.shutdown().await?;
            receive(stream, end, false).await?;
        }
        Mode::FinishLast => {
            receive(stream, end, false).await?;
            send(stream, options.bytes, end).await?;
        }
        Mode::Reset => {
            stream.read_u8().await?;
            socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
            return Ok(());
        }
        Mode::Hold => {
            hold(stream, options.bytes, end).await?;
            stream.write_all(end.received_hash.as_bytes()).await?;
        }
    }
    stream.shutdown().await
}

async fn receive(stream: &mut TcpStream, end: &mut End, echo: bool) -> io::Result<()> {
    receive_on(stream, end, echo, Hash::new()).await
}

/// Falls asleep after some bytes, wakes at SIGUSR1, and reads to the end.
async fn hold(stream: &mut TcpStream, bytes: u64, end: &mut End) -> io::Result<()> {
    let mut wake = signal(SignalKind::user_defined1())?;
    let mut hash = Hash::new();
    let mut buffer = vec![0; BUFFER];
    while end.bytes_received < bytes {
        let room = usize::try_from(bytes - end.bytes_received).unwrap_or(BUFFER).min(BUFFER);
        let count = stream.read(&mut buffer[..room]).await?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        end.bytes_received += count as u64;
    }
    wake.recv().await;
    receive_on(stream, end, false, hash).await
}

async fn receive_on(stream: &mut TcpStream, end: &mut End, echo: bool, mut hash: Hash) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            end.received_hash = hash.hex();
            return Ok(());
        }
        hash.update(&buffer[..count]);
        end.bytes_received += count as u64;
        if echo {
            stream.write_all(&buffer[..count]).await?;
            end.bytes_sent += count as u64;
        }
    }
}

async fn send(stream: &mut TcpStream, bytes: u64, end: &mut End) -> io::Result<()> {
    let mut pattern = Pattern::new(SEED);
    let mut buffer = vec![0; BUFFER];
    while end.bytes_sent < bytes {
        let count = usize::try_from(bytes - end.bytes_sent).unwrap_or(BUFFER).min(BUFFER);
        pattern.fill(&mut buffer[..count]);
        stream.write_all(&buffer[..count]).await?;
        end.bytes_sent += count as u64;
    }
    Ok(())
}

/// An address as people write it: IPv4 on an IPv6 socket is IPv4.
pub(crate) fn canonical(address: SocketAddr) -> String {
    SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
}

/// The name of a system call's error, or the error's own words.
pub(crate) fn errno(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "ECONNREFUSED",
        Some(libc::ECONNRESET) => "ECONNRESET",
        Some(libc::EPIPE) => "EPIPE",
        Some(libc::ETIMEDOUT) => "ETIMEDOUT",
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH",
        Some(libc::ENETUNREACH) => "ENETUNREACH",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(libc::EPERM) => "EPERM",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EAGAIN) => "EAGAIN",
        _ => return error.to_string(),
    };
    name.to_owned()
}

/// One line in one write: connections end at the same time.
fn print(served: &Served) {
    if let Ok(mut line) = serde_json::to_string(served) {
        line.push('\n');
        // Nobody may be reading any more; the connections matter, not the log.
        let _ = io::Write::write_all(&mut io::stdout().lock(), line.as_bytes());
    }
}
