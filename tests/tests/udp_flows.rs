//! Flows of datagrams are spread, watched and cut as connections are.

use anyhow::{Context, Result, ensure};
use mesh_tests::access::Access;
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::policy::account;
use mesh_tests::program::{Program, Running};
use mesh_tests::report::Datagrams;
use mesh_tests::scrape::{Change, Metrics};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const SERVICE: &str = "names";
const CUT: &str = "nodemesh_policy_connections_cut_total";

/// `client` and `other` on n1 with replica `near`, replica `far` on n2; both serve UDP port 53 at port 1053.
struct Bed {
    cluster: Cluster,
    servers: BTreeMap<&'static str, Running>,
}

impl Bed {
    fn start(name: &str, describe: impl FnOnce(&mut Catalog)) -> Result<Self> {
        let topology = World::named(name).node("n1").pods(&["client", "other", "near"]).node("n2").pod("far");
        let cluster = Cluster::start(topology, |catalog| {
            catalog.udp_service(SERVICE, 53, 1053);
            for replica in ["near", "far"] {
                catalog.workload(replica).of_app(SERVICE);
            }
            describe(catalog);
        })?;
        let mut bed = Self { cluster, servers: BTreeMap::new() };
        for replica in ["near", "far"] {
            bed.serve(replica)?;
        }
        for vip in bed.cluster.catalog.vips(SERVICE).map(|vip| vip.to_string()) {
            wait::until_ok(&format!("both replicas answer at {vip}"), BOUND, || {
                let report = bed.names("other", &[&vip, "--clients", "16", "--patience-millis", "500"])?;
                ensure!(report.error.is_none() && report.answered == 16, "{report:?}");
                Ok(())
            })?;
        }
        Ok(bed)
    }

    fn serve(&mut self, replica: &'static str) -> Result<()> {
        let program = Program::probe(["udp", "echo", "--port", "1053", "--name", replica]);
        let mut server = program.start_in(self.cluster.world.pod(replica))?;
        server.wait_for_text("listening")?;
        self.servers.insert(replica, server);
        Ok(())
    }

    fn vip(&self) -> String {
        self.cluster.catalog.vips(SERVICE)[0].to_string()
    }

    /// Who answers how many sockets.
    fn names(&self, pod: &str, arguments: &[&str]) -> Result<Datagrams> {
        Program::probe(["udp", "names"]).args(arguments).run_in(self.cluster.world.pod(pod))?.json()
    }

    /// A socket that sends all the time, once it has been answered.
    fn chatter(&self, pod: &str, arguments: &[&str]) -> Result<Running> {
        let mut chatter = Program::probe(["udp", "chatter"]).args(arguments).start_in(self.cluster.world.pod(pod))?;
        chatter.wait_for_text("answered")?;
        Ok(chatter)
    }

    fn metrics(&self) -> Result<Metrics> {
        self.cluster.daemon("n1").metrics()
    }
}

/// That all sockets were answered, each by one server; and by whom.
fn answered(report: &Datagrams) -> Result<&BTreeMap<String, u64>> {
    let is_sound = report.error.is_none() && report.lost == 0 && report.mixed_up == 0;
    ensure!(is_sound && report.answered == report.sent, "{report:?}");
    Ok(&report.servers)
}

fn retried(metrics: &Metrics, reason: &str) -> u64 {
    metrics.count("nodemesh_balance_retries_total", &[("reason", reason)])
}

