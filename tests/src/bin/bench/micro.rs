//! What each of the mesh's eBPF programs costs: nanoseconds per run, under a short load that reaches all of them.

use crate::machine;
use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::cluster::Cluster;
use mesh_tests::kernel::{Pinned, RunStats};
use mesh_tests::program::{Program, Running};
use mesh_tests::report::{Datagrams, Resolved};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The mesh's own DNS, over both families.
const DNS: [&str; 2] = ["10.96.255.10", "fd96::ff10"];
/// Runs that are shown as they are, but are too few for their mean to say much.
const FEW: u64 = 100;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Connections to a service of pods and to one of a host's process, each, in each address family.
    #[arg(long, default_value_t = 1_000)]
    connects: u32,
    /// Datagrams to a service in each address family.
    #[arg(long, default_value_t = 5_000)]
    datagrams: u32,
    /// Calls that ask for their peer's name, and questions to the mesh's DNS, in each address family.
    #[arg(long, default_value_t = 100)]
    calls: u32,
    /// Writes the figures here, too, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One program, on all nodes together.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    program: String,
    runs: u64,
    nanoseconds: u64,
}

/// The runs so far of each program that a daemon has attached, by its name.
type Totals = BTreeMap<String, RunStats>;

pub(crate) fn run(options: &Options) -> Result<()> {
    let bed = Bed::start()?;
    let counting = RunStats::enable()?;
    let before = bed.totals()?;
    bed.load(options)?;
    let after = bed.totals()?;
    drop(counting);
    let rows = rows(&before, &after)?;
    print!("{}", table(&rows));
    let report = json!({"bench": "micro", "machine": machine::describe(), "programs": rows});
    println!("{report}");
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// n1: pods `client` and `near`. n2: pod `far`, host process `web`. The pods serve TCP and UDP, `web` TCP.
struct Bed {
    cluster: Cluster,
    _servers: Vec<Running>,
}

impl Bed {
    fn start() -> Result<Self> {
        let topology = World::named("micro").node("n1").pods(&["client", "near"]).node("n2").pod("far").host("web");
        let cluster = Cluster::start(topology, |catalog| {
            catalog.mesh("dns", json!({"addresses": DNS}));
            for pod in ["near", "far"] {
                catalog.service(pod, 80, 8080).udp(53, 1053);
            }
            catalog.workload("web").ports.insert("http".to_owned(), 8080);
            catalog.service("web", 80, "http");
        })?;
        let mut servers = Vec::new();
        for name in ["near", "far", "web"] {
            servers.push(cluster.serve(name, 8080, &[])?);
        }
        for pod in ["near", "far"] {
            let mut server = Program::probe(["udp", "echo", "--port", "1053"]).start_in(cluster.world.pod(pod))?;
            server.wait_for_text("listening")?;
            servers.push(server);
        }
        for name in ["near", "far", "web"] {
            cluster.wait_until_served("client", name)?;
        }
        let bed = Self { cluster, _servers: servers };
        for vip in bed.datagram_vips() {
            wait::until_ok(&format!("an answer from {vip}"), BOUND, || bed.datagrams(vip, 1))?;
        }
        Ok(bed)
    }

    fn datagram_vips(&self) -> impl Iterator<Item = SocketAddr> {
        let vips = ["near", "far"].into_iter().flat_map(|service| self.cluster.catalog.vips(service));
        vips.map(|vip| SocketAddr::new(vip.ip(), 53))
    }

    /// Connects over lanes and within the node, to pods and to a host's process; datagrams; names.
    fn load(&self, options: &Options) -> Result<()> {
        for vip in ["near", "far", "web"].into_iter().flat_map(|service| self.cluster.catalog.vips(service)) {
            let (vip, count) = (vip.to_string(), options.connects.to_string());
            self.cluster.hold("client", [vip.as_str(), "--count", &count])?.wait()?.success()?;
        }
        for vip in self.datagram_vips() {
            self.datagrams(vip, options.datagrams)?;
        }
        for _ in 0..options.calls {
            for vip in self.cluster.catalog.vips("far") {
                let call = self.cluster.attempt("client", &["call", "blocking", &vip.to_string()])?;
                ensure!(call.getpeername == Some(vip.to_string()), "the call to {vip} failed: {call:?}");
            }
            for server in DNS {
                let server = SocketAddr::new(server.parse()?, 53).to_string();
                let place = self.cluster.world.place("client");
                let told: Resolved = Program::probe(["resolve", &server, "far"]).run_in(place)?.success()?.json()?;
                ensure!(told.code == 0, "{server} does not know a service: {told:?}");
            }
        }
        Ok(())
    }

    /// Datagrams that are each answered.
    fn datagrams(&self, to: SocketAddr, count: u32) -> Result<()> {
        let (text, count) = (to.to_string(), count.to_string());
        let program = Program::probe(["udp", "calls", &text, "--count", &count]);
        let report: Datagrams = program.run_in(self.cluster.world.place("client"))?.json()?;
        ensure!(report.error.is_none() && report.answered == report.sent, "{to}: {report:?}");
        Ok(())
    }

    fn totals(&self) -> Result<Totals> {
        let mut totals = Totals::new();
        for daemon in self.cluster.daemons() {
            let links = Pinned::below(&daemon.bpffs().join("nodemesh"))?.links;
            // One program runs at many links.
            let programs: BTreeMap<u32, String> =
                links.into_iter().map(|link| (link.program, program_name(&link.name))).collect();
            for (id, name) in programs {
                let stats = RunStats::of(id)?;
                let total = totals.entry(name).or_insert(RunStats { runs: 0, nanoseconds: 0 });
                total.runs += stats.runs;
                total.nanoseconds += stats.nanoseconds;
            }
        }
        Ok(totals)
    }
}

/// The program of a pinned link, by its pin: the kernel keeps 15 bytes of a program's name, which some share.
fn program_name(pin: &Path) -> String {
    let name = pin.file_name().unwrap_or_default().to_string_lossy();
    if !pin.starts_with("netns") {
        // `<program>_<control group>`
        return name.rsplit_once('_').map_or(name.as_ref(), |(program, _)| program).to_owned();
    }
    // The pin is named after the namespace.
    if name == "__node" { "mesh_node_lookup" } else { "mesh_sk_lookup" }.to_owned()
}

/// What has been added between the two, by program.
fn rows(before: &Totals, after: &Totals) -> Result<Vec<Row>> {
    ensure!(before.keys().eq(after.keys()), "programs came or went: {before:?}, {after:?}");
    let rows = before.values().zip(after).map(|(before, (program, after))| Row {
        program: program.clone(),
        runs: after.runs - before.runs,
        nanoseconds: after.nanoseconds - before.nanoseconds,
    });
    Ok(rows.collect())
}

fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<20} {:>10} {:>8}\n", "program", "runs", "ns/run");
    for Row { program, runs, nanoseconds } in rows {
        let (mean, note) = match *runs {
            0 => ("-".to_owned(), "  did not run under this load"),
            1..FEW => (format!("{:.0}", *nanoseconds as f64 / *runs as f64), "  few runs"),
            _ => (format!("{:.0}", *nanoseconds as f64 / *runs as f64), ""),
        };
        text += &format!("{program:<20} {runs:>10} {mean:>8}{note}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(runs: u64, nanoseconds: u64) -> Totals {
        [("mesh_connect4".to_owned(), RunStats { runs, nanoseconds })].into()
    }

    #[test]
    fn what_ran_before_the_load_does_not_count() {
        let rows = rows(&totals(10, 1_000), &totals(1_010, 501_000)).expect("the same programs");
        assert_eq!(rows, [Row { program: "mesh_connect4".into(), runs: 1_000, nanoseconds: 500_000 }]);
        assert!(table(&rows).contains("500"), "{}", table(&rows));
        assert!(super::rows(&totals(1, 1), &Totals::new()).is_err());
    }

    #[test]
    fn programs_are_told_apart_by_their_pins() {
        let names = ["links/mesh_getpeername4_1a2b", "links/mesh_getpeername6_1a2b", "netns/client", "netns/__node"];
        let programs = ["mesh_getpeername4", "mesh_getpeername6", "mesh_sk_lookup", "mesh_node_lookup"];
        assert_eq!(names.map(|name| program_name(Path::new(name))), programs);
    }

    #[test]
    fn a_program_that_did_not_run_has_a_line_that_says_so() {
        let rows = rows(&totals(5, 5), &totals(5, 5)).expect("the same programs");
        assert!(table(&rows).contains("did not run"), "{}", table(&rows));
    }
}
