//! Tokens, nodes, joining and rotation, as the operator types them, against a real authority.

use super::tests::run;
use super::{Command, Exit};
use crate::admin::ca_documents::{CaRow, NodeRow, TokenRow};
use crate::admin::documents::Document;
use crate::admin::{self, AuthoritySources};
use crate::ca::{Authority, Placement, Server, Service, init};
use crate::model::TrustDomain;
use crate::telemetry::bounds::AcceptFailures;
use crate::telemetry::ca::CaMetrics;
use crate::telemetry::{Build, Metrics};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// A process with an authority: its port and its admin socket.
struct Process {
    directory: TempDir,
    runtime: Option<tokio::runtime::Runtime>,
    address: String,
}

impl Process {
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let ca = directory.path().join("ca");
        init(&ca, &TrustDomain::parse("example.org").unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let address = runtime.block_on(async {
            let mut metrics = Metrics::new(Build { version: "0.1.0", abi: 1 });
            let placement: Placement = Arc::new(|_, _| false);
            let metrics_of_ca = CaMetrics::register(metrics.registry());
            let service = Service::new(Authority::open(&ca).unwrap(), placement, metrics_of_ca).unwrap();
            let server = Server::bind(&[([127, 0, 0, 1], 0).into()], AcceptFailures::default()).unwrap();
            let listen = server.addresses().unwrap();
            let config =
                admin::Config { socket: directory.path().join("admin.sock"), listen: ([127, 0, 0, 1], 0).into() };
            let admin = admin::Server::bind(&config).unwrap();
            let authority = admin::Hosted { service: service.clone(), listen: listen.clone() };
            let sources = AuthoritySources { metrics: Arc::new(metrics), not_ready: Arc::new(Vec::new), authority };
            tokio::spawn(admin.serve_authority(sources, CancellationToken::new()));
            tokio::spawn(server.serve(service, CancellationToken::new()));
            listen[0].to_string()
        });
        Self { directory, runtime: Some(runtime), address }
    }

    fn run(&self, arguments: &[&str]) -> (Exit, String, String) {
        run(&self.socket(), arguments)
    }

