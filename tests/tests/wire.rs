//! Whatever arrives at the tunnel's port, from whomever: it is refused within a bound, counted by reason, and leaves
//! nothing behind; those who behave notice nothing.

use anyhow::{Context, Result, ensure};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::{Cluster, TRUST_DOMAIN};
use mesh_tests::daemon::TUNNEL_PORT;
use mesh_tests::scrape::Metrics;
use mesh_tests::wait::{self, BOUND};
use mesh_userspace::identity::{Identities, server_name};
use mesh_userspace::model::{SpiffeId, TrustDomain};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than every deadline of the daemon.
const HANG_UP_BOUND: Duration = Duration::from_secs(30);
/// Pause between the bytes of a peer that never finishes.
const TRICKLE: Duration = Duration::from_millis(200);
/// How often each misbehaviour that costs no waiting is repeated: what leaks once leaks each time.
const REPEATS: u64 = 20;

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A node from which anything is sent to another node's tunnel.
struct Attacker {
    cluster: Cluster,
    target: SocketAddr,
    config: Arc<ClientConfig>,
    server: SpiffeId,
}

impl Attacker {
    fn start(name: &str) -> Result<Self> {
        let cluster = Cluster::pair(name)?;
        let id = |account| SpiffeId::parse(&cluster.authority.spiffe_id(NAMESPACE, account));
        let (client, server) = (id("client")?, id("server")?);
        let identities = Identities::load(&cluster.identities("n1"), &TrustDomain::parse(TRUST_DOMAIN)?)?;
        let config = identities.client_config(&client, &server)?;
        let target = SocketAddr::from((cluster.world.node("n2").v4(), TUNNEL_PORT));
        Ok(Self { cluster, target, config, server })
    }

    fn tcp(&self) -> Result<TcpStream> {
        let socket = self.cluster.world.node("n1").namespace().enter(|| TcpStream::connect(self.target))??;
        socket.set_read_timeout(Some(HANG_UP_BOUND))?;
        Ok(socket)
    }

    /// A TLS session of the client's identity with the server's, after its handshake.
    fn tls(&self) -> Result<Tls> {
        let connection = ClientConnection::new(Arc::clone(&self.config), server_name(&self.server))?;
        let mut tls = StreamOwned::new(connection, self.tcp()?);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        Ok(tls)
    }

    fn metrics(&self) -> Result<Metrics> {
        self.cluster.daemon("n2").metrics()
    }

    /// Descriptors that n2's daemon has open.
    fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.cluster.daemon("n2").pid()?))?.count())
    }

    /// Nothing of what was done is left, and those who behave are served.
    fn assert_recovered(&self, descriptors: usize) -> Result<()> {
        wait::until_ok("the daemon lets go of everything", BOUND, || {
            let (now, metrics) = (self.descriptors()?, self.metrics()?);
            ensure!(now <= descriptors, "{now} descriptors are open; there were {descriptors}");
            let active = metrics.count("nodemesh_tcp_connections_active", &[]);
            ensure!(active == 0, "{active} connections are active");
            Ok(())
        })?;
        assert_eq!(self.cluster.daemon("n2").get("/readyz")?.status, 200);
        self.cluster.wait_until_served("client", "server")?;
        let log = self.cluster.daemon("n2").log();
        ensure!(!log.contains("panicked"), "{log}");
        Ok(())
    }
}

/// Reads until the other side hangs up, in whatever way.
fn wait_for_hang_up(peer: &mut impl Read) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof) => {
                return Ok(());
            }
            Err(error) => return Err(error).context("the daemon did not hang up"),
        }
    }
}

/// Sends a byte now and then until the other side hangs up.
fn trickle_until_hang_up(peer: &mut Tls, byte: u8) -> Result<()> {
    peer.sock.set_read_timeout(Some(TRICKLE))?;
    let deadline = Instant::now() + HANG_UP_BOUND;
    while Instant::now() < deadline {
        match peer.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if peer.write_all(&[byte]).and_then(|()| peer.flush()).is_err() {
                    return Ok(());
                }
            }
            Err(_) => return Ok(()),
        }
    }
    anyhow::bail!("the daemon listens to one byte after the other for ever")
}

/// A frame as the codec writes it, well-formed or not.
fn frame(kind: u8, flags: u8, length: u16, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    [&[kind, flags, high, low][..], &stream.to_be_bytes(), payload].concat()
}

const OPEN: u8 = 1;
const REFUSED: u8 = 3;
const DATA: u8 = 4;

