//! The ways from a client to its servers that are compared.

pub(crate) mod envoy;
pub(crate) mod haproxy;
pub(crate) mod nginx;

use crate::pki::Pki;
use anyhow::{Context, Result};
use mesh_tests::program::{Place, Program, Running};
use mesh_tests::world::World;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Ports that the servers listen on.
pub(crate) const BULK: u16 = 5201;
pub(crate) const WEB: u16 = 8080;

/// A way from a client to its servers.
pub(crate) struct Plane {
    pub(crate) name: &'static str,
    /// The way without anything between, over the same links.
    pub(crate) baseline: &'static str,
    pub(crate) client: Place,
    pub(crate) bulk: SocketAddr,
    pub(crate) web: SocketAddr,
    /// Control groups of what carries the bytes: the client's side, the server's side.
    pub(crate) carriers: Vec<PathBuf>,
}

/// Two proxies that speak mutual TLS with each other: beside the client, beside the server.
pub(crate) struct Pair<'a> {
    name: &'static str,
    world: &'a World,
    pki: &'a Pki,
    /// The first of four ports.
    port: u16,
}

/// What one side of a pair does: `(listens on, leads to)` for bulk and for requests.
pub(crate) type Links = [(SocketAddr, SocketAddr); 2];

impl<'a> Pair<'a> {
    pub(crate) fn new(name: &'static str, world: &'a World, pki: &'a Pki, port: u16) -> Self {
        Self { name, world, pki, port }
    }

    fn loopback(port: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, port).into()
    }

    fn between(&self, offset: u16) -> SocketAddr {
        (IpAddr::from(self.world.pod("server").v4()), self.port + offset).into()
    }

    fn client_links(&self) -> Links {
        [0, 1].map(|offset| (Self::loopback(self.port + offset), self.between(2 + offset)))
    }

    fn server_links(&self) -> Links {
        [(self.between(2), Self::loopback(BULK)), (self.between(3), Self::loopback(WEB))]
    }

    fn folder(&self) -> Result<PathBuf> {
        let folder = self.world.folder().join(self.name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    fn group(&self, pod: &str) -> Result<PathBuf> {
        self.world.group(&format!("{}-{pod}", self.name))
    }

    /// Starts one side in a group of its own, and waits until it listens.
    fn start(&self, pod: &str, program: Program, links: &Links) -> Result<Running> {
        let place = Place { cgroup: self.group(pod)?, ..self.world.place(pod) };
        let mut running = program.start_in(place)?;
        for (listens, _) in links {
            running.wait_for_listener(listens.port())?;
        }
        Ok(running)
    }

    fn plane(&self) -> Result<Plane> {
        let [(bulk, _), (web, _)] = self.client_links();
        Ok(Plane {
            name: self.name,
            baseline: "direct",
            client: self.world.place("client"),
            bulk,
            web,
            carriers: vec![self.group("client")?, self.group("server")?],
        })
    }
}

/// Starts what answers in a pod: iperf3 and an nginx of one process.
pub(crate) fn servers(world: &World, pod: &str) -> Result<[Running; 2]> {
    let mut bulk = Program::new("iperf3").args(["-s", "-p", &BULK.to_string()]).start_in(world.place(pod))?;
    bulk.wait_for_listener(BULK)?;
    let folder = world.folder().join(format!("web-{pod}"));
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = write(
        &folder,
        "nginx.conf",
        &format!(
            "daemon off;\nmaster_process off;\npid {0}/pid;\nerror_log stderr;\nworker_rlimit_nofile 20000;\n\
             events {{ worker_connections 19900; }}\nhttp {{\n  access_log off;\n  client_body_temp_path {0}/body;\n  \
             keepalive_requests 1000000000;\n  keepalive_timeout 1h;\n  server {{\n    listen {WEB} backlog=4096;\n    \
             listen [::]:{WEB} backlog=4096;\n    location / {{ return 200 \"ok\"; }}\n  }}\n}}\n",
            folder.display()
        ),
    )?;
    let mut web = Program::new("nginx").args(["-e", "stderr", "-c"]).args([&path]).start_in(world.place(pod))?;
    web.wait_for_listener(WEB)?;
    Ok([bulk, web])
}

fn write(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
