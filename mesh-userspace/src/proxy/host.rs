//! Outbound of workloads in the node's own namespace: one listener for all of them, and the kernel's word for whose a
//! connection is.

use super::outbound::{accept_until, original_destination};
use super::relay::reset_on_close;
use super::{Context, Failure, Outbound};
use crate::datapath::Tuples;
use crate::telemetry::connections::{EdgeKey, Party, Protocol, Reporter, Security, ServiceLabels};
use mesh_common::flow::OriginalDestination;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// The accepting side of the listeners on the node's addresses.
#[derive(Clone)]
pub struct HostOutbound {
    pub context: Arc<Context>,
    /// Of the node's own namespace.
    pub netns_cookie: u64,
    pub tuples: Tuples,
}

impl HostOutbound {
    /// Accepts until it is stopped.
    pub async fn serve(self, listener: TcpListener, stopped: CancellationToken) {
        let tracker = self.context.connections.clone();
        accept_until(&stopped, &listener, &self.context.accepts, |app, source| {
            let held = match self.context.budget.connection() {
                Ok(held) => held,
                Err(spent) => return self.shed(&app, source, &spent),
            };
            let outbound = self.clone();
            let source = SocketAddr::new(source.ip().to_canonical(), source.port());
            self.context.cores.serve(&tracker, app, |app, seat| async move {
                outbound.connection(&app, source).await;
                drop((held, seat));
            });
        })
        .await;
    }

    /// Resets a connection that there is no room for.
    fn shed(&self, app: &TcpStream, source: SocketAddr, spent: &Failure) {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let record = original_destination(&self.tuples, self.netns_cookie, source).ok();
        let local = record.and_then(|record| Some((record, self.context.locals.of_cgroup(record.cgroup())?)));
        match local {
            Some((record, local)) => {
                let outbound = Outbound { context: self.context.clone(), local, tuples: self.tuples.clone() };
                outbound.calling().unrouted(source, Some(record.endpoint().into()), spent);
            }
            None => self.unattributed(spent),
        }
        reset_on_close(app);
    }

    async fn connection(&self, app: &TcpStream, source: SocketAddr) {
        if self.carry(app, source).await.is_err() {
            reset_on_close(app);
        }
    }

    async fn carry(&self, app: &TcpStream, source: SocketAddr) -> Result<(), Failure> {
        let (outbound, record) = self.attribute(source).inspect_err(|failure| self.unattributed(failure))?;
        outbound.carry(outbound.begin(app, source, &record)?).await
    }

    /// The workload whose connection it is, and the kernel's record.
    fn attribute(&self, source: SocketAddr) -> Result<(Outbound, OriginalDestination), Failure> {
        let record = original_destination(&self.tuples, self.netns_cookie, source)?;
        let local = self.context.locals.of_cgroup(record.cgroup()).ok_or(Failure::UnknownCaller)?;
        Ok((Outbound { context: self.context.clone(), local, tuples: self.tuples.clone() }, record))
    }

    /// A connection that is nobody's is counted nevertheless.
    fn unattributed(&self, failure: &Failure) {
        let edge = EdgeKey {
            reporter: Reporter::Source,
            source: Party::unknown(),
            destination: Party::unknown(),
            service: ServiceLabels::unknown(),
            protocol: Protocol::Tcp,
            security: Security::None,
        };
        let connection = self.context.metrics.edge(edge).opened();
        connection.fail_because(failure.flag(), failure.reason(), failure);
        tracing::warn!(reason = failure.reason(), "reset a connection to the node's listener");
    }
}
