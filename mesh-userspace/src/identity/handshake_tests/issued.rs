//! Identities that come and go one by one.

use super::*;
use crate::identity::request::Request;
use crate::identity::scripted_source::Root;

/// A node that gets its certificates one by one, from `roots`, which it trusts.
fn node(roots: &[&Root]) -> Node {
    let directory = TempDir::new().unwrap();
    let bundle: Vec<_> = roots.iter().map(|root| root.certificate.clone()).collect();
    fs::write(directory.path().join("bundle.pem"), crate::identity::pem(&bundle)).unwrap();
    let (identities, _orders) = Identities::issued(directory.path(), &domain()).unwrap();
    Node { directory, identities }
}

impl Node {
    /// Holds `uri` from now on, with a new certificate of `root`.
    fn gets(&self, root: &Root, uri: &str) {
        let (request, signing) = Request::new(&id(uri)).unwrap();
        let chain = root.sign(&signing.csr, (-60, 3600));
        let local = request.accept(chain, &self.identities.roots(), OffsetDateTime::now_utc()).unwrap();
        self.identities.put(vec![local]);
    }

    fn trusts(&self, roots: &[&Root]) {
        self.identities.trust(roots.iter().map(|root| root.certificate.clone()).collect(), 1).unwrap();
    }
}

/// CART and BANK on one node, SHOP and BANK on the other, and sessions between them.
fn acquainted(root: &Root) -> (Node, Node) {
    let (a, b) = (node(&[root]), node(&[root]));
    for (node, uri) in [(&a, CART), (&a, BANK), (&b, SHOP), (&b, BANK)] {
        node.gets(root, uri);
    }
    for (source, destination) in [(CART, SHOP), (CART, BANK), (BANK, SHOP)] {
        assert!(!dial(&a, source, destination, &b).resumed());
        assert!(dial(&a, source, destination, &b).resumed());
    }
    (a, b)
}

#[test]
fn a_renewal_leaves_the_sessions_and_configurations_of_other_identities_alone() {
    let root = Root::new("root");
    let (a, b) = acquainted(&root);
    let (server, client, other) = (b.identities.server_config(), a.dials(CART, BANK), a.dials(BANK, SHOP));
    b.gets(&root, SHOP);
    assert!(Arc::ptr_eq(&server, &b.identities.server_config()));
    assert!(dial(&a, CART, BANK, &b).resumed(), "another identity of the same server");
    let renewed = dial(&a, CART, SHOP, &b);
    assert!(!renewed.resumed(), "sessions end with the certificate they were made under");
    assert_eq!(renewed.identities(), (Ok(id(SHOP)), Ok(id(CART))));
    assert!(dial(&a, CART, SHOP, &b).resumed());
    a.gets(&root, CART);
    assert!(!Arc::ptr_eq(&client, &a.dials(CART, BANK)));
    assert!(Arc::ptr_eq(&other, &a.dials(BANK, SHOP)));
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    // Its sessions went when SHOP was renewed; this was a full handshake then, and resumes now.
    assert!(!dial(&a, BANK, SHOP, &b).resumed());
    assert!(dial(&a, BANK, SHOP, &b).resumed());
}

#[test]
fn connections_that_exist_do_not_notice_renewals() {
    let root = Root::new("root");
    let (a, b) = acquainted(&root);
    let Outcome { client, server } = dial(&a, CART, SHOP, &b);
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    b.gets(&root, SHOP);
    a.identities.remove(&[id(CART)]);
    std::io::Write::write_all(&mut client.writer(), b"still here").unwrap();
    let mut wire = Vec::new();
    client.write_tls(&mut wire).unwrap();
    server.read_tls(&mut wire.as_slice()).unwrap();
    server.process_new_packets().unwrap();
    let mut read = [0; 10];
    std::io::Read::read_exact(&mut server.reader(), &mut read).unwrap();
    assert_eq!(&read, b"still here");
}

#[test]
fn a_server_does_not_resume_sessions_of_an_identity_that_has_gone_and_come_back() {
    let root = Root::new("root");
    let (a, b) = acquainted(&root);
    let client = a.dials(CART, SHOP);
    b.identities.remove(&[id(SHOP)]);
    let refused = shake(&client, server_name(&id(SHOP)), &b.identities.server_config());
    assert_eq!(refused.refusals().1, Some(PeerRefusal::IdentityMismatch));
    b.gets(&root, SHOP);
    // The client still has tickets, the server must not take them.
    assert!(!shake(&client, server_name(&id(SHOP)), &b.identities.server_config()).resumed());
    assert!(dial(&a, CART, BANK, &b).resumed(), "another identity is as it was");
}

