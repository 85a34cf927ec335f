//! The client's pool of QUIC connections. Each core has its own, and sockets of its own: what a stream's relay and its
//! connection share is locked by one thread only, and a peer is talked to by as many threads as there are.

use super::ending::{closed_reason, lost};
use super::flow::{DatagramFlow, Flows, Sink};
use super::halves::{QuicRecv, QuicSend, Usage};
use super::opening::{Opened, exchange};
use super::pooled::{Connections, Pooled, peer_end};
use super::{CLOSED, QUIC, endpoint, transport};
use crate::identity::{Identities, PeerRefusal, server_name};
use crate::model::{SpiffeId, WorkloadUid};
use crate::runtime::{Cores, Level, Room};
use crate::telemetry::tunnel::{LaneGauge, TunnelMetrics};
use crate::tunnel::lane::{EXPIRED, SHARED, client_config};
use crate::tunnel::lanes::copy;
use crate::tunnel::lifetime::Lifetime;
use crate::tunnel::stream::{RecvKind, SendKind};
use crate::tunnel::{
    Config, LaneStatus, OpenError, Peer, RecvHalf, SendHalf, Stream, StreamHeader, TlsSession, Transport,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, Endpoint, TransportConfig};
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
    cores: Cores,
    by_core: Box<[OfCore]>,
    handshakes: Room,
    is_draining: AtomicBool,
    connection_ended: Notify,
}

/// What one core has.
#[derive(Debug, Default)]
struct OfCore {
    /// One socket per address family, made when first needed.
    endpoints: Mutex<[Option<Endpoint>; 2]>,
    entries: Mutex<Entries>,
}

type Entries = HashMap<Peer, Arc<Entry>>;

/// The connections of one core to one peer.
#[derive(Debug)]
struct Entry {
    peer: Peer,
    core: usize,
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
    pub(in crate::tunnel) fn new(
        config: Arc<Config>,
        identities: Identities,
        metrics: Arc<TunnelMetrics>,
        cores: Cores,
    ) -> Self {
        Self(Arc::new(Pool {
            transport: transport(&config),
            handshakes: Room::new("tunnel_outbound_handshakes_quic", config.max_handshakes),
            config,
            identities,
            metrics,
            by_core: (0..cores.count()).map(|_| OfCore::default()).collect(),
            cores,
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
        for core in 0..self.0.cores.count() {
            self.0.lock(core).retain(|peer, entry| {
                let is_kept = !is_gone(peer);
                if !is_kept {
                    entry.is_forgotten.store(true, Ordering::Release);
                    entry.close();
                }
                is_kept
            });
        }
    }

    pub(in crate::tunnel) fn status(&self) -> Vec<LaneStatus> {
        let entries = self.0.entries();
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
                packet: Some(pooled.connection.stats().path.current_mtu),
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
            if self.0.entries().is_empty() {
                return;
            }
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                break;
            }
        }
        self.0.entries().iter().for_each(|entry| entry.close());
    }
}

impl Pool {
    fn lock(&self, core: usize) -> MutexGuard<'_, Entries> {
        self.by_core[core].entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        (0..self.cores.count()).flat_map(|core| self.lock(core).values().cloned().collect::<Vec<_>>()).collect()
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
        Ok(DatagramFlow::new(pooled.connection, pooled.usage.bytes.clone(), halves, sink, registration))
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
        let core = self.cores.here();
        let mut entries = self.lock(core);
        if let Some(entry) = entries.get(peer) {
            return Arc::clone(entry);
        }
        let entry = Arc::new(Entry {
            peer: peer.clone(),
            core,
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
            timeout(self.config.connect_timeout, self.connect(entry)).await.unwrap_or(Err(OpenError::Timeout))
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
        let usage = Arc::new(Usage::new(self.metrics.bytes(QUIC, "outbound")));
        let flows = Arc::<Flows>::default();
        tokio::spawn(Arc::clone(&flows).dispatch(connection.clone(), usage.bytes.clone()));
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

    async fn connect(&self, Entry { peer, core, .. }: &Entry) -> Result<Connection, OpenError> {
        let tls = client_config(&self.identities, peer)?;
        let crypto = QuicClientConfig::try_from(tls).map_err(|_| OpenError::Handshake(PeerRefusal::Protocol))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.transport));
        let connecting = {
            // quinn starts a connection's task, and an endpoint's, where it is told of them.
            let _there = self.cores.handle(*core).enter();
            let endpoint = self.endpoint(*core, peer.address).map_err(OpenError::Dial)?;
            let name = server_name(&peer.destination);
            endpoint
                .connect_with(config, peer.address, &name.to_str())
                .map_err(|error| OpenError::Dial(io::Error::other(error)))?
        };
        connecting.await.map_err(|error| lost(&error).unwrap_or_else(|| OpenError::Dial(error.into())))
    }

    /// Must be called inside the core's runtime.
    fn endpoint(&self, core: usize, peer: SocketAddr) -> io::Result<Endpoint> {
        let mut endpoints = self.by_core[core].endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut endpoints[usize::from(peer.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let any: SocketAddr =
            if peer.is_ipv6() { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() };
        let endpoint = endpoint(std::net::UdpSocket::bind(any)?)?;
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
        let mut entries = self.lock(entry.core);
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
