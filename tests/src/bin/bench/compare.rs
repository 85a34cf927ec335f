//! The mesh beside what it is compared with: every round takes every measure of every plane, in turn.

use crate::cpu::{self, Watch};
use crate::figures::{Figures, Metric};
use crate::machine::{self, middle};
use crate::measure::{self, Kind, Taken, Times};
use crate::pauses::{self, Pauses};
use crate::plane::Plane;
use crate::plot;
use crate::scene::{PLANES, Scene};
use anyhow::{Context, Result, ensure};
use clap::Args;
use clap::builder::PossibleValuesParser;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

/// What a short run has: rounds, seconds a measure, repeats.
const QUICK: (u32, u32, u32) = (1, 1, 0);

/// Idle connections that one client opens, one after the other.
const AT_ONCE: u32 = 4_000;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// One round of short measures: for a look, not for a claim.
    #[arg(long)]
    quick: bool,
    /// Rounds; each takes every measure of every plane once.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of one measure.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// How often a measure is taken again that others' use of the processors disturbed, before it counts as it is.
    #[arg(long, default_value_t = 4)]
    repeats: u32,
    /// What is compared.
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(PLANES), default_values = PLANES)]
    planes: Vec<String>,
    /// What is measured.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Kind::Bulk, Kind::Paced, Kind::Closed, Kind::Fresh, Kind::Mixed])]
    measures: Vec<Kind>,
    /// Idle connections whose memory is measured; 0 for none.
    #[arg(long, value_delimiter = ',', default_values_t = [5_000])]
    held: Vec<u32>,
    /// TCP congestion control of all namespaces, for everyone; the machine's default otherwise.
    #[arg(long)]
    congestion: Option<String>,
    /// Bytes of a packet on all links.
    #[arg(long, default_value_t = 1_500, value_parser = clap::value_parser!(u16).range(1_280..))]
    mtu: u16,
    /// Envoy's program, if it is compared.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Writes `report.json`, `tables.md` and a picture a metric into this folder.
    #[arg(long)]
    out: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let asked = (options.rounds, options.seconds, options.repeats);
    let (rounds, seconds, repeats) = if options.quick { QUICK } else { asked };
    let mut scene =
        Scene::start(&options.planes, options.envoy.as_deref(), options.congestion.as_deref(), options.mtu)?;
    let mut run = Run {
        figures: Figures::default(),
        times: Times { seconds },
        repeats,
        disturbed: Vec::new(),
        pauses: Vec::new(),
    };
    run.once(&mut scene, &options.held)?;
    for round in 1..=rounds {
        eprintln!("bench: round {round} of {rounds}");
        run.round(&scene, &options.measures, round)?;
    }
    went_by_their_ways(&scene)?;
    let planes: Vec<_> = scene.planes.iter().map(|plane| (plane.name, plane.baseline)).collect();
    let tables = run.figures.tables(&planes);
    println!("{tables}");
    let machine = machine::describe();
    println!("{machine}");
    run.disturbed.iter().for_each(|line| println!("disturbed: {line}"));
    if !run.pauses.is_empty() {
        let lost: Vec<_> = run.pauses.iter().map(|pauses| pauses.lost_ms).collect();
        let longest = run.pauses.iter().map(|pauses| pauses.longest_ms).fold(0.0, f64::max);
        println!(
            "the machine's own pauses before each round: {:.1} ms of a second, the longest {longest:.1} ms",
            middle(&lost)
        );
    }
    if let Some(folder) = &options.out {
        let parameters = json!({
            "rounds": rounds, "seconds": seconds, "held": options.held, "congestion": options.congestion, "mtu": options.mtu,
        });
        let report = json!({
            "bench": "compare", "machine": machine, "parameters": parameters, "disturbed": run.disturbed,
            "pauses": run.pauses,
            "figures": run.figures,
        });
        write(folder, &run.figures, &planes, &tables, &report)?;
    }
    Ok(())
}

struct Run {
    figures: Figures,
    times: Times,
    repeats: u32,
    /// Measures that count although others used the processors.
    disturbed: Vec<String>,
    /// Of the machine, before each round.
    pauses: Vec<Pauses>,
}

impl Run {
    /// What is not taken in rounds: first connections, and memory.
    fn once(&mut self, scene: &mut Scene, held: &[u32]) -> Result<()> {
        for number in 0..scene.planes.len() {
            let name = scene.planes[number].name;
            eprintln!("bench: {name}: first connections and memory");
            if let Some(started) = scene.restart(name)? {
                self.figures.take(
                    name,
                    Metric::less("binary", "The daemon's binary", "MB"),
                    started.binary_bytes / 1e6,
                );
                let ready = Metric::less("start_ready", "From start to readiness", "ms");
                self.figures.take(name, ready, started.ready.as_secs_f64() * 1e3);
            }
            let plane = &scene.planes[number];
            self.memory(plane, "idle", "Memory (PSS), idle: the larger side")?;
            let cold = Metric::less("first_cold", "The first connection and request", "us");
            self.figures.take(name, cold, measure::first(plane, 1)?.p50_micros);
            let warm = Metric::less("first_warm", "A later connection and request, one at a time: p50", "us");
            self.figures.take(name, warm, measure::first(plane, 200)?.p50_micros);
            let is_carried = !plane.carriers.is_empty();
            for (turn, count) in held.iter().filter(|count| **count > 0 && is_carried).enumerate() {
                // What the connections before have left is not to carry these. Only the mesh is started anew: of others,
                // one number a run is right.
                if turn > 0 && scene.restart(name)?.is_some() {
                    measure::first(&scene.planes[number], 200)?;
                }
                self.held(&scene.planes[number], *count)?;
            }
        }
        Ok(())
    }

