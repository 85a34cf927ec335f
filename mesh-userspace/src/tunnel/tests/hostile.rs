//! Peers that do not follow the protocol: each is turned away and counted, and the others notice nothing.

use super::world::{CART, SHOP, World, authority, header, id, identities, read_all, until, within};
use crate::identity::{Identities, server_name};
use crate::model::TransportChoice::Lanes;
use crate::tunnel::Config;
use crate::tunnel::codec::{Frame, HEAD};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

/// A TCP relay that can fail.
pub(super) struct Wire {
    pub(super) address: SocketAddr,
    is_cut: CancellationToken,
    broken: tokio::sync::watch::Sender<u32>,
    _task: tokio_util::sync::DropGuard,
}

impl Wire {
    pub(super) async fn to(far: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (is_cut, end) = (CancellationToken::new(), CancellationToken::new());
        let (broken, watch) = tokio::sync::watch::channel(0);
        let (cut, token) = (is_cut.clone(), end.clone());
        tokio::spawn(token.run_until_cancelled_owned(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (cut, mut watch) = (cut.clone(), watch.clone());
                watch.mark_unchanged();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(far).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = watch.changed() => {}
                        () = cut.cancelled() => {
                            // Both sides hold their connection, and nothing passes.
                            std::future::pending::<()>().await;
                        }
                    }
                });
            }
        }));
        Self { address, is_cut, broken, _task: end.drop_guard() }
    }

    pub(super) fn cut(&self) {
        self.is_cut.cancel();
    }

    pub(super) fn break_all(&self) {
        self.broken.send_modify(|turn| *turn += 1);
    }
}

struct Hostile {
    world: World,
    client: Identities,
}

impl Hostile {
    fn new(adjust: impl FnOnce(&mut Config)) -> Self {
        let authority = authority();
        let client = identities(&[&authority], &[CART], (-60, 3600));
        let server = identities(&[&authority], &[SHOP], (-60, 3600));
        Self { world: World::between(Lanes, client.clone(), server, adjust), client }
    }

    /// A lane without a machine.
    async fn lane(&self) -> TlsStream<TcpStream> {
        let config = self.client.client_config(&id(CART), &id(SHOP)).unwrap();
        let socket = TcpStream::connect(self.world.peer.address).await.unwrap();
        within(TlsConnector::from(config).connect(server_name(&id(SHOP)), socket)).await.unwrap()
    }

    /// Sends bytes on a lane of its own and waits until the server has closed it for `reason`.
    async fn is_turned_away(&self, bytes: &[u8], reason: &str) {
        let before = self.world.metric("tunnel_malformed_headers_total", &[reason]);
        let mut lane = self.lane().await;
        lane.write_all(bytes).await.unwrap();
        lane.flush().await.unwrap();
        // The end may come as an error: the server closes with bytes unread.
        let _ = within(lane.read_to_end(&mut Vec::new())).await;
        self.world.until_metric("tunnel_malformed_headers_total", &[reason], before + 1).await;
    }

    async fn others_notice_nothing(&self) {
        let mut recv = self.world.open("whoami").await.unwrap().split().1;
        assert_eq!(read_all(&mut recv).await, CART.as_bytes());
        self.world.until_metric("tunnel_lanes{", &["inbound"], 1).await;
    }
}

