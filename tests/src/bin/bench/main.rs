//! Measures the mesh on the testbed. Figures, not verdicts: nothing here fails because something was slow.

mod machine;
mod same_node;
mod scale;
mod settings;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about)]
enum Bench {
    /// Ten services and ten thousand: loading, one change, memory, and what a connect costs in the kernel.
    Scale(scale::Options),
    /// Two pods of one node: by the kernel, through the tunnel, and without the mesh.
    SameNode(same_node::Options),
}

fn main() -> Result<()> {
    match Bench::parse() {
        Bench::Scale(options) => scale::run(&options),
        Bench::SameNode(options) => same_node::run(&options),
    }
}
