//! QUIC's socket: several of a connection's transmissions leave as one ([ADR 0012](../../../../docs/adr/0012-quic-socket.md)).
//!
//! quinn hands over ten packets at most at a time, and the kernel takes up to sixty-four: what it does for each call, and for
//! each piece on its way (routing, bridging, queues, the receiver's wake-up), it does once for all of them then.

use super::LARGEST_PACKET;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// What a UDP datagram holds, with its head.
const DATAGRAM: usize = 65_535;
/// The same less the largest head: packets of one call travel as one until the last moment.
const MOST_BYTES: usize = DATAGRAM - 128;
/// Datagrams read by one call. quinn has buffers for thirty-two: read one after the other, they do not fit the processor's
/// caches, and each call prepares them all.
const READ_AT_ONCE: usize = 4;

/// quinn's runtime for tokio, with this module's sockets.
#[derive(Debug)]
pub(super) struct Together;

impl Runtime for Together {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Arc::new(Socket(Arc::new(Inner { io: UdpSocket::from_std(socket)?, state, waiting: Mutex::default() }))))
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[derive(Debug)]
struct Socket(Arc<Inner>);

struct Inner {
    io: UdpSocket,
    state: UdpSocketState,
    waiting: Mutex<Waiting>,
}

/// Packets that more of the same kind may follow.
#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    way: Option<Way>,
    /// Somebody will send them.
    is_promised: bool,
}

/// What packets of one call share.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Way {
    destination: SocketAddr,
    ecn: Option<quinn::udp::EcnCodepoint>,
    source: Option<IpAddr>,
    segment: usize,
}

impl Way {
    /// Of a transmission of several packets. A single one is not waited with, and may be a probe that is lost on purpose.
    fn of(transmit: &Transmit<'_>) -> Option<Self> {
        let segment = transmit.segment_size?;
        Some(Self { destination: transmit.destination, ecn: transmit.ecn, source: transmit.src_ip, segment })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Every critical section here leaves it whole.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_now(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), transmit))
    }

    /// Sends what waits, all of it or, where the socket takes no more, a part.
    fn flush(&self, waiting: &mut Waiting) -> io::Result<()> {
        let Some(way) = waiting.way else { return Ok(()) };
        while !waiting.bytes.is_empty() {
            let length = waiting.bytes.len().min(self.room(way.segment));
            self.send_now(&Transmit {
                destination: way.destination,
                ecn: way.ecn,
                contents: &waiting.bytes[..length],
                segment_size: Some(way.segment),
                src_ip: way.source,
            })?;
            waiting.bytes.drain(..length);
        }
        waiting.way = None;
        Ok(())
    }

    /// What one call takes of packets of this size: ten large ones may be more.
    fn room(&self, segment: usize) -> usize {
        self.state.max_gso_segments().min(MOST_BYTES / segment).max(1) * segment
    }

    /// Sends what waits after those who may have more of it had their turns.
    async fn keep_promise(self: Arc<Self>) {
        after_others().await;
        loop {
            {
                let mut waiting = self.lock();
                if self.flush(&mut waiting).is_ok() {
                    *waiting = Waiting::default();
                    return;
                }
            }
            if self.io.writable().await.is_err() {
                // The runtime ends.
                return;
            }
        }
    }
}

