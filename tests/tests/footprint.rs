//! What a node pays: printed by every run (`cargo test -p mesh-tests --test footprint -- --nocapture`), recorded in
//! docs/FOOTPRINT.md. Only budgets are asserted; nothing is written.

use anyhow::{Context, Result};
use mesh_common::maps;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, binary};
use mesh_tests::report::Call;
use mesh_tests::scrape::Metrics;
use std::fs;
use std::path::Path;

const HELD: u64 = 1_000;
/// What one idle connection may cost the daemons of both of its nodes together, in a development build. A relay task
/// and a stream at each end, and no buffer: several times this means that a buffer is held while nobody speaks.
const PER_CONNECTION_BYTES: u64 = 96 * 1024;

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Resident memory as the kernel has it now.
fn resident(cluster: &Cluster, node: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", cluster.daemon(node).pid()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a process has a size")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

fn map_bytes(metrics: &Metrics) -> u64 {
    metrics.count("nodemesh_bpf_map_bytes", &[])
}

#[test]
fn an_idle_node_stays_within_its_budget() -> Result<()> {
    let cluster = Cluster::pair("idle")?;
    for node in ["n1", "n2"] {
        let metrics = cluster.daemon(node).metrics()?;
        let bytes = map_bytes(&metrics);
        println!("{node}: an idle daemon with one workload: {:.1} MiB resident", mebibytes(resident(&cluster, node)?));
        println!("{node}: BPF maps: {:.2} MiB", mebibytes(bytes));
        for map in metrics.matching("nodemesh_bpf_map_bytes", &[]) {
            println!("{node}:   {:9} {:>10} bytes", map.labels["map"], map.value);
        }
        assert_eq!(metrics.matching("nodemesh_bpf_map_bytes", &[]).count(), maps::ALL.len());
        assert!(bytes > 0 && bytes <= maps::IDLE_BUDGET_BYTES, "{bytes} of {}", maps::IDLE_BUDGET_BYTES);
    }
    Ok(())
}

#[test]
fn idle_connections_hold_no_buffers() -> Result<()> {
    let cluster = Cluster::pair("held")?;
    let _echo = cluster.serve("server", 8080, &[])?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    // What the first connections bring along (lanes, TLS sessions, thread stacks) is not paid for each of the others.
    let many = cluster.run_probe("client", ["many", &vip, "--count", "1000", "--concurrency", "100"])?;
    assert_eq!(many.connections, 1_000);
    let sum = || -> Result<u64> { Ok(resident(&cluster, "n1")? + resident(&cluster, "n2")?) };
    let before = sum()?;
    let held = cluster.hold("client", [&vip, "--count", &HELD.to_string(), "--timeout-millis", "60000"])?;
    for node in ["n1", "n2"] {
        assert_eq!(cluster.daemon(node).metrics()?.count("nodemesh_tcp_connections_active", &[]), HELD);
    }
    let during = sum()?;
    let grown = during.saturating_sub(before);
    println!(
        "{HELD} idle connections: {:.1} MiB more on both nodes together, {:.1} KiB each",
        mebibytes(grown),
        grown as f64 / 1024.0 / HELD as f64
    );
    let metrics = cluster.daemon("n1").metrics()?;
    println!("lanes that carry them: {}", metrics.count("nodemesh_tunnel_lanes", &[("direction", "outbound")]));
    assert!(grown <= HELD * PER_CONNECTION_BYTES, "{grown} bytes for {HELD} connections");
    assert_eq!(held.wait()?.success()?.json::<Call>()?.connections, HELD);
    assert_eq!(cluster.outcome("n1", "connect", "captured")?, 1_000 + HELD);
    Ok(())
}

#[test]
fn binaries_are_there_and_their_sizes_are_printed() -> Result<()> {
    let print = |what: &str, path: &Path| -> Result<()> {
        let size = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        assert!(size > 0);
        println!("{what}: {:.1} MiB", mebibytes(size));
        Ok(())
    };
    for name in ["nodemeshd", "nodemesh"] {
        let development = binary(name);
        print(&format!("{name}, development build"), &development)?;
        let release = development.parent().context("it is in a folder")?.with_file_name("release").join(name);
        if release.is_file() {
            print(&format!("{name}, release build"), &release)?;
        }
    }
    // The binary carries the eBPF object: there is nothing else to install.
    let world = mesh_tests::world::World::named("version").node("n1").build()?;
    let output = Program::new(binary("nodemeshd")).args(["--version"]).run_in(world.node("n1"))?.success()?;
    assert!(output.stdout.starts_with("nodemeshd "), "{output:?}");
    Ok(())
}
