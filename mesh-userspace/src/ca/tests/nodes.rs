//! What a node may do once it has joined, and what shuts it out.

use super::world::{BANK, CART, World, name, now, reason, request};
use crate::ca::{JoinError, Lives, enrol, is_member};
use crate::identity::{Certificate, CertificateSource, SigningRequest, SourceError};
use crate::model::SpiffeId;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tempfile::TempDir;

fn wanted(uri: &str) -> SigningRequest {
    SigningRequest { id: SpiffeId::parse(uri).unwrap(), csr: request(uri) }
}

#[tokio::test]
async fn a_node_joins_and_gets_what_is_placed_on_it_and_nothing_else() {
    let world = World::start();
    let directory = world.join("n1").await;
    let mode = |file: &str| fs::metadata(directory.path().join(file)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("node/key.pem"), mode("node")), (0o600, 0o700));
    assert!(!directory.path().join("node/key.next.pem").exists());
    let client = world.client(&directory);
    assert_eq!(client.node().to_string(), "spiffe://example.org/node/n1");
    let bundle = client.bundle().await.unwrap();
    assert_eq!(bundle, world.authority().bundle());
    let mut answers = client.sign(vec![wanted(CART), wanted(BANK)]).await.unwrap();
    assert_eq!(reason(answers.pop().unwrap().as_ref().unwrap_err()), "not_scheduled");
    let chain = answers.pop().unwrap().unwrap();
    assert_eq!(Certificate::parse(&chain.0[0]).unwrap().id.as_str(), CART);
    assert_eq!(chain.0.len(), 2);
    assert_eq!(world.refused("not_scheduled"), 1);
    // The catalog moves it here: the same question, another answer.
    world.placed.lock().unwrap().push(("n1".to_owned(), BANK.to_owned()));
    assert!(client.sign(vec![wanted(BANK)]).await.unwrap().remove(0).is_ok());
}

#[tokio::test]
async fn a_node_gets_no_identity_of_another_trust_domain_and_no_foreign_request_signed() {
    let world = World::start();
    let client = world.client(&world.join("n1").await);
    let foreign = "spiffe://example.com/ns/shop/sa/cart";
    world.placed.lock().unwrap().push(("n1".to_owned(), foreign.to_owned()));
    let swapped = SigningRequest { id: SpiffeId::parse(CART).unwrap(), csr: request(BANK) };
    let answers = client.sign(vec![wanted(foreign), swapped]).await.unwrap();
    let reasons: Vec<_> = answers.iter().map(|answer| reason(answer.as_ref().unwrap_err())).collect();
    assert_eq!(reasons, ["foreign_identity", "csr_names"]);
}

#[tokio::test]
async fn a_revoked_node_gets_nothing_until_a_token_for_its_name_lets_it_in_again() {
    let world = World::start();
    let directory = world.join("n1").await;
    let client = world.client(&directory);
    client.bundle().await.unwrap();
    world.authority().revoke_node(&name("n1"), now()).unwrap();
    assert_eq!(reason(&client.bundle().await.unwrap_err()), "node_revoked");
    assert_eq!(reason(&client.sign(vec![wanted(CART)]).await.unwrap_err()), "node_revoked");
    assert_eq!(reason(&client.renew_node_certificate().await.unwrap_err()), "node_revoked");
    assert_eq!(world.refused("node_revoked"), 3);
    assert_eq!(world.is_refused(&world.token(None), "n1").await, "node_revoked");
    let again = TempDir::new().unwrap();
    world.join_into(&world.token(Some("n1")), "n1", &again).await.unwrap();
    assert!(world.client(&again).sign(vec![wanted(CART)]).await.unwrap().remove(0).is_ok());
}

#[tokio::test]
async fn a_certificate_from_before_the_nodes_last_join_is_worth_nothing() {
    let world = World::start();
    let old = world.client(&world.join("n1").await);
    // Times in certificates are whole seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let again = TempDir::new().unwrap();
    world.join_into(&world.token(Some("n1")), "n1", &again).await.unwrap();
    assert_eq!(reason(&old.bundle().await.unwrap_err()), "certificate_stale");
    world.client(&again).bundle().await.unwrap();
}

#[tokio::test]
async fn a_node_renews_its_own_certificate_with_a_new_key() {
    let world = World::start();
    let directory = world.join("n1").await;
    let read = |file: &str| fs::read(directory.path().join(file)).unwrap();
    let (certificate, key) = (read("node/cert.pem"), read("node/key.pem"));
    let client = world.client(&directory);
    client.renew_node_certificate().await.unwrap();
    assert_ne!((read("node/cert.pem"), read("node/key.pem")), (certificate, key));
    client.bundle().await.unwrap();
    world.client(&directory).bundle().await.unwrap();
}