/// Lets those go first that are ready to run.
async fn after_others() {
    let mut were_let = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut were_let, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: Arc::clone(&self.0), waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let inner = &self.0;
        let mut waiting = inner.lock();
        let Some(way) = Way::of(transmit) else {
            inner.flush(&mut waiting)?;
            return inner.send_now(transmit);
        };
        if waiting.way.is_some_and(|known| known != way)
            || !waiting.bytes.len().is_multiple_of(way.segment)
            || waiting.bytes.len() + transmit.contents.len() > inner.room(way.segment)
        {
            inner.flush(&mut waiting)?;
        }
        waiting.way = Some(way);
        if waiting.bytes.capacity() == 0 {
            waiting.bytes.reserve_exact(inner.room(way.segment));
        }
        waiting.bytes.extend_from_slice(transmit.contents);
        // Nothing may follow a packet that is not full: where one ends would not be known.
        let is_last = !transmit.contents.len().is_multiple_of(way.segment)
            || waiting.bytes.len() + transmit.contents.len() > inner.room(way.segment);
        if is_last && inner.flush(&mut waiting).is_ok() {
            return Ok(());
        }
        if !std::mem::replace(&mut waiting.is_promised, true) {
            tokio::spawn(Arc::clone(inner).keep_promise());
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let Inner { io, state, .. } = &*self.0;
        let asked = buffers.len().min(READ_AT_ONCE);
        loop {
            ready!(io.poll_recv_ready(cx))?;
            if let Ok(count) = io.try_io(Interest::READABLE, || state.recv(io.into(), &mut buffers[..asked], meta)) {
                return Poll::Ready(Ok(count));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.io.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.0.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        // quinn makes a buffer of as many of the largest packets, and the kernel joins none beyond a datagram.
        self.0.state.gro_segments().min(DATAGRAM.div_ceil(usize::from(LARGEST_PACKET)))
    }
}

/// Whether the socket takes more, for any number of connections.
struct Writable {
    socket: Arc<Inner>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { socket, waiting } = &mut *self;
        if waiting.is_none() && socket.io.try_io(Interest::WRITABLE, || Ok(())).is_ok() {
            return Poll::Ready(Ok(()));
        }
        let socket = Arc::clone(socket);
        let future = waiting.get_or_insert_with(|| Box::pin(async move { socket.io.writable().await }));
        let outcome = ready!(future.as_mut().poll(cx));
        *waiting = None;
        Poll::Ready(outcome)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("io", &self.io).finish_non_exhaustive()
    }
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writable")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const LIMIT: Duration = Duration::from_secs(30);

    struct Pair {
        near: Arc<dyn AsyncUdpSocket>,
        far: Arc<dyn AsyncUdpSocket>,
    }

    async fn writable(socket: &Arc<dyn AsyncUdpSocket>) {
        let mut poller = Arc::clone(socket).create_io_poller();
        tokio::time::timeout(LIMIT, poll_fn(|cx| poller.as_mut().poll_writable(cx))).await.unwrap().unwrap();
    }

    impl Pair {
        async fn new() -> Self {
            let [near, far] = [(); 2].map(|()| {
                let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                Together.wrap_udp_socket(socket).unwrap()
            });
            writable(&near).await;
            Self { near, far }
        }

        fn send(&self, contents: &[u8], segment_size: Option<usize>) {
            let destination = self.far.local_addr().unwrap();
            self.near.try_send(&Transmit { destination, ecn: None, contents, segment_size, src_ip: None }).unwrap();
        }

        /// What arrives as one, and the size of its pieces.
        async fn receive(&self) -> (Vec<u8>, usize) {
            let (mut bytes, mut meta) = (vec![0; 65_535], [RecvMeta::default()]);
            let received = poll_fn(|cx| self.far.poll_recv(cx, &mut [IoSliceMut::new(&mut bytes)], &mut meta));
            assert_eq!(tokio::time::timeout(LIMIT, received).await.unwrap().unwrap(), 1);
            bytes.truncate(meta[0].len);
            (bytes, meta[0].stride)
        }
    }

    #[tokio::test]
    async fn transmissions_of_one_kind_leave_as_one() {
        let pair = Pair::new().await;
        pair.send(&[1; 10_000], Some(1_000));
        pair.send(&[2; 9_500], Some(1_000));
        pair.send(&[3; 2_000], Some(1_000));
        // A packet that is not full ends what may be joined.
        assert_eq!(pair.receive().await, ([[1; 10_000].as_slice(), &[2; 9_500]].concat(), 1_000));
        assert_eq!(pair.receive().await, (vec![3; 2_000], 1_000));
    }

    #[tokio::test]
    async fn those_of_another_kind_leave_after_what_waits() {
        let pair = Pair::new().await;
        pair.send(&[1; 2_000], Some(1_000));
        pair.send(&[2; 1_800], Some(900));
        pair.send(&[3; 1_200], None);
        pair.send(&[4; 2_700], Some(900));
        assert_eq!(pair.receive().await, (vec![1; 2_000], 1_000));
        assert_eq!(pair.receive().await, (vec![2; 1_800], 900));
        assert_eq!(pair.receive().await, (vec![3; 1_200], 1_200));
        assert_eq!(pair.receive().await, (vec![4; 2_700], 900));
    }

    #[tokio::test]
    async fn no_more_leaves_at_once_than_the_kernel_takes() {
        let pair = Pair::new().await;
        let most = pair.near.max_transmit_segments();
        assert!(most >= 20, "segmentation is not to be had here: {most}");
        let (each, sends) = (10, most / 10 + 1);
        (0..sends).for_each(|_| pair.send(&vec![5; 100 * each], Some(100)));
        assert_eq!(pair.receive().await, (vec![5; 100 * each * (sends - 1)], 100));
        assert_eq!(pair.receive().await, (vec![5; 100 * each], 100));
    }

    #[tokio::test]
    async fn packets_of_a_large_path_leave_in_several_calls() {
        let pair = Pair::new().await;
        pair.send(&[6; 10 * 8_952], Some(8_952));
        assert_eq!(pair.receive().await, (vec![6; 7 * 8_952], 8_952));
        assert_eq!(pair.receive().await, (vec![6; 3 * 8_952], 8_952));
    }

    #[tokio::test]
    async fn nothing_follows_a_short_packet_that_the_socket_did_not_take() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let destination = socket.local_addr().unwrap();
        // Nobody has asked whether it is writable, so it is taken not to be.
        let socket = Together.wrap_udp_socket(socket).unwrap();
        let send = |contents: &[u8]| {
            socket.try_send(&Transmit { destination, ecn: None, contents, segment_size: Some(100), src_ip: None })
        };
        send(&[1; 200]).unwrap();
        send(&[2; 150]).unwrap();
        assert_eq!(send(&[3; 200]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[tokio::test]
    async fn what_has_waited_holds_no_memory() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (state, destination) = (UdpSocketState::new((&socket).into()).unwrap(), socket.local_addr().unwrap());
        let inner = Arc::new(Inner { io: socket, state, waiting: Mutex::default() });
        let send = Transmit { destination, ecn: None, contents: &[1; 200], segment_size: Some(100), src_ip: None };
        Socket(Arc::clone(&inner)).try_send(&send).unwrap();
        assert!(inner.lock().is_promised && inner.lock().bytes.capacity() > 0);
        let kept = async {
            while inner.lock().is_promised {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, kept).await.unwrap();
        assert_eq!(inner.lock().bytes.capacity(), 0);
    }
}
