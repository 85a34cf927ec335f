//! Plaintext connections that the kernel has admitted and a change forbids: found among the sockets of the workload's
//! namespace, and ended.
//!
//! What is never ended: the daemon's own deliveries (both of their ends are in the namespace), the workload's calls to
//! itself, and connections that the workload has dialled.

use super::carried::{self, Ends};
use super::local::LocalWorkload;
use super::report::Parties;
use super::verdict::{self, Caller};
use super::{Context, Cut};
use crate::datapath::Admissions;
use crate::engine::{PolicyGroup, SharedMap, Snapshot};
use crate::model::{Mode, SpiffeId, Workload, WorkloadUid};
use crate::netns::{Namespaces, SocketTable, Tcp, TcpState};
use anyhow::{Context as _, Result};
use mesh_common::flow::Admitted;
use mesh_common::policy::Arrival;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Looks at a namespace's sockets before what is not clear (who dialled?) counts as having been dialled from outside.
const LOOKS: usize = 5;
/// Between them: an acknowledgement is on its way.
const PAUSE: Duration = Duration::from_millis(20);

/// What plaintext for a workload depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Guard {
    mode: Mode,
    port_modes: BTreeMap<u16, Mode>,
    group: Arc<PolicyGroup>,
    /// The identities of this node's workloads: what the kernel carries comes from them.
    callers: SharedMap<SpiffeId, u32>,
}

impl Guard {
    fn of(workload: &Workload, snapshot: &Snapshot) -> Self {
        let group = snapshot.policies_of(&workload.name);
        Self {
            mode: workload.mode,
            port_modes: workload.port_modes.clone(),
            group,
            callers: snapshot.identities().clone(),
        }
    }
}

/// Ends forbidden plaintext of this node's armed workloads, when what guards one of them has changed. Connections that
/// a workload had when the daemon started are its own affair until then.
pub struct PlaintextSweep {
    context: Arc<Context>,
    namespaces: Namespaces,
    admissions: Admissions,
    guards: HashMap<WorkloadUid, Guard>,
    /// The workloads of the start are known.
    started: bool,
    is_supported: bool,
}

impl PlaintextSweep {
    #[must_use]
    pub fn new(context: Arc<Context>, namespaces: Namespaces, admissions: Admissions) -> Self {
        Self { context, namespaces, admissions, guards: HashMap::new(), started: false, is_supported: true }
    }

    /// Brings the armed workloads in line with a snapshot whose tables the kernel has: what it ends cannot come back.
    /// Costs nothing for workloads that are guarded as before. What fails is tried again with the next call.
    pub async fn follow(&mut self, snapshot: &Arc<Snapshot>) {
        let armed = self.context.locals.all();
        if !self.started {
            match self.admissions.list() {
                Ok(admitted) => self.context.adopt_carried(snapshot, &admitted),
                Err(error) => tracing::warn!(%error, "cannot list the connections that the kernel carries"),
            }
        }
        let uids: HashSet<_> = armed.iter().map(|local| local.workload.uid.clone()).collect();
        self.guards.retain(|uid, _| uids.contains(uid));
        for local in armed {
            let Some(workload) = local.known(snapshot) else { continue };
            let guard = Guard::of(workload, snapshot);
            if self.guards.get(&workload.uid) == Some(&guard) {
                continue;
            }
            if self.started && self.is_supported {
                match self.sweep(&local, snapshot).await {
                    Ok(()) => {}
                    Err(error) if is_unsupported(&error) => {
                        self.is_supported = false;
                        tracing::warn!(
                            "this kernel cannot end connections (CONFIG_INET_DIAG_DESTROY): plaintext that was \
                             admitted before a change forbade it goes on until it ends by itself"
                        );
                    }
                    Err(error) => {
                        let error = format!("{error:#}");
                        tracing::warn!(workload = %workload.name, error, "cannot end forbidden plaintext; will try again");
                        continue;
                    }
                }
            }
            self.guards.insert(workload.uid.clone(), guard);
        }
        self.started = true;
    }

