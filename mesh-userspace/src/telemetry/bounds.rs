//! How full every bound is, and how often it was hit: one name each, three families for all.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::fmt;

/// One bound at the moment of a scrape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// A stable name.
    pub name: &'static str,
    pub used: u64,
    pub capacity: u64,
    /// How often somebody was turned away, or had to wait.
    pub hits: u64,
}

type Read = Box<dyn Fn() -> Vec<Bound> + Send + Sync>;

struct AtScrape(Read);

impl fmt::Debug for AtScrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtScrape").finish_non_exhaustive()
    }
}

/// Registers `bound_used`, `bound_capacity` and `bound_hits`; `read` is called once a scrape.
pub fn register(registry: &mut Registry, read: impl Fn() -> Vec<Bound> + Send + Sync + 'static) {
    registry.register_collector(Box::new(AtScrape(Box::new(read))));
}

impl Collector for AtScrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        type Value = fn(&Bound) -> u64;
        let gauges: [(&str, &str, Value); 2] = [
            ("bound_used", "What is taken of a bound.", |bound| bound.used),
            ("bound_capacity", "What a bound has room for.", |bound| bound.capacity),
        ];
        let bounds = (self.0)();
        for (name, help, value) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for bound in &bounds {
                family.encode_family(&[("bound", bound.name)])?.encode_gauge(&value(bound))?;
            }
        }
        let help = "How often a bound was hit.";
        let mut family = encoder.encode_descriptor("bound_hits", help, None, MetricType::Counter)?;
        for bound in &bounds {
            family.encode_family(&[("bound", bound.name)])?.encode_counter::<NoLabelSet, _, f64>(&bound.hits, None)?;
        }
        Ok(())
    }
}

/// Counts what accept() has failed for. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct AcceptFailures(Family<[(&'static str, &'static str); 2], Counter>);

impl AcceptFailures {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let failures = Self::default();
        registry.register(
            "accept_failures",
            "Times that a connection could not be accepted, by listener and reason",
            failures.0.clone(),
        );
        failures
    }

    /// A connection could not be accepted.
    pub fn count(&self, listener: &'static str, reason: &'static str) {
        self.0.get_or_create(&[("listener", listener), ("reason", reason)]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_shows_its_headroom_and_its_hits() {
        let mut registry = Registry::with_prefix("nodemesh");
        register(&mut registry, || vec![Bound { name: "descriptors", used: 3, capacity: 8, hits: 2 }]);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "nodemesh_bound_used{bound=\"descriptors\"} 3",
            "nodemesh_bound_capacity{bound=\"descriptors\"} 8",
            "nodemesh_bound_hits_total{bound=\"descriptors\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
