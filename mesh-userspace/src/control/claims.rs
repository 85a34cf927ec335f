//! What only one object may have: addresses, ports, uids.

use super::Code;
use super::diagnostic::{Diagnostic, Position};
use super::document::{Document, Entry, Spec};
use super::key::Key;
use crate::model::{DNS_PORT, NodeName, Object, ObjectKey, Protocol, Service, Workload, WorkloadUid};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// What the objects accepted so far have.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Of workloads with a network namespace of their own.
    addresses: HashMap<IpAddr, Key>,
    /// Of host-network workloads: those of one node share them.
    host_addresses: HashMap<IpAddr, (NodeName, Key)>,
    host_ports: HashMap<(NodeName, u16), Key>,
    cgroups: HashMap<(NodeName, PathBuf), Key>,
    uids: HashMap<WorkloadUid, Key>,
    vips: HashMap<IpAddr, Key>,
    frontends: HashMap<(SocketAddr, Protocol), Key>,
    nodes: HashMap<IpAddr, Key>,
}

impl Claims {
    /// The first claim of this object that another has already.
    pub(super) fn check(&self, document: &Document, object: &Object, key: &Key) -> Option<Diagnostic> {
        let (code, at, what, owner) = match (object, &document.spec) {
            (Object::Workload(workload), Spec::Workload(entry)) => self.check_workload(workload, entry, key)?,
            (Object::Service(service), Spec::Service { vips_at, .. }) => self.check_service(service, vips_at, key)?,
            (Object::Node(node), Spec::Node { addresses_at, .. }) => {
                let (at, address, owner) = other(&self.nodes, &node.addresses, addresses_at, key)?;
                (Code::DuplicateNodeAddress, at, format!("the address {address}"), owner)
            }
            _ => return None,
        };
        let message = format!("{what} belongs to {owner}");
        Some(document.diagnostic(code, at, message, None))
    }

