//! What policies say about workloads, services and identities.

use super::super::diagnostic::Position;
use super::super::document::{Policy, RulePlaces};
use super::super::{Code, suggest};
use super::{Check, nearly_labelled};
use crate::engine::selects;
use crate::model::{Catalog, ObjectName, PolicyTarget, Rule, Service, Source, TargetPort, Workload};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(super) fn check(policy: &Policy, check: &mut Check) {
    let Policy { policy, targets, rules } = policy;
    let namespace = policy.name.namespace();
    for (target, at) in policy.targets.iter().zip(targets) {
        match target {
            PolicyTarget::Selector(labels) => check.selector(namespace, labels, *at),
            PolicyTarget::Service(name) => check.target_service(namespace, name, *at),
        }
    }
    if policy.targets.is_empty() && workloads(check.catalog, namespace).next().is_none() {
        let message = format!("the namespace `{namespace}` has no workload");
        check.report(Code::TargetsNothing, check.document.at, message, None);
    }
    let targeted = targeted_ports(check.catalog, namespace, &policy.targets);
    for (rule, places) in policy.rules.iter().zip(rules) {
        check.sources(rule, places);
        check.ports(rule, places, targeted.as_ref());
    }
}

impl Check<'_> {
    fn selector(&mut self, namespace: &str, labels: &BTreeMap<String, String>, at: Position) {
        let is_target =
            |workload: &&Arc<Workload>| labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value));
        if workloads(self.catalog, namespace).any(|workload| is_target(&workload)) {
            return;
        }
        let message = format!("the selector matches no workload of the namespace `{namespace}`");
        let help = self.hint(|catalog| nearly_labelled(namespace, labels, catalog));
        self.report(Code::TargetsNothing, at, message, help);
    }

    /// A service that a policy names.
    pub(super) fn target_service(&mut self, namespace: &str, name: &str, at: Position) {
        if service(self.catalog, namespace, name).is_some() {
            return;
        }
        let message = format!("there is no service `{namespace}/{name}`: this target is nothing");
        let help = self.hint(|catalog| {
            let names = catalog.services.keys().filter(|service| service.namespace() == namespace);
            suggest::help(name, names.map(ObjectName::name).collect::<Vec<_>>().iter().copied())
        });
        self.report(Code::UnknownService, at, message, help);
    }

    fn sources(&mut self, rule: &Rule, places: &RulePlaces) {
        for (source, at) in rule.sources.iter().flatten().zip(&places.sources) {
            match source {
                Source::Spiffe(pattern) => {
                    let Some(mesh) = &self.catalog.mesh else { continue };
                    if pattern.trust_domain().is_some_and(|domain| domain != mesh.trust_domain.as_str()) {
                        let message = format!("`{pattern}` matches nobody: the mesh's trust domain is another");
                        let help = format!("the trust domain is `{}`", mesh.trust_domain);
                        self.report(Code::ForeignTrustDomain, *at, message, Some(help));
                    }
                }
                Source::ServiceAccount { namespace, name } => self.account(namespace, name.as_deref(), *at),
                Source::Namespace(namespace) => self.account(namespace, None, *at),
                Source::Range(_) => {}
            }
        }
    }

    fn account(&mut self, namespace: &str, name: Option<&str>, at: Position) {
        let accounts = |catalog: &Catalog| -> BTreeSet<String> {
            workloads(catalog, namespace).map(|workload| workload.identity.service_account().to_owned()).collect()
        };
        let is_it = |workload: &&Arc<Workload>| name.is_none_or(|name| workload.identity.service_account() == name);
        if workloads(self.catalog, namespace).any(|workload| is_it(&workload)) {
            return;
        }
        let Some(name) = name else {
            let message = format!("the namespace `{namespace}` has no workload");
            self.report(Code::UnknownAccount, at, message, None);
            return;
        };
        let help = self.hint(|catalog| suggest::help(name, accounts(catalog).iter().map(String::as_str)));
        self.report(Code::UnknownAccount, at, format!("no workload runs as `{namespace}/{name}`"), help);
    }

    /// Rules name the workloads' ports, and services often have others.
    fn ports(&mut self, rule: &Rule, places: &RulePlaces, targeted: Option<&BTreeSet<u16>>) {
        let Some(targeted) = targeted else { return };
        for (port, at) in rule.ports.iter().zip(&places.ports).filter(|(port, _)| !targeted.contains(port)) {
            let message =
                format!("port {port} is none that the target service leads to, so the rule does not match it");
            let known: Vec<_> = targeted.iter().map(ToString::to_string).collect();
            let help = format!("rules name the workloads' ports (`targetPort`): {}", known.join(", "));
            self.report(Code::NotTargetedPort, *at, message, Some(help));
        }
    }
}

/// The workloads' ports that the targets are about; `None` if they are about all, or about nothing at all.
fn targeted_ports(catalog: &Catalog, namespace: &str, targets: &[PolicyTarget]) -> Option<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for target in targets {
        let PolicyTarget::Service(name) = target else { return None };
        let Some(service) = service(catalog, namespace, name) else { continue };
        for port in &service.ports {
            match &port.target {
                TargetPort::Number(number) => drop(ports.insert(*number)),
                TargetPort::Name(name) => {
                    let selected = workloads(catalog, namespace).filter(|workload| selects(service, workload));
                    ports.extend(selected.filter_map(|workload| workload.ports.get(name)));
                }
            }
        }
    }
    (!ports.is_empty()).then_some(ports)
}

fn workloads<'c>(catalog: &'c Catalog, namespace: &str) -> impl Iterator<Item = &'c Arc<Workload>> {
    // Names sort by namespace, and none is less than this one.
    let first = ObjectName::parse(namespace, "0").ok();
    let from = first.into_iter().flat_map(|first| catalog.workloads.range(first..));
    from.map(|(_, workload)| workload).take_while(move |workload| workload.name.namespace() == namespace)
}

fn service<'c>(catalog: &'c Catalog, namespace: &str, name: &str) -> Option<&'c Arc<Service>> {
    catalog.services.get(&ObjectName::parse(namespace, name).ok()?)
}
