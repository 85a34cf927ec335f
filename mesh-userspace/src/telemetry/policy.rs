//! What policy decided, here and in the kernel: counters by policy and rule, hits for `nodemesh get policies`, and log
//! lines that a flood of refused connections cannot turn into a flood of lines.

use super::bounded::{BoundedCounters, SERIES};
use super::limit::LineLimit;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Rules whose hits are kept.
const RULES: usize = 10_000;
/// In place of a policy or rule where none decided.
pub const NONE: &str = "-";

/// Where a verdict was given: the `enforced_by` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EnforcedBy {
    /// The proxy of the destination's node.
    Destination,
    /// The proxy of the source's node.
    Source,
    /// The source's connect().
    KernelConnect,
    /// The destination's kernel, for plaintext.
    KernelSkLookup,
}

impl EnforcedBy {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Destination => "destination",
            Self::Source => "source",
            Self::KernelConnect => "kernel_connect",
            Self::KernelSkLookup => "kernel_sk_lookup",
        }
    }
}

/// One verdict about one connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerdictKey {
    /// `allow`, `deny`, `audit`, `dry_run_allow` or `dry_run_deny`.
    pub verdict: &'static str,
    pub reason: &'static str,
    /// `namespace/name`, or [`NONE`].
    pub policy: Arc<str>,
    pub rule: Arc<str>,
    pub enforced_by: EnforcedBy,
    /// The destination's owner, as in the families of connections.
    pub workload: Arc<str>,
    pub namespace: Arc<str>,
}

/// A plaintext connection that the kernel decided about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlaintextKey {
    /// `admitted` or `refused`.
    pub verdict: &'static str,
    pub source_workload: Arc<str>,
    pub source_namespace: Arc<str>,
    pub destination_workload: Arc<str>,
    pub destination_namespace: Arc<str>,
}

/// How often a rule had something to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleHits {
    pub policy: Arc<str>,
    pub rule: Arc<str>,
    pub hits: u64,
}

/// As labels show them.
type PolicyAndRule = (Arc<str>, Arc<str>);

#[derive(Debug)]
struct Families {
    verdicts: Arc<BoundedCounters<VerdictKey>>,
    plaintext: Arc<BoundedCounters<PlaintextKey>>,
    cut: Mutex<BTreeMap<&'static str, u64>>,
    hits: Mutex<BTreeMap<PolicyAndRule, u64>>,
    lines: LineLimit,
    suppressed: AtomicU64,
}

/// The families `policy_*` and `plaintext_connections`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PolicyMetrics(Arc<Families>);

impl Default for PolicyMetrics {
    fn default() -> Self {
        Self(Arc::new(Families {
            verdicts: Arc::new(BoundedCounters::new("policy_verdicts", SERIES)),
            plaintext: Arc::new(BoundedCounters::new("plaintext_connections", SERIES)),
            cut: Mutex::default(),
            hits: Mutex::default(),
            lines: LineLimit::default(),
            suppressed: AtomicU64::new(0),
        }))
    }
}

impl PolicyMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register_collector(Box::new(metrics.clone()));
        metrics
    }

    /// The families whose series are bounded.
    pub(super) fn bounded(&self) -> Vec<Arc<dyn super::bounded::BoundedFamily>> {
        vec![self.0.plaintext.clone(), self.0.verdicts.clone()]
    }

    /// Counts a verdict, and a hit of the rule behind it.
    pub fn verdict(&self, key: VerdictKey) {
        if &*key.policy != NONE {
            let mut hits = self.0.hits.lock().unwrap_or_else(PoisonError::into_inner);
            let rule = (key.policy.clone(), key.rule.clone());
            // Rules past the bound, thousands of them, are counted in the family only.
            if hits.len() < RULES || hits.contains_key(&rule) {
                *hits.entry(rule).or_default() += 1;
            }
        }
        self.0.verdicts.count(key, Instant::now());
    }

    /// Counts a plaintext connection that the kernel admitted or refused.
    pub fn plaintext(&self, key: PlaintextKey) {
        self.0.plaintext.count(key, Instant::now());
    }

    /// Counts live connections that were cut. `reason` is one of a fixed set.
    pub fn cut(&self, reason: &'static str, count: u64) {
        *self.0.cut.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += count;
    }

    /// Hits of every rule since the start, on this node, by policy and rule.
    #[must_use]
    pub fn hits(&self) -> Vec<RuleHits> {
        let hits = self.0.hits.lock().unwrap_or_else(PoisonError::into_inner);
        let row = |((policy, rule), hits): (&(Arc<str>, Arc<str>), &u64)| RuleHits {
            policy: policy.clone(),
            rule: rule.clone(),
            hits: *hits,
        };
        hits.iter().map(row).collect()
    }

    /// Whether a line about a verdict may be written now; if so, how many were held back since the last one.
    #[must_use]
    pub fn may_log(&self, now: Instant) -> Option<u64> {
        let permit = self.0.lines.ask(now);
        if permit.is_none() {
            self.0.suppressed.fetch_add(1, Relaxed);
        }
        permit
    }
}

