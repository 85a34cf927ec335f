//! What the pools of lanes and of QUIC's connections do.

use super::world::{BANK, CART, World, id, read_all, until, within};
use crate::model::TransportChoice::{Lanes, Quic};
use crate::runtime::Cores;
use crate::tunnel::{OpenError, Peer, StreamError};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_lane_is_joined_by_another_up_to_the_bound() {
    let world = World::with(Lanes, |config| {
        config.max_streams = 4;
        config.max_shared_lanes = 2;
    });
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(world.open("echo").await.unwrap());
    }
    assert_eq!(world.tunnel.lanes().iter().map(|lane| lane.streams).collect::<Vec<_>>(), [4, 4]);
    let refused = world.open("echo").await;
    assert!(matches!(refused, Err(OpenError::Bound("shared lanes"))), "{refused:?}");
    streams.pop();
    until("there is room", || world.tunnel.lanes().iter().any(|lane| lane.streams < 4)).await;
    world.open("echo").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_descriptor_no_lane_is_dialled_and_lanes_that_exist_go_on() {
    let world = World::with_descriptors(Lanes, 1, 8);
    let _stream = world.open("echo").await.unwrap();
    // Of another identity, so on a lane of its own.
    let other = Peer { source: id(BANK), ..world.peer.clone() };
    let refused = world.open_to(&other, "echo").await;
    assert!(matches!(refused, Err(OpenError::Bound("descriptors"))), "{refused:?}");
    let mut recv = world.open("whoami").await.unwrap().split().1;
    assert!(!read_all(&mut recv).await.is_empty());
    world.tunnel.forget_source(&id(CART));
    until("the descriptor is given back", || world.tunnel.lanes().is_empty()).await;
    within(async {
        // The lane's last words come after it has left the pool.
        while matches!(world.open_to(&other, "echo").await, Err(OpenError::Bound("descriptors"))) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world.open_to(&other, "echo").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_descriptor_turns_lanes_away_and_says_why() {
    let world = World::with_descriptors(Lanes, 8, 1);
    let _stream = world.open("echo").await.unwrap();
    let other = Peer { source: id(BANK), ..world.peer.clone() };
    let refused = world.open_to(&other, "echo").await;
    assert!(matches!(refused, Err(OpenError::Dial(_))), "{refused:?}");
    assert_eq!(world.metric("tunnel_handshake_failures_total", &["server", "descriptor_limit"]), 1);
    let mut recv = world.open("whoami").await.unwrap().split().1;
    assert!(!read_all(&mut recv).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_arrives_at_once_dials_once() {
    let world = Arc::new(World::new(Lanes));
    let crowd: Vec<_> = (0..50)
        .map(|_| {
            let world = Arc::clone(&world);
            tokio::spawn(async move { world.open("whoami").await.unwrap() })
        })
        .collect();
    for stream in crowd {
        let mut recv = stream.await.unwrap().split().1;
        assert!(!read_all(&mut recv).await.is_empty());
    }
    assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_before_a_dead_node_fails_together() {
    let world = Arc::new(World::with(Lanes, |config| config.connect_timeout = Duration::from_millis(400)));
    // Listens, and never says a word.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = super::world::peer(mute.local_addr().unwrap());
    let crowd: Vec<_> = (0..50)
        .map(|_| {
            let (world, peer) = (Arc::clone(&world), peer.clone());
            tokio::spawn(async move { world.open_to(&peer, "echo").await })
        })
        .collect();
    for stream in crowd {
        let refused = stream.await.unwrap();
        assert!(matches!(refused, Err(OpenError::Timeout)), "{refused:?}");
    }
    let dials = world.metric("tunnel_handshake_failures_total", &["client", "timeout"]);
    assert!(dials < 10, "{dials} dials");
    assert!(world.tunnel.lanes().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signs_of_life_keep_a_quiet_lane_open() {
    let world = World::with(Lanes, |config| {
        config.keepalive = Duration::from_millis(30);
        config.dead_after = Duration::from_millis(400);
    });
    let (mut send, mut recv) = world.halves("echo").await;
    let sent = || world.metric("tunnel_sent_bytes_total", &["outbound"]);
    let before = sent();
    // 40 signs of 8 bytes: well past the deadline.
    until("signs of life were sent", || sent() >= before + 320).await;
    send.send(bytes::Bytes::from_static(b"hi")).await.unwrap();
    assert_eq!(within(recv.recv()).await, Ok(Some(bytes::Bytes::from_static(b"hi"))));
    assert_eq!(world.metric("tunnel_lanes_closed_total", &[]), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_noticed() {
    let world = World::with(Lanes, |config| {
        config.keepalive = Duration::from_millis(30);
        config.dead_after = Duration::from_millis(300);
    });
    // A node behind a wire that is cut: bytes go in and none come out.
    let wire = super::hostile::Wire::to(world.peer.address).await;
    let peer = super::world::peer(wire.address);
    let (_send, mut recv) = world.open_to(&peer, "echo").await.unwrap().split();
    wire.cut();
    assert_eq!(within(recv.recv()).await, Err(StreamError::LaneClosed));
    world.until_metric("tunnel_lanes_closed_total", &["outbound", "silent"], 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarted_behind_a_pooled_lane_is_dialled_anew() {
    let world = World::new(Lanes);
    let wire = super::hostile::Wire::to(world.peer.address).await;
    let peer = super::world::peer(wire.address);
    drop(world.open_to(&peer, "echo").await.unwrap());
    wire.break_all();
    // None of them may fail, whether it comes before the lane breaks, meanwhile, or after.
    while world.metric("tunnel_lanes_opened_total", &["outbound"]) < 2 {
        drop(world.open_to(&peer, "echo").await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_lane_is_replaced_and_its_streams_go_on() {
    let world = World::with(Lanes, |config| config.max_age = Duration::from_millis(100));
    let (mut send, mut recv) = world.halves("echo").await;
    until("the lane is old", || world.tunnel.lanes()[0].is_draining).await;
    drop(world.open("echo").await.unwrap());
    assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 2);
    send.send(bytes::Bytes::from_static(b"still here")).await.unwrap();
    send.finish().unwrap();
    assert_eq!(read_all(&mut recv).await, b"still here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wide_path_is_found_to_be_one() {
    let world = World::new(Quic);
    let (mut send, mut recv) = world.halves("echo").await;
    // Loopback carries more. Sizes are tried while something is sent.
    let grown = async {
        while world.tunnel.lanes()[0].packet != Some(8_952) {
            send.send(bytes::Bytes::from_static(b"ping")).await.unwrap();
            recv.recv().await.unwrap().unwrap();
        }
    };
    within(grown).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_thread_has_a_connection_of_its_own_to_a_peer() {
    for choice in [Lanes, Quic] {
        let (cores, threads) = Cores::start(NonZeroUsize::new(2), 0.0, || Ok(())).unwrap();
        let world = Arc::new(World::on(cores.clone(), choice));
        let mut streams = Vec::new();
        for core in [0, 1, 0, 1] {
            let there = Arc::clone(&world);
            let opening = cores.handle(core).spawn(async move { there.open("echo").await });
            streams.push(opening.await.unwrap().unwrap());
        }
        let lanes = world.tunnel.lanes();
        assert_eq!(lanes.iter().map(|lane| lane.streams).collect::<Vec<_>>(), [2, 2], "{choice:?}");
        assert_eq!(world.metric("tunnel_lanes_opened_total", &["outbound"]), 2, "{choice:?}");
        drop((streams, world, threads));
    }
}