    fn rows<T: serde::de::DeserializeOwned>(&self, arguments: &[&str]) -> Vec<T> {
        let (exit, out, err) = self.run(&[arguments, &["-o", "json"]].concat());
        assert_eq!((exit, err.as_str()), (Exit::Ok, ""));
        serde_json::from_str::<Document<T>>(&out).unwrap().items
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    /// Runs a join line as it was printed, with its end replaced.
    fn join(&self, line: &str, node: &str, directory: &Path) -> (Exit, String, String) {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..4], ["nodemesh", "join", "--ca", self.address.as_str()]);
        let last = words.len() - 1;
        words[last] = node;
        let directory = directory.to_str().unwrap();
        words.extend(["--directory", directory]);
        run(Path::new("/nonexistent/admin.sock"), &words[1..])
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

#[test]
fn the_printed_line_lets_a_node_join_once() {
    let process = Process::start();
    let (exit, line, note) = process.run(&["node", "token", "create", "--ttl", "30m"]);
    assert_eq!((exit, line.lines().count()), (Exit::Ok, 1));
    assert!(note.contains("works once, until"), "{note}");
    let identity = process.directory.path().join("n1");
    let (exit, out, err) = process.join(&line, "n1", &identity);
    assert_eq!((exit, err.as_str()), (Exit::Ok, ""));
    assert!(out.contains("spiffe://example.org/node/n1") && identity.join("node/key.pem").exists(), "{out}");
    let (exit, out, err) = process.join(&line, "n2", &process.directory.path().join("n2"));
    assert_eq!((exit, out.as_str()), (Exit::Failure, ""));
    assert!(err.contains("token_used") && err.contains("n1"), "{err}");
    let tokens: Vec<TokenRow> = process.rows(&["node", "token", "list"]);
    assert_eq!((tokens[0].state.as_str(), tokens[0].used_by.as_deref()), ("used", Some("n1")));
    assert!(tokens[0].token.is_none(), "a token is shown once");
    let nodes: Vec<NodeRow> = process.rows(&["node", "list"]);
    assert_eq!((nodes.len(), nodes[0].name.as_str(), nodes[0].state.as_str()), (1, "n1", "joined"));
    let (exit, out, _) = process.run(&["node", "revoke", "n1"]);
    assert!(exit == Exit::Ok && out.contains("revoked"), "{out}");
    let (exit, _, err) = process.run(&["node", "revoke", "n7"]);
    assert_eq!((exit, err.as_str()), (Exit::Failure, "error: nodemeshd refused: node n7 is not on record\n"));
}

#[test]
fn tokens_are_bound_listed_and_revoked() {
    let process = Process::start();
    let made: Vec<TokenRow> = process.rows(&["node", "token", "create", "--node", "n1"]);
    assert_eq!((made[0].node.as_deref(), made[0].addresses.as_slice()), (Some("n1"), &[process.address.clone()][..]));
    let (exit, out, _) = process.run(&["node", "token", "revoke", &made[0].id]);
    assert!(exit == Exit::Ok && out.contains("revoked"), "{out}");
    let line = format!("nodemesh join --ca {} --token {} --node x", process.address, made[0].token.as_ref().unwrap());
    let (exit, _, err) = process.join(&line, "n1", &process.directory.path().join("n1"));
    assert!(exit == Exit::Failure && err.contains("token_revoked"), "{err}");
    let (exit, _, err) = process.run(&["node", "token", "revoke", "0123456789abcdef"]);
    assert!(exit == Exit::Failure && err.contains("there is no token"), "{err}");
    let (exit, _, err) = process.run(&["node", "token", "revoke", "../ca"]);
    assert!(exit == Exit::Failure && err.contains("no token id"), "{err}");
}

#[test]
fn a_rotation_is_shown_and_not_begun_twice() {
    let process = Process::start();
    let (exit, out, _) = process.run(&["ca", "status"]);
    assert!(
        exit == Exit::Ok && out.contains("Trust domain:  example.org") && out.contains("Rotation:      none"),
        "{out}"
    );
    let before: Vec<CaRow> = process.rows(&["ca", "status"]);
    let after: Vec<CaRow> = process.rows(&["ca", "rotate", "intermediate"]);
    assert_eq!((after[0].epoch, after[0].bundle_version), (before[0].epoch + 1, before[0].bundle_version));
    let (exit, out, _) = process.run(&["ca", "rotate", "root", "--now"]);
    assert!(exit == Exit::Ok && out.contains("the new root signs"), "{out}");
    let (exit, _, err) = process.run(&["ca", "rotate", "root"]);
    assert!(exit == Exit::Failure && err.contains("being rotated already"), "{err}");
}

#[test]
fn joining_fails_with_what_to_do() {
    let process = Process::start();
    let (_, line, _) = process.run(&["node", "token", "create"]);
    let token = line.split_whitespace().nth(5).unwrap();
    let directory = process.directory.path().join("n1");
    let join = |address: &str, token: &str| {
        let arguments =
            ["join", "--ca", address, "--token", token, "--node", "n1", "--directory", directory.to_str().unwrap()];
        run(Path::new("/nonexistent/admin.sock"), &arguments)
    };
    let (exit, _, err) = join("127.0.0.1:1", token);
    assert!(exit == Exit::Unreachable && err.contains("help: name the address"), "{err}");
    let (exit, _, err) = join(&process.address, "mj1.nonsense");
    assert!(exit == Exit::Failure && err.contains("node token create") && !err.contains("nonsense"), "{err}");
    let other = Process::start();
    let (exit, _, err) = join(&other.address, token);
    assert!(exit == Exit::Failure && err.contains("the token was not sent"), "{err}");
    let file = process.directory.path().join("token");
    std::fs::write(&file, format!("{token}\n")).unwrap();
    assert_eq!(join(&process.address, &format!("@{}", file.display())).0, Exit::Ok);
}

#[test]
fn senseless_arguments_are_wrong_usage() {
    for arguments in [
        vec!["nodemesh", "node", "token", "create", "--ttl", "25h"],
        vec!["nodemesh", "node", "token", "create", "--ttl", "1"],
        vec!["nodemesh", "node", "token", "create", "--node", "N_1"],
        vec!["nodemesh", "node", "revoke"],
        vec!["nodemesh", "join", "--ca", "x:1", "--node", "n1"],
        vec!["nodemesh", "ca", "rotate", "leaf"],
    ] {
        assert_eq!(Command::try_parse_from(&arguments).unwrap_err().exit_code(), Exit::Usage as i32, "{arguments:?}");
    }
}
