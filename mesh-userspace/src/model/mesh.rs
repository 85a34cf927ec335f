//! Mesh-wide settings and nodes.

use super::{DefaultAction, DeniedError, Mode, NodeName, SameNode, TrustDomain};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
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
    /// The mesh's own DNS, if it has one.
    pub dns: Option<Arc<Dns>>,
}

impl Mesh {
    /// Whether queries that are sent to this address are for the mesh's own DNS.
    #[must_use]
    pub fn answers_dns_at(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        address.port() == DNS_PORT && self.dns.iter().any(|dns| dns.addresses.contains(&ip))
    }
}

/// Where the mesh's own DNS is asked.
pub const DNS_PORT: u16 = 53;

/// The mesh's own DNS: names of services for workloads whose resolver it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Services are `<name>.<namespace>.svc.<domain>`.
    pub domain: Arc<str>,
    /// Virtual addresses at which workloads ask, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Who is asked about every other name, in this order.
    pub upstream: Vec<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: NodeName,
    /// Where its daemon listens for other nodes; the first reachable family is used.
    pub addresses: Vec<IpAddr>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
}
