//! Where a captured connection, or a flow of datagrams, goes, and what is asked on behalf of the workload that makes it.

use super::balancers::{self, Among, Attempt, Frontend};
use super::report::Parties;
use super::session::{Edge, Session};
use super::verdict::{self, Caller, Ruling};
use super::{Context, Failure, LocalWorkload};
use crate::balance::EndpointId;
use crate::engine::{Endpoint, Snapshot};
use crate::model::{ObjectName, Protocol, Service, Traffic};
use crate::telemetry::connections::Reporter;
use crate::telemetry::policy::EnforcedBy;
use crate::tunnel::Peer;
use mesh_common::policy::Arrival;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Where it goes.
pub(super) struct Route {
    pub(super) endpoint: Endpoint,
    /// `None`: the workload was called by its own address, and nothing was picked.
    pub(super) picked: Option<Picked>,
}

/// The service's part of it.
pub(super) struct Picked {
    service: Arc<Service>,
    traffic: Arc<Traffic>,
    pub(super) attempt: Attempt,
    /// Another endpoint was tried before.
    is_retry: bool,
}

impl Route {
    fn new(picked: balancers::Picked, is_retry: bool) -> Self {
        let balancers::Picked { service, traffic, endpoint, attempt } = picked;
        Self { endpoint, picked: Some(Picked { service, traffic, attempt, is_retry }) }
    }

    pub(super) fn service(&self) -> Option<&ObjectName> {
        self.picked.as_ref().map(|picked| &picked.service.name)
    }

    pub(super) fn traffic(&self) -> Option<&Traffic> {
        self.picked.as_ref().map(|picked| &*picked.traffic)
    }

    /// The endpoint has taken it.
    pub(super) fn connected(&mut self, context: &Context) {
        if let Some(picked) = &mut self.picked {
            picked.attempt.connected();
            if picked.is_retry {
                context.balance.retried("recovered");
            }
        }
    }
}

/// A workload of this node that calls over one of the protocols.
#[derive(Clone, Copy)]
pub(super) struct Calling<'a> {
    pub(super) context: &'a Context,
    pub(super) local: &'a LocalWorkload,
    pub(super) protocol: Protocol,
}

impl Calling<'_> {
    /// Picks where a connection goes: an endpoint of the frontend's service, or the workload itself.
    pub(super) fn route(&self, destination: SocketAddr, caller: IpAddr, among: Among<'_>) -> Result<Route, Failure> {
        if let Some(picked) = self.pick(destination, caller, among) {
            return Ok(Route::new(picked?, false));
        }
        let snapshot = self.context.snapshot.load();
        let workload = match self.protocol {
            Protocol::Tcp => snapshot.workload_serving(destination),
            Protocol::Udp => snapshot.workload_at(destination.ip()),
        };
        let workload = workload.ok_or(Failure::UnknownDestination(destination))?;
        Ok(Route { endpoint: Endpoint::direct(workload, destination), picked: None })
    }

    fn pick(
        &self,
        address: SocketAddr,
        caller: IpAddr,
        among: Among<'_>,
    ) -> Option<Result<balancers::Picked, crate::balance::Exhausted>> {
        let frontend = Frontend { address, protocol: self.protocol };
        self.context.balancers.pick(&self.context.snapshot, frontend, caller, among)
    }

    /// Where the connection goes after a failure, if the service allows another attempt and has another endpoint.
    pub(super) fn next_route(
        &self,
        destination: SocketAddr,
        caller: IpAddr,
        failed: &mut Route,
        tried: &mut Vec<EndpointId>,
        failure: &Failure,
    ) -> Option<Route> {
        let Picked { traffic, attempt, .. } = failed.picked.take()?;
        tried.push(attempt.id());
        if tried.len() > traffic.retry.attempts as usize {
            if traffic.retry.attempts > 0 {
                self.context.balance.retried("attempts");
            }
            return None;
        }
        let allowed = attempt.may_retry();
        // It has ended: it must not count as one of the service's connections while the next one is picked.
        drop(attempt);
        let pick = || self.pick(destination, caller, Among::Untried(tried)).transpose();
        match allowed.and_then(|()| pick()) {
            Ok(picked) => {
                self.context.balance.retry(failure.reason());
                Some(Route::new(picked?, true))
            }
            Err(exhausted) => {
                self.context.balance.retried(exhausted.reason());
                None
            }
        }
    }

    /// The source's edge of the service graph.
    pub(super) fn edge<'b>(&'b self, snapshot: &'b Snapshot, route: &'b Route) -> Edge<'b> {
        Edge {
            protocol: self.protocol,
            reporter: Reporter::Source,
            source: self.local.current(snapshot),
            destination: Some(&route.endpoint.workload),
            service: route.service(),
        }
    }

    /// A connection that goes nowhere is counted under its source, and the service that it asked for if that is known.
    pub(super) fn unrouted(&self, source: SocketAddr, destination: Option<SocketAddr>, failure: &Failure) {
        let snapshot = self.context.snapshot.load();
        let service =
            destination.and_then(|asked| Some((asked, &snapshot.frontend_of(self.protocol, asked)?.service.name)));
        let edge = Edge {
            protocol: self.protocol,
            reporter: Reporter::Source,
            source: &self.local.workload,
            destination: None,
            service: service.map(|(_, name)| name),
        };
        let asked = service.map_or_else(|| SocketAddr::new(source.ip(), 0), |(asked, _)| asked);
        Session::begin(self.context, &edge, source, asked).fail(failure);
    }

    /// The destination decides, too; what it would refuse need not travel there.
    pub(super) fn authorize(&self, own: SocketAddr, snapshot: &Snapshot, route: &Route) -> Result<Ruling, Failure> {
        let local = &self.local.workload;
        let (endpoint, address) = (&route.endpoint.workload, route.endpoint.address);
        let known = snapshot.workload(&endpoint.name).filter(|known| known.uid == endpoint.uid);
        let destination = known.unwrap_or(endpoint);
        let caller = Caller { identity: Some(&local.identity), address: own.ip() };
        let told = verdict::decide(snapshot, destination, address.port(), Arrival::Authenticated, caller);
        let parties =
            Parties { source: own, source_workload: Some(local), destination: address, workload: Some(destination) };
        self.context.reports.decided(&told, EnforcedBy::Source, &parties);
        if told.is_denied() { Err(Failure::Denied(told.ruling)) } else { Ok(told.ruling) }
    }

    /// Whom the tunnel is to reach.
    pub(super) fn peer(&self, snapshot: &Snapshot, route: &Route) -> Result<Peer, Failure> {
        let workload = &route.endpoint.workload;
        let node = snapshot.node(&workload.node).and_then(|node| node.addresses.first());
        let address = node.ok_or_else(|| Failure::UnknownNode(workload.node.clone()))?;
        Ok(Peer {
            source: self.local.workload.identity.clone(),
            destination: workload.identity.clone(),
            workload: workload.uid.clone(),
            node: workload.node.clone(),
            address: SocketAddr::new(*address, self.context.tunnel_port),
        })
    }
}
