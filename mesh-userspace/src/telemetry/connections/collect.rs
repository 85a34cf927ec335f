//! Encodes the store at a scrape.

use super::super::bounded::BoundedFamily;
use super::store::{Labels, LiteKey, Series, Store};
use super::{EdgeKey, Failure, Protocol, Reporter};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[derive(Debug)]
pub(super) struct Collector {
    /// By protocol.
    stores: [Arc<Store>; 2],
    /// Bounded families that are encoded elsewhere.
    others: Arc<[Arc<dyn BoundedFamily>]>,
}

/// How a protocol's families are called and described.
struct Names {
    opened: [&'static str; 2],
    closed: [&'static str; 2],
    sent: [&'static str; 2],
    received: [&'static str; 2],
    failed: [&'static str; 2],
    active: [&'static str; 2],
    duration: [&'static str; 2],
    /// What has a bound, as `metrics_series` calls it: edges, failures, durations.
    bounded: [&'static str; 3],
}

const TCP: Names = Names {
    opened: ["tcp_connections_opened", "Connections that began."],
    closed: ["tcp_connections_closed", "Connections that ended, failed ones included."],
    sent: ["tcp_sent", "Bytes that destinations sent to sources (responses), for both reporters."],
    received: ["tcp_received", "Bytes that destinations received from sources (requests), for both reporters."],
    failed: ["tcp_connections_failed", "Connections that failed, by Istio's response flag and the cause."],
    active: ["tcp_connections_active", "Connections that are open now."],
    duration: ["tcp_connection_duration", "How long closed connections were open."],
    bounded: ["tcp_connections", "tcp_connections_failed", "tcp_connection_duration_seconds"],
};

const UDP: Names = Names {
    opened: ["udp_flows_opened", "Flows of datagrams that began, between workloads."],
    closed: ["udp_flows_closed", "Flows of datagrams that ended, failed ones included."],
    sent: ["udp_sent", "Payloads that destinations sent to sources (replies), for both reporters."],
    received: ["udp_received", "Payloads that destinations received from sources (requests), for both reporters."],
    failed: ["udp_flows_failed", "Flows of datagrams that failed, by Istio's response flag and the cause."],
    active: ["udp_flows_active", "Flows of datagrams that are open now."],
    duration: ["udp_flow_duration", "How long closed flows of datagrams were open."],
    bounded: ["udp_flows", "udp_flows_failed", "udp_flow_duration_seconds"],
};

const fn names(protocol: Protocol) -> &'static Names {
    match protocol {
        Protocol::Tcp => &TCP,
        Protocol::Udp => &UDP,
    }
}

impl Collector {
    pub(super) fn new(stores: [Arc<Store>; 2], others: Arc<[Arc<dyn BoundedFamily>]>) -> Self {
        Self { stores, others }
    }

    fn encode_counters(encoder: &mut DescriptorEncoder<'_>, names: &Names, edges: &[Arc<Series>]) -> fmt::Result {
        type Read = fn(&Series) -> &AtomicU64;
        let families: [([&str; 2], Option<Unit>, Read); 4] = [
            (names.opened, None, |series| &series.opened),
            (names.closed, None, |series| &series.closed),
            (names.sent, Some(Unit::Bytes), |series| &series.sent),
            (names.received, Some(Unit::Bytes), |series| &series.received),
        ];
        for ([name, help], unit, read) in families {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for series in edges.iter().filter(|series| series.is_shown()) {
                counter(&mut family, &series.labels, read(series).load(Relaxed))?;
            }
        }
        Ok(())
    }

    fn encode_failures(encoder: &mut DescriptorEncoder<'_>, names: &Names, edges: &[Arc<Series>]) -> fmt::Result {
        let [name, help] = names.failed;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for series in edges {
            for (failure, count) in series.failures() {
                counter(&mut family, &FailureLabels { series: &series.labels, failure }, count)?;
            }
        }
        Ok(())
    }

    fn encode_active(encoder: &mut DescriptorEncoder<'_>, names: &Names, store: &Store) -> fmt::Result {
        let [name, help] = names.active;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for reporter in Reporter::ALL {
            family.encode_family(&[("reporter", reporter.as_str())])?.encode_gauge(&store.active(reporter))?;
        }
        Ok(())
    }

    fn encode_durations(encoder: &mut DescriptorEncoder<'_>, names: &Names, store: &Store) -> fmt::Result {
        let [name, help] = names.duration;
        let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for durations in store.durations() {
            let (sum, buckets) = durations.read();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let mut series = family.encode_family(&durations.labels)?;
            series.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn encode_sizes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Vec::new();
        for (protocol, store) in Protocol::ALL.into_iter().zip(&self.stores) {
            let (sizes, [edges, failures, durations]) = (store.sizes(), names(protocol).bounded);
            families.extend([
                (edges, sizes.edges as u64, sizes.edges_dropped),
                (failures, sizes.failures as u64, sizes.failures_dropped),
                (durations, sizes.durations as u64, sizes.durations_dropped),
            ]);
        }
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
        for (protocol, store) in Protocol::ALL.into_iter().zip(&self.stores) {
            let (names, edges) = (names(protocol), store.edges());
            Self::encode_counters(&mut encoder, names, &edges)?;
            Self::encode_failures(&mut encoder, names, &edges)?;
            Self::encode_active(&mut encoder, names, store)?;
            Self::encode_durations(&mut encoder, names, store)?;
        }
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
        ("request_protocol", key.protocol.as_str()),
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
        ("request_protocol", key.protocol.as_str()),
        ("connection_security_policy", key.security.as_str()),
    ]
}
