//! The server's end of QUIC.

use super::ending::{closed_reason, refusal};
use super::flow::{DatagramFlow, Flows, Sink};
use super::halves::{QuicRecv, QuicSend, Usage, Use};
use super::pooled::peer_end;
use super::{CLOSED, OPENED, QUIC, code, endpoint, transport};
use crate::identity::{PeerRefusal, peer_identity};
use crate::model::SpiffeId;
use crate::runtime::{Place, Seat};
use crate::tunnel::codec::MAX_HEADER;
use crate::tunnel::lane::{EXPIRED, SHARED};
use crate::tunnel::lifetime::Lifetime;
use crate::tunnel::server::{Shared, identity_removed};
use crate::tunnel::stream::{RecvKind, SendKind};
use crate::tunnel::{Incoming, RecvHalf, Refusal, SendHalf, Stream, StreamHeader, TlsSession};
use bytes::Bytes;
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout};

/// A stream with its header read, waiting for the answer.
#[derive(Debug)]
pub(in crate::tunnel) struct QuicOffer {
    send: SendStream,
    recv: RecvStream,
    usage: Use,
    connection: Connection,
    flows: Arc<Flows>,
}

impl QuicOffer {
    pub(in crate::tunnel) fn accept(self, tls: TlsSession) -> Stream {
        let Self { mut send, recv, usage, .. } = self;
        // One byte always fits the first window; the future is ready at once, or the connection is gone and the halves
        // say so.
        answer(&mut send, OPENED);
        let send = SendHalf(SendKind::Quic(QuicSend::new(send, Arc::clone(&usage))));
        Stream::new(send, RecvHalf(RecvKind::Quic(QuicRecv::new(recv, usage))), tls)
    }

    pub(in crate::tunnel) fn accept_flow(self, sink: Sink) -> DatagramFlow {
        let Self { mut send, recv, usage, connection, flows } = self;
        // Before the answer, after which the caller sends.
        let registration = flows.register(&send, Arc::clone(&sink));
        answer(&mut send, OPENED);
        let bytes = usage.bytes.clone();
        let halves = (QuicSend::new(send, Arc::clone(&usage)), QuicRecv::new(recv, usage));
        DatagramFlow::new(connection, bytes, halves, sink, registration)
    }

    pub(in crate::tunnel) fn refuse(self, refusal: Refusal) {
        refuse(self.send, self.recv, refusal);
    }
}

fn answer(send: &mut SendStream, byte: u8) {
    let write = std::pin::pin!(send.write_chunk(Bytes::copy_from_slice(&[byte])));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let _ = write.poll(&mut cx);
}

fn refuse(mut send: SendStream, mut recv: RecvStream, refusal: Refusal) {
    answer(&mut send, code(refusal)[0]);
    // Both fail only if the stream has ended.
    let _ = send.finish();
    let _ = recv.stop(VarInt::from_u32(0));
}

/// Takes connections on `socket` until the server drains; packets are read on that core.
pub(in crate::tunnel) fn serve(shared: &Arc<Shared>, socket: std::net::UdpSocket, core: usize) -> io::Result<()> {
    let configs = Configs { transport: transport(&shared.config), made: None };
    // A thread that carries traffic: one that does not would wake one for every packet.
    let _there = shared.cores.handle(core).enter();
    let endpoint = endpoint(socket)?;
    tokio::spawn(accept_connections(Arc::clone(shared), endpoint, configs));
    Ok(())
}

/// QUIC's configuration for the TLS configuration of the moment.
struct Configs {
    transport: Arc<TransportConfig>,
    made: Option<(Arc<rustls::ServerConfig>, Arc<quinn::ServerConfig>)>,
}

impl Configs {
    fn for_tls(&mut self, tls: Arc<rustls::ServerConfig>) -> Result<Arc<quinn::ServerConfig>, PeerRefusal> {
        if let Some((known, config)) = &self.made
            && Arc::ptr_eq(known, &tls)
        {
            return Ok(Arc::clone(config));
        }
        let crypto = QuicServerConfig::try_from(Arc::clone(&tls)).map_err(|_| PeerRefusal::Protocol)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let config = Arc::new(config);
        self.made = Some((tls, Arc::clone(&config)));
        Ok(config)
    }
}

