//! The client's pool of QUIC connections.

use super::flow::{DatagramFlow, Flows, Registration, Sink};
use super::halves::{QuicRecv, QuicSend};
use super::pooled::{Connections, Pooled, peer_end};
use super::socket::Together;
use super::{CLOSED, OPENED, QUIC, enlarge, transport};
use crate::identity::{Identities, PeerRefusal, server_name};
use crate::model::{SpiffeId, WorkloadUid};
use crate::runtime::{Level, Room};
use crate::telemetry::tunnel::{LaneGauge, TunnelBytes, TunnelMetrics};
use crate::tunnel::lane::{EXPIRED, SHARED, client_config};
use crate::tunnel::lanes::copy;
use crate::tunnel::lifetime::Lifetime;
use crate::tunnel::stream::{RecvKind, SendKind};
use crate::tunnel::{
    Config, LaneStatus, OpenError, Peer, RecvHalf, Refusal, SendHalf, Stream, StreamHeader, TlsSession, Transport,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint, EndpointConfig, RecvStream, SendStream, TransportConfig, VarInt};
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// The transport; a cheap handle.
#[derive(Clone, Debug)]
pub struct Quic(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    config: Arc<Config>,
    transport: Arc<TransportConfig>,
    identities: Identities,
    metrics: Arc<TunnelMetrics>,
    /// One socket per address family, made when first needed.
    endpoints: Mutex<[Option<Endpoint>; 2]>,
    entries: Mutex<HashMap<Peer, Arc<Entry>>>,
    handshakes: Room,
    is_draining: AtomicBool,
    connection_ended: Notify,
}

#[derive(Debug)]
struct Entry {
    peer: Peer,
    connections: Mutex<Connections>,
    /// Held while dialling; keeps the last failure for those who waited.
    dialling: tokio::sync::Mutex<Option<OpenError>>,
    dials: AtomicU64,
    is_forgotten: AtomicBool,
}

impl Transport for Quic {
    async fn open(&self, peer: &Peer, header: StreamHeader) -> Result<Stream, OpenError> {
        let pool = &self.0;
        let header = header.encode().map_err(|_| OpenError::Bound("stream header bytes"))?;
        let opened = timeout(pool.config.open_timeout, pool.open(peer, &header)).await;
        let result = opened.unwrap_or(Err(OpenError::Timeout));
        match &result {
            Ok(_) => pool.metrics.stream_opened(QUIC, "outbound"),
            Err(error) => pool.metrics.stream_refused(QUIC, "outbound", error.reason()),
        }
        result
    }
}

impl Quic {
    pub(in crate::tunnel) fn new(config: Arc<Config>, identities: Identities, metrics: Arc<TunnelMetrics>) -> Self {
        Self(Arc::new(Pool {
            transport: transport(&config),
            handshakes: Room::new("tunnel_outbound_handshakes_quic", config.max_handshakes),
            config,
            identities,
            metrics,
            endpoints: Mutex::default(),
            entries: Mutex::default(),
            is_draining: AtomicBool::new(false),
            connection_ended: Notify::new(),
        }))
    }

    /// Opens a flow of datagrams; those of the other end go to `sink`.
    ///
    /// # Errors
    /// As [`Transport::open`].
    pub(in crate::tunnel) async fn open_flow(
        &self,
        peer: &Peer,
        header: &StreamHeader,
        sink: Sink,
    ) -> Result<DatagramFlow, OpenError> {
        let pool = &self.0;
        let header = header.encode().map_err(|_| OpenError::Bound("stream header bytes"))?;
        let opened = timeout(pool.config.open_timeout, pool.open_flow(peer, &header, sink)).await;
        let result = opened.unwrap_or(Err(OpenError::Timeout));
        match &result {
            Ok(_) => pool.metrics.stream_opened(QUIC, "outbound"),
            Err(error) => pool.metrics.stream_refused(QUIC, "outbound", error.reason()),
        }
        result
    }

    pub(in crate::tunnel) fn forget(&self, workload: &WorkloadUid) {
        self.forget_where(|peer| peer.workload == *workload);
    }

    pub(in crate::tunnel) fn forget_source(&self, source: &SpiffeId) {
        self.forget_where(|peer| peer.source == *source);
    }

    fn forget_where(&self, is_gone: impl Fn(&Peer) -> bool) {
        self.0.lock().retain(|peer, entry| {
            let is_kept = !is_gone(peer);
            if !is_kept {
                entry.is_forgotten.store(true, Ordering::Release);
                entry.close();
            }
            is_kept
        });
    }

