//! What objects say about each other. Nothing here keeps an object from being applied: the engine leaves out what
//! leads nowhere, and this says so.

mod policies;
mod traffic;

use super::diagnostic::{Diagnostic, Position};
use super::document::{Document, Entry, Spec};
use super::key::Key;
use super::{Code, suggest};
use crate::engine::{SelectorIndex, selects};
use crate::model::{Catalog, NodeName, PolicyAction, Service, TargetPort, Workload};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// Searches for what was meant instead; each looks at much of the catalog, and a catalog that is wrong everywhere must
/// not take minutes to say so.
const MAX_HINTS: usize = 10;

/// Names that a message lists before it only counts.
const NAMES_SHOWN: usize = 3;

pub(super) fn check(accepted: &BTreeMap<Key, Arc<Document>>, catalog: &Catalog, found: &mut Vec<Diagnostic>) {
    let mut index = SelectorIndex::default();
    for workload in catalog.workloads.values() {
        index.insert_workload(workload);
    }
    let winners = traffic::winners(catalog);
    let mut hints = MAX_HINTS;
    for document in accepted.values() {
        let mut check = Check { document, catalog, found, hints: &mut hints };
        match &document.spec {
            Spec::Node { node, .. } if node.addresses.is_empty() => {
                let help = "list one under status.addresses with `type: InternalIP`".to_owned();
                check.report(Code::NodeWithoutAddress, document.at, "the node has no InternalIP".into(), Some(help));
            }
            _ if document.stands_in => check.stands_in(),
            Spec::Mesh(_) | Spec::Node { .. } | Spec::Namespace(_) => {}
            Spec::Policy(policy) => policies::check(policy, &mut check),
            Spec::Traffic(entry) => traffic::check(entry, &winners, &mut check),
            Spec::Workload(entry) => check.workload(entry),
            Spec::Service { service, selector_at, vips_at, targets_at } => {
                let selected: Vec<_> = index
                    .workloads_for(service)
                    .filter_map(|name| catalog.workloads.get(name))
                    .filter(|workload| selects(service, workload))
                    .collect();
                check.service(service, &selected, *selector_at, vips_at, targets_at);
            }
        }
    }
}

struct Check<'c> {
    document: &'c Document,
    catalog: &'c Catalog,
    found: &'c mut Vec<Diagnostic>,
    hints: &'c mut usize,
}

