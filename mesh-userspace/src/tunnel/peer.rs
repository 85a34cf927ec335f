//! Whom a stream goes to, and the front of all transports.

use super::lanes::Lanes;
use super::quic::Quic;
use super::{Config, DatagramFlow, OpenError, Sink, Stream, StreamHeader};
use crate::identity::Identities;
use crate::model::{NodeName, SpiffeId, TransportChoice, WorkloadUid};
use crate::runtime::{Cores, Descriptors, Level};
use crate::telemetry::tunnel::TunnelMetrics;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::time::Instant;

/// The two ends of a connection between nodes; the key of its pool. It dies with the destination workload's uid.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// Whose certificate is presented.
    pub source: SpiffeId,
    /// Who must answer.
    pub destination: SpiffeId,
    pub workload: WorkloadUid,
    pub node: NodeName,
    /// The node's tunnel address.
    pub address: SocketAddr,
}

/// What a TLS handshake settled on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSession {
    /// Key exchange group, such as `X25519MLKEM768`. Empty where the transport does not tell (QUIC).
    pub group: String,
    /// Cipher suite, such as `TLS13_AES_128_GCM_SHA256`. Empty where the transport does not tell (QUIC).
    pub suite: String,
}

/// One pooled connection, for people.
#[derive(Clone, Debug)]
pub struct LaneStatus {
    pub peer: Peer,
    /// `lanes` or `quic`.
    pub transport: &'static str,
    /// `shared` or `exclusive`.
    pub kind: &'static str,
    /// Streams it carries now.
    pub streams: usize,
    pub age: Duration,
    /// The first of the certificates of its handshake ends.
    pub expires: OffsetDateTime,
    /// Takes no new streams.
    pub is_draining: bool,
    pub tls: TlsSession,
    /// The largest payload of UDP that its path has been found to carry; `None` without UDP.
    pub packet: Option<u16>,
}

/// A way to carry streams to other nodes.
pub trait Transport {
    /// Opens one application connection, over a pooled connection if there is one.
    ///
    /// # Errors
    /// If the node, its identity or the application did not answer as they should; nothing was consumed.
    fn open(&self, peer: &Peer, header: StreamHeader) -> impl Future<Output = Result<Stream, OpenError>> + Send;
}

/// All transports, and their pools.
#[derive(Debug)]
pub struct Tunnel {
    lanes: Lanes,
    quic: Quic,
    identities: Identities,
    /// How long a stream waits for its source's certificate.
    patience: Duration,
}

impl Tunnel {
    /// Must be called inside a tokio runtime.
    #[must_use]
    pub fn new(
        config: Config,
        identities: Identities,
        metrics: Arc<TunnelMetrics>,
        descriptors: Descriptors,
        cores: Cores,
    ) -> Self {
        let config = Arc::new(config);
        let patience = config.connect_timeout;
        let lanes =
            Lanes::new(Arc::clone(&config), identities.clone(), Arc::clone(&metrics), descriptors, cores.clone());
        Self { lanes, quic: Quic::new(config, identities.clone(), metrics, cores), identities, patience }
    }

    /// Opens one application connection. `Auto` means lanes. A source that has just arrived is given time to get its
    /// certificate.
    ///
    /// # Errors
    /// As [`Transport::open`].
    pub async fn open(&self, choice: TransportChoice, peer: &Peer, header: StreamHeader) -> Result<Stream, OpenError> {
        self.wait_for_certificate(&peer.source).await;
        self.open_now(choice, peer, header).await
    }

    /// [`Self::open`] with a bound of its own on the time that the other side takes; what this node still has to get
    /// ready is not within it.
    ///
    /// # Errors
    /// As [`Transport::open`].
    pub async fn open_within(
        &self,
        bound: Duration,
        choice: TransportChoice,
        peer: &Peer,
        header: StreamHeader,
    ) -> Result<Stream, OpenError> {
        self.wait_for_certificate(&peer.source).await;
        tokio::time::timeout(bound, self.open_now(choice, peer, header)).await.unwrap_or(Err(OpenError::Timeout))
    }

    async fn open_now(&self, choice: TransportChoice, peer: &Peer, header: StreamHeader) -> Result<Stream, OpenError> {
        match choice {
            TransportChoice::Auto | TransportChoice::Lanes => self.lanes.open(peer, header).await,
            TransportChoice::Quic => self.quic.open(peer, header).await,
        }
    }

    /// Opens a flow of datagrams, which only QUIC carries; what the other end sends goes to `sink`. `bound` is as in
    /// [`Self::open_within`].
    ///
    /// # Errors
    /// As [`Transport::open`].
    pub async fn open_datagrams(
        &self,
        bound: Duration,
        peer: &Peer,
        header: &StreamHeader,
        sink: Sink,
    ) -> Result<DatagramFlow, OpenError> {
        self.wait_for_certificate(&peer.source).await;
        let opening = self.quic.open_flow(peer, header, sink);
        tokio::time::timeout(bound, opening).await.unwrap_or(Err(OpenError::Timeout))
    }

    async fn wait_for_certificate(&self, source: &SpiffeId) {
        // Without one, the transport says so.
        let _has_certificate = self.identities.wait_for(source, self.patience).await;
    }

    /// Closes every connection to the workload at once, with the streams on it.
    pub fn forget(&self, workload: &WorkloadUid) {
        self.lanes.forget(workload);
        self.quic.forget(workload);
    }

    /// Closes every connection that presents the identity at once, with the streams on it: it is no longer this node's.
    pub fn forget_source(&self, source: &SpiffeId) {
        self.lanes.forget_source(source);
        self.quic.forget_source(source);
    }

    /// The pooled connections of this moment.
    #[must_use]
    pub fn lanes(&self) -> Vec<LaneStatus> {
        let mut lanes = self.lanes.status();
        lanes.extend(self.quic.status());
        lanes
    }

    /// How full the bounds of the pools are.
    #[must_use]
    pub fn levels(&self) -> Vec<Level> {
        let mut levels = self.lanes.levels();
        levels.extend(self.quic.levels());
        levels
    }

    /// Takes no new streams, waits for those that exist, and closes everything at the deadline.
    pub async fn drain(&self, deadline: Instant) {
        tokio::join!(self.lanes.drain(deadline), self.quic.drain(deadline));
    }
}
