//! What the kernel counts, how full its maps are, and how long certificates last. All of it is read at the scrape,
//! through closures: this room knows neither the datapath nor identities.

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// One per-CPU counter of the kernel programs, summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutcomeCount {
    pub hook: &'static str,
    pub reason: &'static str,
    pub verdict: &'static str,
    pub count: u64,
}

/// How full one BPF map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSize {
    pub name: String,
    pub entries: u64,
    pub capacity: u64,
    /// Memory that the kernel charges for it.
    pub bytes: u64,
}

/// Records that were lost between the kernel and their reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Where: a fixed name.
    pub source: &'static str,
    pub count: u64,
}

/// A certificate and the time after which nobody accepts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// The SPIFFE ID.
    pub identity: String,
    pub not_after: SystemTime,
}

type Read<T> = Box<dyn Fn() -> Vec<T> + Send + Sync>;

/// Where the values come from; each closure is called once per scrape, on a thread that may block.
pub struct Sources {
    pub outcomes: Read<OutcomeCount>,
    pub maps: Read<MapSize>,
    pub lost: Read<Lost>,
    pub certificates: Read<Expiry>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// What the catalog asks for and the kernel's maps have no room for. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct LeftOut(Family<[(&'static str, &'static str); 1], Gauge>);

impl LeftOut {
    /// Registers `bpf_map_left_out`, with a value for each of these maps.
    pub fn register(registry: &mut Registry, maps: &[&'static str]) -> Self {
        let left_out = Self::default();
        registry.register(
            "bpf_map_left_out",
            "Entries that the catalog asks for and the map has no room for",
            left_out.0.clone(),
        );
        maps.iter().for_each(|map| left_out.set(map, 0));
        left_out
    }

    pub fn set(&self, map: &'static str, entries: usize) {
        self.0.get_or_create(&[("map", map)]).set(i64::try_from(entries).unwrap_or(i64::MAX));
    }
}

/// Registers `kernel_outcomes`, `bpf_map_*`, `events_lost` and `cert_expiration_timestamp_seconds`.
pub fn register(registry: &mut Registry, sources: Sources) {
    registry.register_collector(Box::new(sources));
}

impl prometheus_client::collector::Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "What each kernel hook did, and why.";
        let outcomes = (self.outcomes)().into_iter().map(|outcome| {
            let labels = [("hook", outcome.hook), ("reason", outcome.reason), ("verdict", outcome.verdict)];
            (labels, outcome.count)
        });
        counters(&mut encoder, "kernel_outcomes", help, outcomes)?;
        let help = "Records from the kernel that were lost before they were read.";
        let lost = (self.lost)().into_iter().map(|lost| ([("source", lost.source)], lost.count));
        counters(&mut encoder, "events_lost", help, lost)?;
        self.encode_maps(&mut encoder)?;
        self.encode_certificates(&mut encoder)
    }
}

impl Sources {
    fn encode_maps(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Value = fn(&MapSize) -> u64;
        let families: [(&str, &str, Option<Unit>, Value); 3] = [
            ("bpf_map_entries", "Entries in use.", None, |map| map.entries),
            ("bpf_map_capacity", "Entries that the map has room for.", None, |map| map.capacity),
            ("bpf_map", "Memory of the map.", Some(Unit::Bytes), |map| map.bytes),
        ];
        let maps = (self.maps)();
        for (name, help, unit, value) in families {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for map in &maps {
                family.encode_family(&[("map", map.name.as_str())])?.encode_gauge(&value(map))?;
            }
        }
        Ok(())
    }

    fn encode_certificates(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "When the certificate of an identity ends, in Unix time.";
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor("cert_expiration_timestamp", help, unit, MetricType::Gauge)?;
        for certificate in (self.certificates)() {
            let seconds = certificate.not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            family.encode_family(&[("identity", certificate.identity.as_str())])?.encode_gauge(&seconds)?;
        }
        Ok(())
    }
}

fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn sample() -> Sources {
    Sources {
        outcomes: Box::new(|| vec![OutcomeCount { hook: "connect", reason: "captured", verdict: "capture", count: 7 }]),
        maps: Box::new(|| vec![MapSize { name: "PODS".to_owned(), entries: 3, capacity: 512, bytes: 65_536 }]),
        lost: Box::new(|| vec![Lost { source: "ring_buffer", count: 2 }]),
        certificates: Box::new(|| {
            vec![Expiry {
                identity: "spiffe://example.org/ns/shop/sa/cart".to_owned(),
                not_after: UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000),
            }]
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scrape_asks_anew() {
        let scrapes = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let seen = scrapes.clone();
        let lost = move || {
            let count = seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            vec![Lost { source: "ring_buffer", count }]
        };
        let mut registry = Registry::with_prefix("nodemesh");
        register(&mut registry, Sources { lost: Box::new(lost), ..sample() });
        let encode = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        assert!(encode().contains("nodemesh_events_lost_total{source=\"ring_buffer\"} 0\n"));
        let second = encode();
        for line in [
            "nodemesh_events_lost_total{source=\"ring_buffer\"} 1",
            "nodemesh_kernel_outcomes_total{hook=\"connect\",reason=\"captured\",verdict=\"capture\"} 7",
            "nodemesh_bpf_map_entries{map=\"PODS\"} 3",
            "nodemesh_bpf_map_capacity{map=\"PODS\"} 512",
            "nodemesh_bpf_map_bytes{map=\"PODS\"} 65536",
            "nodemesh_cert_expiration_timestamp_seconds{identity=\"spiffe://example.org/ns/shop/sa/cart\"} 1800000000",
        ] {
            assert!(second.lines().any(|found| found == line), "{line} is not in\n{second}");
        }
        assert_eq!(scrapes.load(std::sync::atomic::Ordering::Relaxed), 2);
    }
}
