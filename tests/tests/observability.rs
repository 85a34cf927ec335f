//! What the CLI and the scrape say is what the clients did: connections and bytes, exactly, on both nodes.

use anyhow::{Context, Result};
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::{Cluster, TRUST_DOMAIN};
use mesh_tests::program::{Output, Program, Running, binary};
use mesh_tests::report::{Call, Load};
use mesh_tests::scrape::Metrics;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use mesh_userspace::admin::documents::{ConnectionRow, Document, LaneRow, ServiceRow, WorkloadRow};
use serde_json::{Value, json};
use std::fs;

const PAGE: usize = 100_000;

/// Exit codes of `nodemesh`, as its documentation has them.
const USAGE: i32 = 2;
const FINDINGS: i32 = 3;
const UNREACHABLE: i32 = 4;
const PARTIAL: i32 = 5;

/// Clients on n1; nginx and an echo server on n2.
fn cluster(name: &str) -> Result<(Cluster, Vec<Running>)> {
    let topology = World::named(name).node("n1").pods(&["shopper", "batch"]).node("n2").pods(&["web", "echo"]);
    let cluster = Cluster::start(topology, |catalog: &mut Catalog| {
        catalog.service("web", 80, "http");
        catalog.workload("web").ports.insert("http".to_owned(), 8080);
        catalog.service("echo", 7, 7);
    })?;
    let folder = cluster.world.folder().join("nginx");
    fs::create_dir(&folder)?;
    fs::write(folder.join("page"), vec![b'x'; PAGE])?;
    let root = folder.display();
    let configuration = format!(
        "daemon off; master_process off; worker_processes 1; pid {root}/pid; error_log stderr; user root;\n\
         events {{}}\nhttp {{ access_log off; client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;\n\
         fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;\n\
         server {{ listen 8080; listen [::]:8080; root {root}; }} }}\n"
    );
    fs::write(folder.join("conf"), configuration)?;
    let arguments = ["-c".into(), folder.join("conf"), "-e".into(), "stderr".into()];
    let mut nginx = Program::new("nginx").args(arguments).start_in(cluster.world.pod("web"))?;
    nginx.wait_for_listener(8080)?;
    let echo = cluster.serve("echo", 7, &[])?;
    Ok((cluster, vec![nginx, echo]))
}

/// What clients did with one service: the service's metrics must say the same.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Done {
    connections: u64,
    /// From clients.
    received: u64,
    /// To clients.
    sent: u64,
}

impl Done {
    fn counted(metrics: &Metrics, labels: &[(&str, &str)]) -> Self {
        Self {
            connections: metrics.count("nodemesh_tcp_connections_closed_total", labels),
            received: metrics.count("nodemesh_tcp_received_bytes_total", labels),
            sent: metrics.count("nodemesh_tcp_sent_bytes_total", labels),
        }
    }
}

/// One page by curl, which tells how many bytes it sent and got.
fn fetch(cluster: &Cluster) -> Result<Done> {
    let mut done = Done::default();
    for vip in cluster.catalog.vips("web") {
        let url = format!("http://{vip}/page");
        let curl = Program::new("curl").args(["-sS", "-o", "/dev/null", "-w", "%{json}", &url]);
        let told: Value = curl.run_in(cluster.world.pod("shopper"))?.success()?.json()?;
        assert_eq!(told["http_code"], json!(200));
        let number = |name: &str| told[name].as_u64().with_context(|| format!("{name} of {told}"));
        assert_eq!(number("size_download")?, PAGE as u64);
        done.connections += number("num_connects")?;
        done.received += number("size_request")?;
        done.sent += number("size_header")? + number("size_download")?;
    }
    Ok(done)
}

fn promtool(cluster: &Cluster, text: &str) -> Result<Output> {
    Program::new("promtool").args(["check", "metrics"]).input(text).run_in(cluster.world.node("n1"))
}

