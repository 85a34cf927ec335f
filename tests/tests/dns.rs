//! Names of services resolve where the mesh itself is the resolver, by datagram and by TCP, over both families; every
//! other name is someone else's, and is refused where nobody else is asked.

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::Program;
use mesh_tests::report::Resolved;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::{IpAddr, SocketAddr};

const SERVERS: [&str; 2] = ["10.96.255.10", "fd96::ff10"];

fn resolve(cluster: &Cluster, server: SocketAddr, name: &str, more: &[&str]) -> Result<Resolved> {
    let server = server.to_string();
    let arguments = ["resolve", &server, name].into_iter().chain(more.iter().copied());
    Program::probe(arguments).run_in(cluster.world.place("client"))?.success()?.json()
}

#[test]
fn services_resolve_by_name_and_other_names_do_not() -> Result<()> {
    let topology = World::named("dns").node("n1").pod("client");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.mesh("dns", serde_json::json!({"addresses": SERVERS}));
        catalog.service("web", 80, 8080);
    })?;
    let vips = cluster.catalog.vips("web").map(|vip| vip.ip());
    for server in SERVERS.map(|server| SocketAddr::new(server.parse().expect("an address"), 53)) {
        for way in [&["--tcp"][..], &[]] {
            let ask = |name: &str, kind: &str| resolve(&cluster, server, name, &[way, &["--kind", kind]].concat());
            wait::until_ok(&format!("{server} answers ({way:?})"), BOUND, || ask("web", "1"))?;
            for name in ["web", "web.default", "web.default.svc.cluster.local"] {
                for (kind, vip) in [("1", vips[0]), ("28", vips[1])] {
                    let told = ask(name, kind)?;
                    let expected = Resolved { code: 0, truncated: false, addresses: vec![vip] };
                    ensure!(told == expected, "{name} at {server} ({way:?}): {told:?}");
                }
            }
            let codes = [("gone.default.svc.cluster.local", 3), ("example.com", 5)];
            for (name, code) in codes {
                let told = ask(name, "1")?;
                let expected = Resolved { code, truncated: false, addresses: Vec::<IpAddr>::new() };
                ensure!(told == expected, "{name} at {server} ({way:?}): {told:?}");
            }
        }
    }
    let metrics = cluster.daemon("n1").metrics()?;
    let refused = metrics.count("nodemesh_dns_queries_total", &[("result", "refused")]);
    ensure!(refused == 4, "{refused} queries were refused");
    Ok(())
}
