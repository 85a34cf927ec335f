//! One connection as metrics, the live table and the access log see it.

use super::registry::Cut;
use super::verdict::Ruling;
use super::{Context, Failure};
use crate::model::{ObjectName, Protocol, Workload};
use crate::telemetry::access_log;
use crate::telemetry::connections::{
    self, EdgeKey, OpenConnection, Party, Reporter, ResponseFlag, Security, ServiceLabels,
};
use crate::telemetry::live::{Direction, Flow, LiveGuard};
use crate::tunnel::{Stream, TlsSession};
use std::net::SocketAddr;
use std::sync::Arc;
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
        let connection = context.metrics.edge(edge.key(security)).opened_since(since);
        let direction = match edge.reporter {
            Reporter::Source => Direction::Outbound,
            Reporter::Destination => Direction::Inbound,
        };
        let named = |workload: &Workload| Arc::from(workload.name.to_string());
        let flow = Flow {
            protocol: shown(edge.protocol),
            source_workload: Some(named(edge.source)),
            source_identity: Some(edge.source.identity.as_str().into()),
            service: edge.service.map(|name| name.to_string().into()),
            destination_workload: edge.destination.map(named),
            destination_identity: edge.destination.map(|workload| workload.identity.as_str().into()),
            ..Flow::new(direction, source, destination)
        };
        let row = context.live.insert(flow, connection.traffic());
        Self { connection, row, direction, node: context.node.as_str().into() }
    }

    /// It goes to another endpoint than so far.
    pub(super) fn rerouted(&self, context: &Context, edge: &Edge<'_>) {
        self.connection.moved_to(&context.metrics.edge(edge.key(Security::MutualTls)));
        self.row.set(Flow {
            destination_workload: edge.destination.map(|workload| workload.name.to_string().into()),
            destination_identity: edge.destination.map(|workload| workload.identity.as_str().into()),
            ..Flow::clone(&self.row.flow())
        });
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
    pub(super) fn routed(&self, backend: SocketAddr, node: &str) {
        self.row.set(Flow { backend: Some(backend), node: Some(node.into()), ..Flow::clone(&self.row.flow()) });
    }

    /// The stream that carries it.
    pub(super) fn carried_by(&self, stream: &Stream) {
        self.carried_over(stream.transport(), &stream.tls());
    }

    /// The transport that carries it.
    pub(super) fn carried_over(&self, transport: &'static str, tls: &TlsSession) {
        self.row.set(Flow {
            transport: Some(transport),
            group: known(&tls.group),
            suite: known(&tls.suite),
            ..Flow::clone(&self.row.flow())
        });
    }

    /// No stream does: the kernel.
    pub(super) fn carried_by_kernel(&self) {
        self.row.set(Flow { transport: Some("kernel"), ..Flow::clone(&self.row.flow()) });
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
        self.row.set(Flow {
            verdict: Some(ruling.word()),
            policy: ruling.policy.as_ref().map(|policy| policy.to_string().into()),
            rule: ruling.rule.clone(),
            ..Flow::clone(&self.row.flow())
        });
    }

    pub(super) fn fail(&self, failure: &Failure) {
        if let Failure::Denied(ruling) | Failure::Cut(Cut::Denied(ruling)) = failure {
            self.ruled(ruling);
        } else if failure.flag() == ResponseFlag::Deny {
            // The other node refused it, and its log names the rule.
            self.row.set(Flow { verdict: Some("deny"), policy: None, rule: None, ..Flow::clone(&self.row.flow()) });
        }
        self.connection.fail_because(failure.flag(), failure.reason(), failure);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        access_log::finished(&self.row.flow(), &self.connection, &self.node);
    }
}

impl Edge<'_> {
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
        principal: workload.identity.as_str().into(),
    }
}
