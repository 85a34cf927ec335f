//! The caller's side: a workload's captured datagrams are sorted into flows, and their answers given back.

use super::life::Life;
use super::shown::Showing;
use super::{Datagrams, send};
use crate::balance;
use crate::engine::{Endpoint, Snapshot};
use crate::model::{Protocol, Service};
use crate::netns::{CaptureSocket, Captured};
use crate::proxy::outbound::own_address;
use crate::proxy::registry::{Live, Side, Ticket};
use crate::proxy::report::Parties;
use crate::proxy::verdict::{self, Caller};
use crate::proxy::{Context, Failure, LocalWorkload};
use crate::runtime::Place;
use crate::telemetry::datagrams::DirectionMetrics;
use crate::telemetry::policy::EnforcedBy;
use crate::tunnel::{FlowSender, Peer, ResetCode, Sink, StreamError, StreamHeader};
use mesh_common::policy::Arrival;
use mesh_common::{Ip, datagram};
use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Flows of one workload in one address family; the longest unused make room.
const MAX_FLOWS: usize = 4_096;
/// How many make room at once: finding them costs a look at all.
const EVICTED: usize = MAX_FLOWS / 16;
/// Datagrams, and their bytes, that wait while a flow is being opened; older ones make room.
const WAITING: usize = 64;
const WAITING_BYTES: usize = 256 * 1024;
/// A flow that could not be opened is not tried again for this long.
const PAUSE: Duration = Duration::from_millis(500);

/// The socket of the application, and the frontend's number.
type Key = (SocketAddr, u32);

/// One in-pod socket's reading side.
pub struct DatagramOutbound {
    pub context: Arc<Context>,
    pub local: Arc<LocalWorkload>,
    pub datagrams: Datagrams,
    /// The workload's first alias of the socket's family.
    pub base: Ip,
    /// The port that aliases are reached at.
    pub port: u16,
}

struct Serving {
    outbound: DatagramOutbound,
    socket: CaptureSocket,
    flows: Mutex<HashMap<Key, Arc<Flow>>>,
    /// The aliases that this workload has used.
    shown: Mutex<HashMap<u32, (SocketAddr, Showing)>>,
}

struct Flow {
    state: Mutex<State>,
    life: Arc<Life>,
}

enum State {
    Opening {
        waiting: VecDeque<Vec<u8>>,
        bytes: usize,
    },
    Open(FlowSender),
    /// Could not be opened; why.
    Failed(&'static str),
}

/// Where a flow goes.
struct Route {
    destination: SocketAddr,
    service: Option<Arc<Service>>,
    endpoint: Endpoint,
}

impl DatagramOutbound {
    /// Takes captured datagrams until the workload is removed.
    pub async fn serve(self, socket: CaptureSocket) {
        let removed = self.local.removed.clone();
        let serving = Arc::new(Serving { outbound: self, socket, flows: Mutex::default(), shown: Mutex::default() });
        loop {
            let received = tokio::select! {
                received = serving.socket.receive(|datagram| serving.take(&datagram)) => received,
                () = removed.cancelled() => return,
            };
            if let Err(error) = received {
                // Of an answer to a socket that is gone, most likely.
                tracing::debug!(workload = %serving.outbound.local.workload.name, %error, "cannot read a datagram");
            }
        }
    }
}

impl Serving {
    fn metrics(&self) -> &DirectionMetrics {
        &self.outbound.datagrams.0.outbound
    }

    fn take(self: &Arc<Self>, captured: &Captured<'_>) {
        let Some(number) = datagram::number(self.outbound.base, captured.alias.into()) else {
            return self.metrics().dropped("not_an_alias");
        };
        let source = SocketAddr::new(captured.source.ip().to_canonical(), captured.source.port());
        if let Some(server) = self.dns_server(number) {
            return self.name(source, number, server, captured.payload.to_vec());
        }
        let Some(flow) = self.flow((source, number)) else {
            return self.metrics().dropped("flow_limit");
        };
        flow.life.request();
        let mut state = lock(&flow.state);
        match &mut *state {
            State::Open(sender) => send(self.metrics(), sender, captured.payload, DirectionMetrics::request),
            State::Failed(reason) => self.metrics().dropped(reason),
            State::Opening { waiting, bytes } => {
                *bytes += captured.payload.len();
                waiting.push_back(captured.payload.to_vec());
                while waiting.len() > WAITING || *bytes > WAITING_BYTES {
                    *bytes -= waiting.pop_front().map_or(0, |oldest| oldest.len());
                    self.metrics().dropped("opening");
                }
            }
        }
    }

    /// The address of the mesh's own DNS, if the number stands for it.
    fn dns_server(&self, number: u32) -> Option<SocketAddr> {
        let context = &self.outbound.context;
        let target = context.snapshot.load().datagram_target(number)?;
        context.dns.is_at(target).then_some(target)
    }