    fn memory(&mut self, plane: &Plane, id: &str, title: &str) -> Result<()> {
        let sides = resident(plane)?;
        let Some(most) = sides.into_iter().max() else { return Ok(()) };
        self.figures.take(plane.name, Metric::less(id, title, "MiB"), most as f64 / 1024.0);
        Ok(())
    }

    /// What each idle connection adds to the memory of each side.
    fn held(&mut self, plane: &Plane, count: u32) -> Result<()> {
        let before = resident(plane)?;
        let whole = (0..count / AT_ONCE).map(|_| AT_ONCE);
        let rest = Some(count % AT_ONCE).filter(|rest| *rest > 0);
        let holding = whole.chain(rest).map(|part| measure::hold(plane, part)).collect::<Result<Vec<_>>>()?;
        let during = resident(plane)?;
        for ((side, before), during) in ["client's", "server's"].into_iter().zip(before).zip(during) {
            let id = format!("held{count}_{}", &side[..6]);
            let title = format!("Memory of each of {count} idle connections, the {side} side");
            let each = during.saturating_sub(before) as f64 / f64::from(count);
            self.figures.take(plane.name, Metric::less(id, title, "KiB"), each);
        }
        for held in holding {
            held.wait()?.success()?;
        }
        Ok(())
    }

    fn round(&mut self, scene: &Scene, kinds: &[Kind], round: u32) -> Result<()> {
        self.pauses.push(pauses::look()?);
        let groups = scene.groups();
        for measure in kinds.iter().flat_map(|kind| kind.measures()) {
            // Who comes first changes, so that nobody is always measured after the same one.
            let start = round as usize % scene.planes.len();
            for plane in scene.planes[start..].iter().chain(&scene.planes[..start]) {
                let what = || format!("round {round}, {}, {measure:?}", plane.name);
                let (taken, disturbed) =
                    undisturbed(&groups, self.repeats, || measure.take(plane, self.times)).with_context(what)?;
                self.disturbed.extend(disturbed.map(|cores| format!("{}: {cores:.2} cores", what())));
                for (metric, figure) in taken {
                    self.figures.take(plane.name, metric, figure);
                }
            }
        }
        Ok(())
    }
}

/// Takes a measure again while others use the processors; the last one counts in any case, with what others took.
fn undisturbed(
    groups: &[PathBuf],
    repeats: u32,
    mut take: impl FnMut() -> Result<Taken>,
) -> Result<(Taken, Option<f64>)> {
    let mut repeated = 0;
    loop {
        let watch = Watch::start(groups);
        let taken = take()?;
        match watch.disturbed() {
            Some(_) if repeated < repeats => repeated += 1,
            disturbed => return Ok((taken, disturbed)),
        }
    }
}

fn resident(plane: &Plane) -> Result<Vec<u64>> {
    plane.carriers.iter().map(|group| cpu::resident(group)).collect()
}

/// Figures of another path than the one that they are printed under would be worse than none.
fn went_by_their_ways(scene: &Scene) -> Result<()> {
    for mesh in &scene.meshes {
        let metrics = mesh.daemon("n1").metrics()?;
        let opened =
            |how: &str| metrics.sum("nodemesh_tcp_connections_opened_total", &[("connection_security_policy", how)]);
        let measured = |name: &str| {
            scene.planes.iter().any(|plane| {
                plane.name == name && plane.carriers.iter().all(|group| group.starts_with(mesh.world.cgroup()))
            })
        };
        for (name, how) in [
            ("same-node", "kernel"),
            ("same-node-tunnel", "mutual_tls"),
            ("lanes", "mutual_tls"),
            ("quic", "mutual_tls"),
        ] {
            ensure!(!measured(name) || opened(how) > 0.0, "{name}: no connection is {how}:\n{}", metrics.text());
        }
    }
    Ok(())
}

fn write(
    folder: &PathBuf,
    figures: &Figures,
    planes: &[(&'static str, &'static str)],
    tables: &str,
    report: &Value,
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    write("report.json", &format!("{report:#}\n"))?;
    write("tables.md", tables)?;
    figures.series().try_for_each(|series| write(&format!("{}.svg", series.metric.id), &plot::svg(series, planes)))
}
