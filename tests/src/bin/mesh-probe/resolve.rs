//! A resolver of its own: asks for a name and tells the addresses, by datagram or by TCP.

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::report::Resolved;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);
const HEADER: usize = 12;

#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// The DNS server.
    server: SocketAddr,
    /// The name, with or without a dot at its end.
    name: String,
    /// The record's type: 1 is A, 28 is AAAA.
    #[arg(long, default_value_t = 1)]
    kind: u16,
    #[arg(long)]
    tcp: bool,
}

pub(crate) fn run(options: &Options) -> (bool, String) {
    match ask(options) {
        Ok(resolved) => (true, serde_json::to_string(&resolved).expect("a report is plain data")),
        Err(error) => (false, format!("{error:#}")),
    }
}

fn ask(options: &Options) -> Result<Resolved> {
    let id = std::process::id().to_be_bytes();
    let mut query = vec![id[2], id[3], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in options.name.trim_end_matches('.').split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.bytes());
    }
    query.push(0);
    query.extend(options.kind.to_be_bytes());
    query.extend(1_u16.to_be_bytes());
    let reply = if options.tcp { by_stream(options.server, &query)? } else { by_datagram(options.server, &query)? };
    ensure!(reply.len() >= query.len() && reply[..2] == query[..2], "no answer to the question: {reply:?}");
    ensure!(reply[HEADER..query.len()] == query[HEADER..], "another question comes back: {reply:?}");
    Ok(Resolved { code: reply[3] & 0x0f, truncated: reply[2] & 2 != 0, addresses: addresses(&reply, query.len())? })
}

fn by_datagram(server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(server).context("connect")?;
    socket.send(query).context("send")?;
    let mut buffer = vec![0; 65_536];
    let length = socket.recv(&mut buffer).context("receive")?;
    buffer.truncate(length);
    Ok(buffer)
}

fn by_stream(server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, TIMEOUT).context("connect")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&[&u16::try_from(query.len())?.to_be_bytes(), query].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).context("receive")?;
    let mut reply = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut reply)?;
    Ok(reply)
}

/// The addresses among the answers, which begin at `at`.
fn addresses(reply: &[u8], mut at: usize) -> Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for _ in 0..u16::from_be_bytes([reply[6], reply[7]]) {
        // Each answer's owner is the question's name: a pointer to it.
        ensure!(reply.get(at) == Some(&0xc0), "an answer for another name: {reply:?}");
        let data = reply.get(at + 12..).context("an answer is cut off")?;
        let length = usize::from(u16::from_be_bytes([reply[at + 10], reply[at + 11]]));
        let data = data.get(..length).context("an answer's data is cut off")?;
        if let Ok(v4) = <[u8; 4]>::try_from(data) {
            addresses.push(Ipv4Addr::from(v4).into());
        } else if let Ok(v6) = <[u8; 16]>::try_from(data) {
            addresses.push(Ipv6Addr::from(v6).into());
        }
        at += 12 + length;
    }
    Ok(addresses)
}
