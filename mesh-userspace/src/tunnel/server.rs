//! The receiving end of all transports: takes connections of other nodes and hands out the streams they open.

use super::congestion::Unsettled;
use super::lane::{LANES, Lane, Offer, SHARED, accept};
use super::lanes::{BULK, RENEWAL};
use super::machine::Side;
use super::quic::{QuicOffer, serve};
use super::route::{Leg, Route};
use super::stream::{RecvKind, SendKind};
use super::{Config, DatagramFlow, RecvHalf, Refusal, SendHalf, Sink, Stream, StreamHeader, TlsSession};
use crate::identity::Identities;
use crate::model::SpiffeId;
use crate::runtime::{Acceptor, Cores, Descriptor, Descriptors, Level, Place, Room, Seat};
use crate::telemetry::bounds::AcceptFailures;
use crate::telemetry::tunnel::TunnelMetrics;
use crate::tunnel::codec::LaneToken;
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// Connections that the kernel keeps for an accept loop that is late.
const BACKLOG: i32 = 1024;
/// Why a connection is turned away that would need a descriptor when the budget is spent.
const DESCRIPTOR_LIMIT: &str = "descriptor_limit";

/// Takes streams of other nodes. Dropping it closes everything.
#[derive(Debug)]
pub struct Server {
    /// One for each core.
    incoming: Vec<mpsc::Receiver<Incoming>>,
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
    /// Ends the accept loops, and the lanes if they are still there.
    _closing: DropGuard,
}

/// What all tasks of a server have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) identities: Identities,
    pub(super) metrics: Arc<TunnelMetrics>,
    /// One for each core: a stream stays with the thread of its lane.
    incoming: Box<[mpsc::Sender<Incoming>]>,
    pub(super) cores: Cores,
    /// One place per connection, handshakes included.
    connections: Room,
    handshakes: Room,
    /// Streams that found no room in `incoming`.
    not_offered: Arc<AtomicU64>,
    descriptors: Descriptors,
    accepts: AcceptFailures,
    /// No new connections or streams.
    pub(super) draining: CancellationToken,
    pub(super) closing: CancellationToken,
    /// One task per connection.
    pub(super) tasks: TaskTracker,
    lanes: Mutex<HashMap<LaneToken, Known>>,
}

/// A lane that an ATTACH may name, and whose it is.
#[derive(Debug)]
struct Known {
    lane: Weak<Lane>,
    source: SpiffeId,
    destination: SpiffeId,
}

/// One application connection that another node wants to open. Dropping it refuses it.
#[derive(Debug)]
pub struct Incoming {
    pub header: StreamHeader,
    /// The caller's identity, authenticated.
    pub source: SpiffeId,
    /// The local identity that the caller asked for and was shown.
    pub destination: SpiffeId,
    /// `lanes` or `quic`.
    pub transport: &'static str,
    /// The calling node's end of the connection.
    pub node: SocketAddr,
    tls: TlsSession,
    offer: Option<Answerable>,
    metrics: Arc<TunnelMetrics>,
}

#[derive(Debug)]
enum Answerable {
    Lane(Leg, Arc<Shared>),
    Quic(QuicOffer),
}

impl Server {
    /// Listens for lanes (TCP) and QUIC (UDP) on every configured address. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If an address cannot be listened on.
    pub fn bind(
        config: Config,
        identities: Identities,
        metrics: Arc<TunnelMetrics>,
        descriptors: Descriptors,
        accepts: AcceptFailures,
        cores: Cores,
    ) -> io::Result<Self> {
        let share = config.max_pending.div_ceil(cores.count());
        let (senders, incoming): (Vec<_>, Vec<_>) = (0..cores.count()).map(|_| mpsc::channel(share)).unzip();
        let closing = CancellationToken::new();
        // Who has not proven anything yet can take the lanes' share of the descriptors at most.
        let handshakes = config.max_pending_handshakes.min(descriptors.lanes_share().max(1));
        let shared = Arc::new(Shared {
            identities,
            metrics,
            incoming: senders.into(),
            cores,
            connections: Room::new("tunnel_inbound_connections", config.max_server_lanes),
            handshakes: Room::new("tunnel_inbound_handshakes", handshakes),
            not_offered: Arc::default(),
            descriptors,
            accepts,
            draining: closing.child_token(),
            closing: closing.clone(),
            tasks: TaskTracker::new(),
            lanes: Mutex::default(),
            config,
        });
        let guard = closing.drop_guard();
        let mut addresses = Vec::new();
        for (index, &address) in shared.config.listen.iter().enumerate() {
            let (listener, socket) = bind_both(address)?;
            addresses.push(listener.local_addr()?);
            serve(&shared, socket, index % shared.cores.count())?;
            let unsettled = shared.config.congestion.prepare(&listener)?;
            tokio::spawn(accept_lanes(Arc::clone(&shared), listener, unsettled));
        }
        Ok(Self { incoming, addresses, shared, _closing: guard })
    }

