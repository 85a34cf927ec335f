//! Those who should get nothing: strangers, workloads, requests that ask for too much, and the tunnel's port.

use super::world::{BANK, CART, World, reason, request};
use crate::ca::client::node_chain;
use crate::ca::csr;
use crate::ca::key::Key;
use crate::ca::{Reason, Refusal};
use crate::identity::{CertificateSource, PeerRefusal, SigningRequest, peer_identity};
use crate::model::SpiffeId;
use hyper::Method;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use tempfile::TempDir;

const ENDPOINTS: [(Method, &str); 3] =
    [(Method::POST, "/v1/sign"), (Method::POST, "/v1/renew"), (Method::GET, "/v1/bundle")];

fn body(path: &str) -> String {
    use base64::Engine;
    let csr = base64::engine::general_purpose::STANDARD.encode(request(CART));
    match path {
        "/v1/sign" => serde_json::json!({"requests": [{"id": CART, "csr": csr}]}).to_string(),
        _ => serde_json::json!({ "csr": csr }).to_string(),
    }
}

#[tokio::test]
async fn without_a_certificate_there_is_nothing_but_joining() {
    let world = World::start();
    for (method, path) in ENDPOINTS {
        let (status, answer) = world.ask(world.stranger(), method, path, &body(path)).await;
        assert_eq!((status, answer["reason"].as_str()), (401, Some("no_certificate")), "{path}");
    }
    assert_eq!(world.refused("no_certificate"), 3);
}

#[tokio::test]
async fn a_workloads_certificate_is_no_nodes_certificate() {
    let world = World::start();
    world.join("n1").await;
    for (method, path) in ENDPOINTS {
        let (status, answer) = world.ask(world.workload(CART), method, path, &body(path)).await;
        assert_eq!((status, answer["reason"].as_str()), (403, Some("not_a_node")), "{path}");
    }
}

#[tokio::test]
async fn a_nodes_certificate_is_no_workloads_identity() {
    let world = World::start();
    let directory = world.join("n1").await;
    let chain = node_chain(directory.path());
    assert_eq!(peer_identity(&chain), Err(PeerRefusal::BadCertificate));
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth, "it cannot stand in for a server either");
}

#[tokio::test]
async fn a_certificate_of_another_authority_does_not_even_connect() {
    let (world, other) = (World::start(), World::start());
    let client = world.client_of(&world.join("n1").await, vec![other.address.to_string()]);
    assert!(matches!(client.bundle().await, Err(crate::identity::SourceError::Unavailable(_))));
    let foreign = other.client_of(&other.join("n1").await, vec![world.address.to_string()]);
    assert!(matches!(foreign.bundle().await, Err(crate::identity::SourceError::Unavailable(_))));
}

#[tokio::test]
async fn a_nodes_name_that_nobody_has_joined_under_is_unknown() {
    let world = World::start();
    // Signed by the authority's own keys, but not on record: a store restored from an older backup.
    let key = Key::generate().unwrap();
    let other = TempDir::new().unwrap();
    std::fs::copy(world.directory.path().join("ca.pem"), other.path().join("ca.pem")).unwrap();
    let valid = crate::ca::Validity::starting_now(std::time::Duration::from_secs(60)).unwrap();
    let chain = world
        .authority()
        .sign_leaf(crate::ca::certificate::Profile::Node, "spiffe://example.org/node/ghost", &key, valid)
        .unwrap();
    let config = world.with_certificate(chain.0, &key);
    let (status, answer) = world.ask(config, Method::GET, "/v1/bundle", "").await;
    assert_eq!((status, answer["reason"].as_str()), (403, Some("node_unknown")));
}

