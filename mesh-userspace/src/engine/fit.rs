//! What of the desired tables fits the kernel's maps, chosen so that nothing is let through that should not be, and that
//! what the kernel cannot hold is done by the daemon where it can.
//!
//! - A policy group that does not fit is not written at all. What would refer to it at connect() is left to the proxy,
//!   which asks the rules themselves; the guard still refers to it, finds no header, and lets nothing pass but what the
//!   proxy delivers.
//! - Backends that do not fit are picked by the daemon: nothing but speed is lost.
//! - A workload of this node whose guard does not fit is not armed: capture without a guard would be worse than neither.
//! - Frontends and addresses that do not fit are not captured; a destination that is STRICT refuses what comes to it
//!   in plaintext.
//!
//! What stays depends on the tables' contents alone: what fitted before fits again.

use super::{SharedMap, Tables};
use mesh_common::Ip;
use mesh_common::maps;
use mesh_common::service::{AppPortKey, Backend, CidrAction, DatagramFrontend, Frontend, FrontendKey};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::sync::Arc;

/// Entries that each map has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub frontends: usize,
    pub backends: usize,
    pub cidrs: usize,
    pub app_ports: usize,
    pub datagrams: usize,
    pub verdicts: usize,
    pub ranges: usize,
}

impl Capacity {
    /// Of the kernel's maps.
    pub const KERNEL: Self = Self {
        frontends: maps::MAX_FRONTENDS as usize,
        backends: maps::MAX_BACKENDS as usize,
        cidrs: maps::MAX_CIDRS as usize,
        app_ports: maps::MAX_APP_PORTS as usize,
        datagrams: maps::MAX_DATAGRAMS as usize,
        verdicts: maps::MAX_VERDICTS as usize,
        ranges: maps::MAX_RANGES as usize,
    };
}

/// Entries that a map has no room for, by the map's name. None is not in it.
pub type LeftOut = BTreeMap<&'static str, usize>;

/// The tables as far as they fit, and how many entries of each map do not.
#[must_use]
pub fn fit(mut tables: Tables, capacity: &Capacity) -> (Tables, LeftOut) {
    let before = sizes(&tables);
    if tables.verdicts.len() > capacity.verdicts || tables.ranges.len() > capacity.ranges {
        drop_groups(&mut tables, capacity);
    }
    if tables.backends.len() > capacity.backends {
        drop_backends(&mut tables, capacity.backends);
    }
    if tables.app_ports.len() > capacity.app_ports {
        drop_guards(&mut tables, capacity.app_ports);
    }
    truncate(&mut tables.frontends, capacity.frontends);
    truncate(&mut tables.cidrs, capacity.cidrs);
    truncate(&mut tables.datagrams, capacity.datagrams);
    let left_out = before.into_iter().zip(sizes(&tables)).map(|(all, kept)| all - kept);
    let left_out = FITTED.into_iter().zip(left_out);
    let left_out = left_out.filter(|(_, entries)| *entries > 0).collect();
    (tables, left_out)
}

/// The maps that [`fit`] looks at.
pub const FITTED: [&str; 7] = [
    maps::SVC.name,
    maps::BACKENDS.name,
    maps::CIDR.name,
    maps::APPPORTS.name,
    maps::DATAGRAMS.name,
    maps::VERDICTS.name,
    maps::RANGES.name,
];

/// In the order of [`FITTED`].
fn sizes(tables: &Tables) -> [usize; 7] {
    [
        tables.frontends.len(),
        tables.backends.len(),
        tables.cidrs.len(),
        tables.app_ports.len(),
        tables.datagrams.len(),
        tables.verdicts.len(),
        tables.ranges.len(),
    ]
}

/// Keeps the first entries.
fn truncate<K: Ord + Hash + Clone, V: Clone>(map: &mut SharedMap<K, V>, capacity: usize) {
    if map.len() <= capacity {
        return;
    }
    let excess: Vec<K> = map.sorted().into_keys().skip(capacity).cloned().collect();
    for key in excess {
        map.remove(&key);
    }
}

/// Takes away what a predicate names.
fn remove_where<K: Ord + Hash + Clone, V: Clone>(map: &mut SharedMap<K, V>, is_removed: impl Fn(&K) -> bool) {
    let removed: Vec<K> = map.iter().map(|(key, _)| key).filter(|key| is_removed(key)).cloned().collect();
    for key in removed {
        map.remove(&key);
    }
}

fn drop_groups(tables: &mut Tables, capacity: &Capacity) {
    // Of each group: its verdicts and its ranges.
    let mut groups: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
    for (key, _) in tables.verdicts.iter() {
        groups.entry(key.group()).or_default().0 += 1;
    }
    for ((_, key), _) in tables.ranges.iter() {
        groups.entry(key.group()).or_default().1 += 1;
    }
    let (mut verdicts, mut ranges) = (0, 0);
    let mut dropped = BTreeSet::new();
    for (group, (more_verdicts, more_ranges)) in groups {
        if verdicts + more_verdicts > capacity.verdicts || ranges + more_ranges > capacity.ranges {
            dropped.insert(group);
            continue;
        }
        verdicts += more_verdicts;
        ranges += more_ranges;
    }
    remove_where(&mut tables.verdicts, |key| dropped.contains(&key.group()));
    remove_where(&mut tables.ranges, |(_, key)| dropped.contains(&key.group()));
    leave_to_the_proxy(tables, &dropped);
}

