//! What a compromised pod can do to others: nothing that the destination's guard does not stop. The witness is the
//! application itself (who connected, what arrived), beside the counters that say what stopped the rest.
//!
//! Elsewhere: a tunnel peer without a certificate, with a foreign or expired one, with another identity than it claims,
//! and streams that claim another source (`peers.rs`); plaintext from outside by mode, the daemon's in-pod listener from
//! outside, STRICT after the daemon was killed (`modes.rs`); two pods with one address (`attribution.rs`); broken frames
//! and headers, stolen streams (`tunnel/tests/hostile.rs`).

mod forger;

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use forger::{Forger, client_config};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::{Cluster, TRUST_DOMAIN};
use mesh_tests::daemon::TUNNEL_PORT;
use mesh_tests::program::{Place, Program, Running};
use mesh_tests::report::{Call, Served, served};
use mesh_tests::wait;
use mesh_tests::world::World;
use mesh_userspace::config::OWN_MARK;
use mesh_userspace::identity::server_name;
use mesh_userspace::model::SpiffeId;
use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// Bound of each read and write of the attackers in here.
const IO_BOUND: Duration = Duration::from_secs(20);
/// What attackers say; an application that gets to see it has been reached.
const LOOT: &str = "the attacker was here";

/// `client` and `attacker` on n1, `strict` and `neighbour` on n2; all are in the mesh, `strict` takes no plaintext.
fn start(name: &str) -> Result<(Cluster, Running)> {
    let topology =
        World::named(name).node("n1").pods(&["client", "attacker"]).node("n2").pods(&["strict", "neighbour"]);
    let cluster = Cluster::start(topology, |catalog| {
        catalog.service("strict", 80, 8080);
        catalog.workload("strict").mode("strict");
    })?;
    let mut echo = Program::probe(["echo", "--port", "8080"]).start_in(cluster.world.pod("strict"))?;
    echo.wait_for_listener(8080)?;
    cluster.wait_until_served("client", "strict")?;
    Ok((cluster, echo))
}

/// Where a process is in a pod's network, and outside of the control group that the hooks are attached to.
fn unhooked(cluster: &Cluster, pod: &str) -> Place {
    let pod = cluster.world.pod(pod);
    let node = Place::from(cluster.world.node(pod.node()));
    Place { namespace: pod.namespace().path().to_owned(), cgroup: node.cgroup }
}

fn attack(place: impl Into<Place>, arguments: &[&str]) -> Result<Call> {
    Program::probe(arguments).run_in(place)?.json()
}

/// Connections that the application has seen, and those of them that brought an attacker's words.
fn seen(echo: &Running) -> (usize, Vec<Served>) {
    let lines = served(&echo.printed());
    let begun = lines.iter().filter(|line| line.end.is_none()).count();
    let words = digest(&SHA256, LOOT.as_bytes());
    let words: String = words.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let is_loot = |line: &Served| line.end.as_ref().is_some_and(|end| end.received_hash == words);
    (begun, lines.into_iter().filter(is_loot).collect())
}

/// Nothing has reached the application since it had seen `before`.
fn assert_untouched(echo: &Running, before: usize, what: &str) {
    let (begun, loot) = seen(echo);
    assert_eq!(begun, before, "{what} reached the application: {}", echo.printed());
    assert!(loot.is_empty(), "{what} reached the application: {loot:?}");
}

/// A way around the connect hook.
struct Evasion {
    what: &'static str,
    words: &'static [&'static str],
    /// Runs in the pod's control group, where the hook is.
    is_hooked: bool,
    /// It gets as far as the destination. A hooked TCP_REPAIR does not: the hook sends it to the pod's own listener,
    /// which knows of no such connection. Nor does the daemon's mark: in a pod's namespace it selects the routes by
    /// which the daemon delivers, and those end there.
    arrives: bool,
}

const EVASIONS: [Evasion; 4] = [
    Evasion { what: "an unhooked process", words: &["call", "blocking"], is_hooked: false, arrives: true },
    Evasion { what: "TCP_REPAIR", words: &["attack", "repair"], is_hooked: true, arrives: false },
    Evasion { what: "unhooked TCP_REPAIR", words: &["attack", "repair"], is_hooked: false, arrives: true },
    Evasion { what: "the daemon's mark", words: &["attack", "marked", "--mark"], is_hooked: true, arrives: false },
];

