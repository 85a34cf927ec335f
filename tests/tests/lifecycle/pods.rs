//! Pods that come and go while the daemons run.

use crate::{Footprints, holds_namespace, wait_for_state, wait_until_refused};
use anyhow::Result;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::Place;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use std::fs;
use std::os::unix::fs::MetadataExt;

#[test]
fn a_pod_taken_out_of_the_catalog_is_let_go_and_may_come_back() -> Result<()> {
    let mut cluster = Cluster::pair("removed")?;
    let vip = cluster.catalog.vips("server")[0];
    let pids = [cluster.daemon("n1").pid()?, cluster.daemon("n2").pid()?];
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let held = cluster.hold("client", [&vip.to_string()])?;
    assert!(Footprints::of(cluster.world.pod("server").namespace())?.has_listener);

    cluster.catalog.remove("server");
    cluster.catalog.write()?;
    let namespace = cluster.world.pod("server").namespace();
    wait::until("the daemon leaves the pod's namespace as it was", BOUND, || {
        let left = Footprints::of(namespace).ok()?;
        let untouched = !left.has_listener && !left.sysctls.contains('1');
        (untouched && !left.rules.contains("1337") && !left.routes.contains("1337")).then_some(())
    })?;
    let broken: Call = held.wait()?.json()?;
    assert!(!broken.ok, "a connection to a workload that is gone must end: {broken:?}");
    wait_until_refused(&cluster, "client", vip)?;
    assert!(cluster.outcome("n1", "connect", "no_endpoints")? > 0);

    let inode = fs::metadata(namespace.path())?.ino();
    let link = cluster.world.remove_pod("server")?;
    let node = cluster.world.node("n2");
    wait::until("the namespace disappears", BOUND, || (!node.has_link(&link).ok()?).then_some(()))?;
    for pid in pids {
        assert!(!holds_namespace(pid, inode)?);
    }

    let pod = cluster.world.add_pod("n2", "server")?;
    cluster.catalog.add(pod, None);
    cluster.catalog.write()?;
    let _echo = cluster.serve("server", 8080, &["--greet", "--name", "again"])?;
    wait::until_ok("the new pod is reached", BOUND, || {
        cluster.run_probe("client", ["call", "blocking", &vip.to_string(), "--greet"])
    })?;
    let captured = cluster.outcome("n1", "connect", "captured")?;
    let many = cluster.run_probe("client", ["many", &vip.to_string(), "--greet", "--count", "100"])?;
    assert_eq!((many.connections, many.servers["again"]), (100, 100));
    assert_eq!(cluster.outcome("n1", "connect", "captured")? - captured, 100);
    assert_eq!([cluster.daemon("n1").pid()?, cluster.daemon("n2").pid()?], pids);
    Ok(())
}

#[test]
fn a_namespace_that_vanishes_by_itself_is_released_and_found_again() -> Result<()> {
    let mut cluster = Cluster::pair("vanished")?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    // On the way out as on the way in, and with connections open.
    for (node, pod) in [("n1", "client"), ("n2", "server")] {
        let vip = cluster.catalog.vips("server")[0].to_string();
        let held = cluster.hold("client", [&vip, "--count", "3"])?;
        let pid = cluster.daemon(node).pid()?;
        let inode = fs::metadata(cluster.world.pod(pod).namespace().path())?.ino();
        let link = cluster.world.remove_pod(pod)?;
        wait::until(&format!("the namespace of {pod} disappears"), BOUND, || {
            (!cluster.world.node(node).has_link(&link).ok()?).then_some(())
        })?;
        assert!(!holds_namespace(pid, inode)?);
        let row = wait_for_state(&cluster, node, pod, "failed")?;
        assert!(row.reason.is_some_and(|reason| reason.contains("network namespace")), "it must say why");
        drop(held);
        // A new one at the same place, with other addresses.
        let pod = cluster.world.add_pod(node, pod)?;
        cluster.catalog.add(pod, None);
        cluster.catalog.write()?;
        let name = pod.name().to_owned();
        wait_for_state(&cluster, node, &name, "armed")?;
        let _echo = match name.as_str() {
            "server" => Some(cluster.serve("server", 8080, &[])?),
            _ => None,
        };
        cluster.wait_until_served("client", "server")?;
    }
    assert!(cluster.outcome("n1", "connect", "captured")? > 0);
    Ok(())
}

/// A place is only good for a running world: catches a scenario that would run in the machine's own namespace.
#[test]
fn daemons_run_in_their_nodes_and_not_in_the_machines_namespace() -> Result<()> {
    let cluster = Cluster::pair("placed")?;
    let own = fs::metadata("/proc/self/ns/net")?.ino();
    for daemon in cluster.daemons() {
        let theirs = fs::metadata(format!("/proc/{}/ns/net", daemon.pid()?))?.ino();
        assert_ne!(theirs, own);
        let place: &Place = daemon.place();
        assert_eq!(theirs, fs::metadata(&place.namespace)?.ino());
    }
    Ok(())
}
