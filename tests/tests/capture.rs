//! Every way in which programs connect is captured, and nobody in the pods can tell: each end sees the addresses that
//! it would see without a mesh. Each step also holds the kernel's counters against what was done.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Place, Program, Running};
use mesh_tests::report::{Call, Capture};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::fs;
use std::net::{IpAddr, SocketAddr};

const MARKER: &str = "the-text-that-nobody-may-read-between-the-nodes";

/// What the kernel counts for one captured connection of the client's node, beyond getpeername().
const CAPTURED: [(&str, &str); 2] = [("connect", "captured"), ("sock_ops", "recorded")];

/// `client` on n1 and an echo server on n2 that says how it sees a connection.
struct Pair {
    cluster: Cluster,
    _echo: Running,
    transport: &'static str,
}

impl Pair {
    fn start(name: &str, transport: &'static str) -> Result<Self> {
        let topology = World::named(name).node("n1").pod("client").node("n2").pod("server");
        let cluster = Cluster::start(topology, |catalog| {
            catalog.mesh("transport", transport);
            catalog.service("server", 80, 8080);
        })?;
        let mut echo = Program::probe(["echo", "--port", "8080", "--greet"]).start_in(cluster.world.pod("server"))?;
        echo.wait_for_listener(8080)?;
        cluster.wait_until_served("client", "server")?;
        Ok(Self { cluster, _echo: echo, transport })
    }

    fn client(&self, like: IpAddr) -> IpAddr {
        self.cluster.world.pod("client").addresses()[usize::from(like.is_ipv6())]
    }

    fn server(&self, like: IpAddr) -> SocketAddr {
        SocketAddr::new(self.cluster.world.pod("server").addresses()[usize::from(like.is_ipv6())], 8080)
    }

    /// One connection in a given way, and everything that must be true of it. `connects` is how often the program
    /// called connect().
    fn connect(&self, way: &str, destination: SocketAddr, source: Option<&str>, connects: u64) -> Result<()> {
        let text = destination.to_string();
        let mut arguments = vec!["call", way, &text, "--greet", "--message", MARKER];
        arguments.extend(source.iter().flat_map(|source| ["--source", source]));
        let (n1, n2) = (self.cluster.daemon("n1"), self.cluster.daemon("n2"));
        let ((call, arrival), departure) =
            n1.change_during(|| n2.change_during(|| self.cluster.attempt("client", &arguments)))?;
        let context =
            || format!("{way} to {destination}: {call:?}, {:?}, {:?}", departure.outcomes(), arrival.outcomes());

        ensure!(call.ok && call.bytes_received == MARKER.len() as u64, "failed: {}", context());
        let seen = self.as_seen(&call).with_context(context)?;
        ensure!(seen.getpeername == destination, "getpeername: {}", context());
        ensure!(seen.getsockname.ip() == self.client(destination.ip()), "getsockname: {}", context());
        ensure!(seen.peer.ip() == self.client(destination.ip()), "the server's view of the client: {}", context());
        ensure!(seen.local == self.server(destination.ip()), "the server's own end: {}", context());

        for (hook, reason) in CAPTURED {
            ensure!(departure.outcome(hook, reason) == connects, "{hook}/{reason}: {}", context());
        }
        ensure!(departure.outcome("getpeername", "rewritten") == 1, "getpeername: {}", context());
        ensure!(arrival.outcome("sk_lookup", "authenticated") == 1, "sk_lookup: {}", context());
        ensure!(arrival.of(|metrics| metrics.opened("destination")) == 1, "opened: {}", context());
        for (change, direction) in [(&departure, "outbound"), (&arrival, "inbound")] {
            let labels = [("transport", self.transport), ("direction", direction)];
            let streams = change.of(|metrics| metrics.count("nodemesh_tunnel_streams_opened_total", &labels));
            ensure!(streams == 1, "{streams} streams {direction}: {}", context());
        }
        Ok(())
    }

    fn as_seen(&self, call: &Call) -> Result<Seen> {
        let greeting = call.greeting.as_ref().context("no greeting")?;
        let address = |text: &Option<String>| anyhow::Ok(text.as_deref().context("no address")?.parse()?);
        Ok(Seen {
            getpeername: address(&call.getpeername)?,
            getsockname: address(&call.getsockname)?,
            peer: greeting.peer.parse()?,
            local: greeting.local.parse()?,
        })
    }

