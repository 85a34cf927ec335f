//! The testbed itself, without a mesh: what scenarios rely on.

use anyhow::Result;
use mesh_tests::cgroup;
use mesh_tests::program::{Program, binary};
use mesh_tests::report::{Call, Capture, Load, served};
use mesh_tests::sweep::sweep;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery};
use rustix::process::Signal;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Stdio};

const MARKER: &str = "the-quick-brown-marker";

#[test]
fn pods_reach_each_other_across_nodes_and_the_wiretap_reads_along() -> Result<()> {
    let world = World::named("plain").node("n1").pod("client").node("n2").pod("server").build()?;
    let (client, server) = (world.pod("client"), world.pod("server"));
    let mut echo = Program::probe(["echo", "--port", "8080", "--greet", "--name", "s"]).start_in(server)?;
    echo.wait_for_listener(8080)?;
    let mut tap = Program::probe(["sniff", "--device", "n1", "--marker", MARKER, "--marker", "absent"])
        .start_in(&mesh_tests::program::Place { namespace: world.switch().path().into(), ..world.node("n1").into() })?;
    tap.wait_for_text("watching")?;
    for address in server.addresses() {
        let destination = std::net::SocketAddr::new(address, 8080).to_string();
        let output = Program::probe(["call", "blocking", &destination, "--greet", "--message", MARKER])
            .run_in(client)?
            .success()?;
        let call: Call = output.json()?;
        let greeting = call.greeting.expect("the server speaks first");
        assert_eq!(call.getpeername.as_deref(), Some(destination.as_str()));
        assert_eq!(greeting.local, destination);
        assert_eq!(call.getsockname.as_deref(), Some(greeting.peer.as_str()));
    }
    let capture: Capture = tap.stop()?.success()?.json()?;
    assert_eq!(capture.lost, 0);
    // To and fro, over both families.
    assert_eq!(capture.markers[MARKER], 4);
    assert_eq!(capture.markers["absent"], 0);
    assert!(capture.bytes_on(8080) > 4 * MARKER.len() as u64);
    Ok(())
}

#[test]
fn packets_of_the_size_that_is_asked_for_pass_from_pod_to_pod_and_no_larger_ones() -> Result<()> {
    // 28 bytes of each are heads.
    for (mtu, passes) in [(1_500, 1_472), (9_000, 8_972)] {
        let world = World::named("wide").mtu(mtu).node("n1").pod("client").node("n2").pod("server").build()?;
        let (client, server) = (world.pod("client"), world.pod("server"));
        let receiver = server.namespace().enter(|| UdpSocket::bind((server.v4(), 7000)))??;
        receiver.set_read_timeout(Some(BOUND))?;
        let sender = client.namespace().enter(|| UdpSocket::bind((client.v4(), 0)))??;
        // Whole or not at all.
        sockopt::set_ip_mtu_discover(&sender, Ipv4PathMtuDiscovery::DO)?;
        let mut buffer = [0; 10_000];
        assert_eq!(sender.send_to(&buffer[..passes], (server.v4(), 7000))?, passes);
        assert_eq!(receiver.recv(&mut buffer)?, passes);
        let refused = sender.send_to(&buffer[..=passes], (server.v4(), 7000)).expect_err("it is too large");
        assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::MSGSIZE.raw_os_error()), "{mtu}");
    }
    Ok(())
}