/// Has nothing at connect() ask these groups.
fn leave_to_the_proxy(tables: &mut Tables, groups: &BTreeSet<u32>) {
    let is_guarded_by = |backend: &Backend| {
        let guard = tables.app_ports.get(&AppPortKey::new(backend.addr(), backend.port_be()));
        let guard = guard.or_else(|| tables.app_ports.get(&AppPortKey::new(backend.addr(), 0)));
        guard.is_some_and(|guard| groups.contains(&guard.group()))
    };
    let slots: BTreeSet<FrontendKey> =
        tables.backends.iter().filter(|(_, backend)| is_guarded_by(backend)).map(|(key, _)| header(key)).collect();
    let frontends: Vec<_> = tables
        .frontends
        .iter()
        .filter(|(key, frontend)| groups.contains(&frontend.group()) || slots.contains(key))
        .map(|(key, frontend)| (*key, *frontend))
        .collect();
    for (key, frontend) in frontends {
        let is_dropped = groups.contains(&frontend.group());
        let (group, port_be) = if is_dropped { (0, 0) } else { (frontend.group(), frontend.target_port_be()) };
        let picked = Frontend::new(frontend.service(), frontend.backends(), group, port_be, frontend.flags(), 0, 0, 0);
        tables.frontends.insert(key, picked);
        remove_slots(&mut tables.backends, &key);
    }
    let datagrams: Vec<_> = tables.datagrams.iter().map(|(key, frontend)| (*key, *frontend)).collect();
    for (key, frontend) in datagrams.into_iter().filter(|(_, frontend)| groups.contains(&frontend.group())) {
        let (service, backends, number) = (frontend.service(), frontend.backends(), frontend.number());
        let asked = DatagramFrontend::new(service, backends, 0, number, 0, frontend.flags());
        tables.datagrams.insert(key, asked);
    }
    let cidrs: Vec<_> = tables.cidrs.iter().map(|(key, action)| (*key, *action)).collect();
    for (key, _) in cidrs.into_iter().filter(|(_, action)| groups.contains(&action.group())) {
        tables.cidrs.insert(key, CidrAction::CAPTURE);
    }
}

/// Of a frontend's slot: the key of its header.
fn header(slot: &FrontendKey) -> FrontendKey {
    FrontendKey::new(slot.addr(), slot.port_be(), slot.protocol(), 0)
}

fn remove_slots(backends: &mut SharedMap<FrontendKey, Backend>, header: &FrontendKey) {
    let slot = |slot| FrontendKey::new(header.addr(), header.port_be(), header.protocol(), slot);
    let mut next = 1;
    while backends.remove(&slot(next)).is_some() {
        next += 1;
    }
}

fn drop_backends(tables: &mut Tables, capacity: usize) {
    let mut taken = 0;
    let all: Vec<_> = tables.frontends.sorted().into_iter().map(|(key, frontend)| (*key, *frontend)).collect();
    for (key, frontend) in all.into_iter().filter(|(_, frontend)| frontend.local_slots() > 0) {
        let slots = frontend.local_slots() as usize;
        if taken + slots <= capacity {
            taken += slots;
            continue;
        }
        let (service, group, port_be) = (frontend.service(), frontend.group(), frontend.target_port_be());
        let picked = Frontend::new(service, frontend.backends(), group, port_be, frontend.flags(), 0, 0, 0);
        tables.frontends.insert(key, picked);
        remove_slots(&mut tables.backends, &key);
    }
}

fn drop_guards(tables: &mut Tables, capacity: usize) {
    let mut by_address: BTreeMap<Ip, usize> = BTreeMap::new();
    for (key, _) in tables.app_ports.iter() {
        *by_address.entry(key.addr()).or_default() += 1;
    }
    // Those of the node's own namespace are at addresses that several workloads share.
    let shared = by_address.remove(&Ip::UNSPECIFIED).unwrap_or(0);
    let mut taken = shared;
    let mut dropped = BTreeSet::new();
    for workload in tables.local.values() {
        let addresses: Vec<Ip> = workload.addresses.iter().map(|address| Ip::from(*address)).collect();
        let entries: usize = addresses.iter().map(|address| by_address.get(address).copied().unwrap_or(0)).sum();
        if taken + entries <= capacity {
            taken += entries;
        } else {
            dropped.extend(addresses);
        }
    }
    remove_where(&mut tables.app_ports, |key| dropped.contains(&key.addr()));
    Arc::make_mut(&mut tables.local)
        .retain(|_, workload| !workload.addresses.iter().any(|address| dropped.contains(&Ip::from(*address))));
}

#[cfg(test)]
mod tests;
