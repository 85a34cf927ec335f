//! `nodemesh.io/v1alpha1 TrafficPolicy`.

use super::super::diagnostic::{Findings, Position};
use super::super::document::{Spec, TrafficEntry};
use super::super::fields::{self, Fields};
use super::super::key::Key;
use super::super::{Code, yaml};
use super::traffic_probe::health_check;
use super::{SAME_NODE, metadata, section};
use crate::model::{
    Affinity, Algorithm, Ejection, Limits, ObjectKey, ObjectName, Prefer, Retry, TrafficPolicy, TrafficSpec,
};
use std::sync::Arc;
use std::time::Duration;

const ALGORITHMS: &[(&str, Algorithm)] = &[
    (Algorithm::Random.as_str(), Algorithm::Random),
    (Algorithm::RoundRobin.as_str(), Algorithm::RoundRobin),
    (Algorithm::LeastConnections.as_str(), Algorithm::LeastConnections),
    (Algorithm::PeakEwma.as_str(), Algorithm::PeakEwma),
    (Algorithm::Maglev.as_str(), Algorithm::Maglev),
];

const PREFERENCES: &[(&str, Prefer)] = &[
    (Prefer::Nobody.as_str(), Prefer::Nobody),
    (Prefer::SameZone.as_str(), Prefer::SameZone),
    (Prefer::SameNode.as_str(), Prefer::SameNode),
];

/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
pub(super) const AFFINITY_TIMEOUT: Duration = Duration::from_hours(3);
/// Kubernetes' bounds of it, in seconds.
pub(super) const AFFINITY_SECONDS: (u32, u32) = (1, 86_400);
const AFFINITY_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_hours(24));

const SLOW_START_BOUNDS: (Duration, Duration) = (Duration::ZERO, Duration::from_hours(1));
const CONNECT_BOUNDS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_mins(5));
const IDLE_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_hours(168));
const EJECTION_BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_hours(24));
const PERCENT: (u32, u32) = (0, 100);
const MAX_ATTEMPTS: u32 = 10;
const MAX_BUDGET: u32 = 10_000;
const MAX_FAILURES: u32 = 1_000;
const MAX_LIMIT: u32 = 1_000_000;

pub(in crate::control) fn traffic(
    mut top: Fields,
    key: &mut Option<(Key, Position)>,
    findings: &mut Findings,
) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    let name = metadata.as_ref().and_then(|metadata| {
        let name = metadata.object_name(findings)?;
        metadata.identify(ObjectKey::Traffic(name.clone()), key, findings);
        Some(name)
    });
    let spec = section(&mut top, "spec", findings);
    top.ignore(&["status"]);
    top.finish(findings);
    let mut spec = spec?;
    let namespace = name.as_ref().map_or("default", ObjectName::namespace);
    let (services, services_at) = targets(&mut spec, namespace, findings);
    // Whatever is wrong here is reported, and what is reported keeps the object out.
    let mut said = TrafficSpec::default();
    load_balancing(&mut spec, &mut said, findings);
    said.affinity = affinity(&mut spec, findings);
    if let Some(mut timeouts) = spec.part("timeouts", findings) {
        said.connect_timeout = timeouts.duration("connect", CONNECT_BOUNDS, findings);
        said.idle_timeout = timeouts.duration("idle", IDLE_BOUNDS, findings);
        timeouts.finish(findings);
    }
    said.retry = retry(&mut spec, findings);
    said.ejection = ejection(&mut spec, findings);
    said.health_check = health_check(&mut spec, findings);
    said.limits = limits(&mut spec, findings);
    said.same_node = spec.choice("sameNode", SAME_NODE, findings);
    spec.finish(findings);
    let policy = Arc::new(TrafficPolicy { name: name?, services, spec: said });
    Some(Spec::Traffic(TrafficEntry { policy, services_at }))
}