    fn check_workload(&self, workload: &Workload, entry: &Entry, key: &Key) -> Option<Collision<'_>> {
        if let Some((at, address, owner)) = other(&self.addresses, &workload.addresses, &entry.addresses_at, key) {
            return Some((Code::DuplicateAddress, at, format!("the address {address}"), owner));
        }
        if let Some((at, address, owner)) = self.host_address(workload, entry, key) {
            return Some((Code::DuplicateAddress, at, format!("the address {address}"), owner));
        }
        if let Some((at, address, owner)) = other(&self.vips, &workload.addresses, &entry.addresses_at, key) {
            return Some((Code::FrontendIsWorkload, at, format!("the address {address}"), owner));
        }
        if let Some(collision) = self.check_host(workload, entry, key) {
            return Some(collision);
        }
        let owner = self.uids.get(&workload.uid).filter(|owner| *owner != key)?;
        Some((Code::DuplicateUid, entry.uid_at, format!("the uid `{}`", workload.uid), owner))
    }

    /// An address that belongs to host-network workloads, unless this one is of their node.
    fn host_address(&self, workload: &Workload, entry: &Entry, key: &Key) -> Option<(Position, IpAddr, &Key)> {
        workload.addresses.iter().zip(&entry.addresses_at).find_map(|(address, at)| {
            let (node, owner) = self.host_addresses.get(address)?;
            let shares = workload.is_host_network() && *node == workload.node;
            (!shares && owner != key).then_some((*at, *address, owner))
        })
    }

    fn check_host(&self, workload: &Workload, entry: &Entry, key: &Key) -> Option<Collision<'_>> {
        let (cgroup, places) = (workload.cgroup.as_ref()?, entry.host_at.as_ref()?);
        let on_node = |address: &IpAddr| match self.nodes.get(address)? {
            owner @ Key::Object(ObjectKey::Node(node)) if *node != workload.node => Some(owner),
            _ => None,
        };
        let of_node = workload.addresses.iter().zip(&entry.addresses_at).find_map(|(a, at)| Some((a, at, on_node(a)?)));
        if let Some((address, at, owner)) = of_node {
            return Some((Code::DuplicateAddress, *at, format!("the address {address}"), owner));
        }
        let taken = places.ports.iter().find_map(|(port, at)| {
            let owner = self.host_ports.get(&(workload.node.clone(), *port)).filter(|owner| *owner != key)?;
            Some((*port, *at, owner))
        });
        if let Some((port, at, owner)) = taken {
            return Some((Code::DuplicateHostPort, at, format!("port {port} of node `{}`", workload.node), owner));
        }
        let owner = self.cgroups.get(&(workload.node.clone(), cgroup.clone())).filter(|owner| *owner != key)?;
        Some((Code::DuplicateCgroup, places.cgroup, format!("the cgroup {}", cgroup.display()), owner))
    }

    fn check_service(&self, service: &Service, vips_at: &[Position], key: &Key) -> Option<Collision<'_>> {
        let host = |vip: &IpAddr| self.host_addresses.get(vip).map(|(_, owner)| owner);
        let of_host = service.vips.iter().zip(vips_at).find_map(|(vip, at)| Some((*at, *vip, host(vip)?)));
        if let Some((at, vip, owner)) = other(&self.addresses, &service.vips, vips_at, key).or(of_host) {
            return Some((Code::FrontendIsWorkload, at, format!("the address {vip}"), owner));
        }
        frontends(service).zip(places(service, vips_at)).find_map(|(frontend, at)| {
            let owner = self.frontends.get(&frontend).filter(|owner| *owner != key)?;
            Some((Code::DuplicateFrontend, at, format!("the virtual address {}", frontend.0), owner))
        })
    }

    pub(super) fn add(&mut self, object: &Object, key: &Key) {
        match object {
            Object::Policy(_) | Object::Traffic(_) => {}
            Object::Mesh(mesh) => {
                for address in mesh.dns.iter().flat_map(|dns| &dns.addresses) {
                    self.vips.insert(*address, key.clone());
                    let at = SocketAddr::new(*address, DNS_PORT);
                    let protocols = [Protocol::Tcp, Protocol::Udp];
                    self.frontends.extend(protocols.map(|protocol| ((at, protocol), key.clone())));
                }
            }
            Object::Node(node) => self.nodes.extend(node.addresses.iter().map(|address| (*address, key.clone()))),
            Object::Service(service) => {
                self.vips.extend(service.vips.iter().map(|vip| (*vip, key.clone())));
                self.frontends.extend(frontends(service).map(|frontend| (frontend, key.clone())));
            }
            Object::Workload(workload) => {
                self.uids.insert(workload.uid.clone(), key.clone());
                self.add_workload(workload, key);
            }
        }
    }

    fn add_workload(&mut self, workload: &Workload, key: &Key) {
        let Some(cgroup) = &workload.cgroup else {
            self.addresses.extend(workload.addresses.iter().map(|address| (*address, key.clone())));
            return;
        };
        let node = &workload.node;
        for address in &workload.addresses {
            self.host_addresses.entry(*address).or_insert_with(|| (node.clone(), key.clone()));
        }
        self.host_ports.extend(workload.declared_ports().into_iter().map(|port| ((node.clone(), port), key.clone())));
        self.cgroups.insert((node.clone(), cgroup.clone()), key.clone());
    }
}

type Collision<'c> = (Code, Position, String, &'c Key);

/// The first of these addresses that someone else has.
fn other<'c>(
    claims: &'c HashMap<IpAddr, Key>,
    addresses: &[IpAddr],
    places: &[Position],
    key: &Key,
) -> Option<(Position, IpAddr, &'c Key)> {
    addresses.iter().zip(places).find_map(|(address, at)| {
        let owner = claims.get(address).filter(|owner| *owner != key)?;
        Some((*at, *address, owner))
    })
}

fn frontends(service: &Service) -> impl Iterator<Item = (SocketAddr, Protocol)> {
    let ports = &service.ports;
    service
        .vips
        .iter()
        .flat_map(move |vip| ports.iter().map(move |port| (SocketAddr::new(*vip, port.port), port.protocol)))
}

/// The place of each of [`frontends`]: that of its virtual address.
fn places(service: &Service, vips_at: &[Position]) -> impl Iterator<Item = Position> {
    let ports = service.ports.len();
    vips_at.iter().flat_map(move |at| std::iter::repeat_n(*at, ports))
}
