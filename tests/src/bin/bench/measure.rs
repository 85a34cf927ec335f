//! What is measured of each plane.

use crate::cpu;
use crate::figures::Metric;
use crate::plane::Plane;
use anyhow::{Context, Result};
use clap::ValueEnum;
use mesh_tests::program::{Program, Running, binary};
use mesh_tests::report::Requests;
use serde_json::Value;
use std::time::Duration;

/// Figures of one measure.
pub(crate) type Taken = Vec<(Metric, f64)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// One stream and eight, both directions.
    Bulk,
    /// Requests at 1,000 and 4,000 a second.
    Paced,
    /// As many requests as 32 and 128 connections get answered.
    Closed,
    /// Connections of one request each.
    Fresh,
    /// Requests at 1,000 a second beside one bulk stream.
    Mixed,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) seconds: u32,
}

/// A single run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Measure {
    Bulk { streams: u32, is_reverse: bool },
    Paced { rate: u32, connections: u32 },
    Closed { connections: u32 },
    Fresh,
    Mixed,
}

impl Kind {
    pub(crate) fn measures(self) -> &'static [Measure] {
        match self {
            Self::Bulk => &[
                Measure::Bulk { streams: 1, is_reverse: false },
                Measure::Bulk { streams: 1, is_reverse: true },
                Measure::Bulk { streams: 8, is_reverse: false },
                Measure::Bulk { streams: 8, is_reverse: true },
            ],
            Self::Paced => {
                &[Measure::Paced { rate: 1_000, connections: 8 }, Measure::Paced { rate: 4_000, connections: 32 }]
            }
            Self::Closed => &[Measure::Closed { connections: 32 }, Measure::Closed { connections: 128 }],
            Self::Fresh => &[Measure::Fresh],
            Self::Mixed => &[Measure::Mixed],
        }
    }
}

impl Measure {
    pub(crate) fn take(self, plane: &Plane, times: Times) -> Result<Taken> {
        let before = carried(plane)?;
        match self {
            Self::Bulk { streams, is_reverse } => {
                let bulk = Bulk::run(plane, streams, is_reverse, times)?;
                Ok(bulk.figures(streams, is_reverse, carried(plane)? - before))
            }
            Self::Paced { rate, connections } => {
                let rate_text = rate.to_string();
                let load = load(plane, "paced", connections, times, &["--rate", &rate_text])?;
                let micros = per(carried(plane)? - before, load.requests);
                let named = |what: &str| (format!("paced{rate}_{what}"), format!("HTTP at {rate} requests/s, {what}"));
                Ok(latencies(&load, &named, Some(micros)))
            }
            Self::Closed { connections } => {
                let load = load(plane, "closed", connections, times, &[])?;
                let micros = per(carried(plane)? - before, load.requests);
                let named = |what: &str| {
                    (format!("closed{connections}_{what}"), format!("HTTP over {connections} connections, {what}"))
                };
                let (id, title) = named("rate");
                let mut taken = vec![(Metric::more(id, title, "requests/s"), load.rate())];
                taken.extend(latencies(&load, &named, Some(micros)));
                Ok(taken)
            }
            Self::Fresh => {
                let load = load(plane, "fresh", 32, times, &[])?;
                let micros = per(carried(plane)? - before, load.requests);
                let named = |what: &str| (format!("fresh_{what}"), format!("Connections of one request, {what}"));
                let (id, title) = named("rate");
                let mut taken = vec![(Metric::more(id, title, "connections/s"), load.rate())];
                taken.extend(latencies(&load, &named, Some(micros)));
                Ok(taken)
            }
            Self::Mixed => mixed(plane, times),
        }
    }
}

/// Processor time of what carries the bytes.
fn carried(plane: &Plane) -> Result<Duration> {
    plane.carriers.iter().map(|group| cpu::of_group(group)).sum()
}

/// Microseconds for each.
fn per(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / (count.max(1) as f64)
}