#[test]
fn what_is_no_tls_handshake_is_refused_and_counted() -> Result<()> {
    let attacker = Attacker::start("noise")?;
    let _echo = attacker.cluster.serve("server", 8080, &[])?;
    attacker.cluster.wait_until_served("client", "server")?;
    let descriptors = attacker.descriptors()?;
    let before = attacker.metrics()?;
    let failures = |metrics: &Metrics, reason| {
        let labels = [("transport", "lanes"), ("side", "server"), ("reason", reason)];
        metrics.count("nodemesh_tunnel_handshake_failures_total", &labels)
    };
    // Holds its connection without a word while the others do their worst.
    let mut silent = attacker.tcp()?;
    for _ in 0..REPEATS {
        let mut garbage = attacker.tcp()?;
        garbage.write_all(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")?;
        wait_for_hang_up(&mut garbage)?;
        let mut hello = Vec::new();
        ClientConnection::new(Arc::clone(&attacker.config), server_name(&attacker.server))?.write_tls(&mut hello)?;
        let mut cut = attacker.tcp()?;
        cut.write_all(&hello[..hello.len() / 2])?;
        cut.shutdown(Shutdown::Write)?;
        wait_for_hang_up(&mut cut)?;
    }
    wait_for_hang_up(&mut silent)?;
    attacker.cluster.daemon("n2").wait_for_metrics("every failed handshake is counted", |metrics| {
        [("protocol", REPEATS), ("truncated", REPEATS), ("timeout", 1)]
            .into_iter()
            .all(|(reason, count)| failures(metrics, reason) == failures(&before, reason) + count)
    })?;
    attacker.assert_recovered(descriptors)
}

#[test]
fn malformed_frames_end_their_lane_and_are_counted() -> Result<()> {
    let attacker = Attacker::start("frames")?;
    let _echo = attacker.cluster.serve("server", 8080, &[])?;
    attacker.cluster.wait_until_served("client", "server")?;
    let descriptors = attacker.descriptors()?;
    for (what, bytes, reason) in [
        ("an unknown type", frame(99, 0, 0, 1, &[]), "bad_frame"),
        ("reserved flags", frame(OPEN, 1, 1, 1, &[0]), "bad_frame"),
        ("a stream header that is too long", frame(OPEN, 0, 1025, 1, &[0; 1025]), "frame_length"),
        ("a stream header that is empty", frame(OPEN, 0, 0, 1, &[]), "frame_length"),
        ("data of a stream that nobody opened", frame(DATA, 0, 4, 7, b"data"), "unknown_stream"),
    ] {
        let before = malformed(&attacker.metrics()?, reason);
        for _ in 0..REPEATS {
            let mut lane = attacker.tls()?;
            lane.write_all(&bytes)?;
            lane.flush()?;
            wait_for_hang_up(&mut lane).context(what)?;
        }
        let counted = |metrics: &Metrics| malformed(metrics, reason) == before + REPEATS;
        attacker.cluster.daemon("n2").wait_for_metrics(what, counted)?;
    }
    attacker.assert_recovered(descriptors)
}

#[test]
fn a_malformed_stream_header_is_refused_and_its_lane_goes_on() -> Result<()> {
    let attacker = Attacker::start("headers")?;
    let _echo = attacker.cluster.serve("server", 8080, &[])?;
    attacker.cluster.wait_until_served("client", "server")?;
    let descriptors = attacker.descriptors()?;
    let before = malformed(&attacker.metrics()?, "bad_header");
    let mut lane = attacker.tls()?;
    let headers: [&[u8]; 3] = [&[0xff; 1024], &[0], &[0x0a, 0x7f, 1, 2, 3]];
    for (number, header) in (0..).zip(headers) {
        let stream = 1 + 2 * number;
        lane.write_all(&frame(OPEN, 0, u16::try_from(header.len())?, stream, header))?;
        lane.flush()?;
        let mut head = [0; 9];
        read_answer(&mut lane, &mut head).with_context(|| format!("header {number} has no answer"))?;
        assert_eq!(head[0], REFUSED, "{head:?}");
        assert_eq!(head[4..8], stream.to_be_bytes(), "{head:?}");
    }
    assert_eq!(malformed(&attacker.metrics()?, "bad_header"), before + 3);
    drop(lane);
    attacker.assert_recovered(descriptors)
}

#[test]
fn a_peer_that_never_finishes_is_cut_off() -> Result<()> {
    let attacker = Attacker::start("slow")?;
    let _echo = attacker.cluster.serve("server", 8080, &[])?;
    attacker.cluster.wait_until_served("client", "server")?;
    let descriptors = attacker.descriptors()?;
    let before = malformed(&attacker.metrics()?, "slow_header");
    // A header of 1000 bytes, 20 of them at once.
    let begun = frame(OPEN, 0, 1000, 1, &[0; 20]);
    let mut peers = (0..4).map(|_| attacker.tls()).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let begun = &begun;
        let [nothing, stuck, trickling, gone] = &mut peers[..] else { unreachable!("there are four") };
        let waiting = [
            // Never a byte after the handshake.
            scope.spawn(move || wait_for_hang_up(nothing)),
            scope.spawn(move || {
                stuck.write_all(begun)?;
                wait_for_hang_up(stuck)
            }),
            scope.spawn(move || {
                trickling.write_all(begun)?;
                trickle_until_hang_up(trickling, 0)
            }),
            // Cut off by itself: nobody's fault but still nothing to keep.
            scope.spawn(move || {
                gone.write_all(begun)?;
                gone.sock.shutdown(Shutdown::Both)?;
                Ok(())
            }),
        ];
        // Meanwhile others are served.
        attacker.cluster.wait_until_served("client", "server")?;
        waiting.into_iter().try_for_each(|peer| peer.join().expect("a peer does not panic"))
    })?;
    attacker.cluster.daemon("n2").wait_for_metrics("those that were too slow are counted", |metrics| {
        malformed(metrics, "slow_header") == before + 3
    })?;
    drop(peers);
    attacker.assert_recovered(descriptors)
}