/// Every evasion, by both families, from one pod to `strict`: refused at once, and the application sees nothing. Says
/// how many arrived at the destination.
fn evade_all(cluster: &Cluster, echo: &Running, from: &str) -> Result<u64> {
    let mut arrived = 0;
    let mark = OWN_MARK.to_string();
    for address in cluster.world.pod("strict").addresses() {
        let destination = SocketAddr::new(address, 8080).to_string();
        for Evasion { what, words, is_hooked, arrives } in EVASIONS {
            let (before, _) = seen(echo);
            let mark: &[&str] = if words.contains(&"marked") { &[&mark] } else { &[] };
            let arguments = [words, mark, &[&destination, "--message", LOOT]].concat();
            let place = if is_hooked { cluster.world.pod(from).into() } else { unhooked(cluster, from) };
            let call = attack(place, &arguments).with_context(|| format!("{what} to {destination}"))?;
            let refusals = ["ECONNREFUSED", "ECONNRESET", "ENETUNREACH"];
            let is_refused = call.errno.as_deref().is_some_and(|errno| refusals.contains(&errno));
            ensure!(!call.ok && is_refused, "{what} from {from} to {destination}: {call:?}");
            ensure!(call.bytes_received == 0, "{what} was answered: {call:?}");
            assert_untouched(echo, before, what);
            arrived += u64::from(arrives);
        }
    }
    Ok(arrived)
}

#[test]
fn plaintext_around_the_connect_hook_is_stopped_at_the_destination() -> Result<()> {
    let (mut cluster, echo) = start("evasion")?;
    for from in ["attacker", "client", "neighbour"] {
        let (attacks, change) = cluster.daemon("n2").change_during(|| evade_all(&cluster, &echo, from))?;
        let stopped = change.outcome("sk_lookup", "strict");
        assert!(stopped >= attacks && attacks == 4, "{attacks} attacks, {:?}", change.outcomes());
        assert_eq!(change.outcome("sk_lookup", "authenticated"), 0, "{:?}", change.outcomes());
        // A hooked TCP_REPAIR of the same node sends no SYN: nobody hears of it, so it is nobody's connection.
        for reporter in ["source", "destination"] {
            assert_eq!(change.of(|metrics| metrics.opened(reporter)), 0, "{reporter}, from {from}");
        }
    }
    // Nobody is there to decide: the same.
    let before = cluster.daemon("n2").metrics()?;
    cluster.daemon_mut("n2").kill()?;
    let attacks = evade_all(&cluster, &echo, "attacker")?;
    cluster.daemon_mut("n2").start()?;
    let after = cluster.daemon("n2").metrics()?;
    assert!(after.outcome("sk_lookup", "strict") >= before.outcome("sk_lookup", "strict") + attacks);
    cluster.wait_until_served("client", "strict")
}

/// The hook records where a connection goes; without the hook there is no record, and no record is no connection.
#[test]
fn the_pods_own_listener_takes_nothing_that_the_hook_did_not_send() -> Result<()> {
    let (cluster, echo) = start("listener")?;
    let (before, _) = seen(&echo);
    for own in cluster.world.pod("attacker").addresses() {
        let listener = SocketAddr::new(own, 15001).to_string();
        let (call, change) = cluster.daemon("n1").change_during(|| {
            attack(unhooked(&cluster, "attacker"), &["call", "blocking", &listener, "--message", LOOT])
        })?;
        assert_eq!(call.errno.as_deref(), Some("ECONNRESET"), "{call:?}");
        assert_eq!(change.of(|metrics| metrics.failed("source", "no_original_destination")), 1);
    }
    // Another pod's listener, from outside of the hook.
    for other in cluster.world.pod("strict").addresses() {
        let listener = SocketAddr::new(other, 15001).to_string();
        let (call, change) = cluster.daemon("n2").change_during(|| {
            attack(unhooked(&cluster, "attacker"), &["call", "blocking", &listener, "--message", LOOT])
        })?;
        assert_eq!(call.errno.as_deref(), Some("ECONNREFUSED"), "{call:?}");
        assert_eq!(change.outcome("sk_lookup", "mesh_port"), 1, "{:?}", change.outcomes());
    }
    assert_untouched(&echo, before, "a call of a listener");
    Ok(())
}

/// One forger for each address that a packet to `strict` may claim to come from.
fn claims(cluster: &Cluster, family: usize) -> Vec<(&'static str, IpAddr)> {
    let own = |pod: &str| cluster.world.pod(pod).addresses()[family];
    let mut claims = vec![
        ("a workload of another node", own("client")),
        ("a workload of the same node", own("neighbour")),
        ("the destination itself", own("strict")),
        (
            "the node",
            if family == 0 { cluster.world.node("n2").v4().into() } else { cluster.world.node("n2").v6().into() },
        ),
        ("loopback", if family == 0 { "127.0.0.1".parse() } else { "::1".parse() }.expect("an address")),
    ];
    if family == 1 {
        // To the maps this is the client's IPv4 address.
        claims.push(("an IPv4 workload", cluster.world.pod("client").addresses()[0]));
    }
    claims
}