fn latencies(load: &Requests, named: &impl Fn(&str) -> (String, String), cpu_micros: Option<f64>) -> Taken {
    let quantiles = [("p50", load.p50_micros), ("p99", load.p99_micros), ("p99.9", load.p999_micros)].into_iter();
    let cpu = cpu_micros.map(|micros| ("processor time each", micros));
    let named = |(what, micros): (&str, f64)| {
        let (id, title) = named(what);
        (Metric::less(id.replace(' ', "_"), title, "us"), micros)
    };
    quantiles.chain(cpu).map(named).collect()
}

/// The path of the benchmarks' own client.
fn client() -> Program {
    Program::new(binary("mesh-load"))
}

fn load(plane: &Plane, verb: &str, connections: u32, times: Times, more: &[&str]) -> Result<Requests> {
    let (connections, seconds) = (connections.to_string(), times.seconds.to_string());
    let program =
        client().args([verb, &plane.web.to_string(), "--connections", &connections, "--seconds", &seconds]).args(more);
    program.run_in(&plane.client)?.success()?.json()
}

/// The time of the first requests, in microseconds: each has a connection of its own.
pub(crate) fn first(plane: &Plane, requests: u32) -> Result<Requests> {
    let program = client().args(["fresh", &plane.web.to_string(), "--connections", "1", "--seconds", "30"]);
    program.args(["--requests", &requests.to_string()]).run_in(&plane.client)?.success()?.json()
}

/// Opens connections and keeps them until it is dropped or waited for.
pub(crate) fn hold(plane: &Plane, connections: u32) -> Result<Running> {
    let program = client().args(["held", &plane.web.to_string(), "--connections", &connections.to_string()]);
    let mut running = program.start_in(&plane.client)?;
    running.wait_for_text("holding")?;
    Ok(running)
}

/// A transfer by iperf3.
struct Bulk {
    gigabytes: f64,
    seconds: f64,
}

fn iperf(plane: &Plane, streams: u32, is_reverse: bool, seconds: u32) -> Program {
    let (address, port) = (plane.bulk.ip().to_string(), plane.bulk.port().to_string());
    let program = Program::new("iperf3").args(["-c", &address, "-p", &port, "-J", "-P", &streams.to_string()]);
    program.args(["-t", &seconds.to_string()]).args(is_reverse.then_some("-R"))
}

impl Bulk {
    fn run(plane: &Plane, streams: u32, is_reverse: bool, times: Times) -> Result<Self> {
        Self::of(&iperf(plane, streams, is_reverse, times.seconds).run_in(&plane.client)?.success()?.json()?)
    }

    fn of(report: &Value) -> Result<Self> {
        let received = &report["end"]["sum_received"];
        let number =
            |name: &str| received[name].as_f64().with_context(|| format!("iperf3 reports no {name}: {report}"));
        Ok(Self { gigabytes: number("bytes")? / 1e9, seconds: number("seconds")? })
    }

    fn rate(&self) -> f64 {
        self.gigabytes * 8.0 / self.seconds
    }

    fn figures(&self, streams: u32, is_reverse: bool, cpu: Duration) -> Taken {
        let (direction, way) = if is_reverse { ("down", "to the client") } else { ("up", "to the server") };
        let (id, title) = (format!("bulk{streams}_{direction}"), format!("Bulk {way}, streams: {streams}"));
        vec![
            (Metric::more(&id, &title, "Gbit/s"), self.rate()),
            (
                Metric::less(format!("{id}_cpu"), format!("{title}, processor time"), "s/GB"),
                cpu.as_secs_f64() / self.gigabytes,
            ),
        ]
    }
}

/// Requests while one stream takes what it can get.
fn mixed(plane: &Plane, times: Times) -> Result<Taken> {
    let bulk = iperf(plane, 1, false, times.seconds + 1).start_in(&plane.client)?;
    let load = load(plane, "paced", 8, times, &["--rate", "1000"])?;
    let bulk = Bulk::of(&bulk.wait()?.success()?.json()?)?;
    let named = |what: &str| (format!("mixed_{what}"), format!("HTTP at 1000 requests/s beside a bulk stream, {what}"));
    let mut taken = latencies(&load, &named, None);
    taken.push((Metric::more("mixed_bulk", "The bulk stream beside these requests", "Gbit/s"), bulk.rate()));
    Ok(taken)
}
