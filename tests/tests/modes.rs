//! What a workload's mode does to plaintext from outside: STRICT refuses it, PERMISSIVE counts it, and the daemon's
//! own listener is nobody else's.

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Call;
use mesh_tests::scrape::Change;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::SocketAddr;

/// Meshed: `client` on n1, `strict` and `open` (permissive) on n2. Not in the catalog: `outsider` on n1, `neighbour`
/// on n2. `strict` takes plaintext on port 9090 only, `open` everywhere but there.
fn start(name: &str) -> Result<(Cluster, Vec<Running>)> {
    let topology =
        World::named(name).node("n1").pods(&["client", "outsider"]).node("n2").pods(&["strict", "open", "neighbour"]);
    let cluster = Cluster::start(topology, |catalog| {
        assert!(catalog.remove("outsider") && catalog.remove("neighbour"));
        catalog.service("strict", 80, 8080);
        catalog.service("open", 80, 8080);
        catalog.workload("strict").mode("strict").port_modes.insert(9090, "permissive".to_owned());
        catalog.workload("open").mode("permissive").port_modes.insert(9090, "strict".to_owned());
    })?;
    let mut echoes = Vec::new();
    for pod in ["strict", "open"] {
        for port in [8080, 9090] {
            let arguments = ["echo", "--port", &port.to_string(), "--greet"];
            let mut echo = Program::probe(arguments).start_in(cluster.world.pod(pod))?;
            echo.wait_for_listener(port)?;
            echoes.push(echo);
        }
        cluster.wait_until_served("client", pod)?;
    }
    Ok((cluster, echoes))
}

/// Calls a pod by both of its addresses.
fn calls(cluster: &Cluster, from: &str, to: &str, port: u16) -> Result<Vec<Call>> {
    let addresses = cluster.world.pod(to).addresses().map(|ip| SocketAddr::new(ip, port).to_string());
    addresses.iter().map(|destination| cluster.attempt(from, &["call", "blocking", destination, "--greet"])).collect()
}

/// Every call is refused at once, by the hook and for this reason.
fn assert_refused(cluster: &Cluster, from: &str, to: &str, port: u16, reason: &str) -> Result<()> {
    let (calls, change) = cluster.daemon("n2").change_during(|| calls(cluster, from, to, port))?;
    for call in &calls {
        ensure!(call.errno.as_deref() == Some("ECONNREFUSED"), "{from} to {to}:{port}: {call:?}");
    }
    assert_eq!(change.outcome("sk_lookup", reason), 2, "{from} to {to}:{port}: {:?}", change.outcomes());
    assert_eq!(change.of(|metrics| metrics.opened("destination")), 0);
    Ok(())
}

/// Every call arrives, past the hook and for this reason.
fn assert_admitted(cluster: &Cluster, from: &str, to: &str, port: u16, reason: &str) -> Result<()> {
    let (calls, change) = cluster.daemon("n2").change_during(|| calls(cluster, from, to, port))?;
    for call in &calls {
        ensure!(call.ok, "{from} to {to}:{port}: {call:?}");
    }
    assert_eq!(change.outcome("sk_lookup", reason), 2, "{from} to {to}:{port}: {:?}", change.outcomes());
    Ok(())
}

#[test]
fn strict_refuses_plaintext_and_permissive_counts_it() -> Result<()> {
    let (cluster, _echoes) = start("modes")?;
    for outsider in ["outsider", "neighbour"] {
        assert_refused(&cluster, outsider, "strict", 8080, "strict")?;
        assert_admitted(&cluster, outsider, "open", 8080, "plaintext")?;
        // A port's own mode goes before the workload's.
        assert_admitted(&cluster, outsider, "strict", 9090, "plaintext")?;
        assert_refused(&cluster, outsider, "open", 9090, "strict")?;
    }
    for pod in ["strict", "open"] {
        for port in [8080, 9090] {
            assert_admitted(&cluster, "client", pod, port, "authenticated")?;
        }
    }
    Ok(())
}

