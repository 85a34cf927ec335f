//! UDP frontends: a service's UDP ports at its virtual addresses, and the ports that they lead to at the workloads' own
//! addresses; and what guards the latter on this node.
//!
//! Rules of what becomes what, beside those of [`Engine`]:
//! - A UDP frontend has endpoints as a TCP one has, and a number that no other has: a hash of its address, so that
//!   sockets that are connected through it still mean the same after a restart.
//! - A meshed workload with addresses of its own is called by its own address on the UDP ports that services lead to;
//!   a service at the same address and port goes before.
//! - On its own node such a port is guarded under the workload's mode and policy group; other UDP ports are not.

use super::compile::{common_group, target_port, udp_ports};
use super::index::Claims;
use super::number::Numbers;
use super::{Engine, FrontendView, SharedMap, Snapshot, index};
use crate::model::{ObjectName, Protocol, Service, Traffic, Workload};
use mesh_common::datagram::{FIRST_NUMBER, LAST_NUMBER};
use mesh_common::service::{AppPort, AppPortKey, DatagramFrontend};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What the engine keeps about them.
#[derive(Debug)]
pub(super) struct Datagrams {
    services: Claims<SocketAddr, Arc<FrontendView>>,
    /// Of workloads that have an address to themselves: the ports that services lead to.
    ports: BTreeMap<IpAddr, BTreeSet<u16>>,
    pub(super) numbers: Numbers<SocketAddr>,
}

impl Default for Datagrams {
    fn default() -> Self {
        let numbers = Numbers::new(FIRST_NUMBER, LAST_NUMBER);
        Self { services: Claims::default(), ports: BTreeMap::new(), numbers }
    }
}

/// The part of a [`Snapshot`] that is about them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DatagramViews {
    frontends: SharedMap<SocketAddr, Arc<FrontendView>>,
    /// Frontends and workloads' own ports, by number.
    targets: SharedMap<u32, SocketAddr>,
}

impl Snapshot {
    /// The service that owns this virtual address and port.
    #[must_use]
    pub fn frontend_of(&self, protocol: Protocol, address: SocketAddr) -> Option<&FrontendView> {
        match protocol {
            Protocol::Tcp => self.frontend(address),
            Protocol::Udp => self.datagram_frontend(address),
        }
    }

    /// Whether datagrams to this address and port are the mesh's: a service's, or on a port of a workload that a
    /// service leads to.
    #[must_use]
    pub fn takes_datagrams(&self, address: SocketAddr) -> bool {
        let key = SocketAddr::new(address.ip().to_canonical(), address.port());
        self.datagrams.targets.values().any(|target| *target == key)
    }

    /// The service that owns this virtual address and UDP port.
    #[must_use]
    pub fn datagram_frontend(&self, address: SocketAddr) -> Option<&FrontendView> {
        let key = SocketAddr::new(address.ip().to_canonical(), address.port());
        self.datagrams.frontends.get(&key).map(Arc::as_ref)
    }

    /// The address and UDP port that a number in an alias stands for.
    #[must_use]
    pub fn datagram_target(&self, number: u32) -> Option<SocketAddr> {
        self.datagrams.targets.get(&number).copied()
    }

    /// Every UDP frontend, in no useful order.
    #[must_use]
    pub fn datagram_frontends(&self) -> &SharedMap<SocketAddr, Arc<FrontendView>> {
        &self.datagrams.frontends
    }
}

impl Engine {
    /// Claims the UDP frontends of a service, before the one that it replaces releases its own.
    pub(super) fn claim_datagrams(&mut self, service: &Service) {
        for address in datagram_addresses(service) {
            self.datagrams.numbers.acquire(&address);
        }
    }

    /// Releases the UDP frontends of a service.
    pub(super) fn release_datagrams(&mut self, service: &Service) {
        for address in datagram_addresses(service) {
            self.datagrams.services.remove(&address, &service.name);
            self.refresh_datagram(address);
            self.datagrams.numbers.release(&address);
        }
    }

    /// Computes the endpoints of a service's UDP ports.
    pub(super) fn compile_datagrams(&mut self, name: &ObjectName, service: &Arc<Service>, traffic: &Arc<Traffic>) {
        let Some(index) = self.numbers.get(name) else { return };
        for port in udp_ports(service) {
            let mut by_family = BTreeMap::new();
            for vip in service.vips.iter().map(IpAddr::to_canonical) {
                let endpoints = by_family.entry(vip.is_ipv4()).or_insert_with(|| self.endpoints(service, port, vip));
                let view = FrontendView {
                    service: Arc::clone(service),
                    index,
                    port: port.clone(),
                    endpoints: Arc::clone(endpoints),
                    traffic: Arc::clone(traffic),
                };
                let address = SocketAddr::new(vip, port.port);
                self.datagrams.services.insert(address, name.clone(), Arc::new(view));
                self.refresh_datagram(address);
            }
        }
    }

    /// Refreshes everything that hangs on a service's UDP frontends.
    pub(super) fn refresh_datagrams_of(&mut self, service: &Service) {
        for address in datagram_addresses(service) {
            self.refresh_datagram(address);
        }
    }

