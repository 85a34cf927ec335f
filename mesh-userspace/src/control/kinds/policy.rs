//! `nodemesh.io/v1alpha1 AuthorizationPolicy`.

use super::super::diagnostic::{Findings, Position};
use super::super::document::{Policy, RulePlaces, Spec};
use super::super::fields::{self, Fields};
use super::super::key::Key;
use super::super::{Code, yaml};
use super::policy_source::sources;
use super::{metadata, section};
use crate::model::{AuthorizationPolicy, ObjectKey, ObjectName, PolicyAction, PolicyTarget, Rule};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub(super) const ACTIONS: &[(&str, PolicyAction)] =
    &[("ALLOW", PolicyAction::Allow), ("DENY", PolicyAction::Deny), ("AUDIT", PolicyAction::Audit)];

/// What policies say about requests, here and elsewhere: to overlook one of these would allow more than was written.
const ABOUT_REQUESTS: &[&str] = &[
    "applicationAttributes",
    "grpc",
    "headers",
    "hosts",
    "http",
    "httpAttributes",
    "methods",
    "notHosts",
    "notMethods",
    "notPaths",
    "paths",
    "queryParams",
    "requestPrincipals",
    "when",
];

const NOT_YET: &str = "decides about requests, which is not in this version: only connections are decided";
const WITHOUT: &str = "leave it out, and decide by sources and ports; what the rule then matches is more";

pub(in crate::control) fn policy(
    mut top: Fields,
    key: &mut Option<(Key, Position)>,
    findings: &mut Findings,
) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    let name = metadata.as_ref().and_then(|metadata| {
        let name = metadata.object_name(findings)?;
        metadata.identify(ObjectKey::Policy(name.clone()), key, findings);
        Some(name)
    });
    let spec = section(&mut top, "spec", findings);
    top.ignore(&["status"]);
    top.finish(findings);
    let mut spec = spec?;
    let (targets, targets_at) = match spec.stated("targetRefs") {
        Some(entry) => targets(&entry.value, findings),
        None => (Vec::new(), Vec::new()),
    };
    let action = spec.get("action").map(|entry| fields::choice(&entry.value, "spec.action", ACTIONS, findings));
    enforcement_level(&mut spec, findings);
    let dry_run = spec.get("dryRun").map(|entry| fields::boolean(&entry.value, "spec.dryRun", findings));
    let namespace = name.as_ref().map_or("default", ObjectName::namespace);
    let rules_entry = spec.stated("rules");
    let rules_at = rules_entry.map_or(spec.at(), |entry| entry.at);
    let (rules, rules_places) = rules_entry.map(|entry| rules(&entry.value, namespace, findings)).unwrap_or_default();
    spec.refuse(ABOUT_REQUESTS, Code::ApplicationLevel, NOT_YET, WITHOUT, findings);
    spec.finish(findings);
    let action = action.unwrap_or(Some(PolicyAction::Allow))?;
    if rules_entry.is_none_or(|entry| matches!(&entry.value.value, yaml::Value::Sequence(items) if items.is_empty())) {
        without_rules(action, rules_at, findings);
    }
    let dry_run = dry_run.unwrap_or(Some(false))?;
    let policy = AuthorizationPolicy { name: name?, targets, action, dry_run, rules };
    Some(Spec::Policy(Arc::new(Policy { policy: Arc::new(policy), targets: targets_at, rules: rules_places })))
}

fn enforcement_level(spec: &mut Fields, findings: &mut Findings) {
    let Some(entry) = spec.get("enforcementLevel") else { return };
    let levels = [("Network", true), ("Application", false)];
    if fields::choice(&entry.value, "spec.enforcementLevel", &levels, findings) == Some(false) {
        let message = format!("`spec.enforcementLevel`: `Application` {NOT_YET}");
        findings.report(Code::ApplicationLevel, entry.value.at, message, Some("write `Network`".into()));
    }
}

fn without_rules(action: PolicyAction, at: Position, findings: &mut Findings) {
    let (message, help) = match action {
        PolicyAction::Allow => ("without rules an ALLOW policy denies everything that it targets", "`rules: [{}]`"),
        PolicyAction::Deny => ("without rules a DENY policy does nothing", "`rules: [{}]`"),
        PolicyAction::Audit => ("without rules an AUDIT policy does nothing", "`rules: [{}]`"),
    };
    findings.report(Code::NoRules, at, message.to_owned(), Some(format!("a rule that matches everything is {help}")));
}

/// The workloads that a policy is about, and where each of its targets stands.
pub(super) fn targets(node: &yaml::Node, findings: &mut Findings) -> (Vec<PolicyTarget>, Vec<Position>) {
    let (mut targets, mut places) = (Vec::new(), Vec::new());
    let items = fields::list(node, "spec.targetRefs", findings).unwrap_or_default();
    for (index, item) in items.iter().enumerate() {
        targets.extend(target(item, &format!("spec.targetRefs[{index}]"), findings));
        places.push(item.at);
    }
    (targets, places)
}

#[derive(Clone, Copy)]
enum TargetKind {
    Pod,
    Service,
}

