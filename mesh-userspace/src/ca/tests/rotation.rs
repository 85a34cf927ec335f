//! Changing who signs, over real sockets and across restarts.

use super::world::{CART, World, now, reason, request};
use crate::ca::authority::public_key_digest;
use crate::ca::{Rotate, RotationStatus};
use crate::identity::{CertificateSource, SignedChain, SigningRequest};
use crate::model::SpiffeId;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::server::ParsedCertificate;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Whether a node that trusts `roots` believes this chain.
fn believes(roots: &[CertificateDer<'static>], chain: &SignedChain) -> bool {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).unwrap();
    }
    let leaf = ParsedCertificate::try_from(&chain.0[0]).unwrap();
    let algorithms = crate::identity::tls::provider().signature_verification_algorithms;
    verify_server_cert_signed_by_trust_anchor(&leaf, &store, &chain.0[1..], UnixTime::now(), algorithms.all).is_ok()
}

async fn cart(client: &dyn CertificateSource) -> SignedChain {
    let wanted = SigningRequest { id: SpiffeId::parse(CART).unwrap(), csr: request(CART) };
    client.sign(vec![wanted]).await.unwrap().remove(0).unwrap()
}

#[tokio::test]
async fn a_root_is_changed_without_a_moment_in_which_somebody_is_not_believed() {
    let world = World::start();
    let (directory, slow) = (world.join("n1").await, world.join("n2").await);
    let (client, slow) = (world.client(&directory), world.client(&slow));
    let first = client.bundle().await.unwrap();
    slow.bundle().await.unwrap();
    let old = cart(&*client).await;

    world.service.rotate(Rotate::Root, false, now()).unwrap();
    let announced = client.bundle().await.unwrap();
    assert_eq!((announced.version, announced.epoch, announced.roots.len()), (first.version + 1, first.epoch, 2));
    assert!(announced.roots.starts_with(&first.roots));
    assert!(believes(&first.roots, &cart(&*client).await), "the old root signs on: not every node knows the new one");
    // This node says by its next question that it uses the bundle; the other one has not asked.
    client.bundle().await.unwrap();
    world.authority().tick(now()).unwrap();
    let waiting = world.authority().status(now()).unwrap().rotation;
    assert!(matches!(&waiting, RotationStatus::Announced { waits_for, .. } if waits_for == &["n2"]), "{waiting:?}");
    let again = world.service.rotate(Rotate::Root, false, now()).unwrap_err().to_string();
    assert!(again.contains("ca status"), "{again}");

    slow.bundle().await.unwrap();
    slow.bundle().await.unwrap();
    world.authority().tick(now()).unwrap();
    let switched = client.bundle().await.unwrap();
    assert_eq!((switched.epoch, &switched.roots), (first.epoch + 1, &announced.roots));
    let new = cart(&*client).await;
    assert!(believes(&announced.roots, &new) && believes(&announced.roots, &old));
    assert!(!believes(&first.roots, &new));
    assert!(matches!(world.authority().status(now()).unwrap().rotation, RotationStatus::Retiring { .. }));

    client.renew_node_certificate().await.unwrap();
    let end = now() + world.authority().lives().node + Duration::from_mins(3);
    world.authority().tick(end).unwrap();
    let last = client.bundle().await.unwrap();
    assert_eq!((last.version, last.roots.len()), (first.version + 2, 1));
    assert!(believes(&last.roots, &new) && !believes(&last.roots, &old));
    assert_eq!(world.authority().status(now()).unwrap().rotation, RotationStatus::Steady);
    client.bundle().await.unwrap();
}