    async fn sweep(&self, local: &Arc<LocalWorkload>, snapshot: &Arc<Snapshot>) -> Result<()> {
        let table = self.namespaces.sockets(&local.namespace).await.context("cannot open the table of sockets")?;
        let table = Arc::new(table);
        let admitted = self.admissions.list().context("cannot list what the kernel carries")?;
        let admitted: HashMap<_, _> =
            admitted.iter().map(|(key, admitted)| (carried::ends_of(key), *admitted)).collect();
        let admitted = Arc::new(admitted);
        for look in 1..=LOOKS {
            let (table, context) = (table.clone(), self.context.clone());
            let (local, snapshot, admitted) = (local.clone(), snapshot.clone(), admitted.clone());
            // The kernel walks all its connections for this.
            let unclear = tokio::task::spawn_blocking(move || {
                let Some(workload) = local.known(&snapshot) else { return Ok(0) };
                let sight = Sight { table: &table, snapshot: &snapshot, admitted: &admitted };
                end_forbidden(&sight, &context, workload, look == LOOKS)
            });
            if unclear.await?? == 0 {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    code == Some(libc::EOPNOTSUPP)
}

/// What is looked at.
struct Sight<'a> {
    table: &'a SocketTable,
    snapshot: &'a Snapshot,
    /// What the kernel carries within the node: authenticated, though it looks like plaintext.
    admitted: &'a HashMap<Ends, Admitted>,
}

/// Ends what is forbidden; returns how many connections are left of which nobody knows yet who dialled.
fn end_forbidden(sight: &Sight<'_>, context: &Context, workload: &Workload, is_last: bool) -> io::Result<usize> {
    let (table, snapshot) = (sight.table, sight.snapshot);
    let all = table.list()?;
    let is_delivery = |from, to| context.registry.is_delivery(from, to);
    let mut unclear = 0;
    let serves = |local| snapshot.workload_serving(local).is_some_and(|serving| serving.uid == workload.uid);
    for inbound in from_outside(&all, workload, serves, is_delivery) {
        let (source, port) = (inbound.remote, inbound.local.port());
        let ends = (source, inbound.local);
        let carried = sight.admitted.get(&ends);
        let Some(cut) = judge(snapshot, workload, port, source.ip(), carried) else { continue };
        // Of what the kernel carries it is known who dialled.
        if carried.is_none() && inbound.dialled.is_none() && !is_last {
            unclear += 1;
            continue;
        }
        if carried.is_some() {
            context.carried.cut(ends, &cut);
        }
        if table.destroy(inbound)? {
            match (carried, &cut) {
                // Its access log tells why it ended.
                (Some(_), cut) => context.reports.metrics.cut(cut.reason(), 1),
                (None, Cut::Denied(ruling)) => {
                    let source_workload = snapshot.workload_at(source.ip()).map(Arc::as_ref);
                    let parties =
                        Parties { source, source_workload, destination: inbound.local, workload: Some(workload) };
                    context.reports.cut_plaintext(ruling, &parties);
                }
                (None, Cut::SourceGone | Cut::DestinationChanged) => {}
            }
        }
    }
    Ok(unclear)
}

/// Why a connection may not go on, if it may not.
fn judge(
    snapshot: &Snapshot,
    workload: &Workload,
    port: u16,
    source: IpAddr,
    carried: Option<&Admitted>,
) -> Option<Cut> {
    let told = match carried {
        None => {
            let caller = Caller { identity: None, address: source };
            verdict::decide(snapshot, workload, port, Arrival::Plaintext, caller)
        }
        Some(admitted) => {
            let Some(speaking) = carried::caller_of(snapshot, admitted) else { return Some(Cut::SourceGone) };
            let speaker = IpAddr::from(admitted.speaker()).to_canonical();
            let caller = Caller { identity: Some(&speaking.identity), address: speaker };
            verdict::decide(snapshot, workload, port, Arrival::Authenticated, caller)
        }
    };
    told.is_denied().then_some(Cut::Denied(told.ruling))
}

/// The connections among all sockets of a workload's namespace that came from outside without the daemon, to where it
/// `serves`: a node's own namespace has others', the operator's and the daemon's among them.
fn from_outside<'a>(
    all: &'a [Tcp],
    workload: &'a Workload,
    serves: impl Fn(SocketAddr) -> bool + 'a,
    is_delivery: impl Fn(SocketAddr, SocketAddr) -> bool + 'a,
) -> impl Iterator<Item = &'a Tcp> {
    // Both ends of a delivery are here, and the daemon may have let go of one that the application still ends.
    let ends: HashSet<(SocketAddr, SocketAddr)> = all.iter().map(|tcp| (tcp.local, tcp.remote)).collect();
    let is_listening = all.iter().filter(|tcp| tcp.state == TcpState::Listening).map(|tcp| tcp.local.port());
    let is_listening: HashSet<u16> = is_listening.collect();
    let is_own = |address: SocketAddr| workload.addresses.iter().any(|own| own.to_canonical() == address.ip());
    all.iter().filter(move |tcp| {
        let came_in = tcp.dialled.map_or_else(|| is_listening.contains(&tcp.local.port()), |dialled| !dialled);
        tcp.state == TcpState::Open
            && is_own(tcp.local)
            && serves(tcp.local)
            && !is_own(tcp.remote)
            && came_in
            && !ends.contains(&(tcp.remote, tcp.local))
            && !is_delivery(tcp.remote, tcp.local)
    })
}

#[cfg(test)]
mod tests;
