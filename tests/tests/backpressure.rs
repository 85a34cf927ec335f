//! A reader asleep stops its sender within a bound, and nobody else.
//!
//! The bound is the sum of what the kernel buffers at each socket on the way and what the daemons may hold
//! (`tunnel::Config`). The kernel's part is made small, so that the daemons' part shows.

use anyhow::Result;
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::{Call, Load};
use mesh_tests::scrape::Metrics;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use mesh_userspace::tunnel::Config;
use rustix::process::Signal;
use std::net::SocketAddr;
use std::time::Duration;

/// Largest buffer of a TCP socket, each direction, in pods and on nodes alike.
const SOCKET_BUFFER: u64 = 256 << 10;
/// The kernel accounts memory, not bytes, and lets the last packet pass: a socket may hold this much more.
const PACKET: u64 = 64 << 10;
/// Largest single read of a relay, and largest piece that it hands on.
const READ: u64 = 256 << 10;
/// Client, daemon; daemon, server: two connections within pods, with two buffers each.
const POD_BUFFERS: u64 = 4 * (SOCKET_BUFFER + PACKET);
/// The connection between the nodes.
const LANE_BUFFERS: u64 = 2 * (SOCKET_BUFFER + PACKET);
/// What QUIC lets a stream have unread, `STREAM_WINDOW` in `tunnel/quic`.
const QUIC_WINDOW: u64 = 1 << 20;
/// How long a sender must be stuck to count as stopped.
const QUIET: &str = "1500";
const TOTAL: u64 = 64 << 20;
/// Connections beside the one that is stuck.
const OTHERS: u64 = 99;
const REQUESTS: u64 = 4_950;

/// Port 80 echoes, port 81 falls asleep after `awake` bytes; every socket buffer is small.
fn cluster(name: &str, transport: &str, awake: u64) -> Result<(Cluster, Running, Running)> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
    let describe = |catalog: &mut Catalog| {
        catalog.mesh("transport", transport);
        let service = catalog.service("server", 80, 8080);
        service.ports.push((81, 8081.into()));
    };
    // One thread has one lane: whoever is beside the sleeper shares it.
    let cluster = Cluster::start_with(topology, describe, |configuration| {
        configuration["limits"] = serde_json::json!({"threads": 1});
    })?;
    let size = SOCKET_BUFFER;
    let values = format!("4096 {size} {size}");
    let namespaces = cluster.world.pods().map(mesh_tests::world::Pod::namespace);
    for namespace in namespaces.chain(cluster.world.nodes().map(mesh_tests::world::Node::namespace)) {
        namespace.set_sysctls(&[("ipv4/tcp_rmem", &values), ("ipv4/tcp_wmem", &values)])?;
    }
    let echo = cluster.serve("server", 8080, &[])?;
    let sleeper = cluster.serve("server", 8081, &["--mode", "hold", "--bytes", &awake.to_string()])?;
    Ok((cluster, echo, sleeper))
}

fn moved(metrics: &Metrics) -> u64 {
    metrics.count("nodemesh_tunnel_streams_moved_total", &[])
}

/// Sends to the sleeper until it is stuck; returns the client and how much was taken that the server has not read.
fn stall(cluster: &Cluster, awake: u64) -> Result<(Running, u64)> {
    let destination = SocketAddr::new(cluster.catalog.vips("server")[0].ip(), 81).to_string();
    let (after, total) = (awake.to_string(), TOTAL.to_string());
    let mut client = Program::probe(["stall", &destination, "--limit", &total, "--resume", &total])
        .args(["--quiet-millis", QUIET, "--after", &after, "--timeout-millis", "60000"])
        .start_in(cluster.world.pod("client"))?;
    let taken = wait::until("the sender is stopped", Duration::from_secs(60), || {
        let printed = client.printed();
        let line = printed.lines().find_map(|line| line.strip_prefix("stalled "));
        // One that has ended is not stopped.
        line.and_then(|number| number.parse::<u64>().ok()).or_else(|| (!client.is_running()).then_some(0))
    })?;
    assert!(taken > awake, "the sender was not stopped: {}", client.printed());
    Ok((client, taken - awake))
}

/// Others are served while one is stuck; then it wakes, and every byte arrives in order.
fn others_work_and_the_sleeper_wakes(cluster: &Cluster, client: Running, sleeper: &Running) -> Result<()> {
    let echo = cluster.catalog.vips("server")[0].to_string();
    let (requests, others) = (REQUESTS.to_string(), OTHERS.to_string());
    let load = ["load", &echo, "--requests", &requests, "--connections", &others, "--size", "1000"];
    let load: Load = Program::probe(load).run_in(cluster.world.pod("client"))?.success()?.json()?;
    assert_eq!((load.connections, load.requests, load.failed), (OTHERS, REQUESTS, 0), "{load:?}");
    println!("{OTHERS} others beside it: p50 {} us, p99 {} us", load.p50_micros, load.p99_micros);
    sleeper.signal(Signal::USR1)?;
    let call: Call = client.wait()?.success()?.json()?;
    assert_eq!(call.bytes_sent, TOTAL);
    assert_eq!(call.sent_hash, call.received_hash);
    Ok(())
}

fn captured(cluster: &Cluster) -> Result<u64> {
    cluster.outcome("n1", "connect", "captured")
}

