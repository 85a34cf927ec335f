//! Streams that are opened outside of any daemon: by someone who has a node's certificates and does what no daemon does.

use crate::catalog::NAMESPACE;
use crate::cluster::{Cluster, TRUST_DOMAIN};
use crate::daemon::TUNNEL_PORT;
use anyhow::Result;
use mesh_userspace::identity::Identities;
use mesh_userspace::model::{NodeName, SpiffeId, TransportChoice, TrustDomain, WorkloadUid};
use mesh_userspace::telemetry::tunnel::TunnelMetrics;
use mesh_userspace::tunnel::{Config, OpenError, Peer, Stream, StreamHeader, Tunnel};
use std::net::SocketAddr;
use std::sync::Arc;

/// Who opens a stream, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Stranger<'a> {
    /// The node whose certificates it has.
    pub certificates_of: &'a str,
    /// The service account it speaks as.
    pub account: &'a str,
    /// The node it speaks from.
    pub from: &'a str,
    /// The service account it asks for, the uid of that workload, and the node it runs on.
    pub to: (&'a str, &'a str, &'a str),
    pub transport: TransportChoice,
}

impl Cluster {
    /// Opens a stream with any header and has the outcome judged while the stream is open.
    ///
    /// # Errors
    /// If there are no such certificates, or the judge says so.
    pub fn open_as<T: Send>(
        &self,
        stranger: Stranger<'_>,
        source: SocketAddr,
        destination: SocketAddr,
        judge: impl FnOnce(Result<Stream, OpenError>) -> Result<T> + Send,
    ) -> Result<T> {
        let (account, uid, node) = stranger.to;
        let peer = Peer {
            source: self.identity(stranger.account)?,
            destination: self.identity(account)?,
            workload: WorkloadUid::new(uid),
            node: NodeName::parse(node)?,
            address: SocketAddr::from((self.world.node(node).v4(), TUNNEL_PORT)),
        };
        let header = StreamHeader { destination, service: None, source, traceparent: None };
        let folder = self.identities(stranger.certificates_of);
        let identities = Identities::load(&folder, &TrustDomain::parse(TRUST_DOMAIN)?)?;
        self.world.node(stranger.from).namespace().enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let tunnel = Tunnel::new(Config::default(), identities, Arc::new(TunnelMetrics::default()));
                judge(tunnel.open(stranger.transport, &peer, header).await)
            })
        })?
    }

    /// The identity of a service account of [`NAMESPACE`].
    ///
    /// # Errors
    /// If the name is none.
    pub fn identity(&self, account: &str) -> Result<SpiffeId> {
        Ok(SpiffeId::parse(&self.authority.spiffe_id(NAMESPACE, account))?)
    }
}
