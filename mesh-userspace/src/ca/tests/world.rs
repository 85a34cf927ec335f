//! An authority that serves over real sockets, and those who ask it.

use crate::ca::authority::public_key_digest;
use crate::ca::csr;
use crate::ca::key::Key;
use crate::ca::tls::{joining_config, node_config, server_name};
use crate::ca::{
    Authority, CaClient, JoinError, Lives, Membership, Placement, Server, Service, Token, Validity, init, join,
};
use crate::identity::SourceError;
use crate::model::{NodeName, SpiffeId, TrustDomain};
use crate::telemetry::bounds::AcceptFailures;
use crate::telemetry::ca::CaMetrics;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use prometheus_client::registry::Registry;
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

pub(super) const CART: &str = "spiffe://example.org/ns/shop/sa/cart";
pub(super) const BANK: &str = "spiffe://example.org/ns/bank/sa/bank";

pub(super) fn name(node: &str) -> NodeName {
    NodeName::parse(node).unwrap()
}

pub(super) fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// A running authority of `example.org`.
pub(super) struct World {
    pub(super) directory: TempDir,
    pub(super) service: Arc<Service>,
    pub(super) address: SocketAddr,
    registry: Registry,
    /// Node and identity: what the catalog places where.
    pub(super) placed: Arc<Mutex<Vec<(String, String)>>>,
    stop: CancellationToken,
    served: Option<JoinHandle<()>>,
}

impl World {
    pub(super) fn start() -> Self {
        Self::with(Lives { workload: Duration::from_hours(1), node: Duration::from_hours(2) })
    }

    pub(super) fn with(lives: Lives) -> Self {
        let directory = TempDir::new().unwrap();
        init(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
        Self::serve(directory, lives)
    }

    fn serve(directory: TempDir, lives: Lives) -> Self {
        let authority = Authority::open_with(directory.path(), lives, now()).unwrap();
        let placed = Arc::new(Mutex::new(vec![("n1".to_owned(), CART.to_owned())]));
        let catalog = placed.clone();
        let placement: Placement = Arc::new(move |node, id| {
            catalog.lock().unwrap().iter().any(|(on, of)| on == node.as_str() && of == id.as_str())
        });
        let mut registry = Registry::with_prefix("nodemesh");
        let service = Service::new(authority, placement, CaMetrics::register(&mut registry)).unwrap();
        let server = Server::bind(&[([127, 0, 0, 1], 0).into()], AcceptFailures::default()).unwrap();
        let address = server.addresses().unwrap()[0];
        let stop = CancellationToken::new();
        let served = Some(tokio::spawn(server.serve(service.clone(), stop.clone())));
        Self { directory, service, address, registry, placed, stop, served }
    }

    /// Ends the process, so to speak, and starts it again with the same directory.
    pub(super) async fn restart(mut self) -> Self {
        let lives = self.authority().lives();
        self.stop.cancel();
        self.served.take().unwrap().await.unwrap();
        let gone = Arc::downgrade(&self.service);
        let directory = std::mem::replace(&mut self.directory, TempDir::new().unwrap());
        drop(self);
        // A look for what is due may still run.
        let closed = async {
            while gone.strong_count() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), closed).await.unwrap();
        Self::serve(directory, lives)
    }

    pub(super) fn authority(&self) -> &Authority {
        self.service.authority()
    }

    pub(super) fn token(&self, node: Option<&str>) -> Token {
        let node = node.map(name);
        self.authority().create_token(Duration::from_mins(5), node.as_ref(), now()).unwrap().token
    }

    pub(super) fn refused(&self, reason: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let sample = format!("nodemesh_ca_refused_total{{reason=\"{reason}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&sample));
        line.unwrap_or_else(|| panic!("no {sample} in\n{text}")).parse().unwrap()
    }

    /// Lets a node join, and returns its identity directory.
    pub(super) async fn join(&self, node: &str) -> TempDir {
        let directory = TempDir::new().unwrap();
        self.join_into(&self.token(None), node, &directory).await.unwrap();
        directory
    }

    pub(super) async fn join_into(&self, token: &Token, node: &str, at: &TempDir) -> Result<Membership, JoinError> {
        join(&self.address.to_string(), token, &name(node), at.path(), Duration::from_secs(10)).await
    }

    /// [`Self::join_into`], which must be refused; returns the reason.
    pub(super) async fn is_refused(&self, token: &Token, node: &str) -> String {
        let directory = TempDir::new().unwrap();
        match self.join_into(token, node, &directory).await {
            Err(JoinError::Refused { reason, .. }) => {
                assert!(!directory.path().join("node/cert.pem").exists());
                reason
            }
            other => panic!("not refused: {other:?}"),
        }
    }

    pub(super) fn client(&self, directory: &TempDir) -> Arc<CaClient> {
        self.client_of(directory, vec![self.address.to_string()])
    }

    pub(super) fn client_of(&self, directory: &TempDir, addresses: Vec<String>) -> Arc<CaClient> {
        let timeout = Duration::from_secs(10);
        CaClient::open(directory.path(), addresses, timeout).unwrap()
    }

    /// An attacker's configuration without a certificate, who knows the root.
    pub(super) fn stranger(&self) -> Arc<ClientConfig> {
        joining_config(public_key_digest(&self.authority().bundle().roots[0]).unwrap()).unwrap()
    }

    /// An attacker's configuration with a certificate of a workload.
    pub(super) fn workload(&self, id: &str) -> Arc<ClientConfig> {
        let id = SpiffeId::parse(id).unwrap();
        let issued = self.authority().sign(&id, Validity::starting_now(Duration::from_secs(60)).unwrap()).unwrap();
        let key = Key::from_der(&pem_body(issued.key_pem())).unwrap();
        self.with_certificate(issued.chain().to_vec(), &key)
    }

    pub(super) fn with_certificate(&self, chain: Vec<CertificateDer<'static>>, key: &Key) -> Arc<ClientConfig> {
        node_config(&self.authority().bundle().roots, self.authority().trust_domain(), chain, key).unwrap()
    }

    /// One request, byte for byte as an attacker likes it: status and JSON.
    pub(super) async fn ask(&self, config: Arc<ClientConfig>, method: Method, path: &str, body: &str) -> (u16, Value) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let root = public_key_digest(&self.authority().bundle().roots[0]).unwrap();
        let stream = TlsConnector::from(config).connect(server_name(root), stream).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "ca");
        let answer = sender.send_request(request.body(Full::new(Bytes::from(body.to_owned()))).unwrap()).await.unwrap();
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        driver.abort();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn pem_body(pem: &str) -> Vec<u8> {
    use rustls_pki_types::pem::PemObject;
    rustls_pki_types::PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap().secret_der().to_vec()
}

/// A request for `uri` under a fresh key.
pub(super) fn request(uri: &str) -> Vec<u8> {
    csr::make(&Key::generate().unwrap(), uri).unwrap()
}

/// The label of a refusal.
pub(super) fn reason(error: &SourceError) -> &str {
    match error {
        SourceError::Refused { reason, .. } => reason,
        other => panic!("not refused: {other}"),
    }
}
