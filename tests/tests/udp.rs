//! UDP through services: every datagram reaches an endpoint, every answer comes from the service, nobody gets another
//! one's, and policy holds.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Datagrams;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use std::net::SocketAddr;
use std::time::Duration;

/// `client` and `near` on n1, `far` on n2; the latter two serve UDP, port 53 leading to port 1053.
struct Bed {
    cluster: Cluster,
    _servers: Vec<Running>,
}

impl Bed {
    fn start(name: &str) -> Result<Self> {
        let topology = World::named(name).node("n1").pod("client").pod("near").node("n2").pod("far");
        let cluster = Cluster::start(topology, |catalog| {
            catalog.udp_service("near", 53, 1053);
            catalog.udp_service("far", 53, 1053);
        })?;
        let servers = ["near", "far"].map(|pod| {
            let mut server = Program::probe(["udp", "echo", "--port", "1053"]).start_in(cluster.world.pod(pod))?;
            server.wait_for_text("listening")?;
            Ok(server)
        });
        let bed = Self { cluster, _servers: servers.into_iter().collect::<Result<_>>()? };
        for vip in bed.vips() {
            wait::until_ok(&format!("an answer from {vip}"), BOUND, || {
                let report = bed.ask("client", &["who", &vip.to_string(), "--patience-millis", "500"])?;
                report.error.map_or(Ok(()), |error| Err(anyhow::anyhow!(error)))
            })?;
        }
        Ok(bed)
    }

    fn vips(&self) -> Vec<SocketAddr> {
        ["near", "far"].iter().flat_map(|service| self.cluster.catalog.vips(service)).collect()
    }

    /// What the daemons have counted of datagrams and flows that went wrong.
    fn losses(&self) -> String {
        let text = self.cluster.daemons().filter_map(|daemon| Some(daemon.metrics().ok()?.text().to_owned()));
        let counted = text.flat_map(|text| {
            let lines = text.lines().filter(|line| line.contains("nodemesh_datagram_") && !line.starts_with('#'));
            lines.map(str::to_owned).collect::<Vec<_>>()
        });
        counted.collect::<Vec<_>>().join("\n")
    }

    fn ask(&self, pod: &str, arguments: &[&str]) -> Result<Datagrams> {
        let program = Program::probe(["udp"]).args(arguments).within(Duration::from_secs(300));
        program.run_in(self.cluster.world.place(pod))?.json()
    }
}

#[test]
fn each_end_sees_the_addresses_that_it_would_see_without_a_mesh() -> Result<()> {
    let bed = Bed::start("udp-addresses")?;
    let own = bed.cluster.world.pod("client").addresses();
    for vip in bed.vips() {
        for connected in [false, true] {
            let text = vip.to_string();
            let arguments: Vec<&str> = ["who", &text].into_iter().chain(connected.then_some("--connected")).collect();
            let report = bed.ask("client", &arguments)?;
            let port = report.local_port.with_context(|| format!("{report:?}"))?;
            let seen = SocketAddr::new(own[usize::from(vip.is_ipv6())], port);
            assert_eq!(report.seen_as, Some(seen.to_string()), "{vip}");
            assert_eq!(report.from, Some(text.clone()));
            assert_eq!(report.getpeername, connected.then_some(text));
        }
    }
    // A workload is called by its own address, too; and by IPv4 from an IPv6 socket.
    let far = bed.cluster.world.pod("far").addresses()[0];
    assert_eq!(bed.ask("client", &["who", &format!("{far}:1053")])?.error, None);
    let mapped = format!("[::ffff:{}]:53", bed.cluster.catalog.vips("far")[0].ip());
    assert_eq!(bed.ask("client", &["who", &mapped])?.from, Some(mapped));
    Ok(())
}

#[test]
fn datagrams_of_every_size_pass_both_ways() -> Result<()> {
    let bed = Bed::start("udp-sizes")?;
    for vip in bed.vips() {
        for size in ["1", "1000", "1200", "1472", "9000", "65507"] {
            let text = vip.to_string();
            let report = bed.ask("client", &["calls", &text, "--size", size, "--count", "20", "--window", "2"])?;
            ensure!(
                report.answered == 20 && report.mixed_up == 0,
                "{size} bytes to {vip}: {report:?}\n{}",
                bed.losses()
            );
        }
    }
    let metrics = bed.cluster.daemon("n1").metrics()?;
    ensure!(metrics.count("nodemesh_datagram_long_total", &[("direction", "outbound")]) > 0, "{}", metrics.text());
    Ok(())
}

#[test]
fn twenty_clients_lose_nothing_and_mix_up_nothing() -> Result<()> {
    let bed = Bed::start("udp-many")?;
    for vip in bed.vips() {
        let text = vip.to_string();
        let arguments = ["calls", &text, "--clients", "20", "--count", "10000", "--window", "8"];
        let report = bed.ask("client", &arguments)?;
        eprintln!("{vip}: {report:?}");
        ensure!(report.error.is_none() && report.sent == 200_000, "{vip}: {report:?}");
        ensure!(report.answered == report.sent && report.mixed_up == 0, "{vip}: {report:?}\n{}", bed.losses());
    }
    // One socket that speaks to all services of its family.
    for family in [0, 1] {
        let vips: Vec<String> = bed.vips().iter().skip(family).step_by(2).map(ToString::to_string).collect();
        let mut arguments = vec!["calls", "--clients", "4", "--count", "1000"];
        arguments.extend(vips.iter().map(String::as_str));
        let report = bed.ask("client", &arguments)?;
        ensure!(report.answered == 4_000 && report.mixed_up == 0, "{vips:?}: {report:?}");
    }
    Ok(())
}

#[test]
fn policy_decides_about_datagrams_and_strict_keeps_plaintext_out() -> Result<()> {
    let mut bed = Bed::start("udp-policy")?;
    let vip = bed.cluster.catalog.vips("far")[0].to_string();
    let direct = format!("{}:1053", bed.cluster.world.pod("far").addresses()[0]);
    bed.cluster.catalog.workload("far").mode("strict");
    bed.cluster.catalog.workload("near").mode("disabled");
    bed.cluster.catalog.write()?;
    // An answer may stay out on a busy machine: only what the guard counts as dropped was refused.
    wait::until_ok("the guard to drop plaintext", BOUND, || {
        let ask = || bed.ask("near", &["calls", &direct, "--connected", "--patience-millis", "200"]);
        let (report, change) = bed.cluster.daemon("n2").change_during(ask)?;
        let dropped = change.outcome("udp_lookup", "strict");
        ensure!(report.answered == 0 && dropped > 0, "{report:?}, dropped {dropped}");
        Ok(())
    })?;
    ensure!(bed.ask("client", &["who", &vip])?.error.is_none(), "the mesh passes");

    bed.cluster.catalog.default_action("deny");
    bed.cluster.catalog.write()?;
    wait::until_ok("policy to deny", BOUND, || {
        let report = bed.ask("client", &["calls", &vip, "--patience-millis", "200"])?;
        ensure!(report.errno == Some(libc::EACCES), "{report:?}");
        Ok(())
    })?;
    let denied = bed.cluster.daemon("n1").metrics()?.outcome("datagram", "policy_denied");
    ensure!(denied > 0, "denied {denied}");
    Ok(())
}
