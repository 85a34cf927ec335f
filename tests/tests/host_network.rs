//! Processes in their nodes' own network namespaces: meshed both ways under an identity that their cgroup gives them
//! and that no handing on of sockets takes along; and everything else of the node as it was.

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Place, Program, Running};
use mesh_tests::report::{Call, Capture};
use mesh_tests::scrape::Metrics;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::fs;
use std::net::{IpAddr, SocketAddr};

const MARKER: &str = "the-text-that-nobody-may-read-between-the-nodes";
/// What the host workloads declare and serve.
const PORT: u16 = 8080;
/// What nobody declares.
const UNDECLARED: u16 = 9090;

/// n1: pods `client` and `outsider`, host processes `web`, `agent` and `other`. n2: pod `server`, host processes
/// `remote` and `stray`. Not in the catalog: `outsider`, `other`, `stray`. All others serve port 8080, and are services
/// at port 80 except `agent` and `client`.
struct Scene {
    cluster: Cluster,
    _echoes: Vec<Running>,
}

impl Scene {
    fn start(name: &str) -> Result<Self> {
        let topology = World::named(name)
            .node("n1")
            .pods(&["client", "outsider"])
            .host("web")
            .host("agent")
            .host("other")
            .node("n2")
            .pod("server")
            .host("remote")
            .host("stray");
        let cluster = Cluster::start(topology, |catalog| {
            for name in ["outsider", "other", "stray"] {
                assert!(catalog.remove(name));
            }
            for name in ["web", "remote"] {
                catalog.workload(name).ports.insert("http".to_owned(), PORT);
                catalog.service(name, 80, "http");
            }
            catalog.workload("agent").ports.insert("status".to_owned(), 9100);
            catalog.service("server", 80, PORT);
        })?;
        let mut echoes = Vec::new();
        for (name, port) in [("web", PORT), ("remote", PORT), ("server", PORT), ("other", UNDECLARED)] {
            echoes.push(cluster.serve(name, port, &["--greet", "--name", name])?);
        }
        let scene = Self { cluster, _echoes: echoes };
        for (from, to) in [("client", "web"), ("client", "remote"), ("agent", "server"), ("server", "web")] {
            scene.cluster.wait_until_served(from, to)?;
        }
        Ok(scene)
    }

    fn addresses(&self, name: &str) -> [IpAddr; 2] {
        let world = &self.cluster.world;
        let host = world.hosts().find(|host| host.name() == name).map(mesh_tests::host::Host::addresses);
        host.unwrap_or_else(|| world.pod(name).addresses())
    }

    fn at(&self, name: &str, port: u16) -> [SocketAddr; 2] {
        self.addresses(name).map(|ip| SocketAddr::new(ip, port))
    }

    fn node_of(&self, name: &str) -> &str {
        let world = &self.cluster.world;
        let host = world.hosts().find(|host| host.name() == name).map(mesh_tests::host::Host::node);
        host.unwrap_or_else(|| world.pod(name).node())
    }

    fn call(&self, from: &str, to: SocketAddr) -> Result<Call> {
        let arguments = ["call", "blocking", &to.to_string(), "--greet", "--message", MARKER];
        self.cluster.attempt(from, &arguments)
    }

    fn principal(&self, name: &str) -> String {
        self.cluster.authority.spiffe_id(NAMESPACE, name)
    }
}

fn opened(reporter: &str, source: &str, destination: &str) -> impl Fn(&Metrics) -> u64 {
    let labels = [("reporter", reporter), ("source_principal", source), ("destination_principal", destination)];
    let labels = labels.map(|(key, value)| (key, value.to_owned()));
    move |metrics| {
        let labels = labels.each_ref().map(|(key, value)| (*key, value.as_str()));
        metrics.count("nodemesh_tcp_connections_opened_total", &labels)
    }
}

/// Watches all that a node sends to and receives from the other one.
fn tap(cluster: &Cluster, node: &str) -> Result<Running> {
    let place = Place { namespace: cluster.world.switch().path().into(), ..cluster.world.node(node).into() };
    let mut tap = Program::probe(["sniff", "--device", node, "--marker", MARKER]).start_in(&place)?;
    tap.wait_for_text("watching")?;
    Ok(tap)
}