    /// Where it listens: as configured, with port 0 replaced by the port taken.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How full the server's bounds are, now and whenever it is asked again.
    pub fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        let rooms = [self.shared.connections.clone(), self.shared.handshakes.clone()];
        // The queue ends with the server, whoever still asks.
        let queues: Vec<_> = self.shared.incoming.iter().map(mpsc::Sender::downgrade).collect();
        let not_offered = Arc::clone(&self.shared.not_offered);
        move || {
            let queues = queues.iter().filter_map(mpsc::WeakSender::upgrade);
            let (used, capacity) = queues.fold((0, 0), |(used, capacity), queue| {
                (used + queue.max_capacity() - queue.capacity(), capacity + queue.max_capacity())
            });
            let pending = (capacity > 0).then(|| Level {
                bound: "tunnel_pending_streams",
                used: used as u64,
                capacity: capacity as u64,
                hits: not_offered.load(Relaxed),
            });
            rooms.iter().map(Room::level).chain(pending).collect()
        }
    }

    /// Where the streams of each core arrive, once; nothing more comes out of one when the server is gone.
    pub fn incoming(&mut self) -> Vec<mpsc::Receiver<Incoming>> {
        std::mem::take(&mut self.incoming)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<LaneToken, Known>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places for a connection and its handshake, if there are any.
    pub(super) fn places(&self) -> Option<(Place, Place)> {
        Some((self.connections.try_enter()?, self.handshakes.try_enter()?))
    }

    /// Hands a stream to whoever accepts; refuses it if too many wait.
    pub(super) fn offer(&self, incoming: Incoming) {
        match self.incoming[self.cores.here()].try_send(incoming) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(incoming)) => {
                self.not_offered.fetch_add(1, Relaxed);
                incoming.refuse(Refusal::Overloaded);
            }
            Err(mpsc::error::TrySendError::Closed(incoming)) => incoming.refuse(Refusal::Draining),
        }
    }
}

impl Incoming {
    pub(super) fn quic(
        shared: &Shared,
        header: StreamHeader,
        identities: (SpiffeId, SpiffeId),
        node: SocketAddr,
        offer: QuicOffer,
    ) -> Self {
        let (source, destination) = identities;
        let offer = Some(Answerable::Quic(offer));
        let (tls, metrics) = (TlsSession::default(), Arc::clone(&shared.metrics));
        Self { header, source, destination, transport: super::quic::QUIC, node, tls, offer, metrics }
    }

    /// The connection's TLS session.
    #[must_use]
    pub fn tls(&self) -> &TlsSession {
        &self.tls
    }

    /// Tells the caller that the stream is open.
    #[must_use]
    pub fn accept(mut self) -> Stream {
        self.metrics.stream_opened(self.transport, "inbound");
        let tls = std::mem::take(&mut self.tls);
        match self.offer.take().expect("the offer is there until it is answered") {
            Answerable::Lane(leg, shared) => {
                // The halves come first: the caller may ask to move as soon as it has the answer.
                let (send, recv) = Route::halves(leg.clone(), &shared.config, None);
                leg.lane.accept(leg.id);
                Stream::new(SendHalf(SendKind::Lane(send)), RecvHalf(RecvKind::Lane(recv)), tls)
            }
            Answerable::Quic(offer) => offer.accept(tls),
        }
    }

    /// Tells the caller that the flow of datagrams is open; what it sends goes to `sink`. `None`: the transport carries
    /// no datagrams, and the caller is told that its header makes no sense.
    #[must_use]
    pub fn accept_datagrams(mut self, sink: Sink) -> Option<DatagramFlow> {
        match self.offer.take() {
            Some(Answerable::Quic(offer)) => {
                self.metrics.stream_opened(self.transport, "inbound");
                Some(offer.accept_flow(sink))
            }
            other => {
                self.offer = other;
                self.answer(Refusal::BadHeader);
                None
            }
        }
    }

    /// Tells the caller why not.
    pub fn refuse(mut self, refusal: Refusal) {
        self.answer(refusal);
    }

