//! The task against an authority that follows a script, in real time and with lives of seconds.

use super::*;
use crate::identity::scripted_source::{Root, ScriptedSource};
use crate::model::TrustDomain;
use prometheus_client::registry::Registry;
use std::collections::BTreeSet;
use tempfile::TempDir;
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

fn id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/ns/shop/sa/{name}")).unwrap()
}

/// A node whose issuer runs until dropped.
struct Node {
    source: ScriptedSource,
    identities: Identities,
    ready: Ready,
    registry: Registry,
    running: JoinHandle<Result<()>>,
    _directory: TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.running.abort();
    }
}

impl Node {
    fn start(life: Duration, script: impl FnOnce(&ScriptedSource)) -> Self {
        let source = ScriptedSource::new(life);
        let directory = TempDir::new().unwrap();
        source.enrol(directory.path());
        script(&source);
        let domain = TrustDomain::parse("example.org").unwrap();
        let (identities, orders) = Identities::issued(directory.path(), &domain).unwrap();
        let ((ready, _), mut registry) = (Ready::blocked("made"), Registry::default());
        let metrics = CertificateMetrics::register(&mut registry);
        let issuer = Issuer::new(identities.clone(), orders, Arc::new(source.clone()), metrics, ready.clone());
        Self { source, identities, ready, registry, running: tokio::spawn(issuer.run()), _directory: directory }
    }

    fn wants(&self, names: &[&str]) {
        self.identities.want(names.iter().map(|name| id(name)).collect());
    }