/// Calls a service by both of its addresses, and its workload by both of its own: each is captured, authenticated, and
/// under the right names on both sides.
fn assert_meshed(scene: &Scene, from: &str, to: &str) -> Result<()> {
    let cluster = &scene.cluster;
    let destinations = [cluster.catalog.vips(to), scene.at(to, PORT)].concat();
    let (source, destination) = (cluster.daemon(scene.node_of(from)), cluster.daemon(scene.node_of(to)));
    let calls = || destinations.iter().map(|to| scene.call(from, *to)).collect::<Result<Vec<_>>>();
    let ((calls, arrival), departure) = source.change_during(|| destination.change_during(calls))?;
    let context = format!("{from} to {to}: {calls:?} {:?} {:?}", departure.outcomes(), arrival.outcomes());
    let is_host = cluster.world.hosts().any(|host| host.name() == to);
    for (call, destination) in calls.iter().zip(&destinations) {
        ensure!(call.ok, "{context}");
        ensure!(call.getpeername == Some(destination.to_string()), "{context}");
        let greeting = call.greeting.as_ref().context("no greeting")?;
        ensure!(greeting.server == to, "{context}");
        // In the node's own namespace the application sees its node as the caller.
        let caller = scene.addresses(if is_host { to } else { from })[usize::from(destination.is_ipv6())];
        ensure!(greeting.peer.parse::<SocketAddr>()?.ip() == caller, "{context}");
    }
    let (from, to) = (scene.principal(from), scene.principal(to));
    ensure!(departure.of(opened("source", &from, &to)) == 4, "{context}");
    ensure!(arrival.of(opened("destination", &from, &to)) == 4, "{context}");
    for (hook, reason) in [("connect", "captured"), ("sock_ops", "recorded")] {
        ensure!(departure.outcome(hook, reason) == 4, "{context}");
    }
    ensure!(departure.outcome("getpeername", "rewritten") == 4, "{context}");
    ensure!(arrival.outcome("sk_lookup", "authenticated") == 4, "{context}");
    ensure!(departure.of(|metrics| metrics.count("nodemesh_tcp_connections_failed_total", &[])) == 0, "{context}");
    Ok(())
}

#[test]
fn host_processes_and_pods_reach_each_other_under_their_own_identities() -> Result<()> {
    let scene = Scene::start("both-ways")?;
    let taps = ["n1", "n2"].map(|node| tap(&scene.cluster, node));
    let pairs = [
        ("agent", "server"),
        ("agent", "remote"),
        // Two workloads of one node, with one address.
        ("agent", "web"),
        ("web", "remote"),
        ("client", "web"),
        ("client", "remote"),
        ("server", "web"),
        ("server", "remote"),
        // Its own port by its node's address.
        ("web", "web"),
    ];
    for (from, to) in pairs {
        assert_meshed(&scene, from, to)?;
    }
    for tap in taps {
        let capture: Capture = tap?.stop()?.success()?.json()?;
        assert_eq!((capture.lost, capture.plaintext()), (0, 0), "{capture:?}");
        assert!(capture.bytes_on(15008) > 0, "{capture:?}");
    }
    let is_own = |line: &mesh_tests::access::Access| {
        line.direction == "outbound"
            && line.source_workload.as_deref() == Some("agent")
            && line.source_identity.as_deref() == Some(&scene.principal("agent"))
            && line.destination_identity.as_deref() == Some(&scene.principal("web"))
            && !line.failed()
    };
    wait::until("the access log names both host workloads", BOUND, || {
        scene.cluster.daemon("n1").accesses().iter().any(is_own).then_some(())
    })
}