    /// Where the client may connect to: the service's virtual addresses and the workload's own.
    fn destinations(&self) -> Vec<SocketAddr> {
        let own = self.cluster.world.pod("server").addresses().map(|ip| SocketAddr::new(ip, 8080));
        [self.cluster.catalog.vips("server"), own].concat()
    }
}

/// A connection's addresses: the client's view of both ends, then the server's.
struct Seen {
    getpeername: SocketAddr,
    getsockname: SocketAddr,
    peer: SocketAddr,
    local: SocketAddr,
}

/// Watches everything that a node sends and receives, for `markers`.
fn tap(cluster: &Cluster, node: &str, markers: &[&str]) -> Result<Running> {
    let place = Place { namespace: cluster.world.switch().path().into(), ..cluster.world.node(node).into() };
    let markers = markers.iter().flat_map(|marker| ["--marker", marker]);
    let mut tap = Program::probe(["sniff", "--device", node]).args(markers).start_in(&place)?;
    tap.wait_for_text("watching")?;
    Ok(tap)
}

/// Nothing between the nodes was readable, nothing left outside of the tunnel, and the tunnel carried something.
fn assert_sealed(tap: Running) -> Result<()> {
    let capture: Capture = tap.stop()?.success()?.json()?;
    assert_eq!(capture.lost, 0, "the wiretap missed packets");
    assert_eq!(capture.plaintext(), 0, "{capture:?}");
    for port in [80, 8080, 15001] {
        assert_eq!(capture.bytes_on(port), 0, "{capture:?}");
    }
    assert!(capture.bytes_on(15008) > 0, "{capture:?}");
    Ok(())
}

#[test]
fn every_way_to_connect_is_captured_and_carried_by_lanes() -> Result<()> {
    let pair = Pair::start("ways", "lanes")?;
    let taps = [tap(&pair.cluster, "n1", &[MARKER])?, tap(&pair.cluster, "n2", &[MARKER])?];
    for destination in pair.destinations() {
        for way in ["blocking", "nonblocking", "bind", "fastopen-connect", "msg-fastopen", "bind-device", "io-uring"] {
            pair.connect(way, destination, None, 1)?;
        }
        let own = SocketAddr::new(pair.client(destination.ip()), 0).to_string();
        pair.connect("bind", destination, Some(&own), 1)?;
        // The first association is dissolved before it carries anything; the second one is the connection.
        let (n1, way) = (pair.cluster.daemon("n1"), "reconnect");
        let (reached, change) =
            n1.change_during(|| pair.cluster.attempt("client", &["call", way, &destination.to_string(), "--greet"]))?;
        assert!(reached.ok, "{reached:?}");
        assert_eq!(reached.getpeername, Some(destination.to_string()));
        for (hook, reason) in CAPTURED {
            assert_eq!(change.outcome(hook, reason), 2, "{hook}/{reason}: {:?}", change.outcomes());
        }
        if destination.is_ipv4() {
            pair.connect("v4-mapped", destination, None, 1)?;
        }
    }
    taps.into_iter().try_for_each(assert_sealed)
}

#[test]
fn connections_are_captured_and_carried_by_quic() -> Result<()> {
    let pair = Pair::start("quic", "quic")?;
    let tap = tap(&pair.cluster, "n1", &[MARKER])?;
    for destination in pair.destinations() {
        for way in ["blocking", "nonblocking", "msg-fastopen", "io-uring"] {
            pair.connect(way, destination, None, 1)?;
        }
    }
    assert_sealed(tap)
}

/// With TCP Fast Open in full swing the first bytes are in the SYN, before the daemon has accepted anything.
#[test]
fn data_in_the_first_packet_arrives() -> Result<()> {
    // Send and accept data without a cookie, on every listener.
    const EVERYWHERE: &str = "1543";
    let mut pair = Pair::start("fastopen", "lanes")?;
    let client = pair.cluster.world.pod("client").namespace();
    client.set_sysctls(&[("ipv4/tcp_fastopen", EVERYWHERE)])?;
    // A listener becomes a Fast Open listener when it is made.
    let n1 = pair.cluster.daemon_mut("n1");
    n1.stop()?;
    n1.start()?;
    pair.cluster.wait_until_served("client", "server")?;
    let client = pair.cluster.world.pod("client").namespace();
    let fast = || client.enter(|| fast_open_passive(&fs::read_to_string("/proc/thread-self/net/netstat")?))?;
    for destination in pair.destinations() {
        for way in ["fastopen-connect", "msg-fastopen"] {
            let before = fast()?;
            pair.connect(way, destination, None, 1)?;
            assert_eq!(fast()? - before, 1, "{way} to {destination} did not send its data in the SYN");
        }
    }
    Ok(())
}

