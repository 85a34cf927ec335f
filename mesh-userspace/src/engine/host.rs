//! Workloads in their nodes' own network namespaces: they share an address, and are in the mesh on the ports that they
//! declare.
//!
//! Rules of what becomes what, beside those of [`Engine`]:
//! - Each declared port at each of the workload's addresses is a frontend of its own, unless its mode is `Disabled`
//!   or it is one that the daemon itself listens on. Of several workloads that declare one, the first by name has it;
//!   a service at the same address and port goes before.
//! - An address that a workload with a namespace of its own has is that workload's, and nobody's to share.
//! - On its own node a declared port is guarded at the workload's addresses, and at all others of the node too: the
//!   application may listen there as well.

use super::index::Claims;
use super::{Engine, SharedMap, Snapshot};
use crate::model::{Mode, ObjectName, SpiffeId, Workload};
use mesh_common::Ip;
use mesh_common::service::{AppPort, AppPortKey, Frontend};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What the engine keeps about them.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    ports: Claims<SocketAddr, Arc<Workload>>,
    /// Those of this node, by declared port.
    local: Claims<u16, Arc<Workload>>,
    local_names: BTreeSet<ObjectName>,
    /// What is not a workload's on any node: the tunnel's port and the like.
    own_ports: BTreeSet<u16>,
    /// The daemon's listener for captured connections, on this node.
    outbound_port: Option<u16>,
    /// To refresh before the update at hand ends.
    touched: BTreeSet<SocketAddr>,
    touched_local: BTreeSet<u16>,
}

/// The part of a [`Snapshot`] that is about them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostViews {
    ports: SharedMap<SocketAddr, Arc<Workload>>,
    /// All of an address, by name.
    at: SharedMap<IpAddr, Arc<BTreeMap<ObjectName, Arc<Workload>>>>,
}

impl Snapshot {
    /// The meshed workload that a connection to this address and port is for.
    #[must_use]
    pub fn workload_serving(&self, destination: SocketAddr) -> Option<&Arc<Workload>> {
        let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
        self.workload_at(destination.ip()).or_else(|| self.hosts.ports.get(&destination))
    }

    /// A meshed workload that may speak from this address under this identity.
    #[must_use]
    pub fn workload_speaking(&self, address: IpAddr, identity: &SpiffeId) -> Option<&Arc<Workload>> {
        let address = address.to_canonical();
        let own = self.workload_at(address).filter(|workload| workload.identity == *identity);
        own.or_else(|| self.hosts.at.get(&address)?.values().find(|workload| workload.identity == *identity))
    }
}

impl Engine {
    /// Tells the ports that the daemon itself listens on, which no workload in a node's own namespace can have: the
    /// listener for captured connections, and others. Call it before the first update.
    #[must_use]
    pub fn with_own_ports(mut self, outbound: u16, others: &[u16]) -> Self {
        self.hosts.outbound_port = Some(outbound);
        self.hosts.own_ports = others.iter().copied().chain([outbound]).collect();
        self
    }

    pub(super) fn claim_host(&mut self, workload: &Arc<Workload>) {
        for address in self.meshed_ports_of(workload) {
            self.hosts.ports.insert(address, workload.name.clone(), Arc::clone(workload));
            self.hosts.touched.insert(address);
        }
        let at = &mut Arc::make_mut(&mut self.tables.snapshot).hosts.at;
        for address in workload.addresses.iter().map(IpAddr::to_canonical) {
            let mut there = at.get(&address).map(|there| BTreeMap::clone(there)).unwrap_or_default();
            there.insert(workload.name.clone(), Arc::clone(workload));
            at.insert(address, Arc::new(there));
        }
        if self.is_local(workload) {
            self.hosts.local_names.insert(workload.name.clone());
            for port in self.meshed_ports_of(workload).into_iter().map(|address| address.port()) {
                self.hosts.local.insert(port, workload.name.clone(), Arc::clone(workload));
                self.hosts.touched_local.insert(port);
            }
            self.hosts.touched_local.extend(self.hosts.outbound_port);
        }
    }

