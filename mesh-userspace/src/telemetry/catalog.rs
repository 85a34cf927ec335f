//! How the catalog is doing.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: &'static str,
}

/// Families of the catalog; clones share their values.
#[derive(Clone, Debug, Default)]
pub struct CatalogMetrics {
    objects: Family<Kind, Gauge>,
    errors: Family<Code, Gauge>,
    applied: Counter,
    last_applied: Gauge<f64, AtomicU64>,
}

impl CatalogMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("config_objects", "Catalog objects in force", metrics.objects.clone());
        registry.register(
            "config_errors",
            "Errors in the catalog as it is now; what they name keeps its last good state",
            metrics.errors.clone(),
        );
        registry.register("config_applied", "Catalog changes handed on to be applied", metrics.applied.clone());
        registry.register_with_unit(
            "config_last_applied_timestamp",
            "When the last catalog change was handed on",
            Unit::Seconds,
            metrics.last_applied.clone(),
        );
        metrics
    }

    /// Shows the present number of objects by kind, and of errors by code; what is not named keeps its number.
    pub fn show(&self, objects: &BTreeMap<&'static str, usize>, errors: &BTreeMap<&'static str, u64>) {
        for (kind, count) in objects {
            self.objects.get_or_create(&Kind { kind }).set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
        for (code, count) in errors {
            self.errors.get_or_create(&Code { code }).set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
    }

    /// Counts a change that was handed on at `now`.
    pub fn applied(&self, now: SystemTime) {
        self.applied.inc();
        self.last_applied.set(now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_scrape_shows_the_present() {
        let mut registry = Registry::with_prefix("nodemesh");
        let metrics = CatalogMetrics::register(&mut registry);
        metrics.show(&[("Service", 3)].into(), &[("M0104", 2)].into());
        metrics.show(&[("Service", 4)].into(), &[("M0104", 0), ("M0203", 1)].into());
        metrics.applied(UNIX_EPOCH + Duration::from_millis(1_500));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "nodemesh_config_objects{kind=\"Service\"} 4",
            "nodemesh_config_errors{code=\"M0104\"} 0",
            "nodemesh_config_errors{code=\"M0203\"} 1",
            "nodemesh_config_applied_total 1",
            "nodemesh_config_last_applied_timestamp_seconds 1.5",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
