//! The authority's directory, and certificates in files.

use crate::ca::certificate::BACK_DATED;
use crate::ca::store::STORE_FILE;
use crate::ca::{Authority, CaError, DEFAULT_TTL, MAX_TTL, Reason, Validity, init, issue};
use crate::identity::{IdentityError, files};
use crate::model::{ObjectName, SpiffeId, TrustDomain};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use time::OffsetDateTime;

fn ca() -> TempDir {
    let directory = TempDir::new().unwrap();
    init(directory.path(), &TrustDomain::parse("example.org").unwrap()).unwrap();
    directory
}

fn account() -> ObjectName {
    ObjectName::parse("shop", "cart").unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_existing_ca_is_never_overwritten() {
    let directory = ca();
    let roots = Authority::open(directory.path()).unwrap().bundle();
    let again = init(directory.path(), &TrustDomain::parse("example.org").unwrap());
    assert!(again.unwrap_err().to_string().contains("a CA is there already"));
    assert_eq!(Authority::open(directory.path()).unwrap().bundle(), roots);
}

#[test]
fn a_directory_without_a_ca_is_told_apart_from_a_broken_one() {
    let directory = TempDir::new().unwrap();
    let error = Authority::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("there is no CA") && error.contains("nodemeshd ca init"), "{error}");
    fs::write(directory.path().join(STORE_FILE), vec![7; 100_000]).unwrap();
    fs::set_permissions(directory.path().join(STORE_FILE), fs::Permissions::from_mode(0o600)).unwrap();
    let error = Authority::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains(STORE_FILE) && error.contains("restore"), "{error}");
}

#[test]
fn a_running_ca_keeps_others_out() {
    let directory = ca();
    let running = Authority::open(directory.path()).unwrap();
    let error = Authority::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("a CA is running with this directory"), "{error}");
    drop(running);
    Authority::open(directory.path()).unwrap();
}

#[test]
fn keys_are_for_their_owner_only() {
    let (directory, out) = (ca(), TempDir::new().unwrap());
    let inner = directory.path().join("made/by/init");
    init(&inner, &TrustDomain::parse("example.org").unwrap()).unwrap();
    assert_eq!((mode(&inner), mode(&inner.join(STORE_FILE))), (0o700, 0o600));
    issue(directory.path(), &account(), DEFAULT_TTL, out.path()).unwrap();
    assert_eq!(mode(&out.path().join("ns/shop/sa/cart/key.pem")), 0o600);
    fs::set_permissions(inner.join(STORE_FILE), fs::Permissions::from_mode(0o640)).unwrap();
    let error = Authority::open(&inner).unwrap_err().to_string();
    assert!(error.contains("0640") && error.contains("chmod 600"), "{error}");
}

#[test]
fn an_issued_certificate_says_exactly_what_it_should() {
    let (directory, out) = (ca(), TempDir::new().unwrap());
    let before = OffsetDateTime::now_utc();
    let issued = issue(directory.path(), &account(), Duration::from_secs(300), out.path()).unwrap();
    assert_eq!(issued.id.as_str(), "spiffe://example.org/ns/shop/sa/cart");
    let slack = time::Duration::seconds(30);
    assert!((issued.not_before - (before - BACK_DATED)).abs() < slack);
    assert!((issued.not_after - (before + Duration::from_secs(300))).abs() < slack);
    let chain = files::read_certificates(&out.path().join("ns/shop/sa/cart/cert.pem"), "").unwrap();
    assert_eq!(chain.len(), 2, "leaf and intermediate");
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    assert!(!leaf.is_ca());
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical && names.value.general_names.len() == 1);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let again = issue(directory.path(), &account(), Duration::from_secs(300), out.path()).unwrap();
    assert_ne!(again.serial, issued.serial);
    assert_eq!(files::read_certificates(&out.path().join("bundle.pem"), "").unwrap().len(), 1);
}

#[test]
fn issuers_may_only_sign_and_only_so_far_down() {
    let directory = ca();
    let authority = Authority::open(directory.path()).unwrap();
    let root = authority.bundle().roots.remove(0);
    let id = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
    let issued = authority.sign(&id, Validity::starting_now(DEFAULT_TTL).unwrap()).unwrap();
    for (issuer, below) in [(&root, 1), (&issued.chain()[1], 0)] {
        let (_, issuer) = x509_parser::parse_x509_certificate(issuer).unwrap();
        let constraints = issuer.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(below));
        let usage = issuer.key_usage().unwrap().unwrap().value;
        assert!(usage.key_cert_sign() && !usage.digital_signature());
    }
    let copy = files::read_certificates(&directory.path().join("ca.pem"), "").unwrap();
    assert_eq!(copy, [root], "a copy for people lies beside the store");
}

#[test]
fn senseless_lives_are_refused() {
    let (directory, out) = (ca(), TempDir::new().unwrap());
    for ttl in [Duration::ZERO, Duration::from_millis(10), MAX_TTL + Duration::from_secs(1), Duration::MAX] {
        let refused = issue(directory.path(), &account(), ttl, out.path());
        assert!(matches!(refused, Err(CaError::Refused(refusal)) if refusal.reason == Reason::Lifetime), "{ttl:?}");
    }
    assert!(!out.path().join("ns").exists());
}

#[test]
fn no_leaf_outlives_its_issuer() {
    let directory = ca();
    let authority = Authority::open(directory.path()).unwrap();
    let id = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
    let late = OffsetDateTime::now_utc() + Duration::from_hours(80 * 24);
    let issued = authority.sign(&id, Validity::starting_at(late, Duration::from_hours(24 * 24)).unwrap()).unwrap();
    let (_, issuer) = x509_parser::parse_x509_certificate(&issued.chain()[1]).unwrap();
    assert_eq!(issued.certificate.not_after, issuer.validity().not_after.to_datetime());
    let beyond = OffsetDateTime::now_utc() + Duration::from_hours(91 * 24);
    assert!(authority.sign(&id, Validity::starting_at(beyond, Duration::from_hours(1)).unwrap()).is_err());
}

#[test]
fn an_authority_signs_for_its_own_trust_domain_only() {
    let directory = ca();
    let foreign = SpiffeId::parse("spiffe://example.com/ns/shop/sa/cart").unwrap();
    let refused =
        Authority::open(directory.path()).unwrap().sign(&foreign, Validity::starting_now(DEFAULT_TTL).unwrap());
    assert!(matches!(refused, Err(CaError::Identity(IdentityError::Foreign { .. }))));
}
