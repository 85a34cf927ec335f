//! Single entries of the tables, each from what it depends on.

use super::same_node::{self, Slots};
use super::{Endpoint, Engine, FrontendView, Locality, PolicyGroup, SharedMap, index};
use crate::model::{
    DeniedError, Mesh, Node, ObjectName, Protocol, Service, ServicePort, TargetPort, Traffic, Workload, WorkloadUid,
};
use ipnet::IpNet;
use mesh_common::Ip;
use mesh_common::capture;
use mesh_common::service::{AppPort, AppPortKey, CidrAction, CidrKey, Frontend, FrontendKey, PROTO_TCP};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Length of the v4-mapped prefix, `::ffff:0:0/96`.
const MAPPED_PREFIX: u32 = 96;

impl Engine {
    pub(super) fn change_mesh(&mut self, new: Option<&Arc<Mesh>>) {
        let snapshot = Arc::make_mut(&mut self.tables.snapshot);
        let old = std::mem::replace(&mut snapshot.mesh, new.cloned());
        self.tables.denied_errno = new.map_or(0, |mesh| errno(mesh.denied_error));
        if same_node::of_mesh(old.as_ref()) != same_node::of_mesh(new) {
            let services: Vec<_> = snapshot.services.iter().map(|(name, _)| name.clone()).collect();
            self.dirty.extend(services);
            for address in self.addresses.keys().copied().collect::<Vec<_>>() {
                self.refresh_address(address);
            }
        }
        self.change_exclusions(exclusions(old.as_ref()), exclusions(new));
        self.change_dns(old.as_ref(), new);
    }

    fn change_exclusions(&mut self, old: Vec<IpNet>, new: Vec<IpNet>) {
        if old == new {
            return;
        }
        for range in old {
            self.tables.cidrs.remove(&range_key(range));
        }
        for range in new {
            self.tables.cidrs.insert(range_key(range), CidrAction::PASS);
        }
        for address in self.addresses.keys().copied().collect::<Vec<_>>() {
            self.refresh_address(address);
        }
        for address in self.frontends.keys().copied().collect::<Vec<_>>() {
            self.refresh_frontend(address);
        }
        self.refresh_host_frontends();
        self.refresh_all_datagrams();
    }

    /// Computes a service's endpoints and claims its frontends.
    pub(super) fn compile_service(&mut self, name: &ObjectName) {
        let Some(service) = self.tables.snapshot.service(name).cloned() else { return };
        let Some(number) = self.numbers.get(name) else { return };
        let traffic =
            Traffic::of(self.tables.snapshot.mesh.as_deref(), &service, self.traffic.winner(name).map(Arc::as_ref));
        let traffic = Arc::new(traffic);
        self.compile_datagrams(name, &service, &traffic);
        for port in tcp_ports(&service) {
            let mut by_family = BTreeMap::new();
            for vip in service.vips.iter().map(IpAddr::to_canonical) {
                let endpoints = by_family.entry(vip.is_ipv4()).or_insert_with(|| self.endpoints(&service, port, vip));
                let view = FrontendView {
                    service: Arc::clone(&service),
                    index: number,
                    port: port.clone(),
                    endpoints: Arc::clone(endpoints),
                    traffic: Arc::clone(&traffic),
                };
                let address = SocketAddr::new(vip, port.port);
                self.frontends.insert(address, name.clone(), Arc::new(view));
                self.refresh_frontend(address);
            }
        }
    }

    pub(super) fn endpoints(&self, service: &Service, port: &ServicePort, vip: IpAddr) -> Arc<[Endpoint]> {
        let snapshot = &self.tables.snapshot;
        let mut found: Vec<Endpoint> = self
            .selectors
            .workloads_for(service)
            .filter_map(|name| snapshot.workload(name))
            .filter(|workload| index::selects(service, workload))
            .filter_map(|workload| self.endpoint(workload, &port.target, vip))
            .collect();
        found.shrink_to_fit();
        found.into()
    }

