//! Connections that the kernel carries between workloads of this node, as metrics, the live table and the access log
//! see them: like those that the proxy carries, once at each end.
//!
//! Both sockets report when they close, each what its peer has acknowledged: those are the bytes that arrived. A socket
//! that did not report in time (its record was lost, or its program stands outside of the workloads' cgroups) is
//! replaced by what the other one knows.

use super::report::Parties;
use super::session::{Edge, Session};
use super::verdict::{self, Caller, Ruling};
use super::{Context, Cut, Failure};
use crate::datapath::monotonic_nanoseconds;
use crate::engine::Snapshot;
use crate::model::{ObjectName, Protocol, Workload};
use crate::telemetry::connections::{Reporter, Security};
use crate::telemetry::policy::EnforcedBy;
use mesh_common::Ip;
use mesh_common::event::FlowRecord;
use mesh_common::flow::Admitted;
use mesh_common::policy::Arrival;
use mesh_common::service::BypassKey;
use std::collections::{HashMap, HashSet};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the destination's socket may take to report after the source's.
const LINGERING: Duration = Duration::from_secs(5);

/// A connection's ends: the source, and the destination's own address.
pub(super) type Ends = (SocketAddr, SocketAddr);

/// One connection; ports are used again, moments are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Name {
    ends: Ends,
    connected_at_ns: u64,
}

/// What is known of a connection from its beginning.
struct Beginning<'a> {
    name: Name,
    /// What the application connected to.
    destination: SocketAddr,
    caller: &'a Workload,
    /// The address that the caller speaks under.
    speaker: IpAddr,
}

struct Open {
    sessions: [Session; 2],
    /// When the source's socket closed, and what it had received.
    source_closed: Option<(Instant, u64)>,
    /// Whether the destination's socket has closed, or will not report.
    is_answered: bool,
}

impl Open {
    fn fail(&self, failure: &Failure) {
        self.sessions.iter().for_each(|session| session.fail(failure));
    }

    fn asked(&self, bytes: u64) {
        self.sessions.iter().for_each(|session| session.asked(bytes));
    }

    fn answered(&self, bytes: u64) {
        self.sessions.iter().for_each(|session| session.answered(bytes));
    }

    /// The destination's socket has reported, or does not.
    fn answer(&mut self, bytes: u64) {
        if !std::mem::replace(&mut self.is_answered, true) {
            self.answered(bytes);
        }
    }
}

/// The connections that the kernel carries now, as far as it has told. Bounded by what it admits.
#[derive(Default)]
pub struct Carried(Mutex<HashMap<Name, Open>>);

impl Carried {
    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Open>> {
        // Every critical section here leaves the table whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes why a connection is about to be ended, before it is.
    pub(super) fn cut(&self, ends: Ends, cut: &Cut) {
        for (name, open) in &*self.lock() {
            if name.ends == ends && open.source_closed.is_none() {
                open.fail(&Failure::Cut(cut.clone()));
            }
        }
    }

    /// Ends connections whose source has reported and whose destination does not; call it every second or so.
    pub fn expire(&self, now: Instant) {
        let overdue = |open: &Open| open.source_closed.filter(|(at, _)| now.duration_since(*at) > LINGERING);
        let ended: Vec<Open> = {
            let mut table = self.lock();
            table
                .extract_if(|_, open| overdue(open).map(|(_, received)| open.answer(received)).is_some())
                .map(|(_, open)| open)
                .collect()
        };
        drop(ended);
    }

    /// Ends connections that began before `moment` (CLOCK_MONOTONIC nanoseconds), of which the kernel knows nothing any
    /// more and has not told the end: their last record was lost.
    pub fn retain_known(&self, known: &[(BypassKey, Admitted)], moment: u64) {
        let known: HashSet<Name> = known.iter().map(|(key, admitted)| name_of(key, admitted)).collect();
        let lost: Vec<Open> = {
            let mut table = self.lock();
            let is_lost = |name: &Name, open: &Open| {
                open.source_closed.is_none() && name.connected_at_ns < moment && !known.contains(name)
            };
            table.extract_if(|name, open| is_lost(name, open)).map(|(_, open)| open).collect()
        };
        if !lost.is_empty() {
            tracing::warn!(
                connections = lost.len(),
                "connections that the kernel carried have ended, and the records of it were lost: their bytes are not counted"
            );
        }
    }
}

impl Context {
    /// Takes a record of a connection that the kernel carries.
    pub fn kernel_carried(&self, record: &FlowRecord) {
        let name = Name {
            ends: (
                address(record.source(), record.source_port_be()),
                address(record.backend(), record.backend_port_be()),
            ),
            connected_at_ns: record.connected_at_ns(),
        };
        if record.has(FlowRecord::OPENED) {
            self.begin_recorded(name, record);
        } else if record.has(FlowRecord::BY_DESTINATION) {
            self.destination_closed(name, record);
        } else {
            self.source_closed(name, record);
        }
    }

    /// Takes over what the kernel carried before this daemon knew.
    pub(super) fn adopt_carried(&self, snapshot: &Snapshot, admitted: &[(BypassKey, Admitted)]) {
        for (key, admitted) in admitted {
            let speaker = ip(admitted.speaker());
            let Some(caller) = caller_of(snapshot, admitted) else { continue };
            let beginning = Beginning {
                name: name_of(key, admitted),
                destination: address(admitted.destination(), admitted.destination_port_be()),
                caller,
                speaker,
            };
            self.begin(snapshot, &beginning);
        }
    }

