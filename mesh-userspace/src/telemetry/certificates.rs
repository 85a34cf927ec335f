//! How getting certificates goes.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::time::Duration;

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// From an authority next door to one that is given up on.
const SECONDS: [f64; 10] = [0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0];

/// Families of issuance; clones share their values.
#[derive(Clone, Debug)]
pub struct CertificateMetrics {
    rotations: Family<Labels<1>, Counter>,
    requests: Family<Labels<2>, Histogram, fn() -> Histogram>,
}

impl Default for CertificateMetrics {
    fn default() -> Self {
        Self { rotations: Family::default(), requests: Family::new_with_constructor(|| Histogram::new(SECONDS)) }
    }
}

impl CertificateMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("cert_rotations", "Certificates asked for, by what came of it", metrics.rotations.clone());
        registry.register_with_unit(
            "ca_requests",
            "How long the certificate authority took to answer, by request and result",
            Unit::Seconds,
            metrics.requests.clone(),
        );
        metrics
    }

    /// A certificate was asked for; `result` is `success`, or why not.
    pub fn rotated(&self, result: &'static str) {
        self.rotations.get_or_create(&[("result", result)]).inc();
    }

    /// The authority answered, or was given up on. `request`: `sign` or `bundle`; `result`: `ok`, or why not.
    pub fn asked(&self, request: &'static str, result: &'static str, took: Duration) {
        self.requests.get_or_create(&[("request", request), ("result", result)]).observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_rotations_are_counted_by_result() {
        let mut registry = Registry::with_prefix("nodemesh");
        let metrics = CertificateMetrics::register(&mut registry);
        metrics.rotated("success");
        metrics.rotated("success");
        metrics.rotated("unavailable");
        metrics.asked("sign", "ok", Duration::from_millis(4));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "nodemesh_cert_rotations_total{result=\"success\"} 2",
            "nodemesh_cert_rotations_total{result=\"unavailable\"} 1",
            "nodemesh_ca_requests_seconds_bucket{le=\"0.005\",request=\"sign\",result=\"ok\"} 1",
            "nodemesh_ca_requests_seconds_bucket{le=\"0.002\",request=\"sign\",result=\"ok\"} 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
