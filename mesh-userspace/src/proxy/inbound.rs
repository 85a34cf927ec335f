//! Inbound: an authenticated stream is delivered to a workload of this node, from the client's own address.

use super::budget::Held;
use super::dial::Dialler;
use super::registry::{Live, Side, Ticket};
use super::relay::{Carried, Progress, relay, reset_on_close};
use super::report::Parties;
use super::session::{Edge, Session};
use super::verdict::{self, Caller};
use super::{Context, Datagrams, Failure, LocalWorkload};
use crate::engine::Snapshot;
use crate::model::{ObjectName, Protocol, Workload};
use crate::telemetry::connections::Reporter;
use crate::telemetry::policy::EnforcedBy;
use crate::tunnel::{Incoming, Refusal, Server};
use mesh_common::policy::Arrival;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The receiving side of the tunnel.
pub struct Inbound {
    pub context: Arc<Context>,
    pub dialler: Dialler,
    pub datagrams: Datagrams,
    /// Cancelled when the daemon drains: new streams are refused, so that their callers go elsewhere.
    pub draining: CancellationToken,
}

/// A stream whose ends are known and that has entered the registry; not decided about yet.
pub(super) struct Admitted {
    pub(super) local: Arc<LocalWorkload>,
    pub(super) source: Arc<Workload>,
    pub(super) ticket: Ticket,
    /// Read after it has entered.
    pub(super) snapshot: Arc<Snapshot>,
}

impl Inbound {
    /// Delivers streams until the server ends.
    pub async fn serve(self, mut server: Server) -> anyhow::Result<()> {
        let inbound = Arc::new(self);
        let (cores, mut serving) = (inbound.context.cores.clone(), JoinSet::new());
        for (core, mut streams) in server.incoming().into_iter().enumerate() {
            let inbound = inbound.clone();
            let serve = async move {
                while let Some(incoming) = streams.recv().await {
                    // Most of it is needed while the stream opens only.
                    let (inbound, incoming) = (inbound.clone(), Box::new(incoming));
                    let tracker = inbound.context.connections.clone();
                    tracker.spawn(async move { inbound.stream(incoming).await });
                }
            };
            serving.spawn_on(serve, cores.handle(core));
        }
        serving.join_next().await;
        anyhow::bail!("the tunnel's server ended")
    }

    async fn stream(&self, incoming: Box<Incoming>) {
        let admitted = match self.admit(&incoming) {
            Ok(admitted) => Box::new(admitted),
            Err(refusal) => {
                tracing::warn!(
                    reason = refusal.reason(), source = %incoming.source, claimed = %incoming.header.source,
                    destination = %incoming.header.destination, "refused a stream"
                );
                return incoming.refuse(refusal);
            }
        };
        match incoming.header.protocol {
            Protocol::Tcp => self.carry(incoming, admitted).await,
            // On the heap: most streams are not for it, and every byte of this future is in all of them.
            Protocol::Udp => Box::pin(self.carry_datagrams(*incoming, *admitted)).await,
        }
    }

    /// The stream must be for a workload of this node, under the identity that this node presented for it, from a
    /// source address whose workload has exactly the identity that the peer proved.
    fn admit(&self, incoming: &Incoming) -> Result<Admitted, Refusal> {
        if self.draining.is_cancelled() {
            return Err(Refusal::Draining);
        }
        let snapshot = self.context.snapshot.load_full();
        let admitted = self.recognise(incoming, &snapshot)?;
        let (source, destination) = (&incoming.header.source, &incoming.header.destination);
        let ticket = self.context.registry.enter(Live {
            side: Side::Destination,
            caller: admitted.1.clone(),
            source: source.ip(),
            destination: admitted.0.workload.clone(),
            port: destination.port(),
        });
        // What has changed before the connection was in the registry is seen here; what changes later, there.
        let latest = self.context.snapshot.load_full();
        let unchanged = Arc::ptr_eq(&latest, &snapshot);
        let (local, source) = if unchanged { admitted } else { self.recognise(incoming, &latest)? };
        Ok(Admitted { local, source, ticket, snapshot: latest })
    }

    fn recognise(
        &self,
        incoming: &Incoming,
        snapshot: &Snapshot,
    ) -> Result<(Arc<LocalWorkload>, Arc<Workload>), Refusal> {
        let local = self.context.locals.serving(snapshot, incoming.header.destination).ok_or(Refusal::NotFound)?;
        if local.workload.identity != incoming.destination {
            return Err(Refusal::IdentityMismatch);
        }
        // One that the catalog has just lost is still armed for a moment, and has no policies any more.
        local.known(snapshot).ok_or(Refusal::NotFound)?;
        let source = snapshot.workload_speaking(incoming.header.source.ip(), &incoming.source);
        Ok((local, source.ok_or(Refusal::IdentityMismatch)?.clone()))
    }

