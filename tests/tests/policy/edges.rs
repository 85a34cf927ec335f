//! Allowed and denied edges, refused as early as can be, and at the latest at the destination.

use crate::stranger::Stranger;
use crate::{PORT, VERDICTS, start, wait_for_verdicts};
use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::daemon::Daemon;
use mesh_tests::policy::account;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use mesh_userspace::model::TransportChoice;
use mesh_userspace::tunnel::{OpenError, Refusal};
use std::net::SocketAddr;

/// Calls the service and the workload, by all addresses.
fn calls(cluster: &Cluster, from: &str, to: &str) -> Result<Vec<Call>> {
    let own = cluster.world.pod(to).addresses().map(|ip| SocketAddr::new(ip, PORT));
    let all = cluster.catalog.vips("server").into_iter().chain(own);
    all.map(|destination| cluster.attempt(from, &["call", "blocking", &destination.to_string(), "--greet"])).collect()
}

fn wait_until_refused(cluster: &Cluster, from: &str, errno: &str) -> Result<()> {
    wait::until(&format!("{from} is refused with {errno}"), BOUND, || {
        let calls = calls(cluster, from, "server").ok()?;
        calls.iter().all(|call| call.errno.as_deref() == Some(errno)).then_some(())
    })
}

/// A line of the log that has all of these.
fn logs(daemon: &Daemon, parts: &[&str]) -> bool {
    daemon.log().lines().any(|line| parts.iter().all(|part| line.contains(part)))
}

#[test]
fn an_edge_is_allowed_or_denied_by_a_rule_that_has_a_name() -> Result<()> {
    let (mut cluster, _echo) = start("edges")?;
    cluster.catalog.policy("callers").for_app("server").rule("only-client", &[account("client")], &[PORT]);
    cluster.catalog.write()?;
    wait_until_refused(&cluster, "other", "EACCES")?;

    let ((), change) = cluster.daemon("n2").change_during(|| {
        for call in calls(&cluster, "client", "server")? {
            ensure!(call.ok, "{call:?}");
        }
        Ok(())
    })?;
    let allowed = [
        ("verdict", "allow"),
        ("reason", "allowed"),
        ("policy", "default/callers"),
        ("rule", "only-client"),
        ("enforced_by", "destination"),
        ("destination_workload", "server"),
        ("destination_workload_namespace", "default"),
    ];
    assert_eq!(change.of(|metrics| metrics.count(VERDICTS, &allowed)), 4);
    let accesses = cluster.daemon("n2").accesses();
    let last = accesses.last().context("an access")?;
    assert_eq!((last.policy.as_deref(), last.rule.as_deref()), (Some("default/callers"), Some("only-client")));

    // connect() itself fails, and the destination's daemon never hears of it.
    let source = cluster.daemon("n1").metrics()?;
    let (refused, change) = cluster.daemon("n2").change_during(|| {
        let (refused, change) = cluster.daemon("n1").change_during(|| calls(&cluster, "other", "server"))?;
        assert_eq!(change.outcome("connect", "policy_denied"), 4, "{:?}", change.outcomes());
        assert_eq!(change.of(|metrics| metrics.opened("source")), 0);
        Ok(refused)
    })?;
    ensure!(refused.iter().all(|call| call.errno.as_deref() == Some("EACCES")), "{refused:?}");
    assert_eq!(change.outcomes().len(), 0, "{:?}", change.outcomes());
    assert_eq!(change.of(|metrics| metrics.opened("destination")), 0);
    let denied = [
        ("verdict", "deny"),
        ("reason", "not_allowed"),
        ("policy", "default/callers"),
        ("enforced_by", "kernel_connect"),
        ("destination_workload", "server"),
    ];
    wait_for_verdicts(cluster.daemon("n1"), &source, &denied, 4)?;
    let parts = ["\"deny\"", "\"not_allowed\"", "default/callers", "default/other", "kernel_connect"];
    ensure!(logs(cluster.daemon("n1"), &parts), "{}", cluster.daemon("n1").log_end());

    // DENY goes before ALLOW, and names its rule, too.
    cluster.catalog.policy("block").action("DENY").for_service("server").rule("no-client", &[account("client")], &[]);
    cluster.catalog.write()?;
    let before = cluster.daemon("n1").metrics()?;
    wait_until_refused(&cluster, "client", "EACCES")?;
    let denied = [("verdict", "deny"), ("policy", "default/block"), ("rule", "no-client")];
    wait_for_verdicts(cluster.daemon("n1"), &before, &denied, 4)?;

    cluster.catalog.denied_error("ECONNREFUSED");
    cluster.catalog.write()?;
    wait_until_refused(&cluster, "client", "ECONNREFUSED")
}

