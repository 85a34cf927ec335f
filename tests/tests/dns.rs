//! Names of services resolve where the mesh itself is the resolver, by datagram and by TCP, over both families; every
//! other name is someone else's, and is refused where nobody else is asked.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Resolved;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use rustix::process::Signal;
use serde_json::json;
use std::net::{IpAddr, SocketAddr};

const SERVERS: [&str; 2] = ["10.96.255.10", "fd96::ff10"];

fn resolve(cluster: &Cluster, server: SocketAddr, name: &str, more: &[&str]) -> Result<Resolved> {
    let server = server.to_string();
    let arguments = ["resolve", &server, name].into_iter().chain(more.iter().copied());
    Program::probe(arguments).run_in(cluster.world.place("client"))?.success()?.json()
}

#[test]
fn services_resolve_by_name_and_other_names_do_not() -> Result<()> {
    let topology = World::named("dns").node("n1").pod("client");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.mesh("dns", serde_json::json!({"addresses": SERVERS}));
        catalog.service("web", 80, 8080);
    })?;
    let vips = cluster.catalog.vips("web").map(|vip| vip.ip());
    for server in SERVERS.map(|server| SocketAddr::new(server.parse().expect("an address"), 53)) {
        for way in [&["--tcp"][..], &[]] {
            let ask = |name: &str, kind: &str| resolve(&cluster, server, name, &[way, &["--kind", kind]].concat());
            wait::until_ok(&format!("{server} answers ({way:?})"), BOUND, || ask("web", "1"))?;
            for name in ["web", "web.default", "web.default.svc.cluster.local"] {
                for (kind, vip) in [("1", vips[0]), ("28", vips[1])] {
                    let told = ask(name, kind)?;
                    let expected = Resolved { code: 0, truncated: false, addresses: vec![vip] };
                    ensure!(told == expected, "{name} at {server} ({way:?}): {told:?}");
                }
            }
            let codes = [("gone.default.svc.cluster.local", 3), ("example.com", 5)];
            for (name, code) in codes {
                let told = ask(name, "1")?;
                let expected = Resolved { code, truncated: false, addresses: Vec::<IpAddr>::new() };
                ensure!(told == expected, "{name} at {server} ({way:?}): {told:?}");
            }
        }
    }
    let metrics = cluster.daemon("n1").metrics()?;
    let refused = metrics.count("nodemesh_dns_queries_total", &[("result", "refused")]);
    ensure!(refused == 4, "{refused} queries were refused");
    Ok(())
}

/// What `dig` prints, as far as it matters here.
#[derive(Debug)]
struct Dug {
    /// `NOERROR`, `NXDOMAIN`, `SERVFAIL`, ...
    status: String,
    /// `qr`, `aa`, `rd`, ...
    flags: Vec<String>,
    /// Each record of the answer section: type and data.
    answers: Vec<(String, String)>,
    text: String,
}

impl Dug {
    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|set| set == flag)
    }

    fn data(&self, kind: &str) -> Vec<&str> {
        self.answers.iter().filter(|(of, _)| of == kind).map(|(_, data)| data.as_str()).collect()
    }

    fn parse(text: &str) -> Result<Self> {
        let after = |mark: &str, end: char| {
            let (_, rest) = text.split_once(mark).with_context(|| format!("dig printed no {mark:?}:\n{text}"))?;
            anyhow::Ok(rest.split(end).next().unwrap_or_default().to_owned())
        };
        let status = after("status: ", ',')?;
        let flags = after(";; flags: ", ';')?.split_whitespace().map(str::to_owned).collect();
        let section = text.split_once(";; ANSWER SECTION:\n").map(|(_, rest)| rest.lines()).into_iter().flatten();
        // Name, time to live, class, type, data.
        let record = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            Some(((*fields.get(3)?).to_owned(), fields[4..].join(" ")))
        };
        let answers = section.take_while(|line| !line.is_empty()).filter_map(record).collect();
        Ok(Self { status, flags, answers, text: text.to_owned() })
    }
}

