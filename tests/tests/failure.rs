//! Destinations that cannot be reached: the client is reset at once, and log and counters of both sides say why.
//! (connect() itself has succeeded by then: it ends at the daemon's listener. Only what is known to be empty refuses.)

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::scrape::Change;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use serde_json::Value;

/// Short enough to wait for, in a configuration file.
const CONNECT_TIMEOUT: &str = "1s";

/// `client` on n1, `server` on n2, no server running; access logs are JSON.
fn start(name: &str, transport: &str) -> Result<Cluster> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    Cluster::start_with(
        topology,
        |catalog| {
            catalog.mesh("transport", transport);
            catalog.service("server", 80, 8080);
        },
        |configuration| {
            configuration["log"]["format"] = "json".into();
            configuration["tunnel"]["connectTimeout"] = CONNECT_TIMEOUT.into();
        },
    )
}

fn serve(cluster: &Cluster, arguments: &[&str]) -> Result<Running> {
    let mut echo = Program::probe(["echo", "--port", "8080"]).args(arguments).start_in(cluster.world.pod("server"))?;
    echo.wait_for_listener(8080)?;
    Ok(echo)
}

/// A call is captured and then reset; the client's side counts and logs one failure, for this reason.
fn assert_reset(cluster: &Cluster, destination: &str, reason: &str) -> Result<()> {
    let n1 = cluster.daemon("n1");
    let before = n1.metrics()?;
    let logged = failures(&n1.log(), reason).len();
    let call = cluster.attempt("client", &["call", "blocking", destination])?;
    let context = || format!("{call:?}\n{}", n1.log_end());
    ensure!(call.errno.as_deref() == Some("ECONNRESET"), "{}", context());
    ensure!(call.getpeername.as_deref().is_none_or(|peer| peer == destination), "{}", context());
    let after = n1
        .wait_for_metrics(&format!("n1 counts {reason}"), |metrics| {
            metrics.failed("source", reason) > before.failed("source", reason)
        })
        .with_context(context)?;
    let change = Change { before, after };
    ensure!(change.outcome("connect", "captured") == 1, "{:?} {}", change.outcomes(), context());
    ensure!(change.of(|metrics| metrics.failed("source", reason)) == 1, "{}", context());
    let line = wait::until("the access log has the failure", BOUND, || {
        let lines = failures(&n1.log(), reason);
        (lines.len() > logged).then(|| lines.last().cloned()).flatten()
    })?;
    ensure!(line["dst.original_addr"] == destination && line["src.workload"] == "client", "{line}");
    ensure!(line["response_flags"] == "CONNECT" && line["error"].is_string(), "{line}");
    Ok(())
}

/// The access log's lines of outbound connections that failed for a reason.
fn failures(log: &str, reason: &str) -> Vec<Value> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines
        .filter(|line| line["target"] == "access" && line["direction"] == "outbound" && line["reason"] == reason)
        .collect()
}

#[test]
fn a_backend_that_refuses_resets_the_client_over_lanes() -> Result<()> {
    refuses("refuse-lanes", "lanes")
}

#[test]
fn a_backend_that_refuses_resets_the_client_over_quic() -> Result<()> {
    refuses("refuse-quic", "quic")
}

fn refuses(name: &str, transport: &str) -> Result<()> {
    let cluster = start(name, transport)?;
    let vips = cluster.catalog.vips("server").map(|vip| vip.to_string());
    for vip in &vips {
        let ((), arrival) = cluster.daemon("n2").change_during(|| assert_reset(&cluster, vip, "refused"))?;
        assert_eq!(arrival.of(|metrics| metrics.failed("destination", "application_refused")), 1);
        assert_eq!(arrival.outcome("sk_lookup", "authenticated"), 1, "{:?}", arrival.outcomes());
    }
    // Nothing is remembered against the backend.
    let _echo = serve(&cluster, &[])?;
    for vip in &vips {
        assert!(cluster.attempt("client", &["call", "blocking", vip])?.ok);
    }
    Ok(())
}

