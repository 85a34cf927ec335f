//! What many services cost: loading them, one change among them, memory, and a connect in the kernel.

use crate::machine::{self, middle};
use crate::settings::{self, ENDPOINTS};
use anyhow::{Context, Result};
use clap::Args;
use mesh_tests::cluster::Cluster;
use mesh_tests::kernel::{Pinned, RunStats};
use mesh_tests::wait;
use mesh_tests::world::World;
use serde::Serialize;
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long loading or a change may take before the run is given up.
const BOUND: Duration = Duration::from_mins(5);
/// Changes of one endpoint that are timed.
const CHANGES: usize = 11;
/// The node that is measured.
const NODE: &str = "n1";
/// The file that holds the endpoint that comes and goes.
const CHANGING: &str = "changing.yaml";
/// Addresses of that endpoint: an entry of `CIDR` each.
const FAMILIES: u64 = 2;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Numbers of services, each with ten endpoints; the first is what the others are compared with.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 10_000])]
    services: Vec<u32>,
    /// Numbers of workloads on the node itself, each with a namespace and an identity of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000])]
    workloads: Vec<u32>,
    /// Connects from which the hooks' cost is taken, in each of five rounds.
    #[arg(long, default_value_t = 2_000)]
    connects: u32,
    /// Writes the figures here, too, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One number of services.
#[derive(Debug, Serialize)]
struct Row {
    services: u32,
    endpoints: u32,
    /// From the daemon's start to its readiness.
    ready_seconds: f64,
    /// From writing one endpoint's file to the kernel's table: median and worst.
    change_seconds: [f64; 2],
    resident_kib: u64,
    map_bytes: u64,
    /// Nanoseconds per run of the connect hook, by round; the statistics' own cost (some 70 ns) included.
    connect_hook_ns: Vec<f64>,
}

