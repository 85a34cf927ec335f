//! Two pods with the same source address and port, calling the same service at the same moment: every connection is
//! the right pod's, under that pod's identity and from that pod's address.

use anyhow::{Context, Result, ensure};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Call;
use mesh_tests::wait;
use mesh_tests::world::World;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

const PODS: [&str; 2] = ["one", "two"];
/// Connections of each pod from each source address.
const CONNECTIONS: usize = 1_300;
/// How many a pod holds open when the other one holds the same ones.
const TOGETHER: usize = 260;
const FIRST_PORT: u16 = 20_000;
/// What both pods have beside their own addresses.
const SHARED: [&str; 2] = ["198.51.100.7/32", "2001:db8::7/128"];
/// Where connections come from: the shared addresses, and loopback, which every pod has.
const SOURCES: [&str; 4] = ["198.51.100.7", "2001:db8::7", "127.0.0.1", "::1"];
/// A round is hundreds of connections of a daemon that was built for debugging.
const ROUND_BOUND: Duration = Duration::from_secs(60);

#[test]
fn two_pods_with_the_same_source_address_and_port_are_never_mixed_up() -> Result<()> {
    let topology = World::named("same").node("n1").pods(&PODS).node("n2").pod("server");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
    })?;
    for pod in PODS {
        let additions = SHARED.map(|address| format!("address add {address} dev lo"));
        cluster.world.pod(pod).namespace().ip(&additions)?;
    }
    let mut echo = Program::probe(["echo", "--port", "8080", "--greet"]).start_in(cluster.world.pod("server"))?;
    echo.wait_for_listener(8080)?;
    for pod in PODS {
        cluster.wait_until_served(pod, "server")?;
    }
    let (n1, n2) = (cluster.daemon("n1"), cluster.daemon("n2"));
    let ((calls, arrival), departure) = n1.change_during(|| n2.change_during(|| all_sources(&cluster)))?;

    let each = (SOURCES.len() * CONNECTIONS) as u64;
    let accepts = each * PODS.len() as u64;
    ensure!(accepts >= 10_000, "{accepts} connections prove too little");
    for (hook, reason) in [("connect", "captured"), ("sock_ops", "recorded")] {
        assert_eq!(departure.outcome(hook, reason), accepts, "{:?}", departure.outcomes());
    }
    assert_eq!(departure.of(|metrics| metrics.count("nodemesh_tcp_connections_failed_total", &[])), 0);
    assert_eq!(arrival.outcome("sk_lookup", "authenticated"), accepts, "{:?}", arrival.outcomes());
    for pod in PODS {
        let principal = cluster.authority.spiffe_id(NAMESPACE, pod);
        let labels = [("reporter", "destination"), ("source_principal", principal.as_str())];
        let opened = arrival.of(|metrics| metrics.count("nodemesh_tcp_connections_opened_total", &labels));
        assert_eq!(opened, each, "connections under the identity of {pod}");
    }
    // The server's own view: each pod's connections came from that pod's address, and from nowhere else.
    for (pod, call) in calls {
        let peer = call.peers.keys().next().context("nobody was greeted")?.parse()?;
        let own =
            cluster.world.pod(pod).addresses().into_iter().find(|own: &IpAddr| own.is_ipv4() == IpAddr::is_ipv4(&peer));
        let own = own.context("a pod has both families")?.to_string();
        assert_eq!(call.peers, [(own, CONNECTIONS as u64)].into(), "{pod}: {call:?}");
    }
    Ok(())
}

/// Both pods call from one source address after the other, always both at once.
fn all_sources(cluster: &Cluster) -> Result<Vec<(&'static str, Call)>> {
    let mut calls = Vec::new();
    for source in SOURCES {
        let meeting = cluster.world.folder().join("meeting");
        let listener = UnixListener::bind(&meeting)?;
        let mut callers = Vec::new();
        for pod in PODS {
            callers.push((pod, start_calls(cluster, pod, source.parse()?, &meeting)?));
        }
        meet(&listener).with_context(|| callers.iter().map(|(_, caller)| caller.printed()).collect::<String>())?;
        for (pod, caller) in callers {
            let call: Call = caller.wait()?.success()?.json()?;
            ensure!(call.connections == CONNECTIONS as u64, "{pod}: {call:?}");
            calls.push((pod, call));
        }
        std::fs::remove_file(meeting)?;
    }
    Ok(calls)
}

fn start_calls(cluster: &Cluster, pod: &str, source: IpAddr, meeting: &Path) -> Result<Running> {
    let vip = cluster.catalog.vips("server")[usize::from(source.is_ipv6())];
    let meeting = meeting.to_str().context("a plain path")?;
    Program::probe(["many", &vip.to_string(), "--greet", "--meeting", meeting])
        .args(["--source", &SocketAddr::new(source, FIRST_PORT).to_string(), "--timeout-millis", "60000"])
        .args(["--count", &CONNECTIONS.to_string(), "--concurrency", &TOGETHER.to_string()])
        .start_in(cluster.world.pod(pod))
}

/// Lets both pods go on whenever both hold a full batch of connections.
fn meet(listener: &UnixListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut guests = Vec::<UnixStream>::new();
    for pod in PODS {
        let guest = wait::until_ok(&format!("{pod} comes to the meeting"), wait::BOUND, || Ok(listener.accept()?.0))?;
        guest.set_nonblocking(false)?;
        guest.set_read_timeout(Some(ROUND_BOUND))?;
        guests.push(guest);
    }
    for round in 0..CONNECTIONS.div_ceil(TOGETHER) {
        for guest in &mut guests {
            guest.read_exact(&mut [0]).with_context(|| format!("in round {round}"))?;
        }
        for guest in &mut guests {
            guest.write_all(&[0])?;
        }
    }
    Ok(())
}
