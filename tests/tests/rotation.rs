//! Certificates that renew themselves under traffic, authorities that are rotated, and one that goes away.
//!
//! `cargo xtask test` runs [`traffic_survives_every_rotation`] for two minutes with certificates that live for six
//! seconds; `cargo xtask soak` for ten minutes with twenty seconds.

use anyhow::{Context, Result, ensure};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Names of the pair's service accounts.
const ACCOUNTS: [&str; 2] = ["client", "server"];
/// Connections of one round of short ones.
const ROUND: u64 = 100;
/// Bound of one step under traffic; an old root stays for a minute longer than its longest leaf.
const LONGEST: Duration = Duration::from_mins(4);

/// `client` on n1 calls `server` on n2; both nodes have joined an authority on n1.
fn start(name: &str, certificates: &Value) -> Result<(Cluster, Running)> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    let cluster = Cluster::joined(topology, certificates, |catalog| {
        catalog.service("server", 80, 8080);
    })?;
    let echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    Ok((cluster, echo))
}

/// Serial numbers by identity, as a node's daemon lists its certificates.
fn serials(cluster: &Cluster, node: &str) -> Result<BTreeMap<String, String>> {
    let document: Value = cluster.document(node, &["cert", "list"])?;
    let rows = document["items"].as_array().context("certificates are a list")?;
    let text = |row: &Value, field: &str| Some(row.get(field)?.as_str()?.to_owned());
    rows.iter().map(|row| text(row, "id").zip(text(row, "serial")).with_context(|| format!("{row}"))).collect()
}

/// Roots that a node's daemon trusts, by fingerprint.
fn roots(cluster: &Cluster, node: &str) -> Result<BTreeSet<String>> {
    let document: Value = cluster.document(node, &["cert", "bundle"])?;
    let rows = document["items"].as_array().context("roots are a list")?;
    let fingerprint = |row: &Value| Some(row.get("spkiSha256")?.as_str()?.to_owned());
    rows.iter().map(|row| fingerprint(row).with_context(|| format!("{row}"))).collect()
}

/// A round of short connections; all must succeed.
fn short_connections(cluster: &Cluster, vip: &str) -> Result<()> {
    let count = ROUND.to_string();
    let call: Call = cluster.attempt("client", &["many", vip, "--count", &count, "--concurrency", "4"])?;
    ensure!(call.ok && call.connections == ROUND, "{call:?}\n{}", complaints(cluster));
    Ok(())
}

/// What the daemons have logged that is not good news.
fn complaints(cluster: &Cluster) -> String {
    let logs: Vec<String> = cluster.daemons().map(|daemon| format!("{}:\n{}", daemon.node(), daemon.log())).collect();
    let is_complaint = |line: &&str| !line.contains("\"level\":\"INFO\"");
    let lines: Vec<&str> = logs.iter().flat_map(|log| log.lines().filter(is_complaint)).collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// Rounds of short connections until something is so.
fn traffic_until(cluster: &Cluster, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LONGEST;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what}: not within {LONGEST:?}");
        for vip in cluster.catalog.vips("server") {
            short_connections(cluster, &vip.to_string())?;
        }
    }
    Ok(())
}

/// How long the traffic lasts, and how long certificates live.
#[expect(clippy::disallowed_methods, reason = "a test has no command line; `cargo xtask soak` alone sets it")]
fn length() -> (Duration, Value) {
    match std::env::var_os("NODEMESH_SOAK") {
        Some(_) => (Duration::from_mins(10), json!({"ttl": "20s", "nodeTtl": "60s"})),
        None => (Duration::from_mins(2), json!({"ttl": "6s", "nodeTtl": "20s"})),
    }
}

/// Serial numbers on both nodes.
fn all_serials(cluster: &Cluster) -> Result<BTreeMap<(&'static str, String), String>> {
    let mut all = BTreeMap::new();
    for node in ["n1", "n2"] {
        all.extend(serials(cluster, node)?.into_iter().map(|(id, serial)| ((node, id), serial)));
    }
    Ok(all)
}

/// Traffic until every certificate is another one.
fn traffic_until_renewed(cluster: &Cluster, what: &str) -> Result<()> {
    let before = all_serials(cluster)?;
    traffic_until(cluster, what, || {
        let now = all_serials(cluster)?;
        Ok(before.iter().all(|(id, serial)| now.get(id).is_some_and(|now| now != serial)))
    })
}