#[tokio::test]
async fn a_node_that_has_not_heard_of_the_new_root_still_reaches_the_authority() {
    let world = World::start();
    let directory = world.join("n1").await;
    let token = world.token(None);
    let silent = world.client(&directory);
    // Nobody waits for anybody.
    world.service.rotate(Rotate::Root, true, now()).unwrap();
    assert!(matches!(world.authority().status(now()).unwrap().rotation, RotationStatus::Retiring { .. }));
    assert_eq!(silent.bundle().await.unwrap().roots.len(), 2);
    // A token from before names the old root, one from now the new root: both work as long as both roots do.
    world.join_into(&token, "n2", &TempDir::new().unwrap()).await.unwrap();
    let fresh = world.token(None);
    assert_ne!(fresh.root(), token.root());
    world.join_into(&fresh, "n3", &TempDir::new().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_forced_end_shuts_out_what_the_old_root_has_signed() {
    let world = World::start();
    let directory = world.join("n1").await;
    let client = world.client(&directory);
    world.service.rotate(Rotate::Root, true, now()).unwrap();
    client.bundle().await.unwrap();
    world.service.rotate(Rotate::Root, true, now()).unwrap();
    assert_eq!(world.authority().bundle().roots.len(), 1);
    assert!(client.bundle().await.is_err(), "its certificate is from the old root");
    let again = TempDir::new().unwrap();
    world.join_into(&world.token(Some("n1")), "n1", &again).await.unwrap();
    world.client(&again).bundle().await.unwrap();
}

#[tokio::test]
async fn a_node_that_learns_of_a_new_epoch_renews_its_own_certificate() {
    let world = World::start();
    let directory = world.join("n1").await;
    let client = world.client(&directory);
    client.bundle().await.unwrap();
    let keeper = tokio::spawn({
        let client = Arc::clone(&client);
        async move { client.keep_node_certificate().await }
    });
    let before = std::fs::read(directory.path().join("node/cert.pem")).unwrap();
    world.service.rotate(Rotate::Intermediate, false, now()).unwrap();
    client.bundle().await.unwrap();
    let renewed = async {
        while std::fs::read(directory.path().join("node/cert.pem")).unwrap() == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), renewed).await.unwrap();
    keeper.abort();
}

#[tokio::test]
async fn an_intermediate_is_changed_at_once_and_the_old_ones_leaves_stay_good() {
    let world = World::start();
    let client = world.client(&world.join("n1").await);
    let (before, old) = (client.bundle().await.unwrap(), cart(&*client).await);
    world.service.rotate(Rotate::Intermediate, false, now()).unwrap();
    let (after, new) = (client.bundle().await.unwrap(), cart(&*client).await);
    assert_eq!((after.roots.clone(), after.epoch), (before.roots, before.epoch + 1));
    assert_ne!(old.0[1], new.0[1]);
    assert!(believes(&after.roots, &old) && believes(&after.roots, &new));
}

#[tokio::test]
async fn the_intermediate_takes_its_turn_by_itself() {
    let world = World::start();
    let client = world.client(&world.join("n1").await);
    let (before, old) = (client.bundle().await.unwrap(), cart(&*client).await);
    let later = |days: u64| now() + Duration::from_hours(24 * days);
    world.authority().tick(later(59)).unwrap();
    assert_eq!(cart(&*client).await.0[1], old.0[1]);
    // From here on the authority lives in the future: nobody of today believes what it serves with.
    world.authority().tick(later(61)).unwrap();
    let id = SpiffeId::parse(CART).unwrap();
    let new = world.authority().sign_request(&id, &request(CART), later(61)).unwrap();
    assert_ne!(new.0[1], old.0[1]);
    assert_eq!(world.authority().bundle(), before, "nothing that nodes must hurry for");
}

#[tokio::test]
async fn a_rotation_goes_on_after_a_restart() {
    let world = World::start();
    let directory = world.join("n1").await;
    let client = world.client(&directory);
    client.bundle().await.unwrap();
    world.service.rotate(Rotate::Root, false, now()).unwrap();
    let (bundle, status) = (world.authority().bundle(), world.authority().status(now()).unwrap());
    let world = world.restart().await;
    assert_eq!(world.authority().bundle(), bundle);
    assert_eq!(world.authority().status(now()).unwrap().rotation, status.rotation);
    let client = world.client(&directory);
    client.bundle().await.unwrap();
    client.bundle().await.unwrap();
    world.authority().tick(now()).unwrap();
    assert!(matches!(world.authority().status(now()).unwrap().rotation, RotationStatus::Retiring { .. }));
    let world = world.restart().await;
    let active = public_key_digest(&bundle.roots[1]).unwrap();
    assert_eq!(world.token(None).root(), active);
}

#[tokio::test]
async fn a_revoked_node_holds_nothing_up() {
    let world = World::start();
    let client = world.client(&world.join("n1").await);
    client.bundle().await.unwrap();
    world.authority().revoke_node(&super::world::name("n1"), now()).unwrap();
    assert_eq!(reason(&client.bundle().await.unwrap_err()), "node_revoked");
    world.service.rotate(Rotate::Root, false, now()).unwrap();
    world.authority().tick(now()).unwrap();
    assert!(matches!(world.authority().status(now()).unwrap().rotation, RotationStatus::Retiring { .. }));
}
