//! Bounds: what a node has no room for is refused at once, for a reason of its own, and what it has taken goes on.

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::daemon::Daemon;
use mesh_tests::policy::{account, range};
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Call;
use mesh_tests::scrape::{Change, Metrics};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::collections::BTreeMap;

/// So few open files that a test can use them up.
const DESCRIPTORS: u64 = 256;
/// Connections that are tried beyond what there is room for.
const EXCESS: u64 = 10;
/// Ports that a namespace gives out, in a test of what happens without.
const PORTS: u64 = 50;

fn bound(metrics: &Metrics, family: &str, bound: &str) -> u64 {
    metrics.count(&format!("nodemesh_bound_{family}"), &[("bound", bound)])
}

/// Connections of applications that a node still has descriptors for.
fn room(metrics: &Metrics) -> u64 {
    let capacity = bound(metrics, "capacity", "descriptors");
    // An eighth is for connections between nodes.
    (capacity - capacity / 8).saturating_sub(bound(metrics, "used", "descriptors"))
}

fn wait_until_nothing_is_carried(daemon: &Daemon) -> Result<Metrics> {
    daemon.wait_for_metrics("nothing is carried", |metrics| bound(metrics, "used", "connections") == 0)
}

/// Holds this many connections of `client`, which answer one message each now and one at the end.
fn hold(cluster: &Cluster, destination: &str, count: u64) -> Result<Running> {
    let arguments = ["hold", destination, "--count", &count.to_string()];
    let mut held = Program::probe(arguments).start_in(cluster.world.pod("client"))?;
    held.wait_for_text(&format!("holding {count}"))?;
    Ok(held)
}

/// Ends what [`hold`] holds; every byte must have come back.
fn release(held: Running, count: u64) -> Result<()> {
    let call: Call = held.wait()?.success()?.json()?;
    ensure!(call.ok && call.connections == count, "{call:?}");
    Ok(())
}

fn serve(cluster: &Cluster, pod: &str, port: u16) -> Result<Running> {
    let port_text = port.to_string();
    let mut echo = Program::probe(["echo", "--port", &port_text]).start_in(cluster.world.pod(pod))?;
    echo.wait_for_listener(port)?;
    Ok(echo)
}

/// Calls that must be reset, and what changed on a node meanwhile.
fn refused(cluster: &Cluster, destination: &str, count: u64, observed: &str) -> Result<Change> {
    let ((), change) = cluster.daemon(observed).change_during(|| {
        for _ in 0..count {
            let call = cluster.attempt("client", &["call", "blocking", destination])?;
            ensure!(call.errno.as_deref() == Some("ECONNRESET"), "{call:?}");
        }
        Ok(())
    })?;
    Ok(change)
}

/// Uses up the descriptors of `node`; the client's side counts `reason`.
fn descriptors_run_out(name: &str, node: &str, reason: &str) -> Result<()> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    let mut cluster = Cluster::start_with(
        topology,
        |catalog| {
            catalog.service("server", 80, 8080);
        },
        // One lane, so that what is left for connections is known before.
        |configuration| configuration["limits"] = serde_json::json!({"threads": 1}),
    )?;
    cluster.daemon_mut(node).stop()?;
    cluster.daemon_mut(node).limit_descriptors(DESCRIPTORS);
    cluster.daemon_mut(node).start()?;
    let _echo = serve(&cluster, "server", 8080)?;
    cluster.wait_until_served("client", "server")?;
    let destination = cluster.catalog.vips("server")[0].to_string();

    let room = room(&wait_until_nothing_is_carried(cluster.daemon(node))?);
    ensure!((50..DESCRIPTORS).contains(&room), "room for {room}");
    let held = hold(&cluster, &destination, room)?;
    let change = refused(&cluster, &destination, EXCESS, "n1")?;
    let failed = change.of(|metrics| metrics.failed("source", reason));
    // One that was refused over there may be tried again.
    ensure!(failed == EXCESS, "{failed} failed for {reason}\n{}", change.after.text());
    let daemon = cluster.daemon(node);
    let full = daemon.metrics()?;
    let reporter = if node == "n1" { "source" } else { "destination" };
    ensure!(full.failed(reporter, "descriptor_limit") >= EXCESS, "{}", full.text());
    ensure!(bound(&full, "hits_total", "descriptors") >= EXCESS, "{}", full.text());
    ensure!(bound(&full, "used", "connections") == room, "{}", full.text());
    let (open, limit) = (full.count("process_open_fds", &[]), full.count("process_max_fds", &[]));
    ensure!(limit == DESCRIPTORS && open < limit, "{open} of {limit} descriptors are open");
    ensure!(full.count("nodemesh_accept_failures_total", &[]) == 0, "{}", full.text());
    let rows = cluster.nodemesh(node, &["get", "connections"])?.success()?;
    ensure!(!rows.stdout.is_empty(), "the admin socket does not answer");

    release(held, room)?;
    wait_until_nothing_is_carried(cluster.daemon(node))?;
    cluster.wait_until_served("client", "server")?;
    for daemon in cluster.daemons() {
        let log = daemon.log();
        ensure!(!log.contains("os error 24") && !log.contains("Too many open files"), "{}", daemon.log_end());
    }
    Ok(())
}

#[test]
fn connections_beyond_the_descriptors_of_the_callers_node_are_refused_and_the_others_go_on() -> Result<()> {
    descriptors_run_out("few-out", "n1", "descriptor_limit")
}

