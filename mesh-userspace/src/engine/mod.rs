//! From what the catalog says to what this node should hold. Pure: no IO, no clock, no randomness, no async.
//!
//! [`Engine`] takes [`Update`]s and keeps [`Tables`]; [`diff`] turns two of them into [`MapOp`]s. The tables depend on
//! the catalog's present contents alone, never on the way there.

mod compile;
mod datagram;
mod dns;
mod fit;
mod grouping;
mod host;
mod index;
mod number;
mod policy;
mod same_node;
mod shared_map;
mod snapshot;
mod tables;
mod verdicts;

#[cfg(test)]
mod datagram_tests;
#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod policy_properties;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod tests;

pub use fit::{Capacity, FITTED, LeftOut, fit};
pub(crate) use index::{SelectorIndex, selects};
pub use policy::{GroupRule, PolicyGroup, RuleName};
pub use shared_map::SharedMap;
pub use snapshot::{Endpoint, FrontendView, Locality, Snapshot};
pub(crate) use tables::is_group_header;
pub use tables::{MapOp, Tables, diff};

use crate::model::{
    Catalog, Node, NodeName, Object, ObjectKey, ObjectName, Service, TrafficPolicy, Update, Workload, WorkloadUid,
};
use datagram::Datagrams;
use grouping::Grouping;
use host::Hosts;
use index::Claims;
use number::Numbers;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

/// Compiles the catalog for one node, incrementally: an update costs what depends on it, not what there is.
///
/// Rules of what becomes what:
/// - A service's TCP ports become frontends at each of its virtual addresses; UDP ports: see [`datagram`].
/// - A workload is an endpoint of a service of its namespace if its labels hold the whole selector, it is meshed
///   (`Disabled` ones are not: the mesh could not authenticate them), its weight is not 0, it is not terminating, it has the target port and
///   an address of the virtual address's family, and its node is known.
/// - Where two services claim one address and port, two workloads one address, or two traffic policies one service, the
///   first by name has it.
/// - A workload's policy group is made of its namespace's policies that name it as a target, or everyone. Through a
///   service they hold only on the ports that it targets, of TCP and UDP alike; that an ALLOW policy is there denies the rest everywhere.
/// - Addresses in `MeshConfig`'s excluded ranges are never captured, whoever owns them.
#[derive(Debug)]
pub struct Engine {
    node: NodeName,
    tables: Tables,
    selectors: SelectorIndex,
    numbers: Numbers<ObjectName>,
    grouping: Grouping,
    workloads_on: HashMap<NodeName, BTreeSet<ObjectName>>,
    frontends: Claims<SocketAddr, Arc<FrontendView>>,
    addresses: Claims<IpAddr, Arc<Workload>>,
    local: Claims<WorkloadUid, Arc<Workload>>,
    hosts: Hosts,
    datagrams: Datagrams,
    /// By service.
    traffic: Claims<ObjectName, Arc<TrafficPolicy>>,
    /// Services to compile before the update at hand ends.
    dirty: BTreeSet<ObjectName>,
    generation: u64,
    updated_at: Option<Instant>,
}

impl Engine {
    /// An engine for the named node, with empty tables.
    #[must_use]
    pub fn new(node: NodeName) -> Self {
        Self {
            node,
            tables: Tables::default(),
            selectors: SelectorIndex::default(),
            numbers: Numbers::new(1, u32::MAX),
            grouping: Grouping::default(),
            workloads_on: HashMap::new(),
            frontends: Claims::default(),
            addresses: Claims::default(),
            local: Claims::default(),
            hosts: Hosts::default(),
            datagrams: Datagrams::default(),
            traffic: Claims::default(),
            dirty: BTreeSet::new(),
            generation: 0,
            updated_at: None,
        }
    }

    /// What this node should hold now.
    #[must_use]
    pub fn desired(&self) -> &Tables {
        &self.tables
    }

    /// Number of updates handled so far.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// When the last update came, as the caller told.
    #[must_use]
    pub fn updated_at(&self) -> Option<Instant> {
        self.updated_at
    }

