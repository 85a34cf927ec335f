//! Which policies hold for which workload, brought up to date with what changes.

use super::number::Numbers;
use super::policy::{self, GroupRule, PolicyGroup, RuleName};
use super::{Engine, compile, index, verdicts};
use crate::model::{AuthorizationPolicy, DefaultAction, ObjectName, PolicyTarget, Service, Source, SpiffeId, Workload};
use index::PolicyIndex;
use ipnet::{IpNet, Ipv4Net};
use mesh_common::policy::Group;
use mesh_common::policy::source::{CLASS, FIRST_IDENTITY};
use std::collections::{BTreeSet, HashMap};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

/// What the engine keeps to find groups.
#[derive(Debug)]
pub(super) struct Grouping {
    policies: PolicyIndex,
    workloads_in: HashMap<Arc<str>, BTreeSet<ObjectName>>,
    numbers: Numbers<Content>,
    identities: Numbers<SpiffeId>,
    /// Workloads whose group may be another one when the update at hand ends.
    changed: BTreeSet<ObjectName>,
}

impl Default for Grouping {
    fn default() -> Self {
        Self {
            policies: PolicyIndex::default(),
            workloads_in: HashMap::new(),
            numbers: Numbers::new(1, u32::MAX),
            identities: Numbers::new(FIRST_IDENTITY, CLASS - 1),
            changed: BTreeSet::new(),
        }
    }
}

/// A group apart from its number: what two workloads must have in common to share it.
#[derive(Clone, Debug)]
struct Content(Arc<PolicyGroup>);

impl Content {
    fn parts(&self) -> (u32, &[GroupRule]) {
        (self.0.flags, &self.0.rules)
    }
}

impl PartialEq for Content {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Content {}

impl Hash for Content {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl Engine {
    pub(super) fn change_policy(&mut self, name: &ObjectName, new: Option<Arc<AuthorizationPolicy>>) {
        let policies = &mut Arc::make_mut(&mut self.tables.snapshot).policies;
        let old = match &new {
            Some(policy) => policies.insert(name.clone(), Arc::clone(policy)),
            None => policies.remove(name),
        };
        if old == new {
            return;
        }
        if let Some(old) = old {
            self.grouping.policies.remove(&old);
            self.mark_targets_of(&old);
        }
        if let Some(new) = new {
            self.grouping.policies.insert(&new);
            self.mark_targets_of(&new);
        }
    }

    /// A workload comes, goes or changes.
    pub(super) fn mark_workload(&mut self, name: &ObjectName, exists: bool) {
        let neighbours = self.grouping.workloads_in.entry(name.namespace().into()).or_default();
        if exists {
            neighbours.insert(name.clone());
        } else {
            neighbours.remove(name);
            if neighbours.is_empty() {
                self.grouping.workloads_in.remove(name.namespace());
            }
        }
        self.grouping.changed.insert(name.clone());
    }

    /// A service comes, goes or changes: policies that name it hold for other workloads, or on other ports.
    pub(super) fn mark_policies_of(&mut self, service: &Service) {
        if self.grouping.policies.for_service(&service.name).next().is_some() {
            self.grouping.changed.extend(self.selectors.workloads_for(service).cloned());
        }
    }

    fn mark_targets_of(&mut self, policy: &AuthorizationPolicy) {
        let namespace = policy.name.namespace();
        let snapshot = &self.tables.snapshot;
        let mut found = BTreeSet::new();
        for target in &policy.targets {
            match target {
                PolicyTarget::Selector(selector) if !selector.is_empty() => {
                    found.extend(self.selectors.workloads_with(namespace, selector).cloned());
                }
                PolicyTarget::Selector(_) => found.extend(self.neighbours(namespace)),
                PolicyTarget::Service(service) => {
                    let service = ObjectName::parse(namespace, service).ok().and_then(|name| snapshot.service(&name));
                    found
                        .extend(service.into_iter().flat_map(|service| self.selectors.workloads_for(service)).cloned());
                }
            }
        }
        if policy.targets.is_empty() {
            found.extend(self.neighbours(namespace));
        }
        self.grouping.changed.extend(found);
    }

    fn neighbours(&self, namespace: &str) -> impl Iterator<Item = ObjectName> {
        self.grouping.workloads_in.get(namespace).into_iter().flatten().cloned()
    }

