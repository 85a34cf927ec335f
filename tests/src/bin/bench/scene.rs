//! Everything that is compared, running at the same time in worlds of their own: idle, it costs nothing.

use crate::pki::Pki;
use crate::plane::{self, BULK, Pair, Plane, WEB, envoy, haproxy, nginx};
use crate::start;
use anyhow::{Context, Result};
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Place, Running};
use mesh_tests::topology::Topology;
use mesh_tests::world::World;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Ports of the mesh's services.
const BULK_FRONT: u16 = 81;
const WEB_FRONT: u16 = 80;

/// In the order of the tables: each behind what it is compared with.
pub(crate) const PLANES: [&str; 9] =
    ["direct-local", "same-node", "same-node-tunnel", "direct", "lanes", "quic", "envoy", "haproxy", "nginx"];

/// Dropping it ends everything.
pub(crate) struct Scene {
    pub(crate) planes: Vec<Plane>,
    _running: Vec<Running>,
    pub(crate) meshes: Vec<Cluster>,
    /// Without a mesh.
    plain: World,
}

impl Scene {
    /// Starts what the named planes need.
    pub(crate) fn start(names: &[String], envoy: Option<&Path>, congestion: Option<&str>, mtu: u16) -> Result<Self> {
        let wants = |name: &str| names.iter().any(|wanted| wanted == name);
        let named = |name| {
            let topology = World::named(name).mtu(mtu);
            congestion.iter().fold(topology, |topology, congestion| topology.congestion(congestion))
        };
        let plain = named("plain").node("n1").pods(&["client", "neighbour"]).node("n2").pod("server").build()?;
        let mut scene = Self { planes: Vec::new(), _running: Vec::new(), meshes: Vec::new(), plain };
        scene.start_plain(&wants, envoy)?;
        if ["same-node", "same-node-tunnel", "lanes"].into_iter().any(&wants) {
            scene.start_mesh(named("lanes"), "lanes", &["same-node", "same-node-tunnel", "lanes"])?;
        }
        if wants("quic") {
            scene.start_mesh(named("quic"), "quic", &["quic"])?;
        }
        scene.planes.retain(|plane| wants(plane.name));
        scene.planes.sort_by_key(|plane| PLANES.iter().position(|name| *name == plane.name));
        Ok(scene)
    }

    fn start_plain(&mut self, wants: &impl Fn(&str) -> bool, program: Option<&Path>) -> Result<()> {
        let world = &self.plain;
        prepare(world)?;
        for (pod, name) in [("neighbour", "direct-local"), ("server", "direct")] {
            self._running.extend(plane::servers(world, pod)?);
            let address = |port| SocketAddr::new(world.pod(pod).v4().into(), port);
            self.planes.push(Plane {
                name,
                baseline: name,
                client: world.place("client"),
                bulk: address(BULK),
                web: address(WEB),
                carriers: Vec::new(),
            });
        }
        let pki = Pki::create(&world.folder().join("pki"))?;
        let mut keep = |(plane, running): (Plane, Vec<Running>)| {
            self.planes.push(plane);
            self._running.extend(running);
        };
        if wants("envoy") {
            let program = program.context("there is no Envoy: `cargo xtask bench` installs it and says where it is")?;
            keep(envoy::start(&Pair::new("envoy", world, &pki, 7_000), program)?);
        }
        if wants("haproxy") {
            keep(haproxy::start(&Pair::new("haproxy", world, &pki, 7_100))?);
        }
        if wants("nginx") {
            keep(nginx::start(&Pair::new("nginx", world, &pki, 7_200))?);
        }
        Ok(())
    }

    fn start_mesh(&mut self, named: Topology, transport: &'static str, names: &[&'static str]) -> Result<()> {
        let topology = named.node("n1").pods(&["client", "neighbour", "tunnelled"]);
        let cluster = Cluster::start(topology.node("n2").pod("server"), |catalog| describe(catalog, transport))?;
        prepare(&cluster.world)?;
        for pod in ["neighbour", "tunnelled", "server"] {
            self._running.extend(plane::servers(&cluster.world, pod)?);
        }
        for name in names {
            self.planes.push(meshed(&cluster, name));
        }
        self.meshes.push(cluster);
        Ok(())
    }

    /// The control groups of everything that runs here.
    pub(crate) fn groups(&self) -> Vec<PathBuf> {
        let worlds = self.meshes.iter().map(|mesh| &mesh.world).chain([&self.plain]);
        worlds.map(|world| world.cgroup().to_owned()).collect()
    }

    /// Restarts the daemons of a mesh, so that its next connection is its first.
    pub(crate) fn restart(&mut self, plane: &str) -> Result<Option<start::Started>> {
        let Some(number) = self.planes.iter().position(|known| known.name == plane) else { return Ok(None) };
        let group = self.planes[number].carriers.first().cloned();
        let mesh =
            self.meshes.iter_mut().find(|mesh| group.as_deref().is_some_and(|it| it.starts_with(mesh.world.cgroup())));
        mesh.map(start::restart).transpose()
    }
}

fn describe(catalog: &mut Catalog, transport: &str) {
    catalog.mesh("transport", transport);
    for name in ["neighbour", "tunnelled", "server"] {
        catalog.service(name, WEB_FRONT, WEB).ports.push((BULK_FRONT, BULK.into()));
    }
    catalog.traffic("tunnelled").same_node("Tunnel");
}

fn meshed(cluster: &Cluster, name: &'static str) -> Plane {
    let (service, baseline) = match name {
        "same-node" => ("neighbour", "direct-local"),
        "same-node-tunnel" => ("tunnelled", "direct-local"),
        _ => ("server", "direct"),
    };
    let address = |port| SocketAddr::new(cluster.catalog.vips(service)[0].ip(), port);
    let nodes: &[&str] = if service == "server" { &["n1", "n2"] } else { &["n1"] };
    Plane {
        name,
        baseline,
        client: cluster.world.place("client"),
        bulk: address(BULK_FRONT),
        web: address(WEB_FRONT),
        carriers: nodes.iter().map(|node| Place::from(cluster.world.node(node)).cgroup).collect(),
    }
}

/// The same for everyone: enough ports for connections that end every moment.
fn prepare(world: &World) -> Result<()> {
    for pod in world.pods() {
        pod.namespace().set_sysctls(&[("ipv4/tcp_tw_reuse", "1"), ("ipv4/ip_local_port_range", "10000 65000")])?;
    }
    Ok(())
}
