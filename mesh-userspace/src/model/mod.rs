//! The mesh's domain values: parsed once at the border, valid ever after. No IO, no clock, no randomness.

mod mesh;
mod name;
mod node_id;
mod policy;
mod service;
mod spiffe;
mod traffic;
mod update;
mod workload;

pub use mesh::{DNS_PORT, Dns, Mesh, Node, TransportChoice};
pub use name::{InvalidName, NodeName, ObjectName};
pub use node_id::NodeId;
pub use policy::{
    AuthorizationPolicy, DefaultAction, DeniedError, InvalidSpiffePattern, PolicyAction, PolicyTarget, Rule, Source,
    SpiffePattern,
};
pub use service::{Protocol, Service, ServicePort, TargetPort};
pub use spiffe::{InvalidSpiffeId, SpiffeId, TrustDomain};
pub use traffic::{
    Affinity, Algorithm, Ejection, HealthCheck, Limits, Prefer, Probe, Retry, SameNode, Traffic, TrafficPolicy,
    TrafficSpec,
};
pub use update::{Catalog, Object, ObjectKey, Update};
pub use workload::{Workload, WorkloadUid};

pub use mesh_common::policy::Mode;
