//! One connection as metrics, the live table and the access log see it.

use super::registry::Cut;
use super::verdict::Ruling;
use super::{Context, Failure};
use crate::model::{NodeName, ObjectName, Protocol, SpiffeId, Workload};
use crate::telemetry::access_log;
use crate::telemetry::connections::{
    self, ConnectionMetrics, EdgeKey, OpenConnection, Party, Reporter, ResponseFlag, Security, ServiceLabels,
};
use crate::telemetry::live::{Direction, Flow, LiveGuard};
use crate::tunnel::{Stream, TlsSession};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Who speaks to whom.
pub(super) struct Edge<'a> {
    pub(super) protocol: Protocol,
    pub(super) reporter: Reporter,
    pub(super) source: &'a Workload,
    pub(super) destination: Option<&'a Workload>,
    pub(super) service: Option<&'a ObjectName>,
}

/// Counts, lists and finally logs a connection, or a flow of datagrams. Ending it is dropping it.
pub(super) struct Session {
    connection: OpenConnection,
    row: LiveGuard,
    direction: Direction,
    node: Arc<str>,
}

impl Session {
    pub(super) fn begin(context: &Context, edge: &Edge<'_>, source: SocketAddr, destination: SocketAddr) -> Self {
        Self::begin_since(context, edge, Security::MutualTls, source, destination, Instant::now())
    }

    /// As [`Self::begin`], of a connection that began before, and may travel in another way.
    pub(super) fn begin_since(
        context: &Context,
        edge: &Edge<'_>,
        security: Security,
        source: SocketAddr,
        destination: SocketAddr,
        since: Instant,
    ) -> Self {
        let connection = context.edges.of(&context.metrics, edge, security).opened_since(since);
        let direction = match edge.reporter {
            Reporter::Source => Direction::Outbound,
            Reporter::Destination => Direction::Inbound,
        };
        let named = |workload: &Workload| workload.name.text().clone();
        let flow = Flow {
            protocol: shown(edge.protocol),
            source_workload: Some(named(edge.source)),
            source_identity: Some(edge.source.identity.text().clone()),
            service: edge.service.map(|name| name.text().clone()),
            destination_workload: edge.destination.map(named),
            destination_identity: edge.destination.map(|workload| workload.identity.text().clone()),
            ..Flow::new(direction, source, destination)
        };
        let row = context.live.insert(flow, connection.traffic());
        Self { connection, row, direction, node: context.node.text().clone() }
    }

    /// It goes to another endpoint than so far.
    pub(super) fn rerouted(&self, context: &Context, edge: &Edge<'_>) {
        self.connection.moved_to(&context.edges.of(&context.metrics, edge, Security::MutualTls));
        let mut flow = self.row.flow();
        flow.destination_workload = edge.destination.map(|workload| workload.name.text().clone());
        flow.destination_identity = edge.destination.map(|workload| workload.identity.text().clone());
    }

    pub(super) fn passed_to_tunnel(&self, bytes: u64) {
        match self.direction {
            // Outbound, what the application writes is the request.
            Direction::Outbound => self.connection.add_received(bytes),
            Direction::Inbound => self.connection.add_sent(bytes),
        }
    }

    pub(super) fn passed_from_tunnel(&self, bytes: u64) {
        match self.direction {
            Direction::Outbound => self.connection.add_sent(bytes),
            Direction::Inbound => self.connection.add_received(bytes),
        }
    }

    /// The endpoint that was picked, and its node.
    pub(super) fn routed(&self, backend: SocketAddr, node: &NodeName) {
        let mut flow = self.row.flow();
        flow.backend = Some(backend);
        flow.node = Some(node.text().clone());
    }

    /// The stream that carries it.
    pub(super) fn carried_by(&self, stream: &Stream) {
        self.carried_over(stream.transport(), &stream.tls());
    }

    /// The transport that carries it.
    pub(super) fn carried_over(&self, transport: &'static str, tls: &TlsSession) {
        let (group, suite) = (known(&tls.group), known(&tls.suite));
        let mut flow = self.row.flow();
        flow.transport = Some(transport);
        flow.group = group;
        flow.suite = suite;
    }

    /// No stream does: the kernel.
    pub(super) fn carried_by_kernel(&self) {
        self.row.flow().transport = Some("kernel");
    }

    /// Bytes went from the source to the destination.
    pub(super) fn asked(&self, bytes: u64) {
        self.connection.add_received(bytes);
    }

    /// Bytes went from the destination to the source.
    pub(super) fn answered(&self, bytes: u64) {
        self.connection.add_sent(bytes);
    }

    /// A datagram of this size went from the source to the destination.
    pub(super) fn request(&self, bytes: usize) {
        self.connection.add_received_datagram(bytes as u64);
    }

    /// A datagram of this size went from the destination to the source.
    pub(super) fn reply(&self, bytes: usize) {
        self.connection.add_sent_datagram(bytes as u64);
    }