    fn answer(&mut self, refusal: Refusal) {
        let Some(offer) = self.offer.take() else { return };
        self.metrics.stream_refused(self.transport, "inbound", refusal.reason());
        match offer {
            Answerable::Lane(leg, _) => leg.lane.refuse(leg.id, refusal),
            Answerable::Quic(offer) => offer.refuse(refusal),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.answer(Refusal::Unreachable);
    }
}

/// TCP and UDP on one port. With port 0 the kernel picks TCP's, which may be taken for UDP: then it picks again.
fn bind_both(address: SocketAddr) -> io::Result<(TcpListener, std::net::UdpSocket)> {
    let mut tries = if address.port() == 0 { 16 } else { 1 };
    loop {
        let listener = listen(address)?;
        tries -= 1;
        match bind_udp(listener.local_addr()?) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries > 0 => {}
            bound => return Ok((listener, bound?)),
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A restarted daemon must not wait for its predecessor's connections to time out.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn bind_udp(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Ready once this node has no certificate of `destination` any more.
pub(super) async fn identity_removed(shared: &Shared, destination: &SpiffeId) {
    let mut changes = shared.identities.changes();
    while shared.identities.has(destination) {
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn accept_lanes(shared: Arc<Shared>, listener: TcpListener, unsettled: Unsettled) {
    let mut acceptor = Acceptor::new(|reason| shared.accepts.count("tunnel", reason));
    loop {
        let (socket, node) = tokio::select! {
            () = shared.draining.cancelled() => return,
            accepted = acceptor.next(|| listener.accept()) => accepted,
        };
        let Some(descriptor) = shared.descriptors.for_lane() else {
            shared.metrics.handshake_failed(LANES, "server", DESCRIPTOR_LIMIT);
            continue;
        };
        let Some((connection, handshake)) = shared.places() else {
            shared.metrics.handshake_failed(LANES, "server", Refusal::Overloaded.reason());
            continue;
        };
        if let Err(error) = unsettled.settle(&socket) {
            tracing::debug!(%node, %error, "cannot prepare a lane's connection");
            shared.metrics.handshake_failed(LANES, "server", "io");
            continue;
        }
        let task_shared = Arc::clone(&shared);
        shared.cores.serve(&shared.tasks, socket, |socket, seat| async move {
            let held = (descriptor, connection, seat);
            serve_lane(&task_shared, socket, node, handshake, held).await;
        });
    }
}

async fn serve_lane(
    shared: &Arc<Shared>,
    socket: TcpStream,
    node: SocketAddr,
    handshake: Place,
    _held: (Descriptor, Place, Seat),
) {
    let accepting = accept(&shared.identities, socket, shared.config.handshake_timeout);
    let accepted = tokio::select! {
        () = shared.draining.cancelled() => return,
        accepted = accepting => accepted,
    };
    drop(handshake);
    let (established, source, destination) = match accepted {
        Ok(accepted) => accepted,
        Err(reason) => {
            tracing::debug!(%node, reason, "a lane's handshake failed");
            return shared.metrics.handshake_failed(LANES, "server", reason);
        }
    };
    let (lane, socket) = established.into_lane(Side::Server, SHARED, &shared.config, Arc::clone(&shared.metrics));
    let known = Known { lane: Arc::downgrade(&lane), source: source.clone(), destination: destination.clone() };
    shared.lock().insert(lane.facts.token, known);
    if shared.draining.is_cancelled() {
        lane.go_away();
    }
    let on_offer = |lane: &Arc<Lane>, offer: Offer| take(shared, lane, node, (&source, &destination), offer);
    // A lane whose driver is dropped is closed.
    let socket = tokio::select! {
        () = shared.closing.cancelled() => None,
        () = identity_removed(shared, &destination) => None,
        socket = lane.drive(socket, &shared.config, on_offer) => Some(socket),
    };
    shared.lock().remove(&lane.facts.token);
    if let Some(socket) = socket {
        lane.linger(socket, &shared.config).await;
    }
}

/// What becomes of a stream that the peer opens.
fn take(shared: &Arc<Shared>, lane: &Arc<Lane>, node: SocketAddr, identities: (&SpiffeId, &SpiffeId), offer: Offer) {
    match offer {
        Offer::Open { id, header } => match StreamHeader::decode(&header) {
            Ok(header) => shared.offer(Incoming {
                header,
                source: identities.0.clone(),
                destination: identities.1.clone(),
                transport: LANES,
                node,
                tls: lane.facts.session.clone(),
                offer: Some(Answerable::Lane(Leg { lane: Arc::clone(lane), id }, Arc::clone(shared))),
                metrics: Arc::clone(&shared.metrics),
            }),
            Err(error) => {
                tracing::debug!(%node, %error, "a malformed stream header");
                shared.metrics.malformed_header(LANES, Refusal::BadHeader.reason());
                lane.refuse(id, Refusal::BadHeader);
            }
        },
        Offer::Attach { id, token, origin, is_alone } => {
            let next = Leg { lane: Arc::clone(lane), id };
            if attach(shared, next, is_alone, (token, origin), identities) {
                if is_alone {
                    lane.set_exclusive();
                }
                shared.metrics.stream_moved("inbound", if is_alone { BULK } else { RENEWAL });
            } else {
                lane.refuse(id, Refusal::NotFound);
            }
        }
    }
}

/// Continues a stream of another lane of the same two identities on `next`.
fn attach(
    shared: &Shared,
    next: Leg,
    is_alone: bool,
    (token, origin): (LaneToken, u32),
    identities: (&SpiffeId, &SpiffeId),
) -> bool {
    let base = shared.lock().get(&token).and_then(|known| {
        let is_same = (&known.source, &known.destination) == identities;
        if is_same { known.lane.upgrade() } else { None }
    });
    base.and_then(|base| Some((base.route(origin)?, base)))
        .is_some_and(|(route, base)| route.attach_from((&base, origin), next, is_alone, |leg| leg.lane.accept(leg.id)))
}