#[tokio::test]
async fn an_interrupted_renewal_leaves_a_pair_that_fits() {
    let world = World::start();
    let directory = world.join("n1").await;
    let at = |file: &str| directory.path().join(file);
    // Cut off before the certificate came: a key waits, the old pair is in use.
    fs::copy(at("node/key.pem"), at("spare")).unwrap();
    fs::copy(world.join("n2").await.path().join("node/key.pem"), at("node/key.next.pem")).unwrap();
    world.client(&directory).bundle().await.unwrap();
    // Cut off after it came: the waiting key is the one that fits, and stays when the next renewal begins.
    fs::rename(at("node/key.next.pem"), at("node/key.pem")).unwrap();
    fs::copy(at("spare"), at("node/key.next.pem")).unwrap();
    let client = world.client(&directory);
    client.bundle().await.unwrap();
    assert_eq!(fs::read(at("spare")).unwrap(), fs::read(at("node/key.pem")).unwrap());
    client.renew_node_certificate().await.unwrap();
}

#[tokio::test]
async fn the_nodes_certificate_keeps_itself_fresh() {
    let world = World::with(Lives { workload: Duration::from_secs(4), node: Duration::from_secs(4) });
    let directory = world.join("n1").await;
    let client = world.client(&directory);
    let first = client.not_after();
    let keeper = tokio::spawn({
        let client = client.clone();
        async move { client.keep_node_certificate().await }
    });
    let renewed = async {
        while client.not_after() == first {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), renewed).await.unwrap();
    keeper.abort();
}

#[tokio::test]
async fn several_authorities_are_asked_until_one_answers() {
    let world = World::start();
    let directory = world.join("n1").await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let dead = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let client = world.client_of(&directory, vec![dead.clone(), world.address.to_string()]);
    client.bundle().await.unwrap();
    let client = world.client_of(&directory, vec![dead]);
    assert!(matches!(client.bundle().await, Err(SourceError::Unavailable(_))));
}

#[tokio::test]
async fn a_name_that_is_taken_is_not_given_away_by_a_token_for_anybody() {
    let world = World::start();
    let directory = world.join("n1").await;
    let token = world.token(None);
    assert_eq!(world.is_refused(&token, "n1").await, "node_exists");
    // The refusal has not used it up.
    let other = TempDir::new().unwrap();
    world.join_into(&token, "n2", &other).await.unwrap();
    world.client(&directory).bundle().await.unwrap();
}

#[tokio::test]
async fn what_is_known_survives_a_restart() {
    let world = World::start();
    let directory = world.join("n1").await;
    let (open, used) = (world.token(None), world.token(None));
    world.join_into(&used, "n2", &TempDir::new().unwrap()).await.unwrap();
    let roots = world.authority().bundle();
    let world = world.restart().await;
    assert_eq!(world.authority().bundle(), roots);
    world.client(&directory).bundle().await.unwrap();
    assert_eq!(world.is_refused(&used, "n3").await, "token_used");
    world.join_into(&open, "n3", &TempDir::new().unwrap()).await.unwrap();
}

#[tokio::test]
async fn nobody_listening_is_told_apart_from_a_refusal() {
    let world = World::start();
    let token = world.token(None);
    let address = world.address;
    drop(world.restart().await);
    let directory = TempDir::new().unwrap();
    let (address, node) = (address.to_string(), name("n1"));
    let outcome = crate::ca::join(&address, &token, &node, directory.path(), Duration::from_secs(5)).await;
    assert!(matches!(outcome, Err(JoinError::Unavailable { .. })), "{outcome:?}");
}

#[tokio::test]
async fn the_authoritys_own_node_joins_without_a_token_and_again_when_it_must() {
    let world = World::start();
    let (directory, node) = (TempDir::new().unwrap(), name("n1"));
    assert!(!is_member(world.authority(), &node, directory.path()));
    enrol(world.authority(), &node, directory.path()).unwrap();
    assert!(is_member(world.authority(), &node, directory.path()));
    assert!(!is_member(world.authority(), &name("n2"), directory.path()), "another node's certificate");
    assert!(world.client(&directory).sign(vec![wanted(CART)]).await.unwrap().remove(0).is_ok());
    let other = World::start();
    assert!(!is_member(other.authority(), &node, directory.path()), "another authority's certificate");
    world.authority().revoke_node(&node, now()).unwrap();
    assert!(!is_member(world.authority(), &node, directory.path()));
    let refused = enrol(world.authority(), &node, directory.path()).unwrap_err().to_string();
    assert!(refused.contains("node token create --node n1"), "{refused}");
}
