//! Plaintext is held to policy, seen by caller, and cut when a change forbids it.

use crate::{PORT, start, wait_for_cuts, wait_for_verdicts};
use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::policy::range;
use mesh_tests::program::Running;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_userspace::admin::documents::Document;
use mesh_userspace::admin::policies::PlaintextRow;
use std::net::{IpAddr, SocketAddr};

const CONNECTIONS: &str = "nodemesh_plaintext_connections_total";

fn open(cluster: &mut Cluster) -> Result<()> {
    cluster.catalog.workload("server").mode("permissive");
    cluster.catalog.write()?;
    let destination = SocketAddr::new(cluster.world.pod("server").v4().into(), PORT).to_string();
    wait::until("plaintext gets in", BOUND, || {
        cluster.attempt("outsider", &["call", "blocking", &destination, "--greet"]).ok()?.ok.then_some(())
    })
}

fn rows(cluster: &Cluster) -> Result<Vec<PlaintextRow>> {
    Ok(cluster.document::<Document<PlaintextRow>>("n2", &["get", "plaintext"])?.items)
}

/// Connections that no change may touch: through the mesh, the server's own outward and to itself.
fn bystanders(cluster: &Cluster) -> Result<(Running, Vec<Running>)> {
    let far = cluster.serve("outsider", 7070, &["--greet"])?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let of_pod = |pod: &str, port| SocketAddr::new(cluster.world.pod(pod).v4().into(), port).to_string();
    let held = vec![
        cluster.hold("client", [vip.as_str(), "--greet", "--count", "50"])?,
        cluster.hold("client", [vip.as_str(), "--greet", "--chatter"])?,
        cluster.hold("server", [of_pod("outsider", 7070).as_str(), "--greet"])?,
        cluster.hold("server", [of_pod("server", PORT).as_str(), "--greet"])?,
    ];
    Ok((far, held))
}

fn assert_untouched((_far, held): (Running, Vec<Running>)) -> Result<()> {
    for mut running in held {
        ensure!(running.is_running(), "{}", running.printed());
        running.wait()?.success()?;
    }
    Ok(())
}

fn assert_cut(held: Running) -> Result<()> {
    let call: Call = held.wait()?.json()?;
    ensure!(!call.ok && call.error.as_deref().is_some_and(|error| error.contains("reset")), "{call:?}");
    Ok(())
}

#[test]
fn plaintext_callers_are_counted_and_listed() -> Result<()> {
    let (mut cluster, _echo) = start("callers")?;
    open(&mut cluster)?;
    let labels = |verdict| [("verdict", verdict), ("source_workload", "unknown"), ("destination_workload", "server")];
    let n2 = cluster.daemon("n2");
    n2.wait_for_metrics("it counts the caller", |metrics| metrics.count(CONNECTIONS, &labels("admitted")) >= 1)?;
    let outsider = cluster.world.pod("outsider").v4().to_string();
    let find = || -> Result<PlaintextRow> {
        let rows = rows(&cluster)?;
        rows.iter().find(|row| row.source == outsider).cloned().with_context(|| format!("{rows:?}"))
    };
    let row = wait::until_ok("the caller is listed", BOUND, find)?;
    assert_eq!((row.destination.as_str(), row.ports.as_slice()), ("default/server", [PORT].as_slice()));
    assert!(row.admitted >= 1 && row.source_workload.is_none(), "{row:?}");

    // Policy holds for it, too: by address.
    let before = n2.metrics()?;
    let everyone_there = format!("{outsider}/32");
    cluster.catalog.policy("keep-out").action("DENY").for_app("server").rule("there", &[range(&everyone_there)], &[]);
    cluster.catalog.write()?;
    let destination = SocketAddr::new(cluster.world.pod("server").v4().into(), PORT).to_string();
    wait::until("plaintext is refused", BOUND, || {
        let call = cluster.attempt("outsider", &["call", "blocking", &destination, "--greet"]).ok()?;
        (call.errno.as_deref() == Some("ECONNREFUSED")).then_some(())
    })?;
    let denied = [
        ("verdict", "deny"),
        ("policy", "default/keep-out"),
        ("rule", "there"),
        ("enforced_by", "kernel_sk_lookup"),
        ("destination_workload", "server"),
    ];
    wait_for_verdicts(cluster.daemon("n2"), &before, &denied, 1)?;
    let refused = wait::until_ok("the refusal is listed", BOUND, || {
        let rows = rows(&cluster)?;
        let refused = rows.into_iter().find(|row| row.source == outsider && row.refused > 0);
        refused.context("no caller was refused")
    })?;
    assert!(refused.admitted >= row.admitted, "{refused:?} {row:?}");
    Ok(())
}

#[test]
fn plaintext_that_a_policy_forbids_is_cut() -> Result<()> {
    let (mut cluster, _echo) = start("forbidden")?;
    open(&mut cluster)?;
    let bystanders = bystanders(&cluster)?;
    let own = cluster.world.pod("server").addresses().map(|ip| SocketAddr::new(ip, PORT).to_string());
    let held = own.iter().map(|to| cluster.hold("outsider", [to.as_str(), "--greet"])).collect::<Result<Vec<_>>>()?;
    let sources: Vec<_> = cluster.world.pod("outsider").addresses().iter().map(host).collect();
    let sources: Vec<_> = sources.iter().map(|cidr| range(cidr)).collect();
    cluster.catalog.policy("keep-out").action("DENY").for_app("server").rule("there", &sources, &[]);
    cluster.catalog.write()?;
    wait_for_cuts(cluster.daemon("n2"), "denied", 2)?;
    held.into_iter().try_for_each(assert_cut)?;
    let log = cluster.daemon("n2").log();
    ensure!(log.lines().any(|line| line.contains("\"cut\"") && line.contains("default/keep-out")), "{log}");
    assert_untouched(bystanders)
}

#[test]
fn plaintext_is_cut_when_the_workload_becomes_strict() -> Result<()> {
    let (mut cluster, _echo) = start("becomes-strict")?;
    open(&mut cluster)?;
    let bystanders = bystanders(&cluster)?;
    let to = SocketAddr::new(cluster.world.pod("server").v4().into(), PORT).to_string();
    let held = cluster.hold("outsider", [to.as_str(), "--greet", "--count", "100"])?;
    cluster.catalog.workload("server").mode("strict");
    cluster.catalog.write()?;
    wait_for_cuts(cluster.daemon("n2"), "strict", 100)?;
    assert_cut(held)?;
    assert_untouched(bystanders)
}

fn host(address: &IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}