    /// Answers a DNS query. It takes a flow's room while it waits.
    fn name(self: &Arc<Self>, source: SocketAddr, number: u32, server: SocketAddr, query: Vec<u8>) {
        let Some(place) = self.outbound.datagrams.0.outbound_room.try_enter() else {
            return self.metrics().dropped("flow_limit");
        };
        if self.show(number, server).is_err() {
            return self.metrics().dropped("local_error");
        }
        let serving = Arc::clone(self);
        self.outbound.context.connections.spawn(async move {
            let local = &serving.outbound.local;
            let reply = tokio::select! {
                reply = serving.outbound.context.dns.answer(&local.workload, &query) => reply,
                () = local.removed.cancelled() => return,
            };
            drop(place);
            if !reply.is_empty() {
                serving.answer(source, number, &reply);
            }
        });
    }

    /// Gives a datagram back to the application's socket.
    fn answer(&self, source: SocketAddr, number: u32, payload: &[u8]) {
        let alias = datagram::alias(self.outbound.base, number).into();
        match self.socket.answer(alias, source, payload) {
            Ok(()) => self.metrics().reply(payload.len()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.metrics().dropped("application_full"),
            // Nobody has the socket any more.
            Err(_) => self.metrics().dropped("application_gone"),
        }
    }

    /// The flow of a datagram, a new one if there is none; `None` if the node has too many.
    fn flow(self: &Arc<Self>, key: Key) -> Option<Arc<Flow>> {
        let mut flows = lock(&self.flows);
        if let Some(flow) = flows.get(&key) {
            return Some(Arc::clone(flow));
        }
        if flows.len() >= MAX_FLOWS {
            self.evict(&mut flows);
        }
        let place = self.outbound.datagrams.0.outbound_room.try_enter()?;
        let opening = State::Opening { waiting: VecDeque::new(), bytes: 0 };
        let flow = Arc::new(Flow { state: Mutex::new(opening), life: Arc::new(Life::new()) });
        flows.insert(key, Arc::clone(&flow));
        drop(flows);
        self.outbound.context.connections.spawn(Arc::clone(self).run(key, Arc::clone(&flow), place));
        Some(flow)
    }

    fn evict(&self, flows: &mut HashMap<Key, Arc<Flow>>) {
        let mut by_age: Vec<_> = flows.iter().map(|(key, flow)| (flow.life.used_at(), *key)).collect();
        by_age.sort_unstable();
        for (_, key) in by_age.into_iter().take(EVICTED) {
            if let Some(flow) = flows.remove(&key) {
                flow.life.end();
                self.metrics().dropped("evicted_flow");
            }
        }
    }

    async fn run(self: Arc<Self>, key: Key, flow: Arc<Flow>, _place: Place) {
        let open = self.metrics().opened();
        let removed = &self.outbound.local.removed;
        let outcome = tokio::select! {
            outcome = self.converse(key, &flow) => outcome,
            () = removed.cancelled() => Err(Failure::WorkloadRemoved),
        };
        drop(open);
        let reason = outcome.as_ref().map_or_else(Failure::reason, |()| "idle");
        self.metrics().closed(reason);
        if let Err(failure) = &outcome {
            tracing::debug!(
                workload = %self.outbound.local.workload.name, source = %key.0, reason, error = %failure,
                "a flow of datagrams failed"
            );
            let former = std::mem::replace(&mut *lock(&flow.state), State::Failed(reason));
            if let State::Opening { waiting, .. } = former {
                waiting.iter().for_each(|_| self.metrics().dropped(reason));
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = removed.cancelled() => {}
            }
        }
        let mut flows = lock(&self.flows);
        if flows.get(&key).is_some_and(|known| Arc::ptr_eq(known, &flow)) {
            flows.remove(&key);
        }
    }

    async fn converse(self: &Arc<Self>, key: Key, flow: &Arc<Flow>) -> Result<(), Failure> {
        let (context, local) = (&self.outbound.context, &self.outbound.local);
        let route = self.route(&context.snapshot.load(), key.1)?;
        let own = own_address(&local.workload, key.0);
        let mut ticket = context.registry.enter(Live {
            side: Side::Source,
            caller: local.workload.clone(),
            source: own.ip(),
            destination: route.endpoint.workload.clone(),
            port: route.endpoint.address.port(),
        });
        // What changes from here on, the registry knows.
        let snapshot = context.snapshot.load_full();
        self.authorize(own, &snapshot, &route)?;
        self.show(key.1, route.destination)?;
        let peer = self.peer(&snapshot, &route)?;
        drop(snapshot);
        let header = StreamHeader {
            protocol: Protocol::Udp,
            destination: route.endpoint.address,
            service: route.service.as_ref().map(|service| service.name.to_string()),
            source: own,
            traceparent: None,
        };
        let opening = context.tunnel.open_datagrams(&peer, &header, self.sink(key, &flow.life));
        let opened = tokio::select! {
            opened = opening => opened?,
            cut = ticket.cut() => return Err(Failure::Cut(cut)),
        };
        self.release(flow, opened.sender());
        let mut cut = None;
        let carried = opened.carry(async {
            let (code, why) = over(&flow.life, &mut ticket).await;
            cut = why;
            code
        });
        match (carried.await, cut) {
            (_, Some(cut)) => Err(Failure::Cut(cut)),
            // It was idle for the other end, or for this one.
            (Ok(()) | Err(StreamError::Ended | StreamError::Reset(ResetCode::CANCELLED)), None) => Ok(()),
            (Err(StreamError::Reset(ResetCode::CONNECTION_RESET)), None) => {
                Err(Failure::Application(ErrorKind::ConnectionRefused.into()))
            }
            (Err(error), None) => Err(Failure::Remote(error)),
        }
    }

    fn route(&self, snapshot: &Snapshot, number: u32) -> Result<Route, Failure> {
        let unknown = SocketAddr::new(datagram::alias(self.outbound.base, number).into(), self.outbound.port);
        let destination = snapshot.datagram_target(number).ok_or(Failure::UnknownDestination(unknown))?;
        if let Some(frontend) = snapshot.datagram_frontend(destination) {
            let endpoint = balance::pick(&frontend.endpoints, rand::random()).ok_or(Failure::NoEndpoints)?;
            let service = Some(frontend.service.clone());
            return Ok(Route { destination, service, endpoint: endpoint.clone() });
        }
        let workload = snapshot.workload_at(destination.ip()).ok_or(Failure::UnknownDestination(destination))?;
        Ok(Route { destination, service: None, endpoint: Endpoint::direct(workload, destination) })
    }

    /// The destination decides, too; what it would refuse need not travel there.
    fn authorize(&self, own: SocketAddr, snapshot: &Snapshot, route: &Route) -> Result<(), Failure> {
        let (local, context) = (&self.outbound.local.workload, &self.outbound.context);
        let (endpoint, address) = (&route.endpoint.workload, route.endpoint.address);
        let known = snapshot.workload(&endpoint.name).filter(|known| known.uid == endpoint.uid);
        let destination = known.unwrap_or(endpoint);
        let caller = Caller { identity: Some(&local.identity), address: own.ip() };
        let told = verdict::decide(snapshot, destination, address.port(), Arrival::Authenticated, caller);
        let parties =
            Parties { source: own, source_workload: Some(local), destination: address, workload: Some(destination) };
        context.reports.decided(&told, EnforcedBy::Source, &parties);
        if told.is_denied() { Err(Failure::Denied(told.ruling)) } else { Ok(()) }
    }

    /// Has the application see the frontend where it would see the alias.
    fn show(&self, number: u32, real: SocketAddr) -> Result<(), Failure> {
        let mut shown = lock(&self.shown);
        if shown.get(&number).is_some_and(|(known, _)| *known == real) {
            return Ok(());
        }
        let alias = SocketAddr::new(datagram::alias(self.outbound.base, number).into(), self.outbound.port);
        let showing = self.outbound.datagrams.0.shown.show(alias.into(), real.into()).map_err(Failure::Local)?;
        shown.insert(number, (real, showing));
        Ok(())
    }

    fn peer(&self, snapshot: &Snapshot, route: &Route) -> Result<Peer, Failure> {
        let workload = &route.endpoint.workload;
        let node = snapshot.node(&workload.node).and_then(|node| node.addresses.first());
        let address = node.ok_or_else(|| Failure::UnknownNode(workload.node.clone()))?;
        Ok(Peer {
            source: self.outbound.local.workload.identity.clone(),
            destination: workload.identity.clone(),
            workload: workload.uid.clone(),
            node: workload.node.clone(),
            address: SocketAddr::new(*address, self.outbound.context.tunnel_port),
        })
    }

    /// Gives the answers back to the application's socket.
    fn sink(self: &Arc<Self>, (source, number): Key, life: &Arc<Life>) -> Sink {
        let (serving, life) = (Arc::clone(self), Arc::clone(life));
        Arc::new(move |payload| {
            life.reply();
            serving.answer(source, number, payload);
        })
    }

    /// Sends what has waited, and from now on all that comes.
    fn release(&self, flow: &Flow, sender: FlowSender) {
        let mut state = lock(&flow.state);
        if let State::Opening { waiting, .. } = &*state {
            waiting.iter().for_each(|payload| send(self.metrics(), &sender, payload, DirectionMetrics::request));
        }
        *state = State::Open(sender);
    }
}

/// Why a flow is given up at this end, and how the other end is told.
pub(super) async fn over(life: &Life, ticket: &mut Ticket) -> (ResetCode, Option<crate::proxy::Cut>) {
    tokio::select! {
        () = life.idle() => (ResetCode::CANCELLED, None),
        () = life.ended() => (ResetCode::CANCELLED, None),
        cut = ticket.cut() => (ResetCode::DENIED, Some(cut)),
    }
}

/// Every critical section here leaves what it guards whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
