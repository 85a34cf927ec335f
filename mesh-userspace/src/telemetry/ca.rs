//! The certificate authority that runs in this process.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Families of an authority; clones share their values.
#[derive(Clone, Debug, Default)]
pub struct CaMetrics {
    issued: Family<Kind, Counter>,
    refused: Family<Reason, Counter>,
    expires: Family<Kind, Gauge<f64, AtomicU64>>,
    nodes: Gauge,
}

impl CaMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("ca_issued", "Certificates that this authority has signed", metrics.issued.clone());
        registry.register("ca_refused", "Requests that this authority has refused", metrics.refused.clone());
        registry.register_with_unit(
            "ca_expiration_timestamp",
            "When the certificates with which this authority signs end",
            Unit::Seconds,
            metrics.expires.clone(),
        );
        registry.register("ca_nodes", "Nodes that have joined and are not revoked", metrics.nodes.clone());
        metrics
    }

    /// Makes the series of every kind and every reason, at 0.
    pub fn prepare(&self, kinds: &[&'static str], reasons: &[&'static str]) {
        for kind in kinds {
            drop(self.issued.get_or_create(&Kind { kind }));
        }
        for reason in reasons {
            drop(self.refused.get_or_create(&Reason { reason }));
        }
    }

    pub fn issued(&self, kind: &'static str) {
        self.issued.get_or_create(&Kind { kind }).inc();
    }

    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    pub fn expires(&self, kind: &'static str, at: SystemTime) {
        let at = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        self.expires.get_or_create(&Kind { kind }).set(at);
    }

    pub fn nodes(&self, count: usize) {
        self.nodes.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
