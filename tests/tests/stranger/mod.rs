//! Streams that are opened outside of any daemon: by someone who has a node's certificates and does what no daemon does.

use anyhow::Result;
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::{Cluster, TRUST_DOMAIN};
use mesh_tests::daemon::TUNNEL_PORT;
use mesh_userspace::identity::Identities;
use mesh_userspace::model::{NodeName, SpiffeId, TransportChoice, TrustDomain, WorkloadUid};
use mesh_userspace::runtime::{Cores, Descriptors};
use mesh_userspace::telemetry::tunnel::TunnelMetrics;
use mesh_userspace::tunnel::{Config, OpenError, Peer, Stream, StreamHeader, Tunnel};
use std::net::SocketAddr;
use std::sync::Arc;

/// Who opens a stream, and where to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stranger<'a> {
    /// The node whose certificates it has.
    pub(crate) certificates_of: &'a str,
    /// The service account it speaks as.
    pub(crate) account: &'a str,
    /// The node it speaks from.
    pub(crate) from: &'a str,
    /// The service account it asks for, the uid of that workload, and the node it runs on.
    pub(crate) to: (&'a str, &'a str, &'a str),
    pub(crate) transport: TransportChoice,
}

impl Stranger<'_> {
    /// Opens a stream with any header and has the outcome judged while the stream is open.
    ///
    /// # Errors
    /// If there are no such certificates, or the judge says so.
    pub(crate) fn open<T: Send>(
        self,
        cluster: &Cluster,
        source: SocketAddr,
        destination: SocketAddr,
        judge: impl FnOnce(Result<Stream, OpenError>) -> Result<T> + Send,
    ) -> Result<T> {
        let (account, uid, node) = self.to;
        let peer = Peer {
            source: identity(cluster, self.account)?,
            destination: identity(cluster, account)?,
            workload: WorkloadUid::new(uid),
            node: NodeName::parse(node)?,
            address: SocketAddr::from((cluster.world.node(node).v4(), TUNNEL_PORT)),
        };
        let header = StreamHeader {
            protocol: mesh_userspace::model::Protocol::Tcp,
            destination,
            service: None,
            source,
            traceparent: None,
        };
        let folder = cluster.identities(self.certificates_of);
        let identities = Identities::load(&folder, &TrustDomain::parse(TRUST_DOMAIN)?)?;
        cluster.world.node(self.from).namespace().enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let metrics = Arc::new(TunnelMetrics::default());
                let tunnel =
                    Tunnel::new(Config::default(), identities, metrics, Descriptors::new(1_024), Cores::current());
                judge(tunnel.open(self.transport, &peer, header).await)
            })
        })?
    }
}

/// The identity of a service account of [`NAMESPACE`].
pub(crate) fn identity(cluster: &Cluster, account: &str) -> Result<SpiffeId> {
    Ok(SpiffeId::parse(&cluster.authority.spiffe_id(NAMESPACE, account))?)
}
