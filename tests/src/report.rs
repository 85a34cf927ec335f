//! What `mesh-probe` prints: one JSON document a run (one line a connection for the server), read back by scenarios.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// One client's connection, or the sum of many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Whether everything that was asked for happened.
    pub ok: bool,
    /// Why not, in words.
    pub error: Option<String>,
    /// Why not, as the system call said it (`ECONNREFUSED`).
    pub errno: Option<String>,
    /// Where the client thinks it is connected to.
    pub getpeername: Option<String>,
    /// The client's own end.
    pub getsockname: Option<String>,
    /// The first line of the server: how it sees the connection.
    pub greeting: Option<Greeting>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// SHA-256 of what was sent, in hex; empty if nothing was hashed.
    pub sent_hash: String,
    /// SHA-256 of what was received.
    pub received_hash: String,
    /// Connections that succeeded, where many were made.
    pub connections: u64,
    /// Greetings by the server's name, where many connections were made.
    pub servers: BTreeMap<String, u64>,
    /// Greetings by the client's IP address as the server saw it.
    pub peers: BTreeMap<String, u64>,
    /// From the first system call to the end, in microseconds.
    pub micros: u64,
}

/// What `mesh-probe echo --greet` says first: a server's view of one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// The server's name, if it was given one.
    pub server: String,
    /// The client as the server sees it.
    pub peer: String,
    /// The server's own end.
    pub local: String,
}

/// One line of `mesh-probe echo`: a connection began or ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    #[serde(flatten)]
    pub connection: Greeting,
    /// `None` when it began.
    pub end: Option<End>,
}

/// How a connection ended, as the server saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub bytes_received: u64,
    pub received_hash: String,
    pub bytes_sent: u64,
    /// `None` if both sides finished; else what the system call said (`ECONNRESET`).
    pub errno: Option<String>,
}

/// The lines of a server's output, those that are complete.
#[must_use]
pub fn served(printed: &str) -> Vec<Served> {
    printed.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What `mesh-probe load` measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    pub requests: u64,
    pub failed: u64,
    pub connections: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub micros: u64,
    /// Time of one request and its response, in microseconds.
    pub p50_micros: u64,
    pub p90_micros: u64,
    pub p99_micros: u64,
    pub max_micros: u64,
    /// Why requests failed, and how many did so.
    pub errors: BTreeMap<String, u64>,
}

/// What `mesh-probe churn` has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Churn {
    /// Connections that did what they should.
    pub connections: u64,
    pub failed: u64,
    /// Why connections failed, and how many did so.
    pub errors: BTreeMap<String, u64>,
    /// Greetings by the server's name.
    pub servers: BTreeMap<String, u64>,
    /// The longest of them from connect() to its end, in microseconds.
    pub slowest_micros: u64,
}

/// What `mesh-probe sniff` saw on a link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    pub packets: u64,
    /// Bytes on the link, headers included.
    pub bytes: u64,
    /// Packets that the kernel could not hand over: only 0 makes an absent marker mean something.
    pub lost: u64,
    /// By `tcp/<port>` or `udp/<port>`, the lower of the two ports.
    pub by_port: BTreeMap<String, Traffic>,
    /// How often each marker was found.
    pub markers: BTreeMap<String, u64>,
}

impl Capture {
    /// Bytes in packets to or from a port.
    #[must_use]
    pub fn bytes_on(&self, port: u16) -> u64 {
        let on = |protocol| self.by_port.get(&format!("{protocol}/{port}")).map_or(0, |traffic| traffic.bytes);
        on("tcp") + on("udp")
    }

    /// All markers found, whichever they were.
    #[must_use]
    pub fn plaintext(&self) -> u64 {
        self.markers.values().sum()
    }
}

/// Packets of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

/// What `mesh-load` measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    /// How many were answered.
    pub requests: u64,
    pub failed: u64,
    /// From the first request to the end.
    pub seconds: f64,
    pub p50_micros: f64,
    pub p99_micros: f64,
    pub p999_micros: f64,
    pub max_micros: f64,
}

impl Requests {
    /// Requests answered in a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// What a DNS server said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The response code: 0 is an answer, 3 that there is no such name, 5 a refusal.
    pub code: u8,
    pub truncated: bool,
    pub addresses: Vec<IpAddr>,
}

/// What `mesh-probe http3 get` has fetched; its bytes were those that were expected, if there is no error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// The last response's.
    pub status: u16,
    pub bytes: u64,
    /// The server's address as QUIC has it after the last byte.
    pub from: String,
    /// The client's address as the server sees it.
    pub seen_as: String,
    /// The server's name.
    pub server: String,
    pub local_port: u16,
    pub error: Option<String>,
}

/// What `mesh-probe udp` tells about its datagrams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagrams {
    pub sent: u64,
    pub answered: u64,
    pub lost: u64,
    /// Answers that are not to what this socket sent, or not from whom it sent it to.
    pub mixed_up: u64,
    /// The client's address as the server sees it.
    pub seen_as: Option<String>,
    /// The server's address as the client sees it.
    pub from: Option<String>,
    pub getpeername: Option<String>,
    pub local_port: Option<u16>,
    /// Sockets by the name of the server that answered them.
    pub servers: BTreeMap<String, u64>,
    pub error: Option<String>,
    pub errno: Option<i32>,
}