/// The services that the policy is for, and where each is named; one that is named twice is named once.
fn targets(spec: &mut Fields, namespace: &str, findings: &mut Findings) -> (Vec<ObjectName>, Vec<Position>) {
    let (mut services, mut places) = (Vec::new(), Vec::new());
    let Some(entry) = spec.require("targetRefs", findings) else { return (services, places) };
    let items = fields::list(&entry.value, "spec.targetRefs", findings).unwrap_or_default();
    if items.is_empty() && matches!(entry.value.value, yaml::Value::Sequence(_)) {
        let help = "name a service: `targetRefs: [{kind: Service, name: ...}]`".to_owned();
        findings.report(Code::MissingField, entry.value.at, "`spec.targetRefs` is empty".to_owned(), Some(help));
    }
    for (index, item) in items.iter().enumerate() {
        let path = format!("spec.targetRefs[{index}]");
        let Some(mut fields) = Fields::of(item, &path, findings) else { continue };
        // A Service is of the core group, which has no name.
        fields.choice("group", &[("", ())], findings);
        if let Some(kind) = fields.require("kind", findings) {
            fields::choice(&kind.value, &format!("{path}.kind"), &[("Service", ())], findings);
        }
        let name = fields.require("name", findings);
        fields.finish(findings);
        let Some(name) = name else { continue };
        let Some(text) = fields::text(&name.value, &format!("{path}.name"), findings) else { continue };
        match ObjectName::parse(namespace, text) {
            Ok(service) if services.contains(&service) => {}
            Ok(service) => {
                services.push(service);
                places.push(item.at);
            }
            Err(error) => findings.report(Code::InvalidName, name.value.at, error.to_string(), None),
        }
    }
    (services, places)
}

fn load_balancing(spec: &mut Fields, said: &mut TrafficSpec, findings: &mut Findings) {
    let Some(mut fields) = spec.part("loadBalancing", findings) else { return };
    said.algorithm = fields.choice("algorithm", ALGORITHMS, findings);
    said.slow_start = fields.duration("slowStart", SLOW_START_BOUNDS, findings);
    said.prefer = fields.choice("preference", PREFERENCES, findings);
    said.failover_percent = fields.number("failoverPercent", PERCENT, findings);
    fields.finish(findings);
}

fn affinity(spec: &mut Fields, findings: &mut Findings) -> Option<Affinity> {
    let mut fields = spec.part("sessionAffinity", findings)?;
    let kind = fields.require("type", findings);
    let types = [("None", false), ("ClientIP", true)];
    let by_client = kind.and_then(|kind| fields::choice(&kind.value, "spec.sessionAffinity.type", &types, findings));
    let timeout = fields.duration("timeout", AFFINITY_BOUNDS, findings);
    if by_client == Some(false) {
        let help = "leave it out, or write `type: ClientIP`";
        fields.refuse(&["timeout"], Code::Exclusive, "does not go with `type: None`", help, findings);
    }
    fields.finish(findings);
    Some(if by_client? { Affinity::ClientIp(timeout.unwrap_or(AFFINITY_TIMEOUT)) } else { Affinity::None })
}

fn retry(spec: &mut Fields, findings: &mut Findings) -> Option<Retry> {
    let mut fields = spec.part("retry", findings)?;
    let default = Retry::default();
    let attempts = fields.number("attempts", (0, MAX_ATTEMPTS), findings);
    let budget_percent = fields.number("budgetPercent", PERCENT, findings);
    let budget_minimum = fields.number("budgetMinimum", (0, MAX_BUDGET), findings);
    fields.finish(findings);
    Some(Retry {
        attempts: attempts.unwrap_or(default.attempts),
        budget_percent: budget_percent.unwrap_or(default.budget_percent),
        budget_minimum: budget_minimum.unwrap_or(default.budget_minimum),
    })
}

fn ejection(spec: &mut Fields, findings: &mut Findings) -> Option<Ejection> {
    let mut fields = spec.part("ejection", findings)?;
    let default = Ejection::default();
    let consecutive_failures = fields.number("consecutiveFailures", (0, MAX_FAILURES), findings);
    let base_time = fields.duration("baseTime", EJECTION_BOUNDS, findings);
    let max_time = fields.duration("maxTime", EJECTION_BOUNDS, findings);
    let max_percent = fields.number("maxPercent", PERCENT, findings);
    // One that is stated alone takes the other along.
    let base = base_time.unwrap_or_else(|| default.base_time.min(max_time.unwrap_or(default.base_time)));
    let max = max_time.unwrap_or_else(|| default.max_time.max(base));
    if max < base {
        let message = "`spec.ejection.maxTime` is shorter than `baseTime`".to_owned();
        findings.report(Code::InvalidDuration, fields.at(), message, None);
    }
    fields.finish(findings);
    Some(Ejection {
        consecutive_failures: consecutive_failures.unwrap_or(default.consecutive_failures),
        base_time: base,
        max_time: max,
        max_percent: max_percent.unwrap_or(default.max_percent),
    })
}

fn limits(spec: &mut Fields, findings: &mut Findings) -> Option<Limits> {
    let mut fields = spec.part("limits", findings)?;
    let max_connections = fields.number("maxConnections", (1, MAX_LIMIT), findings);
    let max_pending = fields.number("maxPending", (1, MAX_LIMIT), findings);
    fields.finish(findings);
    Some(Limits { max_connections, max_pending })
}
