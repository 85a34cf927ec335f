//! Who talks to whom: opened, closed, failed, bytes and duration for each edge of the service graph.
//!
//! A connection asks for its [`Edge`] once and then only adds to atomics: no lock and no label is touched per packet.
//! Label keys and byte semantics are Istio's (*sent* is what the destination answered, *received* what it was asked,
//! for both reporters), so that dashboards built for Istio need a rename and nothing else. The number of series is
//! bounded: past the cap, edges share one series with `overflow="true"`; idle series expire.

mod collect;
mod store;

use super::bounded::BoundedFamily;
use arc_swap::ArcSwap;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use store::{Series, Store};

/// Which of the two daemons counts: the client's node or the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

impl Reporter {
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// The value of the `reporter` label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What the application speaks: connections, or flows of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    #[default]
    Tcp,
    /// What is called a connection here is a flow then: one socket's datagrams to one endpoint.
    Udp,
}

impl Protocol {
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// The value of the `request_protocol` label, and the word in logs and documents.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// How the connection travelled between the nodes: the `connection_security_policy` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Security {
    MutualTls,
    /// Within the node, as TCP whose source the kernel has authenticated.
    Kernel,
    /// Plaintext.
    None,
}

impl Security {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Kernel => "kernel",
            Self::None => "none",
        }
    }
}

/// One end of an edge. Empty strings are reported as `unknown`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Party {
    /// The owner's name (`Workload::owner`), never the name of one instance: instances come and go without end.
    pub workload: Arc<str>,
    pub namespace: Arc<str>,
    /// What the workload is an instance of, as dashboards group it; the owner's name where nothing else is known.
    pub canonical_service: Arc<str>,
    /// The SPIFFE ID, if it was authenticated.
    pub principal: Arc<str>,
}

impl Party {
    /// A peer outside the mesh.
    #[must_use]
    pub fn unknown() -> Self {
        let unknown: Arc<str> = Arc::from(UNKNOWN);
        Self {
            workload: unknown.clone(),
            namespace: unknown.clone(),
            canonical_service: unknown.clone(),
            principal: unknown,
        }
    }
}

/// The service that was asked for. Empty strings are reported as `unknown`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceLabels {
    /// The full name (`destination_service`): `<name>.<namespace>.svc.cluster.local` in Kubernetes.
    pub host: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
}

impl ServiceLabels {
    /// The destination was called by its own address.
    #[must_use]
    pub fn unknown() -> Self {
        let unknown: Arc<str> = Arc::from(UNKNOWN);
        Self { host: unknown.clone(), name: unknown.clone(), namespace: unknown }
    }
}

/// An edge of the service graph, as one of its two ends reports it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeKey {
    pub reporter: Reporter,
    pub source: Party,
    pub destination: Party,
    pub service: ServiceLabels,
    pub protocol: Protocol,
    pub security: Security,
}

/// Why a connection failed, in Istio's words: the `response_flags` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResponseFlag {
    /// Policy forbids it.
    Deny,
    /// The other node or the application could not be reached, or broke off.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// The peer is authentic, and not who it should be; or there is no certificate for the workload.
    IdentityError,
    /// A bound of the daemon was hit.
    Overflow,
    /// Nothing else fits; the `reason` label tells.
    Other,
}

impl ResponseFlag {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::Overflow => "OVERFLOW",
            Self::Other => "-",
        }
    }
}

/// The cause of a failed connection. `reason` is a stable code, one of a fixed set: never text made at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Failure {
    pub flag: ResponseFlag,
    pub reason: &'static str,
}

/// How many series, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Series of each family; a histogram counts with all its buckets.
    pub series: usize,
    /// A series that no connection has used for this long disappears.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { series: 10_000, idle: Duration::from_mins(15) }
    }
}

/// Sums over all edges, for `status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub active: u64,
    pub opened: u64,
    pub closed: u64,
    pub failed: u64,
    /// Bytes from destinations to sources.
    pub sent: u64,
    /// Bytes from sources to destinations.
    pub received: u64,
}

/// The families `tcp_connections_*`, `tcp_*_bytes` and `tcp_connection_duration_seconds`, and those of UDP's flows. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// By protocol: each has its own bound.
    stores: [Arc<Store>; 2],
    idle: Duration,
    others: Arc<[Arc<dyn BoundedFamily>]>,
}

impl ConnectionMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        Self::with_limits(registry, Limits::default())
    }

    pub fn with_limits(registry: &mut Registry, limits: Limits) -> Self {
        Self::register_with(registry, limits, Vec::new())
    }

    /// With other bounded families, whose sizes are told, and whose idle series expire, together with those here.
    pub(super) fn register_with(registry: &mut Registry, limits: Limits, others: Vec<Arc<dyn BoundedFamily>>) -> Self {
        let stores = Protocol::ALL.map(|_| Arc::new(Store::new(limits)));
        let others: Arc<[_]> = others.into();
        registry.register_collector(Box::new(collect::Collector::new(stores.clone(), others.clone())));
        Self { stores, idle: limits.idle, others }
    }

    /// The edge's counters. The handle may be kept for as long as one likes; it does not keep the series alive.
    #[must_use]
    pub fn edge(&self, key: EdgeKey) -> Edge {
        let key = Arc::new(key.normalised());
        let store = self.stores[key.protocol as usize].clone();
        let series = store.intern(&key);
        Edge { store, key, series }
    }

    /// Drops series that have been idle for [`Limits::idle`] at `now`; to be called every minute or so. Returns how
    /// many edges went.
    pub fn expire(&self, now: Instant) -> usize {
        for family in self.others.iter() {
            family.expire(now, self.idle);
        }
        self.stores.iter().map(|store| store.expire(now)).sum()
    }

    /// A protocol's sums since the start, expired series included.
    #[must_use]
    pub fn totals(&self, protocol: Protocol) -> Totals {
        self.stores[protocol as usize].totals()
    }

    /// Edges with a series of their own.
    #[must_use]
    pub fn series(&self) -> usize {
        self.stores.iter().map(|store| store.sizes().edges).sum()
    }
}

