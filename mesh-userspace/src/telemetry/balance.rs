//! Where connections go and what is done when that fails: retries, ejections, limits, health checks.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::fmt;

type Labels = [(&'static str, &'static str); 1];

/// What the proxy counts by itself. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct BalanceMetrics {
    retries: Family<Labels, Counter>,
    outcomes: Family<Labels, Counter>,
    probes: Family<Labels, Counter>,
}

/// What is read at the scrape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// By cause.
    pub ejections: Vec<(&'static str, u64)>,
    pub ejections_withheld: u64,
    /// By reason.
    pub exhausted: Vec<(&'static str, u64)>,
    pub panics: u64,
    pub failovers: u64,
    /// By state.
    pub endpoints: Vec<(&'static str, u64)>,
    pub groups: u64,
    pub open: u64,
    pub pending: u64,
    /// This node's endpoints that are probed, by state.
    pub probed: Vec<(&'static str, u64)>,
}

impl BalanceMetrics {
    /// Registers the families; `sums` is called once a scrape.
    pub fn register(registry: &mut Registry, sums: impl Fn() -> Sums + Send + Sync + 'static) -> Self {
        let metrics = Self::default();
        registry.register(
            "balance_retries",
            "Connections that were taken to another endpoint, by what went wrong at the one before",
            metrics.retries.clone(),
        );
        registry.register(
            "balance_retried_connections",
            "Connections that a retry has brought to an endpoint, or that could not be retried any more, by why",
            metrics.outcomes.clone(),
        );
        registry.register("health_checks", "Probes of this node's endpoints, by result", metrics.probes.clone());
        registry.register_collector(Box::new(AtScrape(Box::new(sums))));
        metrics
    }

    /// A connection goes to another endpoint; `reason`: why the last one did not do.
    pub fn retry(&self, reason: &'static str) {
        self.retries.get_or_create(&[("reason", reason)]).inc();
    }

    /// `result`: `recovered`, or what forbade another attempt.
    pub fn retried(&self, result: &'static str) {
        self.outcomes.get_or_create(&[("result", result)]).inc();
    }

    /// `result`: `healthy`, or why not.
    pub fn probed(&self, result: &'static str) {
        self.probes.get_or_create(&[("result", result)]).inc();
    }
}

struct AtScrape(Box<dyn Fn() -> Sums + Send + Sync>);

impl fmt::Debug for AtScrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtScrape").finish_non_exhaustive()
    }
}

impl Collector for AtScrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sums = (self.0)();
        let counters = MetricType::Counter;
        let help = "Times that an endpoint got no connections for a while because connections to it failed, by cause.";
        by_label(&mut encoder, "balance_ejections", help, counters, "cause", &sums.ejections)?;
        let help = "Connections, or retries, that found no endpoint or hit a bound of their service, by reason.";
        by_label(&mut encoder, "balance_exhausted", help, counters, "reason", &sums.exhausted)?;
        let help = "Ejections that were due and not made, because too many of the service's endpoints were out.";
        single(&mut encoder, "balance_ejections_withheld", help, counters, sums.ejections_withheld)?;
        let help = "Picks among endpoints that were out, because no other was left.";
        single(&mut encoder, "balance_panics", help, counters, sums.panics)?;
        let help = "Picks of endpoints that are farther away than the service prefers.";
        single(&mut encoder, "balance_failovers", help, counters, sums.failovers)?;
        let gauges = MetricType::Gauge;
        let help = "Endpoints of the frontends in use, as this node's connections see them, by state.";
        by_label(&mut encoder, "balance_endpoints", help, gauges, "state", &sums.endpoints)?;
        single(&mut encoder, "balance_frontends", "Frontends in use.", gauges, sums.groups)?;
        let help = "Connections of this node to services, those that no endpoint has accepted yet included.";
        single(&mut encoder, "balance_connections", help, gauges, sums.open)?;
        let help = "Connections of this node to services that no endpoint has accepted yet.";
        single(&mut encoder, "balance_pending_connections", help, gauges, sums.pending)?;
        let help = "Endpoints of this node that are probed, by state.";
        by_label(&mut encoder, "health_endpoints", help, gauges, "state", &sums.probed)
    }
}

fn by_label(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: MetricType,
    label: &'static str,
    values: &[(&'static str, u64)],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (value, count) in values {
        let labels = [(label, *value)];
        let mut sample = family.encode_family(&labels)?;
        match kind {
            MetricType::Counter => sample.encode_counter::<NoLabelSet, _, f64>(count, None)?,
            _ => sample.encode_gauge(count)?,
        }
    }
    Ok(())
}

fn single(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, kind: MetricType, value: u64) -> fmt::Result {
    let mut sample = encoder.encode_descriptor(name, help, None, kind)?;
    match kind {
        MetricType::Counter => sample.encode_counter::<NoLabelSet, _, f64>(&value, None),
        _ => sample.encode_gauge(&value),
    }
}

#[cfg(test)]
pub(super) fn sample(registry: &mut Registry) {
    let metrics = BalanceMetrics::register(registry, || Sums {
        ejections: vec![("timeout", 1)],
        exhausted: vec![("max_pending", 2)],
        endpoints: vec![("ejected", 1)],
        probed: vec![("healthy", 3)],
        ..Sums::default()
    });
    metrics.retry("refused");
    metrics.retried("recovered");
    metrics.probed("healthy");
}
