//! A ready mesh: world, authority, catalog, one running daemon a node.

use crate::authority::Authority;
use crate::catalog::{Catalog, NAMESPACE};
use crate::daemon::Daemon;
use crate::program::{Output, Program, binary};
use crate::report::Call;
use crate::topology::Topology;
use crate::wait;
use crate::world::World;
use anyhow::{Result, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// The trust domain of test meshes.
pub const TRUST_DOMAIN: &str = "mesh.test";

/// A world with a mesh on it.
#[derive(Debug)]
pub struct Cluster {
    // Daemons end before the world goes.
    pub(crate) daemons: BTreeMap<String, Daemon>,
    /// The authority that nodes have joined, if this mesh has one; see [`Cluster::joined`].
    pub(crate) ca: Option<Daemon>,
    pub catalog: Catalog,
    pub authority: Authority,
    pub world: World,
}

impl Cluster {
    /// Two nodes: `client` on n1, `server` on n2, and service `server` on port 80, which leads to port 8080.
    ///
    /// # Errors
    /// If the world cannot be built or a daemon does not become ready.
    pub fn pair(name: &str) -> Result<Self> {
        let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
        Self::start(topology, |catalog| {
            catalog.service("server", 80, 8080);
        })
    }

    /// Builds a world, writes its catalog, issues every identity in it, starts a daemon on every node.
    ///
    /// # Errors
    /// If the world cannot be built or a daemon does not become ready.
    pub fn start(topology: Topology, describe: impl FnOnce(&mut Catalog)) -> Result<Self> {
        Self::start_with(topology, describe, |_| {})
    }

    /// [`Self::start`] with a chance to change the daemons' configuration.
    ///
    /// # Errors
    /// If the world cannot be built or a daemon does not become ready.
    pub fn start_with(
        topology: Topology,
        describe: impl FnOnce(&mut Catalog),
        mut configure: impl FnMut(&mut Value),
    ) -> Result<Self> {
        let world = topology.build()?;
        let folder = world.folder();
        let authority = Authority::create(&folder.join("ca"), TRUST_DOMAIN)?;
        let mut catalog = Catalog::of(&world, folder.join("catalog"), TRUST_DOMAIN)?;
        describe(&mut catalog);
        catalog.write()?;
        let mut cluster = Self { daemons: BTreeMap::new(), ca: None, catalog, authority, world };
        cluster.issue_identities()?;
        for node in cluster.world.nodes() {
            let identities = cluster.identities(node.name());
            let daemon = Daemon::with(node, cluster.catalog.folder(), &identities, &mut configure)?;
            cluster.daemons.insert(node.name().to_owned(), daemon);
        }
        cluster.start_daemons()?;
        Ok(cluster)
    }

    pub(crate) fn start_daemons(&mut self) -> Result<()> {
        for daemon in self.daemons.values_mut() {
            daemon.spawn()?;
        }
        self.daemons.values_mut().try_for_each(Daemon::wait_until_ready)
    }

    /// Issues a certificate to every service account in the catalog, on the nodes that its workloads run on.
    ///
    /// # Errors
    /// If the authority refuses.
    pub fn issue_identities(&self) -> Result<()> {
        let accounts: BTreeSet<_> =
            self.catalog.workloads().map(|workload| (workload.node(), &workload.account)).collect();
        accounts
            .into_iter()
            .try_for_each(|(node, account)| self.authority.issue(NAMESPACE, account, &self.identities(node)))
    }

    /// Where the daemon of a node reads certificates: those of its own workloads, no others.
    #[must_use]
    pub fn identities(&self, node: &str) -> PathBuf {
        self.world.node(node).folder().join("identity")
    }

    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn daemon(&self, node: &str) -> &Daemon {
        self.daemons.get(node).unwrap_or_else(|| panic!("there is no node {node:?}"))
    }

    /// # Panics
    /// If there is no such node.
    pub fn daemon_mut(&mut self, node: &str) -> &mut Daemon {
        self.daemons.get_mut(node).unwrap_or_else(|| panic!("there is no node {node:?}"))
    }

    /// All daemons, by node.
    pub fn daemons(&self) -> impl Iterator<Item = &Daemon> {
        self.daemons.values()
    }

    /// Runs `nodemesh` against a node's daemon.
    ///
    /// # Errors
    /// If it cannot be started or does not end.
    pub fn nodemesh(&self, node: &str, arguments: &[&str]) -> Result<Output> {
        let daemon = self.daemon(node);
        Program::new(binary("nodemesh"))
            .args(["--socket".as_ref(), daemon.socket()])
            .args(arguments)
            .run_in(daemon.place())
    }

    /// Runs `mesh-probe` with these arguments in a pod (or as a host process) and reads its report, also that of a failure.
    ///
    /// # Errors
    /// If it cannot be started or prints no report.
    pub fn attempt(&self, pod: &str, arguments: &[&str]) -> Result<Call> {
        Program::probe(arguments).run_in(self.world.place(pod))?.json()
    }

    /// Waits until a pod of the mesh gets an answer of a service over both families: its catalog has arrived on both
    /// sides. The service must be served by `mesh-probe`.
    ///
    /// # Errors
    /// If it does not within the bound.
    pub fn wait_until_served(&self, pod: &str, service: &str) -> Result<()> {
        for vip in self.catalog.vips(service) {
            wait::until_ok(&format!("{pod} reaches {service} at {vip}"), wait::BOUND, || {
                let call = self.attempt(pod, &["call", "blocking", &vip.to_string()])?;
                // A server that speaks first says more than the echo: also an answer.
                if call.bytes_received > 0 { Ok(()) } else { bail!("{call:?}") }
            })?;
        }
        Ok(())
    }
}
