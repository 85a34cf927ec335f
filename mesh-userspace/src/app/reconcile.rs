//! The one task that writes: updates go through the engine, their difference through the datapath, and workloads of
//! this node are armed and disarmed in the order that leaves no gap.

use super::workloads::Workloads;
use crate::datapath::Datapath;
use crate::engine::{Capacity, Engine, LeftOut, Snapshot, Tables, diff, fit};
use crate::identity::Identities;
use crate::model::{Catalog, Object, ObjectKey, SpiffeId, Update, WorkloadUid};
use crate::proxy::{self, HealthChecks, PlaintextSweep};
use crate::runtime::{Blocker, Ready};
use crate::telemetry;
use anyhow::{Context as _, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often namespaces of armed workloads are checked and failed ones are tried again.
const TICK: Duration = Duration::from_millis(500);

/// A change that could not be applied is tried again after this, or with the next change.
const RETRY: Duration = Duration::from_secs(5);

/// What a catalog source sends first.
///
/// # Errors
/// If it ends before that, or sends something else.
pub(super) async fn first_snapshot(updates: &mut mpsc::Receiver<Update>) -> Result<Catalog> {
    match updates.recv().await.context("the catalog source ended before its first snapshot")? {
        Update::Snapshot(catalog) => Ok(catalog),
        Update::Upsert(_) | Update::Remove(_) => bail!("the catalog source sent a delta before its snapshot"),
    }
}

/// What the reconciler reports about the workloads of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// Updates applied so far.
    pub(super) generation: u64,
    pub(super) armed: BTreeSet<WorkloadUid>,
    /// Workloads that could not be armed, and why.
    pub(super) failed: BTreeMap<WorkloadUid, String>,
}

/// Owns the datapath while the daemon runs.
pub(super) struct Reconciler {
    pub(super) engine: Engine,
    pub(super) datapath: Datapath,
    pub(super) workloads: Workloads,
    pub(super) context: Arc<proxy::Context>,
    pub(super) identities: Identities,
    pub(super) report: watch::Sender<Report>,
    pub(super) ready: Ready,
    /// Holds readiness back while the catalog is not applied.
    pub(super) blocked: Option<Blocker>,
    /// Holds readiness back while not all of the catalog fits the kernel's maps.
    pub(super) unfit: Unfit,
    /// When a change that could not be applied is tried again, if there is one.
    pub(super) retry_at: Option<Instant>,
    /// Workloads that have ended since the last change was applied.
    pub(super) ended: Vec<WorkloadUid>,
    /// Identities of this node's workloads, as lanes may be proven with.
    pub(super) spoken_for: BTreeSet<SpiffeId>,
    /// Ends plaintext that a change forbids.
    pub(super) plaintext: PlaintextSweep,
    /// Probes this node's endpoints.
    pub(super) health: HealthChecks,
    /// What a predecessor left is removed.
    pub(super) is_settled: bool,
    /// What the kernel's tables were written from.
    pub(super) applied: Arc<Snapshot>,
}

