//! The composition root: configuration in, a bound daemon out, a running daemon until it is told to stop.

mod bind;
mod ca;
mod certificates;
mod cleanup;
mod command;
mod endpoints;
mod host;
mod issuance;
mod limits;
mod policies;
mod reconcile;
mod running;
mod sources;
mod traffic;
mod workloads;

pub use command::Command;
pub use running::Running;

use crate::config::Config;
use crate::datapath::Datapath;
use crate::identity::Identities;
use crate::model::{Catalog, Update};
use crate::netns::Namespaces;
use crate::proxy::{Context, Datagrams};
use crate::telemetry::Metrics;
use crate::telemetry::datapath::LeftOut;
use crate::telemetry::flows::FlowMetrics;
use crate::{admin, control, tunnel};
use anyhow::Result;
use issuance::Issuance;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// Everything bound and loaded, nothing captured yet.
pub struct App {
    config: Config,
    context: Arc<Context>,
    metrics: Metrics,
    identities: Identities,
    issuance: Option<Issuance>,
    catalog: watch::Receiver<control::Health>,
    first: Catalog,
    updates: mpsc::Receiver<Update>,
    tunnel: tunnel::Server,
    admin: admin::Server,
    namespaces: Namespaces,
    flows: FlowMetrics,
    datagrams: Datagrams,
    datapath: Datapath,
    left_out: LeftOut,
    authority: Option<ca::Hosted>,
}

impl App {
    /// Serves until SIGTERM or SIGINT, then drains and removes everything it made in the kernel.
    ///
    /// # Errors
    /// If a part of the daemon ended unasked. What can be removed is removed first.
    pub async fn run(self) -> Result<()> {
        let mut running = self.start()?;
        let outcome = running.until_told().await;
        running.drain().await?;
        outcome
    }
}
