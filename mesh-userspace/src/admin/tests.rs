//! The server over real sockets, asked in plain HTTP.

use super::documents::{CertificateRow, Document, ErrorDocument, RootRow, ServiceRow, Status, WorkloadRow};
use super::*;
use crate::telemetry::Build;
use crate::telemetry::live::{Direction, Flow, LiveConnections};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

struct Running {
    directory: tempfile::TempDir,
    metrics: std::net::SocketAddr,
    not_ready: Arc<Mutex<Vec<String>>>,
    live: LiveConnections,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = Config { socket: directory.path().join("admin.sock"), listen: ([127, 0, 0, 1], 0).into() };
        let server = Server::bind(&config).unwrap();
        let metrics = server.metrics_address().unwrap();
        let not_ready = Arc::new(Mutex::new(vec!["no catalog yet".to_owned(), "no identity yet".to_owned()]));
        let live = LiveConnections::default();
        let stop = CancellationToken::new();
        let served = tokio::spawn(server.serve(sources(&not_ready, &live), stop.clone()));
        Self { directory, metrics, not_ready, live, stop, served }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    async fn page(&self, path: &str, headers: &str) -> (u16, String, String) {
        get(TcpStream::connect(self.metrics).await.unwrap(), path, headers).await
    }

    async fn document(&self, path: &str) -> (u16, String) {
        let (status, head, body) = get(UnixStream::connect(self.socket()).await.unwrap(), path, "").await;
        assert!(head.contains("content-type: application/json"), "{head}");
        (status, body)
    }
}

fn sources(not_ready: &Arc<Mutex<Vec<String>>>, live: &LiveConnections) -> Sources {
    let (not_ready, live) = (not_ready.clone(), live.clone());
    let service = |name: &str| ServiceRow { name: name.to_owned(), ..ServiceRow::default() };
    Sources {
        metrics: Arc::new(Metrics::new(Build { version: "0.1.0", abi: 1 })),
        not_ready: Arc::new(move || not_ready.lock().unwrap().clone()),
        status: Arc::new(|| Status { node: "n1".to_owned(), ..Status::default() }),
        workloads: Arc::new(Vec::new),
        services: Arc::new(move || vec![service("web"), service("cart")]),
        policy: PolicySources {
            policies: Arc::new(Vec::new),
            traffic: Arc::new(Vec::new),
            plaintext: Arc::new(Vec::new),
            explain: Arc::new(|question| Err(format!("{question:?} is unclear"))),
        },
        connections: Arc::new(move |limit| live.snapshot(limit)),
        endpoints: Arc::new(Vec::new),
        lanes: Arc::new(|| panic!("a question that panics")),
        diagnostics: Arc::new(Vec::new),
        certificates: certificates(),
        authority: None,
    }
}

const CART: &str = "spiffe://example.org/ns/shop/sa/cart";

fn certificates() -> Certificates {
    Certificates {
        list: Arc::new(|| vec![CertificateRow { id: CART.to_owned(), ..CertificateRow::default() }]),
        chain: Arc::new(|id| (id == CART).then(|| "a chain".to_owned())),
        bundle: Arc::new(|| vec![RootRow { subject: "CN=root".to_owned(), version: 3, ..RootRow::default() }]),
        rotate: Arc::new(|id| match id {
            None => Ok(2),
            Some(CART) => Ok(1),
            Some(id) => Err(format!("no workload of this node has the identity {id}")),
        }),
    }
}

/// Status code, head, body.
async fn get(stream: impl AsyncRead + AsyncWrite + Unpin, path: &str, headers: &str) -> (u16, String, String) {
    exchange(stream, "GET", path, headers).await
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    method: &str,
    path: &str,
    headers: &str,
) -> (u16, String, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn metrics_come_in_the_format_that_is_asked_for() {
    let running = Running::start();
    let (status, head, body) = running.page("/metrics", "").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("\nnodemesh_build_info{version=\"0.1.0\",abi=\"1\"} 1\n"), "{body}");
    assert!(body.contains("\nprocess_resident_memory_bytes "), "{body}");
    let (_, head, body) = running.page("/metrics", "accept: application/openmetrics-text;version=1.0.0\r\n").await;
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let running = Running::start();
    assert_eq!(running.page("/healthz", "").await.0, 200, "it lives before it is ready");
    let (status, _, body) = running.page("/readyz", "").await;
    assert_eq!((status, body.as_str()), (503, "not ready: no catalog yet\nnot ready: no identity yet\n"));
    let (_, body) = running.document("/v1/status").await;
    let document: Document<Status> = serde_json::from_str(&body).unwrap();
    assert!(!document.items[0].ready && document.items[0].not_ready.len() == 2);
    running.not_ready.lock().unwrap().clear();
    let (status, _, body) = running.page("/readyz", "").await;
    assert_eq!((status, body.as_str()), (200, "ready\n"));
    let (_, body) = running.document("/v1/status").await;
    let document: Document<Status> = serde_json::from_str(&body).unwrap();
    assert!(document.is_known() && document.items[0].ready && document.items[0].not_ready.is_empty());
}

#[tokio::test]
async fn rows_are_sorted_and_an_empty_list_is_a_document() {
    let running = Running::start();
    let (status, body) = running.document("/v1/services").await;
    let document: Document<ServiceRow> = serde_json::from_str(&body).unwrap();
    let names: Vec<_> = document.items.iter().map(|row| row.name.as_str()).collect();
    assert_eq!((status, names), (200, vec!["cart", "web"]));
    let (_, body) = running.document("/v1/workloads").await;
    let document: Document<WorkloadRow> = serde_json::from_str(&body).unwrap();
    assert!(document.is_known() && document.items.is_empty());
}

