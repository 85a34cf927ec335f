//! What the mesh's DNS counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::time::Duration;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Queries that wait for an upstream server at a time.
pub const UPSTREAM_QUERIES: usize = 512;

const BUCKETS: [f64; 9] = [0.0001, 0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.0, 5.0];

/// Who knew the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnsweredBy {
    Mesh,
    Upstream,
}

impl AnsweredBy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Upstream => "upstream",
        }
    }
}

/// Families of the mesh's DNS; clones share their values.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    queries: Family<Labels<2>, Counter>,
    durations: Family<Labels<1>, Histogram, fn() -> Histogram>,
    upstream_failures: Family<Labels<1>, Counter>,
    upstream_durations: Histogram,
    asking: Gauge,
}

fn seconds() -> Histogram {
    Histogram::new(BUCKETS)
}

impl DnsMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            queries: Family::default(),
            durations: Family::new_with_constructor(seconds),
            upstream_failures: Family::default(),
            upstream_durations: seconds(),
            asking: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("dns");
        registry.register("queries", "DNS queries of this node's workloads, by result", metrics.queries.clone());
        let help = "From a DNS query to its answer";
        registry.register_with_unit("query_duration", help, Unit::Seconds, metrics.durations.clone());
        let help = "Questions that an upstream DNS server did not answer, by reason";
        registry.register("upstream_failures", help, metrics.upstream_failures.clone());
        let help = "From a question to an upstream DNS server to its answer";
        registry.register_with_unit("upstream_duration", help, Unit::Seconds, metrics.upstream_durations.clone());
        registry.register(
            "upstream_queries",
            "DNS queries that wait for an upstream server now",
            metrics.asking.clone(),
        );
        let bound = i64::try_from(UPSTREAM_QUERIES).unwrap_or(i64::MAX);
        let help = "DNS queries that may wait for an upstream server at a time; further ones fail, reason busy";
        registry.register("upstream_queries_limit", help, ConstGauge::new(bound));
        metrics
    }

    pub fn answered(&self, by: AnsweredBy, result: &'static str, took: Duration) {
        self.queries.get_or_create(&[("answered_by", by.as_str()), ("result", result)]).inc();
        self.durations.get_or_create(&[("answered_by", by.as_str())]).observe(took.as_secs_f64());
    }

    pub fn upstream_answered(&self, took: Duration) {
        self.upstream_durations.observe(took.as_secs_f64());
    }

    pub fn upstream_failed(&self, reason: &'static str) {
        self.upstream_failures.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts a query as waiting until dropped.
    #[must_use]
    pub fn asking(&self) -> Asking {
        self.asking.inc();
        Asking(self.asking.clone())
    }
}

/// See [`DnsMetrics::asking`].
#[derive(Debug)]
pub struct Asking(Gauge);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.dec();
    }
}