    fn begin_recorded(&self, name: Name, record: &FlowRecord) {
        let snapshot = self.snapshot.load_full();
        let local = self.locals.of_cgroup(record.cgroup());
        let source = name.ends.0.ip();
        let caller = match &local {
            Some(local) => Some(local.current(&snapshot)),
            None => snapshot.workload_at(source).map(Arc::as_ref),
        };
        let named = || Some(snapshot.workload_speaking(source, snapshot.identity(record.identity())?)?.as_ref());
        let Some(caller) = caller.or_else(named) else {
            tracing::debug!(%source, "a connection that the kernel carries is of no workload of the catalog any more");
            return;
        };
        let beginning = Beginning {
            name,
            destination: address(record.destination(), record.destination_port_be()),
            caller,
            speaker: caller.address_like(source).unwrap_or(source),
        };
        self.begin(&snapshot, &beginning);
    }

    fn begin(&self, snapshot: &Snapshot, beginning: &Beginning<'_>) {
        let Name { ends: (source, backend), connected_at_ns } = beginning.name;
        let mut table = self.carried.lock();
        let std::collections::hash_map::Entry::Vacant(vacant) = table.entry(beginning.name) else { return };
        let destination = snapshot.workload_at(backend.ip()).map(Arc::as_ref);
        let service: Option<&ObjectName> =
            snapshot.frontend(beginning.destination).map(|frontend| &frontend.service.name);
        let age = Duration::from_nanos(monotonic_nanoseconds().saturating_sub(connected_at_ns));
        let since = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
        let ruling = destination.and_then(|workload| self.ruled(snapshot, workload, beginning));
        let session = |reporter| {
            let edge = Edge { protocol: Protocol::Tcp, reporter, source: beginning.caller, destination, service };
            let session = Session::begin_since(self, &edge, Security::Kernel, source, beginning.destination, since);
            session.routed(backend, self.node.as_str());
            session.carried_by_kernel();
            if let Some(ruling) = &ruling {
                session.ruled(ruling);
            }
            session
        };
        let sessions = [session(Reporter::Source), session(Reporter::Destination)];
        vacant.insert(Open { sessions, source_closed: None, is_answered: false });
    }

    /// Tells what policy says. The kernel has let it pass; if it should not any more, it is cut by whoever finds that.
    fn ruled(&self, snapshot: &Snapshot, workload: &Workload, beginning: &Beginning<'_>) -> Option<Ruling> {
        let (source, backend) = beginning.name.ends;
        let caller = Caller { identity: Some(&beginning.caller.identity), address: beginning.speaker };
        let told = verdict::decide(snapshot, workload, backend.port(), Arrival::Authenticated, caller);
        if told.is_denied() {
            return None;
        }
        let parties =
            Parties { source, source_workload: Some(beginning.caller), destination: backend, workload: Some(workload) };
        self.reports.decided(&told, EnforcedBy::KernelConnect, &parties);
        Some(told.ruling)
    }

    fn source_closed(&self, name: Name, record: &FlowRecord) {
        // The record of its beginning may have found no room.
        if !self.carried.lock().contains_key(&name) {
            self.begin_recorded(name, record);
        }
        let mut table = self.carried.lock();
        let Some(open) = table.get_mut(&name) else { return };
        if record.has(FlowRecord::UNANSWERED) {
            open.fail(&unanswered(record));
        }
        open.asked(record.bytes_sent());
        if !record.has(FlowRecord::SERVED) {
            open.answer(record.bytes_received());
        }
        open.source_closed = Some((Instant::now(), record.bytes_received()));
        let ended = if open.is_answered { table.remove(&name) } else { None };
        drop(table);
        drop(ended);
    }

    fn destination_closed(&self, name: Name, record: &FlowRecord) {
        let mut table = self.carried.lock();
        let Some(open) = table.get_mut(&name) else { return };
        open.answer(record.bytes_sent());
        let ended = if open.source_closed.is_some() { table.remove(&name) } else { None };
        drop(table);
        drop(ended);
    }
}

/// Why a socket was never connected: something came back, or nothing did.
fn unanswered(record: &FlowRecord) -> Failure {
    if record.segments_in() > 0 {
        Failure::Application(io::Error::new(ErrorKind::ConnectionRefused, "the destination refused the connection"))
    } else {
        Failure::ApplicationTimeout
    }
}

/// Who is behind an admitted connection, as the catalog has it.
pub(super) fn caller_of<'a>(snapshot: &'a Snapshot, admitted: &Admitted) -> Option<&'a Workload> {
    let identity = snapshot.identity(admitted.identity())?;
    snapshot.workload_speaking(ip(admitted.speaker()), identity).map(Arc::as_ref)
}

/// The ends of an admitted connection.
pub(super) fn ends_of(key: &BypassKey) -> Ends {
    (address(key.remote(), key.remote_port_be()), address(key.local(), key.local_port_be()))
}

fn name_of(key: &BypassKey, admitted: &Admitted) -> Name {
    Name { ends: ends_of(key), connected_at_ns: admitted.connected_at_ns() }
}

fn ip(ip: Ip) -> IpAddr {
    IpAddr::from(ip).to_canonical()
}

fn address(address: Ip, port_be: u16) -> SocketAddr {
    SocketAddr::new(ip(address), u16::from_be(port_be))
}