#[test]
fn every_way_to_connect_works_without_a_mesh() -> Result<()> {
    let world = World::named("ways").node("n1").pods(&["client", "server"]).build()?;
    let (client, server) = (world.pod("client"), world.pod("server"));
    let mut echo = Program::probe(["echo", "--port", "8080"]).start_in(server)?;
    echo.wait_for_listener(8080)?;
    let [v4, v6] = server.addresses().map(|address| std::net::SocketAddr::new(address, 8080).to_string());
    let source = format!("{}:0", client.v4());
    let call = |arguments: &[&str]| -> Result<Call> {
        Program::probe([&["call"], arguments].concat()).run_in(client)?.success()?.json()
    };
    for way in
        ["blocking", "nonblocking", "bind", "reconnect", "fastopen-connect", "msg-fastopen", "bind-device", "io-uring"]
    {
        assert_eq!(call(&[way, &v4])?.getpeername.as_ref(), Some(&v4), "{way}");
        assert_eq!(call(&[way, &v6])?.getpeername.as_ref(), Some(&v6), "{way}");
    }
    assert_eq!(call(&["v4-mapped", &v4])?.getpeername.as_ref(), Some(&v4));
    let bound = call(&["bind", &v4, "--source", &source])?;
    assert!(bound.getsockname.is_some_and(|own| own.starts_with(&format!("{}:", client.v4()))));
    Ok(())
}

#[test]
fn clients_and_servers_of_the_probe_agree() -> Result<()> {
    let world = World::named("manners").node("n1").pods(&["client", "server"]).build()?;
    let (client, server) = (world.pod("client"), world.pod("server"));
    let start = |port: u16, arguments: &[&str]| {
        let mut running = Program::probe(["echo", "--port", &port.to_string()]).args(arguments).start_in(server)?;
        running.wait_for_listener(port)?;
        anyhow::Ok(running)
    };
    let echo = start(1, &["--greet", "--name", "e"])?;
    let _sink = start(2, &["--mode", "sink"])?;
    let source = start(3, &["--mode", "source", "--bytes", "3000000"])?;
    let _last = start(4, &["--mode", "finish-last", "--bytes", "3000000"])?;
    let _reset = start(5, &["--mode", "reset"])?;
    let hold = start(6, &["--mode", "hold", "--bytes", "100000"])?;
    let at = |port: u16| format!("{}:{port}", server.v4());
    let run = |arguments: &[&str]| -> Result<Call> { Program::probe(arguments).run_in(client)?.success()?.json() };

    let moved = run(&["transfer", &at(1), "--greet", "--bytes", "5000000"])?;
    assert_eq!((moved.bytes_sent, moved.bytes_received), (5_000_000, 5_000_000));
    assert_eq!(run(&["transfer", &at(2), "--bytes", "5000000", "--server", "sink"])?.bytes_sent, 5_000_000);
    assert_eq!(run(&["transfer", &at(3), "--bytes", "3000000", "--server", "source"])?.bytes_received, 3_000_000);
    assert_eq!(run(&["half-close", &at(4), "--first", "client", "--bytes", "3000000"])?.bytes_received, 3_000_000);
    let sent = run(&["half-close", &at(3), "--first", "server", "--bytes", "3000000"])?.sent_hash;
    wait::until("the server has seen the client's end", BOUND, || {
        let ends = served(&source.printed()).into_iter().filter_map(|served| served.end);
        ends.into_iter().any(|end| end.received_hash == sent && end.errno.is_none()).then_some(())
    })?;
    assert_eq!(run(&["reset", &at(5), "--by", "server"])?.errno.as_deref(), Some("ECONNRESET"));
    run(&["reset", &at(1), "--greet", "--by", "client"])?;
    wait::until("the server has seen the client's reset", BOUND, || {
        let ends = served(&echo.printed()).into_iter().filter_map(|served| served.end);
        ends.into_iter().any(|end| end.errno.as_deref() == Some("ECONNRESET")).then_some(())
    })?;
    let stalled = run(&["stall", &at(6), "--limit", "1000000000", "--quiet-millis", "300", "--after", "100000"])?;
    assert!(stalled.bytes_sent > 100_000);
    let resume = ["stall", &at(6), "--limit", "1000000000", "--quiet-millis", "300", "--resume", "30000000"];
    let mut resumed = Program::probe(resume).start_in(client)?;
    resumed.wait_for_text("stalled")?;
    hold.signal(Signal::USR1)?;
    assert_eq!(resumed.wait()?.success()?.json::<Call>()?.bytes_sent, 30_000_000);
    let mut held = Program::probe(["hold", &at(1), "--greet", "--count", "20", "--chatter"]).start_in(client)?;
    held.wait_for_text("holding 20")?;
    assert_eq!(held.wait()?.success()?.json::<Call>()?.connections, 20);
    let many = run(&["many", &at(1), "--greet", "--count", "300", "--source", &format!("{}:20000", client.v4())])?;
    assert_eq!((many.connections, many.servers["e"], many.peers[&client.v4().to_string()]), (300, 300, 300));

    let refused = Program::probe(["call", "blocking", &at(7)]).run_in(client)?;
    assert!(!refused.status.success());
    assert_eq!(refused.json::<Call>()?.errno.as_deref(), Some("ECONNREFUSED"));
    Ok(())
}

