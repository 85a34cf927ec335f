//! HTTP/3 through services: h3 over quinn at both ends, which know nothing of the mesh between them.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Fetched;
use mesh_tests::scrape::{Change, Metrics};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::SocketAddr;
use std::path::PathBuf;

const PORT: u16 = 8443;
/// Of each response.
const BODY: u64 = 4 << 20;
const SERVICES: [&str; 2] = ["near", "far"];

/// `client` and `near` on n1, `far` on n2; the latter two serve HTTP/3.
struct Bed {
    cluster: Cluster,
    _servers: Vec<Running>,
}

impl Bed {
    fn start(name: &str) -> Result<Self> {
        let topology = World::named(name).node("n1").pods(&["client", "near"]).node("n2").pod("far");
        let cluster = Cluster::start(topology, |catalog| {
            catalog.mesh("mode", "strict");
            for service in SERVICES {
                catalog.udp_service(service, 443, PORT);
            }
        })?;
        let servers = SERVICES.map(|service| {
            let port = PORT.to_string();
            let arguments = ["http3", "serve", "--port", &port, "--name", service, "--certificate"];
            let server = Program::probe(arguments).args([certificate(&cluster, service)]);
            let mut server = server.start_in(cluster.world.pod(service))?;
            server.wait_for_text("listening")?;
            Ok(server)
        });
        let servers = servers.into_iter().collect::<Result<_>>()?;
        let bed = Self { cluster, _servers: servers };
        for service in SERVICES {
            for vip in bed.cluster.catalog.vips(service) {
                wait::until_ok(&format!("{service} answers at {vip}"), BOUND, || {
                    let fetched = bed.get(service, vip, &["--timeout-millis", "1000"])?;
                    fetched.error.map_or(Ok(()), |error| Err(anyhow::anyhow!(error)))
                })?;
            }
        }
        Ok(bed)
    }

    fn get(&self, service: &str, vip: SocketAddr, arguments: &[&str]) -> Result<Fetched> {
        let program = Program::probe(["http3", "get", &vip.to_string(), "--certificate"]);
        let program = program.args([certificate(&self.cluster, service)]).args(arguments);
        program.run_in(self.cluster.world.pod("client"))?.json()
    }
}

fn certificate(cluster: &Cluster, service: &str) -> PathBuf {
    cluster.world.folder().join(format!("{service}.der"))
}

fn passed(metrics: &Metrics, direction: &str, kind: &str) -> u64 {
    metrics.count("nodemesh_datagram_passed_bytes_total", &[("direction", direction), ("kind", kind)])
}

fn flows(metrics: &Metrics, service: &str) -> u64 {
    let labels = [("reporter", "source"), ("request_protocol", "udp"), ("destination_workload", service)];
    metrics.count("nodemesh_udp_flows_opened_total", &labels)
}

#[test]
fn http3_through_a_service_is_what_it_is_without_a_mesh() -> Result<()> {
    let bed = Bed::start("http3")?;
    let own = bed.cluster.world.pod("client").addresses();
    for service in SERVICES {
        let server_node = bed.cluster.world.pod(service).node();
        for vip in bed.cluster.catalog.vips(service) {
            let before = ["n1", server_node].map(|node| bed.cluster.daemon(node).metrics());
            let fetched = bed.get(service, vip, &["--bytes", &BODY.to_string(), "--count", "2"])?;
            ensure!(fetched.error.is_none(), "{service} at {vip}: {fetched:?}");
            // The client has compared every byte.
            assert_eq!((fetched.status, fetched.bytes), (200, 2 * BODY), "{service} at {vip}");
            assert_eq!(fetched.server, service);
            assert_eq!(fetched.from, vip.to_string(), "the client hears the service");
            let seen = SocketAddr::new(own[usize::from(vip.is_ipv6())], fetched.local_port);
            assert_eq!(fetched.seen_as, seen.to_string(), "the server sees the client itself");

            let mut changes = Vec::new();
            for (node, before) in ["n1", server_node].into_iter().zip(before) {
                changes.push(Change { before: before?, after: bed.cluster.daemon(node).metrics()? });
            }
            let [client, server] = &changes[..] else { unreachable!("two nodes were asked") };
            for (change, direction) in [(client, "outbound"), (server, "inbound")] {
                let replies = change.of(|metrics| passed(metrics, direction, "reply"));
                ensure!(replies >= 2 * BODY, "{service} at {vip}: {replies} bytes of replies passed {direction}");
                let requests = change.of(|metrics| passed(metrics, direction, "request"));
                ensure!(requests > 0, "{service} at {vip}: no request passed {direction}");
            }
            ensure!(client.of(|metrics| flows(metrics, service)) > 0, "{}", client.after.text());
            ensure!(client.outcome("datagram", "sent") > 0, "{:?}", client.outcomes());
            ensure!(server.outcome("udp_lookup", "authenticated") > 0, "{:?}", server.outcomes());
        }
    }
    Ok(())
}

#[test]
fn a_server_that_is_not_in_the_certificate_is_refused_by_the_application() -> Result<()> {
    let bed = Bed::start("http3-wrong")?;
    let vip = bed.cluster.catalog.vips("far")[0];
    // The mesh does not stand in for the application's own security.
    let refused = bed.get("near", vip, &[])?;
    let error = refused.error.context("the handshake must fail")?;
    ensure!(error.contains("handshake"), "{error}");
    Ok(())
}
