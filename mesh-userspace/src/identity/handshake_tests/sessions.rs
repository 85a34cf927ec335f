//! Sessions: resumed by the same pair, worthless to anyone else and after their time.

use super::*;

#[test]
fn a_pair_resumes_and_both_still_know_each_other() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP]));
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    for _ in 0..5 {
        let again = dial(&a, CART, SHOP, &b);
        assert!(again.resumed());
        assert_eq!(again.identities(), (Ok(id(SHOP)), Ok(id(CART))));
    }
}

#[test]
fn sessions_stay_within_their_pair_of_identities() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART, BANK]), Node::new(&[&ca], &[SHOP, BANK]));
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    assert!(!dial(&a, BANK, SHOP, &b).resumed(), "another source");
    assert!(!dial(&a, CART, BANK, &b).resumed(), "another destination");
    assert!(dial(&a, CART, SHOP, &b).resumed());
}

/// Gives out SHOP's tickets under whatever name is asked for: a client that means ill.
#[derive(Debug)]
struct CrossingSessions(rustls::client::ClientSessionMemoryCache);

impl rustls::client::ClientSessionStore for CrossingSessions {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }
    fn set_tls12_session(&self, _: ServerName<'static>, _: rustls::client::Tls12ClientSessionValue) {}
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<rustls::client::Tls12ClientSessionValue> {
        None
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {}
    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: rustls::client::Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(server_name(&id(SHOP)), value);
    }
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<rustls::client::Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&server_name(&id(SHOP)))
    }
}

#[test]
fn a_ticket_of_one_identity_is_worthless_under_the_name_of_another() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::new(&[&ca], &[SHOP, BANK]));
    let mut config = (*a.dials(CART, SHOP)).clone();
    let sessions = Arc::new(CrossingSessions(rustls::client::ClientSessionMemoryCache::new(8)));
    config.resumption = rustls::client::Resumption::store(sessions);
    let config = Arc::new(config);
    let server = b.identities.server_config();
    assert!(!shake(&config, server_name(&id(SHOP)), &server).resumed());
    assert!(shake(&config, server_name(&id(SHOP)), &server).resumed(), "the tickets do work under their own name");
    // The server answers with BANK's certificate in a full handshake, and this client, which wants SHOP, refuses.
    let crossed = shake(&config, server_name(&id(BANK)), &server);
    assert_eq!(crossed.refusals().0, Some(PeerRefusal::IdentityMismatch));
}

#[test]
fn a_session_does_not_outlive_the_certificates_it_rests_on() {
    let ca = authority("example.org");
    let (a, b) = (Node::new(&[&ca], &[CART]), Node::with_validity(&[&ca], &[SHOP], validity(-60, 2)));
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    let bound = Instant::now() + Duration::from_secs(30);
    let refusals = loop {
        let outcome = dial(&a, CART, SHOP, &b);
        if outcome.client.is_err() {
            break outcome.refusals();
        }
        assert!(outcome.resumed());
        assert!(Instant::now() < bound, "tickets are used after the certificate's end");
    };
    assert_eq!(refusals, (Some(PeerRefusal::Expired), Some(PeerRefusal::Expired)));
}

#[test]
fn an_expired_chain_is_refused_even_if_the_session_is_resumed() {
    let ca = authority("example.org");
    let chain = |start, end| {
        let issued = ca.sign(&id(CART), validity(start, end)).unwrap();
        let directory = TempDir::new().unwrap();
        issued.store(directory.path()).unwrap();
        crate::identity::files::read_certificates(&directory.path().join("ns/shop/sa/cart/cert.pem"), "").unwrap()
    };
    assert_eq!(peer_identity(&chain(-60, 60)), Ok(id(CART)));
    assert_eq!(peer_identity(&chain(-60, -5)), Err(PeerRefusal::Expired));
    assert_eq!(peer_identity(&chain(60, 120)), Err(PeerRefusal::NotYetValid));
    assert_eq!(peer_identity(&[]), Err(PeerRefusal::NoCertificate));
    assert_eq!(peer_identity(&[CertificateDer::from(vec![0x30, 0])]), Err(PeerRefusal::BadCertificate));
}

#[test]
fn a_root_that_is_taken_back_is_trusted_no_more_even_by_sessions() {
    let (ca, other) = (authority("example.org"), authority("example.org"));
    let (a, b) = (Node::new(&[&other, &ca], &[CART]), Node::new(&[&ca, &other], &[SHOP]));
    assert!(!dial(&a, CART, SHOP, &b).resumed());
    assert!(dial(&a, CART, SHOP, &b).resumed());
    fs::remove_file(b.path().join("bundle.pem")).unwrap();
    ca.add_to_bundle(b.path()).unwrap();
    b.identities.reload().unwrap();
    assert_eq!(dial(&a, CART, SHOP, &b).refusals().1, Some(PeerRefusal::UnknownCa));
}
