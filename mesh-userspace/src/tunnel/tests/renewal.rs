//! Connections whose certificates come to their end: streams go on over fresh ones, or end with them.

use super::world::{CART, SHOP, World, authority, id, pattern, read_all, send_pattern, until};
use super::world::{header, within};
use crate::ca::{Authority, Validity};
use crate::identity::{Identities, PeerRefusal};
use crate::model::TransportChoice::{self, Lanes, Quic};
use crate::model::TrustDomain;
use crate::tunnel::{Config, OpenError, RecvHalf, ResetCode, SendHalf, StreamError};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use time::OffsetDateTime;

/// Certificates have whole seconds: what is left of one with this many is up to a second less.
const LIFE: i64 = 8;

/// The certificates of one node, renewed on demand.
struct Node {
    directory: TempDir,
    id: &'static str,
    identities: Identities,
}

impl Node {
    fn new(authority: &Authority, id: &'static str, life: i64) -> Self {
        let directory = TempDir::new().unwrap();
        authority.add_to_bundle(directory.path()).unwrap();
        sign(authority, id, life, &directory);
        let identities = Identities::load(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
        Self { directory, id, identities }
    }

    fn renew(&self, authority: &Authority, life: i64) {
        sign(authority, self.id, life, &self.directory);
        self.identities.reload().unwrap();
    }
}

fn sign(authority: &Authority, uri: &str, life: i64, directory: &TempDir) {
    let now = OffsetDateTime::now_utc();
    let validity =
        Validity { not_before: now - time::Duration::minutes(1), not_after: now + time::Duration::seconds(life) };
    authority.sign(&id(uri), validity).unwrap().store(directory.path()).unwrap();
}

/// Two nodes whose certificates are renewed at half of their life until this is dropped.
struct Renewed {
    world: Arc<World>,
    renewing: tokio::task::JoinHandle<()>,
}

impl Drop for Renewed {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

impl Renewed {
    fn new(choice: TransportChoice, adjust: impl FnOnce(&mut Config)) -> Self {
        let authority = authority();
        let nodes = [CART, SHOP].map(|id| Node::new(&authority, id, LIFE));
        let [client, server] = nodes.each_ref().map(|node| node.identities.clone());
        let world = World::between(choice, client, server, adjust);
        let renewing = tokio::spawn(async move {
            // The two nodes in turn, as they would not agree either.
            for node in nodes.iter().cycle() {
                tokio::time::sleep(Duration::from_secs(LIFE.unsigned_abs()) / 4).await;
                node.renew(&authority, LIFE);
            }
        });
        Self { world: Arc::new(world), renewing }
    }

    fn moved(&self) -> u64 {
        self.world.metric("tunnel_streams_moved_total", &["outbound", "renewal"])
    }

