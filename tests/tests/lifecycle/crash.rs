//! Daemons that die or hang.

use crate::{Footprints, assert_refused, call, is_mounted, pins};
use anyhow::{Context, Result};
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::kernel::Pinned;
use mesh_tests::program::Program;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::net::SocketAddr;

#[test]
fn after_a_crash_the_kernel_refuses_and_the_next_start_takes_over() -> Result<()> {
    let topology = World::named("crash").node("n1").pods(&["client", "outsider"]).node("n2").pods(&["server", "gone"]);
    let mut cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
        catalog.workload("server").mode("strict");
        catalog.remove("outsider");
    })?;
    let vips = cluster.catalog.vips("server");
    let direct = cluster.world.pod("server").addresses().map(|address| SocketAddr::new(address, 8080));
    let _echo = cluster.serve("server", 8080, &[])?;
    let _plain = cluster.serve("outsider", 8080, &[])?;
    let unmeshed = SocketAddr::new(cluster.world.pod("outsider").v4().into(), 8080);
    cluster.wait_until_served("client", "server")?;
    for address in direct {
        assert_refused(&cluster, "outsider", address)?;
    }
    let strict = cluster.outcome("n2", "sk_lookup", "strict")?;
    assert!(strict >= 2);
    let held = cluster.hold("client", [&vips[0].to_string(), "--chatter"])?;

    let before = ["n1", "n2"].map(|node| Pinned::below(&pins(cluster.daemon(node))));
    for node in ["n1", "n2"] {
        cluster.daemon_mut(node).kill()?;
    }
    assert!(!held.wait()?.status.success(), "connections die with their daemon");
    // A client of the mesh is refused, not let through in plaintext; others are none of our business.
    for address in vips.into_iter().chain(direct) {
        assert_refused(&cluster, "client", address)?;
    }
    assert!(call(&cluster, "client", unmeshed)?.ok);
    for address in direct {
        assert_refused(&cluster, "outsider", address)?;
    }
    // A pod goes while nobody looks. Its link pins no namespace.
    cluster.catalog.remove("gone");
    cluster.catalog.write()?;
    let link = cluster.world.remove_pod("gone")?;
    let node = cluster.world.node("n2");
    wait::until("the pod's namespace disappears", BOUND, || (!node.has_link(&link).ok()?).then_some(()))?;

    for (node, before) in ["n1", "n2"].into_iter().zip(before) {
        let before = before?;
        cluster.daemon_mut(node).start()?;
        let after = Pinned::below(&pins(cluster.daemon(node)))?;
        assert_eq!(after.maps.len(), before.maps.len());
        let lost: Vec<_> = before.links.iter().filter(|old| after.links.iter().all(|new| new.id != old.id)).collect();
        let expected = usize::from(node == "n2");
        assert_eq!(lost.len(), expected, "only the link of the pod that is gone goes: {lost:?} of {before:?}");
        for new in &after.links {
            let old = before.links.iter().find(|old| old.name == new.name).context("a new link")?;
            assert_eq!(new.id, old.id, "the link stays, so that nothing escapes meanwhile");
            assert_ne!(new.program, old.program, "its program is the new daemon's");
        }
        let old = Pinned { maps: Vec::new(), links: before.links };
        wait::until("the old programs are gone", BOUND, || {
            let left = old.left();
            left.iter().all(|what| !what.contains("program")).then_some(())
        })?;
    }
    cluster.wait_until_served("client", "server")?;
    for address in direct {
        assert_refused(&cluster, "outsider", address)?;
    }
    assert!(cluster.outcome("n2", "sk_lookup", "strict")? >= strict + 4, "the counters went on through the crash");
    let status = cluster.status("n2")?;
    assert_eq!(status["workloads"], json!({"local": 1, "armed": 1, "failed": 0}));
    Ok(())
}

#[test]
fn a_daemon_that_hangs_refuses_new_connections_until_it_is_back() -> Result<()> {
    let topology = World::named("hang").node("n1").pod("client").node("n2").pod("server");
    let describe = |catalog: &mut Catalog| {
        catalog.service("server", 80, 8080);
    };
    let configure = |config: &mut Value| config["datapath"]["heartbeatTimeout"] = json!("1s");
    let cluster = Cluster::start_with(topology, describe, configure)?;
    let vip = cluster.catalog.vips("server")[0];
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    cluster.daemon("n1").signal(Signal::STOP)?;
    // Its listener still takes connections: only the hook can refuse.
    wait::until("the hook notices", BOUND, || {
        let arguments = ["call", "blocking", &vip.to_string(), "--timeout-millis", "300"];
        let call: Call = Program::probe(arguments).run_in(cluster.world.pod("client")).ok()?.json().ok()?;
        (call.errno.as_deref() == Some("ECONNREFUSED")).then_some(())
    })?;
    cluster.daemon("n1").signal(Signal::CONT)?;
    cluster.wait_until_served("client", "server")?;
    assert!(cluster.outcome("n1", "connect", "daemon_down")? > 0);
    Ok(())
}

#[test]
fn cleanup_removes_what_a_killed_daemon_left() -> Result<()> {
    let mut cluster = Cluster::pair("cleanup")?;
    let untouched = {
        let world = World::named("untouched").node("n1").pod("client").node("n2").pod("server").build()?;
        Footprints::of_world(&world)?
    };
    let mut kept = Vec::new();
    for node in ["n1", "n2"] {
        let daemon = cluster.daemon_mut(node);
        kept.push((daemon.bpffs().to_owned(), Pinned::below(&pins(daemon))?));
        daemon.kill()?;
        for _ in 0..2 {
            cluster.nodemeshd(node, "cleanup")?.success()?;
        }
    }
    for (bpffs, pinned) in kept {
        wait::until("the kernel has nothing left", BOUND, || pinned.left().is_empty().then_some(()))?;
        assert!(!is_mounted(&bpffs)?);
    }
    assert_eq!(Footprints::of_world(&cluster.world)?, untouched);
    let _echo = cluster.serve("server", 8080, &[])?;
    let direct = SocketAddr::new(cluster.world.pod("server").v4().into(), 8080);
    assert!(call(&cluster, "client", direct)?.ok);
    Ok(())
}
