//! Replicas that go, break and come back under load: what an application sees of it is nothing, as long as no byte of
//! its own was lost.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::{Churn, served};
use mesh_tests::scrape::Metrics;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// The service, its identity, and the `app` of its replicas.
const SERVICE: &str = "web";
/// Where replicas speak first, and where clients do.
const GREETER: u16 = 8080;
const ECHO: u16 = 8081;
/// Long streams to each replica.
const STREAMS: &str = "20";

/// `client` on n1; five replicas of `web` on n2 and n3, not serving yet.
fn start(name: &str, describe: impl FnOnce(&mut mesh_tests::catalog::Catalog)) -> Result<Cluster> {
    let topology =
        World::named(name).node("n1").pod("client").node("n2").pods(&["r1", "r2", "r3"]).node("n3").pods(&["r4", "r5"]);
    Cluster::start(topology, |catalog| {
        catalog.service(SERVICE, 80, GREETER).ports.push((81, ECHO.into()));
        for replica in REPLICAS {
            catalog.workload(replica).of_app(SERVICE);
        }
        describe(catalog);
    })
}

const REPLICAS: [&str; 5] = ["r1", "r2", "r3", "r4", "r5"];

/// A replica that greets with its name.
fn greeter(cluster: &Cluster, replica: &str) -> Result<Running> {
    cluster.serve(replica, GREETER, &["--greet", "--name", replica, "--graceful"])
}

fn echo(cluster: &Cluster, replica: &str) -> Result<Running> {
    cluster.serve(replica, ECHO, &["--name", replica])
}

/// New connections all the time, until it is told to end.
fn churn(cluster: &Cluster, destination: SocketAddr, rate: &str, arguments: &[&str]) -> Result<Running> {
    let program = Program::probe(["churn", &destination.to_string(), "--rate", rate, "--greet"]).args(arguments);
    program.start_in(cluster.world.pod("client"))
}

/// Ends it; none of its connections may have failed.
fn finish(cluster: &Cluster, churn: Running) -> Result<Churn> {
    let report: Churn = churn.wait()?.json()?;
    ensure!(report.failed == 0, "{report:?}\n{}", complaints(cluster));
    Ok(report)
}

/// What the client's daemon has logged of failed connections.
fn complaints(cluster: &Cluster) -> String {
    let log = cluster.daemon("n1").log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("\"WARN\"") || line.contains("\"ERROR\"")).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Every node's catalog gives the service so many endpoints.
fn wait_for_endpoints(cluster: &Cluster, count: u64) -> Result<()> {
    for daemon in cluster.daemons() {
        wait::until_ok(&format!("{} knows {count} endpoints", daemon.node()), BOUND, || {
            let services: Value = cluster.document(daemon.node(), &["get", "services"])?;
            let total = services.pointer("/items/0/endpoints/total").and_then(Value::as_u64);
            ensure!(total == Some(count), "{services}");
            Ok(())
        })?;
    }
    Ok(())
}

fn retried(metrics: &Metrics, reason: &str) -> u64 {
    metrics.count("nodemesh_balance_retries_total", &[("reason", reason)])
}

/// The connections that servers have begun to serve.
fn begun(servers: &BTreeMap<&str, Running>) -> usize {
    servers.values().map(|server| served(&server.printed()).iter().filter(|line| line.end.is_none()).count()).sum()
}

