//! From a daemon's start to its readiness.

use anyhow::{Context, Result};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::binary;
use std::time::{Duration, Instant};

/// How long a start may take before the run is given up.
const BOUND: Duration = Duration::from_mins(1);

/// What starting a daemon took.
pub(crate) struct Started {
    pub(crate) ready: Duration,
    /// The size of the file that was started.
    pub(crate) binary_bytes: f64,
}

/// Restarts all daemons of a mesh; times the first one's start, while the others do not run.
pub(crate) fn restart(mesh: &mut Cluster) -> Result<Started> {
    let nodes: Vec<String> = mesh.world.nodes().map(|node| node.name().to_owned()).collect();
    for node in &nodes {
        mesh.daemon_mut(node).stop()?;
    }
    let (first, others) = nodes.split_first().context("a mesh has nodes")?;
    let daemon = mesh.daemon_mut(first);
    let began = Instant::now();
    daemon.spawn()?;
    while daemon.get("/readyz").map_or(true, |response| response.status != 200) {
        anyhow::ensure!(began.elapsed() < BOUND, "the daemon is not ready:\n{}", daemon.log_end());
    }
    let ready = began.elapsed();
    for node in others {
        mesh.daemon_mut(node).spawn()?;
        mesh.daemon_mut(node).wait_until_ready_within(BOUND)?;
    }
    Ok(Started { ready, binary_bytes: binary_bytes()? })
}

fn binary_bytes() -> Result<f64> {
    let path = binary("nodemeshd");
    Ok(path.metadata().with_context(|| format!("cannot look at {}", path.display()))?.len() as f64)
}