    fn endpoint(&self, workload: &Arc<Workload>, target: &TargetPort, vip: IpAddr) -> Option<Endpoint> {
        let port = target_port(workload, target)?;
        let address = workload.addresses.iter().map(IpAddr::to_canonical).find(|ip| ip.is_ipv4() == vip.is_ipv4())?;
        // Only meshed workloads claim addresses, and one that lost the claim is not reached under it.
        let owner = self.addresses.winner(&address).or_else(|| self.host_at(SocketAddr::new(address, port)));
        let owns_address = owner.is_some_and(|owner| owner.name == workload.name);
        let node = self.tables.snapshot.node(&workload.node)?;
        let usable = owns_address && workload.weight > 0 && !workload.is_terminating;
        usable.then(|| Endpoint {
            workload: Arc::clone(workload),
            address: SocketAddr::new(address, port),
            weight: workload.weight,
            locality: self.locality(node),
        })
    }

    fn locality(&self, node: &Node) -> Locality {
        let own_zone = || self.tables.snapshot.node(&self.node).and_then(|own| own.zone.as_ref());
        if node.name == self.node {
            Locality::SameNode
        } else if node.zone.is_some() && node.zone.as_ref() == own_zone() {
            Locality::SameZone
        } else {
            Locality::Elsewhere
        }
    }

    pub(super) fn refresh_frontend(&mut self, address: SocketAddr) {
        let key = FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, 0);
        let is_dns = self.is_dns(address);
        let view = self.frontends.winner(&address).filter(|_| !is_dns && !self.is_excluded(address.ip())).cloned();
        // Of the mesh's own DNS the daemon itself is the one backend.
        let host = if is_dns { Some(Frontend::new(0, 1, 0, 0, 0)) } else { self.host_frontend(address) };
        let host = host.filter(|_| !self.is_excluded(address.ip()));
        let published = Arc::make_mut(&mut self.tables.snapshot);
        match view {
            Some(view) => {
                let backends = u32::try_from(view.endpoints.len()).unwrap_or(u32::MAX);
                let (group, port) = common_group(&view.endpoints, &published.groups);
                let local = same_node::slots(&view);
                let (total, here, slots) = (local.total_weight, local.local_weight, local.count());
                let header = Frontend::new(view.index, backends, group, port.to_be(), 0, total, here, slots);
                self.tables.frontends.insert(key, header);
                self.write_backends(address, &local);
                let published = Arc::make_mut(&mut self.tables.snapshot);
                published.frontends.insert(address, view);
            }
            None => {
                published.frontends.remove(&address);
                self.write_backends(address, &Slots::default());
                match host {
                    Some(host) => self.tables.frontends.insert(key, host),
                    None => self.tables.frontends.remove(&key),
                };
            }
        }
    }

    /// Everything that hangs on who has an address: its capture, its guard, and the endpoints of the old and the new
    /// owner.
    pub(super) fn refresh_address(&mut self, address: IpAddr) {
        let new = self.addresses.winner(&address).cloned();
        let published = &mut Arc::make_mut(&mut self.tables.snapshot).addresses;
        let old = match &new {
            Some(workload) => published.insert(address, Arc::clone(workload)),
            None => published.remove(&address),
        };
        if old != new {
            if let Some(old) = old {
                for port in guarded_ports(&old, 0).keys() {
                    self.tables.app_ports.remove(&AppPortKey::new(address.into(), port.to_be()));
                }
                self.mark_services_of(&old);
            }
            if let Some(new) = new {
                self.mark_services_of(&new);
            }
        }
        self.refresh_guard(address);
    }

    /// What the kernel holds of the workload that has an address: its capture and its guard, with its policy group.
    pub(super) fn refresh_guard(&mut self, address: IpAddr) {
        let owner = self.addresses.winner(&address);
        let group = owner.map_or(0, |workload| self.tables.snapshot.group_number(&workload.name));
        let key = range_key(IpNet::from(address));
        if self.excluded_ranges().any(|range| range_key(*range) == key) {
            self.tables.cidrs.insert(key, CidrAction::PASS);
        } else if owner.is_some() && !self.is_excluded(address) {
            let is_carried = owner.is_some_and(|owner| self.is_carried(owner));
            let action = if is_carried { CidrAction::carry(group) } else { CidrAction::capture(group) };
            self.tables.cidrs.insert(key, action);
        } else {
            self.tables.cidrs.remove(&key);
        }
        if let Some(workload) = owner.filter(|workload| self.is_local(workload)) {
            for (port, mode) in guarded_ports(workload, group) {
                self.tables.app_ports.insert(AppPortKey::new(address.into(), port.to_be()), mode);
            }
        }
        self.refresh_datagram_ports(address);
        self.refresh_hosts_at(address);
    }

    /// What guards a port of the workload of this node that has an address to itself.
    pub(super) fn guard_at(&self, address: SocketAddr) -> Option<AppPort> {
        let owner = self.addresses.winner(&address.ip()).filter(|workload| self.is_local(workload))?;
        let group = self.tables.snapshot.group_number(&owner.name);
        guarded_ports(owner, group).remove(&address.port())
    }

    pub(super) fn refresh_local(&mut self, uid: &WorkloadUid) {
        let local = Arc::make_mut(&mut self.tables.local);
        let new = self.local.winner(uid).cloned();
        let old = match &new {
            Some(workload) => local.insert(uid.clone(), Arc::clone(workload)),
            None => local.remove(uid),
        };
        if let Some(workload) = new {
            self.acquire_identity(&workload.identity);
        }
        if let Some(workload) = old {
            self.release_identity(&workload.identity);
        }
    }

    fn excluded_ranges(&self) -> impl Iterator<Item = &IpNet> {
        self.tables.snapshot.mesh.iter().flat_map(|mesh| &mesh.exclude)
    }

    pub(super) fn is_excluded(&self, address: IpAddr) -> bool {
        self.excluded_ranges().any(|range| range.contains(&address))
    }
}