    /// What policy said about it.
    pub(super) fn ruled(&self, ruling: &Ruling) {
        let mut flow = self.row.flow();
        flow.verdict = Some(ruling.word());
        flow.policy = ruling.policy.as_ref().map(|policy| policy.text().clone());
        flow.rule.clone_from(&ruling.rule);
    }

    pub(super) fn fail(&self, failure: &Failure) {
        if let Failure::Denied(ruling) | Failure::Cut(Cut::Denied(ruling)) = failure {
            self.ruled(ruling);
        } else if failure.flag() == ResponseFlag::Deny {
            // The other node refused it, and its log names the rule.
            let mut flow = self.row.flow();
            (flow.verdict, flow.policy, flow.rule) = (Some("deny"), None, None);
        }
        self.connection.fail_because(failure.flag(), failure.reason(), failure);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        access_log::finished(&self.row.flow(), &self.connection, &self.node);
    }
}

/// The edges of the service graph that connections took lately: most take one of a few, and then no label is made anew.
#[derive(Debug, Default)]
pub struct Edges(Mutex<HashMap<Course, connections::Edge>>);

/// Past so many they are forgotten; they are found again in the metrics.
const MAX_EDGES: usize = 4096;

/// All that an edge's labels are made from.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Course {
    protocol: Protocol,
    reporter: Reporter,
    security: Security,
    source: End,
    destination: Option<End>,
    service: Option<ObjectName>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct End {
    name: ObjectName,
    owner: Arc<str>,
    identity: SpiffeId,
}

impl Edges {
    fn of(&self, metrics: &ConnectionMetrics, edge: &Edge<'_>, security: Security) -> connections::Edge {
        let course = edge.course(security);
        // Every critical section here leaves the table whole.
        let mut edges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = edges.get(&course).filter(|known| known.is_current()) {
            return known.clone();
        }
        let found = metrics.edge(edge.key(security));
        if edges.len() >= MAX_EDGES {
            edges.clear();
        }
        edges.insert(course, found.clone());
        found
    }
}

impl Edge<'_> {
    fn course(&self, security: Security) -> Course {
        let end = |workload: &Workload| End {
            name: workload.name.clone(),
            owner: workload.owner.clone(),
            identity: workload.identity.clone(),
        };
        Course {
            protocol: self.protocol,
            reporter: self.reporter,
            security,
            source: end(self.source),
            destination: self.destination.map(end),
            service: self.service.cloned(),
        }
    }

    fn key(&self, security: Security) -> EdgeKey {
        EdgeKey {
            reporter: self.reporter,
            source: party(self.source),
            destination: self.destination.map_or_else(Party::unknown, party),
            service: self.service.map_or_else(ServiceLabels::unknown, |name| ServiceLabels {
                host: format!("{}.{}.svc.cluster.local", name.name(), name.namespace()).into(),
                name: name.name().into(),
                namespace: name.namespace().into(),
            }),
            protocol: shown(self.protocol),
            security,
        }
    }
}

/// QUIC does not tell.
fn known(text: &str) -> Option<Arc<str>> {
    (!text.is_empty()).then(|| text.into())
}

fn shown(protocol: Protocol) -> connections::Protocol {
    match protocol {
        Protocol::Tcp => connections::Protocol::Tcp,
        Protocol::Udp => connections::Protocol::Udp,
    }
}

fn party(workload: &Workload) -> Party {
    Party {
        workload: workload.owner.clone(),
        namespace: workload.name.namespace().into(),
        canonical_service: workload.owner.clone(),
        principal: workload.identity.text().clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::fixture::{id, name, workload};
    use crate::telemetry::connections::Limits;
    use prometheus_client::registry::Registry;
    use std::time::Duration;

    #[test]
    fn connections_of_one_course_share_an_edge_for_as_long_as_it_lives() {
        let metrics = ConnectionMetrics::with_limits(&mut Registry::default(), Limits::default());
        let (edges, client, service) = (Edges::default(), workload("client", "10.0.0.1"), name("server"));
        let mut server = workload("server", "10.0.0.2");
        let begun = |server: &Workload| {
            let edge = Edge {
                protocol: Protocol::Tcp,
                reporter: Reporter::Source,
                source: &client,
                destination: Some(server),
                service: Some(&service),
            };
            let edge = edges.of(&metrics, &edge, Security::MutualTls);
            drop(edge.opened());
            edge
        };
        begun(&server);
        assert!(begun(&server).is_current());
        assert_eq!((metrics.series(), metrics.totals(connections::Protocol::Tcp).opened), (1, 2));
        server.identity = id("other");
        begun(&server);
        assert_eq!(metrics.series(), 2, "another identity is another edge");
        assert_eq!(metrics.expire(Instant::now() + Duration::from_hours(1)), 2);
        assert!(begun(&server).is_current(), "one that has expired is not used again");
        assert_eq!(metrics.series(), 1);
    }
}