#[tokio::test]
async fn nonsense_is_answered_and_bounded() {
    let world = World::start();
    let directory = world.join("n1").await;
    let big = format!("{{\"token\": \"{}\"}}", "x".repeat(3 << 20));
    for (method, path, body) in [
        (Method::POST, "/v1/join", "{"),
        (Method::POST, "/v1/join", "[]"),
        (Method::POST, "/v1/join", "{\"token\": \"x\", \"node\": \"n\", \"csr\": \"?\", \"more\": 1}"),
        (Method::POST, "/v1/join", big.as_str()),
        (Method::GET, "/v2/bundle", ""),
    ] {
        let (status, answer) = world.ask(world.stranger(), method, path, body).await;
        assert_eq!((status, answer["reason"].as_str()), (400, Some("request_malformed")));
    }
    let many = vec![SigningRequest { id: SpiffeId::parse(CART).unwrap(), csr: request(CART) }; 300];
    let answers = world.client(&directory).sign(many).await.unwrap();
    assert!(answers.len() == 300 && answers.iter().all(Result::is_ok), "the client asks in portions");
    // A bucket holds 2048: a node that wants more waits.
    let greedy = vec![SigningRequest { id: SpiffeId::parse(BANK).unwrap(), csr: vec![0] }; 2500];
    assert_eq!(reason(&world.client(&directory).sign(greedy).await.unwrap_err()), "too_many");
}

fn refusal(csr: &[u8]) -> Refusal {
    csr::check(csr, CART).map(|_| ()).unwrap_err()
}

fn named(names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn signed(params: &CertificateParams) -> Vec<u8> {
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

#[test]
fn a_request_gets_its_key_signed_and_nothing_else() {
    assert!(csr::check(&request(CART), CART).is_ok());
    // A subject is not looked at: nothing of it gets into a certificate.
    let mut params = named(vec![uri(CART)]);
    params.distinguished_name.push(DnType::CommonName, BANK);
    assert!(csr::check(&signed(&params), CART).is_ok());
}

#[test]
fn requests_with_other_or_more_names_are_refused() {
    let dns = || SanType::DnsName("cart.shop".try_into().unwrap());
    for names in [
        vec![],
        vec![uri(BANK)],
        vec![uri("spiffe://example.org/ns/shop/sa/cart/")],
        vec![uri("spiffe://example.org/ns/shop/sa/cart2")],
        vec![uri("spiffe://EXAMPLE.org/ns/shop/sa/cart")],
        vec![uri(CART), uri(BANK)],
        vec![uri(BANK), uri(CART)],
        vec![uri(CART), uri(CART)],
        vec![uri(CART), dns()],
        vec![dns()],
        vec![uri(CART), SanType::IpAddress([10, 0, 0, 1].into())],
        vec![uri(CART), SanType::Rfc822Name("a@example.org".try_into().unwrap())],
    ] {
        assert_eq!(refusal(&signed(&named(names.clone()))).reason, Reason::CsrNames, "{names:?}");
    }
}

#[test]
fn requests_for_other_extensions_are_refused() {
    let mut authority = named(vec![uri(CART)]);
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let mut usages = named(vec![uri(CART)]);
    usages.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let mut custom = named(vec![uri(CART)]);
    custom.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0])];
    for params in [authority, usages, custom] {
        assert_eq!(refusal(&signed(&params)).reason, Reason::CsrNames);
    }
}

#[test]
fn keys_of_other_kinds_are_refused() {
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &rcgen::PKCS_RSA_SHA256] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let csr = named(vec![uri(CART)]).serialize_request(&key).unwrap();
        assert_eq!(refusal(csr.der()).reason, Reason::CsrKey);
    }
}

#[test]
fn a_request_that_does_not_prove_its_key_is_refused() {
    let mut csr = request(CART);
    let last = csr.len() - 1;
    csr[last] ^= 1;
    assert_eq!(refusal(&csr).reason, Reason::CsrSignature);
    // Somebody else's key under one's own signature.
    let (mine, theirs) = (request(CART), request(CART));
    let key_of = |csr: &[u8]| {
        use x509_parser::prelude::FromDer;
        let (_, parsed) = x509_parser::certification_request::X509CertificationRequest::from_der(csr).unwrap();
        parsed.certification_request_info.subject_pki.raw.to_vec()
    };
    let (own, stolen) = (key_of(&mine), key_of(&theirs));
    let at = mine.windows(own.len()).position(|window| window == own).unwrap();
    let mut forged = mine.clone();
    forged[at..at + own.len()].copy_from_slice(&stolen);
    assert_eq!(refusal(&forged).reason, Reason::CsrSignature);
}

#[test]
fn what_is_no_request_is_refused() {
    let mut trailing = request(CART);
    trailing.push(0);
    for bytes in [&[][..], b"MIIB", &trailing, &request(CART)[..100], &[0; 5000]] {
        assert_eq!(refusal(bytes).reason, Reason::CsrMalformed);
    }
}
