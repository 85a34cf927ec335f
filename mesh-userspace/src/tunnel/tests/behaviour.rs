//! What every transport does alike.

use super::world::{
    BANK, CART, SHOP, World, authority, header, id, identities, pattern, peer, read_all, read_pattern, send_pattern,
    until, within,
};
use crate::identity::PeerRefusal;
use crate::model::TransportChoice::{self, Lanes, Quic};
use crate::tunnel::{OpenError, Peer, Refusal, ResetCode, StreamError};
use bytes::Bytes;

/// Makes a module with one test per transport of every function named.
macro_rules! both_transports {
    ($($test:ident),* $(,)?) => {
        mod lanes { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test(super::Lanes).await; })* }
        mod quic { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test(super::Quic).await; })* }
    };
}

both_transports!(
    bytes_come_back_and_both_directions_finish,
    the_caller_is_authenticated,
    a_finished_direction_leaves_the_other_open,
    a_refusal_arrives_with_its_reason,
    an_offer_that_is_dropped_is_refused,
    a_reset_arrives_after_the_bytes_before_it,
    a_reset_and_a_dropped_half_are_no_end_of_file,
    a_stopped_sender_learns_it_and_the_other_direction_goes_on,
    a_sender_is_held_back_while_the_far_reader_sleeps,
    a_sleeping_reader_does_not_hold_up_others,
    two_hundred_streams_at_once_keep_their_bytes,
    an_answer_that_never_comes_times_out,
    nobody_listening_is_a_dial_error,
    a_server_with_another_identity_is_refused,
    certificates_of_another_root_are_refused,
    expired_certificates_are_refused,
    an_identity_without_a_certificate_cannot_dial,
    a_node_that_vanishes_ends_its_streams,
    forgetting_a_workload_ends_its_streams_at_once,
    a_drained_tunnel_finishes_what_it_has_and_opens_nothing,
    an_idle_connection_expires_and_the_next_stream_dials_anew,
    streams_share_a_connection_and_leave_none_behind,
);

async fn bytes_come_back_and_both_directions_finish(choice: TransportChoice) {
    let world = World::new(choice);
    let stream = world.open("echo").await.unwrap();
    if choice == Lanes {
        assert_eq!(stream.tls().group, "X25519MLKEM768");
        assert!(stream.tls().suite.starts_with("TLS13_"), "{}", stream.tls().suite);
    }
    let (mut send, mut recv) = stream.split();
    let writer = tokio::spawn(async move { send_pattern(&mut send, 300_000, 7_001).await });
    assert_eq!(read_pattern(&mut recv).await, Ok(300_000));
    assert_eq!(recv.recv().await, Ok(None));
    writer.await.unwrap();
}

async fn the_caller_is_authenticated(choice: TransportChoice) {
    let world = World::new(choice);
    assert_eq!(read_all(&mut world.halves("whoami").await.1).await, CART.as_bytes());
    let bank = Peer { source: id(BANK), ..world.peer.clone() };
    let mut recv = world.open_to(&bank, "whoami").await.unwrap().split().1;
    assert_eq!(read_all(&mut recv).await, BANK.as_bytes());
}

async fn a_finished_direction_leaves_the_other_open(choice: TransportChoice) {
    let world = World::new(choice);
    let (mut send, mut recv) = world.halves("hash").await;
    send.send(pattern(0, 10)).await.unwrap();
    send.finish().unwrap();
    drop(send);
    assert_eq!(read_all(&mut recv).await.len(), 16);
    // The other way round: the server finishes first.
    let (mut send, mut recv) = world.halves("source:20").await;
    assert_eq!(read_pattern(&mut recv).await, Ok(20));
    send.send(Bytes::from_static(b"more")).await.unwrap();
    send.finish().unwrap();
}

async fn a_refusal_arrives_with_its_reason(choice: TransportChoice) {
    let world = World::new(choice);
    let refused = world.open("refuse").await;
    assert!(matches!(refused, Err(OpenError::Refused(Refusal::Denied))), "{refused:?}");
    assert_eq!(world.metric("tunnel_streams_refused_total", &["outbound", "denied"]), 1);
    assert_eq!(world.metric("tunnel_streams_refused_total", &["inbound", "denied"]), 1);
    world.open("echo").await.unwrap();
    assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 1, "the connection is still good");
}

