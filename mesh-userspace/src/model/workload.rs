//! Workloads: what runs, where, under which identity.

use super::{DefaultAction, Mode, NodeName, ObjectName, SpiffeId};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// Identifies one incarnation of a workload: a workload deleted and made anew under the same name has another uid.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadUid(Arc<str>);

impl WorkloadUid {
    #[must_use]
    pub fn new(uid: &str) -> Self {
        Self(uid.into())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub uid: WorkloadUid,
    pub name: ObjectName,
    /// The owner's name in metrics (`source_workload`): the `app.kubernetes.io/name` or `app` label, else the name.
    pub owner: Arc<str>,
    pub labels: BTreeMap<String, String>,
    pub identity: SpiffeId,
    pub node: NodeName,
    /// At most one IPv4 and one IPv6 address, at least one of them.
    pub addresses: Vec<IpAddr>,
    /// The network namespace, as a path under which it can be opened; only needed on the workload's own node.
    pub netns: Option<PathBuf>,
    /// The cgroup of a workload that runs in its node's own network namespace; such a workload has its node's address,
    /// perhaps shared with others, and is in the mesh on the ports that it declares (`ports`, `port_modes`).
    pub cgroup: Option<PathBuf>,
    pub mode: Mode,
    /// Overrides of `mode` per application port.
    pub port_modes: BTreeMap<u16, Mode>,
    /// Named ports, for services that target a port by name.
    pub ports: BTreeMap<String, u16>,
    /// Share of new connections relative to the service's other endpoints; 0 takes none.
    pub weight: u32,
    /// About to stop: it keeps the connections that it has and is given no new ones.
    pub is_terminating: bool,
    /// What happens to connections that no policy decides.
    pub default_action: DefaultAction,
}

impl Workload {
    /// The workload's address of the same family as `like`.
    #[must_use]
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == like.is_ipv4())
    }

    /// Whether it runs in its node's own network namespace.
    #[must_use]
    pub fn is_host_network(&self) -> bool {
        self.cgroup.is_some()
    }

    /// The ports that it declares, in ascending order.
    #[must_use]
    pub fn declared_ports(&self) -> BTreeSet<u16> {
        self.ports.values().chain(self.port_modes.keys()).copied().collect()
    }

    /// Its mode on a port.
    #[must_use]
    pub fn mode_of(&self, port: u16) -> Mode {
        self.port_modes.get(&port).copied().unwrap_or(self.mode)
    }

    /// Whether the mesh carries this workload's traffic.
    #[must_use]
    pub fn is_meshed(&self) -> bool {
        self.mode != Mode::Disabled
    }
}
