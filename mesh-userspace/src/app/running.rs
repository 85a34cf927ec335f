//! The running daemon: its tasks, and the order in which it ends.

use super::host::OwnPorts;
use super::reconcile::{Reconciler, Report, Unfit};
use super::workloads::Workloads;
use super::{App, ca, sources};
use crate::datapath::{Admissions, Datapath, Event, Events, monotonic_nanoseconds};
use crate::engine::Engine;
use crate::identity::Identities;
use crate::proxy::{Context, Dialler, HealthChecks, Inbound, PlaintextSweep};
use crate::runtime::{Ready, Tasks};
use crate::telemetry::flows::FlowMetrics;
use crate::telemetry::logging;
use anyhow::{Context as _, Result, anyhow, bail};
use mesh_common::event::FlowRecord;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The heartbeat is written this many times within its timeout.
const BEATS_PER_TIMEOUT: u32 = 5;
/// How often connections are looked for that the kernel carried and whose destination has not told their end.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Every how many of these times what the kernel carries is listed, to find connections whose end was never told.
const LOOKS_PER_LISTING: u32 = 60;
/// Others have the thread after so many records of the kernel.
const RECORDS_PER_TURN: usize = 64;
/// How often idle metric series are looked for.
const EXPIRY_INTERVAL: Duration = Duration::from_mins(1);

/// A daemon that serves. [`Running::drain`] ends it.
pub struct Running {
    context: Arc<Context>,
    tasks: Tasks,
    reconciler: JoinHandle<Result<Datapath>>,
    /// Capture stops; connections go on.
    release: CancellationToken,
    /// Everything is disarmed.
    disarm: oneshot::Sender<()>,
    admin: JoinHandle<()>,
    stop_admin: CancellationToken,
    ready: Ready,
    drain: Duration,
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    identities: Identities,
}

impl App {
    /// Starts every task.
    ///
    /// # Errors
    /// If signals cannot be listened to or the event buffer cannot be read.
    pub fn start(mut self) -> Result<Running> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let hangup = signal(SignalKind::hangup())?;
        let identities = self.identities.clone();
        let (ready, blocked) = Ready::blocked("the catalog is not applied yet");
        let release = CancellationToken::new();
        let (report, reports) = watch::channel(Report::default());
        let mut tasks = Tasks::new(CancellationToken::new());
        self.spawn_upkeep(&mut tasks)?;
        if let Some(issuance) = self.issuance.take() {
            issuance.spawn(identities.clone(), ready.clone(), &mut tasks);
        }

        let mark = self.config.datapath.mark;
        let dialler = Dialler {
            context: self.context.clone(),
            namespaces: self.namespaces.clone(),
            bypass: self.datapath.bypass(),
            mark,
        };
        let inbound = Inbound {
            context: self.context.clone(),
            dialler: dialler.clone(),
            datagrams: self.datagrams.clone(),
            draining: release.clone(),
        };
        tasks.spawn("inbound", inbound.serve(self.tunnel));

        let authority = self.authority.take();
        let shown = authority.as_ref().map(ca::Hosted::shown);
        if let Some(authority) = authority {
            tasks.spawn("certificate authority", async move {
                authority.serve(CancellationToken::new()).await;
                bail!("its server ended")
            });
        }
        let wiring = sources::Wiring {
            authority: shown,
            context: self.context.clone(),
            metrics: Arc::new(self.metrics),
            identities: self.identities,
            catalog: self.catalog,
            reports: reports.clone(),
            ready: ready.clone(),
            counters: self.datapath.counters(),
            started: Instant::now(),
        };
        let stop_admin = CancellationToken::new();
        let admin = tokio::spawn(self.admin.serve(wiring.sources(), stop_admin.clone()));

        let tuples = self.datapath.tuples();
        let ports = OwnPorts { outbound: self.config.datapath.outbound_port, others: self.config.own_ports() };
        let plaintext = PlaintextSweep::new(self.context.clone(), self.namespaces.clone(), self.datapath.admissions());
        let reconciler = Reconciler {
            engine: Engine::new(self.config.node.clone()).with_own_ports(ports.outbound, &ports.others),
            datapath: self.datapath,
            workloads: Workloads::new(self.context.clone(), self.namespaces, tuples, self.datagrams, ports, mark),
            context: self.context.clone(),
            identities: identities.clone(),
            report,
            ready: ready.clone(),
            blocked: Some(blocked),
            unfit: Unfit::new(self.left_out),
            retry_at: None,
            ended: Vec::new(),
            spoken_for: BTreeSet::new(),
            plaintext,
            health: HealthChecks::new(dialler),
            is_settled: false,
            applied: Arc::default(),
        };
        let (disarm, disarmed) = oneshot::channel();
        let reconciler = tokio::spawn(reconciler.run(self.first, self.updates, release.clone(), disarmed));
        tracing::info!(node = %self.config.node, "started");
        Ok(Running {
            context: self.context,
            tasks,
            reconciler,
            release,
            disarm,
            admin,
            stop_admin,
            ready,
            drain: self.config.drain,
            terminate,
            interrupt,
            hangup,
            identities,
        })
    }

    fn spawn_upkeep(&mut self, tasks: &mut Tasks) -> Result<()> {
        let heartbeat = self.datapath.heartbeat();
        let beat = self.config.datapath.heartbeat_timeout / BEATS_PER_TIMEOUT;
        // Nothing is armed yet: no connect finds a workload whose daemon seems silent only because a task has not run yet.
        heartbeat.beat().context("cannot write the heartbeat")?;
        tasks.spawn("heartbeat", async move {
            let mut interval = tokio::time::interval(beat);
            loop {
                interval.tick().await;
                heartbeat.beat().context("cannot write the heartbeat")?;
            }
        });
        let mut books =
            Books { events: self.datapath.events()?, flows: self.flows.clone(), context: self.context.clone() };
        let admissions = self.datapath.admissions();
        tasks.spawn("events", async move {
            let mut upkeep = tokio::time::interval(UPKEEP_INTERVAL);
            let mut looks = 0_u32;
            loop {
                tokio::select! {
                    written = books.events.wait() => written.context("cannot read the event buffer")?,
                    _ = upkeep.tick() => {
                        books.context.carried.expire(Instant::now());
                        looks = looks.wrapping_add(1);
                        if looks.is_multiple_of(LOOKS_PER_LISTING) {
                            forget_lost(&books.context, &admissions);
                        }
                        continue;
                    }
                }
                while books.enter_some() {
                    tokio::task::yield_now().await;
                }
            }
        });
        if let Some(log) = self.datapath.kernel_log()? {
            tasks.spawn("kernel log", async move { log.await.context("cannot read the programs' log") });
        }
        let namespaces = self.namespaces.clone();
        tasks.spawn("netns", async move {
            namespaces.died().await;
            bail!("the thread that enters network namespaces has died")
        });
        let connections = self.context.metrics.clone();
        tasks.spawn("expiry", async move {
            let mut interval = tokio::time::interval(EXPIRY_INTERVAL);
            loop {
                interval.tick().await;
                connections.expire(Instant::now());
            }
        });
        Ok(())
    }
}