#[test]
fn a_rolling_restart_fails_no_connection() -> Result<()> {
    let mut cluster = start("rolling", |_| {})?;
    let mut servers = BTreeMap::new();
    let mut streams = BTreeMap::new();
    for replica in REPLICAS {
        servers.insert(replica.to_owned(), greeter(&cluster, replica)?);
    }
    cluster.wait_until_served("client", SERVICE)?;
    for replica in REPLICAS {
        streams.insert(replica.to_owned(), long_streams(&cluster, replica)?);
    }
    let load = churn(&cluster, cluster.catalog.vips(SERVICE)[0], "500", &[])?;
    for old in REPLICAS {
        // It takes no new connections, and those that it has go on.
        cluster.catalog.workload(old).terminate();
        cluster.catalog.write()?;
        wait_for_endpoints(&cluster, 4)?;
        let held = streams.remove(old).context("it has streams")?;
        held.wait()?.success()?;
        servers.remove(old).context("it serves")?.stop()?.success()?;
        cluster.catalog.remove(old);
        cluster.catalog.write()?;
        let node = cluster.world.pod(old).node().to_owned();
        cluster.world.remove_pod(old)?;
        // Its successor serves before it is in the catalog.
        let new = old.replace('r', "s");
        cluster.world.add_pod(&node, &new)?;
        servers.insert(new.clone(), greeter(&cluster, &new)?);
        cluster.catalog.add(cluster.world.pod(&new), None).of_app(SERVICE);
        cluster.catalog.write()?;
        wait_for_endpoints(&cluster, 5)?;
        wait::until(&format!("{new} is asked"), BOUND, || servers[&new].printed().contains('\n').then_some(()))?;
        streams.insert(new.clone(), long_streams(&cluster, &new)?);
    }
    for (_, held) in streams {
        held.wait()?.success()?;
    }
    let report = finish(&cluster, load)?;
    for replica in REPLICAS.iter().flat_map(|old| [(*old).to_owned(), old.replace('r', "s")]) {
        ensure!(report.servers.contains_key(&replica), "{replica} was never asked: {report:?}");
    }
    println!("rolling restart: {} connections, slowest {} us", report.connections, report.slowest_micros);
    Ok(())
}

/// Streams that stay open; each is used at its beginning and at its end.
fn long_streams(cluster: &Cluster, replica: &str) -> Result<Running> {
    let address = SocketAddr::new(cluster.world.pod(replica).v4().into(), GREETER).to_string();
    cluster.hold("client", ["--count", STREAMS, "--greet", &address])
}

#[test]
fn connections_on_a_killed_replica_that_have_carried_nothing_go_to_another() -> Result<()> {
    killed("killed-lanes", "lanes")
}

#[test]
fn connections_on_a_killed_replica_that_have_carried_nothing_go_to_another_over_quic() -> Result<()> {
    killed("killed-quic", "quic")
}

fn killed(name: &str, transport: &str) -> Result<()> {
    let cluster = start(name, |catalog| catalog.mesh("transport", transport))?;
    let (mut greeters, mut echoes) = (BTreeMap::new(), BTreeMap::new());
    for replica in REPLICAS {
        greeters.insert(replica, greeter(&cluster, replica)?);
        echoes.insert(replica, echo(&cluster, replica)?);
    }
    let [vip, _] = cluster.catalog.vips(SERVICE);
    cluster.wait_until_served("client", SERVICE)?;
    let load = churn(&cluster, vip, "200", &["--mute"])?;
    let silent = SocketAddr::new(vip.ip(), 81).to_string();
    let silent = cluster.hold("client", ["--count", "100", "--silent", &silent])?;
    wait::until("every silent connection is with a replica", BOUND, || (begun(&echoes) == 100).then_some(()))?;
    let mut lost = 0;
    for replica in ["r1", "r4"] {
        let (greeter, echo) = (greeters.remove(replica), echoes.remove_entry(replica));
        greeter.context("it greets")?.signal(Signal::KILL)?;
        let (_, killed) = echo.as_ref().context("it echoes")?;
        killed.signal(Signal::KILL)?;
        lost += begun(&echo.into_iter().collect());
        wait::until_ok("the killed replica's connections are with others", BOUND, || {
            let now = begun(&echoes);
            ensure!(now == 100, "{now} of 100; {lost} were with the killed");
            Ok(())
        })?;
    }
    ensure!(lost > 0, "no silent connection was with a killed replica");
    silent.wait()?.success()?;
    let metrics = cluster.wait_for_metrics("n1", "nodemesh_balance", |metrics| retried(metrics, "refused") > 0)?;
    ensure!(retried(&metrics, "reset") as usize >= lost, "{}", metrics.text());
    let recovered = metrics.count("nodemesh_balance_retried_connections_total", &[("result", "recovered")]);
    ensure!(recovered as usize >= lost, "{}", metrics.text());
    // The killed ones are ejected before long: connections to them fail.
    cluster.wait_for_metrics("n1", "nodemesh_balance", |metrics| {
        metrics.count("nodemesh_balance_ejections_total", &[]) >= 2
    })?;
    let opened = metrics.opened("source");
    cluster
        .wait_for_metrics("n1", "nodemesh_tcp_connections_opened", |metrics| metrics.opened("source") > opened + 500)?;
    let report = finish(&cluster, load)?;
    println!("killed replicas: {} connections, {lost} silent ones moved", report.connections);
    Ok(())
}

