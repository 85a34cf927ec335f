//! Daemons that are told to stop.

use crate::{Footprints, call, is_mounted, pins};
use anyhow::Result;
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::kernel::Pinned;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use rustix::process::Signal;
use serde_json::json;
use std::fs;
use std::net::SocketAddr;

/// Starts a pair that waits long enough for what drains.
fn patient_pair(name: &str) -> Result<Cluster> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    let describe = |catalog: &mut Catalog| {
        catalog.service("server", 80, 8080);
    };
    Cluster::start_with(topology, describe, |config| config["drain"] = json!("30s"))
}

fn drain_scenario(node: &str) -> Result<()> {
    let mut cluster = patient_pair("drain")?;
    let vip = cluster.catalog.vips("server")[0];
    let _echo = cluster.serve("server", 8080, &[])?;
    let running = cluster.hold("client", [&vip.to_string(), "--count", "4", "--chatter"])?;
    assert_eq!(cluster.outcome("n1", "connect", "captured")?, 4);
    assert_eq!(cluster.daemon(node).get("/readyz")?.status, 200);

    cluster.daemon(node).signal(Signal::TERM)?;
    wait::until("it turns unready", BOUND, || {
        let response = cluster.daemon(node).get("/readyz").ok()?;
        (response.status == 503 && response.body.contains("draining")).then_some(())
    })?;
    if node == "n2" {
        // Nothing new is taken; the caller is told at once.
        let refused = call(&cluster, "client", vip)?;
        assert_eq!(refused.errno.as_deref(), Some("ECONNRESET"), "{refused:?}");
        let refusals = cluster.daemon("n1").metrics()?;
        let reason = [("reason", "draining")];
        assert!(refusals.count("nodemesh_tcp_connections_failed_total", &reason) >= 1, "{}", refusals.text());
    }
    // What was running goes on to its own end, every byte of it.
    let call: Call = running.wait()?.success()?.json()?;
    assert_eq!(call.connections, 4);
    let status = cluster.daemon_mut(node).wait(BOUND)?;
    assert!(status.success(), "{status}: {}", cluster.daemon(node).log_end());
    Ok(())
}

#[test]
fn a_draining_source_lets_connections_end_by_themselves() -> Result<()> {
    drain_scenario("n1")
}

#[test]
fn a_draining_destination_lets_connections_end_by_themselves() -> Result<()> {
    drain_scenario("n2")
}

#[test]
fn a_stopped_daemon_leaves_nothing_behind() -> Result<()> {
    let topology = World::named("nothing").node("n1").pod("client").node("n2").pod("server");
    let world = topology.build()?;
    let untouched = Footprints::of_world(&world)?;
    drop(world);

    let topology = World::named("nothing").node("n1").pod("client").node("n2").pod("server");
    let describe = |catalog: &mut Catalog| {
        catalog.service("server", 80, 8080);
    };
    let mut cluster = Cluster::start_with(topology, describe, |config| config["drain"] = json!("200ms"))?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    // One that does not end by itself must not hold it up.
    let vip = cluster.catalog.vips("server")[0];
    let held = cluster.hold("client", [&vip.to_string(), "--chatter"])?;
    let armed = Footprints::of_world(&cluster.world)?;
    assert_eq!(armed[..2], untouched[..2], "a daemon changes nothing in its node's own namespace");
    assert!(armed[2..].iter().all(|pod| pod.has_listener && pod.rules.contains("1337")), "{armed:?}");
    for node in ["n1", "n2"] {
        let daemon = cluster.daemon_mut(node);
        let pinned = Pinned::below(&pins(daemon))?;
        assert_eq!((pinned.links.len(), pinned.maps.len()), (11, mesh_common::maps::ALL.len()), "{pinned:?}");
        assert!(is_mounted(daemon.bpffs())? && daemon.socket().exists());
        let status = daemon.stop()?;
        assert!(status.success(), "{status}: {}", daemon.log_end());
        wait::until(&format!("the kernel has nothing of {node}: {pinned:?}"), BOUND, || {
            pinned.left().is_empty().then_some(())
        })?;
        assert!(!is_mounted(daemon.bpffs())? && !daemon.socket().exists());
        assert_eq!(fs::read_dir(daemon.bpffs())?.count(), 0);
    }
    assert_eq!(Footprints::of_world(&cluster.world)?, untouched);
    assert!(!held.wait()?.status.success(), "it was cut");
    // Applications find each other without the mesh now.
    let direct = SocketAddr::new(cluster.world.pod("server").v4().into(), 8080);
    assert!(call(&cluster, "client", direct)?.ok);
    // And with it again.
    for node in ["n1", "n2"] {
        cluster.daemon_mut(node).start()?;
    }
    cluster.wait_until_served("client", "server")
}
