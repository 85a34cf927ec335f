//! Joining, from the attacker's side.

use super::world::{World, name, now};
use crate::ca::digest::sha256;
use crate::ca::{Authority, JoinError, Reason, Token, TokenId, init};
use crate::model::TrustDomain;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const MINUTE: Duration = Duration::from_mins(1);

/// The token with another part at this place.
fn with_part(token: &Token, index: usize, part: &str) -> Token {
    let text = token.reveal();
    let mut parts: Vec<&str> = text.split('.').collect();
    parts[index] = part;
    parts.join(".").parse().unwrap()
}

#[tokio::test]
async fn a_token_works_once() {
    let world = World::start();
    let token = world.token(None);
    world.join_into(&token, "n1", &TempDir::new().unwrap()).await.unwrap();
    assert_eq!(world.is_refused(&token, "n2").await, "token_used");
    assert_eq!(world.is_refused(&token, "n1").await, "token_used");
    assert_eq!(world.refused("token_used"), 2);
}

#[tokio::test]
async fn of_a_crowd_with_one_token_one_joins() {
    let world = Arc::new(World::start());
    let token = world.token(None);
    let crowd = (0..8).map(|number| {
        let (world, token) = (world.clone(), token.clone());
        tokio::spawn(
            async move { world.join_into(&token, &format!("n{number}"), &TempDir::new().unwrap()).await.is_ok() },
        )
    });
    let mut joined = 0;
    for one in crowd.collect::<Vec<_>>() {
        joined += usize::from(one.await.unwrap());
    }
    assert_eq!((joined, world.authority().nodes().unwrap().len()), (1, 1));
}

#[tokio::test]
async fn expired_and_revoked_tokens_are_refused() {
    let world = World::start();
    let before = now() - Duration::from_mins(2);
    let expired = world.authority().create_token(MINUTE, None, before).unwrap().token;
    assert_eq!(world.is_refused(&expired, "n1").await, "token_expired");
    let revoked = world.token(None);
    world.authority().revoke_token(revoked.id(), now()).unwrap();
    assert_eq!(world.is_refused(&revoked, "n1").await, "token_revoked");
    assert!(world.authority().nodes().unwrap().is_empty());
}

#[tokio::test]
async fn forged_tokens_are_refused_and_do_not_tell_what_was_right() {
    let world = World::start();
    let token = world.token(None);
    let bad_secret = with_part(&token, 3, "AAAAAAAAAAAAAAAAAAAAAA");
    let bad_id = with_part(&token, 2, "0123456789abcdef");
    // A used token's state is nobody's business who does not know its secret.
    let used = world.token(None);
    world.join_into(&used, "n9", &TempDir::new().unwrap()).await.unwrap();
    for forged in [bad_secret, bad_id, with_part(&used, 3, "AAAAAAAAAAAAAAAAAAAAAA")] {
        assert_eq!(world.is_refused(&forged, "n1").await, "token_unknown");
    }
    // The guesses have not used the real one up.
    world.join_into(&token, "n1", &TempDir::new().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_mangled_token_or_name_is_refused_by_the_server_too() {
    let world = World::start();
    let token = world.token(None);
    for (text, node, reason) in [
        ("nonsense", "n1", "token_malformed"),
        ("", "n1", "token_malformed"),
        (token.reveal().as_str(), "N 1", "request_malformed"),
        (token.reveal().as_str(), "", "request_malformed"),
    ] {
        let body = serde_json::json!({"token": text, "node": node, "csr": "AAAA"}).to_string();
        let (status, answer) = world.ask(world.stranger(), hyper::Method::POST, "/v1/join", &body).await;
        assert_eq!((status, answer["reason"].as_str().unwrap()), (400, reason));
    }
}

#[tokio::test]
async fn a_token_for_one_node_joins_no_other() {
    let world = World::start();
    let token = world.token(Some("n1"));
    assert_eq!(world.is_refused(&token, "n2").await, "token_other_node");
    world.join_into(&token, "n1", &TempDir::new().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_request_that_is_refused_leaves_the_token_and_the_node_as_they_were() {
    let world = World::start();
    let token = world.token(None);
    let other = super::world::request("spiffe://example.org/node/n2");
    let refused = world.authority().join(&token, &name("n1"), &other, now());
    assert!(matches!(refused, Err(crate::ca::CaError::Refused(refusal)) if refusal.reason == Reason::CsrNames));
    assert!(world.authority().nodes().unwrap().is_empty());
    world.join_into(&token, "n1", &TempDir::new().unwrap()).await.unwrap();
}

/// A server that takes whatever it is told after the handshake, and counts it.
async fn listening(config: ServerConfig) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heard = Arc::new(AtomicUsize::new(0));
    let count = heard.clone();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // What the client says is read also from a handshake that fails later on.
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes).await;
                count.fetch_add(bytes.len(), Ordering::SeqCst);
            }
        }
    });
    (address, heard)
}