    async fn carry(&self, incoming: Box<Incoming>, admitted: Box<Admitted>) {
        let session = self.begin(&incoming, &admitted);
        let _held = match self.judge(&incoming, &admitted, &session) {
            Ok(held) => held,
            Err(failure) => {
                incoming.refuse(failure.refusal());
                return session.fail(&failure);
            }
        };
        // The snapshot is held no longer than the decision: a connection may last for days.
        let Admitted { local, mut ticket, .. } = *admitted;
        if let Err(failure) = self.deliver(incoming, &local, &session, &mut ticket).await {
            session.fail(&failure);
        }
    }

    /// Begins to count, list and log a stream.
    pub(super) fn begin(&self, incoming: &Incoming, admitted: &Admitted) -> Session {
        let (from, to) = (incoming.header.source, incoming.header.destination);
        let service = incoming.header.service.as_deref().and_then(service_name);
        let edge = Edge {
            protocol: incoming.header.protocol,
            reporter: Reporter::Destination,
            source: &admitted.source,
            destination: Some(admitted.local.current(&admitted.snapshot)),
            service: service.as_ref(),
        };
        let session = Session::begin(&self.context, &edge, from, to);
        session.routed(to, &self.context.node);
        session
    }

    /// Asks policy, and whether the endpoint passes its service's health check; returns what the stream takes of the node.
    pub(super) fn judge(&self, incoming: &Incoming, admitted: &Admitted, session: &Session) -> Result<Held, Failure> {
        let (from, to) = (incoming.header.source, incoming.header.destination);
        let Admitted { local, source, snapshot, .. } = admitted;
        let destination = local.current(snapshot);
        let caller = Caller { identity: Some(&incoming.source), address: from.ip() };
        let told = verdict::decide(snapshot, destination, to.port(), Arrival::Authenticated, caller);
        let parties =
            Parties { source: from, source_workload: Some(source), destination: to, workload: Some(destination) };
        self.context.reports.decided(&told, EnforcedBy::Destination, &parties);
        if told.is_denied() {
            return Err(Failure::Denied(told.ruling));
        }
        session.ruled(&told.ruling);
        let service = incoming.header.service.as_deref().and_then(service_name);
        if service.is_some_and(|service| self.context.health.is_unhealthy(&service, to)) {
            return Err(Failure::Refused(Refusal::Unhealthy));
        }
        self.context.budget.connection()
    }

    async fn deliver(
        &self,
        incoming: Box<Incoming>,
        local: &LocalWorkload,
        session: &Session,
        ticket: &mut Ticket,
    ) -> Result<(), Failure> {
        let (source, destination) = (incoming.header.source, incoming.header.destination);
        let timeout = self.context.connect_timeout;
        let dialled = tokio::select! {
            dialled = Box::pin(self.dialler.dial(local, source, destination, timeout)) => dialled,
            cut = ticket.cut() => Err(Failure::Cut(cut)),
        };
        let dialled = match dialled {
            Ok(dialled) => dialled,
            Err(failure) => {
                incoming.refuse(failure.refusal());
                return Err(failure);
            }
        };
        let delivering = Delivering { inbound: self, session, local, application: destination, own: dialled.own };
        let mut progress = Progress::default();
        let relayed = tokio::select! {
            relayed = {
                let stream = incoming.accept();
                session.carried_by(&stream);
                relay(&dialled.app, stream, &delivering, ticket, &mut progress, None)
            } => relayed,
            () = local.removed.cancelled() => Err(Failure::WorkloadRemoved),
        };
        if relayed.is_err() {
            reset_on_close(&dialled.app);
        }
        relayed
    }
}

/// What the relay tells, and asks about the application.
struct Delivering<'a> {
    inbound: &'a Inbound,
    session: &'a Session,
    local: &'a LocalWorkload,
    application: SocketAddr,
    /// This daemon's end.
    own: SocketAddr,
}

impl Carried for Delivering<'_> {
    fn passed_to_tunnel(&self, bytes: u64) {
        self.session.passed_to_tunnel(bytes);
    }

    fn passed_from_tunnel(&self, bytes: u64) {
        self.session.passed_from_tunnel(bytes);
    }

    async fn is_application_gone(&self) -> bool {
        self.inbound.dialler.is_deserted(self.local, self.application, self.own).await
    }
}

/// A service's name as it travels in the stream header: `namespace/name`. One that does not parse is only a missing
/// metric label.
fn service_name(text: &str) -> Option<ObjectName> {
    let (namespace, name) = text.split_once('/')?;
    ObjectName::parse(namespace, name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_takes_little_memory() {
        fn size<A, B, R>(_: impl FnOnce(A, B) -> R) -> usize {
            size_of::<R>()
        }
        assert!(size(Inbound::stream) <= 1152, "{}", size(Inbound::stream));
    }
}
