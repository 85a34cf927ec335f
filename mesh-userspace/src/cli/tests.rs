//! The command against a daemon that answers from a script.

use super::fake_daemon::FakeDaemon;
use super::*;
use crate::admin::documents::{
    CertificateRow, ConfigStatus, ConnectionCounts, EndpointCounts, MapRow, OutcomeRow, WorkloadCounts, parse_timestamp,
};
use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;

const NOW: &str = "2026-11-23T12:00:00Z";

/// Exit code, standard output, standard error.
pub(super) fn run(socket: &Path, arguments: &[&str]) -> (Exit, String, String) {
    let socket = socket.to_str().unwrap();
    let command = Command::try_parse_from(["nodemesh", "--socket", socket].iter().chain(arguments)).unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = command.execute_with(&mut out, &mut err, parse_timestamp(NOW).unwrap());
    (exit, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

pub(super) fn json<T: Item + Serialize>(items: Vec<T>) -> String {
    serde_json::to_string(&Document::new(items)).unwrap()
}

fn status() -> Status {
    Status {
        node: "n1".to_owned(),
        version: "0.1.0".to_owned(),
        abi: 1,
        uptime_seconds: 3_725,
        ready: false,
        not_ready: vec!["no valid MeshConfig yet".to_owned()],
        config: ConfigStatus {
            generation: 4,
            objects: BTreeMap::from([("Service".to_owned(), 2), ("WorkloadEntry".to_owned(), 3)]),
            errors: 1,
        },
        workloads: WorkloadCounts { local: 3, armed: 2, failed: 1 },
        connections: ConnectionCounts {
            active: 2,
            opened: 10,
            closed: 8,
            failed: 1,
            bytes_sent: 3_565_158,
            bytes_received: 512,
        },
        lanes: 5,
        certificates: vec![
            CertificateRow {
                id: "spiffe://example.org/ns/shop/sa/cart".to_owned(),
                serial: "0a1b".to_owned(),
                not_after: "2026-11-23T23:30:00Z".to_owned(),
                ..CertificateRow::default()
            },
            CertificateRow {
                id: "spiffe://example.org/ns/shop/sa/web".to_owned(),
                serial: "0a1c".to_owned(),
                not_after: "2026-11-23T11:58:00Z".to_owned(),
                ..CertificateRow::default()
            },
        ],
        outcomes: vec![
            OutcomeRow {
                hook: "connect".to_owned(),
                verdict: "capture".to_owned(),
                reason: "captured".to_owned(),
                count: 10,
            },
            OutcomeRow { hook: "connect".to_owned(), verdict: "pass".to_owned(), reason: "self".to_owned(), count: 0 },
        ],
        maps: vec![MapRow { name: "TUPLES".to_owned(), entries: 512, capacity: 65_536, bytes: 6 << 20 }],
    }
}

#[test]
fn status_reads_like_a_report() {
    let daemon = FakeDaemon::answering("/v1/status", json(vec![status()]));
    let (exit, out, err) = run(&daemon.socket(), &["status"]);
    let expected = "\
Node:         n1
Version:      0.1.0 (ABI 1)
Ready:        no: no valid MeshConfig yet
Uptime:       1h2m
Config:       generation 4: 2 Service, 3 WorkloadEntry; 1 error (nodemesh get diagnostics)
Workloads:    3 on this node, 2 captured, 1 failed
Connections:  2 open; 10 opened, 8 closed, 1 failed since the start
Traffic:      3.4MiB sent, 512B received
Lanes:        5 open

IDENTITY                              SERIAL  EXPIRES
spiffe://example.org/ns/shop/sa/cart  0a1b    2026-11-23T23:30:00Z (in 11h30m)
spiffe://example.org/ns/shop/sa/web   0a1c    2026-11-23T11:58:00Z (expired 2m0s ago)

HOOK     VERDICT  REASON    COUNT
connect  capture  captured     10

MAP     ENTRIES  CAPACITY  USED  MEMORY
TUPLES      512     65536    0%  6.0MiB
";
    assert_eq!((exit, out.as_str(), err.as_str()), (Exit::Ok, expected, ""));
}

fn workloads() -> Vec<WorkloadRow> {
    let row = |namespace: &str, name: &str| WorkloadRow {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        node: "n1".to_owned(),
        addresses: vec!["10.1.1.2".to_owned(), "fd00::2".to_owned()],
        network: "own".to_owned(),
        mode: "permissive".to_owned(),
        identity: format!("spiffe://example.org/ns/{namespace}/sa/{name}"),
        state: "armed".to_owned(),
        reason: None,
    };
    let failed =
        WorkloadRow { state: "failed".to_owned(), reason: Some("no such netns".to_owned()), ..row("shop", "web") };
    vec![failed, row("shop", "cart"), row("db", "redis")]
}

#[test]
fn workloads_are_sorted_and_aligned() {
    let daemon = FakeDaemon::answering("/v1/workloads", json(workloads()));
    let table = "\
NAMESPACE  NAME   NODE  ADDRESSES         MODE        STATE
db         redis  n1    10.1.1.2,fd00::2  permissive  armed
shop       cart   n1    10.1.1.2,fd00::2  permissive  armed
shop       web    n1    10.1.1.2,fd00::2  permissive  failed: no such netns
";
    for alias in ["workloads", "workload", "wl"] {
        assert_eq!(run(&daemon.socket(), &["get", alias]), (Exit::Ok, table.to_owned(), String::new()));
    }
    let (_, out, _) = run(&daemon.socket(), &["get", "wl", "--no-headers"]);
    assert!(out.starts_with("db    redis  n1") && out.lines().count() == 3, "{out}");
    let (_, out, _) = run(&daemon.socket(), &["get", "wl", "-o", "wide"]);
    assert!(out.lines().next().unwrap().ends_with("  NETWORK  IDENTITY"), "{out}");
    assert!(out.lines().nth(1).unwrap().ends_with("  spiffe://example.org/ns/db/sa/redis"), "{out}");
}

#[test]
fn services_show_their_endpoints() {
    let row = ServiceRow {
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
        vips: vec!["10.96.0.1".to_owned(), "fd00:96::1".to_owned()],
        ports: vec!["http:80/TCP".to_owned(), "redis:6379/TCP".to_owned()],
        endpoints: EndpointCounts { total: 3, local: 1 },
    };
    let daemon = FakeDaemon::answering("/v1/services", json(vec![row]));
    let table = "\
NAMESPACE  NAME  VIPS                  PORTS                       ENDPOINTS  LOCAL
shop       cart  10.96.0.1,fd00:96::1  http:80/TCP,redis:6379/TCP          3      1
";
    assert_eq!(run(&daemon.socket(), &["get", "svc"]), (Exit::Ok, table.to_owned(), String::new()));
}

fn connection() -> ConnectionRow {
    ConnectionRow {
        id: 7,
        direction: "outbound".to_owned(),
        protocol: "tcp".to_owned(),
        source: "10.1.1.2:40000".to_owned(),
        source_workload: Some("shop/web".to_owned()),
        source_identity: Some("spiffe://example.org/ns/shop/sa/web".to_owned()),
        destination: "10.96.0.1:80".to_owned(),
        service: Some("shop/cart".to_owned()),
        backend: Some("10.1.2.2:8080".to_owned()),
        node: Some("n2".to_owned()),
        transport: Some("lane".to_owned()),
        group: Some("X25519MLKEM768".to_owned()),
        bytes_sent: 2048,
        bytes_received: 10,
        age_seconds: 61.5,
        ..ConnectionRow::default()
    }
}

#[test]
fn connections_show_both_ends() {
    let daemon = FakeDaemon::answering("/v1/connections?limit=10000", json(vec![connection()]));
    let table = "\
DIRECTION  PROTOCOL  SOURCE                     DESTINATION   SERVICE    BACKEND        NODE  TRANSPORT  KX                SENT  RECEIVED   AGE
outbound   tcp       shop/web (10.1.1.2:40000)  10.96.0.1:80  shop/cart  10.1.2.2:8080  n2    lane       X25519MLKEM768  2.0KiB       10B  1m1s
";
    assert_eq!(run(&daemon.socket(), &["get", "conn"]), (Exit::Ok, table.to_owned(), String::new()));
}

#[test]
fn a_cut_answer_is_said_to_be_one() {
    let document = Document { total: Some(20_000), ..Document::new(vec![connection()]) };
    let body = serde_json::to_string(&document).unwrap();
    let daemon = FakeDaemon::answering("/v1/connections?limit=10000", body.clone());
    let (exit, out, err) = run(&daemon.socket(), &["get", "connections"]);
    assert_eq!((exit, out.lines().count()), (Exit::Partial, 2));
    assert_eq!(err, "note: 1 of 20000 connections are shown, the newest; --limit N shows more\n");
    let daemon = FakeDaemon::answering("/v1/connections?limit=1", body);
    let (exit, ..) = run(&daemon.socket(), &["get", "connections", "--limit", "1"]);
    assert_eq!(exit, Exit::Ok, "as many as were asked for");
}

#[test]
fn json_is_versioned() {
    let daemon = FakeDaemon::answering("/v1/workloads", json(workloads()));
    let (exit, out, _) = run(&daemon.socket(), &["get", "wl", "-o", "json"]);
    let document: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(exit, Exit::Ok);
    assert_eq!(document["apiVersion"], "cli.nodemesh.io/v1");
    assert_eq!(document["kind"], "WorkloadList");
    let expected = serde_json::json!({
        "namespace": "db", "name": "redis", "node": "n1", "addresses": ["10.1.1.2", "fd00::2"], "mode": "permissive",
        "identity": "spiffe://example.org/ns/db/sa/redis", "network": "own", "state": "armed",
    });
    assert_eq!((&document["items"][0], document["items"].as_array().unwrap().len()), (&expected, 3));
    let daemon = FakeDaemon::answering("/v1/status", json(vec![status()]));
    let (_, out, _) = run(&daemon.socket(), &["-o", "json", "status"]);
    let document: Document<Status> = serde_json::from_str(&out).unwrap();
    assert_eq!(document.items, [status()]);
}

#[test]
fn a_missing_daemon_is_exit_4_with_the_socket_and_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let missing = run(&socket, &["status"]);
    drop(UnixListener::bind(&socket).unwrap());
    let stale = run(&socket, &["get", "wl"]);
    for ((exit, out, err), advice) in [(missing, "with --socket"), (stale, "without removing its socket")] {
        assert_eq!((exit, out.as_str()), (Exit::Unreachable, ""));
        assert!(err.contains(socket.to_str().unwrap()) && err.contains(advice), "{err}");
        assert!(err.contains("help: ") && err.contains("nodemeshd run -c FILE"), "{err}");
    }
}

#[test]
fn a_daemon_that_breaks_off_or_hangs_is_exit_4() {
    let daemon = FakeDaemon::with(|_| "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_owned());
    let (exit, _, err) = run(&daemon.socket(), &["status"]);
    assert_eq!(exit, Exit::Unreachable, "{err}");
    assert!(err.contains("broke off"), "{err}");
    // Nobody accepts: the connection waits in the backlog.
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let (exit, _, err) = run(&socket, &["status", "--timeout", "1"]);
    assert_eq!(exit, Exit::Unreachable);
    assert!(err.contains("did not answer within 1 s"), "{err}");
}

#[test]
fn an_answer_of_another_version_or_an_error_is_exit_1() {
    let other = json(workloads()).replace("cli.nodemesh.io/v1", "cli.nodemesh.io/v9");
    for (body, text) in [
        (other, "it is cli.nodemesh.io/v9 WorkloadList"),
        (json(vec![status()]), "not understood"),
        ("<html>".to_owned(), "not understood"),
    ] {
        let daemon = FakeDaemon::answering("/v1/workloads", body);
        let (exit, out, err) = run(&daemon.socket(), &["get", "wl"]);
        assert_eq!((exit, out.as_str()), (Exit::Failure, ""), "{err}");
        assert!(err.contains(text) && err.contains("nodemesh version"), "{err}");
    }
    let daemon = FakeDaemon::answering("/elsewhere", String::new());
    let (exit, _, err) = run(&daemon.socket(), &["get", "svc"]);
    assert_eq!((exit, err.as_str()), (Exit::Failure, "error: nodemeshd refused: there is no /v1/services\n"));
}

#[test]
fn version_needs_no_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let own = format!("nodemesh   {:<7}  {:>3}", env!("CARGO_PKG_VERSION"), mesh_common::ABI_VERSION);
    let (exit, out, err) = run(&directory.path().join("none"), &["version"]);
    assert_eq!((exit, err.as_str(), out.lines().count()), (Exit::Ok, "", 2));
    assert!(out.lines().nth(1).unwrap().starts_with(&own), "{out}");
    let daemon = FakeDaemon::answering("/v1/status", json(vec![Status { version: "9.9.9".to_owned(), ..status() }]));
    let (_, out, _) = run(&daemon.socket(), &["version"]);
    assert!(out.lines().nth(2).unwrap().starts_with("nodemeshd  9.9.9"), "{out}");
}

#[test]
fn diagnostics_point_at_their_place() {
    let row = DiagnosticRow {
        file: "web.yaml".to_owned(),
        line: 3,
        column: 5,
        code: "M0203".to_owned(),
        severity: "error".to_owned(),
        object: Some("Service shop/cart".to_owned()),
        message: "unknown field".to_owned(),
        help: Some("did you mean `selector`?".to_owned()),
    };
    let daemon = FakeDaemon::answering("/v1/diagnostics", json(vec![row]));
    let text = "error[M0203]: Service shop/cart: unknown field\n --> web.yaml:3:5\n = help: did you mean `selector`?\n";
    assert_eq!(run(&daemon.socket(), &["get", "diag"]), (Exit::Ok, text.to_owned(), String::new()));
}

const SOUND: &str = "apiVersion: nodemesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                     spec: {trustDomain: example.org}\n";
const BROKEN: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n\
                      spec: {clusterIP: 10.96.0.1, selectr: {app: cart}, ports: [{port: 80}]}\n";

#[test]
fn validate_finds_without_a_daemon() {
    let catalog = tempfile::tempdir().unwrap();
    let directory = catalog.path().to_str().unwrap();
    let nowhere = Path::new("/nonexistent/admin.sock");
    std::fs::write(catalog.path().join("mesh.yaml"), SOUND).unwrap();
    let sound = run(nowhere, &["validate", directory]);
    assert_eq!(sound, (Exit::Ok, "no findings\n".to_owned(), String::new()));
    std::fs::write(catalog.path().join("shop.yaml"), BROKEN).unwrap();
    let (exit, out, err) = run(nowhere, &["validate", directory]);
    assert_eq!((exit, err.as_str()), (Exit::Findings, ""));
    assert!(out.contains("error[M0") && out.contains("shop.yaml:4:") && out.contains("selectr"), "{out}");
    assert!(out.ends_with("1 error, 0 warnings\n"), "{out}");
    let (exit, out, _) = run(nowhere, &["validate", directory, "-o", "json"]);
    let document: Document<DiagnosticRow> = serde_json::from_str(&out).unwrap();
    assert!(document.is_known());
    assert_eq!((exit, document.items.len()), (Exit::Findings, 1));
    assert_eq!((document.items[0].file.as_str(), document.items[0].line), ("shop.yaml", 4));
}

#[test]
fn validate_of_nothing_is_no_finding() {
    let (exit, out, err) = run(Path::new("/nonexistent/admin.sock"), &["validate", "/nonexistent/catalog"]);
    assert_eq!((exit, out.as_str()), (Exit::Failure, ""));
    assert!(err.starts_with("error: cannot read the catalog directory /nonexistent/catalog: "), "{err}");
}

#[test]
fn a_wrong_command_line_is_exit_2() {
    for arguments in [
        vec!["nodemesh"],
        vec!["nodemesh", "gett"],
        vec!["nodemesh", "get"],
        vec!["nodemesh", "validate"],
        vec!["nodemesh", "status", "-o", "yaml"],
        vec!["nodemesh", "status", "--timeout", "0"],
        vec!["nodemesh", "get", "conn", "--limit", "0"],
    ] {
        let error = Command::try_parse_from(&arguments).unwrap_err();
        assert_eq!(error.exit_code(), Exit::Usage as i32, "{arguments:?}");
    }
    <Command as clap::CommandFactory>::command().debug_assert();
}

/// A pipe whose reader has gone.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_closed_pipe_is_silent() {
    let daemon = FakeDaemon::answering("/v1/workloads", json(workloads()));
    let socket = daemon.socket();
    for output in ["table", "json"] {
        let arguments = ["nodemesh", "--socket", socket.to_str().unwrap(), "get", "wl", "-o", output];
        let mut err = Vec::new();
        let command = Command::try_parse_from(arguments).unwrap();
        assert_eq!(command.execute_with(&mut Closed, &mut err, SystemTime::now()), Exit::Ok);
        assert!(err.is_empty());
    }
}