fn server(chain: Vec<rustls_pki_types::CertificateDer<'static>>, key_pem: &str) -> ServerConfig {
    let key = rustls_pki_types::PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).unwrap();
    ServerConfig::builder_with_provider(crate::identity::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap()
}

#[tokio::test]
async fn the_secret_is_never_said_to_another_authority() {
    let (world, other) = (World::start(), World::start());
    let token = world.token(None);
    let directory = TempDir::new().unwrap();
    let told = crate::ca::join(&other.address.to_string(), &token, &name("n1"), directory.path(), MINUTE).await;
    assert!(matches!(told, Err(JoinError::WrongAuthority { .. })), "{told:?}");
    assert!(told.unwrap_err().to_string().contains("the token was not sent"));
    let total: u64 = Reason::ALL.iter().map(|reason| other.refused(reason.as_str())).sum();
    assert_eq!(total, 0, "the other authority was asked for nothing");
    // And the right one takes the same token.
    world.join_into(&token, "n1", &TempDir::new().unwrap()).await.unwrap();
}

#[tokio::test]
async fn the_secret_is_never_said_to_somebody_who_shows_the_right_root() {
    let world = World::start();
    let token = world.token(None);
    let root = world.authority().bundle().roots[0].clone();
    let cart = crate::model::SpiffeId::parse(super::world::CART).unwrap();
    let valid = crate::ca::Validity::starting_now(MINUTE).unwrap();
    // A workload of the same mesh, with its real certificate and the real root behind it.
    let own = world.authority().sign(&cart, valid).unwrap();
    let with_root = |chain: &[rustls_pki_types::CertificateDer<'static>]| [chain, std::slice::from_ref(&root)].concat();
    // A stranger with a root of his own, and the real root in the chain for show.
    let directory = TempDir::new().unwrap();
    init(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
    let foreign = Authority::open(directory.path()).unwrap().sign(&cart, valid).unwrap();
    for (chain, key) in [(own.chain(), own.key_pem()), (foreign.chain(), foreign.key_pem())] {
        let (address, heard) = listening(server(with_root(chain), key)).await;
        let told = crate::ca::join(&address, &token, &name("n1"), TempDir::new().unwrap().path(), MINUTE).await;
        assert!(matches!(told, Err(JoinError::WrongAuthority { .. })), "{told:?}");
        assert_eq!(heard.load(Ordering::SeqCst), 0);
    }
}

#[tokio::test]
async fn tokens_are_kept_as_hashes_listed_and_forgotten() {
    let world = World::start();
    let authority = world.authority();
    let long_ago = now() - Duration::from_hours(48);
    let old = authority.create_token(MINUTE, None, long_ago).unwrap().token;
    let token = world.token(Some("n1"));
    let store = std::fs::read(world.directory.path().join("ca.redb")).unwrap();
    let secret = token.reveal().rsplit('.').next().unwrap().to_owned();
    let raw = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, &secret).unwrap();
    for needle in [secret.as_bytes(), &raw] {
        assert!(!store.windows(needle.len()).any(|window| window == needle), "the secret is in the store");
    }
    authority.tick(now()).unwrap();
    let listed = authority.tokens(now()).unwrap();
    assert_eq!(listed.len(), 1, "{} is long past", old.id());
    assert_eq!(
        (listed[0].id.as_str(), listed[0].state, listed[0].node.as_deref()),
        (token.id().as_str(), "open", Some("n1"))
    );
    let unknown = TokenId::parse("0123456789abcdef").unwrap();
    assert!(authority.revoke_token(&unknown, now()).is_err());
    world.join_into(&token, "n1", &TempDir::new().unwrap()).await.unwrap();
    let late = authority.revoke_token(token.id(), now()).unwrap_err().to_string();
    assert!(late.contains("node revoke n1"), "{late}");
    for ttl in [Duration::ZERO, Duration::from_hours(25)] {
        assert!(authority.create_token(ttl, None, now()).is_err());
    }
}

#[test]
fn a_token_names_the_public_key_of_the_root_that_signs() {
    let directory = TempDir::new().unwrap();
    init(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
    let authority = Authority::open(directory.path()).unwrap();
    let root = authority.bundle().roots.remove(0);
    let (_, parsed) = x509_parser::parse_x509_certificate(&root).unwrap();
    let token = authority.create_token(MINUTE, None, now()).unwrap().token;
    assert_eq!(token.root(), sha256(parsed.public_key().raw));
}