/// A handle on one edge's counters.
#[derive(Clone, Debug)]
pub struct Edge {
    store: Arc<Store>,
    key: Arc<EdgeKey>,
    series: Arc<Series>,
}

impl Edge {
    /// Whether the handle is the edge's own and present series: another would not be a better one.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.series.is_current()
    }

    /// Counts a connection as opened. It counts as closed when the guard is dropped.
    #[must_use]
    pub fn opened(&self) -> OpenConnection {
        self.opened_since(Instant::now())
    }

    /// As [`Self::opened`], of a connection that began at `since`.
    #[must_use]
    pub fn opened_since(&self, since: Instant) -> OpenConnection {
        let series = self.store.enter(&self.key, &self.series, since);
        OpenConnection {
            store: self.store.clone(),
            series: series.into(),
            since,
            traffic: Arc::default(),
            failure: OnceLock::new(),
        }
    }
}

/// The bytes of one connection, counted as they pass.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    datagrams_sent: AtomicU64,
    datagrams_received: AtomicU64,
}

impl Traffic {
    /// Bytes from the destination to the source.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Bytes from the source to the destination.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Datagrams from the destination to the source; 0 of TCP.
    #[must_use]
    pub fn datagrams_sent(&self) -> u64 {
        self.datagrams_sent.load(Relaxed)
    }

    /// Datagrams from the source to the destination; 0 of TCP.
    #[must_use]
    pub fn datagrams_received(&self) -> u64 {
        self.datagrams_received.load(Relaxed)
    }
}

/// An open connection; dropping it counts it as closed and records its duration. Both directions' tasks may share it.
pub struct OpenConnection {
    store: Arc<Store>,
    series: ArcSwap<Series>,
    since: Instant,
    traffic: Arc<Traffic>,
    failure: OnceLock<(Failure, Option<String>)>,
}

impl OpenConnection {
    /// Counts bytes from the destination to the source (the response).
    pub fn add_sent(&self, bytes: u64) {
        self.traffic.sent.fetch_add(bytes, Relaxed);
        self.series.load().sent.fetch_add(bytes, Relaxed);
    }

    /// Counts bytes from the source to the destination (the request).
    pub fn add_received(&self, bytes: u64) {
        self.traffic.received.fetch_add(bytes, Relaxed);
        self.series.load().received.fetch_add(bytes, Relaxed);
    }

    /// Counts a datagram from the destination to the source (a reply).
    pub fn add_sent_datagram(&self, bytes: u64) {
        self.traffic.datagrams_sent.fetch_add(1, Relaxed);
        self.add_sent(bytes);
    }

    /// Counts a datagram from the source to the destination (a request).
    pub fn add_received_datagram(&self, bytes: u64) {
        self.traffic.datagrams_received.fetch_add(1, Relaxed);
        self.add_received(bytes);
    }

    /// Counts the connection as failed. Only the first cause counts: what follows is its consequence.
    pub fn fail(&self, flag: ResponseFlag, reason: &'static str) {
        self.fail_with(Failure { flag, reason }, None);
    }

    /// As [`Self::fail`], with a sentence for the access log.
    pub fn fail_because(&self, flag: ResponseFlag, reason: &'static str, detail: impl fmt::Display) {
        if self.failure.get().is_none() {
            self.fail_with(Failure { flag, reason }, Some(detail.to_string()));
        }
    }

    fn fail_with(&self, failure: Failure, detail: Option<String>) {
        if self.failure.set((failure, detail)).is_ok() {
            self.store.fail(&self.series.load(), failure);
        }
    }

    /// The connection goes on along another edge. If that has other labels, it counts there as opened, and here as
    /// closed: both edges have seen it.
    pub fn moved_to(&self, edge: &Edge) {
        if Arc::ptr_eq(&self.series.load(), &edge.series) {
            return;
        }
        let now = Instant::now();
        let left = self.series.swap(edge.store.enter(&edge.key, &edge.series, now));
        self.store.leave(&left, now.duration_since(self.since), now);
    }

    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        self.failure.get().map(|(failure, _)| *failure)
    }

    /// What went wrong, for people.
    #[must_use]
    pub fn failure_detail(&self) -> Option<&str> {
        self.failure.get()?.1.as_deref()
    }

    /// This connection's own byte counters, which [`super::live::LiveConnections`] shows.
    #[must_use]
    pub fn traffic(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }

    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

impl fmt::Debug for OpenConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenConnection").field("traffic", &self.traffic).field("failure", &self.failure).finish()
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let now = Instant::now();
        self.store.leave(&self.series.load(), now.duration_since(self.since), now);
    }
}

const UNKNOWN: &str = "unknown";

impl EdgeKey {
    /// Empty labels become `unknown`, so that two keys that read the same are the same series.
    fn normalised(mut self) -> Self {
        let parties = [&mut self.source, &mut self.destination];
        let of_parties = parties.into_iter().flat_map(|party| {
            [&mut party.workload, &mut party.namespace, &mut party.canonical_service, &mut party.principal]
        });
        let of_service = [&mut self.service.host, &mut self.service.name, &mut self.service.namespace];
        for label in of_parties.chain(of_service) {
            if label.is_empty() {
                *label = Arc::from(UNKNOWN);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests;
