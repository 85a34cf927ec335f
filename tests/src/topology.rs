//! Descriptions of worlds.

use crate::world::World;
use anyhow::Result;

/// What a world is to hold; nothing exists before [`Topology::build`].
#[derive(Clone, Debug)]
pub struct Topology {
    pub(crate) name: String,
    pub(crate) nodes: Vec<Plan>,
    /// Congestion control in all its namespaces; the machine's if it is `None`.
    pub(crate) congestion: Option<String>,
    /// Bytes of a packet on all its links.
    pub(crate) mtu: u16,
}

/// What a node is to hold.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) pods: Vec<String>,
    pub(crate) hosts: Vec<String>,
}

impl Topology {
    /// Adds a node; the pods that follow run on it.
    #[must_use]
    pub fn node(mut self, name: &str) -> Self {
        self.nodes.push(Plan { name: name.to_owned(), pods: Vec::new(), hosts: Vec::new() });
        self
    }

    /// Adds a pod to the node named last.
    ///
    /// # Panics
    /// If there is no node yet.
    #[must_use]
    pub fn pod(mut self, name: &str) -> Self {
        let node = self.nodes.last_mut().expect("a pod needs a node: call .node(..) first");
        node.pods.push(name.to_owned());
        self
    }

    /// Adds a place for processes in the network namespace of the node named last, as of a systemd unit there.
    ///
    /// # Panics
    /// If there is no node yet.
    #[must_use]
    pub fn host(mut self, name: &str) -> Self {
        let node = self.nodes.last_mut().expect("a unit needs a node: call .node(..) first");
        node.hosts.push(name.to_owned());
        self
    }

    /// Adds several pods to the node named last.
    #[must_use]
    pub fn pods(self, names: &[&str]) -> Self {
        names.iter().fold(self, |topology, name| topology.pod(name))
    }

    /// Names the TCP congestion control of all nodes and pods, in place of the machine's.
    #[must_use]
    pub fn congestion(mut self, name: &str) -> Self {
        self.congestion = Some(name.to_owned());
        self
    }

    /// Names the bytes of a packet on all links, in place of 1,500.
    #[must_use]
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.mtu = bytes;
        self
    }

    /// Makes it all.
    ///
    /// # Errors
    /// Without root, without `ip`, if a name does not fit a link, or the machine does not have the congestion control.
    pub fn build(self) -> Result<World> {
        World::build(&self)
    }
}
