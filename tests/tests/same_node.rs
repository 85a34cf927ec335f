//! Workloads of one node talk to each other as TCP that the kernel carries: admitted, refused, counted and cut like
//! what goes through the tunnel, and by no daemon.

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::policy::account;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Call;
use mesh_tests::scrape::Metrics;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::SocketAddr;

const PORT: u16 = 8080;

/// `client`, `other` and `server` (strict) on n1, `far` on n2; nothing of `outsider` on n1 is in the catalog.
fn start(name: &str) -> Result<(Cluster, Running)> {
    let pods = ["client", "other", "server", "outsider"];
    let topology = World::named(name).node("n1").pods(&pods).node("n2").pod("far");
    let cluster = Cluster::start(topology, |catalog| {
        assert!(catalog.remove("outsider"));
        catalog.service("server", 80, PORT);
        catalog.workload("server").mode("strict");
    })?;
    let echo = cluster.serve("server", PORT, &[])?;
    cluster.wait_until_served("client", "server")?;
    // What was called until everything was there, whichever way it went, is in the books.
    settle(&cluster)?;
    Ok((cluster, echo))
}

fn settle(cluster: &Cluster) -> Result<Metrics> {
    cluster.wait_for_metrics("n1", "nodemesh_tcp_connections", |metrics| {
        // Records gather before they are told: the kernel's own count says how many are to come.
        let admitted = metrics.outcome("sock_ops", "admitted");
        carried(metrics, "connections_opened", "source") >= admitted
            && metrics.count("nodemesh_tcp_connections_active", &[]) == 0
    })
}

fn addresses(cluster: &Cluster) -> Vec<String> {
    let own = cluster.world.pod("server").addresses().map(|ip| SocketAddr::new(ip, PORT));
    cluster.catalog.vips("server").into_iter().chain(own).map(|address| address.to_string()).collect()
}

fn call(cluster: &Cluster, from: &str, to: &str) -> Result<Call> {
    cluster.attempt(from, &["call", "blocking", to])
}

/// A counter of connections that the kernel carried, by reporter.
fn carried(metrics: &Metrics, what: &str, reporter: &str) -> u64 {
    let labels = [("reporter", reporter), ("connection_security_policy", "kernel")];
    metrics.count(&format!("nodemesh_tcp_{what}_total"), &labels)
}

#[test]
fn the_kernel_carries_what_stays_on_the_node_and_counts_its_bytes() -> Result<()> {
    let (cluster, _echo) = start("near")?;
    let daemon = cluster.daemon("n1");
    let before = daemon.metrics()?;
    let mut calls = Vec::new();
    for address in addresses(&cluster) {
        let call = call(&cluster, "client", &address)?;
        ensure!(call.ok, "{address}: {call:?}");
        calls.push(call);
    }
    let count = calls.len() as u64;
    let after = cluster.wait_for_metrics("n1", "nodemesh_tcp_connections", |metrics| {
        ["source", "destination"].iter().all(|reporter| {
            let closed = |metrics: &Metrics| carried(metrics, "connections_closed", reporter);
            closed(metrics) == closed(&before) + count
        })
    })?;
    let outcome = |hook, reason| after.outcome(hook, reason) - before.outcome(hook, reason);
    assert_eq!((outcome("connect", "same_node"), outcome("connect", "captured")), (count, 0));
    assert_eq!((outcome("sock_ops", "admitted"), outcome("sk_lookup", "same_node")), (count, count));
    let (sent, received) = (sum(&calls, |call| call.bytes_sent), sum(&calls, |call| call.bytes_received));
    for reporter in ["source", "destination"] {
        let change = |what| carried(&after, what, reporter) - carried(&before, what, reporter);
        assert_eq!(change("connections_opened"), count);
        // Sent is what the destination answers.
        assert_eq!((change("received_bytes"), change("sent_bytes")), (sent, received), "{reporter}");
    }
    let named = [
        ("source_workload", "client"),
        ("destination_workload", "server"),
        ("destination_service_name", "server"),
        ("connection_security_policy", "kernel"),
    ];
    ensure!(after.count("nodemesh_tcp_connections_opened_total", &named) > 0);
    assert_eq!(after.count("nodemesh_kernel_events_lost_total", &[]), 0);
    let accesses = daemon.accesses();
    ensure!(accesses.iter().any(|access| !access.failed()), "{accesses:?}");
    // From another node it comes through the tunnel.
    let far = call_from_far(&cluster)?;
    ensure!(far.ok, "{far:?}");
    Ok(())
}