#[tokio::test]
async fn a_certificate_is_shown_with_its_chain_if_it_is_asked_for_by_name() {
    let running = Running::start();
    let (_, body) = running.document("/v1/certificates").await;
    let document: Document<CertificateRow> = serde_json::from_str(&body).unwrap();
    assert!(document.is_known() && document.items[0].pem.is_none());
    let (_, body) = running.document(&format!("/v1/certificates?id={CART}")).await;
    let document: Document<CertificateRow> = serde_json::from_str(&body).unwrap();
    assert_eq!(document.items[0].pem.as_deref(), Some("a chain"));
    let (status, body) = running.document("/v1/certificates?id=spiffe://example.org/ns/a/sa/b").await;
    assert!(status == 404 && body.contains("this node has no identity"), "{body}");
    let (_, body) = running.document("/v1/bundle").await;
    let document: Document<RootRow> = serde_json::from_str(&body).unwrap();
    assert_eq!((document.items[0].subject.as_str(), document.items[0].version), ("CN=root", 3));
}

#[tokio::test]
async fn certificates_are_renewed_on_request_and_only_by_post() {
    let running = Running::start();
    let post = async |path: &str| {
        let (status, _, body) = exchange(UnixStream::connect(running.socket()).await.unwrap(), "POST", path, "").await;
        (status, body)
    };
    let (status, body) = post("/v1/certificates/rotate").await;
    assert!(status == 200 && body.contains("\"identities\":2"), "{body}");
    let (status, body) = post(&format!("/v1/certificates/rotate?id={CART}")).await;
    assert!(status == 200 && body.contains("\"identities\":1"), "{body}");
    let (status, body) = post("/v1/certificates/rotate?id=other").await;
    assert!(status == 409 && body.contains("no workload of this node has the identity other"), "{body}");
    let (status, _, _) = get(UnixStream::connect(running.socket()).await.unwrap(), "/v1/certificates/rotate", "").await;
    assert_eq!(status, 405);
}

#[tokio::test]
async fn an_unclear_question_is_refused_with_what_is_unclear() {
    let running = Running::start();
    let (status, body) = running.document("/v1/explain?source=shop%2Fweb&destination=10.0.0.1&port=80").await;
    let refused: ErrorDocument = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 400);
    for part in ["shop/web", "10.0.0.1", "Some(80)", "is unclear"] {
        assert!(refused.message.contains(part), "{}", refused.message);
    }
    for path in ["/v1/policies", "/v1/plaintext", "/v1/traffic"] {
        assert_eq!(running.document(path).await.0, 200);
    }
    running.stop.cancel();
    running.served.await.unwrap();
}

#[tokio::test]
async fn connections_are_limited_and_counted() {
    let running = Running::start();
    let flow = |port| Flow::new(Direction::Inbound, ([10, 0, 0, 1], port).into(), ([10, 0, 0, 2], 80).into());
    let _guards: Vec<_> = (1..=5).map(|port| running.live.insert(flow(port), Arc::default())).collect();
    let (_, body) = running.document("/v1/connections?limit=2").await;
    let document: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&document["total"], &document["kind"]), (&5.into(), &"ConnectionList".into()));
    let sources: Vec<_> = document["items"].as_array().unwrap().iter().map(|row| row["source"].clone()).collect();
    assert_eq!(sources, ["10.0.0.1:4", "10.0.0.1:5"]);
}

#[tokio::test]
async fn what_is_not_there_and_what_fails_is_said_in_json() {
    let running = Running::start();
    let (status, body) = running.document("/v2/status").await;
    let error: ErrorDocument = serde_json::from_str(&body).unwrap();
    assert_eq!((status, error.message.as_str()), (404, "there is no /v2/status"));
    let (status, body) = running.document("/v1/lanes").await;
    let error: ErrorDocument = serde_json::from_str(&body).unwrap();
    assert_eq!((status, error.kind.as_str()), (500, "Error"));
    assert_eq!(running.page("/v1/status", "").await.0, 404, "the CLI's documents are not on the TCP port");
}

#[tokio::test]
async fn idle_clients_do_not_keep_others_out_of_the_socket() {
    let running = Running::start();
    // Fewer than the bound: they cost a place each, and nothing else.
    let mut idle = Vec::new();
    for _ in 0..32 {
        idle.push(UnixStream::connect(running.socket()).await.unwrap());
    }
    assert_eq!(running.document("/v1/status").await.0, 200);
    assert_eq!(running.page("/healthz", "").await.0, 200);
}

#[tokio::test]
async fn stopping_closes_idle_connections_and_removes_the_socket() {
    let running = Running::start();
    let mut idle = TcpStream::connect(running.metrics).await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    running.stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), running.served).await.unwrap().unwrap();
    assert!(!running.directory.path().join("admin.sock").exists());
    assert!(TcpStream::connect(running.metrics).await.is_err());
}

#[tokio::test]
async fn a_taken_address_is_named() {
    let running = Running::start();
    let config = Config { socket: running.directory.path().join("other.sock"), listen: running.metrics };
    let error = Server::bind(&config).unwrap_err().to_string();
    assert!(error.contains(&running.metrics.to_string()), "{error}");
    let config = Config { socket: running.socket(), listen: ([127, 0, 0, 1], 0).into() };
    let error = Server::bind(&config).unwrap_err().to_string();
    assert!(error.contains("admin.sock") && error.contains("another daemon answers"), "{error}");
}
