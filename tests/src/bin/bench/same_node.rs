//! Two workloads of one node: through the mesh's kernel path, through its tunnel, and without the mesh, in one run.

use crate::machine::{self, middle};
use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Load;
use mesh_tests::world::World;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

const NODE: &str = "n1";
/// Ports that the servers listen on.
const BULK: u16 = 5201;
const ECHO: u16 = 8080;
/// Addresses of the services' ports.
const BULK_FRONT: u16 = 81;
const ECHO_FRONT: u16 = 80;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds; each takes every way once, in turn.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of one bulk transfer.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Requests of 128 bytes, one after the other, of which one latency figure is made.
    #[arg(long, default_value_t = 20_000)]
    requests: u32,
    /// Writes the figures here, too, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A way between two pods of one node.
struct Way {
    name: &'static str,
    client: &'static str,
    bulk: SocketAddr,
    echo: SocketAddr,
}

/// What one way gave, round by round.
#[derive(Debug, Default, Serialize)]
struct Figures {
    gigabits_per_second: Vec<f64>,
    p50_micros: Vec<u64>,
    p99_micros: Vec<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let pods = ["client", "server", "tunnelled", "plain-client", "plain-server"];
    let topology = World::named("bench").node(NODE).pods(&pods);
    let cluster = Cluster::start(topology, describe)?;
    let servers = ["server", "tunnelled", "plain-server"].map(|pod| start_servers(&cluster, pod));
    let _servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let ways = ways(&cluster);
    cluster.wait_until_served("client", "server")?;
    cluster.wait_until_served("client", "tunnelled")?;
    let mut figures: BTreeMap<&str, Figures> = BTreeMap::new();
    for round in 1..=options.rounds {
        eprintln!("bench: round {round} of {}", options.rounds);
        for way in &ways {
            let taken = figures.entry(way.name).or_default();
            taken.gigabits_per_second.push(bulk(&cluster, way, options.seconds)?);
            let load = latency(&cluster, way, options.requests)?;
            taken.p50_micros.push(load.p50_micros);
            taken.p99_micros.push(load.p99_micros);
        }
    }
    went_by_the_kernel(&cluster)?;
    print(&figures);
    let report = json!({"bench": "same-node", "machine": machine::describe(), "ways": figures});
    println!("{report}");
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The plain pods are not in the catalog: nothing about them is in the kernel's tables.
fn describe(catalog: &mut Catalog) {
    for pod in ["plain-client", "plain-server"] {
        catalog.remove(pod);
    }
    for name in ["server", "tunnelled"] {
        catalog.service(name, ECHO_FRONT, ECHO).ports.push((BULK_FRONT, BULK.into()));
    }
    catalog.traffic("tunnelled").same_node("Tunnel");
}

fn start_servers(cluster: &Cluster, pod: &str) -> Result<[Running; 2]> {
    let mut bulk = Program::new("iperf3").args(["-s", "-p", &BULK.to_string()]).start_in(cluster.world.place(pod))?;
    bulk.wait_for_listener(BULK)?;
    Ok([bulk, cluster.serve(pod, ECHO, &[])?])
}

fn ways(cluster: &Cluster) -> [Way; 3] {
    let plain = cluster.world.pod("plain-server").v4();
    let through = |service: &str, port: u16| SocketAddr::new(cluster.catalog.vips(service)[0].ip(), port);
    let meshed = |name, service| Way {
        name,
        client: "client",
        bulk: through(service, BULK_FRONT),
        echo: through(service, ECHO_FRONT),
    };
    [
        Way {
            name: "without the mesh",
            client: "plain-client",
            bulk: (plain, BULK).into(),
            echo: (plain, ECHO).into(),
        },
        meshed("mesh, by the kernel", "server"),
        meshed("mesh, through the tunnel", "tunnelled"),
    ]
}

fn bulk(cluster: &Cluster, way: &Way, seconds: u32) -> Result<f64> {
    let (address, port, seconds) = (way.bulk.ip().to_string(), way.bulk.port().to_string(), seconds.to_string());
    let program = Program::new("iperf3").args(["-c", &address, "-p", &port, "-t", &seconds, "-J"]);
    let report: Value = program.run_in(cluster.world.place(way.client))?.success()?.json()?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 reports no throughput: {report}"))? / 1e9)
}

fn latency(cluster: &Cluster, way: &Way, requests: u32) -> Result<Load> {
    let (address, requests) = (way.echo.to_string(), requests.to_string());
    let program = Program::probe(["load", &address, "--requests", &requests, "--connections", "1"]);
    program.run_in(cluster.world.place(way.client))?.success()?.json()
}

/// Figures of another path than the one that they are printed under would be worse than none.
fn went_by_the_kernel(cluster: &Cluster) -> Result<()> {
    let metrics = cluster.daemon(NODE).metrics()?;
    let carried = metrics.sum("nodemesh_tcp_connections_opened_total", &[("connection_security_policy", "kernel")]);
    ensure!(carried > 0.0, "no connection went by the kernel:\n{}", metrics.text());
    Ok(())
}

fn print(figures: &BTreeMap<&str, Figures>) {
    println!("{:<26} {:>18} {:>14} {:>14}", "way", "bulk Gbit/s", "p50 us", "p99 us");
    for (name, figures) in figures {
        println!(
            "{name:<26} {:>18.2} {:>14} {:>14}",
            middle(&figures.gigabits_per_second),
            middle(&figures.p50_micros),
            middle(&figures.p99_micros)
        );
    }
}
