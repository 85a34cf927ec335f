//! Every byte arrives, in order, and so does every end: FIN, half-close, reset.

use anyhow::Result;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::{Call, End, served};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::SocketAddr;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// A gigabyte through a development build on a busy machine.
const BULK_BOUND: Duration = Duration::from_secs(300);

/// What the kernel and the tunnel have counted, to prove which way the bytes went.
#[derive(Debug, PartialEq, Eq)]
struct Path {
    captured: u64,
    recorded: u64,
    delivered: u64,
    failed: u64,
}

impl Path {
    fn of(cluster: &Cluster) -> Result<Self> {
        let failed = |node: &str| -> Result<u64> {
            Ok(cluster.daemon(node).metrics()?.count("nodemesh_tcp_connections_failed_total", &[]))
        };
        Ok(Self {
            captured: cluster.outcome("n1", "connect", "captured")?,
            recorded: cluster.outcome("n1", "sock_ops", "recorded")?,
            delivered: cluster.outcome("n2", "sk_lookup", "authenticated")?,
            failed: failed("n1")? + failed("n2")?,
        })
    }

    /// That exactly `connections` more were captured in the client's pod, and delivered in the server's, none failing.
    fn assert_grown(&self, cluster: &Cluster, connections: u64) -> Result<()> {
        let expected = Self {
            captured: self.captured + connections,
            recorded: self.recorded + connections,
            delivered: self.delivered + connections,
            failed: self.failed,
        };
        assert_eq!(Self::of(cluster)?, expected);
        Ok(())
    }
}

fn ends(server: &Running) -> Vec<End> {
    served(&server.printed()).into_iter().filter_map(|served| served.end).collect()
}

fn wait_for_end(server: &Running, what: &str, mut wanted: impl FnMut(&End) -> bool) -> Result<End> {
    wait::until(what, BOUND, || ends(server).into_iter().find(&mut wanted))
}

fn transfer(cluster: &Cluster, destination: SocketAddr, bytes: u64) -> Result<Call> {
    let arguments = ["transfer", &destination.to_string(), "--bytes", &bytes.to_string(), "--timeout-millis", "60000"];
    let output = Program::probe(arguments).within(BULK_BOUND).run_in(cluster.world.pod("client"))?;
    output.success()?.json()
}

#[test]
fn a_gigabyte_each_way_arrives_as_sent_and_moves_to_a_lane_of_its_own() -> Result<()> {
    let cluster = Cluster::pair("gigabyte")?;
    let echo = cluster.serve("server", 8080, &[])?;
    let before = Path::of(&cluster)?;
    let [v4, v6] = cluster.catalog.vips("server");
    let call = transfer(&cluster, v4, 1024 * MIB)?;
    assert_eq!((call.bytes_sent, call.bytes_received), (1024 * MIB, 1024 * MIB));
    let end = wait_for_end(&echo, "the server has seen the end", |end| end.bytes_received == 1024 * MIB)?;
    assert_eq!((end.received_hash, end.errno), (call.sent_hash, None));
    before.assert_grown(&cluster, 1)?;
    // Each daemon moved the direction that it sends.
    for node in ["n1", "n2"] {
        let moved = cluster.daemon(node).metrics()?.count("nodemesh_tunnel_streams_moved_total", &[]);
        assert!(moved >= 1, "{node} moved nothing");
    }
    let call = transfer(&cluster, v6, 64 * MIB)?;
    assert_eq!((call.bytes_sent, call.bytes_received), (64 * MIB, 64 * MIB));
    before.assert_grown(&cluster, 2)
}

#[test]
fn bulk_streams_move_while_others_chatter_and_no_byte_is_lost_or_changes_its_place() -> Result<()> {
    let cluster = Cluster::pair("moving")?;
    let _echo = cluster.serve("server", 8080, &[])?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let before = Path::of(&cluster)?;
    let chatter = cluster.hold("client", [&vip, "--count", "8", "--chatter"])?;
    let size = (48 * MIB).to_string();
    let arguments = ["transfer", &vip, "--bytes", &size, "--timeout-millis", "60000"];
    let bulk: Vec<Running> = (0..4)
        .map(|_| Program::probe(arguments).within(BULK_BOUND).start_in(cluster.world.pod("client")))
        .collect::<Result<_>>()?;
    for transfer in bulk {
        let call: Call = transfer.wait()?.success()?.json()?;
        assert_eq!(call.bytes_received, 48 * MIB);
    }
    let call: Call = chatter.wait()?.success()?.json()?;
    assert_eq!(call.connections, 8);
    before.assert_grown(&cluster, 12)?;
    let metrics = cluster.daemon("n1").metrics()?;
    assert!(metrics.count("nodemesh_tunnel_streams_moved_total", &[]) >= 4);
    assert_eq!(metrics.count("nodemesh_tunnel_handshake_failures_total", &[]), 0);
    Ok(())
}