#[test]
fn a_client_does_not_resume_sessions_of_an_identity_that_has_gone_and_come_back() {
    let root = Root::new("root");
    let (a, b) = acquainted(&root);
    a.identities.remove(&[id(CART)]);
    let gone = a.identities.client_config(&id(CART), &id(SHOP));
    assert!(matches!(gone, Err(IdentityError::Unknown(unknown)) if unknown == id(CART)));
    a.gets(&root, CART);
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    assert!(dial(&a, BANK, SHOP, &b).resumed(), "another identity is as it was");
}

#[test]
fn a_bundle_is_changed_in_steps_without_a_refusal_and_the_old_root_is_refused_after() {
    let (old, new) = (Root::new("old"), Root::new("new"));
    let (a, b) = acquainted(&old);
    let before = (b.identities.server_config(), a.dials(CART, SHOP));
    for node in [&a, &b] {
        node.trusts(&[&old, &new]);
    }
    assert!(!Arc::ptr_eq(&before.0, &b.identities.server_config()));
    assert!(!Arc::ptr_eq(&before.1, &a.dials(CART, SHOP)));
    let meets = |source, destination| {
        assert_eq!(dial(&a, source, destination, &b).identities(), (Ok(id(destination)), Ok(id(source))));
    };
    // Certificates of both roots, on both sides.
    meets(CART, SHOP);
    b.gets(&new, SHOP);
    meets(CART, SHOP);
    a.gets(&new, CART);
    meets(CART, SHOP);
    meets(CART, BANK);
    meets(BANK, SHOP);
    for node in [&a, &b] {
        node.trusts(&[&new]);
    }
    meets(CART, SHOP);
    assert_eq!(dial(&a, BANK, SHOP, &b).refusals().1, Some(PeerRefusal::UnknownCa), "a client of the old root");
    assert_eq!(dial(&a, CART, BANK, &b).refusals().0, Some(PeerRefusal::UnknownCa), "a server of the old root");
    assert_eq!(a.identities.orphans(OffsetDateTime::now_utc()), [id(BANK)]);
}

#[test]
fn a_bundle_that_cannot_be_used_changes_nothing() {
    let root = Root::new("root");
    let (a, b) = acquainted(&root);
    let foreign = authority("example.com");
    let directory = TempDir::new().unwrap();
    foreign.add_to_bundle(directory.path()).unwrap();
    let foreign = crate::identity::files::read_certificates(&directory.path().join("bundle.pem"), "").unwrap();
    for bad in [Vec::new(), vec![CertificateDer::from(vec![0x30, 0])], foreign] {
        assert!(b.identities.trust(bad, 7).is_err());
        assert!(dial(&a, CART, SHOP, &b).resumed());
        assert_eq!(b.identities.bundle().1, 0);
    }
}

#[test]
fn an_answer_is_used_only_if_it_is_what_was_asked_for() {
    let (root, stranger) = (Root::new("root"), Root::new("stranger"));
    let a = node(&[&root]);
    let (_, other_key) = Request::new(&id(CART)).unwrap();
    let (_, other_name) = Request::new(&id(SHOP)).unwrap();
    let accept = |answer: &dyn Fn(&[u8]) -> crate::identity::SignedChain| {
        let (request, signing) = Request::new(&id(CART)).unwrap();
        let answer = request.accept(answer(&signing.csr), &a.identities.roots(), OffsetDateTime::now_utc());
        answer.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(accept(&|csr| root.sign(csr, (-60, 60))), Ok(()));
    let day = 24 * 3600;
    for (answer, problem) in [
        (accept(&|_| root.sign(&other_key.csr, (-60, 60))), "another key"),
        (accept(&|_| root.sign(&other_name.csr, (-60, 60))), "it is of spiffe://example.org/ns/shop/sa/shop"),
        (accept(&|csr| stranger.sign(csr, (-60, 60))), "UnknownIssuer"),
        (accept(&|csr| root.sign(csr, (-60, -10))), "has expired"),
        (accept(&|csr| root.sign(csr, (30, 60))), "not valid yet"),
        (accept(&|csr| root.sign(csr, (-60, 400 * day))), "longer than a year"),
        (accept(&|_| crate::identity::SignedChain(Vec::new())), "empty"),
        (accept(&|_| crate::identity::SignedChain(vec![root.certificate.clone()])), "malformed"),
    ] {
        let error = answer.expect_err(problem);
        assert!(error.contains(problem) && error.contains(CART), "{error}");
    }
}
