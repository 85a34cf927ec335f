//! What the kernel decided, named and told: refused connects, and plaintext that was admitted or refused.

use super::Context;
use super::report::Parties;
use super::verdict::{self, NamedVerdict, Ruling};
use crate::engine::{PolicyGroup, Snapshot};
use crate::model::{SpiffeId, Workload};
use crate::telemetry::plaintext::Plaintext;
use crate::telemetry::policy::{EnforcedBy, PlaintextKey};
use mesh_common::Ip;
use mesh_common::event::VerdictRecord;
use mesh_common::outcome::Outcome;
use mesh_common::policy::{Decision, Matched, Reason, Verdict, authorize};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

/// In place of what the catalog does not know.
const UNKNOWN: &str = "unknown";

impl Context {
    /// Tells what the kernel decided about one connection.
    pub fn kernel_decided(&self, record: &VerdictRecord, now: SystemTime) {
        let outcome = Outcome::ALL.iter().find(|outcome| **outcome as u32 == record.outcome()).copied();
        let snapshot = self.snapshot.load();
        match outcome {
            Some(Outcome::ConnectDenied) => self.refused_connect(&snapshot, record),
            Some(Outcome::LookupPlaintext) => self.plaintext(&snapshot, record, Verdict::Pass, now),
            Some(Outcome::LookupDenied | Outcome::LookupStrict) => {
                self.plaintext(&snapshot, record, Verdict::Drop, now);
            }
            Some(Outcome::LookupCarriedDenied) => self.refused_carried(&snapshot, record),
            Some(other) => self.reports.kernel_refused(other, source(record), destination(record)),
            None => tracing::warn!(outcome = record.outcome(), "a verdict of the kernel of an unknown kind is ignored"),
        }
    }

    /// A workload of this node was refused a connection in connect().
    fn refused_connect(&self, snapshot: &Snapshot, record: &VerdictRecord) {
        let (source, destination) = (source(record), destination(record));
        let endpoint = snapshot.frontend(destination).and_then(|frontend| frontend.endpoints.first());
        let workload = endpoint.map(|endpoint| &endpoint.workload).or_else(|| snapshot.workload_serving(destination));
        // The workload's port is what rules see; all endpoints of a frontend that the kernel decides about share it.
        let port = endpoint.map_or(destination.port(), |endpoint| endpoint.address.port());
        // An address may be shared, in a node's own namespace; the kernel says under which identity it called.
        let named = || snapshot.workload_speaking(source.ip(), snapshot.identity(record.identity())?);
        let caller = snapshot.workload_at(source.ip()).or_else(named);
        let identity = caller.map(|caller| &caller.identity);
        let told = name(snapshot, record, Verdict::Drop, identity, source.ip(), port);
        let parties = Parties {
            source,
            source_workload: caller.map(Arc::as_ref),
            destination,
            workload: workload.map(Arc::as_ref),
        };
        self.reports.decided_by_kernel(&told, EnforcedBy::KernelConnect, &parties);
    }

    /// A connection that the kernel carries came when policy did not allow it any more.
    fn refused_carried(&self, snapshot: &Snapshot, record: &VerdictRecord) {
        let (source, destination) = (source(record), destination(record));
        let identity = snapshot.identity(record.identity());
        let caller = identity.and_then(|identity| snapshot.workload_speaking(source.ip(), identity));
        let told = name(snapshot, record, Verdict::Drop, identity, source.ip(), destination.port());
        let parties = Parties {
            source,
            source_workload: caller.map(Arc::as_ref),
            destination,
            workload: snapshot.workload_serving(destination).map(Arc::as_ref),
        };
        self.reports.decided_by_kernel(&told, EnforcedBy::KernelSkLookup, &parties);
    }

    /// Plaintext from outside has reached a workload of this node, or was kept from it.
    fn plaintext(&self, snapshot: &Snapshot, record: &VerdictRecord, verdict: Verdict, now: SystemTime) {
        let (source, destination) = (source(record), destination(record));
        let workload = snapshot.workload_serving(destination).map(Arc::as_ref);
        let caller = snapshot.workload_at(source.ip()).map(Arc::as_ref);
        let told = if record.outcome() == Outcome::LookupStrict as u32 {
            let ruling = Ruling { verdict, reason: Reason::Strict, policy: None, rule: None };
            NamedVerdict { ruling, audit: None, dry_run: None }
        } else {
            name(snapshot, record, verdict, None, source.ip(), destination.port())
        };
        let parties = Parties { source, source_workload: caller, destination, workload };
        self.reports.decided_by_kernel(&told, EnforcedBy::KernelSkLookup, &parties);
        let admitted = verdict == Verdict::Pass;
        let labels = |workload: Option<&Workload>| {
            let owner = workload.map_or_else(|| UNKNOWN.into(), |workload| workload.owner.clone());
            (owner, workload.map_or(UNKNOWN, |workload| workload.name.namespace()).into())
        };
        let ((source_workload, source_namespace), (destination_workload, destination_namespace)) =
            (labels(caller), labels(workload));
        self.reports.metrics.plaintext(PlaintextKey {
            verdict: if admitted { "admitted" } else { "refused" },
            source_workload,
            source_namespace,
            destination_workload,
            destination_namespace,
        });
        let seen = Plaintext {
            source: source.ip(),
            source_workload: caller.map(|caller| caller.name.to_string().into()),
            destination: workload.map_or_else(|| destination.ip().to_string(), |known| known.name.to_string()).into(),
            port: destination.port(),
            admitted,
        };
        self.reports.plaintext.saw(seen, now);
    }
}

/// Names the rule by which the kernel decided. A group that no workload is in any more leaves it without a name.
fn name(
    snapshot: &Snapshot,
    record: &VerdictRecord,
    verdict: Verdict,
    identity: Option<&SpiffeId>,
    address: IpAddr,
    port: u16,
) -> NamedVerdict {
    let none = PolicyGroup::default();
    let known = if record.group() == 0 { Some(&none) } else { snapshot.policy_group(record.group()).map(Arc::as_ref) };
    let Some(group) = known else {
        let reason = match (verdict, record.rule()) {
            (Verdict::Drop, 0) => Reason::NotAllowed,
            (Verdict::Drop, _) => Reason::Denied,
            (Verdict::Pass, 0) => Reason::DefaultAllow,
            (Verdict::Pass, _) => Reason::Allowed,
        };
        let ruling = Ruling { verdict, reason, policy: None, rule: None };
        return NamedVerdict { ruling, audit: None, dry_run: None };
    };
    let matched = group.matched(identity, address, port);
    verdict::by_rules(group, &matched, decided(group, verdict, record.rule()))
}

/// The kernel's decision, as [`authorize`] puts it.
fn decided(group: &PolicyGroup, verdict: Verdict, rule: u32) -> Decision {
    let matched = match verdict {
        Verdict::Drop => Matched::new(rule, 0, 0, 0, 0, group.flags),
        Verdict::Pass => Matched::new(0, rule, 0, 0, 0, group.flags),
    };
    // The kernel's word on the verdict itself counts, should the two ever differ.
    Decision { verdict, ..authorize(&matched) }
}

fn source(record: &VerdictRecord) -> SocketAddr {
    address(record.source(), record.source_port_be())
}

fn destination(record: &VerdictRecord) -> SocketAddr {
    address(record.destination(), record.destination_port_be())
}

fn address(ip: Ip, port_be: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from(ip).to_canonical(), u16::from_be(port_be))
}

#[cfg(test)]
mod tests;