async fn an_offer_that_is_dropped_is_refused(choice: TransportChoice) {
    let world = World::new(choice);
    let refused = world.open("drop").await;
    assert!(matches!(refused, Err(OpenError::Refused(Refusal::Unreachable))), "{refused:?}");
}

async fn a_reset_arrives_after_the_bytes_before_it(choice: TransportChoice) {
    let world = World::new(choice);
    let (mut send, mut recv) = world.halves("reset").await;
    assert_eq!(within(recv.recv()).await, Ok(Some(Bytes::from_static(b"partial"))));
    send.send(Bytes::from_static(b"go")).await.unwrap();
    assert_eq!(within(recv.recv()).await, Err(StreamError::Reset(ResetCode(7))));
}

async fn a_reset_and_a_dropped_half_are_no_end_of_file(choice: TransportChoice) {
    let world = World::new(choice);
    let (mut send, mut recv) = world.halves("outcome").await;
    send.send(pattern(0, 10)).await.unwrap();
    send.reset(ResetCode(5));
    assert_eq!(read_all(&mut recv).await, b"Reset(ResetCode(5))");
    let (send, mut recv) = world.halves("outcome").await;
    drop(send);
    assert_eq!(read_all(&mut recv).await, b"Reset(ResetCode(0))");
    let (mut send, mut recv) = world.halves("outcome").await;
    send.finish().unwrap();
    drop(send);
    assert_eq!(read_all(&mut recv).await, b"finished");
}