#[test]
fn a_reader_asleep_on_a_shared_lane_stops_its_sender_and_nobody_else_on_the_lane() -> Result<()> {
    let (cluster, _echo, sleeper) = cluster("asleep", "lanes", 0)?;
    let (client, taken) = stall(&cluster, 0)?;
    let config = Config::default();
    let bound = POD_BUFFERS + u64::from(config.window) + config.send_buffer as u64 + 2 * READ;
    println!("shared lane: the sender was stopped after {taken} bytes; the bound is {bound}");
    assert!(taken <= bound, "{taken} bytes were taken, {bound} is the bound");
    let metrics = cluster.daemon("n1").metrics()?;
    assert_eq!(moved(&metrics), 0, "it stays on the lane that it shares");
    let shared = [("kind", "shared"), ("direction", "outbound")];
    assert_eq!(metrics.count("nodemesh_tunnel_lanes", &shared), 1);
    // The others' lane is the sleeper's.
    let opened = metrics.count("nodemesh_tunnel_lanes_opened_total", &[]);
    let echo = cluster.catalog.vips("server")[0].to_string();
    let chatter = cluster.hold("client", [&echo, "--count", "16", "--chatter"])?;
    let metrics = cluster.daemon("n1").metrics()?;
    assert_eq!(metrics.count("nodemesh_tunnel_lanes_opened_total", &[]), opened);
    assert_eq!(chatter.wait()?.success()?.json::<Call>()?.connections, 16);
    others_work_and_the_sleeper_wakes(&cluster, client, &sleeper)?;
    assert_eq!(captured(&cluster)?, 1 + 16 + OTHERS);
    Ok(())
}

#[test]
fn a_reader_asleep_on_a_lane_of_its_own_stops_its_sender() -> Result<()> {
    const AWAKE: u64 = 24 << 20;
    let (cluster, _echo, sleeper) = cluster("bulkasleep", "lanes", AWAKE)?;
    let (client, taken) = stall(&cluster, AWAKE)?;
    let config = Config::default();
    let held = (config.max_unread + config.send_buffer) as u64 + 3 * READ;
    let bound = POD_BUFFERS + LANE_BUFFERS + held;
    println!("exclusive lane: the sender was stopped after {taken} bytes; the bound is {bound}");
    assert!(taken <= bound, "{taken} bytes were taken, {bound} is the bound");
    assert!(moved(&cluster.daemon("n1").metrics()?) >= 1, "it was bulk and moved");
    others_work_and_the_sleeper_wakes(&cluster, client, &sleeper)?;
    assert_eq!(captured(&cluster)?, 1 + OTHERS);
    Ok(())
}

#[test]
fn a_reader_asleep_on_quic_stops_its_sender_and_nobody_else() -> Result<()> {
    let (cluster, _echo, sleeper) = cluster("quicasleep", "quic", 0)?;
    let (client, taken) = stall(&cluster, 0)?;
    let bound = POD_BUFFERS + QUIC_WINDOW + 2 * READ;
    println!("QUIC: the sender was stopped after {taken} bytes; the bound is {bound}");
    assert!(taken <= bound, "{taken} bytes were taken, {bound} is the bound");
    others_work_and_the_sleeper_wakes(&cluster, client, &sleeper)?;
    let metrics = cluster.daemon("n1").metrics()?;
    assert_eq!(metrics.count("nodemesh_tunnel_streams_opened_total", &[("transport", "quic")]), 1 + OTHERS);
    Ok(())
}

#[test]
fn a_client_asleep_stops_the_server_that_sends_to_it() -> Result<()> {
    let (cluster, _echo, _sleeper) = cluster("sleepyclient", "lanes", 0)?;
    let _source = cluster.serve("server", 8082, &["--mode", "source", "--bytes", &TOTAL.to_string()])?;
    let destination = SocketAddr::new(cluster.world.pod("server").v4().into(), 8082).to_string();
    let arguments = ["transfer", &destination, "--server", "source", "--bytes", &TOTAL.to_string()];
    let mut client = Program::probe(arguments).args(["--asleep"]).start_in(cluster.world.pod("client"))?;
    client.wait_for_text("asleep")?;
    // Stopped is: the far daemon takes no more from the server for longer than anything else here takes.
    let taken = || -> Result<u64> { Ok(cluster.daemon("n2").metrics()?.count("nodemesh_tcp_sent_bytes_total", &[])) };
    let (mut last, mut unchanged) = (0, 0);
    let taken = wait::until("the server is stopped", BOUND, || {
        let now = taken().ok()?;
        unchanged = if now == last && now > 0 { unchanged + 1 } else { 0 };
        last = now;
        (unchanged == 100).then_some(now)
    })?;
    let config = Config::default();
    // Whether it moved before it was stopped depends on its speed; the larger bound holds for both.
    let held = u64::from(config.window) + (config.max_unread + config.send_buffer) as u64 + 3 * READ;
    let bound = POD_BUFFERS / 2 + LANE_BUFFERS + held;
    println!("towards the client: the server was stopped after {taken} bytes; the bound is {bound}");
    assert!(taken <= bound, "{taken} bytes were taken, {bound} is the bound");
    let echo = cluster.catalog.vips("server")[0].to_string();
    let load = ["load", &echo, "--requests", "500", "--connections", "4"];
    let load: Load = Program::probe(load).run_in(cluster.world.pod("client"))?.success()?.json()?;
    assert_eq!(load.failed, 0, "{load:?}");
    // The end of its input wakes the client.
    let call: Call = client.wait()?.success()?.json()?;
    assert_eq!(call.bytes_received, TOTAL);
    assert_eq!(captured(&cluster)?, 1 + 4);
    Ok(())
}
