//! Policies, plaintext callers and explanations as the admin interface shows them.

use super::traffic;
use crate::admin::PolicySources;
use crate::admin::policies::{EndRow, PathRow, PlaintextRow, PolicyRow, PolicyRuleRow, PolicyWorkloads, RulingRow};
use crate::engine::{RuleName, Snapshot, selects};
use crate::model::{AuthorizationPolicy, ObjectName, PolicyTarget, Rule, Source, Workload};
use crate::proxy::Context;
use crate::proxy::explain::{Explanation, How, Party, Path, explain};
use crate::proxy::verdict::Ruling;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

pub(super) fn sources(context: &Arc<Context>) -> PolicySources {
    let (policies, plaintext, explained) = (context.clone(), context.clone(), context.clone());
    let balanced = context.clone();
    PolicySources {
        policies: Arc::new(move || rows(&policies)),
        traffic: Arc::new(move || traffic::rows(&balanced.snapshot.load())),
        plaintext: Arc::new(move || {
            let (callers, _) = plaintext.reports.plaintext.snapshot();
            callers.into_iter().map(PlaintextRow::from).collect()
        }),
        explain: Arc::new(move |question| {
            let snapshot = explained.snapshot.load();
            explain(&snapshot, question).map(|found| paths(&snapshot, &found)).map_err(|unclear| unclear.to_string())
        }),
    }
}

fn rows(context: &Context) -> Vec<PolicyRow> {
    let snapshot = context.snapshot.load();
    let mut hits: HashMap<Arc<str>, BTreeMap<Arc<str>, u64>> = HashMap::new();
    for hit in context.reports.metrics.hits() {
        hits.entry(hit.policy).or_default().insert(hit.rule, hit.hits);
    }
    let mut by_namespace: HashMap<&str, Vec<&Workload>> = HashMap::new();
    for workload in snapshot.workloads().values() {
        by_namespace.entry(workload.name.namespace()).or_default().push(workload);
    }
    let none = (BTreeMap::new(), Vec::new());
    let row = |policy: &Arc<AuthorizationPolicy>| {
        let hits = hits.get(policy.name.to_string().as_str()).unwrap_or(&none.0);
        let neighbours = by_namespace.get(policy.name.namespace()).unwrap_or(&none.1);
        let held: Vec<_> = neighbours.iter().filter(|workload| holds_for(policy, workload, &snapshot)).collect();
        let local = held.iter().filter(|workload| workload.node == context.node).count() as u64;
        policy_row(policy, hits, PolicyWorkloads { total: held.len() as u64, local })
    };
    snapshot.policies().values().map(row).collect()
}

/// Whether a policy is for a workload of its namespace that the mesh carries.
fn holds_for(policy: &AuthorizationPolicy, workload: &Workload, snapshot: &Snapshot) -> bool {
    let targeted = |target: &PolicyTarget| match target {
        PolicyTarget::Selector(labels) => labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value)),
        PolicyTarget::Service(name) => ObjectName::parse(policy.name.namespace(), name)
            .ok()
            .and_then(|name| snapshot.service(&name))
            .is_some_and(|service| selects(service, workload)),
    };
    workload.is_meshed() && (policy.targets.is_empty() || policy.targets.iter().any(targeted))
}

fn policy_row(policy: &AuthorizationPolicy, hits: &BTreeMap<Arc<str>, u64>, workloads: PolicyWorkloads) -> PolicyRow {
    let rule = |rule: &Rule| PolicyRuleRow {
        name: rule.name.to_string(),
        sources: match &rule.sources {
            None => vec!["everyone".to_owned()],
            Some(sources) => sources.iter().map(source).collect(),
        },
        ports: rule.ports.clone(),
        hits: hits.get(&rule.name).copied().unwrap_or_default(),
    };
    PolicyRow {
        namespace: policy.name.namespace().to_owned(),
        name: policy.name.name().to_owned(),
        action: policy.action.as_str().to_owned(),
        dry_run: policy.dry_run,
        targets: policy.targets.iter().map(target).collect(),
        rules: policy.rules.iter().map(rule).collect(),
        workloads,
        hits: hits.values().sum(),
    }
}

fn target(target: &PolicyTarget) -> String {
    match target {
        PolicyTarget::Selector(labels) => {
            labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
        }
        PolicyTarget::Service(name) => format!("service {name}"),
    }
}

fn source(source: &Source) -> String {
    match source {
        Source::ServiceAccount { namespace, name } => {
            format!("account {namespace}/{}", name.as_deref().unwrap_or("*"))
        }
        Source::Spiffe(pattern) => pattern.to_string(),
        Source::Namespace(namespace) => format!("namespace {namespace}"),
        Source::Range(range) => range.to_string(),
    }
}

fn paths(snapshot: &Snapshot, found: &Explanation) -> Vec<PathRow> {
    let row = |path: &Path| {
        let frontend = path.service.as_ref().and_then(|_| snapshot.frontend_of(path.protocol, path.asked));
        let balancing = frontend.map(|frontend| traffic::phrase(&frontend.traffic));
        PathRow { balancing, ..path_row(&found.source, path) }
    };
    found.paths.iter().map(row).collect()
}

fn path_row(source: &Party, path: &Path) -> PathRow {
    let end = |workload: Option<&Arc<Workload>>, address: String, port: Option<u16>| EndRow {
        address,
        workload: workload.map(|workload| workload.name.to_string()),
        identity: workload.map(|workload| workload.identity.to_string()),
        node: workload.map(|workload| workload.node.to_string()),
        mode: workload.map(|workload| port.map_or(workload.mode, |port| workload.mode_of(port)).as_str().to_owned()),
    };
    let destination = path.address.map(|at| end(path.endpoint.as_ref(), at.to_string(), Some(at.port())));
    let told = path.told.as_ref();
    PathRow {
        source: end(source.workload.as_ref(), IpAddr::to_string(&source.address), None),
        asked: path.asked.to_string(),
        protocol: path.protocol.as_str().to_owned(),
        service: path.service.as_ref().map(ToString::to_string),
        balancing: None,
        destination,
        arrives: path.how.as_str().to_owned(),
        why: path.why.to_owned(),
        transport: match path.how {
            How::MutualTls { transport } => Some(transport.to_owned()),
            How::Plaintext | How::Unguarded | How::Nowhere => None,
        },
        verdict: if path.is_refused() { "deny" } else { "allow" }.to_owned(),
        ruling: told.map(|told| ruling_row(&told.ruling)),
        audit: told.and_then(|told| told.audit.as_ref()).map(|RuleName { policy, rule }| format!("{policy} {rule}")),
        dry_run: told.and_then(|told| told.dry_run.as_ref()).map(ruling_row),
        enforced_by: path.enforced_by.map(|by| by.as_str().to_owned()),
    }
}

fn ruling_row(ruling: &Ruling) -> RulingRow {
    RulingRow {
        verdict: ruling.word().to_owned(),
        reason: ruling.reason.as_str().to_owned(),
        policy: ruling.policy.as_ref().map(ToString::to_string),
        rule: ruling.rule.as_deref().map(str::to_owned),
    }
}
