//! Two nodes: a tunnel that dials, and a server whose applications do what the stream's service says.

use crate::ca::{Authority, Validity, init};
use crate::identity::Identities;
use crate::model::{NodeName, SpiffeId, TransportChoice, TrustDomain, WorkloadUid};
use crate::runtime::{Cores, Descriptors};
use crate::telemetry::bounds::AcceptFailures;
use crate::telemetry::tunnel::TunnelMetrics;
use crate::tunnel::{
    Config, Incoming, OpenError, Peer, RecvHalf, Refusal, ResetCode, SendHalf, Server, Stream, StreamHeader, Tunnel,
};
use bytes::Bytes;
use prometheus_client::registry::Registry;
use std::hash::Hasher as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

pub(super) const CART: &str = "spiffe://example.org/ns/shop/sa/cart";
pub(super) const SHOP: &str = "spiffe://example.org/ns/shop/sa/shop";
pub(super) const BANK: &str = "spiffe://example.org/ns/bank/sa/bank";
/// Longer than anything here takes on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn id(uri: &str) -> SpiffeId {
    SpiffeId::parse(uri).unwrap()
}

pub(super) fn authority() -> Authority {
    let directory = TempDir::new().unwrap();
    init(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
    Authority::open(directory.path()).unwrap()
}

/// A node that trusts `trusted` and holds `ids` issued by the first of them, valid from and to seconds from now.
pub(super) fn identities(trusted: &[&Authority], ids: &[&str], valid: (i64, i64)) -> Identities {
    let directory = TempDir::new().unwrap();
    for authority in trusted {
        authority.add_to_bundle(directory.path()).unwrap();
    }
    let now = OffsetDateTime::now_utc();
    let at = |seconds| now + time::Duration::seconds(seconds);
    for uri in ids {
        let validity = Validity { not_before: at(valid.0), not_after: at(valid.1) };
        trusted[0].sign(&id(uri), validity).unwrap().store(directory.path()).unwrap();
    }
    Identities::load(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap()
}

/// Both nodes' identities, valid for an hour.
fn of_one_authority() -> (Identities, Identities) {
    let authority = authority();
    let of = |ids: &[&str]| identities(&[&authority], ids, (-60, 3600));
    (of(&[CART, BANK]), of(&[SHOP]))
}

pub(super) struct World {
    pub(super) tunnel: Arc<Tunnel>,
    pub(super) peer: Peer,
    pub(super) choice: TransportChoice,
    /// Lets sleeping applications go on.
    pub(super) wake: Arc<Notify>,
    registry: Registry,
    server: JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl World {
    pub(super) fn new(choice: TransportChoice) -> Self {
        Self::with(choice, |_| {})
    }

    pub(super) fn with(choice: TransportChoice, adjust: impl FnOnce(&mut Config)) -> Self {
        let (client, server) = of_one_authority();
        Self::between(choice, client, server, adjust)
    }

    /// With so many descriptors for connections at either end.
    pub(super) fn with_descriptors(choice: TransportChoice, client_has: usize, server_has: usize) -> Self {
        let (client, server) = of_one_authority();
        let descriptors = [client_has, server_has].map(Descriptors::new);
        Self::made(choice, client, server, |_| {}, descriptors, Cores::current())
    }

    /// With these threads at the calling end.
    pub(super) fn on(cores: Cores, choice: TransportChoice) -> Self {
        let (client, server) = of_one_authority();
        Self::made(choice, client, server, |_| {}, [65_536, 65_536].map(Descriptors::new), cores)
    }

    pub(super) fn between(
        choice: TransportChoice,
        client: Identities,
        server: Identities,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        Self::made(choice, client, server, adjust, [65_536, 65_536].map(Descriptors::new), Cores::current())
    }

    fn made(
        choice: TransportChoice,
        client: Identities,
        server: Identities,
        adjust: impl FnOnce(&mut Config),
        [client_descriptors, server_descriptors]: [Descriptors; 2],
        cores: Cores,
    ) -> Self {
        let mut config = Config { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() };
        adjust(&mut config);
        let mut registry = Registry::default();
        let metrics = Arc::new(TunnelMetrics::register(&mut registry));
        let accepts = AcceptFailures::default();
        let server =
            Server::bind(config.clone(), server, Arc::clone(&metrics), server_descriptors, accepts, Cores::current())
                .unwrap();
        let address = server.addresses()[0];
        let wake = Arc::new(Notify::new());
        let server = tokio::spawn(applications(server, Arc::clone(&wake)));
        let tunnel = Arc::new(Tunnel::new(config, client, metrics, client_descriptors, cores));
        Self { tunnel, peer: peer(address), choice, wake, registry, server }
    }

    pub(super) async fn open(&self, service: &str) -> Result<Stream, OpenError> {
        self.open_to(&self.peer, service).await
    }

    pub(super) async fn open_to(&self, peer: &Peer, service: &str) -> Result<Stream, OpenError> {
        within(self.tunnel.open(self.choice, peer, header(service))).await
    }

    pub(super) async fn halves(&self, service: &str) -> (SendHalf, RecvHalf) {
        self.open(service).await.unwrap().split()
    }

    /// The far node goes away, with its connections.
    pub(super) fn stop_server(&self) {
        self.server.abort();
    }

    /// Sum of the samples whose line starts with `name` and contains all of `labels`.
    pub(super) fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines()
            .filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum()
    }

    pub(super) async fn until_metric(&self, name: &str, labels: &[&str], wanted: u64) {
        until(&format!("{name}{labels:?} is {wanted}"), || self.metric(name, labels) == wanted).await;
    }
}

pub(super) fn peer(address: SocketAddr) -> Peer {
    Peer {
        source: id(CART),
        destination: id(SHOP),
        workload: WorkloadUid::new("shop-1"),
        node: NodeName::parse("n2").unwrap(),
        address,
    }
}

pub(super) fn header(service: &str) -> StreamHeader {
    StreamHeader {
        protocol: crate::model::Protocol::Tcp,
        destination: "10.0.0.2:80".parse().unwrap(),
        service: Some(service.into()),
        source: "10.0.0.1:40000".parse().unwrap(),
        traceparent: None,
    }
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("took too long")
}

pub(super) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what} never came true");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Bytes that differ at every offset.
pub(super) fn pattern(offset: u64, length: usize) -> Bytes {
    (offset..offset + length as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

/// Reads to the end, checking the pattern; how many bytes came.
pub(super) async fn read_pattern(recv: &mut RecvHalf) -> Result<u64, crate::tunnel::StreamError> {
    let mut offset = 0;
    while let Some(bytes) = within(recv.recv()).await? {
        assert!(bytes == pattern(offset, bytes.len()), "wrong bytes after {offset}");
        offset += bytes.len() as u64;
    }
    Ok(offset)
}

pub(super) async fn send_pattern(send: &mut SendHalf, total: u64, chunk: usize) {
    let mut offset = 0;
    while offset < total {
        let length = chunk.min(usize::try_from(total - offset).unwrap());
        within(send.send(pattern(offset, length))).await.unwrap();
        offset += length as u64;
    }
    send.finish().unwrap();
}

pub(super) async fn read_all(recv: &mut RecvHalf) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = within(recv.recv()).await.unwrap() {
        all.extend_from_slice(&bytes);
    }
    all
}

async fn applications(mut server: Server, wake: Arc<Notify>) {
    let mut streams = server.incoming().remove(0);
    while let Some(incoming) = streams.recv().await {
        tokio::spawn(application(incoming, Arc::clone(&wake)));
    }
}

async fn application(incoming: Incoming, wake: Arc<Notify>) {
    assert_eq!((incoming.destination.as_str(), incoming.header.source.port()), (SHOP, 40000));
    let service = incoming.header.service.clone().unwrap();
    let source = incoming.source.clone();
    match service.as_str() {
        "refuse" => return incoming.refuse(Refusal::Denied),
        "drop" => return drop(incoming),
        "never" => {
            wake.notified().await;
            return incoming.refuse(Refusal::Timeout);
        }
        _ => {}
    }
    let (mut send, mut recv) = incoming.accept().split();
    let (verb, number) = service.split_once(':').unwrap_or((&service, "0"));
    let number: u64 = number.parse().unwrap();
    match verb {
        "echo" => {
            while let Ok(Some(bytes)) = recv.recv().await {
                if send.send(bytes).await.is_err() {
                    return;
                }
            }
            let _ = send.finish();
        }
        "whoami" => {
            let _ = send.send(Bytes::copy_from_slice(source.as_str().as_bytes())).await;
            let _ = send.finish();
        }
        "source" => {
            let mut offset = 0;
            while offset < number {
                let length = 50_000.min(usize::try_from(number - offset).unwrap());
                if send.send(pattern(offset, length)).await.is_err() {
                    return;
                }
                offset += length as u64;
            }
            let _ = send.finish();
            // The caller's direction stays open until it ends it.
            while let Ok(Some(_)) = recv.recv().await {}
        }
        "hash" => {
            let mut hasher = std::hash::DefaultHasher::new();
            let mut length = 0_u64;
            while let Some(bytes) = recv.recv().await.unwrap() {
                bytes.iter().for_each(|byte| hasher.write_u8(*byte));
                length += bytes.len() as u64;
            }
            let answer = [length.to_be_bytes(), hasher.finish().to_be_bytes()].concat();
            send.send(answer.into()).await.unwrap();
            send.finish().unwrap();
        }
        "sleep" => {
            wake.notified().await;
            let count = read_pattern(&mut recv).await.unwrap();
            let _ = send.send(Bytes::copy_from_slice(&count.to_be_bytes())).await;
            let _ = send.finish();
        }
        "reset" => {
            let _ = send.send(Bytes::from_static(b"partial")).await;
            let _ = recv.recv().await;
            send.reset(ResetCode(7));
        }
        "stop" => {
            recv.stop(ResetCode(9));
            wake.notified().await;
            let _ = send.send(Bytes::from_static(b"still here")).await;
            let _ = send.finish();
        }
        "outcome" => {
            // Tells how the caller's direction ended.
            let outcome = loop {
                match recv.recv().await {
                    Ok(Some(_)) => {}
                    Ok(None) => break "finished".to_owned(),
                    Err(error) => break format!("{error:?}"),
                }
            };
            let _ = send.send(outcome.into()).await;
            let _ = send.finish();
        }
        other => panic!("no application {other}"),
    }
}