async fn accept_connections(shared: Arc<Shared>, endpoint: Endpoint, mut configs: Configs) {
    // An endpoint without a configuration refuses everything: the first one is set before the first packet is read.
    match configs.for_tls(shared.identities.server_config()) {
        Ok(config) => endpoint.set_server_config(Some((*config).clone())),
        Err(reason) => return tracing::error!(%reason, "QUIC cannot use the TLS configuration"),
    }
    loop {
        let incoming = tokio::select! {
            () = shared.draining.cancelled() => break,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { return };
        let Some((connection, handshake)) = shared.places() else {
            shared.metrics.handshake_failed(QUIC, "server", Refusal::Overloaded.reason());
            incoming.refuse();
            continue;
        };
        let accepted = configs
            .for_tls(shared.identities.server_config())
            .map_err(PeerRefusal::reason)
            .map(|config| (incoming, config));
        match accepted {
            Ok(accepted) => {
                let task_shared = Arc::clone(&shared);
                shared.cores.spawn(&shared.tasks, |seat| {
                    serve_connection(task_shared, accepted, handshake, (connection, seat))
                });
            }
            Err(reason) => shared.metrics.handshake_failed(QUIC, "server", reason),
        }
    }
    // Connections that exist go on until the server closes.
    endpoint.set_server_config(None);
    shared.closing.cancelled().await;
    endpoint.close(CLOSED, b"closed");
    // What was said last should still leave.
    let _ = timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
}

async fn serve_connection(
    shared: Arc<Shared>,
    (incoming, config): (quinn::Incoming, Arc<quinn::ServerConfig>),
    handshake: Place,
    _held: (Place, Seat),
) {
    let failed = |reason| shared.metrics.handshake_failed(QUIC, "server", reason);
    // Here, because quinn serves a connection where it was accepted.
    let connecting = match incoming.accept_with(config) {
        Ok(connecting) => connecting,
        Err(error) => return failed(closed_reason(&error)),
    };
    let connection = match timeout(shared.config.handshake_timeout, connecting).await {
        Err(_) => return failed("timeout"),
        Ok(Err(error)) => {
            return failed(refusal(&error).map_or_else(|| closed_reason(&error), PeerRefusal::reason));
        }
        Ok(Ok(connection)) => connection,
    };
    drop(handshake);
    let identities = match identities(&shared, &connection) {
        Ok(identities) => identities,
        Err(refusal) => {
            connection.close(CLOSED, refusal.reason().as_bytes());
            return failed(refusal.reason());
        }
    };
    let lifetime = Lifetime::new([peer_end(&connection), shared.identities.expiry_of(&identities.1)]);
    let gauge = shared.metrics.lane_opened(QUIC, SHARED, "inbound");
    let usage: Use = Arc::new(Usage::new(shared.metrics.bytes(QUIC, "inbound")));
    let flows = Arc::<Flows>::default();
    tokio::spawn(Arc::clone(&flows).dispatch(connection.clone(), usage.bytes.clone()));
    let limit = lifetime.end + shared.config.quic_grace;
    let error = loop {
        tokio::select! {
            () = sleep_until(limit) => {
                connection.close(CLOSED, EXPIRED.as_bytes());
                drop(gauge);
                return shared.metrics.lane_closed(QUIC, "inbound", EXPIRED);
            }
            () = identity_removed(&shared, &identities.1) => connection.close(CLOSED, b"forgotten"),
            () = drained(&shared, &usage) => connection.close(CLOSED, b"drained"),
            () = shared.closing.cancelled() => connection.close(CLOSED, b"closed"),
            stream = connection.accept_bi() => match stream {
                Ok((send, recv)) if Instant::now() >= lifetime.end => {
                    refuse(send, recv, Refusal::Draining);
                    continue;
                }
                Ok((send, recv)) => {
                    let offer = QuicOffer {
                        send, recv, usage: Arc::clone(&usage), connection: connection.clone(), flows: Arc::clone(&flows),
                    };
                    tokio::spawn(take(Arc::clone(&shared), identities.clone(), offer));
                    continue;
                }
                Err(error) => break error,
            },
        }
        break connection.closed().await;
    };
    drop(gauge);
    shared.metrics.lane_closed(QUIC, "inbound", closed_reason(&error));
}

/// Ready once the server drains and no stream is left.
async fn drained(shared: &Shared, usage: &Use) {
    shared.draining.cancelled().await;
    let mut ticker = tokio::time::interval(shared.config.tick());
    while Arc::strong_count(usage) > 1 {
        ticker.tick().await;
    }
}

/// The authenticated caller, and the local identity that it asked for.
fn identities(shared: &Shared, connection: &Connection) -> Result<(SpiffeId, SpiffeId), PeerRefusal> {
    let certificates = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or(PeerRefusal::NoCertificate)?;
    let source = peer_identity(&certificates)?;
    let destination = connection
        .handshake_data()
        .and_then(|handshake| handshake.downcast::<HandshakeData>().ok())
        .and_then(|handshake| shared.identities.identity_named(handshake.server_name.as_deref()?))
        .ok_or(PeerRefusal::IdentityMismatch)?;
    Ok((source, destination))
}

/// Reads a stream's header and offers the stream.
async fn take(shared: Arc<Shared>, identities: (SpiffeId, SpiffeId), mut offer: QuicOffer) {
    let malformed = |reason| shared.metrics.malformed_header(QUIC, reason);
    if shared.draining.is_cancelled() {
        return offer.refuse(Refusal::Draining);
    }
    match timeout(shared.config.header_timeout, read_header(&mut offer.recv)).await {
        Ok(Ok(header)) => {
            let node = offer.connection.remote_address();
            shared.offer(Incoming::quic(&shared, header, identities, node, offer));
        }
        Ok(Err(reason)) => {
            malformed(reason);
            offer.refuse(Refusal::BadHeader);
        }
        Err(_) => {
            malformed("slow_header");
            offer.refuse(Refusal::BadHeader);
        }
    }
}

async fn read_header(recv: &mut RecvStream) -> Result<StreamHeader, &'static str> {
    let mut length = [0; 2];
    recv.read_exact(&mut length).await.map_err(|_| "truncated")?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > MAX_HEADER {
        return Err("frame_length");
    }
    let mut header = vec![0; length];
    recv.read_exact(&mut header).await.map_err(|_| "truncated")?;
    StreamHeader::decode(&header).map_err(|_| Refusal::BadHeader.reason())
}