impl Check<'_> {
    fn report(&mut self, code: Code, at: Position, message: String, help: Option<String>) {
        self.found.push(self.document.diagnostic(code, at, message, help));
    }

    /// The result of a search, as long as searches are left.
    fn hint(&mut self, search: impl FnOnce(&Catalog) -> Option<String>) -> Option<String> {
        *self.hints = self.hints.checked_sub(1)?;
        search(self.catalog)
    }

    fn excluded(&self, address: IpAddr) -> Option<String> {
        let ranges = self.catalog.mesh.iter().flat_map(|mesh| &mesh.exclude);
        ranges.into_iter().find(|range| range.contains(&address)).map(ToString::to_string)
    }

    fn stands_in(&mut self) {
        let (message, help) = match &self.document.spec {
            Spec::Policy(policy) if policy.policy.dry_run || policy.policy.action == PolicyAction::Audit => {
                ("it is broken and there is no good version: nothing is reported by it", "mend the errors shown for it")
            }
            Spec::Policy(policy) if policy.policy.targets.is_empty() => (
                "it is broken and there is no good version: until it is mended, every connection to a workload of the \
                 namespace is denied",
                "mend the errors shown for it, or remove it",
            ),
            Spec::Policy(_) => (
                "it is broken and there is no good version: until it is mended, every connection to its targets is denied",
                "mend the errors shown for it, or remove it",
            ),
            _ => (
                "it is broken and there is no good version: what it says of mode and default action is taken at its \
                 strictest",
                "mend the errors shown for it",
            ),
        };
        self.report(Code::StandsIn, self.document.at, message.to_owned(), Some(help.to_owned()));
    }

    fn workload(&mut self, entry: &Entry) {
        if !self.catalog.nodes.contains_key(&entry.node) {
            let message = format!("there is no node `{}`: nobody can reach this workload", entry.node);
            let help =
                self.hint(|catalog| suggest::help(entry.node.as_str(), catalog.nodes.keys().map(NodeName::as_str)));
            self.report(Code::UnknownNode, entry.node_at, message, help);
        }
        if entry.cgroup.is_some() {
            self.host_addresses(entry);
        }
        for (address, at) in entry.addresses.iter().zip(&entry.addresses_at) {
            if let Some(range) = self.excluded(*address) {
                let message = format!("the address {address} lies in the excluded range {range} and is not captured");
                self.report(Code::ExcludedWorkload, *at, message, None);
            }
        }
    }

    fn host_addresses(&mut self, entry: &Entry) {
        let Some(node) = self.catalog.nodes.get(&entry.node) else { return };
        for (address, at) in entry.addresses.iter().zip(&entry.addresses_at) {
            if !node.addresses.contains(address) {
                let message = format!("{address} is not one of the addresses that Node {} states", node.name);
                let help = self.hint(|_| {
                    let known: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
                    (!known.is_empty()).then(|| format!("it has {}", known.join(", ")))
                });
                self.report(Code::NotNodeAddress, *at, message, help);
            }
        }
    }

    fn service(
        &mut self,
        service: &Service,
        selected: &[&Arc<Workload>],
        selector_at: Position,
        vips_at: &[Position],
        targets_at: &[Position],
    ) {
        for (vip, at) in service.vips.iter().zip(vips_at) {
            if let Some(range) = self.excluded(*vip) {
                let message =
                    format!("the virtual address {vip} lies in the excluded range {range} and is not captured");
                self.report(Code::ExcludedFrontend, *at, message, None);
            }
        }
        if selected.is_empty() {
            if !service.vips.is_empty() {
                self.selects_nothing(service, selector_at);
            }
            return;
        }
        let (meshed, others): (Vec<_>, Vec<_>) = selected.iter().copied().partition(|workload| workload.is_meshed());
        if !others.is_empty() {
            let message = format!("not in the mesh, so no connections go there: {}", names(&others));
            let help = "set the label `nodemesh.io/mode` to `permissive`, or narrow the selector".to_owned();
            self.report(Code::NotMeshed, selector_at, message, Some(help));
        }
        if meshed.is_empty() {
            return;
        }
        for (port, at) in service.ports.iter().zip(targets_at) {
            if let TargetPort::Name(name) = &port.target {
                self.target_port(name, *at, &meshed);
            }
        }
        for (vip, at) in service.vips.iter().zip(vips_at) {
            if meshed.iter().all(|workload| workload.address_like(*vip).is_none()) {
                let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
                let message = format!("{vip} leads nowhere: no selected workload has an {family} address");
                self.report(Code::NoEndpointOfFamily, *at, message, None);
            }
        }
    }

    fn selects_nothing(&mut self, service: &Service, selector_at: Position) {
        let message = match service.selector.is_empty() {
            true => "the service has no selector, so every connection to it is refused",
            false => "the selector matches no workload of the namespace, so every connection to it is refused",
        };
        let help = self.hint(|catalog| nearly_labelled(service.name.namespace(), &service.selector, catalog));
        self.report(Code::SelectsNothing, selector_at, message.to_owned(), help);
    }

    fn target_port(&mut self, name: &str, at: Position, meshed: &[&Arc<Workload>]) {
        let (with, without): (Vec<_>, Vec<_>) = meshed.iter().copied().partition(|w| w.ports.contains_key(name));
        if with.is_empty() {
            let known: BTreeSet<_> = meshed.iter().flat_map(|w| w.ports.keys()).map(String::as_str).collect();
            let help = suggest::help(name, known.iter().copied());
            self.report(Code::UnknownTargetPort, at, format!("no selected workload has a port `{name}`"), help);
        } else if !without.is_empty() {
            let message = format!("without a port `{name}`, so no connections go there: {}", names(&without));
            self.report(Code::SomeLackTargetPort, at, message, None);
        }
    }
}

/// A namespace or a value that is nearly there is the usual mistake.
fn nearly_labelled(namespace: &str, selector: &BTreeMap<String, String>, catalog: &Catalog) -> Option<String> {
    let workloads = || catalog.workloads.values();
    let has_all = |workload: &Workload| selector.iter().all(|(k, v)| workload.labels.get(k) == Some(v));
    if selector.is_empty() {
        return None;
    }
    if let Some(workload) = workloads().find(|workload| has_all(workload)) {
        return Some(format!("{} has these labels, but another namespace", workload.name));
    }
    selector.iter().find_map(|(key, value)| {
        let peers = workloads().filter(|workload| workload.name.namespace() == namespace);
        let values: BTreeSet<_> = peers.filter_map(|peer| peer.labels.get(key)).map(String::as_str).collect();
        let near = suggest::nearest(value, values).filter(|near| near != value)?;
        Some(format!("did you mean `{key}: {near}`?"))
    })
}

fn names(workloads: &[&Arc<Workload>]) -> String {
    let shown: Vec<_> = workloads.iter().take(NAMES_SHOWN).map(|workload| workload.name.to_string()).collect();
    match workloads.len().saturating_sub(NAMES_SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