#[test]
fn flows_are_spread_by_the_services_algorithm_and_a_socket_keeps_its_endpoint() -> Result<()> {
    let mut bed = Bed::start("flows-turns", |catalog| {
        catalog.traffic(SERVICE).algorithm("RoundRobin");
    })?;
    let vip = bed.vip();
    let report = bed.names("client", &[&vip, "--clients", "20", "--count", "3"])?;
    let turns = BTreeMap::from([("far".to_owned(), 10), ("near".to_owned(), 10)]);
    assert_eq!(*answered(&report)?, turns, "turns are exact, chance is not");
    let rows: Value = bed.cluster.document("n1", &["get", "endpoints"])?;
    let rows = rows["items"].as_array().context("rows")?.iter();
    let of_frontend: Vec<_> = rows.filter(|row| row["frontend"] == vip.as_str()).collect();
    ensure!(of_frontend.len() == 2 && of_frontend.iter().all(|row| row["protocol"] == "udp"), "{of_frontend:?}");

    // All sockets of one caller go to one replica.
    bed.cluster.catalog.service_mut(SERVICE).set("sessionAffinity", "ClientIP");
    bed.cluster.catalog.write()?;
    wait::until_ok("the client's sockets are together", BOUND, || {
        let report = bed.names("client", &[&vip, "--clients", "20"])?;
        let servers = answered(&report)?;
        ensure!(servers.len() == 1, "{servers:?}");
        Ok(())
    })?;
    let first = bed.names("client", &[&vip, "--clients", "20"])?;
    let again = bed.names("client", &[&vip, "--clients", "20"])?;
    assert_eq!(answered(&first)?, answered(&again)?, "and stay there");
    Ok(())
}

#[test]
fn a_terminating_replica_keeps_its_flows_and_gets_no_others() -> Result<()> {
    let mut bed = Bed::start("flows-leaving", |catalog| {
        catalog.traffic(SERVICE).algorithm("RoundRobin");
    })?;
    let vip = bed.vip();
    // Two turns: one of them is with `far`.
    let held = [bed.chatter("client", &[&vip])?, bed.chatter("client", &[&vip])?];
    bed.cluster.catalog.workload("far").terminate();
    bed.cluster.catalog.write()?;
    wait::until_ok("new flows go to the other replica alone", BOUND, || {
        let report = bed.names("client", &[&vip, "--clients", "20"])?;
        let servers = answered(&report)?;
        ensure!(*servers == BTreeMap::from([("near".to_owned(), 20)]), "{servers:?}");
        Ok(())
    })?;
    let mut servers = Vec::new();
    for chatter in held {
        let report: Datagrams = chatter.wait()?.success()?.json()?;
        ensure!(report.servers.len() == 1, "a flow has moved: {report:?}");
        servers.extend(report.servers.into_keys());
    }
    servers.sort();
    assert_eq!(servers, ["far", "near"], "each replica had its turn, and kept it");
    Ok(())
}

#[test]
fn a_replica_that_dies_costs_no_new_flow_an_answer() -> Result<()> {
    let mut bed = Bed::start("flows-dead", |catalog| {
        catalog.traffic(SERVICE).algorithm("RoundRobin").set("ejection", json!({"consecutiveFailures": 3}));
    })?;
    for (vip, dead, left) in
        [(bed.cluster.catalog.vips(SERVICE)[0], "far", "near"), (bed.cluster.catalog.vips(SERVICE)[1], "near", "far")]
    {
        let before = bed.metrics()?;
        drop(bed.servers.remove(dead).context("it serves")?);
        // The first datagram of each flow is kept until it is known that somebody has it.
        let report = bed.names("client", &[&vip.to_string(), "--clients", "20"])?;
        assert_eq!(*answered(&report)?, BTreeMap::from([(left.to_owned(), 20)]), "{vip}");
        let change = Change { before, after: bed.metrics()? };
        let refused = change.of(|metrics| retried(metrics, "application_refused"));
        ensure!((1..20).contains(&refused), "{refused} flows were retried: the replica should be out after three");
        let ejected = change.of(|metrics| metrics.count("nodemesh_balance_ejections_total", &[]));
        ensure!(ejected > 0, "{}", change.after.text());
        let recovered = [("result", "recovered")];
        let recovered = change.of(|metrics| metrics.count("nodemesh_balance_retried_connections_total", &recovered));
        ensure!(recovered >= refused, "{recovered} of {refused}");
        bed.serve(if dead == "far" { "far" } else { "near" })?;
    }
    Ok(())
}