fn target(item: &yaml::Node, path: &str, findings: &mut Findings) -> Option<PolicyTarget> {
    let mut fields = Fields::of(item, path, findings)?;
    if let Some(entry) = fields.get("group") {
        // Pod and Service are of the core group, which has no name.
        fields::choice(&entry.value, &format!("{path}.group"), &[("", ())], findings);
    }
    let kind = fields.require("kind", findings).and_then(|entry| {
        let kinds = [("Pod", TargetKind::Pod), ("Service", TargetKind::Service)];
        fields::choice(&entry.value, &format!("{path}.kind"), &kinds, findings)
    });
    let target = match kind {
        Some(TargetKind::Pod) => {
            let why = "names one pod, which is not in this version";
            let help = "select workloads by their labels: `selector: {matchLabels: {...}}`";
            fields.refuse(&["name"], Code::Exclusive, why, help, findings);
            fields.require("selector", findings).and_then(|entry| selector(&entry.value, path, findings))
        }
        Some(TargetKind::Service) => {
            let help = "name the service, or target `kind: Pod`";
            fields.refuse(&["selector"], Code::Exclusive, "does not go with `kind: Service`", help, findings);
            fields.require("name", findings).and_then(|entry| {
                let name = fields::text(&entry.value, &format!("{path}.name"), findings)?;
                match ObjectName::parse("default", name) {
                    Ok(_) => Some(PolicyTarget::Service(name.into())),
                    Err(error) => {
                        findings.report(Code::InvalidName, entry.value.at, error.to_string(), None);
                        None
                    }
                }
            })
        }
        None => {
            fields.ignore(&["name", "selector"]);
            None
        }
    };
    fields.finish(findings);
    target
}

fn selector(node: &yaml::Node, path: &str, findings: &mut Findings) -> Option<PolicyTarget> {
    let path = format!("{path}.selector");
    let mut fields = Fields::of(node, &path, findings)?;
    let mut labels = BTreeMap::new();
    let mut sound = true;
    if let Some(entry) = fields.stated("matchLabels") {
        let path = format!("{path}.matchLabels");
        for pair in fields::mapping(&entry.value, &path, findings)? {
            let value = fields::text(&pair.value, &format!("{path}[{}]", pair.key), findings);
            sound &= value.is_some();
            labels.extend(value.map(|value| (pair.key.clone(), value.to_owned())));
        }
    }
    fields.finish(findings);
    sound.then_some(PolicyTarget::Selector(labels))
}

fn rules(node: &yaml::Node, namespace: &str, findings: &mut Findings) -> (Vec<Rule>, Vec<RulePlaces>) {
    let (mut rules, mut places) = (Vec::new(), Vec::new());
    let mut names: HashMap<Arc<str>, u32> = HashMap::new();
    let items = fields::list(node, "spec.rules", findings).unwrap_or_default();
    for (index, item) in items.iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        let Some(mut fields) = Fields::of(item, &path, findings) else { continue };
        let (name, name_at) = rule_name(&mut fields, index, &path, findings);
        if let Some(first) = names.insert(name.clone(), name_at.line) {
            let message = format!("`{path}.name`: the name `{name}` appears twice");
            findings.report(Code::DuplicateRule, name_at, message, Some(format!("it is first used in line {first}")));
        }
        let mut place = RulePlaces::default();
        let sources = fields.stated("sources").map(|entry| sources(entry, &path, namespace, &mut place, findings));
        let ports = fields.stated("networkAttributes").map(|entry| {
            let path = format!("{path}.networkAttributes");
            ports(&entry.value, &path, &mut place, findings).unwrap_or_default()
        });
        fields.refuse(ABOUT_REQUESTS, Code::ApplicationLevel, NOT_YET, WITHOUT, findings);
        fields.finish(findings);
        rules.push(Rule { name, sources, ports: ports.unwrap_or_default() });
        places.push(place);
    }
    (rules, places)
}

/// A rule's name: as written, else its index.
fn rule_name(fields: &mut Fields, index: usize, path: &str, findings: &mut Findings) -> (Arc<str>, Position) {
    let index = || index.to_string().into();
    let Some(entry) = fields.get("name") else { return (index(), fields.at()) };
    let Some(name) = fields::text(&entry.value, &format!("{path}.name"), findings) else {
        return (index(), entry.value.at);
    };
    // It becomes a label's value in metrics and a word in logs.
    let sound =
        (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !sound {
        let message = format!("`{path}.name` must have 1 to 63 letters, digits, '-', '_' and '.'");
        findings.report(Code::InvalidName, entry.value.at, message, None);
    }
    (name.into(), entry.value.at)
}

/// The workload's ports that a rule is about.
fn ports(node: &yaml::Node, path: &str, place: &mut RulePlaces, findings: &mut Findings) -> Option<Vec<u16>> {
    let mut fields = Fields::of(node, path, findings)?;
    let mut ports = Vec::new();
    if let Some(entry) = fields.stated("ports") {
        let path = format!("{path}.ports");
        let items = fields::list(&entry.value, &path, findings)?;
        if items.is_empty() {
            let help = "leave `ports` out for all ports".to_owned();
            findings.report(Code::InvalidValue, entry.value.at, format!("`{path}` is empty"), Some(help));
        }
        for (index, item) in items.iter().enumerate() {
            let Some(port) = fields::port(item, &format!("{path}[{index}]"), findings) else { continue };
            // Twice is once.
            if !ports.contains(&port) {
                ports.push(port);
                place.ports.push(item.at);
            }
        }
    }
    fields.refuse(ABOUT_REQUESTS, Code::ApplicationLevel, NOT_YET, WITHOUT, findings);
    fields.finish(findings);
    Some(ports)
}