    pub(in crate::tunnel) fn status(&self) -> Vec<LaneStatus> {
        let entries: Vec<_> = self.0.lock().values().cloned().collect();
        let pooled = entries.iter().flat_map(|entry| {
            let connections = entry.lock();
            let all = connections.all().map(|pooled| (entry.peer.clone(), pooled.clone()));
            all.collect::<Vec<_>>()
        });
        pooled
            .map(|(peer, pooled)| LaneStatus {
                peer,
                transport: QUIC,
                kind: SHARED,
                // The clone at hand is one more holder.
                streams: Arc::strong_count(&pooled.usage).saturating_sub(3).div_ceil(2),
                age: pooled.lifetime.opened.elapsed(),
                expires: pooled.lifetime.not_after,
                is_draining: pooled.is_retired() || self.0.is_draining.load(Ordering::Acquire),
                tls: TlsSession::default(),
            })
            .collect()
    }

    pub(in crate::tunnel) fn levels(&self) -> Vec<Level> {
        vec![self.0.handshakes.level()]
    }

    pub(in crate::tunnel) async fn drain(&self, deadline: Instant) {
        self.0.is_draining.store(true, Ordering::Release);
        loop {
            let ended = self.0.connection_ended.notified();
            if self.0.lock().is_empty() {
                return;
            }
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                break;
            }
        }
        self.0.lock().values().for_each(|entry| entry.close());
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, HashMap<Peer, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(self: &Arc<Self>, peer: &Peer, header: &[u8]) -> Result<Stream, OpenError> {
        let Opened { pooled, send, recv, .. } = self.establish(peer, header, None).await?;
        let send = SendHalf(SendKind::Quic(QuicSend::new(send, Arc::clone(&pooled.usage))));
        let recv = RecvHalf(RecvKind::Quic(QuicRecv::new(recv, Arc::clone(&pooled.usage))));
        Ok(Stream::new(send, recv, TlsSession::default()))
    }

    async fn open_flow(self: &Arc<Self>, peer: &Peer, header: &[u8], sink: Sink) -> Result<DatagramFlow, OpenError> {
        let Opened { pooled, send, recv, registration } = self.establish(peer, header, Some(&sink)).await?;
        let registration = registration.ok_or(OpenError::Closed)?;
        let halves = (QuicSend::new(send, Arc::clone(&pooled.usage)), QuicRecv::new(recv, Arc::clone(&pooled.usage)));
        Ok(DatagramFlow::new(pooled.connection, TunnelBytes::clone(&pooled.usage), halves, sink, registration))
    }

    /// Opens a stream, anew once if the pooled connection turned out to be dead. With a sink it is a flow, whose
    /// datagrams may come before the answer does.
    async fn establish(self: &Arc<Self>, peer: &Peer, header: &[u8], sink: Option<&Sink>) -> Result<Opened, OpenError> {
        let mut is_second = false;
        loop {
            if self.is_draining.load(Ordering::Acquire) {
                return Err(OpenError::Closed);
            }
            let entry = self.entry(peer);
            let result = self.connection(&entry).await;
            let (pooled, is_reused) = match result {
                Ok(connection) => connection,
                Err(error) => {
                    self.remove_if_unused(&entry);
                    return Err(error);
                }
            };
            match exchange(pooled, header, sink).await {
                Ok(opened) => return Ok(opened),
                Err(OpenError::Closed | OpenError::Handshake(_)) if is_reused && !is_second => is_second = true,
                Err(error) => return Err(error),
            }
        }
    }

    fn entry(&self, peer: &Peer) -> Arc<Entry> {
        let mut entries = self.lock();
        if let Some(entry) = entries.get(peer) {
            return Arc::clone(entry);
        }
        let entry = Arc::new(Entry {
            peer: peer.clone(),
            connections: Mutex::default(),
            dialling: tokio::sync::Mutex::new(None),
            dials: AtomicU64::new(0),
            is_forgotten: AtomicBool::new(false),
        });
        entries.insert(peer.clone(), Arc::clone(&entry));
        entry
    }

