//! Connections that are open and say nothing.

use crate::Options;
use crate::connection::open_all;
use crate::measure::Measure;
use anyhow::Result;
use mesh_tests::report::Requests;
use std::io::Read;

pub(crate) fn run(options: &Options) -> Result<Requests> {
    let mut measure = Measure::start()?;
    let connections = open_all(options.destination, options.connections)?;
    for _ in &connections {
        measure.answered(measure.started().elapsed());
    }
    eprintln!("holding {}", connections.len());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(measure.report())
}
