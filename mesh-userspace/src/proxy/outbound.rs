//! Outbound: a workload's captured connection is carried to an endpoint's node.

use super::balancers::{Among, Attempt};
use super::registry::{Live, Side};
use super::relay::{Carried, Progress, relay, reset_on_close};
use super::route::{Calling, Route};
use super::session::Session;
use super::{Context, Failure, LocalWorkload};
use crate::balance::EndpointId;
use crate::datapath::Tuples;
use crate::model::{Protocol, Workload};
use crate::runtime::Acceptor;
use crate::telemetry::bounds::AcceptFailures;
use crate::tunnel::{Stream, StreamHeader};
use mesh_common::flow::{OriginalDestination, TupleKey};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// One in-pod listener's accepting side.
pub struct Outbound {
    pub context: Arc<Context>,
    pub local: Arc<LocalWorkload>,
    pub tuples: Tuples,
}

impl Outbound {
    /// Accepts until the workload is removed.
    pub async fn serve(self, listener: TcpListener) {
        let outbound = Arc::new(self);
        let tracker = outbound.context.connections.clone();
        let accepts = &outbound.context.accepts;
        accept_until(outbound.local.removed.token(), &listener, accepts, |app, source| {
            let held = match outbound.context.budget.connection() {
                Ok(held) => held,
                Err(spent) => return outbound.shed(&app, source, &spent),
            };
            let outbound = outbound.clone();
            let cores = outbound.context.cores.clone();
            let source = SocketAddr::new(source.ip().to_canonical(), source.port());
            cores.serve(&tracker, app, |app, seat| async move {
                outbound.connection(&app, source).await;
                drop((held, seat));
            });
        })
        .await;
    }

    /// Resets a connection that there is no room for, at once: in the backlog it would only wait for its end.
    fn shed(&self, app: &TcpStream, source: SocketAddr, spent: &Failure) {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let record = original_destination(&self.tuples, self.local.namespace.cookie(), source);
        self.calling().unrouted(source, record.ok().map(|record| record.endpoint().into()), spent);
        reset_on_close(app);
    }

    async fn connection(&self, app: &TcpStream, source: SocketAddr) {
        let record = original_destination(&self.tuples, self.local.namespace.cookie(), source);
        let record = record.inspect_err(|failure| self.calling().unrouted(source, None, failure));
        let carried = match record.and_then(|record| self.begin(app, source, &record)) {
            Ok(begun) => self.carry(begun).await,
            Err(failure) => Err(failure),
        };
        if carried.is_err() {
            reset_on_close(app);
        }
    }

    /// Finds out where a connection of the workload goes.
    pub(super) fn begin<'a>(
        &'a self,
        app: &'a TcpStream,
        source: SocketAddr,
        record: &OriginalDestination,
    ) -> Result<Begun<'a>, Failure> {
        let destination = SocketAddr::from(record.endpoint());
        if self.context.dns.is_at(destination) {
            return Ok(Begun::Names(app));
        }
        let elsewhere = record.flags() & OriginalDestination::ELSEWHERE != 0;
        let own = own_address(&self.local.workload, source);
        // The kernel may have drawn among all endpoints, and the draw did not fall on one of this node.
        let among = if elsewhere { Among::Elsewhere } else { Among::Untried(&[]) };
        let calling = self.calling();
        let route = calling.route(destination, own.ip(), among);
        let route = route.inspect_err(|failure| calling.unrouted(source, Some(destination), failure))?;
        let snapshot = self.context.snapshot.load();
        let session = Session::begin(&self.context, &calling.edge(&snapshot, &route), source, destination);
        Ok(Begun::Call(Box::new(Call { outbound: self, app, own, destination, route, session, tried: Vec::new() })))
    }

    /// Carries it there.
    pub(super) async fn carry(&self, begun: Begun<'_>) -> Result<(), Failure> {
        let mut call = match begun {
            Begun::Call(call) => call,
            Begun::Names(app) => return Box::pin(self.name(app)).await,
        };
        let outcome = tokio::select! {
            outcome = call.attempts() => outcome,
            () = self.local.removed.cancelled() => Err(Failure::WorkloadRemoved),
        };
        outcome.inspect_err(|failure| call.session.fail(failure))
    }

    pub(super) fn calling(&self) -> Calling<'_> {
        Calling { context: &self.context, local: &self.local, protocol: Protocol::Tcp }
    }

    /// Answers the DNS queries of a connection.
    async fn name(&self, app: &TcpStream) -> Result<(), Failure> {
        tokio::select! {
            served = self.context.dns.serve(&self.local.workload, app) => served.map_err(Failure::Local),
            () = self.local.removed.cancelled() => Err(Failure::WorkloadRemoved),
        }
    }

    /// A workload that leaves the catalog takes its lanes with it, and they may end before its connections are told:
    /// the cause is the same, so the reason is, too.
    fn explained(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Remote(_) | Failure::Open(_) if self.is_removed() => Failure::WorkloadRemoved,
            failure => failure,
        }
    }

    fn is_removed(&self) -> bool {
        self.local.removed.is_cancelled() || self.local.known(&self.context.snapshot.load()).is_none()
    }
}

/// Where a connection goes.
pub(super) enum Begun<'a> {
    /// On the heap: what is handed on from future to future takes its room in each of them.
    Call(Box<Call<'a>>),
    /// To the mesh's own DNS.
    Names(&'a TcpStream),
}

/// A connection that is being carried. Its steps are methods of it, so that no future keeps a copy of what they share.
pub(super) struct Call<'a> {
    outbound: &'a Outbound,
    app: &'a TcpStream,
    /// The address that the workload speaks under.
    own: SocketAddr,
    destination: SocketAddr,
    route: Route,
    session: Session,
    tried: Vec<EndpointId>,
}