    pub(super) fn release_host(&mut self, workload: &Workload) {
        if !workload.is_host_network() {
            return;
        }
        for address in self.meshed_ports_of(workload) {
            self.hosts.ports.remove(&address, &workload.name);
            self.hosts.local.remove(&address.port(), &workload.name);
            self.hosts.touched.insert(address);
            self.hosts.touched_local.insert(address.port());
        }
        let at = &mut Arc::make_mut(&mut self.tables.snapshot).hosts.at;
        for address in workload.addresses.iter().map(IpAddr::to_canonical) {
            let mut there = at.get(&address).map(|there| BTreeMap::clone(there)).unwrap_or_default();
            there.remove(&workload.name);
            if there.is_empty() {
                at.remove(&address);
            } else {
                at.insert(address, Arc::new(there));
            }
        }
        if self.hosts.local_names.remove(&workload.name) {
            self.hosts.touched_local.extend(self.hosts.outbound_port);
        }
    }

    /// Refreshes whatever hangs on claims that have changed.
    pub(super) fn refresh_touched_hosts(&mut self) {
        for address in std::mem::take(&mut self.hosts.touched) {
            self.refresh_host_port(address);
        }
        for port in std::mem::take(&mut self.hosts.touched_local) {
            self.refresh_node_guard(port);
        }
    }

    /// Refreshes all declared ports of an address: who else has it, or their policies, have changed.
    pub(super) fn refresh_hosts_at(&mut self, address: IpAddr) {
        let all = SocketAddr::new(address, 0)..=SocketAddr::new(address, u16::MAX);
        for address in self.hosts.ports.keys_within(all).copied().collect::<Vec<_>>() {
            self.refresh_host_port(address);
            self.refresh_node_guard(address.port());
        }
    }

    /// Refreshes the frontends of all declared ports.
    pub(super) fn refresh_host_frontends(&mut self) {
        for address in self.hosts.ports.keys().copied().collect::<Vec<_>>() {
            self.refresh_frontend(address);
        }
    }

    /// The workload that has a declared port.
    pub(super) fn host_at(&self, address: SocketAddr) -> Option<&Arc<Workload>> {
        self.hosts.ports.winner(&address).filter(|_| self.addresses.winner(&address.ip()).is_none())
    }

    /// A declared port as the kernel captures it.
    pub(super) fn host_frontend(&self, address: SocketAddr) -> Option<Frontend> {
        let group = self.tables.snapshot.group_number(&self.host_at(address)?.name);
        let port = if group == 0 { 0 } else { address.port() };
        Some(Frontend::new(0, 1, group, port.to_be(), 0, 0, 0, 0))
    }

    fn refresh_host_port(&mut self, address: SocketAddr) {
        let new = self.host_at(address).cloned();
        let published = &mut Arc::make_mut(&mut self.tables.snapshot).hosts.ports;
        let old = match &new {
            Some(workload) => published.insert(address, Arc::clone(workload)),
            None => published.remove(&address),
        };
        if old != new {
            for workload in old.iter().chain(&new) {
                self.mark_services_of(workload);
            }
        }
        self.refresh_frontend(address);
        let guard = match new.filter(|workload| self.is_local(workload)) {
            Some(workload) => Some(self.guard_of(&workload, address.port())),
            None => self.guard_at(address),
        };
        self.write_guard(address.ip().into(), address.port(), guard);
    }

    /// The guard of a port at whatever other addresses the node has, and of the daemon's listener.
    fn refresh_node_guard(&mut self, port: u16) {
        let guard = match self.hosts.local.winner(&port).cloned() {
            Some(workload) => Some(self.guard_of(&workload, port)),
            None if self.hosts.outbound_port == Some(port) && !self.hosts.local_names.is_empty() => {
                Some(AppPort::new(Mode::Strict as u32, 0))
            }
            None => None,
        };
        self.write_guard(Ip::UNSPECIFIED, port, guard);
    }

    fn guard_of(&self, workload: &Workload, port: u16) -> AppPort {
        AppPort::new(workload.mode_of(port) as u32, self.tables.snapshot.group_number(&workload.name))
    }

    fn write_guard(&mut self, address: Ip, port: u16, guard: Option<AppPort>) {
        let key = AppPortKey::new(address, port.to_be());
        match guard {
            Some(guard) => self.tables.app_ports.insert(key, guard),
            None => self.tables.app_ports.remove(&key),
        };
    }

    /// The addresses and ports at which a workload is in the mesh.
    fn meshed_ports_of(&self, workload: &Workload) -> BTreeSet<SocketAddr> {
        let mut ports = workload.declared_ports();
        ports.retain(|port| {
            *port != 0 && !self.hosts.own_ports.contains(port) && workload.mode_of(*port) != Mode::Disabled
        });
        let addresses = workload.addresses.iter().map(IpAddr::to_canonical);
        addresses.flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port))).collect()
    }
}
