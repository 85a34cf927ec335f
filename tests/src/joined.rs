//! A mesh that starts from nothing: a certificate authority, nodes that join it by token, identities that renew
//! themselves.

use crate::authority::Authority;
use crate::catalog::Catalog;
use crate::cluster::{Cluster, TRUST_DOMAIN};
use crate::daemon::{AUTHORITY_PORT, Daemon};
use crate::program::{Output, Program, binary};
use crate::topology::Topology;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::Path;

impl Cluster {
    /// Builds a world and its catalog, starts an authority on the first node, has every node join it, and starts a
    /// daemon on each. `certificates` is that section
    /// of the authority's configuration (`ttl`, `nodeTtl`).
    ///
    /// # Errors
    /// If the world cannot be built, a node cannot join, or a daemon does not become ready.
    pub fn joined(topology: Topology, certificates: &Value, describe: impl FnOnce(&mut Catalog)) -> Result<Self> {
        Self::joined_with(topology, certificates, describe, |_| {})
    }

    /// [`Self::joined`] with a chance to change the daemons' configuration.
    ///
    /// # Errors
    /// If the world cannot be built, a node cannot join, or a daemon does not become ready.
    pub fn joined_with(
        topology: Topology,
        certificates: &Value,
        describe: impl FnOnce(&mut Catalog),
        mut configure: impl FnMut(&mut Value),
    ) -> Result<Self> {
        let world = topology.build()?;
        let folder = world.folder();
        let authority = Authority::create(&folder.join("ca"), TRUST_DOMAIN)?;
        let mut catalog = Catalog::of(&world, folder.join("catalog"), TRUST_DOMAIN)?;
        describe(&mut catalog);
        catalog.write()?;
        let home = world.nodes().next().context("a mesh has a node")?;
        let mut ca = Daemon::authority(home, catalog.folder(), &folder.join("ca"), |document| {
            document["certificates"] = certificates.clone();
        })?;
        ca.start()?;
        let address = SocketAddr::from((home.v4(), AUTHORITY_PORT));
        let mut cluster = Self { daemons: BTreeMap::new(), ca: Some(ca), catalog, authority, world };
        for node in cluster.world.nodes() {
            let token = cluster.token(&["--node", node.name()])?;
            let identities = cluster.identities(node.name());
            join(&cluster, node.name(), &token, &identities)?.success()?;
            let daemon = Daemon::with(node, cluster.catalog.folder(), &identities, |document| {
                document["identity"]["ca"] = json!({"address": [address]});
                configure(document);
            })?;
            cluster.daemons.insert(node.name().to_owned(), daemon);
        }
        cluster.start_daemons()?;
        Ok(cluster)
    }

    /// The authority.
    ///
    /// # Panics
    /// If the mesh was not made by [`Self::joined`].
    #[must_use]
    pub fn ca(&self) -> &Daemon {
        self.ca.as_ref().expect("this mesh has an authority: it was made by Cluster::joined")
    }

    /// The authority, to stop and start it.
    ///
    /// # Panics
    /// If the mesh was not made by [`Self::joined`].
    pub fn ca_mut(&mut self) -> &mut Daemon {
        self.ca.as_mut().expect("this mesh has an authority: it was made by Cluster::joined")
    }

    /// Where nodes reach the authority.
    #[must_use]
    pub fn ca_address(&self) -> SocketAddr {
        SocketAddr::from((self.world.node(self.ca().node()).v4(), AUTHORITY_PORT))
    }

    /// Runs `nodemesh` against the authority.
    ///
    /// # Errors
    /// If it cannot be started or does not end.
    pub fn ask_ca(&self, arguments: &[&str]) -> Result<Output> {
        let ca = self.ca();
        Program::new(binary("nodemesh")).args(["--socket".as_ref(), ca.socket()]).args(arguments).run_in(ca.place())
    }

    /// Makes a join token, with these options of `nodemesh node token create`.
    ///
    /// # Errors
    /// If the authority refuses.
    pub fn token(&self, options: &[&str]) -> Result<String> {
        let arguments = [&["--output", "json", "node", "token", "create"], options].concat();
        let document: Value = self.ask_ca(&arguments)?.success()?.json()?;
        let token = document["items"][0]["token"].as_str().with_context(|| format!("no token in {document}"))?;
        ensure!(token.starts_with("mj1."), "{token}");
        Ok(token.to_owned())
    }
}

/// `nodemesh join` on a node, into an identity directory.
///
/// # Errors
/// If it cannot be started or does not end. Refused is no error here: see [`Output::success`].
pub fn join(cluster: &Cluster, node: &str, token: &str, identities: &Path) -> Result<Output> {
    let address = cluster.ca_address().to_string();
    Program::new(binary("nodemesh"))
        .args(["join", "--ca", &address, "--token", token, "--node", node, "--directory"].map(OsStr::new))
        .args([identities.as_os_str()])
        .run_in(cluster.world.node(node))
}