impl Call<'_> {
    /// Tries endpoints until one carries the connection to its end, for as long as no byte has been anywhere.
    async fn attempts(&mut self) -> Result<(), Failure> {
        self.app.set_nodelay(true).map_err(Failure::Local)?;
        loop {
            let mut progress = Progress::default();
            let Err(failure) = self.attempt(&mut progress).await else { return Ok(()) };
            let failure = self.outbound.explained(failure);
            if let Some(picked) = &mut self.route.picked {
                picked.attempt.broke(&failure);
            }
            let goes_on = failure.is_retriable() && progress.is_untouched() && self.reroute(&failure);
            if !goes_on {
                return Err(failure);
            }
        }
    }

    /// Goes to another endpoint, if there is one to be tried.
    fn reroute(&mut self, failure: &Failure) -> bool {
        let Self { destination, own, tried, .. } = self;
        let (calling, context) = (self.outbound.calling(), &self.outbound.context);
        let Some(next) = calling.next_route(*destination, own.ip(), &mut self.route, tried, failure) else {
            return false;
        };
        self.route = next;
        self.session.rerouted(context, &calling.edge(&context.snapshot.load(), &self.route));
        true
    }

    /// One connection at one endpoint, from the verdict to its end.
    async fn attempt(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        let context = &self.outbound.context;
        let mut ticket = context.registry.enter(Live {
            side: Side::Source,
            caller: self.outbound.local.workload.clone(),
            source: self.own.ip(),
            destination: self.route.endpoint.workload.clone(),
            port: self.route.endpoint.address.port(),
        });
        let stream = tokio::select! {
            // On the heap, and gone before the relay starts.
            opened = Box::pin(self.open()) => opened?,
            cut = ticket.cut() => return Err(Failure::Cut(cut)),
        };
        self.route.connected(context);
        self.session.carried_by(&stream);
        let carried =
            Carrying { session: &self.session, attempt: self.route.picked.as_ref().map(|picked| &picked.attempt) };
        let idle_timeout = self.route.traffic().and_then(|traffic| traffic.idle_timeout);
        relay(self.app, stream, &carried, &mut ticket, progress, idle_timeout).await
    }

    /// Asks policy, and opens a stream to the endpoint. To be called when the connection is in the registry.
    async fn open(&self) -> Result<Stream, Failure> {
        let Self { outbound, route, session, own, .. } = self;
        // What changes from here on, the registry knows.
        let snapshot = outbound.context.snapshot.load_full();
        session.routed(route.endpoint.address, &route.endpoint.workload.node);
        session.ruled(&outbound.calling().authorize(*own, &snapshot, route)?);
        let peer = outbound.calling().peer(&snapshot, route)?;
        let header = StreamHeader {
            protocol: Protocol::Tcp,
            destination: route.endpoint.address,
            service: route.service().map(ToString::to_string),
            source: *own,
            traceparent: None,
        };
        let transport = snapshot.mesh.as_ref().map_or_else(Default::default, |mesh| mesh.transport);
        let tunnel = &outbound.context.tunnel;
        Ok(match route.traffic() {
            Some(traffic) => {
                let bound = traffic.connect_timeout.unwrap_or(outbound.context.connect_timeout);
                tunnel.open_within(bound, transport, &peer, header).await?
            }
            None => tunnel.open(transport, &peer, header).await?,
        })
    }
}

/// What the relay tells: the session, and the endpoint's group.
struct Carrying<'a> {
    session: &'a Session,
    attempt: Option<&'a Attempt>,
}

impl Carried for Carrying<'_> {
    fn passed_to_tunnel(&self, bytes: u64) {
        self.session.passed_to_tunnel(bytes);
    }

    fn passed_from_tunnel(&self, bytes: u64) {
        self.session.passed_from_tunnel(bytes);
    }

    fn answered(&self, after: Duration) {
        if let Some(attempt) = self.attempt {
            attempt.answered(after);
        }
    }
}

/// Accepts until it is stopped.
pub(super) async fn accept_until(
    stopped: &CancellationToken,
    listener: &TcpListener,
    accepts: &AcceptFailures,
    mut take: impl FnMut(TcpStream, SocketAddr),
) {
    let mut acceptor = Acceptor::new(|reason| accepts.count("outbound", reason));
    loop {
        let (app, source) = tokio::select! {
            accepted = acceptor.next(|| listener.accept()) => accepted,
            () = stopped.cancelled() => return,
        };
        take(app, source);
    }
}

/// Takes the record of a connection that was accepted in a namespace.
pub(super) fn original_destination(
    tuples: &Tuples,
    netns_cookie: u64,
    source: SocketAddr,
) -> Result<OriginalDestination, Failure> {
    let key = TupleKey::new(netns_cookie, source.ip().into(), source.port().to_be());
    match tuples.take(&key) {
        Ok(Some(record)) => Ok(record),
        Ok(None) => Err(Failure::NoOriginalDestination),
        Err(error) => Err(Failure::Local(error)),
    }
}

/// The address under which the workload speaks: the other side accepts only addresses that the catalog gives to the
/// identity, so a socket bound to another local address speaks under the workload's own.
pub(super) fn own_address(workload: &Workload, source: SocketAddr) -> SocketAddr {
    if workload.addresses.contains(&source.ip()) {
        return source;
    }
    SocketAddr::new(workload.address_like(source.ip()).unwrap_or(source.ip()), source.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_takes_little_memory() {
        fn size<A, B, C, R>(_: impl FnOnce(A, B, C) -> R) -> usize {
            size_of::<R>()
        }
        assert!(size(Outbound::connection) <= 1024, "{}", size(Outbound::connection));
    }
}