#[test]
fn the_load_client_counts_what_it_did() -> Result<()> {
    let world = World::named("load").node("n1").pods(&["client", "server"]).build()?;
    let mut echo = Program::probe(["echo", "--port", "80"]).start_in(world.pod("server"))?;
    echo.wait_for_listener(80)?;
    let destination = format!("{}:80", world.pod("server").v4());
    let load: Load =
        Program::probe(["load", &destination, "--requests", "500"]).run_in(world.pod("client"))?.success()?.json()?;
    assert_eq!((load.requests, load.failed, load.connections), (500, 0, 8));
    assert_eq!(load.bytes_received, 500 * 128);
    assert!(load.p50_micros <= load.p99_micros && load.p99_micros <= load.max_micros);
    Ok(())
}

#[test]
fn a_pod_can_be_removed_and_added_while_the_world_runs() -> Result<()> {
    let mut world = World::named("change").node("n1").pods(&["a", "b"]).build()?;
    let mut sleeper = Program::new("sleep").args(["1000"]).start_in(world.pod("b"))?;
    assert!(world.node("n1").has_link("b")?);
    let link = world.remove_pod("b")?;
    wait::until("the pod's process ends", BOUND, || (!sleeper.is_running()).then_some(()))?;
    let node = world.node("n1");
    wait::until("the pod's namespace disappears", BOUND, || (!node.has_link(&link).ok()?).then_some(()))?;
    let b = world.add_pod("n1", "b")?;
    let mut echo = Program::probe(["echo", "--port", "80"]).start_in(b)?;
    echo.wait_for_listener(80)?;
    let destination = format!("[{}]:80", b.v6());
    Program::probe(["call", "blocking", &destination]).run_in(world.pod("a"))?.success()?;
    Ok(())
}

#[test]
fn names_that_do_not_fit_a_link_and_the_root_group_are_refused() {
    for name in ["", "A", "a_b", "sixteen-letters-", "eth0", "pods"] {
        assert!(World::named("names").node(name).build().is_err(), "{name:?} was taken as a node's name");
    }
    assert!(World::named("../..").node("n1").build().is_err());
}

#[test]
fn a_world_whose_process_was_killed_is_swept() -> Result<()> {
    let mut owner = Command::new(binary("mesh-world")).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut names = String::new();
    let stdout = owner.stdout.take().expect("it is piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut names)?;
    let names: Vec<&str> = names.split_whitespace().collect();
    let [group, namespace, folder, sleeper] = names[..] else { panic!("mesh-world printed {names:?}") };
    assert!(Path::new(group).is_dir() && Path::new(namespace).exists() && Path::new(folder).is_dir());
    assert!(group.starts_with(cgroup::mount_point()?.to_str().expect("a plain path")));
    // While its owner lives, a world is left alone.
    sweep()?;
    assert!(Path::new(group).is_dir() && Path::new(namespace).exists() && Path::new(folder).is_dir());
    rustix::process::kill_process(rustix::process::Pid::from_child(&owner), Signal::KILL)?;
    owner.wait()?;
    let swept = sweep()?;
    assert!(!swept.is_empty());
    for path in [group, namespace, folder, &format!("/proc/{sleeper}")] {
        wait::until(&format!("{path} is gone"), BOUND, || (!Path::new(path).exists()).then_some(()))?;
    }
    Ok(())
}