#[test]
fn what_is_no_workloads_in_the_nodes_namespace_is_left_alone() -> Result<()> {
    let scene = Scene::start("untouched")?;
    let n1 = scene.cluster.daemon("n1");
    // An unmeshed process calls: pods in plaintext, straight to them.
    for to in scene.at("server", PORT) {
        let (call, change) = n1.change_during(|| scene.call("other", to))?;
        ensure!(call.ok && call.getpeername == Some(to.to_string()), "{call:?}");
        assert_eq!(change.outcome("connect", "not_workload"), 1, "{:?}", change.outcomes());
        assert_eq!(change.of(|metrics| metrics.opened("source")), 0);
    }
    // Ports that nobody declares take calls from everywhere: from pods, from workloads of this node and of others.
    for from in ["client", "outsider", "agent", "web", "other", "server", "stray"] {
        for to in scene.at("other", UNDECLARED) {
            let (call, change) = n1.change_during(|| scene.call(from, to))?;
            ensure!(call.ok, "{from}: {call:?}");
            assert_eq!(call.greeting.context("a greeting")?.server, "other");
            assert!(change.outcome("sk_lookup", "unmeshed") >= 1, "{from}: {:?}", change.outcomes());
            assert_eq!(change.of(|metrics| metrics.opened("destination")), 0);
        }
    }
    // A workload's own other ports are nobody's business either.
    let _more = scene.cluster.serve("web", 7070, &["--greet", "--name", "web"])?;
    for to in scene.at("web", 7070) {
        ensure!(scene.call("outsider", to)?.ok && scene.call("stray", to)?.ok, "{to}");
    }
    Ok(())
}

/// Has `taker` connect a socket that `giver` made.
fn handed(scene: &Scene, giver: &str, taker: &str, to: SocketAddr) -> Result<Call> {
    let at = scene.cluster.world.folder().join("hand");
    let path = at.to_str().context("a plain path")?.to_owned();
    let to = to.to_string();
    let mut take =
        Program::probe(["hand", "take", "--greet", "--at", &path, &to]).start_in(scene.cluster.world.place(taker))?;
    take.wait_for_text("waiting")?;
    Program::probe(["hand", "give", "--at", &path, &to]).run_in(scene.cluster.world.place(giver))?.success()?;
    let call = take.wait()?.json()?;
    fs::remove_file(at)?;
    Ok(call)
}

#[test]
fn a_socket_that_is_handed_on_takes_no_identity_along() -> Result<()> {
    let scene = Scene::start("handed")?;
    let n1 = scene.cluster.daemon("n1");
    let destinations = [scene.cluster.catalog.vips("server"), scene.at("server", PORT), scene.at("web", PORT)].concat();
    // From a workload to another one, to nobody's process, and from that to a workload.
    for (giver, taker) in [("agent", "web"), ("web", "agent"), ("agent", "other"), ("other", "agent")] {
        for to in &destinations {
            let (call, change) = n1.change_during(|| handed(&scene, giver, taker, *to))?;
            assert_eq!(call.errno.as_deref(), Some("EACCES"), "{giver} to {taker}, {to}: {call:?}");
            assert_eq!(change.outcome("connect", "handed_socket"), 1, "{:?}", change.outcomes());
            assert_eq!(change.outcome("connect", "captured"), 0, "{:?}", change.outcomes());
            assert_eq!(change.of(|metrics| metrics.opened("source")), 0);
        }
        // Where it goes past the mesh it is a socket like any other.
        let elsewhere = scene.at("other", UNDECLARED)[0];
        assert!(handed(&scene, giver, taker, elsewhere)?.ok, "{giver} to {taker}");
    }
    // Within a workload processes may hand sockets to each other.
    let vip = scene.cluster.catalog.vips("server")[0];
    let (call, change) = n1.change_during(|| handed(&scene, "agent", "agent", vip))?;
    assert!(call.ok, "{call:?}");
    let (agent, server) = (scene.principal("agent"), scene.principal("server"));
    assert_eq!(change.of(opened("source", &agent, &server)), 1);
    // One from a pod stays the pod's: its network namespace says so.
    let (call, change) = n1.change_during(|| handed(&scene, "client", "agent", vip))?;
    assert!(call.ok, "{call:?}");
    assert_eq!(change.of(opened("source", &scene.principal("client"), &server)), 1);
    assert_eq!(change.of(opened("source", &agent, &server)), 0);
    Ok(())
}