#[test]
fn counters_on_both_nodes_are_what_the_clients_did() -> Result<()> {
    let (cluster, _servers) = cluster("counters")?;
    let before = cluster.outcome("n1", "connect", "captured")?;
    let (mut web, mut echo) = (Done::default(), Done::default());
    for _ in 0..5 {
        let done = fetch(&cluster)?;
        web.connections += done.connections;
        web.received += done.received;
        web.sent += done.sent;
    }
    for vip in cluster.catalog.vips("echo") {
        let vip = vip.to_string();
        let load = Program::probe(["load", &vip, "--requests", "500", "--connections", "4", "--size", "300"]);
        let load: Load = load.run_in(cluster.world.pod("batch"))?.success()?.json()?;
        assert_eq!((load.requests, load.failed), (500, 0));
        let many = cluster.run_probe("batch", ["many", &vip, "--count", "100"])?;
        echo.connections += load.connections + many.connections;
        echo.received += load.bytes_sent + many.bytes_sent;
        echo.sent += load.bytes_received + many.bytes_received;
    }
    // Nobody listens on this port of the echo pod: connect() succeeds in the pod, then the daemon has to say no.
    let closed = std::net::SocketAddr::new(cluster.world.pod("echo").v4().into(), 9).to_string();
    let failed: Call = Program::probe(["call", "blocking", &closed]).run_in(cluster.world.pod("batch"))?.json()?;
    assert_eq!(failed.errno.as_deref(), Some("ECONNRESET"), "{failed:?}");

    for (node, reporter) in [("n1", "source"), ("n2", "destination")] {
        for (service, source, done) in [("web", "shopper", web), ("echo", "batch", echo)] {
            let (from, to) =
                (cluster.authority.spiffe_id("default", source), cluster.authority.spiffe_id("default", service));
            let labels = [
                ("reporter", reporter),
                ("source_workload", source),
                ("source_principal", from.as_str()),
                ("destination_service_name", service),
                ("destination_service_namespace", "default"),
                ("destination_principal", to.as_str()),
                ("connection_security_policy", "mutual_tls"),
            ];
            let metrics = cluster.wait_for_metrics(node, "nodemesh_tcp_", |m| Done::counted(m, &labels) == done)?;
            assert_eq!(metrics.count("nodemesh_tcp_connections_opened_total", &labels), done.connections);
            assert_eq!(metrics.count("nodemesh_tcp_connections_failed_total", &labels), 0);
            let durations = metrics.count("nodemesh_tcp_connection_duration_seconds_count", &[("reporter", reporter)]);
            assert_eq!(durations, web.connections + echo.connections + 1);
        }
        let metrics = cluster.daemon(node).metrics()?;
        let failures = |reason| metrics.count("nodemesh_tcp_connections_failed_total", &[("reason", reason)]);
        let expected = if node == "n1" { "refused" } else { "application_refused" };
        assert_eq!(failures(expected), 1, "{}", metrics.text());
        assert_eq!(metrics.count("nodemesh_tcp_connections_failed_total", &[]), 1);
        assert_eq!(metrics.count("nodemesh_tcp_connections_active", &[]), 0);

        // The CLI says the same sums.
        let status = cluster.status(node)?;
        let expected = json!({
            "active": 0, "failed": 1,
            "opened": web.connections + echo.connections + 1, "closed": web.connections + echo.connections + 1,
            "bytesSent": web.sent + echo.sent, "bytesReceived": web.received + echo.received,
        });
        assert_eq!(status["connections"], expected);
        let told = promtool(&cluster, metrics.text())?;
        assert!(told.status.success() && told.stderr.is_empty() && told.stdout.is_empty(), "{told:?}");
    }
    // The kernel has seen the same connections.
    let all = web.connections + echo.connections + 1;
    assert_eq!(cluster.outcome("n1", "connect", "captured")? - before, all);
    assert_eq!(cluster.outcome("n1", "sock_ops", "recorded")?, all);
    assert_eq!(cluster.outcome("n2", "sk_lookup", "authenticated")?, all);
    let status = cluster.status("n1")?;
    let outcomes = status["outcomes"].as_array().context("a list")?;
    let captured = outcomes.iter().find(|row| row["hook"] == "connect" && row["reason"] == "captured");
    assert_eq!(captured.map(|row| &row["count"]), Some(&json!(all)));
    Ok(())
}