#[test]
fn traffic_survives_every_rotation() -> Result<()> {
    let (duration, certificates) = length();
    let (mut cluster, _echo) = start("rotation", &certificates)?;
    let deadline = Instant::now() + duration;
    let [v4, v6] = cluster.catalog.vips("server").map(|vip| vip.to_string());
    let mut long = Vec::new();
    for vip in [&v4, &v6] {
        long.push(cluster.hold("client", ["--count", "5", "--chatter", vip])?);
        long.push(cluster.hold("client", ["--count", "5", vip])?);
    }
    let failed = |cluster: &Cluster, node: &str| -> Result<u64> {
        Ok(cluster.daemon(node).metrics()?.count("nodemesh_tcp_connections_failed_total", &[]))
    };
    let failed_before = [failed(&cluster, "n1")?, failed(&cluster, "n2")?];
    let old_roots = roots(&cluster, "n1")?;
    ensure!(old_roots.len() == 1, "{old_roots:?}");
    traffic_until_renewed(&cluster, "every certificate is renewed")?;

    cluster.ask_ca(&["ca", "rotate", "root"])?.success()?;
    traffic_until(&cluster, "both nodes know the new root", || {
        Ok(roots(&cluster, "n1")?.len() == 2 && roots(&cluster, "n2")?.len() == 2)
    })?;
    traffic_until_renewed(&cluster, "every certificate is renewed while there are two roots")?;
    cluster.ask_ca(&["ca", "rotate", "intermediate"])?.success()?;
    traffic_until_renewed(&cluster, "every certificate comes from the new intermediate")?;

    // Away for less than half a life: certificates renewed last are still good when it is back.
    cluster.ca_mut().kill()?;
    for vip in [&v4, &v6] {
        short_connections(&cluster, vip)?;
    }
    cluster.ca_mut().start()?;
    traffic_until_renewed(&cluster, "certificates are renewed again")?;

    traffic_until(&cluster, "the old root is gone from both nodes", || {
        let now = [roots(&cluster, "n1")?, roots(&cluster, "n2")?];
        Ok(now.iter().all(|roots| roots.len() == 1 && roots.is_disjoint(&old_roots)))
    })?;
    while Instant::now() < deadline {
        for vip in [&v4, &v6] {
            short_connections(&cluster, vip)?;
        }
    }
    for running in long {
        running.wait()?.success()?;
    }
    ensure!([failed(&cluster, "n1")?, failed(&cluster, "n2")?] == failed_before, "a connection failed");
    for node in ["n1", "n2"] {
        let metrics = cluster.daemon(node).metrics()?;
        ensure!(metrics.count("nodemesh_cert_rotations_total", &[("result", "success")]) >= 5, "{}", metrics.text());
    }
    Ok(())
}

#[test]
fn an_authority_that_stays_away_stops_new_connections_at_expiry_and_its_return_heals_them() -> Result<()> {
    let (mut cluster, _echo) = start("outage", &json!({"ttl": "6s"}))?;
    let [vip, _] = cluster.catalog.vips("server").map(|vip| vip.to_string());
    cluster.ca_mut().kill()?;
    let refused = wait::until_ok("new connections are refused", 3 * BOUND, || {
        let call = cluster.attempt("client", &["call", "blocking", &vip])?;
        ensure!(!call.ok, "{call:?}");
        Ok(call)
    })?;
    ensure!(refused.bytes_received == 0, "{refused:?}");
    cluster.wait_for_metrics("n1", "nodemesh_cert_rotations_total", |metrics| {
        metrics.count("nodemesh_cert_rotations_total", &[("result", "unavailable")]) > 0
    })?;
    cluster.wait_for_metrics("n1", "nodemesh_tcp_connections_failed_total", |metrics| {
        metrics.count("nodemesh_tcp_connections_failed_total", &[("reporter", "source")]) > 0
    })?;
    cluster.ca_mut().start()?;
    cluster.wait_until_served("client", "server")
}

#[test]
fn a_workload_that_arrives_has_its_certificate_before_its_first_connection() -> Result<()> {
    let topology = World::named("arrival").node("n1").pods(&["client", "late"]).node("n2").pod("server");
    let mut cluster = Cluster::joined(topology, &json!({"ttl": "1h"}), |catalog| {
        catalog.service("server", 80, 8080);
        assert!(catalog.remove("late"));
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let id = cluster.authority.spiffe_id(NAMESPACE, "late");
    ensure!(!serials(&cluster, "n1")?.contains_key(&id));
    cluster.catalog.add(cluster.world.pod("late"), None);
    cluster.catalog.write()?;
    wait::until_ok("the certificate is there without a connection", BOUND, || {
        ensure!(serials(&cluster, "n1")?.contains_key(&id));
        Ok(())
    })?;
    cluster.wait_until_served("late", "server")?;
    assert!(cluster.catalog.remove("late"));
    cluster.catalog.write()?;
    wait::until_ok("the certificate goes with its workload", BOUND, || {
        ensure!(!serials(&cluster, "n1")?.contains_key(&id));
        Ok(())
    })?;
    let known: BTreeSet<_> = serials(&cluster, "n1")?.into_keys().collect();
    ensure!(known == BTreeSet::from([cluster.authority.spiffe_id(NAMESPACE, ACCOUNTS[0])]), "{known:?}");
    Ok(())
}

#[test]
fn a_daemon_that_starts_again_has_its_identities_back() -> Result<()> {
    let (mut cluster, _echo) = start("restart", &json!({"ttl": "1h"}))?;
    let before = serials(&cluster, "n1")?;
    cluster.daemon_mut("n1").stop()?;
    cluster.daemon_mut("n1").start()?;
    cluster.wait_until_served("client", "server")?;
    let after = serials(&cluster, "n1")?;
    // Keys live in memory only: the new process has new ones.
    ensure!(before.keys().eq(after.keys()) && before != after, "{before:?} {after:?}");
    let listing = Program::new("find").args([cluster.identities("n1")]).run_in(cluster.world.node("n1"))?.success()?;
    let keys: Vec<_> = listing.stdout.lines().filter(|path| path.ends_with("key.pem")).collect();
    ensure!(keys.len() == 1 && keys[0].ends_with("node/key.pem"), "{keys:?}");
    Ok(())
}
