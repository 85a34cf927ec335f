//! `nodemeshd cleanup`: takes away what a killed daemon left in the kernel.

use super::reconcile::first_snapshot;
use crate::config::Config;
use crate::control::file::FileSource;
use crate::datapath;
use crate::model::Workload;
use crate::netns::Namespaces;
use crate::telemetry::catalog::CatalogMetrics;
use anyhow::{Context as _, Result};
use std::io::ErrorKind;
use std::path::Path;

/// Programs, links, maps and pins first, which a running daemon forbids; then the routing in the namespaces of this
/// node's workloads, as far as the catalog still names them.
///
/// # Errors
/// If a daemon is running with this configuration, or something cannot be taken away.
pub(super) async fn cleanup(config: &Config) -> Result<()> {
    datapath::cleanup(&config.datapath)?;
    let (mut updates, _health) = FileSource::spawn(&config.catalog, CatalogMetrics::default())
        .context("programs and pins are gone; the routing in workloads' namespaces stays")?;
    let catalog = first_snapshot(&mut updates).await?;
    let namespaces = Namespaces::spawn().context("cannot start the thread that enters network namespaces")?;
    for workload in catalog.workloads.values().filter(|workload| workload.node == config.node) {
        if let Some(path) = &workload.netns {
            restore(&namespaces, workload, path).await?;
        }
    }
    Ok(())
}

async fn restore(namespaces: &Namespaces, workload: &Workload, path: &Path) -> Result<()> {
    let namespace = match namespaces.open(path).await {
        // It went with its workload.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        opened => opened.with_context(|| format!("cannot open the network namespace {}", path.display()))?,
    };
    namespaces
        .restore(&namespace)
        .await
        .with_context(|| format!("cannot remove the routing that was made for {}", workload.name))
}
