//! Services: stable frontends in front of changing workloads.

use super::{Affinity, ObjectName, Prefer};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// As people write it after a port: `tcp` or `udp`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Where a service's port leads in its workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty when the service has one port and gives it no name.
    pub name: Arc<str>,
    pub port: u16,
    pub protocol: Protocol,
    pub target: TargetPort,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: ObjectName,
    /// Virtual addresses (`clusterIPs`).
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Workloads of the same namespace whose labels contain all of these are the endpoints; empty selects none.
    pub selector: BTreeMap<String, String>,
    /// `trafficDistribution`.
    pub prefer: Prefer,
    /// `sessionAffinity`.
    pub affinity: Affinity,
}
