//! `nodemesh cert` against a daemon that answers from a script.

use super::*;
use crate::admin::documents::{Document, Item};
use crate::cli::fake_daemon::FakeDaemon;
use crate::cli::tests::run;
use serde::Serialize;

const CART: &str = "spiffe://example.org/ns/shop/sa/cart";

fn json<T: Item + Serialize>(items: Vec<T>) -> String {
    serde_json::to_string(&Document::new(items)).unwrap()
}

fn held() -> CertificateRow {
    CertificateRow {
        id: CART.to_owned(),
        serial: "0a1b".to_owned(),
        not_before: "2026-11-23T11:30:00Z".to_owned(),
        not_after: "2026-11-23T23:30:00Z".to_owned(),
        source: "ca".to_owned(),
        state: "valid".to_owned(),
        next_renewal: Some("2026-11-23T17:30:00Z".to_owned()),
        ..CertificateRow::default()
    }
}

fn pending() -> CertificateRow {
    CertificateRow {
        id: "spiffe://example.org/ns/shop/sa/web".to_owned(),
        source: "ca".to_owned(),
        state: "pending".to_owned(),
        last_error: Some("refused".to_owned()),
        ..CertificateRow::default()
    }
}

#[test]
fn the_list_says_what_is_there_and_what_is_awaited() {
    let daemon = FakeDaemon::answering("/v1/certificates", json(vec![pending(), held()]));
    let (exit, out, err) = run(&daemon.socket(), &["cert", "list"]);
    let expected = "\
IDENTITY                              STATE    EXPIRES                           RENEWAL               LAST-ERROR
spiffe://example.org/ns/shop/sa/cart  valid    2026-11-23T23:30:00Z (in 11h30m)  2026-11-23T17:30:00Z  -
spiffe://example.org/ns/shop/sa/web   pending  -                                 -                     refused
";
    assert_eq!((exit, out.as_str(), err.as_str()), (Exit::Ok, expected, ""));
}

#[test]
fn one_certificate_is_shown_with_its_chain() {
    let row = CertificateRow { pem: Some("-----BEGIN CERTIFICATE-----\nMIIB\n".to_owned()), ..held() };
    let daemon = FakeDaemon::answering("/v1/certificates?id=spiffe://example.org/ns/shop/sa/cart", json(vec![row]));
    let (exit, out, _) = run(&daemon.socket(), &["cert", "show", CART]);
    assert_eq!(exit, Exit::Ok);
    assert!(out.contains("Not after:     2026-11-23T23:30:00Z (in 11h30m)\n"), "{out}");
    assert!(out.ends_with("\n-----BEGIN CERTIFICATE-----\nMIIB\n"), "{out}");
    let (exit, _, err) = run(&daemon.socket(), &["cert", "show", "cart"]);
    assert!(exit == Exit::Failure && err.contains("is not a SPIFFE ID"), "{err}");
}

#[test]
fn renewing_says_how_many_and_where_to_look() {
    let row = RotationRow { id: None, identities: 3 };
    let daemon = FakeDaemon::answering("/v1/certificates/rotate", json(vec![row]));
    let (exit, out, err) = run(&daemon.socket(), &["cert", "rotate", "--all"]);
    assert_eq!((exit, out.as_str()), (Exit::Ok, "IDENTITY  RENEWING\nall              3\n"));
    assert!(err.contains("nodemesh cert list"), "{err}");
    let (exit, _, err) = run(&daemon.socket(), &["cert", "rotate", CART]);
    assert!(exit == Exit::Failure && err.contains("refused"), "{err}");
}

#[test]
fn roots_are_a_table_or_pem() {
    let row = RootRow {
        subject: "CN=root".to_owned(),
        serial: "01".to_owned(),
        not_after: "2036-11-23T12:00:00Z".to_owned(),
        spki_sha256: "ab".to_owned(),
        version: 2,
        pem: "-----BEGIN CERTIFICATE-----\n".to_owned(),
    };
    let daemon = FakeDaemon::answering("/v1/bundle", json(vec![row]));
    let (_, out, _) = run(&daemon.socket(), &["cert", "bundle"]);
    assert!(out.contains("CN=root  01      2036-11-23T12:00:00Z (in 3653d0h)  ab                 2\n"), "{out}");
    let (_, out, _) = run(&daemon.socket(), &["cert", "bundle", "--pem"]);
    assert_eq!(out, "-----BEGIN CERTIFICATE-----\n");
}