    /// Brings the groups of all marked workloads up to date, and whatever refers to them.
    pub(super) fn regroup(&mut self) {
        let mut services = BTreeSet::new();
        for name in std::mem::take(&mut self.grouping.changed) {
            let workload = self.tables.snapshot.workload(&name).filter(|workload| workload.is_meshed()).cloned();
            let group = workload.as_ref().map(|workload| self.group_for(workload)).filter(|group| !group.is_default());
            if self.assign_group(&name, group)
                && let Some(workload) = workload
            {
                for address in workload.addresses.iter().map(IpAddr::to_canonical) {
                    self.refresh_guard(address);
                }
                services.extend(self.services_of(&workload).cloned());
            }
        }
        // Those that are compiled anyway need no refreshing.
        for name in services.difference(&self.dirty).cloned().collect::<Vec<_>>() {
            let service = self.tables.snapshot.service(&name).cloned();
            for address in service.iter().flat_map(|service| compile::frontend_addresses(service)) {
                self.refresh_frontend(address);
            }
            if let Some(service) = service {
                self.refresh_datagrams_of(&service);
            }
        }
    }

    /// Puts a workload into a group (`None`: the default one); `false` if it is there already.
    fn assign_group(&mut self, workload: &ObjectName, group: Option<PolicyGroup>) -> bool {
        let content = group.map(|group| Content(Arc::new(group)));
        let old = self.tables.snapshot.groups.get(workload).cloned().map(Content);
        if old == content {
            return false;
        }
        // Before the old one is released: its number must not become the new one's.
        let new = content.map(|content| self.acquire_group(&content));
        let groups = &mut Arc::make_mut(&mut self.tables.snapshot).groups;
        match new {
            Some(group) => groups.insert(workload.clone(), group),
            None => groups.remove(workload),
        };
        if let Some(old) = old {
            self.release_group(&old);
        }
        true
    }

    fn acquire_group(&mut self, content: &Content) -> Arc<PolicyGroup> {
        let (number, is_new) = self.grouping.numbers.acquire(content);
        let published = &mut Arc::make_mut(&mut self.tables.snapshot).groups_by_number;
        if !is_new && let Some(known) = published.get(&number) {
            return Arc::clone(known);
        }
        let group = Arc::new(PolicyGroup { number, ..(*content.0).clone() });
        published.insert(number, Arc::clone(&group));
        self.write_group(&group);
        group
    }

    fn release_group(&mut self, content: &Content) {
        let Some(number) = self.grouping.numbers.release(content) else { return };
        let removed = Arc::make_mut(&mut self.tables.snapshot).groups_by_number.remove(&number);
        if let Some(group) = removed {
            self.erase_group(&group);
        }
    }

    fn write_group(&mut self, group: &PolicyGroup) {
        let (verdicts, ranges) = verdicts::of_group(group);
        for (key, class) in ranges {
            self.tables.ranges.insert(key, class);
        }
        let identities = self.tables.snapshot.identities.iter();
        let by_identity = identities.flat_map(|(id, number)| verdicts::of_identity(group, id, *number));
        for (key, matched) in verdicts.into_iter().chain(by_identity) {
            self.tables.verdicts.insert(key, matched);
        }
    }

    fn erase_group(&mut self, group: &PolicyGroup) {
        let (verdicts, ranges) = verdicts::of_group(group);
        for key in ranges.keys() {
            self.tables.ranges.remove(key);
        }
        let identities = self.tables.snapshot.identities.iter();
        let by_identity = identities.flat_map(|(id, number)| verdicts::of_identity(group, id, *number));
        for (key, _) in verdicts.into_iter().chain(by_identity) {
            self.tables.verdicts.remove(&key);
        }
    }

    /// A workload with this identity runs on this node.
    pub(super) fn acquire_identity(&mut self, identity: &SpiffeId) {
        let (number, is_new) = self.grouping.identities.acquire(identity);
        if !is_new {
            return;
        }
        let snapshot = Arc::make_mut(&mut self.tables.snapshot);
        snapshot.identities.insert(identity.clone(), number);
        snapshot.identities_by_number.insert(number, identity.clone());
        for group in snapshot.groups_by_number.values() {
            for (key, matched) in verdicts::of_identity(group, identity, number) {
                self.tables.verdicts.insert(key, matched);
            }
        }
    }