fn frame(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn open(stream: u32) -> Vec<u8> {
    frame(&Frame::Open { stream, header: header("echo").encode().unwrap().into() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_frames_close_the_lane_and_are_counted() {
    let hostile = Hostile::new(|_| {});
    hostile.is_turned_away(&[0xff; 64], "bad_frame").await;
    hostile.is_turned_away(&[1, 0, 4, 1, 0, 0, 0, 1], "frame_length").await;
    hostile.is_turned_away(&frame(&Frame::Data { stream: 1, bytes: b"x" }), "unknown_stream").await;
    hostile.is_turned_away(&[open(1), open(1)].concat(), "frame_order").await;
    hostile.is_turned_away(&[open(1), frame(&Frame::Opened { stream: 1 })].concat(), "frame_order").await;
    hostile.is_turned_away(&[open(1), frame(&Frame::Move { stream: 1, offset: 5 })].concat(), "move_offset").await;
    let data = vec![7; 60_000];
    let flood = [open(1), frame(&Frame::Data { stream: 1, bytes: &data }).repeat(5)].concat();
    // The echo grants credit for what it reads, so the window is overrun while it cannot: before the stream is open.
    let sleeping = frame(&Frame::Open { stream: 1, header: header("sleep").encode().unwrap().into() });
    hostile.is_turned_away(&[sleeping, flood[open(1).len()..].to_vec()].concat(), "credit").await;
    hostile.others_notice_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_header_is_refused_and_the_lane_goes_on() {
    let hostile = Hostile::new(|_| {});
    let mut lane = hostile.lane().await;
    lane.write_all(&frame(&Frame::Open { stream: 1, header: vec![0xff; 1024].into() })).await.unwrap();
    lane.write_all(&open(2)).await.unwrap();
    lane.flush().await.unwrap();
    let mut answers = [0; 2 * HEAD + 1];
    within(lane.read_exact(&mut answers)).await.unwrap();
    let expected = [
        frame(&Frame::Refused { stream: 1, code: crate::tunnel::Refusal::BadHeader.code() }),
        frame(&Frame::Opened { stream: 2 }),
    ];
    assert_eq!(answers.to_vec(), expected.concat());
    assert_eq!(hostile.world.metric("tunnel_malformed_headers_total", &["bad_header"]), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_cut_short_is_counted() {
    let hostile = Hostile::new(|_| {});
    let mut lane = hostile.lane().await;
    lane.write_all(&open(1)[..20]).await.unwrap();
    lane.shutdown().await.unwrap();
    drop(lane);
    hostile.world.until_metric("tunnel_malformed_headers_total", &["truncated"], 1).await;
    hostile.others_notice_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_that_never_comes_or_drips_in_is_given_up() {
    let hostile = Hostile::new(|config| config.header_timeout = Duration::from_millis(200));
    hostile.is_turned_away(&[], "slow_header").await;
    hostile.is_turned_away(&open(1)[..11], "slow_header").await;
    hostile.is_turned_away(&[open(1), open(2)[..3].to_vec()].concat(), "slow_header").await;
    hostile.others_notice_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_no_tls_or_never_speaks_is_given_up() {
    let hostile = Hostile::new(|config| config.handshake_timeout = Duration::from_millis(200));
    let mut garbage = TcpStream::connect(hostile.world.peer.address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _mute = TcpStream::connect(hostile.world.peer.address).await.unwrap();
    hostile.world.until_metric("tunnel_handshake_failures_total", &["server", "protocol"], 1).await;
    hostile.world.until_metric("tunnel_handshake_failures_total", &["server", "timeout"], 1).await;
    hostile.others_notice_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_certificate_is_refused() {
    let hostile = Hostile::new(|_| {});
    let config = hostile.client.client_config(&id(CART), &id(SHOP)).unwrap();
    let mut bare = rustls::ClientConfig::clone(&config);
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    let socket = TcpStream::connect(hostile.world.peer.address).await.unwrap();
    let mut lane = within(TlsConnector::from(Arc::new(bare)).connect(server_name(&id(SHOP)), socket)).await.unwrap();
    assert!(within(lane.read_u8()).await.is_err());
    hostile.world.until_metric("tunnel_handshake_failures_total", &["server", "no_certificate"], 1).await;
    assert_eq!(hostile.world.metric("tunnel_lanes_opened_total", &[]), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_beyond_the_bound_are_refused() {
    let hostile = Hostile::new(|config| config.max_pending_handshakes = 2);
    let mute = [
        TcpStream::connect(hostile.world.peer.address).await.unwrap(),
        TcpStream::connect(hostile.world.peer.address).await.unwrap(),
    ];
    let mut third = TcpStream::connect(hostile.world.peer.address).await.unwrap();
    assert_eq!(within(third.read(&mut [0])).await.unwrap_or(0), 0);
    assert_eq!(hostile.world.metric("tunnel_handshake_failures_total", &["server", "overloaded"]), 1);
    drop(mute);
    until("there is room again", || hostile.world.metric("tunnel_handshake_failures_total", &["truncated"]) == 2).await;
    hostile.others_notice_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_cannot_take_over_a_stream() {
    let hostile = Hostile::new(|_| {});
    let _stream = hostile.world.open("echo").await.unwrap();
    let mut lane = hostile.lane().await;
    lane.write_all(&frame(&Frame::Attach { stream: 1, token: [0; 16], origin: 1 })).await.unwrap();
    lane.flush().await.unwrap();
    let mut answer = [0; HEAD + 1];
    within(lane.read_exact(&mut answer)).await.unwrap();
    let code = crate::tunnel::Refusal::NotFound.code();
    assert_eq!(answer.to_vec(), frame(&Frame::Refused { stream: 1, code }));
    assert_eq!(hostile.world.metric("tunnel_streams_moved_total", &[]), 0);
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
