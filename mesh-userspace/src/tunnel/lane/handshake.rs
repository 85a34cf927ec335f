//! From a TCP connection to a lane.

use super::{Facts, Lane, Tls};
use crate::identity::{Identities, IdentityError, PeerRefusal, expiry, peer_identity, server_name};
use crate::model::SpiffeId;
use crate::telemetry::tunnel::TunnelMetrics;
use crate::tunnel::codec::{LANE_TOKEN, LaneToken};
use crate::tunnel::congestion::Congestion;
use crate::tunnel::lifetime::Lifetime;
use crate::tunnel::machine::Side;
use crate::tunnel::{Config, OpenError, Peer, TlsSession};
use rustls::server::Acceptor;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

/// Written but unsent bytes that the kernel takes: what waits longer waits here, where small messages can overtake
/// bulk.
const NOT_SENT: u32 = 256 * 1024;
/// Sets a lane apart from all others to its two ends: both derive it from the session's secrets.
const EXPORTER: &[u8] = b"EXPORTER-nodemesh-lane";

/// A lane's parts right after the handshake.
pub(in crate::tunnel) struct Established {
    pub(super) tls: Tls,
    pub(super) token: LaneToken,
    pub(super) session: TlsSession,
    pub(super) lifetime: Lifetime,
    socket: OwnedReadHalf,
}

impl Established {
    /// The lane and what its driver reads from.
    pub(in crate::tunnel) fn into_lane(
        self,
        side: Side,
        kind: &'static str,
        config: &Config,
        metrics: Arc<TunnelMetrics>,
    ) -> (Arc<Lane>, OwnedReadHalf) {
        let Self { tls, token, session, lifetime, socket } = self;
        let facts = Facts { token, session, lifetime };
        (Arc::new(Lane::new(tls, facts, side, kind, config, metrics)), socket)
    }

    /// `own_end`: when this side's certificate ends.
    fn new(
        connection: rustls::Connection,
        socket: TcpStream,
        own_end: Option<OffsetDateTime>,
    ) -> Result<Self, PeerRefusal> {
        // Of a resumed session these are the certificates of its first handshake: what the peer has proven.
        let lifetime = Lifetime::new([own_end, expiry(connection.peer_certificates().unwrap_or_default())]);
        if lifetime.is_over() {
            // Accepted within the second in which it ends.
            return Err(PeerRefusal::Expired);
        }
        let token = connection
            .export_keying_material([0; LANE_TOKEN], EXPORTER, None)
            .map_err(|error| PeerRefusal::from(&error))?;
        let session = TlsSession {
            group: connection
                .negotiated_key_exchange_group()
                .map(|group| format!("{:?}", group.name()))
                .unwrap_or_default(),
            suite: connection.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite())).unwrap_or_default(),
        };
        let (socket, write) = socket.into_split();
        Ok(Self { tls: Tls::new(connection, write), token, session, lifetime, socket })
    }
}

/// Dials the peer and proves both identities. The caller bounds the time.
pub(in crate::tunnel) async fn connect(
    identities: &Identities,
    peer: &Peer,
    congestion: Congestion,
) -> Result<Established, OpenError> {
    // Asked for before the handshake: a certificate that replaces it meanwhile ends later.
    let own_end = identities.expiry_of(&peer.source);
    let config = client_config(identities, peer)?;
    let socket = dial(peer.address, congestion).await.map_err(OpenError::Dial)?;
    let stream = TlsConnector::from(config)
        .connect(server_name(&peer.destination), socket)
        .await
        .map_err(|error| PeerRefusal::from_io(&error).map_or(OpenError::Dial(error), OpenError::Handshake))?;
    let (socket, connection) = stream.into_inner();
    Established::new(connection.into(), socket, own_end).map_err(OpenError::Handshake)
}

async fn dial(address: SocketAddr, congestion: Congestion) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let unsettled = congestion.prepare(&socket)?;
    let socket = socket.connect(address).await?;
    unsettled.settle(&socket)?;
    tune(&socket)?;
    Ok(socket)
}

/// The client's TLS configuration for a peer.
pub(in crate::tunnel) fn client_config(
    identities: &Identities,
    peer: &Peer,
) -> Result<Arc<rustls::ClientConfig>, OpenError> {
    identities.client_config(&peer.source, &peer.destination).map_err(|error: IdentityError| {
        tracing::warn!(%error, source = %peer.source, destination = %peer.destination, "no TLS configuration for a peer");
        OpenError::Handshake(PeerRefusal::NoCertificate)
    })
}

/// Why an accepted connection became no lane: a label.
pub(in crate::tunnel) type Failure = &'static str;

/// A lane's parts, the authenticated peer, and the identity that it asked for.
pub(in crate::tunnel) type Accepted = (Established, SpiffeId, SpiffeId);

/// Answers a TLS handshake within `limit`.
pub(in crate::tunnel) async fn accept(
    identities: &Identities,
    socket: TcpStream,
    limit: Duration,
) -> Result<Accepted, Failure> {
    tune(&socket).map_err(|_| "io")?;
    let stream = match tokio::time::timeout(limit, answer(identities, socket, limit)).await {
        Err(_) => return Err("timeout"),
        Ok(Err(error)) => {
            return Err(PeerRefusal::from_io(&error).map_or_else(|| io_reason(&error), PeerRefusal::reason));
        }
        Ok(Ok(stream)) => stream,
    };
    let (socket, connection) = stream.into_inner();
    let source = peer_identity(connection.peer_certificates().unwrap_or_default()).map_err(PeerRefusal::reason)?;
    let destination = connection
        .server_name()
        .and_then(|name| identities.identity_named(name))
        .ok_or(PeerRefusal::IdentityMismatch.reason())?;
    let own_end = identities.expiry_of(&destination);
    let established = Established::new(connection.into(), socket, own_end).map_err(PeerRefusal::reason)?;
    Ok((established, source, destination))
}

/// Answers with the certificate of the asked name, also if it is only about to come: the caller may know of a workload
/// before this node's authority has answered.
async fn answer(identities: &Identities, socket: TcpStream, limit: Duration) -> io::Result<TlsStream<TcpStream>> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), socket).await?;
    if let Some(name) = start.client_hello().server_name().map(str::to_owned) {
        // Without one, the handshake says so.
        let _has_certificate = identities.wait_for_name(&name, limit).await;
    }
    start.into_stream(identities.server_config()).await
}

fn io_reason(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "truncated",
        _ => "io",
    }
}

/// No application-level sign of life can pass while a reader sleeps, so the kernels keep watch on exclusive lanes.
fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let socket = SockRef::from(socket);
    socket.set_tcp_notsent_lowat(NOT_SENT)?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}