#[test]
fn datagrams_that_are_no_quic_do_no_harm() -> Result<()> {
    let mut attacker = Attacker::start("datagrams")?;
    let _echo = attacker.cluster.serve("server", 8080, &[])?;
    attacker.cluster.catalog.mesh("transport", "quic");
    attacker.cluster.catalog.write()?;
    let streams = |metrics: &Metrics| metrics.count("nodemesh_tunnel_streams_opened_total", &[("transport", "quic")]);
    let served_by_quic = || -> Result<()> {
        wait::until_ok("a call is carried by QUIC", BOUND, || {
            let before = streams(&attacker.metrics()?);
            attacker.cluster.wait_until_served("client", "server")?;
            ensure!(streams(&attacker.metrics()?) > before, "it was not");
            Ok(())
        })
    };
    served_by_quic()?;
    let descriptors = attacker.descriptors()?;
    let socket = attacker.cluster.world.node("n1").namespace().enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    for size in [0, 1, 20, 1200] {
        for first in [0x00, 0x40, 0x80, 0xc0, 0xff] {
            let mut datagram = vec![0xa5; size];
            datagram.iter_mut().take(1).for_each(|byte| *byte = first);
            for _ in 0..REPEATS {
                socket.send_to(&datagram, attacker.target)?;
            }
        }
    }
    served_by_quic()?;
    attacker.assert_recovered(descriptors)
}

fn malformed(metrics: &Metrics, reason: &str) -> u64 {
    metrics.count("nodemesh_tunnel_malformed_headers_total", &[("transport", "lanes"), ("reason", reason)])
}

/// Reads a frame's head and its payload's first byte, leaving signs of life out.
fn read_answer(lane: &mut Tls, head: &mut [u8; 9]) -> Result<()> {
    const PING: u8 = 11;
    loop {
        lane.read_exact(&mut head[..8])?;
        if head[0] != PING {
            return Ok(lane.read_exact(&mut head[8..])?);
        }
    }
}

#[test]
fn a_wrong_name_ends_the_handshake() -> Result<()> {
    let attacker = Attacker::start("names")?;
    let labels = [("transport", "lanes"), ("side", "server"), ("reason", "identity_mismatch")];
    let count = |metrics: &Metrics| metrics.count("nodemesh_tunnel_handshake_failures_total", &labels);
    let before = count(&attacker.metrics()?);
    let nobody = SpiffeId::parse(&attacker.cluster.authority.spiffe_id(NAMESPACE, "nobody"))?;
    let connection = ClientConnection::new(Arc::clone(&attacker.config), server_name(&nobody))?;
    let mut tls = StreamOwned::new(connection, attacker.tcp()?);
    ensure!(
        tls.conn.complete_io(&mut tls.sock).is_err() || tls.read(&mut [0]).is_err(),
        "somebody answered for nobody"
    );
    attacker.cluster.daemon("n2").wait_for_metrics("the name is counted", |metrics| count(metrics) == before + 1)?;
    Ok(())
}