/// Asks once; a server that does not answer within dig's bound fails the run.
fn dig(cluster: &Cluster, server: &str, arguments: &[&str]) -> Result<String> {
    let at = format!("@{server}");
    let program = Program::new("dig").args([at.as_str(), "+time=10", "+tries=1"]).args(arguments);
    Ok(program.run_in(cluster.world.pod("client"))?.success()?.stdout)
}

fn dug(cluster: &Cluster, server: &str, arguments: &[&str]) -> Result<Dug> {
    Dug::parse(&dig(cluster, server, arguments)?)
}

#[test]
fn dig_is_answered_as_by_any_server() -> Result<()> {
    let topology = World::named("dig").node("n1").pod("client");
    let cluster = Cluster::start(topology, |catalog| {
        catalog.mesh("dns", json!({"addresses": SERVERS}));
        catalog.service("web", 80, 8080);
    })?;
    let name = "web.default.svc.cluster.local";
    let [v4, v6] = cluster.catalog.vips("web").map(|vip| vip.ip().to_string());
    for server in SERVERS {
        wait::until_ok(&format!("{server} answers"), BOUND, || dig(&cluster, server, &["+short", name]))?;
        for way in [&["+notcp"][..], &["+tcp"]] {
            let ask = |arguments: &[&str]| dug(&cluster, server, &[way, arguments].concat());
            for (kind, address) in [("A", &v4), ("AAAA", &v6)] {
                let told = ask(&[name, kind])?;
                ensure!(told.status == "NOERROR" && told.has("aa") && told.data(kind) == [address], "{told:?}");
                let short = dig(&cluster, server, &[way, &["+short", name, kind]].concat())?;
                assert_eq!(short.trim_end(), *address, "{server} {way:?}");
            }
            let missing = ask(&["gone.default.svc.cluster.local"])?;
            ensure!(missing.status == "NXDOMAIN" && missing.text.contains("SOA"), "{missing:?}");
            let other = ask(&["example.com"])?;
            ensure!(other.status == "REFUSED" && other.answers.is_empty(), "{other:?}");
            for address in [&v4, &v6] {
                let reverse = ask(&["-x", address])?;
                assert_eq!(reverse.data("PTR"), [format!("{name}.")], "{reverse:?}");
            }
            let port = ask(&[&format!("_port-80._tcp.{name}"), "SRV"])?;
            assert_eq!(port.data("SRV"), [format!("0 100 80 {name}.")], "{port:?}");
            // The name is there, and has nothing of these types.
            for kind in ["MX", "TXT", "CAA", "TYPE65"] {
                let nothing = ask(&[name, kind])?;
                let is_nodata = nothing.status == "NOERROR" && nothing.answers.is_empty();
                ensure!(is_nodata && nothing.text.contains("SOA"), "{kind}: {nothing:?}");
            }
        }
    }
    let metrics = cluster.daemon("n1").metrics()?;
    for result in ["answered", "nxdomain", "nodata", "refused"] {
        let count = metrics.count("nodemesh_dns_queries_total", &[("answered_by", "mesh"), ("result", result)]);
        ensure!(count >= 4, "{result}: {count}\n{}", metrics.text());
    }
    extensions(&cluster, name)
}

/// EDNS as RFC 6891 has it, and what is no query.
fn extensions(cluster: &Cluster, name: &str) -> Result<()> {
    let server = SERVERS[0];
    let with = dug(cluster, server, &[name, "+edns=0", "+bufsize=4096"])?;
    ensure!(with.text.contains("; EDNS: version: 0,") && with.text.contains("udp: 1232"), "{with:?}");
    let without = dug(cluster, server, &[name, "+noedns"])?;
    ensure!(without.status == "NOERROR" && !without.text.contains("OPT PSEUDOSECTION"), "{without:?}");
    let later = dug(cluster, server, &[name, "+edns=1", "+noednsnegotiation"])?;
    ensure!(later.status == "BADVERS", "{later:?}");
    let unknown = dug(cluster, server, &[name, "+ednsopt=65001:abcd"])?;
    ensure!(unknown.status == "NOERROR" && unknown.answers.len() == 1, "{unknown:?}");
    let notify = dug(cluster, server, &[name, "+opcode=NOTIFY"])?;
    ensure!(notify.status == "NOTIMP", "{notify:?}");
    let class = dug(cluster, server, &["-c", "CH", name])?;
    ensure!(class.status == "REFUSED", "{class:?}");
    Ok(())
}