    /// Brings the tables up to date.
    pub fn handle_update(&mut self, update: Update, now: Instant) {
        match update {
            Update::Snapshot(catalog) => self.replace(catalog),
            Update::Upsert(Object::Mesh(mesh)) => self.change_mesh(Some(&mesh)),
            Update::Upsert(Object::Node(node)) => self.change_node(&node.name.clone(), Some(node)),
            Update::Upsert(Object::Service(service)) => self.change_service(&service.name.clone(), Some(service)),
            Update::Upsert(Object::Workload(workload)) => self.change_workload(&workload.name.clone(), Some(workload)),
            Update::Upsert(Object::Policy(policy)) => self.change_policy(&policy.name.clone(), Some(policy)),
            Update::Upsert(Object::Traffic(policy)) => self.change_traffic(&policy.name.clone(), Some(policy)),
            Update::Remove(ObjectKey::Mesh) => self.change_mesh(None),
            Update::Remove(ObjectKey::Node(name)) => self.change_node(&name, None),
            Update::Remove(ObjectKey::Service(name)) => self.change_service(&name, None),
            Update::Remove(ObjectKey::Workload(name)) => self.change_workload(&name, None),
            Update::Remove(ObjectKey::Policy(name)) => self.change_policy(&name, None),
            Update::Remove(ObjectKey::Traffic(name)) => self.change_traffic(&name, None),
        }
        self.regroup();
        for name in std::mem::take(&mut self.dirty) {
            self.compile_service(&name);
        }
        self.generation += 1;
        self.updated_at = Some(now);
    }

    fn replace(&mut self, catalog: Catalog) {
        let old = Arc::clone(&self.tables.snapshot);
        self.change_mesh(catalog.mesh.as_ref());
        for name in old.nodes.iter().map(|(name, _)| name).filter(|name| !catalog.nodes.contains_key(*name)) {
            self.change_node(name, None);
        }
        for name in old.services.iter().map(|(name, _)| name).filter(|name| !catalog.services.contains_key(*name)) {
            self.change_service(name, None);
        }
        for name in old.workloads.iter().map(|(name, _)| name).filter(|name| !catalog.workloads.contains_key(*name)) {
            self.change_workload(name, None);
        }
        for name in old.policies.iter().map(|(name, _)| name).filter(|name| !catalog.policies.contains_key(*name)) {
            self.change_policy(name, None);
        }
        for name in old.traffic.iter().map(|(name, _)| name).filter(|name| !catalog.traffic.contains_key(*name)) {
            self.change_traffic(name, None);
        }
        for (name, node) in catalog.nodes {
            self.change_node(&name, Some(node));
        }
        for (name, workload) in catalog.workloads {
            self.change_workload(&name, Some(workload));
        }
        for (name, service) in catalog.services {
            self.change_service(&name, Some(service));
        }
        for (name, policy) in catalog.policies {
            self.change_policy(&name, Some(policy));
        }
        for (name, policy) in catalog.traffic {
            self.change_traffic(&name, Some(policy));
        }
    }

    fn change_node(&mut self, name: &NodeName, new: Option<Arc<Node>>) {
        let nodes = &mut Arc::make_mut(&mut self.tables.snapshot).nodes;
        let places = |node: Option<&Arc<Node>>| node.map(|node| node.zone.clone());
        let is_at = places(new.as_ref());
        let old = match new {
            Some(node) => nodes.insert(name.clone(), node),
            None => nodes.remove(name),
        };
        if places(old.as_ref()) == is_at {
            return;
        }
        if *name == self.node {
            // How far everything is depends on where this node is.
            let services: Vec<_> = self.tables.snapshot.services.iter().map(|(name, _)| name.clone()).collect();
            self.dirty.extend(services);
            return;
        }
        let there = self.workloads_on.get(name).into_iter().flatten();
        let workloads: Vec<_> = there.filter_map(|name| self.tables.snapshot.workload(name)).cloned().collect();
        for workload in workloads {
            self.mark_services_of(&workload);
        }
    }