#[test]
fn quic_carries_every_byte_and_every_end_too() -> Result<()> {
    let topology = World::named("quic").node("n1").pod("client").node("n2").pod("server");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.mesh("transport", "quic");
        catalog.service("server", 80, 8080);
    })?;
    let before = Path::of(&cluster)?;
    let echo = cluster.serve("server", 8080, &["--greet"])?;
    for vip in cluster.catalog.vips("server") {
        let arguments = ["transfer", &vip.to_string(), "--greet", "--bytes", &(48 * MIB).to_string()];
        let output = Program::probe(arguments).within(BULK_BOUND).run_in(cluster.world.pod("client"))?;
        let call: Call = output.success()?.json()?;
        assert_eq!((call.bytes_sent, call.bytes_received), (48 * MIB, 48 * MIB));
    }
    let vip = cluster.catalog.vips("server")[0].to_string();
    cluster.run_probe("client", ["reset", &vip, "--greet", "--by", "client"])?;
    wait_for_end(&echo, "the server sees a reset", |end| end.errno.as_deref() == Some("ECONNRESET"))?;
    let many = cluster.run_probe("client", ["many", &vip, "--greet", "--count", "300"])?;
    assert_eq!(many.connections, 300);
    let metrics = cluster.daemon("n1").metrics()?;
    let opened = |transport| metrics.count("nodemesh_tunnel_streams_opened_total", &[("transport", transport)]);
    assert_eq!((opened("quic"), opened("lanes")), (303, 0));
    assert_eq!(cluster.outcome("n1", "connect", "captured")? - before.captured, 303);
    Ok(())
}

#[test]
fn two_thousand_short_connections_at_once_are_all_answered() -> Result<()> {
    let cluster = Cluster::pair("short")?;
    let _echo = cluster.serve("server", 8080, &["--greet", "--name", "server"])?;
    let before = Path::of(&cluster)?;
    let (mut connections, mut bytes) = (0, 0);
    for (vip, address) in cluster.catalog.vips("server").into_iter().zip(cluster.world.pod("client").addresses()) {
        let count = if vip.is_ipv4() { 2_000 } else { 500 };
        let arguments = ["many", &vip.to_string(), "--greet", "--count", &count.to_string(), "--concurrency", "500"];
        let call = cluster.run_probe("client", [&arguments[..], &["--timeout-millis", "60000"]].concat())?;
        assert_eq!(call.connections, count);
        assert_eq!(call.servers["server"], count);
        assert_eq!(call.peers[&address.to_string()], count, "the server sees the client's own address");
        (connections, bytes) = (connections + count, bytes + call.bytes_sent);
    }
    before.assert_grown(&cluster, connections)?;
    for (node, reporter) in [("n1", "source"), ("n2", "destination")] {
        let labels = [("reporter", reporter)];
        let family = "nodemesh_tcp_connections_closed_total";
        let metrics = cluster.wait_for_metrics(node, family, |m| m.count(family, &labels) == connections)?;
        assert_eq!(metrics.count("nodemesh_tcp_connections_opened_total", &labels), connections);
        assert_eq!(metrics.count("nodemesh_tcp_received_bytes_total", &labels), bytes);
    }
    Ok(())
}