#[test]
fn a_forged_source_address_reaches_no_strict_application() -> Result<()> {
    let (cluster, echo) = start("forgery")?;
    let (before, _) = seen(&echo);
    for (family, address) in cluster.world.pod("strict").addresses().into_iter().enumerate() {
        let destination = SocketAddr::new(address, 8080).to_string();
        for from in ["attacker", "neighbour"] {
            for (whose, source) in claims(&cluster, family) {
                // By hand: whether the kernels on the way let it pass or not, it ends at the guard at the latest.
                let forged = attack(
                    cluster.world.pod(from),
                    &["attack", "forge", &destination, "--source", &source.to_string(), "--message", LOOT],
                )?;
                ensure!(forged.ok && forged.connections == 1, "{from} as {whose}: {forged:?}");
            }
            // With the kernel's help: the answer goes to whom the address belongs.
            let client = SocketAddr::new(cluster.world.pod("client").addresses()[family], 0).to_string();
            let (call, change) = cluster.daemon("n2").change_during(|| {
                let arguments = ["attack", "transparent", &destination, "--source", &client, "--message", LOOT];
                attack(unhooked(&cluster, from), &[&arguments[..], &["--timeout-millis", "500"]].concat())
            })?;
            ensure!(!call.ok && call.bytes_received == 0, "{from} as the client: {call:?}");
            assert!(change.outcome("sk_lookup", "strict") > 0, "{from}: {:?}", change.outcomes());
            // Without it the kernel does not lend the address.
            let call = attack(cluster.world.pod(from), &["call", "bind", &destination, "--source", &client])?;
            assert_eq!(call.errno.as_deref(), Some("EADDRNOTAVAIL"), "{call:?}");
        }
    }
    assert_untouched(&echo, before, "a forged packet");
    cluster.wait_until_served("client", "strict")
}

/// While the daemon delivers, it announces each connection to the guard by both ends: forged packets that hit such an
/// announcement pass the guard, and still no application takes them for a connection.
#[test]
fn forged_packets_do_not_profit_from_connections_that_are_being_delivered() -> Result<()> {
    let (cluster, echo) = start("hammer")?;
    let (before, _) = seen(&echo);
    let n2 = cluster.daemon("n2");
    let (calls, change) = n2.change_during(|| {
        let mut forgers = Vec::new();
        for (family, address) in cluster.world.pod("strict").addresses().into_iter().enumerate() {
            let client = cluster.world.pod("client").addresses()[family].to_string();
            let destination = SocketAddr::new(address, 8080).to_string();
            // Every port that the delivering kernel may choose.
            let forge = ["attack", "forge", &destination, "--source", &client, "--message", LOOT];
            let ports = ["--first-port", "32768", "--last-port", "60999", "--rounds", "4"];
            forgers.push(Program::probe(forge).args(ports).start_in(cluster.world.pod("attacker"))?);
        }
        let mut calls = 0;
        while forgers.iter_mut().any(Running::is_running) {
            for vip in cluster.catalog.vips("strict") {
                let many = ["many", &vip.to_string(), "--count", "50", "--concurrency", "10"];
                let call = cluster.attempt("client", &many)?;
                ensure!(call.ok && call.connections == 50, "{call:?}");
                calls += 50;
            }
        }
        for forger in forgers {
            let forged: Call = forger.wait()?.success()?.json()?;
            ensure!(forged.connections == 4 * 28_232, "{forged:?}");
        }
        Ok(calls)
    })?;
    let (begun, loot) = seen(&echo);
    assert_eq!(begun, before + calls, "the application saw other connections than the client made");
    assert!(loot.is_empty(), "{loot:?}");
    assert!(change.outcome("sk_lookup", "strict") > 100_000, "{:?}", change.outcomes());
    assert!(change.outcome("sk_lookup", "authenticated") >= calls as u64, "{:?}", change.outcomes());
    Ok(())
}

