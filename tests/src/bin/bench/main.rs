//! Measures the mesh on the testbed. Figures, not verdicts: nothing here fails because something was slow.

mod machine;
mod scale;
mod settings;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about)]
enum Bench {
    /// Ten services and ten thousand: loading, one change, memory, and what a connect costs in the kernel.
    Scale(scale::Options),
}

fn main() -> Result<()> {
    match Bench::parse() {
        Bench::Scale(options) => scale::run(&options),
    }
}
