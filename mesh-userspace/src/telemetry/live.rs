//! The connections that are open now, for `nodemesh get connections`.
//!
//! A sharded table: inserting and removing take one short lock of one shard; bytes are read from the counters that
//! the connection keeps anyway. The table is bounded: a connection past the bound works, is not listed, and is counted.

use super::connections::{Protocol, Traffic};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The proxy's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From a workload of this node into the mesh.
    Outbound,
    /// From the mesh to a workload of this node.
    Inbound,
}

impl Direction {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// What is known about a connection. Empty strings and `None` are what is not known (yet).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub direction: Direction,
    pub protocol: Protocol,
    /// The client's address.
    pub source: SocketAddr,
    /// `namespace/name`.
    pub source_workload: Option<Arc<str>>,
    /// The SPIFFE ID.
    pub source_identity: Option<Arc<str>>,
    /// What the client asked for.
    pub destination: SocketAddr,
    /// `namespace/name`, if the destination is a service.
    pub service: Option<Arc<str>>,
    /// The endpoint that was picked.
    pub backend: Option<SocketAddr>,
    /// `namespace/name`.
    pub destination_workload: Option<Arc<str>>,
    pub destination_identity: Option<Arc<str>>,
    /// The other node.
    pub node: Option<Arc<str>>,
    /// `lane`, `quic`, or `kernel` within a node.
    pub transport: Option<&'static str>,
    /// The TLS key exchange group.
    pub group: Option<Arc<str>>,
    /// The TLS cipher suite.
    pub suite: Option<Arc<str>>,
    /// What policy said: `allow` or `deny`.
    pub verdict: Option<&'static str>,
    /// `namespace/name` of the policy that decided.
    pub policy: Option<Arc<str>>,
    /// Its rule.
    pub rule: Option<Arc<str>>,
}

impl Flow {
    /// A connection of which only the addresses are known.
    #[must_use]
    pub const fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            protocol: Protocol::Tcp,
            source,
            destination,
            source_workload: None,
            source_identity: None,
            service: None,
            backend: None,
            destination_workload: None,
            destination_identity: None,
            node: None,
            transport: None,
            group: None,
            suite: None,
            verdict: None,
            policy: None,
            rule: None,
        }
    }
}

/// One row of a snapshot.
#[derive(Clone, Debug)]
pub struct LiveConnection {
    /// Rises with every connection of this daemon.
    pub id: u64,
    pub flow: Flow,
    /// Bytes from the destination to the source.
    pub sent: u64,
    /// Bytes from the source to the destination.
    pub received: u64,
    /// Datagrams from the destination to the source; 0 of TCP.
    pub datagrams_sent: u64,
    /// Datagrams from the source to the destination; 0 of TCP.
    pub datagrams_received: u64,
    pub age: Duration,
}

/// Open connections at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Oldest first.
    pub connections: Vec<LiveConnection>,
    /// How many are open, whether they are listed or not.
    pub total: u64,
}

#[derive(Debug)]
struct Entry {
    flow: Mutex<Flow>,
    traffic: Arc<Traffic>,
    since: Instant,
}

impl Entry {
    /// Every field is replaced whole: a panic elsewhere leaves nothing half written.
    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const SHARDS: usize = 16;

#[derive(Debug)]
struct Table {
    shards: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
    next: AtomicU64,
    listed: AtomicUsize,
    /// Open connections that found no room.
    unlisted_open: AtomicUsize,
    unlisted: AtomicU64,
    capacity: usize,
}

impl Table {
    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        let shard = &self.shards[(id % SHARDS as u64) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The table of open connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LiveConnections {
    table: Arc<Table>,
}

impl Default for LiveConnections {
    fn default() -> Self {
        Self::new(100_000)
    }
}

impl LiveConnections {
    /// A table that lists at most `capacity` connections.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let table = Table {
            shards: Default::default(),
            next: AtomicU64::new(1),
            listed: AtomicUsize::new(0),
            unlisted_open: AtomicUsize::new(0),
            unlisted: AtomicU64::new(0),
            capacity,
        };
        Self { table: Arc::new(table) }
    }