    /// Refreshes the UDP ports of the workloads that a service selects: it has come, changed, or is about to go.
    pub(super) fn refresh_datagram_ports_behind(&mut self, service: &Service) {
        if udp_ports(service).next().is_none() {
            return;
        }
        let selected = self.selectors.workloads_for(service).filter_map(|name| self.tables.snapshot.workload(name));
        let selected = selected.filter(|workload| index::selects(service, workload));
        let addresses: BTreeSet<IpAddr> =
            selected.flat_map(|workload| workload.addresses.iter().map(IpAddr::to_canonical)).collect();
        for address in addresses {
            self.refresh_datagram_ports(address);
        }
    }

    /// Refreshes the UDP ports of the workload that has an address.
    pub(super) fn refresh_datagram_ports(&mut self, address: IpAddr) {
        let owner = self.addresses.winner(&address).cloned();
        let new = owner.as_deref().map(|owner| self.datagram_ports_of(owner)).unwrap_or_default();
        let old = if new.is_empty() {
            self.datagrams.ports.remove(&address)
        } else {
            self.datagrams.ports.insert(address, new.clone())
        }
        .unwrap_or_default();
        for port in new.difference(&old) {
            self.datagrams.numbers.acquire(&SocketAddr::new(address, *port));
        }
        for port in old.union(&new) {
            self.refresh_datagram(SocketAddr::new(address, *port));
            self.guard_datagrams(SocketAddr::new(address, *port), owner.as_deref().filter(|_| new.contains(port)));
        }
        for port in old.difference(&new) {
            self.datagrams.numbers.release(&SocketAddr::new(address, *port));
        }
    }

    /// Refreshes every UDP frontend: what is excluded has changed.
    pub(super) fn refresh_all_datagrams(&mut self) {
        let own = self.datagrams.ports.iter().flat_map(|(ip, ports)| ports.iter().map(|port| (*ip, *port).into()));
        let all: BTreeSet<SocketAddr> = self.datagrams.services.keys().copied().chain(own).collect();
        for address in all {
            self.refresh_datagram(address);
        }
    }

    fn datagram_ports_of(&self, workload: &Workload) -> BTreeSet<u16> {
        let services = self.services_of(workload).filter_map(|name| self.tables.snapshot.service(name));
        services.flat_map(|service| udp_ports(service).filter_map(|port| target_port(workload, &port.target))).collect()
    }

    fn guard_datagrams(&mut self, address: SocketAddr, owner: Option<&Workload>) {
        let key = AppPortKey::datagram(address.ip().into(), address.port().to_be());
        match owner.filter(|owner| self.is_local(owner)) {
            Some(owner) => {
                let group = self.tables.snapshot.group_number(&owner.name);
                let mode = owner.mode_of(address.port()) as u32;
                self.tables.app_ports.insert(key, AppPort::new(mode, group));
            }
            None => {
                self.tables.app_ports.remove(&key);
            }
        }
    }

    pub(super) fn refresh_datagram(&mut self, address: SocketAddr) {
        let is_dns = self.is_dns(address) && !self.is_excluded(address.ip());
        let is_captured = !is_dns && !self.is_excluded(address.ip());
        let view = self.datagrams.services.winner(&address).filter(|_| is_captured).cloned();
        let number = self.datagrams.numbers.get(&address);
        let own =
            self.datagrams.ports.get(&address.ip()).filter(|ports| is_captured && ports.contains(&address.port()));
        let owner = own.and_then(|_| self.addresses.winner(&address.ip()));
        let published = Arc::make_mut(&mut self.tables.snapshot);
        let entry = match (&view, owner, number) {
            (_, _, Some(number)) if is_dns => Some(DatagramFrontend::new(0, 1, 0, number, 0, 0)),
            (Some(view), _, Some(number)) => {
                let backends = u32::try_from(view.endpoints.len()).unwrap_or(u32::MAX);
                let (group, port) = common_group(&view.endpoints, &published.groups);
                Some(DatagramFrontend::new(view.index, backends, group, number, port.to_be(), 0))
            }
            (None, Some(owner), Some(number)) => {
                let group = published.group_number(&owner.name);
                Some(DatagramFrontend::new(0, 1, group, number, address.port().to_be(), 0))
            }
            (_, None, _) | (_, _, None) => None,
        };
        match view {
            Some(view) => published.datagrams.frontends.insert(address, view),
            None => published.datagrams.frontends.remove(&address),
        };
        let key = address.into();
        match (entry, number) {
            (Some(entry), _) => {
                published.datagrams.targets.insert(entry.number(), address);
                self.tables.datagrams.insert(key, entry);
            }
            (None, number) => {
                if let Some(number) = number {
                    published.datagrams.targets.remove(&number);
                }
                self.tables.datagrams.remove(&key);
            }
        }
    }
}

fn datagram_addresses(service: &Service) -> BTreeSet<SocketAddr> {
    let vips = service.vips.iter().map(IpAddr::to_canonical);
    vips.flat_map(|vip| udp_ports(service).map(move |port| SocketAddr::new(vip, port.port))).collect()
}