/// Connections that a namespace accepted with data in their SYN.
fn fast_open_passive(netstat: &str) -> Result<u64> {
    let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(name, _)| *name == "TCPFastOpenPassive").context("no such counter")?;
    Ok(value.parse()?)
}

/// curl -> nginx -> nginx: two captured hops, the first one towards n1, the second one back to n2.
#[test]
fn curl_and_nginx_proxy_pass_are_captured() -> Result<()> {
    let topology = World::named("web").node("n1").pod("proxy").node("n2").pods(&["client", "web"]);
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("web", 80, 8080);
        catalog.service("proxy", 80, 8000);
    })?;
    let _web = nginx(&cluster, "web", 8080, "location / { return 200 'peer=$remote_addr own=$server_addr'; }")?;
    let [web4, web6] = cluster.catalog.vips("web");
    let hops = format!(
        "add_header X-Caller $remote_addr; \
         location /v4 {{ proxy_pass http://{web4}; }} location /v6 {{ proxy_pass http://{web6}; }}"
    );
    let _proxy = nginx(&cluster, "proxy", 8000, &hops)?;
    let (client, proxy, web) = (cluster.world.pod("client"), cluster.world.pod("proxy"), cluster.world.pod("web"));
    let [proxy4, proxy6] = cluster.catalog.vips("proxy");
    let resolve = format!("proxy.default:80:[{}],{}", proxy6.ip(), proxy4.ip());
    let curl = |arguments: &[&str]| {
        Program::new("curl")
            .args(["--silent", "--show-error", "--include", "--max-time", "10"])
            .args(arguments)
            .run_in(client)?
            .success()
    };
    wait::until_ok("both hops answer", BOUND, || curl(&["--fail", &format!("http://{proxy4}/v4")]))?;
    // By name, curl prefers IPv6.
    for (url, caller) in [
        (format!("http://{proxy4}"), IpAddr::from(client.v4())),
        (format!("http://{proxy6}"), client.v6().into()),
        ("http://proxy.default".to_owned(), client.v6().into()),
    ] {
        for (path, hop, own) in
            [("v4", IpAddr::from(proxy.v4()), IpAddr::from(web.v4())), ("v6", proxy.v6().into(), web.v6().into())]
        {
            let url = format!("{url}/{path}");
            let ((answer, back), there) = cluster.daemon("n2").change_during(|| {
                cluster.daemon("n1").change_during(|| curl(&["--fail", "--resolve", &resolve, &url]))
            })?;
            let printed = answer.stdout;
            assert!(printed.contains(&format!("X-Caller: {caller}")), "{url}: {printed}");
            assert!(printed.contains(&format!("peer={hop} own={own}")), "{url}: {printed}");
            assert_eq!(there.outcome("connect", "captured"), 1, "{url}: {:?}", there.outcomes());
            assert_eq!(back.outcome("connect", "captured"), 1, "{url}: {:?}", back.outcomes());
            assert_eq!(there.outcome("sk_lookup", "authenticated"), 1, "{url}: {:?}", there.outcomes());
            assert_eq!(back.outcome("sk_lookup", "authenticated"), 1, "{url}: {:?}", back.outcomes());
        }
    }
    Ok(())
}

/// An nginx with one server in a pod, in a folder of its own.
fn nginx(cluster: &Cluster, pod: &str, port: u16, server: &str) -> Result<Running> {
    let folder = cluster.world.folder().join(format!("nginx-{pod}"));
    fs::create_dir(&folder)?;
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {}/{kind};", folder.display()))
        .collect();
    let configuration = format!(
        "daemon off; master_process off; error_log stderr; pid {0}/nginx.pid; events {{}}\n\
         http {{ access_log off; {temporary}\n server {{ listen {port}; listen [::]:{port}; {server} }} }}\n",
        folder.display()
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, configuration)?;
    let mut nginx = Program::new("nginx")
        .args(["-p".as_ref(), folder.as_os_str(), "-c".as_ref(), file.as_os_str()])
        .start_in(cluster.world.pod(pod))?;
    nginx.wait_for_listener(port)?;
    Ok(nginx)
}
