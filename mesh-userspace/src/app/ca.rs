//! A certificate authority in this process: one of its own (`nodemeshd ca run`), or inside the daemon.

use super::limits;
use crate::admin::{self, AuthoritySources};
use crate::ca::{Authority, CaError, JoinError, Placement, Server, Service, enrol, is_member};
use crate::config::{self, CaConfig, Config};
use crate::control::file::FileSource;
use crate::engine::Snapshot;
use crate::model::{NodeName, Object, ObjectKey, ObjectName, SpiffeId, Update, Workload};
use crate::runtime::{Blocker, Level, Ready, Tasks};
use crate::telemetry::ca::CaMetrics;
use crate::telemetry::catalog::CatalogMetrics;
use crate::telemetry::{Build, Metrics};
use anyhow::{Context as _, Result, anyhow, bail};
use arc_swap::ArcSwap;
use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use time::OffsetDateTime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// An authority, bound and not yet served.
pub(super) struct Hosted {
    service: Arc<Service>,
    server: Server,
    listen: Vec<SocketAddr>,
}

impl Hosted {
    /// Opens the authority and binds its port. `placement` says which identities a node may ask for.
    pub(super) fn bind(config: &config::Authority, metrics: &mut Metrics, placement: Placement) -> Result<Self> {
        let authority = Authority::open_with(&config.directory, config.lives, OffsetDateTime::now_utc())?;
        let server = Server::bind(&config.listen, metrics.accepts().clone())?;
        let service = Service::new(authority, placement, CaMetrics::register(metrics.registry()))?;
        Ok(Self { service, server, listen: config.listen.clone() })
    }

    /// The authority inside the daemon, if the configuration has one. The daemon's own node joins it.
    pub(super) fn inside(
        config: &Config,
        metrics: &mut Metrics,
        snapshot: &Arc<ArcSwap<Snapshot>>,
    ) -> Result<Option<Self>> {
        let Some(authority) = &config.ca else { return Ok(None) };
        let snapshot = snapshot.clone();
        let placement: Placement = Arc::new(move |node, id| {
            let snapshot = snapshot.load();
            snapshot.workloads().values().any(|workload| workload.node == *node && workload.identity == *id)
        });
        let hosted = Self::bind(authority, metrics, placement)?;
        hosted.enrol(&config.node, config.identity.directory())?;
        Ok(Some(hosted))
    }

    /// How full its bound is, now and whenever it is asked again.
    pub(super) fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        self.server.levels()
    }

    /// For the admin interface.
    pub(super) fn shown(&self) -> admin::Hosted {
        admin::Hosted { service: self.service.clone(), listen: self.listen.clone() }
    }

    /// Lets the node join on which this process runs, unless it is a member already. Who may read the authority's keys
    /// needs no token. A node that is revoked stays out, but does not take the authority with it.
    fn enrol(&self, node: &NodeName, identity: &Path) -> Result<()> {
        if is_member(self.service.authority(), node, identity) {
            return Ok(());
        }
        match enrol(self.service.authority(), node, identity) {
            Ok(membership) => tracing::info!(id = %membership.id, "this node has joined its own certificate authority"),
            Err(JoinError::Files(CaError::Refused(refusal))) => {
                tracing::error!(%node, "this node may not join its own certificate authority: {refusal}");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Answers until `stop` is cancelled.
    pub(super) async fn serve(self, stop: CancellationToken) {
        self.server.serve(self.service, stop).await;
    }
}

/// `nodemeshd ca run`: until SIGTERM or SIGINT.
pub(super) async fn run(config: CaConfig) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut metrics = Metrics::new(Build { version: env!("CARGO_PKG_VERSION"), abi: mesh_common::ABI_VERSION });
    let admin = admin::Server::bind(&config.admin)?;
    let catalog_metrics = CatalogMetrics::register(metrics.registry());
    let (updates, _health) = FileSource::spawn(&config.catalog, catalog_metrics)?;
    let placed = Placed::default();
    let hosted = Hosted::bind(&config.authority, &mut metrics, placed.placement())?;
    let mut bounds = limits::Sources::default();
    bounds.add(admin.levels());
    bounds.add(hosted.levels());
    bounds.show(metrics.registry());
    let (ready, catalog_read) = Ready::blocked("the catalog is not read yet");
    let mut tasks = Tasks::new(CancellationToken::new());
    tasks.spawn("catalog", placed.follow(updates, catalog_read));
    let stop = CancellationToken::new();
    let sources = AuthoritySources {
        metrics: Arc::new(metrics),
        not_ready: Arc::new({
            let ready = ready.clone();
            move || ready.outstanding().into_iter().map(str::to_owned).collect()
        }),
        authority: hosted.shown(),
    };
    let mut admin = tokio::spawn(admin.serve_authority(sources, stop.clone()));
    let mut serving = tokio::spawn(hosted.serve(stop.clone()));
    tracing::info!(listen = ?config.authority.listen, "the certificate authority has started");
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        exit = tasks.unasked_exit() => Err(exit.cause.context(format!("the task {:?} ended unasked", exit.task))),
        ended = &mut serving => Err(ended.err().map_or_else(|| anyhow!("the server ended unasked"), Into::into)),
        ended = &mut admin => Err(ended.err().map_or_else(|| anyhow!("the admin server ended unasked"), Into::into)),
    };
    let _stopping = ready.block("stopping");
    stop.cancel();
    tasks.stop().await;
    if !serving.is_finished() {
        serving.await.context("the certificate authority's server panicked")?;
    }
    if !admin.is_finished() {
        admin.await.context("the admin server panicked")?;
    }
    outcome
}

/// Which identity runs where, as the catalog says.
#[derive(Clone, Default)]
struct Placed(Arc<ArcSwap<HashSet<(NodeName, SpiffeId)>>>);

impl Placed {
    fn placement(&self) -> Placement {
        let placed = self.0.clone();
        Arc::new(move |node, id| placed.load().contains(&(node.clone(), id.clone())))
    }

    /// Applies updates for as long as they come; readiness waits for the first.
    async fn follow(self, mut updates: mpsc::Receiver<Update>, catalog_read: Blocker) -> Result<()> {
        let mut catalog_read = Some(catalog_read);
        let mut workloads = BTreeMap::new();
        while let Some(update) = updates.recv().await {
            apply(&mut workloads, update);
            // A change of the catalog is many updates: one set for all that are here.
            while let Ok(update) = updates.try_recv() {
                apply(&mut workloads, update);
            }
            let placed = workloads.values().map(|workload| (workload.node.clone(), workload.identity.clone()));
            self.0.store(Arc::new(placed.collect()));
            drop(catalog_read.take());
        }
        bail!("the catalog source ended")
    }
}

fn apply(workloads: &mut BTreeMap<ObjectName, Arc<Workload>>, update: Update) {
    match update {
        Update::Snapshot(catalog) => *workloads = catalog.workloads,
        Update::Upsert(Object::Workload(workload)) => {
            workloads.insert(workload.name.clone(), workload);
        }
        Update::Remove(ObjectKey::Workload(name)) => {
            workloads.remove(&name);
        }
        Update::Upsert(_) | Update::Remove(_) => {}
    }
}