/// The addresses and ports that a service claims.
pub(super) fn frontend_addresses(service: &Service) -> Vec<SocketAddr> {
    let vips = service.vips.iter().map(IpAddr::to_canonical);
    vips.flat_map(|vip| tcp_ports(service).map(move |port| SocketAddr::new(vip, port.port))).collect()
}

/// The port of a workload that a service's port leads to, if it has it.
pub(super) fn target_port(workload: &Workload, target: &TargetPort) -> Option<u16> {
    let port = match target {
        TargetPort::Number(number) => *number,
        TargetPort::Name(name) => *workload.ports.get(name)?,
    };
    (port != 0).then_some(port)
}

/// The policy group and port that all endpoints share; without that, group 0: only the proxy knows which one it picks.
pub(super) fn common_group(endpoints: &[Endpoint], groups: &SharedMap<ObjectName, Arc<PolicyGroup>>) -> (u32, u16) {
    let of = |endpoint: &Endpoint| {
        (groups.get(&endpoint.workload.name).map_or(0, |group| group.number), endpoint.address.port())
    };
    let Some((first, others)) = endpoints.split_first() else { return (0, 0) };
    let (group, port) = of(first);
    if group != 0 && others.iter().all(|other| of(other) == (group, port)) { (group, port) } else { (0, 0) }
}

pub(super) fn tcp_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    service.ports.iter().filter(|port| port.protocol == Protocol::Tcp)
}

pub(super) fn udp_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    service.ports.iter().filter(|port| port.protocol == Protocol::Udp)
}

fn errno(error: DeniedError) -> u32 {
    let errno = match error {
        DeniedError::AccessDenied => capture::EACCES,
        DeniedError::ConnectionRefused => capture::ECONNREFUSED,
    };
    errno.unsigned_abs()
}

fn exclusions(mesh: Option<&Arc<Mesh>>) -> Vec<IpNet> {
    mesh.map(|mesh| mesh.exclude.clone()).unwrap_or_default()
}

fn range_key(range: IpNet) -> (u32, CidrKey) {
    let length = u32::from(range.prefix_len()) + if range.network().is_ipv4() { MAPPED_PREFIX } else { 0 };
    (length, CidrKey::new(Ip::from(range.network())))
}

/// A workload's mode under port 0, and its exceptions; each with its policy group.
fn guarded_ports(workload: &Workload, group: u32) -> BTreeMap<u16, AppPort> {
    let exceptions = workload.port_modes.iter().map(|(port, mode)| (*port, *mode));
    exceptions.chain([(0, workload.mode)]).map(|(port, mode)| (port, AppPort::new(mode as u32, group))).collect()
}