async fn a_stopped_sender_learns_it_and_the_other_direction_goes_on(choice: TransportChoice) {
    let world = World::new(choice);
    let (mut send, mut recv) = world.halves("stop").await;
    let error = within(async {
        loop {
            if let Err(error) = send.send(pattern(0, 1000)).await {
                return error;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(error, StreamError::Stopped(ResetCode(9)));
    world.wake.notify_one();
    assert_eq!(read_all(&mut recv).await, b"still here");
}

/// Sends until nothing is taken any more; how much was.
async fn fill(send: &mut crate::tunnel::SendHalf) -> u64 {
    let mut total = 0;
    loop {
        let bytes = pattern(total, 16_000);
        // Nothing taken for this long means held back: whatever could flow over loopback has flowed.
        match tokio::time::timeout(std::time::Duration::from_millis(500), send.send(bytes)).await {
            Ok(result) => result.unwrap(),
            Err(_) => return total,
        }
        total += 16_000;
    }
}

async fn a_sender_is_held_back_while_the_far_reader_sleeps(choice: TransportChoice) {
    let world = World::with(choice, |config| config.bulk_bytes = u64::MAX);
    let (mut send, mut recv) = world.halves("sleep").await;
    let total = fill(&mut send).await;
    let bound = if choice == Lanes { 256 * 1024 + 64 * 1024 + 16_000 } else { 1024 * 1024 + 16_000 };
    assert!(total > 200_000 && total <= bound, "{total} bytes were taken");
    world.wake.notify_one();
    send.finish().unwrap();
    // Of the chunk that had to wait QUIC may have taken a part; a lane took none.
    let read = u64::from_be_bytes(read_all(&mut recv).await.try_into().unwrap());
    let is_whole = if choice == Lanes { read == total } else { (total..total + 16_000).contains(&read) };
    assert!(is_whole, "{read} of {total}");
}

async fn a_sleeping_reader_does_not_hold_up_others(choice: TransportChoice) {
    let world = World::with(choice, |config| config.bulk_bytes = u64::MAX);
    let mut sleepers = Vec::new();
    for _ in 0..20 {
        let (mut send, recv) = world.halves("sleep").await;
        sleepers.push(tokio::spawn(async move {
            let mut offset = 0;
            while send.send(pattern(offset, 16_000)).await.is_ok() {
                offset += 16_000;
            }
            drop(recv);
        }));
    }
    for _ in 0..10 {
        let (mut send, mut recv) = world.halves("echo").await;
        let writer = tokio::spawn(async move { send_pattern(&mut send, 200_000, 10_000).await });
        assert_eq!(read_pattern(&mut recv).await, Ok(200_000));
        writer.await.unwrap();
    }
    assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 1, "all on one connection");
    sleepers.iter().for_each(tokio::task::JoinHandle::abort);
}

async fn two_hundred_streams_at_once_keep_their_bytes(choice: TransportChoice) {
    let world = std::sync::Arc::new(World::new(choice));
    let streams: Vec<_> = (0..200_u64)
        .map(|number| {
            let world = std::sync::Arc::clone(&world);
            tokio::spawn(async move {
                let (mut send, mut recv) = world.halves("echo").await;
                for turn in 0..10 {
                    let bytes = pattern(number * 1000 + turn, 333);
                    within(send.send(bytes.clone())).await.unwrap();
                    let mut back = Vec::new();
                    while back.len() < bytes.len() {
                        back.extend_from_slice(&within(recv.recv()).await.unwrap().unwrap());
                    }
                    assert!(back == bytes, "stream {number} got another's bytes");
                }
                send.finish().unwrap();
                assert_eq!(within(recv.recv()).await, Ok(None));
            })
        })
        .collect();
    for stream in streams {
        stream.await.unwrap();
    }
    assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 1, "all on one connection");
    assert_eq!(world.metric("tunnel_streams_opened_total", &["inbound"]), 200);
}

async fn an_answer_that_never_comes_times_out(choice: TransportChoice) {
    let world = World::with(choice, |config| config.open_timeout = std::time::Duration::from_millis(300));
    let refused = world.open("never").await;
    assert!(matches!(refused, Err(OpenError::Timeout)), "{refused:?}");
}

async fn nobody_listening_is_a_dial_error(choice: TransportChoice) {
    let world = World::with(choice, |config| config.connect_timeout = std::time::Duration::from_millis(500));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = peer(taken.local_addr().unwrap());
    drop(taken);
    let refused = world.open_to(&nobody, "echo").await;
    // QUIC hears nothing from a closed port.
    assert!(matches!(refused, Err(OpenError::Dial(_) | OpenError::Timeout)), "{refused:?}");
    assert_eq!(world.metric("tunnel_handshake_failures_total", &["client"]), 1);
}

async fn a_server_with_another_identity_is_refused(choice: TransportChoice) {
    let world = World::new(choice);
    let bank = Peer { destination: id(BANK), ..world.peer.clone() };
    let refused = world.open_to(&bank, "echo").await;
    assert!(matches!(refused, Err(OpenError::Handshake(_))), "{refused:?}");
    world.until_metric("tunnel_handshake_failures_total", &["server", "identity_mismatch"], 1).await;
    assert_eq!(world.metric("tunnel_streams_opened_total", &[]), 0);
}

async fn certificates_of_another_root_are_refused(choice: TransportChoice) {
    let (ours, theirs) = (authority(), authority());
    let valid = (-60, 3600);
    // A server whose certificate comes from elsewhere, and then a client.
    let both = [&theirs, &ours];
    for (client, server) in [(&both[1..], &both[..]), (&both[..], &both[1..])] {
        let client = identities(client, &[CART], valid);
        let server = identities(server, &[SHOP], valid);
        let world = World::between(choice, client, server, |_| {});
        let refused = world.open("echo").await;
        assert!(matches!(refused, Err(OpenError::Handshake(PeerRefusal::UnknownCa))), "{refused:?}");
        world.until_metric("tunnel_handshake_failures_total", &["server", "unknown_ca"], 1).await;
        assert_eq!(world.metric("tunnel_streams_opened_total", &[]), 0);
    }
}

async fn expired_certificates_are_refused(choice: TransportChoice) {
    let authority = authority();
    for (client, server) in [((-60, 3600), (-120, -60)), ((-120, -60), (-60, 3600))] {
        let client = identities(&[&authority], &[CART], client);
        let server = identities(&[&authority], &[SHOP], server);
        let world = World::between(choice, client, server, |_| {});
        let refused = world.open("echo").await;
        assert!(matches!(refused, Err(OpenError::Handshake(PeerRefusal::Expired))), "{refused:?}");
        world.until_metric("tunnel_handshake_failures_total", &["server", "expired"], 1).await;
    }
}

async fn an_identity_without_a_certificate_cannot_dial(choice: TransportChoice) {
    let world = World::new(choice);
    let nobody = Peer { source: id("spiffe://example.org/ns/shop/sa/nobody"), ..world.peer.clone() };
    let refused = world.open_to(&nobody, "echo").await;
    assert!(matches!(refused, Err(OpenError::Handshake(PeerRefusal::NoCertificate))), "{refused:?}");
}

async fn a_node_that_vanishes_ends_its_streams(choice: TransportChoice) {
    let world = World::new(choice);
    let (mut send, mut recv) = world.halves("echo").await;
    send.send(Bytes::from_static(b"hi")).await.unwrap();
    assert_eq!(within(recv.recv()).await, Ok(Some(Bytes::from_static(b"hi"))));
    world.stop_server();
    assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed));
    until("sending fails", || matches!(poll_once(send.send(pattern(0, 10))), Some(Err(StreamError::LaneClosed)))).await;
}

fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut cx) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

async fn forgetting_a_workload_ends_its_streams_at_once(choice: TransportChoice) {
    let world = World::new(choice);
    let other = Peer { workload: crate::model::WorkloadUid::new("shop-2"), ..world.peer.clone() };
    let (_send, mut recv) = world.halves("echo").await;
    let (mut other_send, mut other_recv) = world.open_to(&other, "echo").await.unwrap().split();
    assert_eq!(world.tunnel.lanes().len(), 2, "each workload has its own connection");
    world.tunnel.forget(&world.peer.workload);
    assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed));
    other_send.send(Bytes::from_static(b"alive")).await.unwrap();
    assert_eq!(within(other_recv.recv()).await, Ok(Some(Bytes::from_static(b"alive"))));
    assert_eq!(world.tunnel.lanes().len(), 1);
    // The workload may be known again later.
    world.open("echo").await.unwrap();
}

async fn a_drained_tunnel_finishes_what_it_has_and_opens_nothing(choice: TransportChoice) {
    let world = World::new(choice);
    let (mut send, mut recv) = world.halves("echo").await;
    let tunnel = std::sync::Arc::clone(&world.tunnel);
    let deadline = tokio::time::Instant::now() + super::world::LIMIT;
    let drain = tokio::spawn(async move { tunnel.drain(deadline).await });
    until("nothing can be opened", || {
        matches!(poll_once(world.tunnel.open(world.choice, &world.peer, header("echo"))), Some(Err(OpenError::Closed)))
    })
    .await;
    send.send(Bytes::from_static(b"last words")).await.unwrap();
    send.finish().unwrap();
    assert_eq!(read_all(&mut recv).await, b"last words");
    drop((send, recv));
    within(drain).await.unwrap();
    assert!(world.tunnel.lanes().is_empty());
}

async fn an_idle_connection_expires_and_the_next_stream_dials_anew(choice: TransportChoice) {
    let world = World::with(choice, |config| config.idle_timeout = std::time::Duration::from_millis(100));
    let (mut send, mut recv) = world.halves("echo").await;
    send.finish().unwrap();
    assert_eq!(within(recv.recv()).await, Ok(None));
    drop((send, recv));
    until("the pool is empty", || world.tunnel.lanes().is_empty()).await;
    world.until_metric("tunnel_lanes{", &[], 0).await;
    world.open("echo").await.unwrap();
    assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 2);
}

async fn streams_share_a_connection_and_leave_none_behind(choice: TransportChoice) {
    let world = World::new(choice);
    for turn in 0..50 {
        let (mut send, mut recv) = world.halves("echo").await;
        send.send(pattern(turn, 100)).await.unwrap();
        // Some end well, some are dropped in the middle.
        if turn % 2 == 0 {
            send.finish().unwrap();
            read_all(&mut recv).await;
        }
    }
    assert_eq!(world.tunnel.lanes().len(), 1);
    until("no stream is left", || world.tunnel.lanes()[0].streams == 0).await;
}
