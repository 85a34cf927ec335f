//! The caller's side: a workload's captured datagrams are sorted into flows, and their answers given back.

use super::Datagrams;
use super::flow::Flow;
use super::life::Life;
use super::shown::Showing;
use crate::model::Protocol;
use crate::netns::{CaptureSocket, Captured};
use crate::proxy::balancers::Among;
use crate::proxy::outbound::own_address;
use crate::proxy::registry::{Live, Side, Ticket};
use crate::proxy::route::{Calling, Route};
use crate::proxy::session::Session;
use crate::proxy::{Context, Failure, LocalWorkload};
use crate::runtime::Place;
use crate::telemetry::datagrams::DirectionMetrics;
use crate::tunnel::{DatagramFlow, ResetCode, Sink, StreamError, StreamHeader, TlsSession};
use mesh_common::{Ip, datagram};
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Flows of one workload in one address family; the longest unused make room.
const MAX_FLOWS: usize = 4_096;
/// How many make room at once: finding them costs a look at all.
const EVICTED: usize = MAX_FLOWS / 16;
/// A flow that has failed is not tried again for this long.
const PAUSE: Duration = Duration::from_millis(500);
/// After this long without word that nobody has the port, what a flow began with is taken to have arrived.
const KEPT: Duration = Duration::from_secs(1);

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

/// A flow's ends, as far as they stay while endpoints are tried.
struct Call {
    key: Key,
    /// The address that the workload speaks under.
    own: SocketAddr,
    /// The frontend, or the workload's own address.
    destination: SocketAddr,
    session: Arc<Session>,
}

