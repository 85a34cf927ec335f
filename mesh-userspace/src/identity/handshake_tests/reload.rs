//! What is on disk, read for the first time and again.

use super::*;

#[test]
fn configurations_are_cached_until_something_changes() {
    let ca = authority("example.org");
    let a = Node::new(&[&ca], &[CART]);
    let (client, server) = (a.dials(CART, SHOP), a.identities.server_config());
    a.identities.reload().unwrap();
    assert!(Arc::ptr_eq(&client, &a.dials(CART, SHOP)), "nothing changed");
    assert!(!Arc::ptr_eq(&client, &a.dials(CART, BANK)));
    ca.sign(&id(CART), valid()).unwrap().store(a.path()).unwrap();
    a.identities.reload().unwrap();
    assert!(!Arc::ptr_eq(&client, &a.dials(CART, SHOP)));
    assert!(Arc::ptr_eq(&server, &a.identities.server_config()), "it reads the certificates of the moment");
    authority("example.org").add_to_bundle(a.path()).unwrap();
    let client = a.dials(CART, SHOP);
    a.identities.reload().unwrap();
    assert!(!Arc::ptr_eq(&client, &a.dials(CART, SHOP)));
    assert!(!Arc::ptr_eq(&server, &a.identities.server_config()), "other roots");
}

#[test]
fn a_reload_changes_what_new_handshakes_present() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    let before = b.identities.certificates();
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    ca.sign(&id(SHOP), valid()).unwrap().store(b.path()).unwrap();
    ca.sign(&id(BANK), valid()).unwrap().store(b.path()).unwrap();
    assert!(!b.identities.has(&id(BANK)));
    b.identities.reload().unwrap();
    assert!(b.identities.has(&id(BANK)));
    assert_ne!(b.identities.certificates()[1].serial, before[0].serial);
    assert!(!dial(&a, CART, SHOP, &b).resumed(), "sessions end with the certificates they were made under");
    assert!(dial(&a, CART, BANK, &b).client.is_ok());
}

#[test]
fn a_bad_reload_keeps_the_last_good_identities() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    let key = b.path().join("ns/shop/sa/shop/key.pem");
    let good = fs::read(&key).unwrap();
    let stranger = KeyPair::generate().unwrap().serialize_pem();
    for bad in ["", "nonsense", stranger.as_str()] {
        fs::write(&key, bad).unwrap();
        let error = b.identities.reload().unwrap_err().to_string();
        assert!(error.contains("shop/key.pem") && error.contains("nodemeshd ca issue"), "{error}");
        assert!(dial(&a, CART, SHOP, &b).server.is_ok());
    }
    fs::write(&key, good).unwrap();
    b.identities.reload().unwrap();
    fs::remove_file(b.path().join("bundle.pem")).unwrap();
    assert!(b.identities.reload().unwrap_err().to_string().contains("bundle.pem"));
    assert!(dial(&a, CART, SHOP, &b).server.is_ok());
}

#[test]
fn mistakes_on_disk_are_told_with_file_and_remedy() {
    let (ca, other) = (authority("example.org"), authority("example.com"));
    let a = Node::new(&[&ca], &[CART, SHOP]);
    let load = || Identities::load(a.path(), &domain()).map(|_| ()).unwrap_err().to_string();
    let place = |name: &str| a.path().join("ns/shop/sa").join(name);
    fs::rename(place("shop"), place("bank")).unwrap();
    assert!(load().contains("its place is that of spiffe://example.org/ns/shop/sa/bank"), "{}", load());
    fs::rename(place("bank"), place("Shop")).unwrap();
    assert!(load().contains("ns/<namespace>/sa/<service account>"), "{}", load());
    fs::rename(place("Shop"), place("shop")).unwrap();
    let stranger = authority("example.org").sign(&id(SHOP), valid()).unwrap();
    stranger.store(a.path()).unwrap();
    assert!(load().contains("shop/cert.pem") && load().contains("add its root to bundle.pem"), "{}", load());
    ca.sign(&id(SHOP), valid()).unwrap().store(a.path()).unwrap();
    assert!(Identities::load(a.path(), &domain()).is_ok());
    other.add_to_bundle(a.path()).unwrap();
    assert!(load().contains("certificate 2 is the root of trust domain example.com"), "{}", load());
}

#[test]
fn only_own_identities_dial_and_only_within_the_trust_domain() {
    let ca = authority("example.org");
    let a = Node::new(&[&ca], &[CART]);
    let dial = |source, destination| a.identities.client_config(&id(source), &id(destination));
    assert!(matches!(dial(SHOP, CART), Err(IdentityError::Unknown(unknown)) if unknown == id(SHOP)));
    let foreign = "spiffe://example.com/ns/shop/sa/cart";
    assert!(matches!(dial(CART, foreign), Err(IdentityError::Foreign { .. })));
}