/// One number of local workloads.
#[derive(Debug, Serialize)]
struct Local {
    workloads: u32,
    ready_seconds: f64,
    /// From writing one service's file to the kernel's table: median and worst.
    change_seconds: [f64; 2],
    resident_kib: u64,
    descriptors: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let rows = options.services.iter().map(|services| measure(*services, options)).collect::<Result<Vec<_>>>()?;
    let local = options.workloads.iter().map(|workloads| measure_local(*workloads)).collect::<Result<Vec<_>>>()?;
    println!(
        "{:>9} {:>10} {:>9} {:>16} {:>12} {:>10} {:>16}",
        "services", "endpoints", "ready s", "change s (worst)", "resident MiB", "maps MiB", "connect hook ns"
    );
    for row in &rows {
        let [median, worst] = row.change_seconds;
        println!(
            "{:>9} {:>10} {:>9.2} {:>8.3} ({:.3}) {:>12.1} {:>10.1} {:>16.0}",
            row.services,
            row.endpoints,
            row.ready_seconds,
            median,
            worst,
            row.resident_kib as f64 / 1024.0,
            row.map_bytes as f64 / f64::from(1 << 20),
            middle(&row.connect_hook_ns),
        );
    }
    println!(
        "{:>15} {:>9} {:>16} {:>12} {:>11}",
        "local workloads", "ready s", "change s (worst)", "resident MiB", "descriptors"
    );
    for row in &local {
        let [median, worst] = row.change_seconds;
        println!(
            "{:>15} {:>9.2} {:>8.3} ({:.3}) {:>12.1} {:>11}",
            row.workloads,
            row.ready_seconds,
            median,
            worst,
            row.resident_kib as f64 / 1024.0,
            row.descriptors
        );
    }
    let report = json!({"bench": "scale", "machine": machine::describe(), "rows": rows, "local": local});
    println!("{report}");
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn measure(services: u32, options: &Options) -> Result<Row> {
    eprintln!("bench: {services} services with {ENDPOINTS} endpoints each");
    let topology = World::named("scale").node(NODE).pod("client").pod("server");
    let mut cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    settings::write(&cluster.catalog, services)?;
    let ready = restart(&mut cluster)?;
    cluster.wait_until_served("client", "server")?;
    let change_seconds = changes(&cluster)?;
    let resident = machine::resident(cluster.daemon(NODE).pid()?).context("the daemon's memory cannot be read")?;
    let metrics = cluster.daemon(NODE).metrics()?;
    Ok(Row {
        services,
        endpoints: services * ENDPOINTS,
        ready_seconds: ready.as_secs_f64(),
        change_seconds,
        resident_kib: resident,
        map_bytes: metrics.sum("nodemesh_bpf_map_bytes", &[]) as u64,
        connect_hook_ns: (0..5).map(|_| hook(&cluster, options.connects)).collect::<Result<_>>()?,
    })
}

/// Workloads on the node itself; each has a service, too.
fn measure_local(workloads: u32) -> Result<Local> {
    eprintln!("bench: {workloads} workloads on the node");
    let names: Vec<String> = (0..workloads).map(|number| format!("w{number}")).collect();
    let topology = World::named("local").node(NODE).pods(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let mut cluster = Cluster::start(topology, |catalog| {
        for name in &names {
            catalog.service(name, 80, 8080);
        }
    })?;
    let _echo = cluster.serve("w0", 8080, &[])?;
    settings::write(&cluster.catalog, 0)?;
    let ready = restart(&mut cluster)?;
    let last = names.last().context("at least one workload")?;
    cluster.wait_until_served(last, "w0")?;
    let change_seconds = changes(&cluster)?;
    let metrics = cluster.daemon(NODE).metrics()?;
    Ok(Local {
        workloads,
        ready_seconds: ready.as_secs_f64(),
        change_seconds,
        resident_kib: machine::resident(cluster.daemon(NODE).pid()?).context("the daemon's memory cannot be read")?,
        descriptors: metrics.count("process_open_fds", &[]),
    })
}

/// Starts the daemon anew; the time until it is ready.
fn restart(cluster: &mut Cluster) -> Result<Duration> {
    cluster.daemon_mut(NODE).stop()?;
    let started = Instant::now();
    cluster.daemon_mut(NODE).spawn()?;
    cluster.daemon_mut(NODE).wait_until_ready_within(BOUND)?;
    Ok(started.elapsed())
}

/// Median and worst of some changes, in seconds.
fn changes(cluster: &Cluster) -> Result<[f64; 2]> {
    let mut changes: Vec<f64> = (0..CHANGES).map(|round| change(cluster, round)).collect::<Result<_>>()?;
    changes.sort_by(f64::total_cmp);
    Ok([middle(&changes), *changes.last().context("nothing was changed")?])
}

/// Makes one endpoint of the first of the services come or go; the time until the kernel knows.
fn change(cluster: &Cluster, round: usize) -> Result<f64> {
    let captured = || -> Result<u64> {
        let metrics = cluster.daemon(NODE).metrics()?;
        Ok(metrics.count("nodemesh_bpf_map_entries", &[("map", "CIDR")]))
    };
    let (before, comes) = (captured()?, round.is_multiple_of(2));
    let text = if comes {
        settings::workload(0, ENDPOINTS, 100).replace("100.64.", "100.127.").replace("fd64:", "fd65:")
    } else {
        "# none\n".to_owned()
    };
    let expected = if comes { before + FAMILIES } else { before - FAMILIES };
    let started = Instant::now();
    cluster.catalog.write_file(CHANGING, &text)?;
    wait::until_ok("the kernel knows of the change", BOUND, || {
        let now = captured()?;
        anyhow::ensure!(now == expected, "{now} entries, not {expected}");
        Ok(())
    })?;
    Ok(started.elapsed().as_secs_f64())
}

/// Nanoseconds per run of the connect hook.
fn hook(cluster: &Cluster, connects: u32) -> Result<f64> {
    let pinned = Pinned::below(&cluster.daemon(NODE).bpffs().join("nodemesh"))?;
    let link = pinned
        .links
        .iter()
        .find(|link| link.name.to_string_lossy().contains("connect4"))
        .with_context(|| format!("there is no connect hook among {:?}", pinned.links))?;
    let _counting = RunStats::enable()?;
    let before = RunStats::of(link.program)?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    cluster.hold("client", [vip.as_str(), "--count", &connects.to_string()])?.wait()?.success()?;
    let after = RunStats::of(link.program)?;
    let runs = after.runs - before.runs;
    anyhow::ensure!(runs >= u64::from(connects), "the hook ran {runs} times for {connects} connects");
    Ok((after.nanoseconds - before.nanoseconds) as f64 / runs as f64)
}