/// Endpoints of one service with different policies: the kernel cannot know which of them the proxy will pick.
#[test]
fn what_the_kernel_leaves_to_the_proxy_is_refused_there() -> Result<()> {
    let topology = World::named("groups").node("n1").pods(&["client", "other"]).node("n2").pods(&["server", "second"]);
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, PORT);
        catalog.workload("second").of_app("server");
        for pod in ["server", "second"] {
            catalog.workload(pod).label("instance", pod);
        }
        catalog.policy("block-both").action("DENY").for_app("server").rule("no-other", &[account("other")], &[]);
        catalog.document(
            "only-second",
            "{apiVersion: nodemesh.io/v1alpha1, kind: AuthorizationPolicy, \
             metadata: {name: watch-second, namespace: default}, spec: {action: AUDIT, \
             targetRefs: [{kind: Pod, selector: {matchLabels: {instance: second}}}], rules: [{name: all}]}}",
        );
    })?;
    let _echoes = [cluster.serve("server", PORT, &[])?, cluster.serve("second", PORT, &[])?];
    cluster.wait_until_served("client", "server")?;
    let (source, destination) = (cluster.daemon("n1"), cluster.daemon("n2"));
    let before = source.metrics()?;
    let (call, change) = destination.change_during(|| {
        let vip = cluster.catalog.vips("server")[0].to_string();
        let (call, change) = source.change_during(|| cluster.attempt("other", &["call", "blocking", &vip]))?;
        assert_eq!(change.outcome("connect", "policy_denied"), 0, "{:?}", change.outcomes());
        assert_eq!(change.outcome("connect", "captured"), 1, "{:?}", change.outcomes());
        assert_eq!(change.of(|metrics| metrics.failed("source", "denied")), 1);
        Ok(call)
    })?;
    assert_eq!(call.errno.as_deref(), Some("ECONNRESET"), "{call:?}");
    assert_eq!(change.of(|metrics| metrics.opened("destination")), 0);
    let denied = [
        ("verdict", "deny"),
        ("reason", "denied"),
        ("policy", "default/block-both"),
        ("rule", "no-other"),
        ("enforced_by", "source"),
    ];
    wait_for_verdicts(source, &before, &denied, 1)?;
    wait::until("the access log tells the rule", BOUND, || {
        let accesses = source.accesses();
        let denied = accesses.iter().find(|access| access.verdict.as_deref() == Some("deny"))?;
        let told = (denied.policy.as_deref(), denied.rule.as_deref(), denied.response_flags.as_deref());
        (told == (Some("default/block-both"), Some("no-other"), Some("DENY"))).then_some(())
    })
}

/// A node that does not care about policy opens the stream all the same.
#[test]
fn the_destination_refuses_what_a_source_lets_through() -> Result<()> {
    let (mut cluster, _echo) = start("bypass")?;
    cluster.catalog.policy("block").action("DENY").for_app("server").rule("no-other", &[account("other")], &[PORT]);
    cluster.catalog.write()?;
    wait_until_refused(&cluster, "other", "EACCES")?;
    let (source, own) = (cluster.world.pod("other").addresses(), cluster.world.pod("server").addresses());
    for transport in [TransportChoice::Lanes, TransportChoice::Quic] {
        for family in [0, 1] {
            let stranger = Stranger {
                certificates_of: "n1",
                account: "other",
                from: "n1",
                to: ("server", "default/server", "n2"),
                transport,
            };
            let (from, to) = (SocketAddr::new(source[family], 40_000), SocketAddr::new(own[family], PORT));
            let before = cluster.daemon("n2").metrics()?;
            let ((), change) = cluster.daemon("n2").change_during(|| {
                stranger.open(&cluster, from, to, |opened| match opened {
                    Err(OpenError::Refused(Refusal::Denied)) => Ok(()),
                    outcome => anyhow::bail!("{transport:?} {to}: {outcome:?}"),
                })
            })?;
            // No byte and no SYN has reached the application.
            assert_eq!(change.outcome("sk_lookup", "authenticated"), 0, "{:?}", change.outcomes());
            assert_eq!(change.of(|metrics| metrics.failed("destination", "denied")), 1);
            let denied = [("verdict", "deny"), ("rule", "no-other"), ("enforced_by", "destination")];
            wait_for_verdicts(cluster.daemon("n2"), &before, &denied, 1)?;
        }
    }
    Ok(())
}