    async fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}: {:#?}", self.identities.status());
            assert!(!self.running.is_finished(), "the task has ended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn serial(&self, name: &str) -> Option<String> {
        let certificates = self.identities.certificates().into_iter();
        certificates.filter(|certificate| certificate.id == id(name)).map(|certificate| certificate.serial).next()
    }

    fn issuance(&self, name: &str) -> Issuance {
        let status = self.identities.status().into_iter().find(|status| status.id == id(name));
        status.expect("it is wanted").issuance
    }

    fn scrape(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

#[tokio::test]
async fn what_is_wanted_is_there_and_what_is_not_wanted_any_more_is_gone() {
    let node = Node::start(HOUR, |_| ());
    assert_eq!(node.ready.outstanding(), [AWAITED], "which identities are wanted is not known yet");
    node.wants(&["cart", "shop"]);
    node.until("both are issued", || node.identities.certificates().len() == 2).await;
    node.until("the node is ready", || node.ready.outstanding().is_empty()).await;
    let cart = node.serial("cart");
    node.wants(&["cart", "bank"]);
    node.until("another is issued", || node.serial("bank").is_some()).await;
    node.until("the other is gone", || node.serial("shop").is_none()).await;
    assert_eq!(node.serial("cart"), cart, "nothing happens to the one that stays");
    let asked: usize = node.source.script().asked.iter().map(Vec::len).sum();
    assert_eq!(asked, 3);
    node.until("the status says it", || node.issuance("cart").state == State::Valid).await;
    assert!(node.issuance("cart").next_renewal.is_some());
}

#[tokio::test]
async fn a_node_without_workloads_is_ready() {
    let node = Node::start(HOUR, |source| source.script().outage = Some(SourceError::Unavailable("gone".to_owned())));
    node.wants(&[]);
    node.until("the node is ready", || node.ready.outstanding().is_empty()).await;
}

#[tokio::test]
async fn many_are_asked_for_in_bounded_batches() {
    let node = Node::start(HOUR, |_| ());
    let names: Vec<_> = (0..150).map(|number| format!("a{number}")).collect();
    node.wants(&names.iter().map(String::as_str).collect::<Vec<_>>());
    node.until("all are issued", || node.identities.certificates().len() == 150).await;
    let sizes: Vec<_> = node.source.script().asked.iter().map(Vec::len).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 150);
    assert!(sizes.iter().all(|size| *size <= BATCH), "{sizes:?}");
}

#[tokio::test]
async fn a_flaky_authority_is_never_noticed_by_peers() {
    let node = Node::start(Duration::from_secs(15), |source| source.script().is_flaky = true);
    node.wants(&["cart"]);
    node.until("a certificate is issued", || node.serial("cart").is_some()).await;
    let mut seen = BTreeSet::new();
    node.until("it is renewed twice", || {
        let end = node.identities.expiry_of(&id("cart")).expect("there is always a certificate");
        assert!(end > OffsetDateTime::now_utc(), "it has expired");
        seen.extend(node.serial("cart"));
        seen.len() == 3
    })
    .await;
    let keys: BTreeSet<_> = seen.iter().collect();
    assert_eq!(keys.len(), 3);
    let text = node.scrape();
    assert!(text.contains("ca_requests_seconds_count{operation=\"sign\",result=\"ok\"} 3"), "{text}");
    for line in ["cert_rotations_total{result=\"success\"} 3", "cert_rotations_total{result=\"unavailable\"}"] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn every_certificate_has_a_new_key() {
    let node = Node::start(HOUR, |_| ());
    node.wants(&["cart"]);
    node.until("a certificate is issued", || node.serial("cart").is_some()).await;
    let public_key = || {
        let chain = node.identities.chain(&id("cart")).unwrap();
        x509_parser::parse_x509_certificate(&chain[0]).unwrap().1.public_key().raw.to_vec()
    };
    let (serial, key) = (node.serial("cart"), public_key());
    assert!(node.identities.rotate(Some(&id("shop"))).is_err(), "not one of this node");
    assert_eq!(node.identities.rotate(Some(&id("cart"))).unwrap(), 1);
    node.until("it is renewed by hand", || node.serial("cart") != serial).await;
    assert_ne!(public_key(), key);
    let serial = node.serial("cart");
    assert_eq!(node.identities.rotate(None).unwrap(), 1);
    node.until("all are renewed by hand", || node.serial("cart") != serial).await;
}

#[tokio::test]
async fn an_authority_that_is_away_holds_readiness_back_and_says_so() {
    let silence = SourceError::Unavailable("connection refused".to_owned());
    let node = Node::start(HOUR, |source| source.script().outage = Some(silence.clone()));
    node.wants(&["cart"]);
    node.until("the reason is told", || node.ready.outstanding() == [UNREACHABLE]).await;
    node.source.script().outage = None;
    node.until("the node is ready", || node.ready.outstanding().is_empty()).await;
    assert!(node.serial("cart").is_some());
    // Later it stays ready: what is in use is good for long.
    node.source.script().outage = Some(silence);
    node.identities.rotate(None).unwrap();
    node.until("it is late", || node.issuance("cart").state == State::Late).await;
    assert!(node.issuance("cart").last_error.unwrap().contains("connection refused"));
    assert!(node.ready.outstanding().is_empty() && node.serial("cart").is_some());
}

#[tokio::test]
async fn a_refusal_is_an_answer_and_is_asked_again() {
    let node = Node::start(HOUR, |source| source.script().refused = vec!["/cart"]);
    node.wants(&["cart", "shop"]);
    node.until("the node is ready", || node.ready.outstanding().is_empty()).await;
    assert!(node.serial("shop").is_some() && node.serial("cart").is_none());
    let issuance = node.issuance("cart");
    assert_eq!(issuance.state, State::Pending);
    assert!(issuance.last_error.unwrap().contains("no such workload on this node"));
    node.source.script().refused.clear();
    node.until("it is issued", || node.serial("cart").is_some()).await;
    node.until("the error is forgotten", || node.issuance("cart").last_error.is_none()).await;
}

#[tokio::test]
async fn a_connection_of_a_workload_that_has_just_arrived_waits_for_its_certificate() {
    let node = Node::start(HOUR, |source| source.script().hangs = true);
    assert!(!node.identities.wait_for(&id("cart"), LIMIT).await, "nobody wants it: no reason to wait");
    node.wants(&["cart"]);
    assert!(!node.identities.wait_for(&id("cart"), Duration::from_millis(20)).await, "no longer than it may");
    let (waiting, cart) = (node.identities.clone(), id("cart"));
    let waiting = tokio::spawn(async move {
        let name = crate::identity::server_name(&cart).to_str().into_owned();
        tokio::join!(waiting.wait_for(&cart, LIMIT), waiting.wait_for_name(&name, LIMIT))
    });
    node.source.script().hangs = false;
    assert_eq!(waiting.await.unwrap(), (true, true));
    assert!(node.identities.wait_for(&id("cart"), Duration::ZERO).await);
}

#[tokio::test]
async fn waiting_ends_when_the_workload_goes() {
    let node = Node::start(HOUR, |source| source.script().hangs = true);
    node.wants(&["cart"]);
    let waiting = node.identities.clone();
    let waiting = tokio::spawn(async move { waiting.wait_for(&id("cart"), LIMIT).await });
    node.wants(&[]);
    assert!(!tokio::time::timeout(LIMIT / 2, waiting).await.expect("it ends").unwrap());
    node.source.script().hangs = false;
    node.wants(&["shop"]);
    node.until("the next one is issued", || node.serial("shop").is_some()).await;
    assert!(node.serial("cart").is_none(), "the late answer is of no use");
}

#[tokio::test]
async fn another_root_replaces_every_certificate() {
    let node = Node::start(Duration::from_secs(24), |_| ());
    node.wants(&["cart", "shop"]);
    node.until("both are issued", || node.identities.certificates().len() == 2).await;
    let before = [node.serial("cart"), node.serial("shop")];
    let new = Arc::new(Root::new("second"));
    {
        let mut script = node.source.script();
        script.trusted.push(new.clone());
        script.signer = new.clone();
        script.epoch = 2;
    }
    node.until("both roots are trusted", || node.identities.bundle().0.len() == 2).await;
    node.until("both are renewed", || node.serial("cart") != before[0] && node.serial("shop") != before[1]).await;
    node.source.script().trusted.remove(0);
    node.until("the old root is gone", || node.identities.bundle().0.len() == 1).await;
    assert!(node.identities.orphans(OffsetDateTime::now_utc()).is_empty());
    assert_eq!(node.identities.bundle().0[0].certificate, new.certificate);
    assert_eq!(node.identities.bundle().1, 2);
}

#[tokio::test]
async fn a_root_that_is_withdrawn_at_once_makes_its_certificates_be_renewed_at_once() {
    let node = Node::start(Duration::from_secs(24), |_| ());
    node.wants(&["cart"]);
    node.until("it is issued", || node.serial("cart").is_some()).await;
    let new = Arc::new(Root::new("second"));
    {
        // The epoch does not change: nobody has announced it.
        let mut script = node.source.script();
        script.trusted = vec![new.clone()];
        script.signer = new.clone();
    }
    let serial = node.serial("cart");
    node.until("it is renewed", || node.serial("cart") != serial).await;
    assert!(node.identities.orphans(OffsetDateTime::now_utc()).is_empty());
}