    fn change_traffic(&mut self, name: &ObjectName, new: Option<Arc<TrafficPolicy>>) {
        let policies = &mut Arc::make_mut(&mut self.tables.snapshot).traffic;
        let old = match &new {
            Some(policy) => policies.insert(name.clone(), Arc::clone(policy)),
            None => policies.remove(name),
        };
        for service in old.iter().flat_map(|old| &old.services) {
            self.traffic.remove(service, name);
            self.dirty.insert(service.clone());
        }
        if let Some(policy) = new {
            for service in &policy.services {
                self.traffic.insert(service.clone(), name.clone(), Arc::clone(&policy));
                self.dirty.insert(service.clone());
            }
        }
    }

    fn change_service(&mut self, name: &ObjectName, new: Option<Arc<Service>>) {
        let services = &mut Arc::make_mut(&mut self.tables.snapshot).services;
        let old = match &new {
            Some(service) => services.insert(name.clone(), Arc::clone(service)),
            None => services.remove(name),
        };
        if old == new {
            return;
        }
        let is_new = old.is_none();
        if let Some(new) = &new {
            self.claim_datagrams(new);
        }
        if let Some(old) = old {
            self.mark_policies_of(&old);
            self.selectors.remove_service(&old);
            for address in compile::frontend_addresses(&old) {
                self.frontends.remove(&address, name);
                self.refresh_frontend(address);
            }
            self.release_datagrams(&old);
            self.refresh_datagram_ports_behind(&old);
        }
        if let Some(new) = new {
            if is_new {
                self.numbers.acquire(name);
            }
            self.selectors.insert_service(&new);
            self.refresh_datagram_ports_behind(&new);
            self.mark_policies_of(&new);
            self.dirty.insert(name.clone());
        } else {
            self.numbers.release(name);
            self.dirty.remove(name);
        }
    }

    fn change_workload(&mut self, name: &ObjectName, new: Option<Arc<Workload>>) {
        let workloads = &mut Arc::make_mut(&mut self.tables.snapshot).workloads;
        let old = match &new {
            Some(workload) => workloads.insert(name.clone(), Arc::clone(workload)),
            None => workloads.remove(name),
        };
        if old == new {
            return;
        }
        self.mark_workload(name, new.is_some());
        let mut touched = BTreeSet::new();
        if let Some(old) = &old {
            self.mark_services_of(old);
            self.selectors.remove_workload(old);
            if let Some(names) = self.workloads_on.get_mut(&old.node) {
                names.remove(name);
                if names.is_empty() {
                    self.workloads_on.remove(&old.node);
                }
            }
            for address in old.addresses.iter().map(IpAddr::to_canonical) {
                self.addresses.remove(&address, name);
                touched.insert(address);
            }
            self.release_host(old);
            self.local.remove(&old.uid, name);
            self.refresh_local(&old.uid);
        }
        if let Some(new) = new {
            self.selectors.insert_workload(&new);
            self.mark_services_of(&new);
            self.workloads_on.entry(new.node.clone()).or_default().insert(name.clone());
            if new.is_meshed() && new.is_host_network() {
                self.claim_host(&new);
            } else if new.is_meshed() {
                for address in new.addresses.iter().map(IpAddr::to_canonical) {
                    self.addresses.insert(address, name.clone(), Arc::clone(&new));
                    touched.insert(address);
                }
            }
            if self.is_local(&new) {
                self.local.insert(new.uid.clone(), name.clone(), Arc::clone(&new));
                self.refresh_local(&new.uid);
            }
        }
        for address in touched {
            self.refresh_address(address);
        }
        self.refresh_touched_hosts();
    }

    /// Has every service that selects this workload compiled again.
    fn mark_services_of(&mut self, workload: &Workload) {
        let services: Vec<_> = self.services_of(workload).cloned().collect();
        self.dirty.extend(services);
    }

    /// Every service that selects this workload.
    fn services_of<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a ObjectName> {
        let services = &self.tables.snapshot.services;
        self.selectors
            .services_for(workload)
            .filter(|name| services.get(*name).is_some_and(|service| index::selects(service, workload)))
    }

    fn is_local(&self, workload: &Workload) -> bool {
        workload.node == self.node && workload.is_meshed() && (workload.netns.is_some() || workload.is_host_network())
    }
}