#[test]
fn open_connections_are_listed_with_who_they_are_and_what_they_carry() -> Result<()> {
    let (cluster, _servers) = cluster("listed")?;
    let vip = cluster.catalog.vips("echo")[0];
    let held = cluster.hold("batch", [&vip.to_string(), "--count", "3"])?;
    let pod = cluster.world.pod("batch").v4().to_string();
    let mut bytes = Vec::new();
    for (node, direction, other) in [("n1", "outbound", "n2"), ("n2", "inbound", "n2")] {
        let document = wait::until(&format!("{node} lists three connections"), BOUND, || {
            let document: Document<ConnectionRow> = cluster.document(node, &["get", "connections"]).ok()?;
            let ready = |row: &ConnectionRow| row.transport.is_some() && row.bytes_sent == row.bytes_received;
            (document.items.len() == 3 && document.items.iter().all(ready)).then_some(document)
        })?;
        assert_eq!(document.total.unwrap_or(3), 3);
        for row in &document.items {
            assert_eq!(row.direction, direction);
            assert!(row.source.starts_with(&format!("{pod}:")), "{row:?}");
            assert_eq!(row.source_workload.as_deref(), Some("default/batch"));
            assert_eq!(row.source_identity, Some(format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/batch")));
            assert_eq!(row.destination_identity, Some(format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/echo")));
            assert_eq!(row.destination_workload.as_deref(), Some("default/echo"));
            assert_eq!(row.service.as_deref(), Some("default/echo"));
            let backend = std::net::SocketAddr::new(cluster.world.pod("echo").v4().into(), 7);
            assert_eq!(row.backend, Some(backend.to_string()));
            let asked = if node == "n1" { vip } else { backend };
            assert_eq!(row.destination, asked.to_string());
            assert_eq!(row.node.as_deref(), Some(other));
            assert_eq!(row.transport.as_deref(), Some("lanes"));
            assert_eq!(row.group.as_deref(), Some("X25519MLKEM768"));
            assert!(row.suite.as_deref().is_some_and(|suite| suite.starts_with("TLS13_")), "{row:?}");
            assert!(row.bytes_sent > 0);
        }
        let mut carried: Vec<u64> = document.items.iter().map(|row| row.bytes_sent).collect();
        carried.sort_unstable();
        bytes.push(carried);
        let table = cluster.nodemesh(node, &["get", "connections", "-o", "wide"])?.success()?.stdout;
        for word in [&pod, "default/echo", "lanes", "X25519MLKEM768"] {
            assert!(table.contains(word), "{word} is not in\n{table}");
        }
        assert_eq!(cluster.daemon(node).metrics()?.count("nodemesh_tcp_connections_active", &[]), 3);
    }
    assert_eq!(bytes[0], bytes[1], "both nodes count the same bytes");

    let cut = cluster.nodemesh("n1", &["get", "connections", "--limit", "2", "-o", "json"])?;
    assert_eq!(cut.json::<Document<ConnectionRow>>()?.items.len(), 2);
    assert!([0, PARTIAL].contains(&cut.status.code().context("an exit code")?));

    let lanes: Document<LaneRow> = cluster.document("n1", &["get", "lanes"])?;
    assert_eq!(lanes.items.iter().map(|lane| lane.streams).sum::<u64>(), 3, "{lanes:?}");
    for lane in &lanes.items {
        assert_eq!(lane.node, "n2");
        assert!(lane.source_identity.ends_with("/sa/batch") && lane.destination_identity.ends_with("/sa/echo"));
    }

    let call: Call = held.wait()?.success()?.json()?;
    assert_eq!(call.connections, 3);
    for node in ["n1", "n2"] {
        wait::until(&format!("{node} lists nothing"), BOUND, || {
            let document: Document<ConnectionRow> = cluster.document(node, &["get", "connections"]).ok()?;
            document.items.is_empty().then_some(())
        })?;
    }
    Ok(())
}

#[test]
fn what_is_configured_is_shown_as_tables_and_as_documents() -> Result<()> {
    let (cluster, _servers) = cluster("shown")?;
    for node in ["n1", "n2"] {
        let workloads: Document<WorkloadRow> = cluster.document(node, &["get", "workloads"])?;
        let states: Vec<_> = workloads.items.iter().map(|row| (row.name.as_str(), row.state.as_str())).collect();
        let (here, there) = if node == "n1" { ("armed", "remote") } else { ("remote", "armed") };
        assert_eq!(states, [("batch", here), ("echo", there), ("shopper", here), ("web", there)]);
        for row in &workloads.items {
            let pod = cluster.world.pod(&row.name);
            assert_eq!(row.addresses, pod.addresses().map(|address| address.to_string()));
            assert_eq!((row.node.as_str(), row.mode.as_str()), (pod.node(), "permissive"));
            assert_eq!(row.identity, cluster.authority.spiffe_id("default", &row.name));
        }
        let services: Document<ServiceRow> = cluster.document(node, &["get", "services"])?;
        let local = u64::from(node == "n2");
        for row in &services.items {
            let vips = cluster.catalog.vips(&row.name).map(|vip| vip.ip().to_string());
            assert_eq!(row.vips, vips);
            assert_eq!((row.endpoints.total, row.endpoints.local), (1, local), "{row:?}");
        }
        assert_eq!(services.items.len(), 2);
        let tables = ["status", "get workloads", "get services", "get lanes", "get diagnostics", "version"];
        for command in tables {
            let words: Vec<&str> = command.split(' ').collect();
            let table = cluster.nodemesh(node, &words)?.success()?;
            assert!(table.stderr.is_empty(), "{table:?}");
            let document: Value = cluster.document(node, &words)?;
            assert_eq!(document["apiVersion"], json!("cli.nodemesh.io/v1"), "{command}");
        }
        let table = cluster.nodemesh(node, &["get", "workloads"])?.stdout;
        for name in ["batch", "echo", "shopper", "web"] {
            assert!(table.lines().any(|line| line.split_whitespace().nth(1) == Some(name)), "{table}");
        }
        let status = cluster.status(node)?;
        assert_eq!(
            status["config"]["objects"],
            json!({
                "AuthorizationPolicy": 0, "MeshConfig": 1, "Namespace": 0, "Node": 2, "Service": 2,
                "TrafficPolicy": 0, "WorkloadEntry": 4,
            })
        );
        assert_eq!(status["workloads"], json!({"local": 2, "armed": 2, "failed": 0}));
        assert_eq!((&status["ready"], &status["node"]), (&json!(true), &json!(node)));
        assert_eq!(status["certificates"].as_array().map(Vec::len), Some(2));
        let metrics = cluster.daemon(node).metrics()?;
        for kind in ["AuthorizationPolicy", "MeshConfig", "Namespace", "Node", "Service", "WorkloadEntry"] {
            let shown = metrics.count("nodemesh_config_objects", &[("kind", kind)]);
            assert_eq!(Some(shown), status["config"]["objects"][kind].as_u64());
        }
        assert_eq!(metrics.matching("nodemesh_cert_expiration_timestamp_seconds", &[]).count(), 2);
        assert!(cluster.daemon(node).get("/healthz")?.status == 200);
        assert_eq!(cluster.daemon(node).get("/nothing")?.status, 404);
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&fs::metadata(cluster.daemon(node).socket())?) & 0o777, 0o600);
    }
    Ok(())
}

#[test]
fn exit_codes_say_what_happened() -> Result<()> {
    let (mut cluster, _servers) = cluster("exits")?;
    let code = |cluster: &Cluster, arguments: &[&str]| -> Result<Option<i32>> {
        Ok(cluster.nodemesh("n1", arguments)?.status.code())
    };
    let folder = cluster.catalog.folder().display().to_string();
    assert_eq!(code(&cluster, &["status"])?, Some(0));
    assert_eq!(code(&cluster, &["validate", &folder])?, Some(0));
    assert_eq!(code(&cluster, &["get", "nonsense"])?, Some(USAGE));
    assert_eq!(code(&cluster, &["validate"])?, Some(USAGE));
    assert_eq!(code(&cluster, &["validate", "/no/such/folder"])?, Some(1));
    cluster.catalog.write_file("wrong.yaml", "apiVersion: v1\nkind: Nonsense\nmetadata: {name: x}\n")?;
    assert_eq!(code(&cluster, &["validate", &folder])?, Some(FINDINGS));
    cluster.daemon_mut("n1").stop()?;
    for command in [&["status"][..], &["get", "workloads"], &["get", "connections", "-o", "json"]] {
        let output = cluster.nodemesh("n1", command)?;
        assert_eq!(output.status.code(), Some(UNREACHABLE), "{output:?}");
        assert!(output.stdout.is_empty() && output.stderr.contains("admin.sock"), "{output:?}");
    }
    // Versions and catalogs can be asked for without a daemon.
    assert_eq!(code(&cluster, &["version"])?, Some(0));
    assert_eq!(code(&cluster, &["validate", &folder])?, Some(FINDINGS));
    assert!(binary("nodemesh").is_file());
    Ok(())
}
