//! Inbound: an authenticated stream is delivered to a workload of this node, from the client's own address.

use super::relay::{relay, reset_on_close};
use super::session::{Edge, Session};
use super::{Context, Failure, LocalWorkload};
use crate::datapath::Bypass;
use crate::model::{ObjectName, Workload};
use crate::netns::Namespaces;
use crate::telemetry::connections::Reporter;
use crate::tunnel::{Incoming, Refusal, Server};
use mesh_common::service::BypassKey;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;

/// The receiving side of the tunnel.
pub struct Inbound {
    pub context: Arc<Context>,
    pub namespaces: Namespaces,
    pub bypass: Bypass,
    /// SO_MARK of sockets made inside workloads' namespaces.
    pub mark: u32,
    /// Cancelled when the daemon drains: new streams are refused, so that their callers go elsewhere.
    pub draining: CancellationToken,
}

impl Inbound {
    /// Delivers streams until the server ends.
    pub async fn serve(self, mut server: Server) -> anyhow::Result<()> {
        let inbound = Arc::new(self);
        while let Some(incoming) = server.accept().await {
            let inbound = inbound.clone();
            let tracker = inbound.context.connections.clone();
            tracker.spawn(async move { inbound.stream(incoming).await });
        }
        anyhow::bail!("the tunnel's server ended")
    }

    async fn stream(&self, incoming: Incoming) {
        let destination = incoming.header.destination;
        let (local, source) = match self.admit(&incoming) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                tracing::warn!(
                    reason = refusal.reason(), source = %incoming.source, claimed = %incoming.header.source,
                    %destination, "refused a stream"
                );
                return incoming.refuse(refusal);
            }
        };
        let service = incoming.header.service.as_deref().and_then(service_name);
        let session = {
            let snapshot = self.context.snapshot.load();
            let edge = Edge {
                reporter: Reporter::Destination,
                source: &source,
                destination: Some(local.current(&snapshot)),
                service: service.as_ref(),
            };
            Session::begin(&self.context, &edge, incoming.header.source, destination)
        };
        session.routed(destination, self.context.node.as_str());
        if let Err(failure) = self.deliver(incoming, &local, &session).await {
            session.fail(&failure);
        }
    }

    /// The stream must be for a workload of this node, under the identity that this node presented for it, from a
    /// source address whose workload has exactly the identity that the peer proved.
    fn admit(&self, incoming: &Incoming) -> Result<(Arc<LocalWorkload>, Arc<Workload>), Refusal> {
        if self.draining.is_cancelled() {
            return Err(Refusal::Draining);
        }
        let local = self.context.locals.at(incoming.header.destination.ip()).ok_or(Refusal::NotFound)?;
        if local.workload.identity != incoming.destination {
            return Err(Refusal::IdentityMismatch);
        }
        let snapshot = self.context.snapshot.load();
        let source = snapshot.workload_at(incoming.header.source.ip()).ok_or(Refusal::IdentityMismatch)?;
        if source.identity != incoming.source {
            return Err(Refusal::IdentityMismatch);
        }
        Ok((local, source.clone()))
    }

    async fn deliver(&self, incoming: Incoming, local: &LocalWorkload, session: &Session) -> Result<(), Failure> {
        let (source, destination) = (incoming.header.source, incoming.header.destination);
        let app = match self.dial(local, source, destination).await {
            Ok(app) => app,
            Err(failure) => {
                incoming.refuse(failure.refusal());
                return Err(failure);
            }
        };
        let stream = incoming.accept();
        session.carried_by(&stream);
        let relayed = tokio::select! {
            relayed = relay(&app, stream, session) => relayed,
            () = local.removed.cancelled() => Err(Failure::WorkloadRemoved),
        };
        if relayed.is_err() {
            reset_on_close(&app);
        }
        relayed
    }

    /// Connects to the application from inside its namespace with the client's address.
    async fn dial(
        &self,
        local: &LocalWorkload,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Result<TcpStream, Failure> {
        let from = SocketAddr::new(source.ip(), 0);
        let dialled = self.namespaces.dial_socket(&local.namespace, from, self.mark).await;
        let socket = dialled.map_err(Failure::Application)?;
        let bound = socket.local_addr().map_err(Failure::Application)?.as_socket().map_or(0, |address| address.port());
        let pass = BypassKey::new(from.ip().into(), destination.ip().into(), bound.to_be(), destination.port().to_be());
        // sk_lookup runs once, on the SYN: the pass is needed until connect() has answered and no longer.
        let _pass = self.bypass.admit(pass).map_err(Failure::Application)?;
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(destination);
        let app = tokio::time::timeout(self.context.connect_timeout, connecting)
            .await
            .map_err(|_| Failure::ApplicationTimeout)?
            .map_err(Failure::Application)?;
        app.set_nodelay(true).map_err(Failure::Application)?;
        Ok(app)
    }
}

/// A service's name as it travels in the stream header: `namespace/name`. One that does not parse is only a missing
/// metric label.
fn service_name(text: &str) -> Option<ObjectName> {
    let (namespace, name) = text.split_once('/')?;
    ObjectName::parse(namespace, name).ok()
}