    /// Lists a connection until the guard is dropped.
    #[must_use]
    pub fn insert(&self, flow: Flow, traffic: Arc<Traffic>) -> LiveGuard {
        let table = self.table.clone();
        let id = table.next.fetch_add(1, Relaxed);
        let entry = Arc::new(Entry { flow: Mutex::new(flow), traffic, since: Instant::now() });
        let room = |listed: usize| (listed < table.capacity).then_some(listed + 1);
        let listed = table.listed.try_update(Relaxed, Relaxed, room).is_ok();
        if listed {
            table.shard(id).insert(id, entry.clone());
        } else {
            table.unlisted.fetch_add(1, Relaxed);
            table.unlisted_open.fetch_add(1, Relaxed);
        }
        LiveGuard { table, id, entry, listed }
    }

    /// Connections listed now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.listed.load(Relaxed)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Connections that found the table full, since the start.
    #[must_use]
    pub fn unlisted(&self) -> u64 {
        self.table.unlisted.load(Relaxed)
    }

    /// The `limit` newest connections.
    #[must_use]
    pub fn snapshot(&self, limit: usize) -> Snapshot {
        let mut entries = Vec::with_capacity(self.len());
        for shard in &self.table.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            entries.extend(shard.iter().map(|(id, entry)| (*id, entry.clone())));
        }
        entries.sort_unstable_by_key(|(id, _)| *id);
        let total = entries.len() + self.table.unlisted_open.load(Relaxed);
        let skip = entries.len().saturating_sub(limit);
        let connections = entries.into_iter().skip(skip).map(|(id, entry)| row(id, &entry)).collect();
        Snapshot { connections, total: total as u64 }
    }
}

fn row(id: u64, entry: &Entry) -> LiveConnection {
    LiveConnection {
        id,
        flow: entry.flow().clone(),
        sent: entry.traffic.sent(),
        received: entry.traffic.received(),
        datagrams_sent: entry.traffic.datagrams_sent(),
        datagrams_received: entry.traffic.datagrams_received(),
        age: entry.since.elapsed(),
    }
}

/// Keeps a connection in the table.
#[derive(Debug)]
pub struct LiveGuard {
    table: Arc<Table>,
    id: u64,
    entry: Arc<Entry>,
    listed: bool,
}

impl LiveGuard {
    /// Identifies the connection in this daemon, in the table and in the log.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// What is known, to read, or to add to when the backend is picked or the handshake is done. Not to be held for long:
    /// who lists the table waits for it.
    pub fn flow(&self) -> MutexGuard<'_, Flow> {
        self.entry.flow()
    }
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        if self.listed {
            self.table.shard(self.id).remove(&self.id);
            self.table.listed.fetch_sub(1, Relaxed);
        } else {
            self.table.unlisted_open.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(port: u16) -> Flow {
        Flow::new(Direction::Outbound, ([10, 0, 0, 1], port).into(), ([10, 96, 0, 1], 80).into())
    }

    #[test]
    fn a_connection_is_listed_until_its_guard_goes() {
        let live = LiveConnections::default();
        let guard = live.insert(flow(1), Arc::default());
        assert_eq!(live.snapshot(10).connections.len(), 1);
        let known = Flow { backend: Some(([10, 0, 0, 2], 8080).into()), ..flow(1) };
        guard.flow().backend = known.backend;
        assert_eq!(live.snapshot(10).connections[0].flow, known);
        drop(guard);
        assert!(live.snapshot(10).connections.is_empty() && live.is_empty());
    }

    #[test]
    fn a_full_table_lists_no_more_and_counts_it() {
        let live = LiveConnections::new(2);
        let first = live.insert(flow(1), Arc::default());
        let _second = live.insert(flow(2), Arc::default());
        let third = live.insert(flow(3), Arc::default());
        let snapshot = live.snapshot(10);
        assert_eq!((live.len(), live.unlisted(), snapshot.connections.len(), snapshot.total), (2, 1, 2, 3));
        drop(third);
        assert_eq!(live.snapshot(10).total, 2);
        assert_eq!(live.len(), 2, "an unlisted connection frees nobody's place");
        drop(first);
        let _fourth = live.insert(flow(4), Arc::default());
        assert_eq!((live.len(), live.unlisted()), (2, 1));
    }

    #[test]
    fn a_limited_snapshot_holds_the_newest_in_order() {
        let live = LiveConnections::default();
        let guards: Vec<_> = (1..=50).map(|port| live.insert(flow(port), Arc::default())).collect();
        let snapshot = live.snapshot(3);
        let ports: Vec<_> = snapshot.connections.iter().map(|row| row.flow.source.port()).collect();
        assert_eq!(ports, [48, 49, 50]);
        assert_eq!((guards.len(), snapshot.total), (live.len(), 50));
    }
}