impl Running {
    /// Waits for SIGTERM or SIGINT; SIGHUP reads the identities anew.
    ///
    /// # Errors
    /// If a part of the daemon ends first.
    pub async fn until_told(&mut self) -> Result<()> {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return Ok(()),
                _ = self.interrupt.recv() => return Ok(()),
                _ = self.hangup.recv() => self.reload_identities(),
                exit = self.tasks.unasked_exit() => {
                    return Err(exit.cause.context(format!("the task {:?} ended unasked", exit.task)));
                }
                outcome = &mut self.reconciler => return Err(match outcome {
                    Ok(Ok(_)) => anyhow!("the reconciler ended unasked"),
                    Ok(Err(error)) => error.context("the reconciler failed"),
                    Err(panic) => panic.into(),
                }),
            }
        }
    }

    /// New handshakes use the new certificates; connections that exist go on. On an error the old ones stay.
    fn reload_identities(&self) {
        match self.identities.reload() {
            Ok(()) => tracing::info!(certificates = self.identities.certificates().len(), "identities read anew"),
            Err(error) => tracing::error!(%error, "cannot read the identities anew; the old ones stay in use"),
        }
    }

    /// Stops capture, lets connections end for the configured time, disarms, and unloads. A second signal cuts the
    /// waiting short.
    ///
    /// # Errors
    /// If something that the daemon made in the kernel could not be removed.
    pub async fn drain(mut self) -> Result<()> {
        let _draining = self.ready.block("draining");
        self.release.cancel();
        self.context.connections.close();
        tracing::info!(connections = self.context.connections.len(), deadline = ?self.drain, "draining");
        tokio::select! {
            () = self.context.connections.wait() => {}
            () = tokio::time::sleep(self.drain) => {}
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        tracing::info!(cut = self.context.connections.len(), "drained");
        let datapath = if self.reconciler.is_finished() {
            None
        } else {
            // A reconciler that has ended meanwhile needs no telling.
            let _ = self.disarm.send(());
            self.reconciler.await.ok().and_then(Result::ok)
        };
        self.tasks.stop().await;
        self.stop_admin.cancel();
        self.admin.await.context("the admin server panicked")?;
        match datapath {
            Some(datapath) => datapath.unload().context("cannot remove what the daemon made in the kernel"),
            // Its drop has happened in the reconciler; the pins that stay are adopted by the next start.
            None => Ok(()),
        }
    }
}

/// Where what the kernel tells is entered.
struct Books {
    events: Events,
    flows: FlowMetrics,
    context: Arc<Context>,
}

impl Books {
    /// Enters what has been told, as much as a turn allows. Says whether there may be more.
    fn enter_some(&mut self) -> bool {
        logging::gathered(|| {
            for _ in 0..RECORDS_PER_TURN {
                match self.events.take() {
                    Some(event) => self.enter(event),
                    None => return false,
                }
            }
            true
        })
    }

    fn enter(&self, event: Event) {
        match event {
            Event::Flow(record) => {
                if !record.has(FlowRecord::OPENED) && !record.has(FlowRecord::BY_DESTINATION) {
                    self.flows.closed(record.srtt_us(), record.retransmits());
                }
                self.context.kernel_carried(&record);
            }
            Event::Closed(record) => self.flows.closed(record.srtt_us(), record.retransmits()),
            Event::Verdict(record) => self.context.kernel_decided(&record, SystemTime::now()),
        }
    }
}

impl Drop for Books {
    /// What was told to the last is not lost because it was still gathering.
    fn drop(&mut self) {
        while self.enter_some() {}
    }
}

/// Ends, in the books, what the kernel has carried and knows no more.
fn forget_lost(context: &Context, admissions: &Admissions) {
    // What began meanwhile is not in the list.
    let moment = monotonic_nanoseconds();
    match admissions.list() {
        Ok(known) => context.carried.retain_known(&known, moment),
        Err(error) => tracing::warn!(%error, "cannot list the connections that the kernel carries"),
    }
}