#[test]
fn flows_are_listed_logged_and_explained() -> Result<()> {
    let bed = Bed::start("flows-seen", |_| {})?;
    let vip = bed.vip();
    let chatter = bed.chatter("client", &[&vip])?;
    // Of both nodes, if the other one has the endpoint.
    let row = wait::until_ok("the flow is listed", BOUND, || {
        let document: Value = bed.cluster.document("n1", &["get", "connections"])?;
        let rows = document["items"].as_array().context("rows")?;
        let found = rows.iter().find(|row| {
            row["direction"] == "outbound"
                && row["destination"] == vip.as_str()
                && row["sourceWorkload"] == "default/client"
        });
        found.cloned().with_context(|| format!("{document}"))
    })?;
    assert_eq!((&row["protocol"], &row["transport"]), (&json!("udp"), &json!("quic")), "{row}");
    assert_eq!(row["service"], format!("default/{SERVICE}"), "{row}");
    ensure!(row["datagramsReceived"].as_u64() > Some(0) && row["bytesReceived"].as_u64() > Some(0), "{row}");
    let table = bed.cluster.nodemesh("n1", &["get", "connections"])?.success()?.stdout;
    ensure!(table.contains("udp"), "{table}");

    let report: Datagrams = chatter.wait()?.success()?.json()?;
    let port = report.local_port.context("a port")?;
    let source = format!("{}:{port}", bed.cluster.world.pod("client").v4());
    let server = report.servers.keys().next().context("a server")?;
    let ended = |direction: &str, node: &str| -> Option<Access> {
        let accesses = bed.cluster.daemon(node).accesses();
        accesses.into_iter().find(|access| access.source == source && access.direction == direction)
    };
    let node = bed.cluster.world.pod(server).node();
    // The socket is gone: nothing passes any more, and in a minute the flow is over.
    for (direction, node) in [("outbound", "n1"), ("inbound", node)] {
        let line = wait::until(&format!("{node} logs the {direction} flow"), 5 * BOUND, || ended(direction, node))?;
        assert_eq!((line.protocol.as_str(), line.transport.as_deref()), ("udp", Some("quic")), "{line:?}");
        assert_eq!(line.source_workload.as_deref(), Some("client"), "{line:?}");
        assert_eq!(line.source_identity.as_deref(), Some("spiffe://mesh.test/ns/default/sa/client"), "{line:?}");
        assert_eq!(line.destination_workload.as_deref(), Some(server.as_str()), "{line:?}");
        assert_eq!(line.destination_identity, Some(format!("spiffe://mesh.test/ns/default/sa/{SERVICE}")), "{line:?}");
        assert_eq!(line.service, Some(format!("default/{SERVICE}")), "{line:?}");
        assert_eq!((line.verdict.as_deref(), line.failed()), (Some("allow"), false), "{line:?}");
        let asked = "who are you?".len() as u64;
        assert_eq!(line.datagrams_recv, Some(report.sent), "{line:?} of {report:?}");
        assert_eq!(line.bytes_recv, report.sent * asked, "{line:?} of {report:?}");
        let replies = line.datagrams_sent.context("replies")?;
        assert_eq!(line.bytes_sent, replies * server.len() as u64, "{line:?} of {report:?}");
        ensure!(replies >= report.answered, "{line:?} of {report:?}");
    }
    explained(&bed)
}

/// What `nodemesh explain` says about datagrams: of the service, and on a port that none leads to.
fn explained(bed: &Bed) -> Result<()> {
    let vip = bed.vip();
    let explained: Value =
        bed.cluster.document("n1", &["explain", "default/client", &format!("default/{SERVICE}:53/udp")])?;
    let paths = explained["items"].as_array().context("paths")?;
    ensure!(paths.len() == 2, "{explained}");
    for path in paths {
        assert_eq!((&path["protocol"], &path["asked"]), (&json!("udp"), &json!(vip)), "{path}");
        assert_eq!((&path["arrives"], &path["transport"]), (&json!("mtls"), &json!("quic")), "{path}");
        assert_eq!(path["verdict"], "allow", "{path}");
    }
    let elsewhere = format!("{}:9/udp", bed.cluster.world.pod("far").v4());
    let explained: Value = bed.cluster.document("n1", &["explain", "default/client", &elsewhere])?;
    assert_eq!(explained["items"][0]["arrives"], "unguarded", "{explained}");
    ensure!(explained["items"][0]["why"].as_str().is_some_and(|why| why.contains("no service leads")), "{explained}");
    Ok(())
}