/// Records of `wide.example.org`: more than a datagram without EDNS takes, and than one with it.
const WIDE: usize = 120;

/// dnsmasq, which knows a few names of `example.org` and no others.
fn upstream(cluster: &Cluster) -> Result<Running> {
    let wide = (0..WIDE).map(|number| format!("--host-record=wide.example.org,192.0.2.{number}"));
    let settings = [
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--pid-file",
        "--user=root",
        "--edns-packet-max=4096",
        "--local=/example.org/",
        "--host-record=www.example.org,192.0.2.200,2001:db8::200",
        "--txt-record=www.example.org,from dnsmasq",
    ];
    let program = Program::new("dnsmasq").args(settings).args(wide);
    let mut server = program.start_in(cluster.world.pod("resolver"))?;
    server.wait_for_listener(53)?;
    Ok(server)
}

/// `client` on n1; `web` and, outside of the mesh, `resolver` on n2. `more` servers are asked before it.
fn forwarding(name: &str, more: &[SocketAddr]) -> Result<Cluster> {
    let topology = World::named(name).node("n1").pod("client").node("n2").pods(&["resolver", "web"]);
    let mut cluster = Cluster::start(topology, |catalog| {
        assert!(catalog.remove("resolver"));
        catalog.service("web", 80, 8080);
    })?;
    let resolver = SocketAddr::new(cluster.world.pod("resolver").v4().into(), 53);
    let servers: Vec<SocketAddr> = more.iter().copied().chain([resolver]).collect();
    cluster.catalog.mesh("dns", json!({"addresses": SERVERS, "upstream": servers}));
    cluster.catalog.write()?;
    Ok(cluster)
}

#[test]
fn names_outside_of_the_mesh_are_asked_of_the_upstream_server() -> Result<()> {
    let cluster = forwarding("dns-upstream", &[])?;
    let server = upstream(&cluster)?;
    for mesh in SERVERS {
        wait::until_ok(&format!("{mesh} forwards"), BOUND, || {
            let told = dug(&cluster, mesh, &["www.example.org", "+time=1"])?;
            ensure!(told.status == "NOERROR", "{told:?}");
            Ok(())
        })?;
        for way in [&["+notcp"][..], &["+tcp"]] {
            let ask = |arguments: &[&str]| dug(&cluster, mesh, &[way, arguments].concat());
            for (kind, data) in [("A", "192.0.2.200"), ("AAAA", "2001:db8::200"), ("TXT", "\"from dnsmasq\"")] {
                let told = ask(&["www.example.org", kind])?;
                ensure!(told.data(kind) == [data] && told.has("ra"), "{mesh} {way:?}: {told:?}");
            }
            let missing = ask(&["gone.example.org"])?;
            ensure!(missing.status == "NXDOMAIN", "{missing:?}");
        }
        // What is the mesh's is never asked of others.
        let own = dug(&cluster, mesh, &["gone.default.svc.cluster.local"])?;
        ensure!(own.status == "NXDOMAIN" && own.has("aa"), "{own:?}");
        let web = dug(&cluster, mesh, &["web.default.svc.cluster.local"])?;
        assert_eq!(web.data("A"), [cluster.catalog.vips("web")[0].ip().to_string()], "{web:?}");

        // Too long for a datagram: said so, and whole by TCP.
        let cut = dug(&cluster, mesh, &["wide.example.org", "+noedns", "+ignore"])?;
        ensure!(cut.has("tc"), "{cut:?}");
        let whole = dug(&cluster, mesh, &["wide.example.org", "+noedns"])?;
        ensure!(!whole.has("tc") && whole.data("A").len() == WIDE, "{whole:?}");
        let offered = dug(&cluster, mesh, &["wide.example.org", "+bufsize=4096", "+ignore"])?;
        ensure!(!offered.has("tc") && offered.data("A").len() == WIDE, "{offered:?}");
    }
    let metrics = cluster.daemon("n1").metrics()?;
    let labels = [("answered_by", "upstream"), ("result", "forwarded")];
    ensure!(metrics.count("nodemesh_dns_queries_total", &labels) >= 24, "{}", metrics.text());
    ensure!(metrics.count("nodemesh_dns_upstream_duration_seconds_count", &[]) >= 24, "{}", metrics.text());
    drop(server);
    Ok(())
}