fn call_from_far(cluster: &Cluster) -> Result<Call> {
    let vip = cluster.catalog.vips("server")[0].to_string();
    let (far, change) = cluster.daemon("n1").change_during(|| call(cluster, "far", &vip))?;
    assert_eq!(change.outcome("sk_lookup", "authenticated"), 1, "{:?}", change.outcomes());
    Ok(far)
}

fn sum(calls: &[Call], bytes: impl Fn(&Call) -> u64) -> u64 {
    calls.iter().map(bytes).sum()
}

#[test]
fn policy_holds_within_the_node_and_plaintext_is_kept_out() -> Result<()> {
    let (mut cluster, _echo) = start("held")?;
    for address in addresses(&cluster).into_iter().skip(2) {
        let stranger = call(&cluster, "outsider", &address)?;
        assert_eq!(stranger.errno.as_deref(), Some("ECONNREFUSED"), "{stranger:?}");
    }
    let mut held = cluster.hold("other", [cluster.catalog.vips("server")[0].to_string().as_str()])?;
    let allowed = cluster.hold("client", [cluster.catalog.vips("server")[0].to_string().as_str()])?;
    ensure!(held.is_running(), "{}", held.printed());
    // STRICT refuses plaintext whatever the rules say; the client is allowed by its identity.
    cluster.catalog.policy("callers").for_app("server").rule("client", &[account("client")], &[]);
    cluster.catalog.write()?;
    cluster.wait_for_metrics("n1", "nodemesh_policy", |metrics| {
        metrics.count("nodemesh_policy_connections_cut_total", &[("reason", "not_allowed")]) == 1
    })?;
    let cut: Call = held.wait()?.json()?;
    ensure!(!cut.ok, "{cut:?}");
    allowed.wait()?.success()?;
    for address in addresses(&cluster) {
        let refused = call(&cluster, "other", &address)?;
        assert_eq!(refused.errno.as_deref(), Some("EACCES"), "{address}: {refused:?}");
        let call = call(&cluster, "client", &address)?;
        ensure!(call.ok, "{address}: {call:?}");
    }
    wait::until("the access log tells who was cut and by what", BOUND, || {
        let accesses = cluster.daemon("n1").accesses();
        accesses.iter().any(|access| access.reason.as_deref() == Some("cut")).then_some(())
    })?;
    ensure!(cluster.catalog.remove_policy("callers"));
    cluster.catalog.write()?;
    wait::until_ok("the other is let in again", BOUND, || {
        let call = call(&cluster, "other", &addresses(&cluster)[0])?;
        ensure!(call.ok, "{call:?}");
        Ok(())
    })
}

