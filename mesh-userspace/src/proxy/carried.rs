//! Connections that the kernel carries between workloads of this node, as metrics, the live table and the access log
//! see them: like those that the proxy carries, once at each end.
//!
//! Both sockets report when they close, each what its peer has acknowledged: those are the bytes that arrived. A socket
//! that did not report in time (its record was lost, or its program stands outside of the workloads' cgroups) is
//! replaced by what the other one knows.

mod table;

pub(super) use table::Ends;

use super::report::Parties;
use super::session::{Edge, Session};
use super::verdict::{self, Caller, Ruling};
use super::{Context, Cut, Failure};
use crate::datapath::monotonic_nanoseconds;
use crate::engine::Snapshot;
use crate::model::{ObjectName, Protocol, Workload};
use crate::runtime::Level;
use crate::telemetry::connections::{Reporter, Security};
use crate::telemetry::policy::EnforcedBy;
use mesh_common::Ip;
use mesh_common::event::FlowRecord;
use mesh_common::flow::Admitted;
use mesh_common::policy::Arrival;
use mesh_common::service::BypassKey;
use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use table::{Cutting, Name, SourceEnd, Table, Told};

/// What is known of a connection from its beginning.
struct Beginning<'a> {
    name: Name,
    /// What the application connected to.
    destination: SocketAddr,
    caller: &'a Workload,
    /// The address that the caller speaks under.
    speaker: IpAddr,
}

/// A connection at both of its ends.
type Sessions = [Session; 2];

impl Told for Sessions {
    fn fail(&self, failure: &Failure) {
        self.iter().for_each(|session| session.fail(failure));
    }

    fn asked(&self, bytes: u64) {
        self.iter().for_each(|session| session.asked(bytes));
    }

    fn answered(&self, bytes: u64) {
        self.iter().for_each(|session| session.answered(bytes));
    }
}

/// The connections that the kernel carries now, as far as it has told and there is room.
#[derive(Default)]
pub struct Carried(Mutex<Table<Sessions>>);

impl Carried {
    fn lock(&self) -> MutexGuard<'_, Table<Sessions>> {
        // Every critical section here leaves the table whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How full the table is.
    #[must_use]
    pub fn level(&self) -> Level {
        self.lock().level()
    }

    /// Notes why a connection is about to be ended, before it is.
    pub(super) fn cut(&self, ends: Ends, cut: &Cut) {
        let at = Cutting { nanoseconds: monotonic_nanoseconds(), moment: Instant::now() };
        self.lock().cut(ends, Failure::Cut(cut.clone()), at);
    }

    /// Ends connections whose source has reported and whose destination does not; call it every second or so.
    pub fn expire(&self, now: Instant) {
        let ended = self.lock().expire(now);
        drop(ended);
    }

    /// Ends connections that began before `moment` (CLOCK_MONOTONIC nanoseconds), of which the kernel knows nothing any
    /// more and has not told the end: their last record was lost.
    pub fn retain_known(&self, known: &[(BypassKey, Admitted)], moment: u64) {
        let known: HashSet<Name> = known.iter().map(|(key, admitted)| name_of(key, admitted)).collect();
        let lost = self.lock().retain_known(&known, moment);
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
        // Of what is not established yet the kernel will tell.
        let established = admitted.iter().filter(|(_, admitted)| admitted.flags() & Admitted::ESTABLISHED != 0);
        for (key, admitted) in established {
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
        self.carried.lock().begin(beginning.name, || self.sessions(snapshot, beginning));
    }

    fn sessions(&self, snapshot: &Snapshot, beginning: &Beginning<'_>) -> Sessions {
        let Name { ends: (source, backend), connected_at_ns } = beginning.name;
        let destination = snapshot.workload_at(backend.ip()).map(Arc::as_ref);
        let service: Option<&ObjectName> =
            snapshot.frontend(beginning.destination).map(|frontend| &frontend.service.name);
        let age = Duration::from_nanos(monotonic_nanoseconds().saturating_sub(connected_at_ns));
        let since = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
        let ruling = destination.and_then(|workload| self.ruled(snapshot, workload, beginning));
        let session = |reporter| {
            let edge = Edge { protocol: Protocol::Tcp, reporter, source: beginning.caller, destination, service };
            let session = Session::begin_since(self, &edge, Security::Kernel, source, beginning.destination, since);
            session.routed(backend, &self.node);
            session.carried_by_kernel();
            if let Some(ruling) = &ruling {
                session.ruled(ruling);
            }
            session
        };
        [session(Reporter::Source), session(Reporter::Destination)]
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
        // The record of its beginning may have found no room, and one that was never connected has none.
        let is_known = self.carried.lock().contains(&name);
        if !is_known {
            self.begin_recorded(name, record);
        }
        let end = SourceEnd {
            failure: record.has(FlowRecord::UNANSWERED).then(|| unanswered(record)),
            sent: record.bytes_sent(),
            received: record.bytes_received(),
            is_served: record.has(FlowRecord::SERVED),
        };
        let ended = self.carried.lock().source_closed(&name, &end, Instant::now());
        drop(ended);
    }

    fn destination_closed(&self, name: Name, record: &FlowRecord) {
        let ended = self.carried.lock().destination_closed(&name, record.bytes_sent());
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
