//! How getting certificates goes.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Families of issuance; clones share their values.
#[derive(Clone, Debug, Default)]
pub struct CertificateMetrics {
    rotations: Family<[(&'static str, &'static str); 1], Counter>,
}

impl CertificateMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let help = "Certificates that this node has asked its authority for, by what came of it";
        registry.register("cert_rotations", help, metrics.rotations.clone());
        metrics
    }

    /// A certificate was asked for; `result` is `success`, or why not.
    pub fn rotated(&self, result: &'static str) {
        self.rotations.get_or_create(&[("result", result)]).inc();
    }
}
