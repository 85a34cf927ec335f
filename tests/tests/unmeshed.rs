//! Destinations outside of the mesh are none of its business: connections to them stay in the kernel, untouched,
//! whether the daemon runs, has been stopped, or was killed.

use anyhow::{Context, Result};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Call;
use mesh_tests::scrape::Change;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::{IpAddr, SocketAddr};

/// `client` on n1; on n2 `server` (meshed), `excluded` (meshed, in an excluded range) and `plain` (not in the catalog).
/// Each of the three runs an echo server on port 8080.
fn start(name: &str) -> Result<(Cluster, Vec<Running>)> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pods(&["server", "excluded", "plain"]);
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
        assert!(catalog.remove("plain"));
        let excluded: Vec<String> = catalog.workload("excluded").addresses.iter().map(IpAddr::to_string).collect();
        catalog.mesh(
            "excludeCIDRs",
            excluded
                .iter()
                .map(|ip| if ip.contains(':') { format!("{ip}/128") } else { format!("{ip}/32") })
                .collect::<Vec<_>>(),
        );
    })?;
    let echoes = ["server", "excluded", "plain"].into_iter().map(|pod| {
        let mut echo = Program::probe(["echo", "--port", "8080", "--greet"]).start_in(cluster.world.pod(pod))?;
        echo.wait_for_listener(8080)?;
        Ok(echo)
    });
    let echoes = echoes.collect::<Result<_>>()?;
    cluster.wait_until_served("client", "server")?;
    Ok((cluster, echoes))
}

/// Calls a pod by its own address; the two ends must agree about both addresses and ports: nothing is in between.
fn call_directly(cluster: &Cluster, from: &str, to: &str) -> Result<()> {
    for address in cluster.world.pod(to).addresses() {
        let destination = SocketAddr::new(address, 8080).to_string();
        let call: Call = cluster.attempt(from, &["call", "blocking", &destination, "--greet"])?;
        let greeting = call.greeting.as_ref().with_context(|| format!("{from} to {to}: {call:?}"))?;
        assert_eq!(call.getpeername.as_ref(), Some(&destination));
        assert_eq!(greeting.local, destination);
        assert_eq!(call.getsockname.as_ref(), Some(&greeting.peer), "somebody is in between");
    }
    Ok(())
}

/// Nothing of this ever reached the daemon.
fn assert_untouched(change: &Change) {
    for (hook, reason) in [("connect", "captured"), ("sock_ops", "recorded"), ("getpeername", "rewritten")] {
        assert_eq!(change.outcome(hook, reason), 0, "{hook}/{reason}: {:?}", change.outcomes());
    }
    for reporter in ["source", "destination"] {
        assert_eq!(change.of(|metrics| metrics.opened(reporter)), 0);
    }
}

#[test]
fn a_connection_to_an_unmeshed_destination_never_enters_user_space() -> Result<()> {
    let (mut cluster, _echoes) = start("outside")?;
    let ((), change) = cluster.daemon("n1").change_during(|| call_directly(&cluster, "client", "plain"))?;
    assert_eq!(change.outcome("connect", "unmeshed"), 2, "{:?}", change.outcomes());
    assert_untouched(&change);

    let ((), change) = cluster.daemon("n1").change_during(|| call_directly(&cluster, "client", "excluded"))?;
    assert_eq!(change.outcome("connect", "excluded"), 2, "{:?}", change.outcomes());
    assert_untouched(&change);

    // Killed: the programs stay, without anybody behind them. What they count meanwhile is there for the next daemon.
    let before = cluster.daemon("n1").metrics()?;
    cluster.daemon_mut("n1").kill()?;
    call_directly(&cluster, "client", "plain")?;
    call_directly(&cluster, "client", "excluded")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let meshed = cluster.attempt("client", &["call", "blocking", &vip])?;
    assert_eq!(meshed.errno.as_deref(), Some("ECONNREFUSED"), "nobody is there to carry it: {meshed:?}");
    cluster.daemon_mut("n1").start()?;
    let change = Change { before, after: cluster.daemon("n1").metrics()? };
    assert_eq!(change.outcome("connect", "unmeshed"), 2, "{:?}", change.outcomes());
    assert_eq!(change.outcome("connect", "excluded"), 2, "{:?}", change.outcomes());
    cluster.wait_until_served("client", "server")?;

    // Stopped: there is no program left to ask.
    assert!(cluster.daemon_mut("n1").stop()?.success());
    call_directly(&cluster, "client", "plain")?;
    call_directly(&cluster, "client", "excluded")?;
    Ok(())
}

