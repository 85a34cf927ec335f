//! What the proxy counts of UDP: flows, datagrams, bytes, and what is lost and why.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Families `nodemesh_datagram_*`. `direction`: `outbound` at the caller's node, `inbound` at the other. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct DatagramMetrics {
    open: Family<Labels<1>, Gauge>,
    limit: Family<Labels<1>, Gauge>,
    opened: Family<Labels<1>, Counter>,
    closed: Family<Labels<2>, Counter>,
    passed: Family<Labels<2>, Counter>,
    bytes: Family<Labels<2>, Counter>,
    dropped: Family<Labels<2>, Counter>,
    long: Family<Labels<1>, Counter>,
}

/// One direction's counters, looked up once.
#[derive(Clone, Debug)]
pub struct DirectionMetrics {
    direction: &'static str,
    requests: (Counter, Counter),
    replies: (Counter, Counter),
    long: Counter,
    all: DatagramMetrics,
}

/// Counts a flow as open until dropped.
#[derive(Debug)]
pub struct OpenFlow(Gauge);

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl DatagramMetrics {
    /// Registers the families.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("datagram");
        registry.register("flows", "Open flows of datagrams", metrics.open.clone());
        registry.register("flows_limit", "Flows of datagrams that may be open at once", metrics.limit.clone());
        registry.register("flows_opened", "Flows of datagrams that began", metrics.opened.clone());
        registry.register("flows_closed", "Flows of datagrams that ended, by reason", metrics.closed.clone());
        registry.register("passed", "Datagrams that passed, requests and replies", metrics.passed.clone());
        registry.register_with_unit("passed", "Their payloads", Unit::Bytes, metrics.bytes.clone());
        registry.register("dropped", "Datagrams that were dropped, by reason", metrics.dropped.clone());
        registry.register(
            "long",
            "Datagrams too long for a packet between nodes, sent over the flow's stream",
            metrics.long.clone(),
        );
        metrics
    }

    /// The counters of `outbound` or `inbound`, which has room for this many flows.
    #[must_use]
    pub fn direction(&self, direction: &'static str, limit: usize) -> DirectionMetrics {
        self.limit.get_or_create(&[("direction", direction)]).set(i64::try_from(limit).unwrap_or(i64::MAX));
        let pair = |kind| {
            let labels = [("direction", direction), ("kind", kind)];
            (self.passed.get_or_create_owned(&labels), self.bytes.get_or_create_owned(&labels))
        };
        DirectionMetrics {
            direction,
            requests: pair("request"),
            replies: pair("reply"),
            long: self.long.get_or_create_owned(&[("direction", direction)]),
            all: self.clone(),
        }
    }
}

impl DirectionMetrics {
    /// A flow begins.
    #[must_use]
    pub fn opened(&self) -> OpenFlow {
        let labels = [("direction", self.direction)];
        self.all.opened.get_or_create(&labels).inc();
        let gauge = self.all.open.get_or_create_owned(&labels);
        gauge.inc();
        OpenFlow(gauge)
    }

    /// A flow has ended, or could not begin.
    pub fn closed(&self, reason: &'static str) {
        self.all.closed.get_or_create(&[("direction", self.direction), ("reason", reason)]).inc();
    }

    /// A datagram of the caller has passed.
    pub fn request(&self, bytes: usize) {
        self.requests.0.inc();
        self.requests.1.inc_by(bytes as u64);
    }

    /// A datagram for the caller has passed.
    pub fn reply(&self, bytes: usize) {
        self.replies.0.inc();
        self.replies.1.inc_by(bytes as u64);
    }

    /// A datagram went over its flow's stream.
    pub fn long(&self) {
        self.long.inc();
    }

    /// A datagram is lost.
    pub fn dropped(&self, reason: &'static str) {
        self.all.dropped.get_or_create(&[("direction", self.direction), ("reason", reason)]).inc();
    }
}
