//! Measures the mesh on the testbed. Figures, not verdicts: nothing here fails because something was slow.

mod compare;
mod cpu;
mod figures;
mod machine;
mod measure;
mod micro;
mod pauses;
mod pki;
mod plane;
mod plot;
mod scale;
mod scene;
mod settings;
mod start;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about, args_conflicts_with_subcommands = true)]
struct Bench {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    compare: compare::Options,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Ten services and ten thousand, one local workload and a thousand: loading, one change, memory, and what a connect
    /// costs in the kernel.
    Scale(scale::Options),
    /// Nanoseconds per run of each eBPF program, under a short load of connections, datagrams and names.
    Micro(micro::Options),
}

fn main() -> Result<()> {
    let bench = Bench::parse();
    match &bench.verb {
        Some(Verb::Scale(options)) => scale::run(options),
        Some(Verb::Micro(options)) => micro::run(options),
        None => compare::run(&bench.compare),
    }
}