#[test]
fn an_upstream_server_that_is_dead_ends_in_a_failure_and_not_in_silence() -> Result<()> {
    let cluster = forwarding("dns-dead", &[])?;
    let failures = |reason| -> Result<u64> {
        let metrics = cluster.daemon("n1").metrics()?;
        Ok(metrics.count("nodemesh_dns_upstream_failures_total", &[("reason", reason)]))
    };
    let server = upstream(&cluster)?;
    wait::until_ok("it is forwarded", BOUND, || {
        let told = dug(&cluster, SERVERS[0], &["www.example.org", "+time=1"])?;
        ensure!(told.status == "NOERROR", "{told:?}");
        Ok(())
    })?;
    // Silent: dig itself would wait for longer than the mesh does.
    server.signal(Signal::STOP)?;
    for way in ["+notcp", "+tcp"] {
        let before = failures("timeout")?;
        let told = dug(&cluster, SERVERS[0], &[way, "www.example.org"])?;
        ensure!(told.status == "SERVFAIL" && told.answers.is_empty(), "{told:?}");
        assert_eq!(failures("timeout")?, before + 1, "{way}");
    }
    // Names of the mesh do not wait for it.
    let own = dug(&cluster, SERVERS[0], &["web.default.svc.cluster.local"])?;
    ensure!(own.status == "NOERROR", "{own:?}");
    server.signal(Signal::CONT)?;
    wait::until_ok("it answers again", BOUND, || {
        let told = dug(&cluster, SERVERS[0], &["www.example.org"])?;
        ensure!(told.status == "NOERROR", "{told:?}");
        Ok(())
    })?;
    // Gone: the kernel says so at once.
    drop(server);
    let told = dug(&cluster, SERVERS[0], &["www.example.org"])?;
    ensure!(told.status == "SERVFAIL", "{told:?}");
    ensure!(failures("unreachable")? > 0, "nobody listens there");
    let metrics = cluster.daemon("n1").metrics()?;
    let labels = [("answered_by", "upstream"), ("result", "servfail")];
    ensure!(metrics.count("nodemesh_dns_queries_total", &labels) >= 3, "{}", metrics.text());
    Ok(())
}

#[test]
fn the_second_upstream_server_answers_for_a_first_one_that_is_dead() -> Result<()> {
    // The node has no DNS of its own.
    let cluster = forwarding("dns-second", &[SocketAddr::from(([127, 0, 0, 1], 53))])?;
    let _server = upstream(&cluster)?;
    wait::until_ok("the second answers", BOUND, || {
        let told = dug(&cluster, SERVERS[0], &["www.example.org", "+time=1"])?;
        ensure!(told.status == "NOERROR", "{told:?}");
        Ok(())
    })?;
    let metrics = cluster.daemon("n1").metrics()?;
    let failed = metrics.count("nodemesh_dns_upstream_failures_total", &[("reason", "unreachable")]);
    ensure!(failed > 0, "the first was asked: {}", metrics.text());
    Ok(())
}