    /// A workload with this identity no longer runs on this node.
    pub(super) fn release_identity(&mut self, identity: &SpiffeId) {
        let Some(number) = self.grouping.identities.release(identity) else { return };
        let snapshot = Arc::make_mut(&mut self.tables.snapshot);
        snapshot.identities.remove(identity);
        snapshot.identities_by_number.remove(&number);
        for group in snapshot.groups_by_number.values() {
            for key in verdicts::of_identity(group, identity, number).keys() {
                self.tables.verdicts.remove(key);
            }
        }
    }

    /// The rules that can hold for a workload, in the order of policies' names.
    fn group_for(&self, workload: &Workload) -> PolicyGroup {
        let snapshot = &self.tables.snapshot;
        let services: Vec<&Arc<Service>> =
            self.services_of(workload).filter_map(|name| snapshot.service(name)).collect();
        let by_service = services.iter().flat_map(|service| self.grouping.policies.for_service(&service.name));
        let names: BTreeSet<&ObjectName> = self.grouping.policies.for_workload(workload).chain(by_service).collect();
        let mut group = PolicyGroup::default();
        if workload.default_action == DefaultAction::Deny {
            group.flags |= Group::DENY_BY_DEFAULT;
        }
        for policy in names.into_iter().filter_map(|name| snapshot.policy(name)) {
            if let Some(scope) = scope(policy, workload, &services) {
                group.flags |= policy::flag(policy.action, policy.dry_run);
                group.rules.extend(rules(policy, &scope));
            }
        }
        group
    }
}

/// On which of a workload's ports a policy holds.
enum Scope {
    Everywhere,
    Ports(BTreeSet<u16>),
}

/// `None` if no target names the workload.
fn scope(policy: &AuthorizationPolicy, workload: &Workload, services: &[&Arc<Service>]) -> Option<Scope> {
    if policy.targets.is_empty() {
        return Some(Scope::Everywhere);
    }
    let mut ports = None;
    for target in &policy.targets {
        match target {
            PolicyTarget::Selector(selector) if index::holds(selector, workload) => return Some(Scope::Everywhere),
            PolicyTarget::Selector(_) => {}
            PolicyTarget::Service(name) => {
                for service in services.iter().filter(|service| service.name.name() == &**name) {
                    let targeted = service.ports.iter();
                    ports
                        .get_or_insert_with(BTreeSet::new)
                        .extend(targeted.filter_map(|port| compile::target_port(workload, &port.target)));
                }
            }
        }
    }
    ports.map(Scope::Ports)
}

/// A policy's rules as they hold in a scope; those that match nobody there are left out.
fn rules<'a>(policy: &'a AuthorizationPolicy, scope: &'a Scope) -> impl Iterator<Item = GroupRule> + 'a {
    policy.rules.iter().filter_map(move |rule| {
        let own: Option<BTreeSet<u16>> = (!rule.ports.is_empty()).then(|| rule.ports.iter().copied().collect());
        let ports = match (own, scope) {
            (own, Scope::Everywhere) => own,
            (None, Scope::Ports(scope)) => Some(scope.clone()),
            (Some(own), Scope::Ports(scope)) => Some(own.intersection(scope).copied().collect()),
        };
        // Nobody connects to port 0, which stands for all ports in the kernel.
        let ports = ports.map(|ports| ports.into_iter().filter(|port| *port != 0).collect::<BTreeSet<u16>>());
        let sources: Option<Vec<Source>> = rule.sources.as_ref().map(|sources| sources.iter().map(canonical).collect());
        let can_hold = ports.as_ref().is_none_or(|ports| !ports.is_empty())
            && sources.as_ref().is_none_or(|sources| !sources.is_empty());
        can_hold.then(|| GroupRule {
            name: RuleName { policy: policy.name.clone(), rule: Arc::clone(&rule.name) },
            action: policy.action,
            dry_run: policy.dry_run,
            sources,
            ports,
        })
    })
}

/// A range of v4-mapped addresses is the range of the IPv4 addresses that they are.
fn canonical(source: &Source) -> Source {
    const MAPPED_PREFIX: u8 = 96;
    if let Source::Range(IpNet::V6(range)) = source
        && let Some(length) = range.prefix_len().checked_sub(MAPPED_PREFIX)
        && let Some(address) = range.network().to_ipv4_mapped()
        && let Ok(range) = Ipv4Net::new(address, length)
    {
        return Source::Range(range.into());
    }
    source.clone()
}