#[test]
fn an_application_that_finishes_before_any_byte_and_still_listens_is_taken_at_its_word() -> Result<()> {
    let cluster = Cluster::pair("finishes")?;
    // The server's only word is its end, and it goes on serving others.
    let _server = cluster.serve("server", 8080, &["--mode", "source", "--bytes", "0"])?;
    for vip in cluster.catalog.vips("server") {
        let transfer = ["transfer", &vip.to_string(), "--bytes", "0", "--server", "source"];
        wait::until_ok("the client reads the end", BOUND, || {
            let call = cluster.attempt("client", &transfer)?;
            ensure!(call.ok, "{call:?}");
            Ok(())
        })?;
    }
    let metrics = cluster.daemon("n1").metrics()?;
    assert_eq!(metrics.count("nodemesh_balance_retries_total", &[]), 0, "{}", metrics.text());
    Ok(())
}

#[test]
fn a_replica_that_drops_everything_is_left_out_until_it_answers_again() -> Result<()> {
    let topology =
        World::named("blackhole").node("n1").pod("client").node("n2").pods(&["r1", "r2"]).node("n3").pod("r3");
    let cluster = Cluster::start_with(
        topology,
        |catalog| {
            catalog.service(SERVICE, 80, GREETER);
            for replica in ["r1", "r2", "r3"] {
                catalog.workload(replica).of_app(SERVICE);
            }
            let policy = catalog.traffic(SERVICE);
            policy.set("ejection", json!({"consecutiveFailures": 3, "baseTime": "2s", "maxTime": "4s"}));
        },
        |configuration| configuration["tunnel"]["connectTimeout"] = "1s".into(),
    )?;
    let servers: Vec<_> =
        ["r1", "r2", "r3"].map(|replica| greeter(&cluster, replica)).into_iter().collect::<Result<_>>()?;
    cluster.wait_until_served("client", SERVICE)?;
    let [vip, _] = cluster.catalog.vips(SERVICE);
    let before = cluster.daemon("n1").metrics()?;
    let ejections = |metrics: &Metrics| metrics.count("nodemesh_balance_ejections_total", &[]);
    // Deliveries to the pod go no further.
    let pod = cluster.world.pod("r1").namespace();
    pod.ip(&["link set dev lo down".into()])?;
    let load = churn(&cluster, vip, "50", &[])?;
    cluster.wait_for_metrics("n1", "nodemesh_balance", |metrics| ejections(metrics) > ejections(&before))?;
    // It may be asked again now and then, by one connection at a time.
    let successive = ["churn", &vip.to_string(), "--count", "200", "--greet"];
    wait::until_ok("200 successive connections take 100 ms at most", 3 * BOUND, || {
        let report: Churn = Program::probe(successive).run_in(cluster.world.pod("client"))?.success()?.json()?;
        ensure!(report.slowest_micros <= 100_000, "{report:?}");
        Ok(())
    })?;
    let metrics = cluster.daemon("n1").metrics()?;
    ensure!(retried(&metrics, "timeout") + retried(&metrics, "unreachable") > 0, "{}", metrics.text());
    pod.ip(&["link set dev lo up".into()])?;
    let known = servers[0].printed().lines().count();
    wait::until("the replica is asked again", BOUND, || (servers[0].printed().lines().count() > known).then_some(()))?;
    finish(&cluster, load)?;
    Ok(())
}
