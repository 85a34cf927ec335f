//! What a TrafficPolicy bounds and checks: limits, idle connections, health.

use anyhow::{Context, Result, ensure};
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Churn;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use rustix::process::Signal;
use serde_json::{Value, json};

/// `client` on n1, `server` on n2, with a policy for service `server`.
fn pair(name: &str, describe: impl FnOnce(&mut Catalog)) -> Result<Cluster> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    Cluster::start_with(
        topology,
        |catalog| {
            catalog.service("server", 80, 8080);
            describe(catalog);
        },
        |configuration| configuration["tunnel"]["connectTimeout"] = "2s".into(),
    )
}

#[test]
fn connections_above_the_limit_are_shed_and_counted() -> Result<()> {
    let cluster = pair("limit", |catalog| {
        catalog.traffic("server").set("limits", json!({"maxConnections": 5}));
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let held = cluster.hold("client", ["--count", "5", &vip])?;
    let call = cluster.attempt("client", &["call", "blocking", &vip])?;
    ensure!(call.errno.as_deref() == Some("ECONNRESET"), "{call:?}");
    let metrics = cluster.wait_for_metrics("n1", "nodemesh_tcp_connections_failed", |metrics| {
        metrics.failed("source", "max_connections") == 1
    })?;
    let flags = [("reason", "max_connections"), ("response_flags", "OVERFLOW"), ("destination_service_name", "server")];
    assert_eq!(metrics.count("nodemesh_tcp_connections_failed_total", &flags), 1, "{}", metrics.text());
    assert_eq!(metrics.count("nodemesh_balance_exhausted_total", &[("reason", "max_connections")]), 1);
    // Those that are there go on, and make room when they end.
    held.wait()?.success()?;
    wait::until_ok("there is room again", BOUND, || {
        let call = cluster.attempt("client", &["call", "blocking", &vip])?;
        ensure!(call.ok, "{call:?}");
        Ok(())
    })
}

#[test]
fn attempts_above_the_limit_are_shed_while_a_replica_does_not_answer() -> Result<()> {
    let cluster = pair("pending", |catalog| {
        let policy = catalog.traffic("server");
        policy.set("limits", json!({"maxPending": 2})).set("retry", json!({"attempts": 0}));
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    cluster.world.pod("server").namespace().ip(&["link set dev lo down".into()])?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let output =
        Program::probe(["churn", &vip, "--count", "8", "--rate", "100"]).run_in(cluster.world.pod("client"))?;
    let report: Churn = output.json()?;
    assert_eq!((report.connections, report.failed), (0, 8), "{report:?}");
    cluster.wait_for_metrics("n1", "nodemesh_tcp_connections_failed", |metrics| {
        metrics.failed("source", "max_pending") == 6
    })?;
    Ok(())
}

#[test]
fn silent_connections_end_and_others_go_on() -> Result<()> {
    let cluster = pair("idle", |catalog| {
        catalog.traffic("server").set("timeouts", json!({"idle": "1s"}));
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let busy = cluster.hold("client", ["--chatter", &vip])?;
    let silent = cluster.hold("client", ["--count", "3", &vip])?;
    cluster.wait_for_metrics("n1", "nodemesh_tcp_connections_failed", |metrics| {
        metrics.failed("source", "idle_timeout") == 3
    })?;
    cluster.wait_for_metrics("n2", "nodemesh_tcp_connections_failed", |metrics| {
        metrics.failed("destination", "idle_timeout") == 3
    })?;
    assert!(!silent.wait()?.status.success(), "its connections were ended");
    busy.wait()?.success()?;
    assert_eq!(cluster.daemon("n1").metrics()?.failed("source", "idle_timeout"), 3);
    Ok(())
}

/// Starts a web server in a pod.
fn web(cluster: &Cluster, pod: &str) -> Result<Running> {
    let mut web = Program::probe(["web", "--port", "8080", "--name", pod]).start_in(cluster.world.pod(pod))?;
    web.wait_for_listener(8080)?;
    Ok(web)
}

fn get(cluster: &Cluster, url: &str) -> Result<String> {
    let curl = Program::new("curl").args(["--silent", "--show-error", "--fail", "--max-time", "10", url]);
    Ok(curl.run_in(cluster.world.pod("client"))?.success()?.stdout)
}

#[test]
fn a_replica_that_fails_its_health_check_is_left_alone_until_it_passes() -> Result<()> {
    let topology = World::named("health").node("n1").pod("client").node("n2").pod("a").node("n3").pod("b");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("web", 80, 8080);
        for replica in ["a", "b"] {
            catalog.workload(replica).of_app("web");
        }
        let check = json!({
            "http": {"path": "/health"}, "interval": "200ms", "timeout": "200ms", "unhealthyAfter": 2, "healthyAfter": 2,
        });
        catalog.traffic("web").set("healthCheck", check);
    })?;
    let (a, _b) = (web(&cluster, "a")?, web(&cluster, "b")?);
    let url = format!("http://{}/", cluster.catalog.vips("web")[0]);
    let answers_of_a = || {
        get(&cluster, &url).and_then(|name| {
            ensure!(name == "a", "{name} answers");
            Ok(())
        })
    };
    wait::until_ok("a is asked", BOUND, answers_of_a)?;
    a.signal(Signal::USR1)?;
    let unhealthy = [("state", "unhealthy")];
    // At both of its addresses.
    cluster.wait_for_metrics("n2", "nodemesh_health", |metrics| {
        metrics.count("nodemesh_health_endpoints", &unhealthy) == 2
    })?;
    let asked = a.printed().lines().count();
    for _ in 0..40 {
        assert_eq!(get(&cluster, &url)?, "b");
    }
    assert_eq!(a.printed().lines().count(), asked, "{}", a.printed());
    let metrics = cluster.daemon("n1").metrics()?;
    ensure!(metrics.count("nodemesh_balance_retries_total", &[("reason", "unhealthy")]) > 0, "{}", metrics.text());
    assert_eq!(metrics.count("nodemesh_tcp_connections_failed_total", &[]), 0, "{}", metrics.text());
    let probes = cluster.daemon("n2").metrics()?;
    ensure!(probes.count("nodemesh_health_checks_total", &[("result", "status")]) >= 2, "{}", probes.text());
    // It recovers.
    a.signal(Signal::USR2)?;
    wait::until_ok("a is asked again", BOUND, answers_of_a)?;
    cluster.wait_for_metrics("n2", "nodemesh_health", |metrics| {
        metrics.count("nodemesh_health_endpoints", &unhealthy) == 0
    })?;
    Ok(())
}

#[test]
fn a_replica_that_says_not_serving_over_grpc_is_left_alone_until_it_serves() -> Result<()> {
    let topology = World::named("health-grpc").node("n1").pod("client").node("n2").pod("a").node("n3").pod("b");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("shop", 80, 8080);
        for replica in ["a", "b"] {
            catalog.workload(replica).of_app("shop");
        }
        let check = json!({
            "grpc": {"service": "shop.Cart"}, "interval": "200ms", "timeout": "200ms", "unhealthyAfter": 2,
            "healthyAfter": 2,
        });
        catalog.traffic("shop").algorithm("RoundRobin").set("healthCheck", check);
    })?;
    let serve = |pod: &str| -> Result<Running> {
        let program = Program::probe(["grpc", "serve", "--port", "8080", "--service", "shop.Cart"]);
        let mut server = program.start_in(cluster.world.pod(pod))?;
        server.wait_for_listener(8080)?;
        Ok(server)
    };
    let (a, b) = (serve("a")?, serve("b")?);
    let vip = cluster.catalog.vips("shop")[0].to_string();
    let check = || -> Result<()> {
        let asked = Program::probe(["grpc", "check", &vip]).run_in(cluster.world.pod("client"))?.success()?;
        assert_eq!(asked.stdout.trim_end(), "SERVING");
        Ok(())
    };
    // Probes come from the endpoint's own address.
    let client = format!("asked by {}", cluster.world.pod("client").v4());
    let asked = |server: &Running| server.printed().lines().filter(|line| *line == client).count();
    wait::until_ok("a is asked", BOUND, || {
        check()?;
        ensure!(asked(&a) > 0, "{}", a.printed());
        Ok(())
    })?;
    cluster.wait_for_metrics("n2", "nodemesh_health", |metrics| {
        metrics.count("nodemesh_health_checks_total", &[("result", "healthy")]) >= 2
    })?;
    a.signal(Signal::USR1)?;
    let unhealthy = |count| {
        cluster.wait_for_metrics("n2", "nodemesh_health", |metrics| {
            metrics.count("nodemesh_health_endpoints", &[("state", "unhealthy")]) == count
        })
    };
    // At both of its addresses.
    unhealthy(2)?;
    let before = (asked(&a), asked(&b));
    for _ in 0..20 {
        check()?;
    }
    assert_eq!((asked(&a), asked(&b)), (before.0, before.1 + 20));
    let metrics = cluster.daemon("n1").metrics()?;
    ensure!(metrics.count("nodemesh_balance_retries_total", &[("reason", "unhealthy")]) > 0, "{}", metrics.text());
    assert_eq!(metrics.count("nodemesh_tcp_connections_failed_total", &[]), 0, "{}", metrics.text());
    let probes = cluster.daemon("n2").metrics()?;
    ensure!(probes.count("nodemesh_health_checks_total", &[("result", "status")]) >= 2, "{}", probes.text());
    a.signal(Signal::USR2)?;
    unhealthy(0)?;
    wait::until_ok("a is asked again", BOUND, || {
        check()?;
        ensure!(asked(&a) > before.0, "{}", a.printed());
        Ok(())
    })
}

#[test]
fn endpoints_are_listed_with_their_state() -> Result<()> {
    let cluster = pair("listed", |_| {})?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let held = cluster.hold("client", ["--count", "3", &vip])?;
    let rows: Value = cluster.document("n1", &["get", "endpoints"])?;
    let row = rows["items"].as_array().context("rows")?.iter().find(|row| row["frontend"] == vip.as_str());
    let row = row.with_context(|| format!("{rows}"))?;
    assert_eq!((&row["service"], &row["workload"]), (&json!("default/server"), &json!("default/server")), "{row}");
    assert_eq!((&row["state"], &row["open"], &row["pending"]), (&json!("ready"), &json!(3), &json!(0)), "{row}");
    held.wait()?.success()?;
    Ok(())
}