/// A live flow of `client`, to a replica on its own node or on another one.
fn cut(name: &str, replica: &'static str) -> Result<()> {
    let mut bed = Bed::start(name, |catalog| {
        // The other one takes nothing, so that there is no choice.
        catalog.workload(if replica == "near" { "far" } else { "near" }).terminate();
    })?;
    let vip = bed.vip();
    let mut other = bed.chatter("other", &[&vip])?;
    let [connected, mut free] = [bed.chatter("client", &[&vip, "--connected"])?, bed.chatter("client", &[&vip])?];
    let before = bed.metrics()?;
    bed.cluster.catalog.policy("block").action("DENY").for_app(SERVICE).rule(
        "no-client",
        &[account("client")],
        &[1053],
    );
    bed.cluster.catalog.write()?;
    wait::until_ok("both flows are cut", BOUND, || {
        let cuts = bed.cluster.daemons().map(|daemon| Ok(daemon.metrics()?.count(CUT, &[("reason", "denied")])));
        let cuts: u64 = cuts.sum::<Result<u64>>()?;
        ensure!(cuts >= 2, "{cuts}");
        Ok(())
    })?;
    // A socket that names its destination hears of it from the kernel.
    wait::until("the next datagram is refused", BOUND, || (!free.is_running()).then_some(()))?;
    let refused: Datagrams = free.wait()?.json()?;
    assert_eq!(refused.errno, Some(libc::EACCES), "{refused:?}");
    ensure!(bed.metrics()?.outcome("datagram", "policy_denied") > before.outcome("datagram", "policy_denied"));
    // A connected one goes on sending; nothing of it passes, and each datagram is counted.
    let dropped = |metrics: &Metrics| {
        metrics.count("nodemesh_datagram_dropped_total", &[("direction", "outbound"), ("reason", "denied")])
    };
    bed.cluster.wait_for_metrics("n1", "nodemesh_datagram_dropped", |metrics| dropped(metrics) > dropped(&before))?;
    let line = wait::until("whoever cut it says by which rule", BOUND, || {
        let accesses = bed.cluster.daemons().flat_map(mesh_tests::daemon::Daemon::accesses);
        accesses
            .into_iter()
            .find(|access| access.reason.as_deref() == Some("cut") && access.policy.as_deref() == Some("default/block"))
    })?;
    assert_eq!(line.rule.as_deref(), Some("no-client"), "{line:?}");
    assert_eq!((line.protocol.as_str(), line.response_flags.as_deref()), ("udp", Some("DENY")), "{line:?}");

    let vip_udp = format!("default/{SERVICE}:53/udp");
    let told = bed.cluster.nodemesh("n1", &["explain", "default/client", &vip_udp])?;
    ensure!(
        told.status.code() == Some(3) && told.stdout.contains("rule no-client of policy default/block"),
        "{told:?}"
    );

    // Whom the rule does not name goes on.
    ensure!(other.is_running(), "{}", other.printed());
    let report: Datagrams = other.wait()?.success()?.json()?;
    ensure!(report.servers.keys().eq([replica]), "{report:?}");
    drop(connected);
    Ok(())
}

#[test]
fn a_live_flow_to_another_node_is_cut_when_policy_denies_it() -> Result<()> {
    cut("flows-cut-far", "far")
}

#[test]
fn a_live_flow_within_the_node_is_cut_when_policy_denies_it() -> Result<()> {
    cut("flows-cut-near", "near")
}
