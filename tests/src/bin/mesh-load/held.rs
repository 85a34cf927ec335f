//! Connections that are open and say nothing, until the end of input: then all must still answer.

use crate::Options;
use crate::connection::{Connection, open_all};
use crate::measure::Measure;
use anyhow::Result;
use mesh_tests::report::Requests;
use std::io::Read;

pub(crate) fn run(options: &Options) -> Result<Requests> {
    let mut measure = Measure::start()?;
    let mut connections = open_all(options.destination, options.connections)?;
    for _ in &connections {
        measure.answered(measure.started().elapsed());
    }
    eprintln!("holding {}", connections.len());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    // Those that did not last were not held.
    connections.iter_mut().try_for_each(Connection::exchange)?;
    Ok(measure.report())
}