#[test]
fn a_process_that_moves_to_another_cgroup_loses_what_its_sockets_were() -> Result<()> {
    let scene = Scene::start("moved")?;
    let (n1, world) = (scene.cluster.daemon("n1"), &scene.cluster.world);
    let vip = scene.cluster.catalog.vips("server")[0].to_string();
    for (from, to, refused) in
        [("agent", "web", true), ("agent", "other", true), ("other", "agent", true), ("agent", "agent", false)]
    {
        let (call, change) = n1.change_during(|| {
            let mut keep = Program::probe(["hand", "keep", "--greet", &vip]).start_in(world.place(from))?;
            keep.wait_for_text("made")?;
            fs::write(world.host(to).cgroup().join("cgroup.procs"), keep.pid().to_string())?;
            keep.wait()?.json::<Call>()
        })?;
        assert_eq!(call.errno.as_deref() == Some("EACCES"), refused, "{from} to {to}: {call:?}");
        assert_eq!(change.outcome("connect", "handed_socket"), u64::from(refused), "{:?}", change.outcomes());
        assert_eq!(call.ok, !refused, "{call:?}");
    }
    Ok(())
}

/// Every address of the node that is not loopback, also those that the catalog does not name.
fn all_addresses(scene: &Scene) -> [SocketAddr; 4] {
    let [v4, v6] = scene.at("web", PORT);
    let [bridge4, bridge6] = scene.cluster.world.node("n1").gateways().map(|bridge| SocketAddr::new(bridge, PORT));
    [v4, v6, bridge4, bridge6]
}

#[test]
fn a_strict_declared_port_takes_no_plaintext_with_or_without_the_daemon() -> Result<()> {
    let mut scene = Scene::start("strict")?;
    scene.cluster.catalog.workload("web").mode("strict");
    scene.cluster.catalog.write()?;
    let stranger = scene.at("web", PORT)[0];
    wait::until("the port is strict", BOUND, || (!scene.call("outsider", stranger).ok()?.ok).then_some(()))?;
    let refuses = |scene: &Scene| -> Result<()> {
        for to in all_addresses(scene) {
            // A pod, another process of the same node, another node's process.
            for from in ["outsider", "other", "stray"] {
                let call = scene.call(from, to)?;
                ensure!(call.errno.as_deref() == Some("ECONNREFUSED"), "{from} to {to}: {call:?}");
            }
        }
        for loopback in ["127.0.0.1", "::1"] {
            let call = scene.call("other", SocketAddr::new(loopback.parse()?, PORT))?;
            ensure!(call.ok, "{loopback}: {call:?}");
        }
        // What is not declared stays as it is.
        for from in ["outsider", "stray"] {
            ensure!(scene.call(from, scene.at("other", UNDECLARED)[0])?.ok, "{from}");
        }
        Ok(())
    };
    let ((), change) = scene.cluster.daemon("n1").change_during(|| refuses(&scene))?;
    assert_eq!(change.outcome("sk_lookup", "strict"), 12, "{:?}", change.outcomes());
    assert_meshed(&scene, "client", "web")?;
    assert_meshed(&scene, "remote", "web")?;
    assert_meshed(&scene, "agent", "web")?;

    let before = scene.cluster.daemon("n1").metrics()?;
    scene.cluster.daemon_mut("n1").kill()?;
    refuses(&scene)?;
    // Workloads of this node reach nothing of the mesh now, and nothing in plaintext either.
    let call = scene.call("agent", scene.cluster.catalog.vips("server")[0])?;
    assert_eq!(call.errno.as_deref(), Some("ECONNREFUSED"), "{call:?}");
    scene.cluster.daemon_mut("n1").start()?;
    let after = scene.cluster.daemon("n1").metrics()?;
    assert_eq!(after.outcome("sk_lookup", "strict") - before.outcome("sk_lookup", "strict"), 12);
    scene.cluster.wait_until_served("agent", "server")?;
    scene.cluster.wait_until_served("client", "web")
}

#[test]
fn the_nodes_listener_is_nobodys_to_dial() -> Result<()> {
    let scene = Scene::start("listener")?;
    let n1 = scene.cluster.daemon("n1");
    for from in ["outsider", "client", "other", "agent", "stray", "server"] {
        for to in scene.at("web", 15001) {
            let (call, change) = n1.change_during(|| scene.call(from, to))?;
            assert_eq!(call.errno.as_deref(), Some("ECONNREFUSED"), "{from}: {call:?}");
            assert_eq!(change.outcome("sk_lookup", "mesh_port"), 1, "{from}: {:?}", change.outcomes());
        }
    }
    // The daemon's own ports are its own.
    for port in [9415, 15008] {
        let to = SocketAddr::new(scene.addresses("web")[0], port);
        let call = scene.call("stray", to)?;
        assert_ne!(call.errno.as_deref(), Some("ECONNREFUSED"), "{call:?}");
    }
    Ok(())
}

