//! Outbound: a workload's captured connection is carried to an endpoint's node.

use super::registry::{Live, Side, Ticket};
use super::relay::{relay, reset_on_close};
use super::report::Parties;
use super::session::{Edge, Session};
use super::verdict::{self, Caller};
use super::{Context, Failure, LocalWorkload};
use crate::balance;
use crate::datapath::Tuples;
use crate::engine::{Endpoint, Locality, Snapshot};
use crate::model::{Protocol, Service, Workload};
use crate::telemetry::connections::Reporter;
use crate::telemetry::policy::EnforcedBy;
use crate::tunnel::{Peer, Stream, StreamHeader};
use mesh_common::flow::{OriginalDestination, TupleKey};
use mesh_common::policy::Arrival;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Pause after an accept that failed for want of descriptors or memory: trying again at once would only burn the CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// One in-pod listener's accepting side.
pub struct Outbound {
    pub context: Arc<Context>,
    pub local: Arc<LocalWorkload>,
    pub tuples: Tuples,
}

/// Where a captured connection goes.
struct Route {
    service: Option<Arc<Service>>,
    endpoint: Endpoint,
}

impl Outbound {
    /// Accepts until the workload is removed.
    pub async fn serve(self, listener: TcpListener) {
        let outbound = Arc::new(self);
        let tracker = outbound.context.connections.clone();
        accept_until(&outbound.local.removed, &listener, |app, source| {
            let outbound = outbound.clone();
            tracker.spawn(async move { outbound.connection(app, source).await });
        })
        .await;
    }

    async fn connection(&self, app: TcpStream, source: SocketAddr) {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let carried = match original_destination(&self.tuples, self.local.namespace.cookie(), source) {
            Ok(record) => self.carry(&app, source, &record).await,
            Err(failure) => Err(failure).inspect_err(|failure| self.unrouted(source, failure)),
        };
        if carried.is_err() {
            reset_on_close(&app);
        }
    }

