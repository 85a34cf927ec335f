//! What the proxy reads: one consistent, immutable picture of the mesh.

use super::datagram::DatagramViews;
use super::host::HostViews;
use super::{PolicyGroup, SharedMap};
use crate::model::{
    AuthorizationPolicy, Mesh, Node, NodeName, ObjectName, Service, ServicePort, SpiffeId, Traffic, TrafficPolicy,
    Workload,
};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Where a frontend's connections can go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    /// The workload's address of the frontend's family and the port the service targets.
    pub address: SocketAddr,
    /// Share of new connections relative to the other endpoints; never 0.
    pub weight: u32,
    pub locality: Locality,
}

impl Endpoint {
    /// A workload that is called by its own address: there is nothing to pick.
    #[must_use]
    pub fn direct(workload: &Arc<Workload>, address: SocketAddr) -> Self {
        Self { workload: Arc::clone(workload), address, weight: workload.weight, locality: Locality::Elsewhere }
    }
}

/// How far an endpoint is from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Locality {
    SameNode,
    /// Another node whose zone is this node's.
    SameZone,
    Elsewhere,
}

/// A service's virtual address and port, and what stands behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendView {
    pub service: Arc<Service>,
    /// The service's number in kernel maps and records; see [`super::Engine`].
    pub index: u32,
    pub port: ServicePort,
    /// Usable endpoints in the order of their names; may be empty.
    pub endpoints: Arc<[Endpoint]>,
    /// How connections are spread over them, and what is done when they fail.
    pub traffic: Arc<Traffic>,
}

/// A picture of the mesh as the engine last compiled it. Cloning is cheap and shares the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub mesh: Option<Arc<Mesh>>,
    pub(super) nodes: SharedMap<NodeName, Arc<Node>>,
    pub(super) services: SharedMap<ObjectName, Arc<Service>>,
    pub(super) workloads: SharedMap<ObjectName, Arc<Workload>>,
    pub(super) frontends: SharedMap<SocketAddr, Arc<FrontendView>>,
    pub(super) addresses: SharedMap<IpAddr, Arc<Workload>>,
    pub(super) hosts: HostViews,
    pub(super) datagrams: DatagramViews,
    /// Of workloads that are in another group than the default one.
    pub(super) groups: SharedMap<ObjectName, Arc<PolicyGroup>>,
    /// By number, for what the kernel reports.
    pub(super) groups_by_number: SharedMap<u32, Arc<PolicyGroup>>,
    pub(super) policies: SharedMap<ObjectName, Arc<AuthorizationPolicy>>,
    pub(super) traffic: SharedMap<ObjectName, Arc<TrafficPolicy>>,
    /// Of workloads of this node: their numbers as sources in the kernel's tables.
    pub(super) identities: SharedMap<SpiffeId, u32>,
    pub(super) identities_by_number: SharedMap<u32, SpiffeId>,
}

impl Snapshot {
    /// The service that owns this virtual address and TCP port.
    #[must_use]
    pub fn frontend(&self, address: SocketAddr) -> Option<&FrontendView> {
        let key = SocketAddr::new(address.ip().to_canonical(), address.port());
        self.frontends.get(&key).map(Arc::as_ref)
    }

    /// The meshed workload that has this address to itself.
    #[must_use]
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.addresses.get(&address.to_canonical())
    }

    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    #[must_use]
    pub fn workload(&self, name: &ObjectName) -> Option<&Arc<Workload>> {
        self.workloads.get(name)
    }

    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// The policies of a workload.
    #[must_use]
    pub fn policies_of(&self, workload: &ObjectName) -> Arc<PolicyGroup> {
        self.groups.get(workload).cloned().unwrap_or_default()
    }

    /// The policy group of a number that the kernel reports; `None` once no workload is in it.
    #[must_use]
    pub fn policy_group(&self, number: u32) -> Option<&Arc<PolicyGroup>> {
        self.groups_by_number.get(&number)
    }

    /// The number of a workload's policy group, 0 if nothing is denied.
    pub(super) fn group_number(&self, workload: &ObjectName) -> u32 {
        self.groups.get(workload).map_or(0, |group| group.number)
    }

    #[must_use]
    pub fn policy(&self, name: &ObjectName) -> Option<&Arc<AuthorizationPolicy>> {
        self.policies.get(name)
    }

    /// Every policy, in no useful order.
    #[must_use]
    pub fn policies(&self) -> &SharedMap<ObjectName, Arc<AuthorizationPolicy>> {
        &self.policies
    }

    /// Every traffic policy, in no useful order.
    #[must_use]
    pub fn traffic_policies(&self) -> &SharedMap<ObjectName, Arc<TrafficPolicy>> {
        &self.traffic
    }

    /// The number under which the kernel knows the identity of a workload of this node; 0 of others.
    #[must_use]
    pub fn identity_number(&self, identity: &SpiffeId) -> u32 {
        self.identities.get(identity).copied().unwrap_or(0)
    }

    /// The identity that the kernel reports under a number; `None` once no workload of this node has it.
    #[must_use]
    pub fn identity(&self, number: u32) -> Option<&SpiffeId> {
        self.identities_by_number.get(&number)
    }

    /// The identities of this node's workloads, by their numbers in the kernel's tables.
    #[must_use]
    pub fn identities(&self) -> &SharedMap<SpiffeId, u32> {
        &self.identities
    }

    /// Every node, meshed or not, in no useful order.
    #[must_use]
    pub fn nodes(&self) -> &SharedMap<NodeName, Arc<Node>> {
        &self.nodes
    }

    /// Every service, in no useful order.
    #[must_use]
    pub fn services(&self) -> &SharedMap<ObjectName, Arc<Service>> {
        &self.services
    }

    /// Every workload, also those that are not in the mesh, in no useful order.
    #[must_use]
    pub fn workloads(&self) -> &SharedMap<ObjectName, Arc<Workload>> {
        &self.workloads
    }

    /// Every frontend, in no useful order.
    #[must_use]
    pub fn frontends(&self) -> &SharedMap<SocketAddr, Arc<FrontendView>> {
        &self.frontends
    }

    /// Whether every connection between workloads has the same verdict here and there, as far as can be told without
    /// looking at connections: workloads, their addresses and their policies are the same.
    #[must_use]
    pub fn judges_like(&self, other: &Self) -> bool {
        self.workloads == other.workloads && self.addresses == other.addresses && self.groups == other.groups
    }
}
