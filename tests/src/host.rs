//! Places for processes in a node's own network namespace, as of systemd units.

use crate::program::Place;
use std::net::IpAddr;
use std::path::Path;

/// A place in the node's own network namespace: a control group of its own, the node's addresses.
#[derive(Debug)]
pub struct Host {
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) place: Place,
    pub(crate) addresses: [IpAddr; 2],
}

impl Host {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the node that it runs on.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The node's addresses, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.addresses
    }

    /// Where its processes run.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.place.cgroup
    }
}

impl From<&Host> for Place {
    fn from(host: &Host) -> Self {
        host.place.clone()
    }
}