struct VerdictLabels<'a>(&'a VerdictKey);

impl EncodeLabelSet for VerdictLabels<'_> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> fmt::Result {
        let key = self.0;
        [
            ("verdict", key.verdict),
            ("reason", key.reason),
            ("policy", &*key.policy),
            ("rule", &*key.rule),
            ("enforced_by", key.enforced_by.as_str()),
            ("destination_workload", &*key.workload),
            ("destination_workload_namespace", &*key.namespace),
        ]
        .encode(encoder)
    }
}

struct PlaintextLabels<'a>(&'a PlaintextKey);

impl EncodeLabelSet for PlaintextLabels<'_> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> fmt::Result {
        let key = self.0;
        [
            ("verdict", key.verdict),
            ("source_workload", &*key.source_workload),
            ("source_workload_namespace", &*key.source_namespace),
            ("destination_workload", &*key.destination_workload),
            ("destination_workload_namespace", &*key.destination_namespace),
        ]
        .encode(encoder)
    }
}

impl Collector for PolicyMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "What policy said about new connections, by policy and rule, where it was decided.";
        let (verdicts, overflow) = self.0.verdicts.read();
        let samples = verdicts.iter().map(|(key, count)| (VerdictLabels(key), *count));
        family(&mut encoder, "policy_verdicts", help, samples, overflow)?;
        let help = "Plaintext connections from outside that the kernel decided about, by caller.";
        let (plaintext, overflow) = self.0.plaintext.read();
        let samples = plaintext.iter().map(|(key, count)| (PlaintextLabels(key), *count));
        family(&mut encoder, "plaintext_connections", help, samples, overflow)?;
        let help = "Live connections that a change of policy, mode or identity ended.";
        let cut = self.0.cut.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let samples = cut.into_iter().map(|(reason, count)| ([("reason", reason)], count));
        family(&mut encoder, "policy_connections_cut", help, samples, 0)?;
        let help = "Log lines about verdicts that were held back because there were too many.";
        let mut held_back =
            encoder.encode_descriptor("policy_log_lines_suppressed", help, None, MetricType::Counter)?;
        held_back.encode_counter::<NoLabelSet, _, f64>(&self.0.suppressed.load(Relaxed), None)
    }
}

fn family<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, u64)>,
    overflow: u64,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, count) in samples {
        family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
    }
    if overflow > 0 {
        family.encode_family(&[("overflow", "true")])?.encode_counter::<NoLabelSet, _, f64>(&overflow, None)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn sample(metrics: &PolicyMetrics) {
    metrics.verdict(VerdictKey {
        verdict: "deny",
        reason: "denied",
        policy: "shop/block".into(),
        rule: "old".into(),
        enforced_by: EnforcedBy::Destination,
        workload: "cart".into(),
        namespace: "shop".into(),
    });
    metrics.plaintext(PlaintextKey {
        verdict: "admitted",
        source_workload: "unknown".into(),
        source_namespace: "unknown".into(),
        destination_workload: "cart".into(),
        destination_namespace: "shop".into(),
    });
    metrics.cut("denied", 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_names_policy_and_rule_and_where_it_was_decided() {
        let mut registry = Registry::with_prefix("nodemesh");
        let metrics = PolicyMetrics::register(&mut registry);
        sample(&metrics);
        sample(&metrics);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "nodemesh_policy_verdicts_total{verdict=\"deny\",reason=\"denied\",policy=\"shop/block\",rule=\"old\",\
             enforced_by=\"destination\",destination_workload=\"cart\",destination_workload_namespace=\"shop\"} 2",
            "nodemesh_plaintext_connections_total{verdict=\"admitted\",source_workload=\"unknown\",\
             source_workload_namespace=\"unknown\",destination_workload=\"cart\",\
             destination_workload_namespace=\"shop\"} 2",
            "nodemesh_policy_connections_cut_total{reason=\"denied\"} 2",
            "nodemesh_policy_log_lines_suppressed_total 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        let hits = vec![RuleHits { policy: "shop/block".into(), rule: "old".into(), hits: 2 }];
        assert_eq!(metrics.hits(), hits);
    }

    #[test]
    fn lines_that_are_held_back_are_counted() {
        let metrics = PolicyMetrics::default();
        let now = Instant::now();
        let written = (0..1_000).filter(|_| metrics.may_log(now).is_some()).count() as u64;
        assert!(written > 0 && written < 1_000);
        assert_eq!(metrics.0.suppressed.load(Relaxed), 1_000 - written);
    }
}