    /// Carries a connection of the workload to where it was going.
    pub(super) async fn carry(
        &self,
        app: &TcpStream,
        source: SocketAddr,
        record: &OriginalDestination,
    ) -> Result<(), Failure> {
        let destination = SocketAddr::from(record.endpoint());
        if self.context.dns.is_at(destination) {
            return self.name(app).await;
        }
        let snapshot = self.context.snapshot.load_full();
        let elsewhere = record.flags() & OriginalDestination::ELSEWHERE != 0;
        let route = route(&snapshot, destination, elsewhere).inspect_err(|failure| self.unrouted(source, failure))?;
        let own = own_address(&self.local.workload, source);
        let mut ticket = self.context.registry.enter(Live {
            side: Side::Source,
            caller: self.local.workload.clone(),
            source: own.ip(),
            destination: route.endpoint.workload.clone(),
            port: route.endpoint.address.port(),
        });
        // What changes from here on, the registry knows.
        let snapshot = self.context.snapshot.load_full();
        let edge = Edge {
            reporter: Reporter::Source,
            source: self.local.current(&snapshot),
            destination: Some(&route.endpoint.workload),
            service: route.service.as_deref().map(|service| &service.name),
        };
        let session = Session::begin(&self.context, &edge, source, destination);
        session.routed(route.endpoint.address, route.endpoint.workload.node.as_str());
        let outcome = match self.authorize(own, &snapshot, &route, &session) {
            Ok(()) => tokio::select! {
                outcome = self.tunnel(app, own, snapshot, &route, &session, &mut ticket) => outcome,
                () = self.local.removed.cancelled() => Err(Failure::WorkloadRemoved),
            },
            denied => denied,
        };
        outcome.map_err(|failure| self.explained(failure)).inspect_err(|failure| session.fail(failure))
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
            Failure::Remote(_) | Failure::Open(_) if self.local.known(&self.context.snapshot.load()).is_none() => {
                Failure::WorkloadRemoved
            }
            failure => failure,
        }
    }

    /// The destination decides, too; what it would refuse need not travel there.
    fn authorize(&self, own: SocketAddr, snapshot: &Snapshot, route: &Route, session: &Session) -> Result<(), Failure> {
        let (endpoint, address) = (&route.endpoint.workload, route.endpoint.address);
        let known = snapshot.workload(&endpoint.name).filter(|known| known.uid == endpoint.uid);
        let destination = known.unwrap_or(endpoint);
        let caller = Caller { identity: Some(&self.local.workload.identity), address: own.ip() };
        let told = verdict::decide(snapshot, destination, address.port(), Arrival::Authenticated, caller);
        let parties = Parties {
            source: own,
            source_workload: Some(&self.local.workload),
            destination: address,
            workload: Some(destination),
        };
        self.context.reports.decided(&told, EnforcedBy::Source, &parties);
        if told.is_denied() {
            return Err(Failure::Denied(told.ruling));
        }
        session.ruled(&told.ruling);
        Ok(())
    }

    async fn tunnel(
        &self,
        app: &TcpStream,
        own: SocketAddr,
        snapshot: Arc<Snapshot>,
        route: &Route,
        session: &Session,
        ticket: &mut Ticket,
    ) -> Result<(), Failure> {
        app.set_nodelay(true).map_err(Failure::Local)?;
        let stream = tokio::select! {
            opened = self.open(own, &snapshot, route) => opened?,
            cut = ticket.cut() => return Err(Failure::Cut(cut)),
        };
        // Held no longer than it is needed: a connection may last for days.
        drop(snapshot);
        session.carried_by(&stream);
        relay(app, stream, session, ticket).await
    }

    async fn open(&self, own: SocketAddr, snapshot: &Snapshot, route: &Route) -> Result<Stream, Failure> {
        let workload = &route.endpoint.workload;
        let node = snapshot.node(&workload.node).ok_or_else(|| Failure::UnknownNode(workload.node.clone()))?;
        let address = node.addresses.first().ok_or_else(|| Failure::UnknownNode(workload.node.clone()))?;
        let peer = Peer {
            source: self.local.workload.identity.clone(),
            destination: workload.identity.clone(),
            workload: workload.uid.clone(),
            node: workload.node.clone(),
            address: SocketAddr::new(*address, self.context.tunnel_port),
        };
        let header = StreamHeader {
            protocol: Protocol::Tcp,
            destination: route.endpoint.address,
            service: route.service.as_ref().map(|service| service.name.to_string()),
            source: own,
            traceparent: None,
        };
        let transport = snapshot.mesh.as_ref().map_or_else(Default::default, |mesh| mesh.transport);
        Ok(self.context.tunnel.open(transport, &peer, header).await?)
    }

    /// A connection whose destination is not known is counted under its source alone.
    fn unrouted(&self, source: SocketAddr, failure: &Failure) {
        let edge = Edge { reporter: Reporter::Source, source: &self.local.workload, destination: None, service: None };
        let unspecified = SocketAddr::new(source.ip(), 0);
        Session::begin(&self.context, &edge, source, unspecified).fail(failure);
    }
}

/// Accepts until it is stopped.
pub(super) async fn accept_until(
    stopped: &CancellationToken,
    listener: &TcpListener,
    mut take: impl FnMut(TcpStream, SocketAddr),
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped.cancelled() => return,
        };
        match accepted {
            Ok((app, source)) => take(app, source),
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                tracing::warn!(listener = ?listener.local_addr(), %error, "cannot accept; pausing");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
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

/// Picks where a connection to `destination` goes: an endpoint of the frontend's service, or the workload itself.
///
/// `elsewhere`: the kernel has drawn among all endpoints, and the draw did not fall on one of this node.
fn route(snapshot: &Snapshot, destination: SocketAddr, elsewhere: bool) -> Result<Route, Failure> {
    if let Some(frontend) = snapshot.frontend(destination) {
        let others = frontend.endpoints.iter().filter(|endpoint| elsewhere && endpoint.locality != Locality::SameNode);
        let others: Vec<_> = others.cloned().collect();
        let among = if others.is_empty() { &frontend.endpoints[..] } else { &others[..] };
        let endpoint = balance::pick(among, rand::random()).ok_or(Failure::NoEndpoints)?;
        return Ok(Route { service: Some(frontend.service.clone()), endpoint: endpoint.clone() });
    }
    let workload = snapshot.workload_serving(destination).ok_or(Failure::UnknownDestination(destination))?;
    let endpoint = Endpoint::direct(workload, destination);
    Ok(Route { service: None, endpoint })
}

/// Errors of one connection, not of the listener (accept(2), "Error handling").
fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}
