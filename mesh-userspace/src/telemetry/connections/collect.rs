//! Encodes the store at a scrape.

use super::super::bounded::BoundedFamily;
use super::store::{Labels, LiteKey, Series, Store};
use super::{EdgeKey, Failure, Reporter};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[derive(Debug)]
pub(super) struct Collector {
    store: Arc<Store>,
    /// Bounded families that are encoded elsewhere.
    others: Arc<[Arc<dyn BoundedFamily>]>,
}

impl Collector {
    pub(super) fn new(store: Arc<Store>, others: Arc<[Arc<dyn BoundedFamily>]>) -> Self {
        Self { store, others }
    }

    fn encode_counters(encoder: &mut DescriptorEncoder<'_>, edges: &[Arc<Series>]) -> fmt::Result {
        type Read = fn(&Series) -> &AtomicU64;
        let families: [(&str, &str, Option<Unit>, Read); 4] = [
            ("tcp_connections_opened", "Connections that began.", None, |series| &series.opened),
            ("tcp_connections_closed", "Connections that ended, failed ones included.", None, |series| &series.closed),
            (
                "tcp_sent",
                "Bytes that destinations sent to sources (responses), for both reporters.",
                Some(Unit::Bytes),
                |series| &series.sent,
            ),
            (
                "tcp_received",
                "Bytes that destinations received from sources (requests), for both reporters.",
                Some(Unit::Bytes),
                |series| &series.received,
            ),
        ];
        for (name, help, unit, read) in families {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for series in edges.iter().filter(|series| series.is_shown()) {
                counter(&mut family, &series.labels, read(series).load(Relaxed))?;
            }
        }
        Ok(())
    }

    fn encode_failures(encoder: &mut DescriptorEncoder<'_>, edges: &[Arc<Series>]) -> fmt::Result {
        let help = "Connections that failed, by Istio's response flag and the cause.";
        let mut family = encoder.encode_descriptor("tcp_connections_failed", help, None, MetricType::Counter)?;
        for series in edges {
            for (failure, count) in series.failures() {
                counter(&mut family, &FailureLabels { series: &series.labels, failure }, count)?;
            }
        }
        Ok(())
    }

    fn encode_active(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Connections that are open now.";
        let mut family = encoder.encode_descriptor("tcp_connections_active", help, None, MetricType::Gauge)?;
        for reporter in Reporter::ALL {
            family.encode_family(&[("reporter", reporter.as_str())])?.encode_gauge(&self.store.active(reporter))?;
        }
        Ok(())
    }

    fn encode_durations(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "How long closed connections were open.";
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor("tcp_connection_duration", help, unit, MetricType::Histogram)?;
        for durations in self.store.durations() {
            let (sum, buckets) = durations.read();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let mut series = family.encode_family(&durations.labels)?;
            series.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn encode_sizes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let sizes = self.store.sizes();
        let mut families = vec![
            ("tcp_connections", sizes.edges as u64, sizes.edges_dropped),
            ("tcp_connections_failed", sizes.failures as u64, sizes.failures_dropped),
            ("tcp_connection_duration_seconds", sizes.durations as u64, sizes.durations_dropped),
        ];
        families.extend(self.others.iter().map(|other| (other.name(), other.series(), other.dropped())));
        let help = "Series that a family whose label sets are bounded holds now.";
        let mut series = encoder.encode_descriptor("metrics_series", help, None, MetricType::Gauge)?;
        for (name, used, _) in &families {
            series.encode_family(&[("family", *name)])?.encode_gauge(used)?;
        }
        let help = "Times that a family was at its cap, so that the overflow series counted instead.";
        let mut dropped = encoder.encode_descriptor("metrics_series_dropped", help, None, MetricType::Counter)?;
        for (name, _, count) in families {
            counter(&mut dropped, &[("family", name)], count)?;
        }
        Ok(())
    }
}

impl prometheus_client::collector::Collector for Collector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let edges = self.store.edges();
        Self::encode_counters(&mut encoder, &edges)?;
        Self::encode_failures(&mut encoder, &edges)?;
        self.encode_active(&mut encoder)?;
        self.encode_durations(&mut encoder)?;
        self.encode_sizes(&mut encoder)
    }
}

fn counter(family: &mut MetricEncoder<'_>, labels: &impl EncodeLabelSet, value: u64) -> fmt::Result {
    family.encode_family(labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)
}

fn overflow(reporter: Reporter) -> [(&'static str, &'static str); 2] {
    [("reporter", reporter.as_str()), ("overflow", "true")]
}

impl EncodeLabelSet for Labels<Arc<EdgeKey>> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        match self {
            Self::Own(key) => edge_labels(key).encode(encoder),
            Self::Overflow(reporter) => overflow(*reporter).encode(encoder),
        }
    }
}

impl EncodeLabelSet for Labels<LiteKey> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        match self {
            Self::Own(key) => lite_labels(key).encode(encoder),
            Self::Overflow(reporter) => overflow(*reporter).encode(encoder),
        }
    }
}

struct FailureLabels<'a> {
    series: &'a Labels<Arc<EdgeKey>>,
    failure: Failure,
}

impl EncodeLabelSet for FailureLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.series.encode(encoder)?;
        [("response_flags", self.failure.flag.as_str()), ("reason", self.failure.reason)].encode(encoder)
    }
}

fn edge_labels(key: &EdgeKey) -> [(&'static str, &str); 14] {
    [
        ("reporter", key.reporter.as_str()),
        ("source_workload", &key.source.workload),
        ("source_workload_namespace", &key.source.namespace),
        ("source_canonical_service", &key.source.canonical_service),
        ("source_principal", &key.source.principal),
        ("destination_workload", &key.destination.workload),
        ("destination_workload_namespace", &key.destination.namespace),
        ("destination_canonical_service", &key.destination.canonical_service),
        ("destination_principal", &key.destination.principal),
        ("destination_service", &key.service.host),
        ("destination_service_name", &key.service.name),
        ("destination_service_namespace", &key.service.namespace),
        ("request_protocol", "tcp"),
        ("connection_security_policy", key.security.as_str()),
    ]
}

fn lite_labels(key: &LiteKey) -> [(&'static str, &str); 10] {
    [
        ("reporter", key.reporter.as_str()),
        ("source_workload_namespace", &key.source_namespace),
        ("source_canonical_service", &key.source_canonical_service),
        ("destination_workload_namespace", &key.destination_namespace),
        ("destination_canonical_service", &key.destination_canonical_service),
        ("destination_service", &key.service.host),
        ("destination_service_name", &key.service.name),
        ("destination_service_namespace", &key.service.namespace),
        ("request_protocol", "tcp"),
        ("connection_security_policy", key.security.as_str()),
    ]
}
