//! What the kernel carries between workloads of this node: each frontend's endpoints here, as slots to draw from.
//!
//! Rules of what becomes what, beside those of [`Engine`]:
//! - A frontend has slots if its service's traffic is for the kernel ([`Traffic::is_for_the_kernel`]), for those of its
//!   endpoints that are in pods of this node; an endpoint in the node's own namespace has no guard that could tell whom
//!   the kernel has admitted.
//! - The kernel draws between the endpoints that the service prefers: all of them, those of this node's zone, or those
//!   of this node. Where the draw falls on one that has no slot, the daemon picks.
//! - A workload's own address is carried if the mesh's word on traffic within a node allows it.
//!
//! [`Traffic::is_for_the_kernel`]: crate::model::Traffic::is_for_the_kernel

use super::{Endpoint, Engine, FrontendView, Locality};
use crate::model::{Mesh, Prefer, SameNode, Workload};
use mesh_common::service::{Backend, Frontend, FrontendKey, PROTO_TCP};
use std::net::SocketAddr;
use std::sync::Arc;

/// What the kernel draws from.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Slots {
    pub(super) total_weight: u32,
    pub(super) local_weight: u32,
    backends: Vec<Backend>,
}

impl Slots {
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.backends.len()).unwrap_or(u32::MAX)
    }
}

/// The slots of a frontend; none if the daemon picks.
pub(super) fn slots(view: &FrontendView) -> Slots {
    let local: Vec<&Endpoint> = view.endpoints.iter().filter(|endpoint| has_slot(endpoint)).collect();
    if !view.traffic.is_for_the_kernel() || local.is_empty() || local.len() > Frontend::MAX_SLOTS as usize {
        return Slots::default();
    }
    let is_drawn = |endpoint: &&Endpoint| match view.traffic.prefer {
        Prefer::Nobody => true,
        Prefer::SameZone => endpoint.locality <= Locality::SameZone,
        Prefer::SameNode => endpoint.locality == Locality::SameNode,
    };
    let total: u64 = view.endpoints.iter().filter(is_drawn).map(|endpoint| u64::from(endpoint.weight)).sum();
    // The kernel's sums have 32 bits; no weight becomes 0.
    let excess = (u64::BITS - total.leading_zeros()).saturating_sub(u32::BITS - 1);
    let scaled = |endpoint: &Endpoint| (endpoint.weight >> excess).max(1);
    let total_weight = view.endpoints.iter().filter(is_drawn).map(scaled).fold(0, u32::saturating_add);
    let mut sum = 0_u32;
    let backends = local.into_iter().map(|endpoint| {
        sum = sum.saturating_add(scaled(endpoint));
        Backend::new(endpoint.address.ip().into(), endpoint.address.port().to_be(), 0, sum)
    });
    let backends = backends.collect();
    Slots { total_weight, local_weight: sum, backends }
}

fn has_slot(endpoint: &Endpoint) -> bool {
    endpoint.locality == Locality::SameNode && is_in_pod(&endpoint.workload)
}

fn is_in_pod(workload: &Workload) -> bool {
    workload.netns.is_some() && !workload.is_host_network()
}

pub(super) fn of_mesh(mesh: Option<&Arc<Mesh>>) -> SameNode {
    mesh.map(|mesh| mesh.same_node).unwrap_or_default()
}

impl Engine {
    /// Whether the kernel carries what goes to a workload's own address.
    pub(super) fn is_carried(&self, workload: &Workload) -> bool {
        let is_allowed = of_mesh(self.tables.snapshot.mesh.as_ref()) == SameNode::Kernel;
        is_allowed && self.is_local(workload) && is_in_pod(workload)
    }

    /// Makes a frontend's slots these.
    pub(super) fn write_backends(&mut self, address: SocketAddr, slots: &Slots) {
        let key = |slot| FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, slot);
        for (backend, slot) in slots.backends.iter().zip(1..) {
            self.tables.backends.insert(key(slot), *backend);
        }
        let mut slot = slots.count() + 1;
        while self.tables.backends.remove(&key(slot)).is_some() {
            slot += 1;
        }
    }
}

#[cfg(test)]
mod tests;
