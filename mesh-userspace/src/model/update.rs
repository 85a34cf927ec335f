//! What a catalog source says: one snapshot, then deltas.

use super::{AuthorizationPolicy, Mesh, Node, NodeName, ObjectName, Service, TrafficPolicy, Workload};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Everything a source knows at one moment. `mesh` is `None` until a valid `MeshConfig` has been seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    pub mesh: Option<Arc<Mesh>>,
    pub nodes: BTreeMap<NodeName, Arc<Node>>,
    pub services: BTreeMap<ObjectName, Arc<Service>>,
    pub workloads: BTreeMap<ObjectName, Arc<Workload>>,
    pub policies: BTreeMap<ObjectName, Arc<AuthorizationPolicy>>,
    pub traffic: BTreeMap<ObjectName, Arc<TrafficPolicy>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Mesh(Arc<Mesh>),
    Node(Arc<Node>),
    Service(Arc<Service>),
    Workload(Arc<Workload>),
    Policy(Arc<AuthorizationPolicy>),
    Traffic(Arc<TrafficPolicy>),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKey {
    Mesh,
    Node(NodeName),
    Service(ObjectName),
    Workload(ObjectName),
    Policy(ObjectName),
    Traffic(ObjectName),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Replaces everything.
    Snapshot(Catalog),
    /// Added or changed.
    Upsert(Object),
    Remove(ObjectKey),
}