    /// The pooled connection, or a new one. Also says whether it was there before.
    async fn connection(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<(Pooled, bool), OpenError> {
        if let Some(pooled) = entry.usable() {
            return Ok((pooled, true));
        }
        let dials = entry.dials.load(Ordering::Acquire);
        let mut last_failure = entry.dialling.lock().await;
        if let Some(pooled) = entry.usable() {
            return Ok((pooled, true));
        }
        if entry.dials.load(Ordering::Acquire) != dials
            && let Some(error) = &*last_failure
        {
            // Someone dialled while this one waited; dialling again would only multiply the wait.
            return Err(copy(error));
        }
        let dialled = self.dial(entry).await;
        entry.dials.fetch_add(1, Ordering::AcqRel);
        *last_failure = dialled.as_ref().err().map(copy);
        Ok((dialled?, false))
    }

    async fn dial(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Pooled, OpenError> {
        let dial = async {
            let _place = self.handshakes.enter().await;
            timeout(self.config.connect_timeout, self.connect(&entry.peer)).await.unwrap_or(Err(OpenError::Timeout))
        };
        // Asked for before the handshake: a certificate that replaces it meanwhile ends later.
        let own_end = self.identities.expiry_of(&entry.peer.source);
        let dialled = dial.await.inspect_err(|error| {
            self.metrics.handshake_failed(QUIC, "client", error.reason());
        });
        let former = entry.lock().current.as_ref().map(|former| former.lifetime);
        let lifetime = dialled.as_ref().ok().map(|connection| Lifetime::new([own_end, peer_end(connection)]));
        if let Some(former) = former.filter(|former| Instant::now() >= former.renew) {
            let result = lifetime.map_or("failed", |new| former.renewed_by(&new));
            self.metrics.rehandshaked(QUIC, result);
        }
        let (connection, lifetime) = (dialled?, lifetime.ok_or(OpenError::Closed)?);
        let usage = Arc::new(self.metrics.bytes(QUIC, "outbound"));
        let flows = Arc::<Flows>::default();
        tokio::spawn(Arc::clone(&flows).dispatch(connection.clone(), TunnelBytes::clone(&usage)));
        let pooled = Pooled { connection, usage, lifetime, flows };
        entry.lock().replace(pooled.clone());
        if entry.is_forgotten.load(Ordering::Acquire) {
            entry.close();
            return Err(OpenError::Closed);
        }
        let gauge = self.metrics.lane_opened(QUIC, SHARED, "outbound");
        tokio::spawn(Arc::clone(self).watch(Arc::clone(entry), pooled.clone(), gauge));
        Ok(pooled)
    }

    async fn connect(&self, peer: &Peer) -> Result<Connection, OpenError> {
        let tls = client_config(&self.identities, peer)?;
        let crypto = QuicClientConfig::try_from(tls).map_err(|_| OpenError::Handshake(PeerRefusal::Protocol))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let endpoint = self.endpoint(peer.address).map_err(OpenError::Dial)?;
        let connecting = endpoint
            .connect_with(config, peer.address, &server_name(&peer.destination).to_str())
            .map_err(|error| OpenError::Dial(io::Error::other(error)))?;
        connecting.await.map_err(|error| lost(&error).unwrap_or_else(|| OpenError::Dial(error.into())))
    }

    fn endpoint(&self, peer: SocketAddr) -> io::Result<Endpoint> {
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut endpoints[usize::from(peer.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let any: SocketAddr =
            if peer.is_ipv6() { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() };
        let socket = std::net::UdpSocket::bind(any)?;
        enlarge(&socket);
        let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(Together))?;
        *slot = Some(endpoint.clone());
        Ok(endpoint)
    }

    /// Closes the connection when it has been without streams for long, or with streams until its certificates and the
    /// grace after them have ended, and forgets it when it has ended.
    async fn watch(self: Arc<Self>, entry: Arc<Entry>, pooled: Pooled, gauge: LaneGauge) {
        let mut ticker = tokio::time::interval(self.config.tick());
        let mut idle_since = Instant::now();
        let limit = pooled.lifetime.end + self.config.quic_grace;
        let reason = loop {
            tokio::select! {
                error = pooled.connection.closed() => break closed_reason(&error),
                () = tokio::time::sleep_until(limit) => {
                    pooled.connection.close(CLOSED, EXPIRED.as_bytes());
                    break EXPIRED;
                }
                _ = ticker.tick() => {}
            }
            let now = Instant::now();
            if pooled.streams() > 0 {
                idle_since = now;
            } else if self.is_draining.load(Ordering::Acquire) || pooled.is_retired() {
                pooled.connection.close(CLOSED, b"drained");
            } else if now.duration_since(idle_since) >= self.config.idle_timeout {
                pooled.connection.close(CLOSED, b"idle");
            }
        };
        drop(gauge);
        self.metrics.lane_closed(QUIC, "outbound", reason);
        entry.remove(&pooled.connection);
        self.remove_if_unused(&entry);
        self.connection_ended.notify_waiters();
    }

    fn remove_if_unused(&self, entry: &Arc<Entry>) {
        let mut entries = self.lock();
        // Whoever is about to dial for this entry holds it: the map and the caller do, and nobody else may.
        if entry.lock().all().next().is_none()
            && Arc::strong_count(entry) <= 2
            && entries.get(&entry.peer).is_some_and(|known| Arc::ptr_eq(known, entry))
        {
            entries.remove(&entry.peer);
        }
    }
}

impl Entry {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usable(&self) -> Option<Pooled> {
        let current = self.lock().current.clone();
        current.filter(|pooled| pooled.connection.close_reason().is_none() && !pooled.is_retired())
    }

    fn close(&self) {
        self.lock().all().for_each(|pooled| pooled.connection.close(CLOSED, b"forgotten"));
    }

    fn remove(&self, connection: &Connection) {
        let mut connections = self.lock();
        connections.current.take_if(|known| known.is(connection));
        connections.retired.retain(|known| !known.is(connection));
    }
}

/// A stream that the other end has opened.
struct Opened {
    pooled: Pooled,
    send: SendStream,
    recv: RecvStream,
    registration: Option<Registration>,
}

/// Sends the header and waits for the answer.
async fn exchange(pooled: Pooled, header: &[u8], sink: Option<&Sink>) -> Result<Opened, OpenError> {
    let gone = |error: &ConnectionError| lost(error).unwrap_or(OpenError::Closed);
    let (send, mut recv) = pooled.connection.open_bi().await.map_err(|error| gone(&error))?;
    let registration = sink.map(|sink| pooled.flows.register(&send, Arc::clone(sink)));
    let mut send = Unfinished(Some(send));
    let length = u16::try_from(header.len()).map_err(|_| OpenError::Bound("stream header bytes"))?;
    let message = [&length.to_be_bytes()[..], header].concat();
    let closed = || pooled.connection.close_reason().map_or(OpenError::Closed, |error| gone(&error));
    let stream = send.0.as_mut().ok_or(OpenError::Closed)?;
    stream.write_all(&message).await.map_err(|_| closed())?;
    let mut answer = [0];
    recv.read_exact(&mut answer).await.map_err(|_| closed())?;
    match answer[0] {
        OPENED => {
            let send = send.0.take().ok_or(OpenError::Closed)?;
            Ok(Opened { pooled, send, recv, registration })
        }
        code => Err(OpenError::Refused(Refusal::from_code(code))),
    }
}

/// A stream without an answer: reset, not finished, when given up.
struct Unfinished(Option<SendStream>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            // Fails only if the stream has ended.
            let _ = stream.reset(VarInt::from_u32(0));
        }
    }
}

/// The refusal of either side's TLS in a connection's end, if that is what it was.
fn lost(error: &ConnectionError) -> Option<OpenError> {
    let timed_out = matches!(error, ConnectionError::TimedOut).then_some(OpenError::Timeout);
    refusal(error).map(OpenError::Handshake).or(timed_out)
}

/// TLS alerts are QUIC transport errors 0x100 + alert.
pub(super) fn refusal(error: &ConnectionError) -> Option<PeerRefusal> {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return None,
    };
    let alert = u8::try_from(u64::from(code).checked_sub(0x100)?).ok()?;
    Some(PeerRefusal::from(&rustls::Error::AlertReceived(rustls::AlertDescription::from(alert))))
}

pub(super) fn closed_reason(error: &ConnectionError) -> &'static str {
    if let Some(refusal) = refusal(error) {
        return refusal.reason();
    }
    match error {
        ConnectionError::LocallyClosed => "local",
        ConnectionError::ApplicationClosed(_) | ConnectionError::ConnectionClosed(_) => "peer_closed",
        ConnectionError::TimedOut => "silent",
        ConnectionError::TransportError(_) | ConnectionError::VersionMismatch => "protocol",
        ConnectionError::Reset => "io",
        ConnectionError::CidsExhausted => "bound",
    }
}