#[test]
fn a_range_that_becomes_excluded_is_left_alone_from_then_on() -> Result<()> {
    let (mut cluster, _echoes) = start("ranges")?;
    let n1 = |cluster: &Cluster| cluster.daemon("n1").metrics();
    let destination = SocketAddr::new(cluster.world.pod("server").v4().into(), 8080).to_string();
    let (call, change) = cluster
        .daemon("n1")
        .change_during(|| cluster.attempt("client", &["call", "blocking", &destination, "--greet"]))?;
    assert!(call.ok, "{call:?}");
    assert_eq!(change.outcome("connect", "captured"), 1, "{:?}", change.outcomes());

    let node = cluster.world.pod("server").v4().octets();
    cluster.catalog.mesh("excludeCIDRs", vec![format!("{}.{}.{}.0/24", node[0], node[1], node[2])]);
    cluster.catalog.write()?;
    wait::until("the range is excluded", BOUND, || {
        let before = n1(&cluster).ok()?;
        let call = cluster.attempt("client", &["call", "blocking", &destination, "--greet"]).ok()?;
        let change = Change { before, after: n1(&cluster).ok()? };
        (call.ok && change.outcome("connect", "excluded") == 1).then_some(())
    })?;
    // The service's virtual addresses are outside of the range and stay in the mesh.
    let vip = cluster.catalog.vips("server")[0].to_string();
    let (call, change) =
        cluster.daemon("n1").change_during(|| cluster.attempt("client", &["call", "blocking", &vip, "--greet"]))?;
    assert!(call.ok, "{call:?}");
    assert_eq!(change.outcome("connect", "captured"), 1, "{:?}", change.outcomes());
    Ok(())
}

#[test]
fn a_pods_calls_to_itself_and_those_of_unmeshed_pods_are_left_alone() -> Result<()> {
    let (cluster, _echoes) = start("selves")?;
    let n2 = cluster.daemon("n2");
    // Itself, by its own address.
    let ((), change) = n2.change_during(|| call_directly(&cluster, "server", "server"))?;
    assert_eq!(change.outcome("connect", "self"), 2, "{:?}", change.outcomes());
    assert_eq!(change.outcome("sk_lookup", "self"), 2, "{:?}", change.outcomes());
    assert_untouched(&change);
    // Itself, by loopback.
    let ((), change) = n2.change_during(|| {
        for destination in ["127.0.0.1:8080", "[::1]:8080"] {
            let call = cluster.attempt("server", &["call", "blocking", destination, "--greet"])?;
            assert_eq!(call.getsockname, call.greeting.as_ref().map(|greeting| greeting.peer.clone()), "{call:?}");
        }
        Ok(())
    })?;
    assert_eq!(change.outcome("connect", "loopback"), 2, "{:?}", change.outcomes());
    assert_untouched(&change);
    // An unmeshed pod below the same control group; permissive workloads take its plaintext.
    let ((), change) = n2.change_during(|| call_directly(&cluster, "plain", "server"))?;
    assert_eq!(change.outcome("connect", "not_workload"), 2, "{:?}", change.outcomes());
    assert_eq!(change.outcome("sk_lookup", "plaintext"), 2, "{:?}", change.outcomes());
    assert_untouched(&change);
    Ok(())
}
