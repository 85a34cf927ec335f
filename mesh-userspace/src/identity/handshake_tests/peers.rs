//! Who is let in, who is not, and what each side says about it.

use super::*;

#[test]
fn the_right_pair_meets_and_each_knows_the_other() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP, BANK]));
    let outcome = dial(&a, CART, SHOP, &b);
    assert_eq!(outcome.identities(), (Ok(id(SHOP)), Ok(id(CART))));
    let (client, server) = (outcome.client.unwrap(), outcome.server.unwrap());
    assert_eq!(client.alpn_protocol(), Some(ALPN));
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(server.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(b.identities.identity_named(server.server_name().unwrap()), Some(id(SHOP)));
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    let mut config = (*a.dials(CART, SHOP)).clone();
    config.client_auth_cert_resolver = Arc::new(NoClientCertificate);
    let outcome = shake(&Arc::new(config), server_name(&id(SHOP)), &b.identities.server_config());
    assert_eq!(outcome.refusals(), (Some(PeerRefusal::NoCertificate), Some(PeerRefusal::NoCertificate)));
}

#[test]
fn a_client_of_another_ca_is_refused() {
    let (ca, other) = (authority("example.org"), authority("example.org"));
    // The impostor trusts both roots, so that the server alone has to notice.
    let (a, b) = (Node::new(&[&other, &ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    let outcome = dial(&a, CART, SHOP, &b);
    assert_eq!(outcome.refusals(), (Some(PeerRefusal::UnknownCa), Some(PeerRefusal::UnknownCa)));
}

#[test]
fn a_server_of_another_ca_is_refused() {
    let (ca, other) = (authority("example.org"), authority("example.org"));
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&other, &ca], &[SHOP]));
    let outcome = dial(&a, CART, SHOP, &b);
    assert_eq!(outcome.refusals(), (Some(PeerRefusal::UnknownCa), Some(PeerRefusal::UnknownCa)));
}

#[test]
fn a_server_with_another_identity_of_the_same_ca_is_refused() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    // The client asks by SHOP's name for BANK: what a server would do that hands out any certificate it has.
    let outcome = shake(&a.dials(CART, BANK), server_name(&id(SHOP)), &b.identities.server_config());
    assert_eq!(outcome.refusals(), (Some(PeerRefusal::IdentityMismatch), Some(PeerRefusal::IdentityMismatch)));
}

#[test]
fn another_client_of_the_same_ca_is_known_for_what_it_is() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[BANK]), Node::new(&[&ca], &[SHOP]));
    assert_eq!(dial(&a, BANK, SHOP, &b).identities().1, Ok(id(BANK)));
}

#[test]
fn a_name_of_no_local_identity_ends_the_handshake() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    let refused = (Some(PeerRefusal::IdentityMismatch), Some(PeerRefusal::IdentityMismatch));
    assert_eq!(dial(&a, CART, BANK, &b).refusals(), refused);
    // An address is not sent as a name: nothing is asked for.
    let nameless = shake(&a.dials(CART, SHOP), "127.0.0.1".try_into().unwrap(), &b.identities.server_config());
    assert_eq!(nameless.refusals(), refused);
}

#[test]
fn certificates_out_of_their_time_are_refused() {
    let ca = authority("example.org");
    let good = |uri| Node::new(&[&ca], &[uri]);
    let bad = |uri, start, end| Node::with_validity(&[&ca], &[uri], validity(start, end));
    // An alert has no word for "not yet": the other side reads "expired".
    let (expired, early) = (Some(PeerRefusal::Expired), Some(PeerRefusal::NotYetValid));
    assert_eq!(dial(&bad(CART, -20, -10), CART, SHOP, &good(SHOP)).refusals(), (expired, expired));
    assert_eq!(dial(&good(CART), CART, SHOP, &bad(SHOP, -20, -10)).refusals(), (expired, expired));
    assert_eq!(dial(&bad(CART, 1000, 2000), CART, SHOP, &good(SHOP)).refusals(), (expired, early));
    assert_eq!(dial(&good(CART), CART, SHOP, &bad(SHOP, 1000, 2000)).refusals(), (early, expired));
}

/// A root as PEM, and a leaf of it with arbitrary URI names.
fn forged(uris: &[&str]) -> (String, Arc<dyn rustls::client::ResolvesClientCert>) {
    let root = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&root).unwrap();
    let issuer = rcgen::Issuer::new(params, root);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key.into()).unwrap();
    let leaf = rustls::sign::CertifiedKey::new(vec![leaf.der().clone()], key);
    (certificate.pem(), Arc::new(rustls::sign::SingleCertAndKey::from(leaf)))
}

#[test]
fn a_client_needs_exactly_one_identity_of_the_trust_domain() {
    let ca = authority("example.org");
    let a = Node::new(&[&ca], &[CART]);
    let cases: &[(&[&str], PeerRefusal)] = &[
        (&[CART, SHOP], PeerRefusal::BadCertificate),
        (&[CART, "https://example.org/"], PeerRefusal::BadCertificate),
        (&[], PeerRefusal::BadCertificate),
        (&["spiffe://example.org/ns/shop/sa/cart/"], PeerRefusal::BadCertificate),
        (&["spiffe://example.org.evil/ns/shop/sa/cart"], PeerRefusal::IdentityMismatch),
        (&["spiffe://example.or/ns/shop/sa/cart"], PeerRefusal::IdentityMismatch),
        (&["spiffe://xexample.org/ns/shop/sa/cart"], PeerRefusal::IdentityMismatch),
    ];
    for (uris, refusal) in cases {
        let b = Node::new(&[&ca], &[SHOP]);
        let (root, resolver) = forged(uris);
        let bundle = b.path().join("bundle.pem");
        fs::write(&bundle, fs::read_to_string(&bundle).unwrap() + &root).unwrap();
        b.identities.reload().unwrap();
        let mut config = (*a.dials(CART, SHOP)).clone();
        config.client_auth_cert_resolver = resolver;
        let outcome = shake(&Arc::new(config), server_name(&id(SHOP)), &b.identities.server_config());
        assert_eq!(outcome.refusals(), (Some(*refusal), Some(*refusal)), "{uris:?}");
    }
}

/// Presents nothing.
#[derive(Debug)]
struct NoClientCertificate;

impl rustls::client::ResolvesClientCert for NoClientCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
