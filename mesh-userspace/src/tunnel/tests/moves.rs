//! Streams that turn bulk move to a lane of their own and keep every byte.

use super::world::{World, pattern, read_all, read_pattern, send_pattern, until, within};
use crate::model::TransportChoice::Lanes;
use crate::tunnel::{Config, ResetCode, StreamError};
use bytes::Bytes;
use std::hash::Hasher as _;
use std::sync::Arc;

fn eager(config: &mut Config) {
    config.bulk_bytes = 100_000;
    config.bulk_period = std::time::Duration::from_secs(60);
}

fn hash(total: u64) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    pattern(0, usize::try_from(total).unwrap()).iter().for_each(|byte| hasher.write_u8(*byte));
    hasher.finish()
}

fn exclusive(world: &World) -> Vec<usize> {
    world.tunnel.lanes().iter().filter(|lane| lane.kind == "exclusive").map(|lane| lane.streams).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_moves_under_load_and_keeps_its_bytes() {
    let world = World::with(Lanes, eager);
    let total = 8_000_000;
    let (mut send, mut recv) = world.halves("hash").await;
    send_pattern(&mut send, total, 30_000).await;
    let answer = read_all(&mut recv).await;
    assert_eq!(answer, [total.to_be_bytes(), hash(total).to_be_bytes()].concat());
    assert_eq!(world.metric("tunnel_streams_moved_total", &["outbound"]), 1);
    assert_eq!(world.metric("tunnel_streams_moved_total", &["inbound"]), 1);
    drop((send, recv));
    until("the exclusive lane is free", || exclusive(&world) == [0]).await;
    until("the shared lane is free", || world.tunnel.lanes().iter().all(|lane| lane.streams == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_moves_and_keeps_its_bytes() {
    let world = World::with(Lanes, eager);
    let (mut send, mut recv) = world.halves("source:8000000").await;
    assert_eq!(read_pattern(&mut recv).await, Ok(8_000_000));
    assert_eq!(world.metric("tunnel_streams_moved_total", &["inbound"]), 1);
    send.finish().unwrap();
    drop((send, recv));
    until("the exclusive lane is free", || exclusive(&world) == [0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_move_at_once_in_both_directions_and_reuse_their_lanes() {
    let world = Arc::new(World::with(Lanes, eager));
    for _ in 0..3 {
        let streams: Vec<_> = (0..8)
            .map(|_| {
                let world = Arc::clone(&world);
                tokio::spawn(async move {
                    let (mut send, mut recv) = world.halves("echo").await;
                    let writer = tokio::spawn(async move { send_pattern(&mut send, 1_500_000, 9_000).await });
                    assert_eq!(read_pattern(&mut recv).await, Ok(1_500_000));
                    writer.await.unwrap();
                })
            })
            .collect();
        for stream in streams {
            stream.await.unwrap();
        }
        until("all lanes are free", || world.tunnel.lanes().iter().all(|lane| lane.streams == 0)).await;
    }
    let moved = world.metric("tunnel_streams_moved_total", &["outbound"]);
    assert!(moved >= 8, "{moved} moved");
    let lanes = exclusive(&world).len();
    assert!(lanes <= 8, "{lanes} exclusive lanes for 8 streams at a time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_stays_on_the_shared_lane_when_exclusive_lanes_are_used_up() {
    let world = World::with(Lanes, |config| {
        eager(config);
        config.max_exclusive_lanes = 0;
    });
    let (mut send, mut recv) = world.halves("hash").await;
    send_pattern(&mut send, 2_000_000, 30_000).await;
    assert_eq!(read_all(&mut recv).await, [2_000_000_u64.to_be_bytes(), hash(2_000_000).to_be_bytes()].concat());
    assert_eq!(world.metric("tunnel_streams_moved_total", &[]), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_moved_sender_is_held_back_by_a_sleeping_reader_and_loses_nothing() {
    let world = World::with(Lanes, |config| {
        eager(config);
        // Much shorter than the reader sleeps: a lane that is not read must not count as dead.
        config.keepalive = std::time::Duration::from_millis(50);
        config.dead_after = std::time::Duration::from_millis(300);
    });
    let (mut send, mut recv) = world.halves("sleep").await;
    let mut total = 0_u64;
    loop {
        let sending = send.send(pattern(total, 60_000));
        match tokio::time::timeout(std::time::Duration::from_millis(700), sending).await {
            Ok(sent) => sent.unwrap(),
            Err(_) if world.metric("tunnel_streams_moved_total", &["inbound"]) == 1 => break,
            Err(_) => continue,
        }
        total += 60_000;
    }
    // The reader's buffer, the sender's, and two sockets' of up to 6 MiB each.
    assert!(total < 16 * 1024 * 1024, "{total} bytes were taken");
    let (mut other, mut echo) = world.halves("echo").await;
    other.send(Bytes::from_static(b"not held up")).await.unwrap();
    assert_eq!(within(echo.recv()).await, Ok(Some(Bytes::from_static(b"not held up"))));
    world.wake.notify_one();
    send.finish().unwrap();
    assert_eq!(read_all(&mut recv).await, total.to_be_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_and_stops_reach_a_moved_stream_and_its_lane_is_used_again() {
    let world = World::with(Lanes, eager);
    for (number, code) in [(1_u64, ResetCode(5)), (2, ResetCode::CONNECTION_RESET)] {
        let (mut send, mut recv) = world.halves("outcome").await;
        let mut total = 0;
        while world.metric("tunnel_streams_moved_total", &["outbound"]) < number {
            within(send.send(pattern(total, 20_000))).await.unwrap();
            total += 20_000;
        }
        send.reset(code);
        assert_eq!(read_all(&mut recv).await, format!("{:?}", StreamError::Reset(code)).as_bytes());
        drop((send, recv));
        until("the lane is free", || exclusive(&world) == [0]).await;
    }
    let (send, mut recv) = world.halves("source:100000000").await;
    while world.metric("tunnel_streams_moved_total", &["outbound"]) < 3 {
        within(recv.recv()).await.unwrap();
    }
    recv.stop(ResetCode(1));
    drop((send, recv));
    until("the lane is free", || exclusive(&world) == [0]).await;
    assert_eq!(exclusive(&world).len(), 1, "one exclusive lane served all three");
}