impl DatagramOutbound {
    /// Takes captured datagrams until the workload is removed.
    pub async fn serve(self, socket: CaptureSocket) {
        let removed = self.local.removed.token().clone();
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
        flow.take(self.metrics(), captured.payload);
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

    /// Gives a datagram back to the application's socket; whether it took it.
    fn answer(&self, source: SocketAddr, number: u32, payload: &[u8]) -> bool {
        let alias = datagram::alias(self.outbound.base, number).into();
        let answered = self.socket.answer(alias, source, payload);
        let is_taken = answered.is_ok();
        match answered {
            Ok(()) => self.metrics().reply(payload.len()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.metrics().dropped("application_full"),
            // Nobody has the socket any more.
            Err(_) => self.metrics().dropped("application_gone"),
        }
        is_taken
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
        let flow = Arc::new(Flow::new());
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
        let outcome = self.converse(key, &flow).await;
        drop(open);
        let reason = outcome.as_ref().map_or_else(Failure::reason, |()| "idle");
        self.metrics().closed(reason);
        if let Err(failure) = &outcome {
            tracing::debug!(
                workload = %self.outbound.local.workload.name, source = %key.0, reason, error = %failure,
                "a flow of datagrams failed"
            );
            flow.fail(self.metrics(), reason);
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

    fn calling(&self) -> Calling<'_> {
        Calling { context: &self.outbound.context, local: &self.outbound.local, protocol: Protocol::Udp }
    }

    /// The whole of a flow: where it goes, and what becomes of it there.
    async fn converse(self: &Arc<Self>, key: Key, flow: &Arc<Flow>) -> Result<(), Failure> {
        let (source, number) = key;
        let (calling, own) = (self.calling(), own_address(&self.outbound.local.workload, source));
        let destination = self.outbound.context.snapshot.load().datagram_target(number);
        let routed = match destination {
            Some(asked) => calling.route(asked, own.ip(), Among::Untried(&[])).map(|route| (asked, route)),
            None => Err(Failure::UnknownDestination(self.alias(number))),
        };
        let (destination, route) = routed.inspect_err(|failure| calling.unrouted(source, destination, failure))?;
        let session = {
            let snapshot = self.outbound.context.snapshot.load();
            Session::begin(&self.outbound.context, &calling.edge(&snapshot, &route), source, destination)
        };
        let call = Call { key, own, destination, session: Arc::new(session) };
        let outcome = tokio::select! {
            outcome = self.attempts(&call, flow, route) => outcome,
            () = self.outbound.local.removed.cancelled() => Err(Failure::WorkloadRemoved),
        };
        outcome.inspect_err(|failure| call.session.fail(failure))
    }

    /// Tries endpoints until one takes the flow, for as long as nobody has got any of its datagrams.
    async fn attempts(self: &Arc<Self>, call: &Call, flow: &Arc<Flow>, mut route: Route) -> Result<(), Failure> {
        let (context, calling, mut tried) = (&self.outbound.context, self.calling(), Vec::new());
        loop {
            let Err(failure) = self.attempt(call, flow, &mut route).await else { return Ok(()) };
            if let Some(picked) = &mut route.picked {
                picked.attempt.broke(&failure);
            }
            if !is_undelivered(&failure) || flow.life.is_answered() {
                return Err(failure);
            }
            let next = calling.next_route(call.destination, call.own.ip(), &mut route, &mut tried, &failure);
            let Some(next) = next else { return Err(failure) };
            route = next;
            flow.reopen();
            call.session.rerouted(context, &calling.edge(&context.snapshot.load(), &route));
        }
    }

    /// The flow at one endpoint, from the verdict to its end.
    async fn attempt(self: &Arc<Self>, call: &Call, flow: &Arc<Flow>, route: &mut Route) -> Result<(), Failure> {
        let (context, local, calling) = (&self.outbound.context, &self.outbound.local, self.calling());
        let mut ticket = context.registry.enter(Live {
            side: Side::Source,
            caller: local.workload.clone(),
            source: call.own.ip(),
            destination: route.endpoint.workload.clone(),
            port: route.endpoint.address.port(),
        });
        // What changes from here on, the registry knows.
        let snapshot = context.snapshot.load_full();
        call.session.routed(route.endpoint.address, &route.endpoint.workload.node);
        call.session.ruled(&calling.authorize(call.own, &snapshot, route)?);
        self.show(call.key.1, call.destination)?;
        let peer = calling.peer(&snapshot, route)?;
        // Held no longer than it is needed: a flow may last for days.
        drop(snapshot);
        let header = StreamHeader {
            protocol: Protocol::Udp,
            destination: route.endpoint.address,
            service: route.service().map(ToString::to_string),
            source: call.own,
            traceparent: None,
        };
        let bound = route.traffic().and_then(|traffic| traffic.connect_timeout).unwrap_or(context.connect_timeout);
        let sink = self.sink(call, flow);
        let opened = tokio::select! {
            opened = context.tunnel.open_datagrams(bound, &peer, &header, sink) => opened?,
            cut = ticket.cut() => return Err(Failure::Cut(cut)),
        };
        route.connected(context);
        call.session.carried_over(opened.transport(), &TlsSession::default());
        flow.release(self.metrics(), opened.sender(), &call.session);
        carry(opened, flow, route, &mut ticket).await
    }

    /// Has the application see the frontend where it would see the alias.
    fn show(&self, number: u32, real: SocketAddr) -> Result<(), Failure> {
        let mut shown = lock(&self.shown);
        if shown.get(&number).is_some_and(|(known, _)| *known == real) {
            return Ok(());
        }
        let alias = self.alias(number).into();
        let showing = self.outbound.datagrams.0.shown.show(alias, real.into()).map_err(Failure::Local)?;
        shown.insert(number, (real, showing));
        Ok(())
    }

    /// The alias of a number, as the application would see it.
    fn alias(&self, number: u32) -> SocketAddr {
        SocketAddr::new(datagram::alias(self.outbound.base, number).into(), self.outbound.port)
    }

    /// Gives the answers back to the application's socket.
    fn sink(self: &Arc<Self>, call: &Call, flow: &Arc<Flow>) -> Sink {
        let (serving, flow, session) = (Arc::clone(self), Arc::clone(flow), Arc::clone(&call.session));
        let (source, number) = call.key;
        Arc::new(move |payload| {
            flow.life.reply();
            if serving.answer(source, number, payload) {
                session.reply(payload.len());
            }
        })
    }
}

/// Carries an open flow to its end, and tells its endpoint's group when the first answer comes.
async fn carry(opened: DatagramFlow, flow: &Flow, route: &Route, ticket: &mut Ticket) -> Result<(), Failure> {
    let (began, mut cut) = (Instant::now(), None);
    let watched = async {
        if tokio::time::timeout(KEPT, flow.life.answered()).await.is_err() {
            flow.forget_unanswered();
            flow.life.answered().await;
        }
        flow.forget_unanswered();
        if let Some(picked) = &route.picked {
            picked.attempt.answered(began.elapsed());
        }
        std::future::pending().await
    };
    let carried = opened.carry(async {
        let (code, why) = tokio::select! {
            ended = over(&flow.life, ticket) => ended,
            ended = watched => ended,
        };
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

/// Whether a failure says that nobody has got anything: no endpoint has taken the flow, or nobody has its port.
fn is_undelivered(failure: &Failure) -> bool {
    match failure {
        Failure::Application(_) => true,
        Failure::Remote(_) => false,
        failure => failure.is_retriable(),
    }
}

/// Why a flow is given up at this end, and how the other end is told.
pub(super) async fn over(life: &Life, ticket: &mut Ticket) -> (ResetCode, Option<crate::proxy::Cut>) {
    tokio::select! {
        () = life.idle() => (ResetCode::CANCELLED, None),
        () = life.ended() => (if life.is_refused() { ResetCode::CONNECTION_RESET } else { ResetCode::CANCELLED }, None),
        cut = ticket.cut() => (ResetCode::DENIED, Some(cut)),
    }
}

/// Every critical section here leaves what it guards whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