#[test]
fn a_backend_that_does_not_answer_resets_the_client() -> Result<()> {
    let cluster = start("silent", "lanes")?;
    let echo = serve(&cluster, &["--mode", "hold"])?;
    // A connection ends where the pod's own packets go no further.
    cluster.world.pod("server").namespace().ip(&["link set dev lo down".into()])?;
    for vip in cluster.catalog.vips("server") {
        let before = cluster.daemon("n2").metrics()?;
        let call = cluster.attempt("client", &["call", "blocking", &vip.to_string()])?;
        assert_eq!(call.errno.as_deref(), Some("ECONNRESET"), "{call:?}");
        let reasons = ["application_timeout", "application_unreachable"];
        cluster.daemon("n2").wait_for_metrics("n2 counts a backend that cannot be reached", |metrics| {
            reasons.iter().any(|reason| metrics.failed("destination", reason) > before.failed("destination", reason))
        })?;
        let reasons = ["timeout", "unreachable"];
        let found = reasons.iter().any(|reason| !failures(&cluster.daemon("n1").log(), reason).is_empty());
        assert!(found, "{}", cluster.daemon("n1").log_end());
    }
    drop(echo);
    Ok(())
}

#[test]
fn a_backend_whose_namespace_is_gone_resets_the_client() -> Result<()> {
    let mut cluster = start("vanished", "lanes")?;
    let echo = serve(&cluster, &[])?;
    cluster.wait_until_served("client", "server")?;
    drop(echo);
    // The catalog still has it.
    let link = cluster.world.remove_pod("server")?;
    wait::until("the namespace is released", BOUND, || {
        (!cluster.world.node("n2").has_link(&link).ok()?).then_some(())
    })?;
    for vip in cluster.catalog.vips("server") {
        assert_reset(&cluster, &vip.to_string(), "not_found")?;
    }
    Ok(())
}

#[test]
fn a_node_without_a_daemon_resets_clients_and_serves_them_again_when_it_is_back() -> Result<()> {
    let mut cluster = start("down", "lanes")?;
    let _hold = serve(&cluster, &["--mode", "hold"])?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    for kill in [true, false] {
        let open = Program::probe(["reset", &vip, "--by", "server"]).start_in(cluster.world.pod("client"))?;
        cluster.daemon("n2").wait_for_metrics("a connection is open", |metrics| {
            metrics.count("nodemesh_tcp_connections_active", &[("reporter", "destination")]) == 1
        })?;
        let n2 = cluster.daemon_mut("n2");
        if kill {
            n2.kill()?
        } else {
            n2.stop()?
        };
        // The connection that was open is reset, not left waiting.
        open.wait()?.success()?;
        assert_reset(&cluster, &vip, "dial")?;
        cluster.daemon_mut("n2").start()?;
    }
    Ok(())
}

#[test]
fn a_node_that_cannot_be_reached_resets_clients() -> Result<()> {
    for transport in ["lanes", "quic"] {
        let cluster = start(&format!("cut-{transport}"), transport)?;
        let echo = serve(&cluster, &[])?;
        cluster.world.switch().ip(&["link set dev n2 down".into()])?;
        assert_reset(&cluster, &cluster.catalog.vips("server")[0].to_string(), "timeout")?;
        cluster.world.switch().ip(&["link set dev n2 up".into()])?;
        cluster.wait_until_served("client", "server")?;
        drop(echo);
    }
    Ok(())
}

#[test]
fn a_service_without_endpoints_refuses_at_connect() -> Result<()> {
    let mut cluster = start("empty", "lanes")?;
    let _echo = serve(&cluster, &[])?;
    cluster.wait_until_served("client", "server")?;
    cluster.catalog.service("nobody", 80, 8080);
    cluster.catalog.remove("server");
    cluster.catalog.write()?;
    for service in ["nobody", "server"] {
        for vip in cluster.catalog.vips(service).map(|vip| vip.to_string()) {
            // Until the catalog has arrived it is an address like any other, or still served.
            let refused = || -> Result<Change> {
                let (call, change) = cluster.daemon("n1").change_during(|| {
                    cluster.attempt("client", &["call", "blocking", &vip, "--timeout-millis", "1000"])
                })?;
                ensure!(call.errno.as_deref() == Some("ECONNREFUSED"), "{call:?}");
                ensure!(change.outcome("connect", "no_endpoints") == 1, "{:?}", change.outcomes());
                Ok(change)
            };
            let change = wait::until_ok(&format!("{service} refuses at connect()"), BOUND, refused)?;
            assert_eq!(change.outcome("connect", "captured"), 0);
            assert_eq!(change.of(|metrics| metrics.opened("source")), 0);
        }
    }
    // Its endpoint is back.
    let server = cluster.world.pod("server");
    cluster.catalog.add(server, None);
    cluster.catalog.write()?;
    cluster.wait_until_served("client", "server")
}