#[test]
fn streams_beyond_the_descriptors_of_the_destinations_node_are_refused_and_the_others_go_on() -> Result<()> {
    descriptors_run_out("few-in", "n2", "overloaded")
}

#[test]
fn connections_beyond_the_configured_number_are_refused() -> Result<()> {
    let topology = World::named("few-conns").node("n1").pod("client").node("n2").pod("server");
    let cluster = Cluster::start_with(
        topology,
        |catalog| {
            catalog.service("server", 80, 8080);
        },
        |configuration| configuration["limits"] = serde_json::json!({"connections": 5}),
    )?;
    let _echo = serve(&cluster, "server", 8080)?;
    let destination = cluster.catalog.vips("server")[0].to_string();
    let held = hold(&cluster, &destination, 5)?;
    let change = refused(&cluster, &destination, 3, "n1")?;
    ensure!(change.of(|metrics| metrics.failed("source", "connection_limit")) == 3, "{}", change.after.text());
    ensure!(bound(&change.after, "capacity", "connections") == 5, "{}", change.after.text());
    ensure!(change.of(|metrics| bound(metrics, "hits_total", "connections")) == 3, "{}", change.after.text());
    release(held, 5)
}

/// Deliveries come from the client's address, each from a port of it: of one address to one application there can be as
/// many as there are ports, and another application has as many again.
#[test]
fn every_port_of_a_client_serves_every_application_once_and_running_out_of_them_has_its_own_reason() -> Result<()> {
    let topology = World::named("few-ports").node("n1").pod("client").node("n2").pods(&["server", "other"]);
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
        catalog.service("second", 81, 8081).selector = BTreeMap::from([("app".to_owned(), "server".to_owned())]);
    })?;
    let pod = cluster.world.pod("server").namespace();
    pod.set_sysctls(&[("ipv4/ip_local_port_range", &format!("40000 {}", 40_000 + PORTS - 1))])?;
    let _echoes = [serve(&cluster, "server", 8080)?, serve(&cluster, "server", 8081)?];
    let [first, second] = ["server", "second"].map(|service| cluster.catalog.vips(service)[0].to_string());
    let held = [hold(&cluster, &first, PORTS)?, hold(&cluster, &second, PORTS)?];
    for destination in [first, second] {
        let change = refused(&cluster, &destination, 2, "n1")?;
        ensure!(change.of(|metrics| metrics.failed("source", "ports_exhausted")) == 2, "{}", change.after.text());
    }
    let there = cluster.daemon("n2").metrics()?;
    ensure!(there.failed("destination", "ports_exhausted") >= 4, "{}", there.text());
    held.into_iter().try_for_each(|held| release(held, PORTS))
}

/// More ranges in two policies than the kernel's map has room for; each of them alone fits.
#[test]
fn a_catalog_that_does_not_fit_at_start_is_served_as_far_as_it_does() -> Result<()> {
    let topology = World::named("too-much").node("n1").pods(&["client", "stranger"]).node("n2").pods(&["a", "b"]);
    let mut cluster = Cluster::start(topology, |catalog| {
        catalog.service("a", 80, 8080);
        catalog.service("b", 80, 8080);
    })?;
    let _echoes = [serve(&cluster, "a", 8080)?, serve(&cluster, "b", 8080)?];
    cluster.daemon_mut("n1").stop()?;
    cluster.daemon_mut("n2").stop()?;
    for (number, app) in [(0_u32, "a"), (1, "b")] {
        for part in 0..3 {
            let ranges = (3_000 * part..3_000 * (part + 1)).map(|n| format!("10{number}.{}.{}.0/24", n / 256, n % 256));
            let sources: Vec<_> = ranges.map(|cidr| range(&cidr)).chain([account("client")]).collect();
            cluster.catalog.policy(&format!("{app}-{part}")).for_app(app).rule("some", &sources, &[]);
        }
    }
    cluster.catalog.write()?;
    let says_so = |daemon: &Daemon| -> Result<()> {
        let response = daemon.get("/readyz")?;
        let is_said = response.status == 503 && response.body.contains("not all of the catalog fits");
        ensure!(is_said, "{}: {}", response.status, response.body);
        Ok(())
    };
    for node in ["n1", "n2"] {
        cluster.daemon_mut(node).spawn()?;
        let daemon = cluster.daemon(node);
        wait::until_ok("the daemon says that not all fits", BOUND, || says_so(daemon))?;
        let left_out = daemon.metrics()?.count("nodemesh_bpf_map_left_out", &[("map", "RANGES")]);
        ensure!(left_out == 9_000, "{left_out} ranges are left out");
    }
    // Both policies hold, the one that the kernel does not know included.
    for service in ["a", "b"] {
        cluster.wait_until_served("client", service)?;
        for vip in cluster.catalog.vips(service) {
            let call = cluster.attempt("stranger", &["call", "blocking", &vip.to_string()])?;
            ensure!(!call.ok && call.bytes_received == 0, "{call:?}");
        }
    }
    for part in 0..3 {
        cluster.catalog.remove_policy(&format!("b-{part}"));
    }
    cluster.catalog.write()?;
    for node in ["n1", "n2"] {
        cluster.daemon_mut(node).wait_until_ready()?;
        cluster
            .daemon(node)
            .wait_for_metrics("nothing is left out", |metrics| metrics.count("nodemesh_bpf_map_left_out", &[]) == 0)?;
    }
    cluster.wait_until_served("stranger", "b")
}
