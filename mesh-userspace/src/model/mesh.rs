//! Mesh-wide settings and nodes.

use super::{DefaultAction, DeniedError, Mode, NodeName, SameNode, TrustDomain};
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::Arc;

/// How streams travel between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TransportChoice {
    /// TLS lanes for TCP.
    #[default]
    Auto,
    Lanes,
    Quic,
}

/// The one `MeshConfig`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    pub trust_domain: TrustDomain,
    /// Mode of workloads that state none.
    pub mode: Mode,
    pub transport: TransportChoice,
    /// Destinations left alone even where the mesh would capture them.
    pub exclude: Vec<IpNet>,
    /// What happens to connections that no policy decides, where neither workload nor namespace say.
    pub default_action: DefaultAction,
    pub denied_error: DeniedError,
    /// How traffic within one node travels, for services that do not say.
    pub same_node: SameNode,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: NodeName,
    /// Where its daemon listens for other nodes; the first reachable family is used.
    pub addresses: Vec<IpAddr>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
}
