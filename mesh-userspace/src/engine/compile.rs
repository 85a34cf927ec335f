//! Single entries of the tables, each from what it depends on.

use super::{Endpoint, Engine, FrontendView, index};
use crate::model::{Mesh, ObjectName, Protocol, Service, ServicePort, TargetPort, Workload, WorkloadUid};
use ipnet::IpNet;
use mesh_common::Ip;
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
        let (old, new) = (exclusions(old.as_ref()), exclusions(new));
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
    }

    /// Computes a service's endpoints and claims its frontends.
    pub(super) fn compile_service(&mut self, name: &ObjectName) {
        let Some(service) = self.tables.snapshot.service(name).cloned() else { return };
        let number = self.numbers.assign(name);
        for port in tcp_ports(&service) {
            let mut by_family = BTreeMap::new();
            for vip in service.vips.iter().map(IpAddr::to_canonical) {
                let endpoints = by_family.entry(vip.is_ipv4()).or_insert_with(|| self.endpoints(&service, port, vip));
                let view = FrontendView {
                    service: Arc::clone(&service),
                    index: number,
                    port: port.clone(),
                    endpoints: Arc::clone(endpoints),
                };
                let address = SocketAddr::new(vip, port.port);
                self.frontends.insert(address, name.clone(), Arc::new(view));
                self.refresh_frontend(address);
            }
        }
    }

    fn endpoints(&self, service: &Service, port: &ServicePort, vip: IpAddr) -> Arc<[Endpoint]> {
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
        let port = match target {
            TargetPort::Number(number) => *number,
            TargetPort::Name(name) => *workload.ports.get(name)?,
        };
        let address = workload.addresses.iter().map(IpAddr::to_canonical).find(|ip| ip.is_ipv4() == vip.is_ipv4())?;
        // Only meshed workloads claim addresses, and one that lost the claim is not reached under it.
        let owner = self.addresses.winner(&address).or_else(|| self.host_at(SocketAddr::new(address, port)));
        let owns_address = owner.is_some_and(|owner| owner.name == workload.name);
        let usable =
            owns_address && workload.weight > 0 && port != 0 && self.tables.snapshot.nodes.contains_key(&workload.node);
        usable.then(|| Endpoint {
            workload: Arc::clone(workload),
            address: SocketAddr::new(address, port),
            weight: workload.weight,
        })
    }

    pub(super) fn refresh_frontend(&mut self, address: SocketAddr) {
        let key = FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, 0);
        let view = self.frontends.winner(&address).filter(|_| !self.is_excluded(address.ip())).cloned();
        let host = self.host_frontend(address).filter(|_| !self.is_excluded(address.ip()));
        let published = &mut Arc::make_mut(&mut self.tables.snapshot).frontends;
        match view {
            Some(view) => {
                let backends = u32::try_from(view.endpoints.len()).unwrap_or(u32::MAX);
                self.tables.frontends.insert(key, Frontend::new(view.index, backends, 0, 0, 0));
                published.insert(address, view);
            }
            None => {
                published.remove(&address);
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
        let key = range_key(IpNet::from(address));
        if self.excluded_ranges().any(|range| range_key(*range) == key) {
            self.tables.cidrs.insert(key, CidrAction::PASS);
        } else if new.is_some() && !self.is_excluded(address) {
            self.tables.cidrs.insert(key, CidrAction::CAPTURE);
        } else {
            self.tables.cidrs.remove(&key);
        }
        if old == new {
            return;
        }
        if let Some(old) = old {
            for port in guarded_ports(&old).keys() {
                self.tables.app_ports.remove(&AppPortKey::new(address.into(), port.to_be()));
            }
            self.mark_services_of(&old);
        }
        if let Some(new) = new {
            if self.is_local(&new) {
                for (port, mode) in guarded_ports(&new) {
                    self.tables.app_ports.insert(AppPortKey::new(address.into(), port.to_be()), mode);
                }
            }
            self.mark_services_of(&new);
        }
        self.refresh_hosts_at(address);
    }

    /// What guards a port of the workload of this node that has an address to itself.
    pub(super) fn guard_at(&self, address: SocketAddr) -> Option<AppPort> {
        let owner = self.addresses.winner(&address.ip()).filter(|workload| self.is_local(workload))?;
        guarded_ports(owner).remove(&address.port())
    }

    pub(super) fn refresh_local(&mut self, uid: &WorkloadUid) {
        let local = Arc::make_mut(&mut self.tables.local);
        match self.local.winner(uid) {
            Some(workload) => local.insert(uid.clone(), Arc::clone(workload)),
            None => local.remove(uid),
        };
    }

    fn excluded_ranges(&self) -> impl Iterator<Item = &IpNet> {
        self.tables.snapshot.mesh.iter().flat_map(|mesh| &mesh.exclude)
    }

    fn is_excluded(&self, address: IpAddr) -> bool {
        self.excluded_ranges().any(|range| range.contains(&address))
    }
}

/// The addresses and ports that a service claims.
pub(super) fn frontend_addresses(service: &Service) -> Vec<SocketAddr> {
    let vips = service.vips.iter().map(IpAddr::to_canonical);
    vips.flat_map(|vip| tcp_ports(service).map(move |port| SocketAddr::new(vip, port.port))).collect()
}

fn tcp_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    service.ports.iter().filter(|port| port.protocol == Protocol::Tcp)
}

fn exclusions(mesh: Option<&Arc<Mesh>>) -> Vec<IpNet> {
    mesh.map(|mesh| mesh.exclude.clone()).unwrap_or_default()
}

fn range_key(range: IpNet) -> (u32, CidrKey) {
    let length = u32::from(range.prefix_len()) + if range.network().is_ipv4() { MAPPED_PREFIX } else { 0 };
    (length, CidrKey::new(Ip::from(range.network())))
}

/// A workload's mode under port 0, and its exceptions.
fn guarded_ports(workload: &Workload) -> BTreeMap<u16, AppPort> {
    let mut ports: BTreeMap<u16, AppPort> =
        workload.port_modes.iter().map(|(port, mode)| (*port, AppPort::new(*mode as u32, 0))).collect();
    ports.insert(0, AppPort::new(workload.mode as u32, 0));
    ports
}