#[test]
fn the_daemons_listener_is_unreachable_from_outside() -> Result<()> {
    let (cluster, _echoes) = start("listener")?;
    for outsider in ["outsider", "neighbour"] {
        for pod in ["strict", "open"] {
            assert_refused(&cluster, outsider, pod, 15001, "mesh_port")?;
        }
    }
    // From inside, the listener takes the connection and the daemon resets it: nobody has recorded where it goes.
    for own in cluster.world.pod("open").addresses() {
        let destination = SocketAddr::new(own, 15001).to_string();
        let (call, change) =
            cluster.daemon("n2").change_during(|| cluster.attempt("open", &["call", "blocking", &destination]))?;
        assert_eq!(call.errno.as_deref(), Some("ECONNRESET"), "{call:?}");
        assert_eq!(change.of(|metrics| metrics.failed("source", "no_original_destination")), 1);
    }
    Ok(())
}

#[test]
fn a_change_of_mode_takes_effect_at_run_time() -> Result<()> {
    let (mut cluster, _echoes) = start("change")?;
    let outsider_gets_in = |cluster: &Cluster, pod: &str| -> Result<bool> {
        Ok(calls(cluster, "outsider", pod, 8080)?.iter().all(|call| call.ok))
    };
    for (mode, gets_in) in [("strict", false), ("permissive", true), ("strict", false), ("disabled", true)] {
        cluster.catalog.workload("open").mode(mode);
        cluster.catalog.write()?;
        let what = format!("plaintext for a workload that became {mode}: {gets_in}");
        wait::until(&what, BOUND, || (outsider_gets_in(&cluster, "open").ok()? == gets_in).then_some(()))?;
        // The other one is not concerned.
        assert_refused(&cluster, "outsider", "strict", 8080, "strict")?;
    }
    // A disabled workload is no longer guarded, captured, or a service's endpoint; it is called as any other address.
    let (calls, change) = cluster.daemon("n1").change_during(|| calls(&cluster, "client", "open", 8080))?;
    assert!(calls.iter().all(|call| call.ok && call.getsockname == call.greeting.as_ref().map(|g| g.peer.clone())));
    assert_eq!(change.outcome("connect", "unmeshed"), 2, "{:?}", change.outcomes());
    Ok(())
}

#[test]
fn the_meshs_own_mode_holds_for_workloads_that_state_none() -> Result<()> {
    let topology = World::named("default").node("n1").pods(&["client", "outsider"]).node("n2").pod("server");
    let mut cluster = Cluster::start(topology, |catalog| {
        assert!(catalog.remove("outsider"));
        catalog.service("server", 80, 8080);
        catalog.mesh("mode", "strict");
    })?;
    let mut echo = Program::probe(["echo", "--port", "8080", "--greet"]).start_in(cluster.world.pod("server"))?;
    echo.wait_for_listener(8080)?;
    cluster.wait_until_served("client", "server")?;
    assert_refused(&cluster, "outsider", "server", 8080, "strict")?;
    cluster.catalog.mesh("mode", "permissive");
    cluster.catalog.write()?;
    wait::until("the mesh is permissive", BOUND, || {
        calls(&cluster, "outsider", "server", 8080).ok()?.iter().all(|call| call.ok).then_some(())
    })?;
    assert_admitted(&cluster, "outsider", "server", 8080, "plaintext")
}

#[test]
fn strict_stays_closed_when_the_daemon_is_killed() -> Result<()> {
    let (mut cluster, _echoes) = start("fail-closed")?;
    let before = cluster.daemon("n2").metrics()?;
    cluster.daemon_mut("n2").kill()?;
    for call in calls(&cluster, "outsider", "strict", 8080)? {
        assert_eq!(call.errno.as_deref(), Some("ECONNREFUSED"), "{call:?}");
    }
    assert!(calls(&cluster, "outsider", "open", 8080)?.iter().all(|call| call.ok));
    cluster.daemon_mut("n2").start()?;
    let change = Change { before, after: cluster.daemon("n2").metrics()? };
    assert_eq!(change.outcome("sk_lookup", "strict"), 2, "{:?}", change.outcomes());
    assert_eq!(change.outcome("sk_lookup", "plaintext"), 2, "{:?}", change.outcomes());
    Ok(())
}