    fn assert_none_lost(&self) {
        assert_eq!(self.world.metric("tunnel_lanes_closed_total", &["expired"]), 0);
        assert_eq!(self.world.metric("tunnel_rehandshakes_total", &["failed"]), 0);
    }
}

/// Sends and gets back the pattern until `is_enough`.
async fn echo_until(mut halves: (SendHalf, RecvHalf), chunk: usize, pause: Duration, is_enough: impl Fn() -> bool) {
    let mut total = 0;
    while !is_enough() {
        within(halves.0.send(pattern(total, chunk))).await.unwrap();
        let mut back = 0;
        while back < chunk {
            let bytes = within(halves.1.recv()).await.unwrap().unwrap();
            assert!(bytes == pattern(total + back as u64, bytes.len()), "wrong bytes after {total}");
            back += bytes.len();
        }
        total += chunk as u64;
        tokio::time::sleep(pause).await;
    }
    halves.0.finish().unwrap();
    assert_eq!(within(halves.1.recv()).await, Ok(None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_outlive_the_certificates_they_began_with() {
    let renewed = Renewed::new(Lanes, |config| {
        config.bulk_bytes = 200_000;
        config.bulk_period = Duration::from_secs(60);
    });
    let world = &renewed.world;
    let mut streams = Vec::new();
    for number in 0..6 {
        let (halves, world) = (world.halves("echo").await, Arc::clone(world));
        // Two of them are bulk, and change between shared and exclusive lanes all the time.
        let (chunk, pause) = if number < 2 { (60_000, Duration::ZERO) } else { (100, Duration::from_millis(7)) };
        streams.push(tokio::spawn(async move {
            let is_enough = || world.metric("tunnel_streams_moved_total", &["inbound", "renewal"]) >= 4 * 6;
            echo_until(halves, chunk, pause, is_enough).await;
        }));
    }
    // Short ones all the while.
    while !streams.iter().all(tokio::task::JoinHandle::is_finished) {
        assert!(!read_all(&mut world.halves("whoami").await.1).await.is_empty());
    }
    for stream in streams {
        stream.await.unwrap();
    }
    renewed.assert_none_lost();
    assert!(world.metric("tunnel_rehandshakes_total", &["lanes", "renewed"]) >= 1);
    assert!(world.metric("tunnel_streams_moved_total", &["outbound", "bulk"]) >= 2 * 3, "bulk stays on shared lanes");
    until("all lanes are free", || world.tunnel.lanes().iter().all(|lane| lane.streams == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_silent_streams_move_and_go_on() {
    let renewed = Renewed::new(Lanes, |config| config.max_streams = 100);
    let mut streams = Vec::new();
    for _ in 0..250 {
        streams.push(renewed.world.halves("echo").await);
    }
    until("all have moved twice", || renewed.moved() >= 2 * 250).await;
    for (send, recv) in &mut streams {
        send.send(Bytes::from_static(b"still here")).await.unwrap();
        assert_eq!(within(recv.recv()).await, Ok(Some(Bytes::from_static(b"still here"))));
    }
    renewed.assert_none_lost();
    drop(streams);
    until("all lanes are free", || renewed.world.tunnel.lanes().iter().all(|lane| lane.streams == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_resets_and_a_sleeping_reader_come_through_moves() {
    let renewed = Renewed::new(Lanes, |_| {});
    let world = &renewed.world;
    let (mut resetting, mut outcome) = world.halves("outcome").await;
    let (mut stopping, stopped) = world.halves("source:1000000000").await;
    let (mut half, mut rest) = world.halves("sleep").await;
    let (mut asleep, mut slept) = world.halves("sleep").await;
    // Finished in one direction, and the other waits.
    send_pattern(&mut half, 100_000, 30_000).await;
    // Held back by a reader that sleeps through it all.
    let mut total = 0;
    while let Ok(sent) = tokio::time::timeout(Duration::from_millis(300), asleep.send(pattern(total, 10_000))).await {
        sent.unwrap();
        total += 10_000;
    }
    // What was cut off is not sent: it had found no room.
    until("all have moved twice", || renewed.moved() >= 2 * 4).await;
    resetting.reset(ResetCode(5));
    assert_eq!(read_all(&mut outcome).await, format!("{:?}", StreamError::Reset(ResetCode(5))).as_bytes());
    drop(stopped);
    while stopping.send(Bytes::from_static(b"x")).await.is_ok() && renewed.moved() < 100 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if world.tunnel.lanes().iter().map(|lane| lane.streams).sum::<usize>() <= 3 {
            break;
        }
    }
    world.wake.notify_waiters();
    assert_eq!(read_all(&mut rest).await, 100_000_u64.to_be_bytes());
    asleep.finish().unwrap();
    assert_eq!(read_all(&mut slept).await, total.to_be_bytes());
    renewed.assert_none_lost();
    drop((resetting, stopping, half, asleep, outcome, rest, slept));
    until("all lanes are free", || world.tunnel.lanes().iter().all(|lane| lane.streams == 0)).await;
}

/// A node whose certificates nobody renews: it lives on what it has, and not a moment longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_whose_certificates_are_not_renewed_end_with_them() {
    for (lives, limiting) in [((LIFE, 3600), "the caller's"), ((3600, LIFE), "the callee's")] {
        let authority = authority();
        let (client, server) = (Node::new(&authority, CART, lives.0), Node::new(&authority, SHOP, lives.1));
        let world = World::between(Lanes, client.identities.clone(), server.identities.clone(), |_| {});
        let (mut send, mut recv) = world.halves("echo").await;
        assert_eq!(send.send(Bytes::from_static(b"now")).await, Ok(()));
        assert_eq!(within(recv.recv()).await, Ok(Some(Bytes::from_static(b"now"))));
        assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed), "{limiting} certificate");
        assert_eq!(send.send(Bytes::from_static(b"later")).await, Err(StreamError::LaneClosed));
        // Whichever of the two looked first.
        until("it is counted", || world.metric("tunnel_lanes_closed_total", &["expired"]) >= 1).await;
        let refused = world.open("echo").await;
        assert!(matches!(refused, Err(OpenError::Handshake(PeerRefusal::Expired))), "{limiting}: {refused:?}");
        // It recovers as soon as there is a certificate.
        client.renew(&authority, 3600);
        server.renew(&authority, 3600);
        assert!(!read_all(&mut world.halves("whoami").await.1).await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_that_comes_late_is_in_time_as_long_as_the_old_certificate_lasts() {
    let authority = authority();
    let (client, server) = (Node::new(&authority, CART, 3600), Node::new(&authority, SHOP, 2 * LIFE));
    let world = World::between(Lanes, client.identities.clone(), server.identities.clone(), |_| {});
    let (mut send, mut recv) = world.halves("echo").await;
    // It has tried, and the peer had nothing new.
    until("a try was in vain", || world.metric("tunnel_rehandshakes_total", &["unchanged"]) >= 2).await;
    assert_eq!(world.metric("tunnel_streams_moved_total", &[]), 0);
    server.renew(&authority, 3600);
    world.until_metric("tunnel_streams_moved_total", &["outbound", "renewal"], 1).await;
    send.send(Bytes::from_static(b"still here")).await.unwrap();
    send.finish().unwrap();
    assert_eq!(read_all(&mut recv).await, b"still here");
    assert_eq!(world.metric("tunnel_lanes_closed_total", &["expired"]), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_streams_finish_where_they_are_and_new_ones_go_over_fresh_certificates() {
    let renewed = Renewed::new(Quic, |_| {});
    let world = &renewed.world;
    let old = world.halves("echo").await;
    let handshakes = || world.metric("tunnel_rehandshakes_total", &["quic", "renewed"]);
    let is_enough = || handshakes() >= 3;
    let first = tokio::spawn({
        let world = Arc::clone(world);
        let is_enough = move || world.metric("tunnel_rehandshakes_total", &["quic", "renewed"]) >= 3;
        echo_until(old, 100, Duration::from_millis(7), is_enough)
    });
    while !is_enough() {
        assert!(!read_all(&mut world.halves("whoami").await.1).await.is_empty());
    }
    first.await.unwrap();
    assert_eq!(world.metric("tunnel_lanes_closed_total", &["expired"]), 0);
    until("what was retired is gone", || world.tunnel.lanes().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_streams_end_when_the_grace_after_their_certificates_does() {
    let authority = authority();
    let (client, server) = (Node::new(&authority, CART, 2), Node::new(&authority, SHOP, 3600));
    let world = World::between(Quic, client.identities.clone(), server.identities.clone(), |config| {
        config.quic_grace = Duration::from_secs(1);
    });
    let (_send, mut recv) = world.halves("echo").await;
    assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed));
    until("it is counted", || world.metric("tunnel_lanes_closed_total", &["quic", "expired"]) >= 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identity_that_is_taken_away_takes_its_connections_along() {
    for choice in [Lanes, Quic] {
        let authority = authority();
        let (client, server) = (Node::new(&authority, CART, 3600), Node::new(&authority, SHOP, 3600));
        let world = World::between(choice, client.identities.clone(), server.identities.clone(), |_| {});
        let (_send, mut recv) = world.halves("echo").await;
        world.tunnel.forget_source(&id(SHOP));
        let (mut others, mut echo) = world.halves("echo").await;
        others.send(Bytes::from_static(b"not meant")).await.unwrap();
        assert_eq!(within(echo.recv()).await, Ok(Some(Bytes::from_static(b"not meant"))));
        world.tunnel.forget_source(&id(CART));
        assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed));
        // The callee's node takes it away.
        let (_send, mut recv) = world.halves("echo").await;
        std::fs::remove_dir_all(server.directory.path().join("ns/shop/sa/shop")).unwrap();
        sign(&authority, "spiffe://example.org/ns/shop/sa/other", 3600, &server.directory);
        server.identities.reload().unwrap();
        assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed));
        let refused = within(world.tunnel.open(choice, &world.peer, header("echo"))).await;
        assert!(matches!(refused, Err(OpenError::Handshake(_))), "{refused:?}");
    }
}
