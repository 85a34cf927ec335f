//! What policy said, told: counted by policy and rule, logged where nobody else logs it.

use super::verdict::{NamedVerdict, Ruling};
use crate::model::{SpiffeId, Workload};
use crate::telemetry::plaintext::PlaintextCallers;
use crate::telemetry::policy::{EnforcedBy, NONE, PolicyMetrics, VerdictKey};
use mesh_common::outcome::Outcome;
use mesh_common::policy::Reason;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// In place of a destination that the catalog no longer knows.
const UNKNOWN: &str = "unknown";

/// Counters, log and table of verdicts. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Reports {
    pub metrics: PolicyMetrics,
    pub plaintext: PlaintextCallers,
}

/// Whom a verdict is about.
pub(super) struct Parties<'a> {
    pub(super) source: SocketAddr,
    pub(super) source_workload: Option<&'a Workload>,
    pub(super) destination: SocketAddr,
    /// `None` once the catalog has lost it.
    pub(super) workload: Option<&'a Workload>,
}

impl Reports {
    /// Tells a verdict about a connection whose end the access log will tell: what is audited, and what would be with
    /// the policies in dry-run in force, gets a line here.
    pub(super) fn decided(&self, told: &NamedVerdict, by: EnforcedBy, parties: &Parties<'_>) {
        self.count(told.ruling.word(), &told.ruling, by, parties.workload);
        self.beside(told, by, parties);
    }

    /// [`Self::decided`] about a connection that ends in the kernel: a refusal gets its line here.
    pub(super) fn decided_by_kernel(&self, told: &NamedVerdict, by: EnforcedBy, parties: &Parties<'_>) {
        self.decided(told, by, parties);
        if told.is_denied() {
            self.log(told.ruling.word(), &told.ruling, by, parties);
        }
    }

    /// The kernel refused a connection for another reason than policy or mode.
    pub(super) fn kernel_refused(&self, outcome: Outcome, source: SocketAddr, destination: SocketAddr) {
        let Some(suppressed) = self.metrics.may_log(Instant::now()) else { return };
        tracing::info!(
            target: "policy",
            verdict = outcome.verdict(),
            reason = outcome.reason(),
            enforced_by = outcome.hook(),
            src.addr = %source,
            dst.addr = %destination,
            suppressed = (suppressed > 0).then_some(suppressed),
            "{}", outcome.describe()
        );
    }

    /// A live connection was cut that has no access log: plaintext, which the kernel carries.
    pub(super) fn cut_plaintext(&self, ruling: &Ruling, parties: &Parties<'_>) {
        self.metrics.cut(ruling.reason.as_str(), 1);
        self.log("cut", ruling, EnforcedBy::Destination, parties);
    }

    fn beside(&self, told: &NamedVerdict, by: EnforcedBy, parties: &Parties<'_>) {
        if let Some(audit) = &told.audit {
            let ruling =
                Ruling { policy: Some(audit.policy.clone()), rule: Some(audit.rule.clone()), ..told.ruling.clone() };
            self.count("audit", &ruling, by, parties.workload);
            self.log("audit", &ruling, by, parties);
        }
        if let Some(would_be) = &told.dry_run {
            let word = if would_be.is_denied() { "dry_run_deny" } else { "dry_run_allow" };
            self.count(word, would_be, by, parties.workload);
            self.log(word, would_be, by, parties);
        }
    }

    fn count(&self, verdict: &'static str, ruling: &Ruling, by: EnforcedBy, destination: Option<&Workload>) {
        if matches!(ruling.reason, Reason::SelfTraffic | Reason::Delivery) {
            return;
        }
        let none = || Arc::from(NONE);
        self.metrics.verdict(VerdictKey {
            verdict,
            reason: ruling.reason.as_str(),
            policy: ruling.policy.as_ref().map_or_else(none, |policy| policy.to_string().into()),
            rule: ruling.rule.clone().unwrap_or_else(none),
            enforced_by: by,
            workload: destination.map_or_else(|| UNKNOWN.into(), |workload| workload.owner.clone()),
            namespace: destination.map_or(UNKNOWN, |workload| workload.name.namespace()).into(),
        });
    }

    fn log(&self, verdict: &'static str, ruling: &Ruling, by: EnforcedBy, parties: &Parties<'_>) {
        let Some(suppressed) = self.metrics.may_log(Instant::now()) else { return };
        let source = parties.source_workload;
        tracing::info!(
            target: "policy",
            verdict,
            reason = ruling.reason.as_str(),
            policy = ruling.policy.as_ref().map_or_else(|| NONE.to_owned(), ToString::to_string),
            rule = ruling.rule.as_deref().unwrap_or(NONE),
            enforced_by = by.as_str(),
            src.addr = %parties.source,
            src.workload = source.map(|workload| tracing::field::display(&workload.name)),
            src.identity = source.map(|workload| SpiffeId::as_str(&workload.identity)),
            dst.addr = %parties.destination,
            dst.workload = parties.workload.map(|workload| tracing::field::display(&workload.name)),
            suppressed = (suppressed > 0).then_some(suppressed),
            "policy"
        );
    }
}