impl Reconciler {
    /// Applies updates until `release` (capture stops, connections go on), then waits for `disarm` and gives the
    /// datapath back, disarmed.
    ///
    /// # Errors
    /// If the catalog source ends.
    pub(super) async fn run(
        mut self,
        first: Catalog,
        mut updates: mpsc::Receiver<Update>,
        release: CancellationToken,
        disarm: oneshot::Receiver<()>,
    ) -> Result<Datapath> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut current = Tables::default();
        self.engine.handle_update(Update::Snapshot(first), Instant::now());
        self.apply_or_retry(&mut current).await;
        loop {
            tokio::select! {
                () = release.cancelled() => break,
                update = updates.recv() => {
                    let update = update.context("the catalog source ended")?;
                    self.accept(update);
                    // Updates that have piled up become one difference.
                    while let Ok(update) = updates.try_recv() {
                        self.accept(update);
                    }
                    self.apply_or_retry(&mut current).await;
                }
                _ = tick.tick() => {
                    if self.retry_at.is_some_and(|at| Instant::now() >= at) {
                        self.apply_or_retry(&mut current).await;
                    }
                    self.tend().await;
                }
            }
        }
        self.workloads.release_all(&mut self.datapath);
        // A dropped sender means the same: end.
        let _ = disarm.await;
        self.workloads.disarm_all(&mut self.datapath).await;
        Ok(self.datapath)
    }

    /// Hands an update to the engine, and notes the workload that it ends: connections to it end with it, whatever
    /// answers at its address next.
    fn accept(&mut self, update: Update) {
        let (name, next) = match &update {
            Update::Upsert(Object::Workload(workload)) => (Some(&workload.name), Some(&workload.uid)),
            Update::Remove(ObjectKey::Workload(name)) => (Some(name), None),
            _ => (None, None),
        };
        let known = name.and_then(|name| self.engine.desired().snapshot.workload(name));
        let ended = known.map(|workload| workload.uid.clone()).filter(|uid| Some(uid) != next);
        self.ended.extend(ended);
        self.engine.handle_update(update, Instant::now());
    }

    /// Applies; what cannot be applied (a table is full) is reported and tried again, and what is in force stays.
    async fn apply_or_retry(&mut self, current: &mut Tables) {
        match self.apply(current).await {
            Ok(()) => {
                if self.blocked.take().is_some() {
                    tracing::info!("the catalog is applied");
                }
                self.retry_at = None;
            }
            Err(error) => {
                // Some operations are done and some are not: the next attempt writes everything.
                self.datapath.distrust_tables();
                *current = Tables::default();
                if self.retry_at.replace(Instant::now() + RETRY).is_none() {
                    tracing::error!(error = format!("{error:#}"), "cannot apply the catalog; will try again");
                }
                self.blocked =
                    Some(self.ready.block("a change of the catalog cannot be written to the kernel's tables"));
            }
        }
    }

    async fn apply(&mut self, current: &mut Tables) -> Result<()> {
        let (desired, left_out) = fit(self.engine.desired().clone(), &Capacity::KERNEL);
        self.unfit.show(left_out, &self.ready);
        warn_of_another_trust_domain(current, &desired);
        // Certificates are under way before the workloads that need them are armed.
        let spoken_for = identities_of(&desired);
        self.identities.want(spoken_for.clone());
        // The proxy must know a destination before the kernel sends connections for it.
        let before = self.context.snapshot.swap(desired.snapshot.clone());
        self.context.balancers.follow(&self.context.snapshot);
        self.recheck(&before, &desired.snapshot).await?;
        self.workloads.disarm_outdated(&desired.local, &mut self.datapath).await;
        // Only now: a connection that loses its lane here must find in the snapshot why.
        self.speak_for(spoken_for);
        self.datapath.apply(&diff(current, &desired)).context("cannot write the kernel's tables")?;
        self.workloads.renumber(&mut self.datapath).context("cannot write the kernel's tables")?;
        self.workloads.want(desired.local.clone());
        self.applied = desired.snapshot.clone();
        *current = desired;
        for uid in self.ended.drain(..) {
            self.context.tunnel.forget(&uid);
        }
        self.tend().await;
        if !std::mem::replace(&mut self.is_settled, true) {
            self.datapath.settle().context("cannot remove what a predecessor left")?;
        }
        Ok(())
    }

    /// Speaks for these identities from now on; what was proven with others ends, in both directions.
    fn speak_for(&mut self, wanted: BTreeSet<SpiffeId>) {
        let spoken_for = std::mem::replace(&mut self.spoken_for, wanted);
        for id in spoken_for.difference(&self.spoken_for) {
            self.context.tunnel.forget_source(id);
        }
    }

    /// Cuts live connections that the new picture forbids; whoever is decided about from now on reads it.
    async fn recheck(&self, before: &Snapshot, after: &Arc<Snapshot>) -> Result<()> {
        if after.judges_like(before) {
            return Ok(());
        }
        let (context, after) = (self.context.clone(), after.clone());
        // Thousands of connections are a moment of work: not on a thread that carries bytes.
        let cut = tokio::task::spawn_blocking(move || context.registry.recheck(&after)).await?;
        for (reason, count) in cut {
            self.context.reports.metrics.cut(reason, count);
            tracing::info!(reason, count, "cut live connections that are no longer allowed");
        }
        Ok(())
    }

    /// Arms what should be armed and is not; disarms what has lost its namespace.
    async fn tend(&mut self) {
        self.workloads.disarm_vanished(&mut self.datapath).await;
        let failed = self.workloads.arm_missing(&mut self.datapath).await;
        self.plaintext.follow(&self.applied).await;
        self.health.follow(&self.applied);
        let armed: BTreeSet<WorkloadUid> = self.workloads.armed().collect();
        let generation = self.engine.generation();
        self.report.send_if_modified(|report| {
            let next = Report { generation, armed, failed };
            let changed = *report != next;
            *report = next;
            changed
        });
    }
}

/// What the kernel's maps have no room for.
pub(super) struct Unfit {
    shown: telemetry::datapath::LeftOut,
    now: LeftOut,
    blocker: Option<Blocker>,
}

impl Unfit {
    pub(super) fn new(shown: telemetry::datapath::LeftOut) -> Self {
        Self { shown, now: LeftOut::new(), blocker: None }
    }

    fn show(&mut self, left_out: LeftOut, ready: &Ready) {
        if left_out == self.now {
            return;
        }
        for map in self.now.keys().filter(|map| !left_out.contains_key(*map)) {
            self.shown.set(map, 0);
        }
        for (map, entries) in &left_out {
            self.shown.set(map, *entries);
            tracing::error!(map, entries, "the kernel's map has no room for this many entries of the catalog");
        }
        self.blocker = (!left_out.is_empty())
            .then(|| ready.block("not all of the catalog fits the kernel's maps (nodemesh_bpf_map_left_out)"));
        self.now = left_out;
    }
}

/// The identities that this node speaks for.
fn identities_of(tables: &Tables) -> BTreeSet<SpiffeId> {
    tables.local.values().map(|workload| workload.identity.clone()).collect()
}

/// The daemon's certificates belong to the trust domain it started with.
fn warn_of_another_trust_domain(current: &Tables, desired: &Tables) {
    if let (Some(old), Some(new)) = (&current.snapshot.mesh, &desired.snapshot.mesh)
        && old.trust_domain != new.trust_domain
    {
        tracing::error!(
            old = %old.trust_domain, new = %new.trust_domain,
            "MeshConfig names another trust domain: connections fail until the daemon is restarted with identities of it"
        );
    }
}