/// Dials n2's tunnel from inside a pod and says something; `None` if the server let it be, else why not.
fn dial(cluster: &Cluster, config: ClientConfig, name: ServerName<'static>) -> Result<Option<String>> {
    let address = SocketAddr::from((cluster.world.node("n2").v4(), TUNNEL_PORT));
    let mut socket = cluster.world.pod("attacker").namespace().enter(|| TcpStream::connect(address))??;
    socket.set_read_timeout(Some(IO_BOUND))?;
    let mut connection = ClientConnection::new(Arc::new(config), name)?;
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    // With TLS 1.3 the refusal comes after the client's own handshake.
    let answer = stream.write_all(LOOT.as_bytes()).and_then(|()| stream.read(&mut [0; 16]));
    Ok(answer.err().map(|error| error.to_string()))
}

#[test]
fn a_pod_that_dials_the_tunnel_by_itself_is_refused() -> Result<()> {
    let (mut cluster, echo) = start("tunnel")?;
    let strict = SpiffeId::parse(&cluster.authority.spiffe_id(NAMESPACE, "strict"))?;
    let name = server_name(&strict);
    let [trusted, stranger, namesake] = [Forger::new("one")?, Forger::new("another")?, Forger::new("one")?];
    let bundle = cluster.identities("n2").join("bundle.pem");
    cluster.daemon_mut("n2").stop()?;
    let known = std::fs::read_to_string(&bundle)?;
    std::fs::write(&bundle, format!("{known}{}", trusted.pem))?;
    cluster.daemon_mut("n2").start()?;
    cluster.wait_until_served("client", "strict")?;
    let (before, _) = seen(&echo);

    let client = cluster.authority.spiffe_id(NAMESPACE, "client");
    let id = |trust_domain: &str| format!("spiffe://{trust_domain}/ns/{NAMESPACE}/sa/client");
    let lookalikes = [format!("{TRUST_DOMAIN}.evil.test"), format!("x{TRUST_DOMAIN}"), TRUST_DOMAIN.replace('.', "-")];
    let mut cases = vec![
        ("no certificate", "no_certificate", client_config(None)?),
        ("a self-made authority", "unknown_ca", stranger.client(&[&client], (-1, 1))?),
        ("an authority of a trusted one's name", "bad_certificate", namesake.client(&[&client], (-1, 1))?),
        ("an expired leaf", "expired", trusted.client(&[&client], (-2, -1))?),
        ("a leaf of tomorrow", "not_yet_valid", trusted.client(&[&client], (24, 48))?),
        ("two identities", "bad_certificate", trusted.client(&[&client, strict.as_str()], (-1, 1))?),
        ("no identity", "bad_certificate", trusted.client(&[], (-1, 1))?),
        (
            "a node's kind of name",
            "bad_certificate",
            trusted.client(&[&format!("spiffe://{TRUST_DOMAIN}/node/n1")], (-1, 1))?,
        ),
    ];
    for lookalike in &lookalikes {
        cases.push(("a look-alike trust domain", "identity_mismatch", trusted.client(&[&id(lookalike)], (-1, 1))?));
    }
    for (what, reason, config) in cases {
        let labels = [("transport", "lanes"), ("side", "server"), ("reason", reason)];
        let n2 = cluster.daemon("n2");
        let count =
            |metrics: &mesh_tests::scrape::Metrics| metrics.count("nodemesh_tunnel_handshake_failures_total", &labels);
        let earlier = count(&n2.metrics()?);
        let refusal = dial(&cluster, config, name.clone())?;
        ensure!(refusal.is_some(), "{what}: the tunnel answered");
        n2.wait_for_metrics(&format!("n2 counts {what} as {reason}"), |metrics| count(metrics) == earlier + 1)
            .with_context(|| n2.log_end())?;
    }
    // The same forger's sound certificate is believed: it is the flaws that were refused. It is no lane's protocol.
    let sound = trusted.client(&[&client], (-1, 1))?;
    let n2 = cluster.daemon("n2");
    let opened = n2.metrics()?.count("nodemesh_tunnel_lanes_opened_total", &[("direction", "inbound")]);
    dial(&cluster, sound, name)?;
    n2.wait_for_metrics("n2 takes a sound certificate", |metrics| {
        metrics.count("nodemesh_tunnel_lanes_opened_total", &[("direction", "inbound")]) > opened
    })?;
    // Neither TLS nor anything else.
    let address = SocketAddr::from((cluster.world.node("n2").v4(), TUNNEL_PORT)).to_string();
    let call = cluster.attempt("attacker", &["call", "blocking", &address, "--message", LOOT])?;
    ensure!(!call.ok, "{call:?}");
    assert_untouched(&echo, before, "a tunnel of the attacker's own");
    wait::until("n2 still serves", wait::BOUND, || cluster.wait_until_served("client", "strict").ok())
}
