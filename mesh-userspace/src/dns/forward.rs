//! Asks the upstream servers. Each query has a socket and an id of its own, both by chance: whoever wants to forge an
//! answer must guess both.

use super::wire::{self, Head, Question};
use crate::runtime::Room;
use crate::telemetry::dns::{DnsMetrics, UPSTREAM_QUERIES};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// For one server's answer. Two of them fit into what resolvers wait by default.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Servers that are asked about one query, one after the other.
const ATTEMPTS: usize = 2;
/// Longest datagram that is taken; what may be longer is asked for by TCP.
const DATAGRAM: usize = 4_096;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// As many queries as may be are under way.
    Busy,
    Timeout,
    /// The server cannot be reached.
    Unreachable,
}

impl Failure {
    fn as_str(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
        }
    }
}

#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) room: Room,
    metrics: DnsMetrics,
}

impl Forwarder {
    pub(super) fn new(metrics: DnsMetrics) -> Self {
        Self { room: Room::new("dns_upstream_queries", UPSTREAM_QUERIES), metrics }
    }

    #[cfg(test)]
    pub(super) fn hold_all(&self) -> Vec<crate::runtime::Place> {
        std::iter::from_fn(|| self.room.try_enter()).collect()
    }

    /// The first answer that any of the servers gives, under the query's own id.
    pub(super) async fn ask(
        &self,
        query: &[u8],
        question: &Question,
        servers: &[SocketAddr],
    ) -> Result<Vec<u8>, Failure> {
        let Some(_place) = self.room.try_enter() else {
            self.metrics.upstream_failed(Failure::Busy.as_str());
            return Err(Failure::Busy);
        };
        let _waiting = self.metrics.asking();
        let mut last = Failure::Unreachable;
        for server in servers.iter().take(ATTEMPTS) {
            let began = Instant::now();
            let asked = timeout(TIMEOUT, exchange(*server, query, question)).await;
            match asked {
                Ok(Ok(reply)) => {
                    self.metrics.upstream_answered(began.elapsed());
                    return Ok(wire::with_id(reply, question.id()));
                }
                Ok(Err(error)) => {
                    tracing::debug!(%server, %error, "a DNS server cannot be asked");
                    last = Failure::Unreachable;
                }
                Err(_) => last = Failure::Timeout,
            }
            self.metrics.upstream_failed(last.as_str());
        }
        Err(last)
    }
}

async fn exchange(server: SocketAddr, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
    let reply = by_datagram(server, query, question).await?;
    let is_cut = reply.len() >= DATAGRAM || Head::of(&reply).is_some_and(Head::is_truncated);
    if is_cut { by_stream(server, query, question).await } else { Ok(reply) }
}

async fn by_datagram(server: SocketAddr, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // The kernel then takes datagrams of this server only.
    socket.connect(server).await?;
    let id = rand::random();
    socket.send(&wire::with_id(query.to_vec(), id)).await?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if question.is_answered_by(&buffer[..length], id) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn by_stream(server: SocketAddr, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let id = rand::random();
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    let message = [&length.to_be_bytes()[..], &wire::with_id(query.to_vec(), id)].concat();
    stream.write_all(&message).await?;
    let mut reply = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut reply).await?;
    if question.is_answered_by(&reply, id) { Ok(reply) } else { Err(io::Error::other("it answers another question")) }
}