#[test]
fn either_side_may_finish_first_and_the_other_direction_goes_on() -> Result<()> {
    let topology = World::named("half").node("n1").pod("client").node("n2").pod("server");
    let cluster = Cluster::start(topology, |catalog| {
        let service = catalog.service("server", 80, 8080);
        service.ports.push((81, 8081.into()));
    })?;
    const BYTES: u64 = 5 * MIB;
    let size = BYTES.to_string();
    let _last = cluster.serve("server", 8080, &["--mode", "finish-last", "--bytes", &size])?;
    let source = cluster.serve("server", 8081, &["--mode", "source", "--bytes", &size])?;
    let before = Path::of(&cluster)?;
    for mut vip in cluster.catalog.vips("server") {
        let run = |vip: SocketAddr, first: &str| {
            cluster.run_probe("client", ["half-close", &vip.to_string(), "--first", first, "--bytes", &size])
        };
        assert_eq!(run(vip, "client")?.bytes_received, BYTES);
        vip.set_port(81);
        let call = run(vip, "server")?;
        assert_eq!((call.bytes_received, call.bytes_sent), (BYTES, BYTES));
        let end =
            wait_for_end(&source, "all arrives after the server's end", |end| end.received_hash == call.sent_hash)?;
        assert_eq!((end.bytes_received, end.errno), (BYTES, None));
    }
    before.assert_grown(&cluster, 4)
}

#[test]
fn a_reset_reaches_the_other_side_as_a_reset() -> Result<()> {
    let topology = World::named("resets").node("n1").pod("client").node("n2").pod("server");
    let cluster = Cluster::start(topology, |catalog| {
        let service = catalog.service("server", 80, 8080);
        service.ports.push((81, 8081.into()));
    })?;
    let echo = cluster.serve("server", 8080, &[])?;
    let _reset = cluster.serve("server", 8081, &["--mode", "reset"])?;
    let captured = cluster.outcome("n1", "connect", "captured")?;
    for (number, vip) in cluster.catalog.vips("server").into_iter().enumerate() {
        cluster.run_probe("client", ["reset", &vip.to_string(), "--by", "client"])?;
        wait::until("the server sees the client's reset", BOUND, || {
            let resets = ends(&echo).iter().filter(|end| end.errno.as_deref() == Some("ECONNRESET")).count();
            (resets == number + 1).then_some(())
        })?;
        let destination = SocketAddr::new(vip.ip(), 81).to_string();
        let call = cluster.run_probe("client", ["reset", &destination, "--by", "server"])?;
        assert_eq!(call.errno.as_deref(), Some("ECONNRESET"));
    }
    assert_eq!(cluster.outcome("n1", "connect", "captured")? - captured, 4);
    // A client that dies in the middle of a transfer must not leave the server waiting.
    let vip = cluster.catalog.vips("server")[0].to_string();
    let held = cluster.hold("client", [&vip, "--count", "3", "--chatter"])?;
    let known = ends(&echo).len();
    drop(held);
    wait::until("the server's connections end with their client", BOUND, || {
        (ends(&echo).len() == known + 3).then_some(())
    })?;
    for node in ["n1", "n2"] {
        let active = |m: &mesh_tests::scrape::Metrics| {
            m.count("nodemesh_tcp_connections_opened_total", &[])
                - m.count("nodemesh_tcp_connections_closed_total", &[])
        };
        cluster.wait_for_metrics(node, "nodemesh_tcp_connections_closed_total", |metrics| active(metrics) == 0)?;
    }
    Ok(())
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() -> Result<()> {
    let cluster = Cluster::pair("greeting")?;
    let _echo = cluster.serve("server", 8080, &["--greet", "--name", "server"])?;
    let before = Path::of(&cluster)?;
    let server = cluster.world.pod("server");
    for (vip, [client, own]) in cluster.catalog.vips("server").into_iter().zip([
        [cluster.world.pod("client").v4().into(), server.v4().into()],
        [std::net::IpAddr::from(cluster.world.pod("client").v6()), server.v6().into()],
    ]) {
        // The probe sends nothing before it has the whole greeting.
        let call = cluster.run_probe("client", ["call", "blocking", &vip.to_string(), "--greet"])?;
        let greeting = call.greeting.expect("it was read");
        assert_eq!(greeting.server, "server");
        assert_eq!(greeting.local, SocketAddr::new(own, 8080).to_string());
        assert_eq!(greeting.peer.parse::<SocketAddr>()?.ip(), client);
        assert_eq!(call.getpeername, Some(vip.to_string()));
    }
    before.assert_grown(&cluster, 2)
}
