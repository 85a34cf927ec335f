//! How getting certificates goes.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::time::Duration;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Families of issuance; clones share their values.
#[derive(Clone, Debug)]
pub struct CertificateMetrics {
    rotations: Family<Labels<1>, Counter>,
    requests: Family<Labels<2>, Histogram, fn() -> Histogram>,
}

impl Default for CertificateMetrics {
    fn default() -> Self {
        Self { rotations: Family::default(), requests: Family::new_with_constructor(seconds) }
    }
}

/// From an authority next door to one that is given up on.
fn seconds() -> Histogram {
    Histogram::new([0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0])
}

impl CertificateMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let help = "Certificates that this node has asked its authority for, by what came of it";
        registry.register("cert_rotations", help, metrics.rotations.clone());
        let help = "How long the certificate authority took to answer this node";
        registry.register_with_unit("ca_requests", help, Unit::Seconds, metrics.requests.clone());
        metrics
    }

    /// A certificate was asked for; `result` is `success`, or why not.
    pub fn rotated(&self, result: &'static str) {
        self.rotations.get_or_create(&[("result", result)]).inc();
    }

    /// The authority answered, or was given up on. `operation`: `sign` or `bundle`; `result`: `ok`, or why not.
    pub fn asked(&self, operation: &'static str, result: &'static str, took: Duration) {
        self.requests.get_or_create(&[("operation", operation), ("result", result)]).observe(took.as_secs_f64());
    }
}