/// What the mesh may leave in a node's own namespace: a listener, and nothing else.
fn listeners(scene: &Scene, node: &str) -> Result<usize> {
    scene.cluster.world.node(node).namespace().enter(|| -> Result<usize> {
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].map(fs::read_to_string);
        let tables = tables.into_iter().collect::<std::io::Result<String>>()?;
        let is_ours = |line: &&str| line.contains(&format!(":{:04X} ", 15001)) && line.contains(" 0A ");
        Ok(tables.lines().filter(is_ours).count())
    })?
}

fn guards(scene: &Scene, node: &str) -> Result<bool> {
    let folder = scene.cluster.daemon(node).bpffs().join("nodemesh/netns");
    Ok(fs::read_dir(folder)?.any(|entry| entry.is_ok_and(|entry| entry.file_name() == "__node")))
}

fn entries(metrics: &Metrics, map: &str) -> u64 {
    metrics.count("nodemesh_bpf_map_entries", &[("map", map)])
}

#[test]
fn what_comes_with_host_workloads_goes_with_them() -> Result<()> {
    let mut scene = Scene::start("goes")?;
    assert_eq!((listeners(&scene, "n1")?, guards(&scene, "n1")?), (2, true));
    let metrics = scene.cluster.daemon("n1").metrics()?;
    assert_eq!(entries(&metrics, "HOSTS"), 2, "{}", metrics.text());
    let guarded = entries(&metrics, "APPPORTS");

    // One goes: the other one keeps what they share.
    assert!(scene.cluster.catalog.remove("agent"));
    scene.cluster.catalog.write()?;
    scene.cluster.daemon("n1").wait_for_metrics("one is left", |metrics| entries(metrics, "HOSTS") == 1)?;
    assert_eq!((listeners(&scene, "n1")?, guards(&scene, "n1")?), (2, true));
    let vip = scene.cluster.catalog.vips("server")[0];
    assert!(!scene.call("agent", vip)?.ok, "nobody leads it there any more");
    assert_meshed(&scene, "client", "web")?;

    // Its cgroup goes, and comes back as another one.
    scene.cluster.world.remove_host("web")?;
    scene.cluster.daemon("n1").wait_for_metrics("none is left", |metrics| entries(metrics, "HOSTS") == 0)?;
    wait::until_ok("its traces are gone", BOUND, || match (listeners(&scene, "n1")?, guards(&scene, "n1")?) {
        (0, false) => Ok(()),
        left => bail!("{left:?}"),
    })?;
    scene.cluster.world.add_host("n1", "web")?;
    scene.cluster.daemon("n1").wait_for_metrics("it is back", |metrics| entries(metrics, "HOSTS") == 1)?;
    let _web = scene.cluster.serve("web", PORT, &["--greet", "--name", "web"])?;
    scene.cluster.wait_until_served("client", "web")?;
    scene.cluster.wait_until_served("web", "server")?;

    // The last one leaves the mesh.
    scene.cluster.catalog.workload("web").mode("disabled");
    scene.cluster.catalog.write()?;
    let metrics = scene.cluster.daemon("n1").wait_for_metrics("the last one is gone", |metrics| {
        entries(metrics, "HOSTS") == 0 && entries(metrics, "APPPORTS") < guarded
    })?;
    assert_eq!((listeners(&scene, "n1")?, guards(&scene, "n1")?), (0, false), "{}", metrics.text());

    // A daemon that stops takes all with it.
    assert_eq!((listeners(&scene, "n2")?, guards(&scene, "n2")?), (2, true));
    assert!(scene.cluster.daemon_mut("n2").stop()?.success());
    assert_eq!(listeners(&scene, "n2")?, 0);
    assert_eq!(fs::read_dir(scene.cluster.daemon("n2").bpffs())?.count(), 0);
    Ok(())
}