#[test]
fn a_mesh_that_wants_the_tunnel_gets_it() -> Result<()> {
    let (mut cluster, _echo) = start("tunnel")?;
    cluster.catalog.same_node("Tunnel");
    cluster.catalog.write()?;
    for address in addresses(&cluster) {
        wait::until_ok("the daemon captures it", BOUND, || {
            let (called, change) = cluster.daemon("n1").change_during(|| call(&cluster, "client", &address))?;
            ensure!(called.ok, "{called:?}");
            let ways = ["captured", "same_node"].map(|reason| change.outcome("connect", reason));
            ensure!(ways == [1, 0], "{:?}", change.outcomes());
            assert_eq!(change.outcome("sk_lookup", "authenticated"), 1);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn connections_within_a_node_need_no_daemon() -> Result<()> {
    let (mut cluster, _echo) = start("alone")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let held = cluster.hold("other", [vip.as_str()])?;
    cluster.daemon_mut("n1").kill()?;
    for address in addresses(&cluster) {
        let call = call(&cluster, "client", &address)?;
        ensure!(call.ok, "{address}: {call:?}");
    }
    let far = Program::probe(["call", "blocking", &vip]).run_in(cluster.world.pod("far"))?;
    ensure!(!far.status.success(), "the tunnel does need it");
    cluster.daemon_mut("n1").start()?;
    // The next daemon knows what was carried when it came.
    let open = |metrics: &Metrics| {
        carried(metrics, "connections_opened", "source") - carried(metrics, "connections_closed", "source")
    };
    cluster.wait_for_metrics("n1", "nodemesh_tcp_connections", |metrics| open(metrics) == 1)?;
    held.wait()?.success()?;
    let end = cluster.wait_for_metrics("n1", "nodemesh_tcp_connections", |metrics| open(metrics) == 0)?;
    assert_eq!(end.count("nodemesh_tcp_connections_active", &[]), 0);
    Ok(())
}

/// Processes in the node's own namespace speak under the bridge's address; the kernel knows them by their cgroup.
#[test]
fn a_host_process_calls_pods_of_its_node_through_the_kernel_under_its_own_name_and_policies() -> Result<()> {
    let topology = World::named("unit").node("n1").pods(&["client", "server"]).host("unit").host("clerk");
    let mut cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, PORT);
        catalog.workload("server").mode("strict");
        catalog.workload("unit").ports.insert("status".to_owned(), 9100);
        catalog.workload("clerk").ports.insert("status".to_owned(), 9101);
    })?;
    let _echo = cluster.serve("server", PORT, &[])?;
    cluster.wait_until_served("unit", "server")?;
    let before = settle(&cluster)?;
    let mut calls = Vec::new();
    for address in addresses(&cluster) {
        let call = call(&cluster, "unit", &address)?;
        ensure!(call.ok, "{address}: {call:?}");
        calls.push(call);
    }
    let count = calls.len() as u64;
    let of = |metrics: &Metrics, what: &str, reporter: &str| {
        let labels = [
            ("reporter", reporter),
            ("source_workload", "unit"),
            ("destination_workload", "server"),
            ("connection_security_policy", "kernel"),
        ];
        metrics.count(&format!("nodemesh_tcp_{what}_total"), &labels)
    };
    let after = cluster.wait_for_metrics("n1", "nodemesh_tcp_connections", |metrics| {
        let closed =
            |reporter| of(metrics, "connections_closed", reporter) - of(&before, "connections_closed", reporter);
        closed("source") == count && closed("destination") == count
    })?;
    let outcome = |hook, reason| after.outcome(hook, reason) - before.outcome(hook, reason);
    assert_eq!((outcome("connect", "same_node"), outcome("connect", "captured")), (count, 0));
    assert_eq!((outcome("sock_ops", "admitted"), outcome("sk_lookup", "same_node")), (count, count));
    let (sent, received) = (sum(&calls, |call| call.bytes_sent), sum(&calls, |call| call.bytes_received));
    for reporter in ["source", "destination"] {
        let change = |what| of(&after, what, reporter) - of(&before, what, reporter);
        assert_eq!(change("connections_opened"), count);
        assert_eq!((change("received_bytes"), change("sent_bytes")), (sent, received), "{reporter}");
    }

    let clerk = call(&cluster, "clerk", &addresses(&cluster)[0])?;
    ensure!(clerk.ok, "{clerk:?}");
    cluster.catalog.policy("callers").for_app("server").rule("unit", &[account("unit")], &[]);
    cluster.catalog.write()?;
    for address in addresses(&cluster) {
        wait::until_ok("the other host process is refused", BOUND, || {
            let refused = call(&cluster, "clerk", &address)?;
            ensure!(refused.errno.as_deref() == Some("EACCES"), "{address}: {refused:?}");
            Ok(())
        })?;
        let allowed = call(&cluster, "unit", &address)?;
        ensure!(allowed.ok, "{address}: {allowed:?}");
    }
    Ok(())
}
