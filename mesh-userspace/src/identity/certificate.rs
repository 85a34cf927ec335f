//! Reading what a certificate says. Whether it is to be believed is decided in `verify`.

use super::bundle::Root;
use super::{PeerRefusal, name};
use crate::model::SpiffeId;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::time::Duration;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// What is worth telling about a certificate of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub id: SpiffeId,
    /// Lower-case hexadecimal.
    pub serial: String,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Certificate {
    /// # Errors
    /// `BadCertificate` if it is malformed or does not name exactly one identity.
    pub(crate) fn parse(certificate: &CertificateDer<'_>) -> Result<Self, PeerRefusal> {
        let parsed = parse(certificate)?;
        let validity = parsed.validity();
        Ok(Self {
            id: identity_of(&parsed)?,
            serial: hexadecimal(parsed.raw_serial()),
            not_before: validity.not_before.to_datetime(),
            not_after: validity.not_after.to_datetime(),
        })
    }

    /// # Errors
    /// `Expired` or `NotYetValid`.
    pub(super) fn check_time(&self, now: OffsetDateTime) -> Result<(), PeerRefusal> {
        if now < self.not_before {
            return Err(PeerRefusal::NotYetValid);
        }
        if now > self.not_after {
            return Err(PeerRefusal::Expired);
        }
        Ok(())
    }
}

/// The identity of a peer whose handshake has succeeded, from the chain that it presented (leaf first).
///
/// Looks at the clock again: a resumed session carries the chain of the session's first handshake, which may have
/// expired since. Call it on every connection, on both sides.
///
/// # Errors
/// `NoCertificate`; `BadCertificate` unless the leaf has exactly one URI name and that is an identity of the mesh's
/// form; `Expired`, `NotYetValid`.
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerRefusal> {
    let leaf = Certificate::parse(certificates.first().ok_or(PeerRefusal::NoCertificate)?)?;
    leaf.check_time(OffsetDateTime::now_utc())?;
    Ok(leaf.id)
}

/// When the leaf of a chain ends; `None` if there is none that can be read. Tells of a peer's chain and of this side's
/// own: a connection should not outlive either.
#[must_use]
pub fn expiry(chain: &[CertificateDer<'_>]) -> Option<OffsetDateTime> {
    validity(chain.first()?).ok().map(|(_, not_after)| not_after)
}

/// Whether a chain, leaf first, leads to a root; `at` is the time at which it must be valid.
pub(super) fn check_chain(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    at: OffsetDateTime,
    provider: &CryptoProvider,
) -> Result<(), Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(leaf)?,
        roots,
        intermediates,
        unix_time(at)?,
        provider.signature_verification_algorithms.all,
    )
}

pub(super) fn unix_time(at: OffsetDateTime) -> Result<UnixTime, Error> {
    let seconds = u64::try_from(at.unix_timestamp()).map_err(|_| CertificateError::BadEncoding)?;
    Ok(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
}

/// What is worth telling about a root.
pub(super) fn root(certificate: &CertificateDer<'static>) -> Result<Root, PeerRefusal> {
    let parsed = parse(certificate)?;
    Ok(Root {
        subject: parsed.subject().to_string(),
        serial: hexadecimal(parsed.raw_serial()),
        not_after: parsed.validity().not_after.to_datetime(),
        public_key_sha256: hexadecimal(name::sha256(parsed.public_key().raw).as_ref()),
        certificate: certificate.clone(),
    })
}

/// A certificate or chain as PEM.
#[must_use]
pub fn pem(chain: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in chain {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = BASE64_STANDARD.encode(certificate);
        for line in encoded.as_bytes().chunks(64) {
            text.extend(line.iter().map(|byte| char::from(*byte)));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// The trust domain that a root certificate claims (`spiffe://<trust-domain>`), if it claims any.
pub(crate) fn claimed_trust_domain(root: &CertificateDer<'_>) -> Result<Option<String>, PeerRefusal> {
    let parsed = parse(root)?;
    Ok(uris(&parsed)?.into_iter().find_map(|uri| uri.strip_prefix("spiffe://").map(str::to_owned)))
}

/// From when to when a certificate is valid.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<(OffsetDateTime, OffsetDateTime), PeerRefusal> {
    let parsed = parse(certificate)?;
    let validity = parsed.validity();
    Ok((validity.not_before.to_datetime(), validity.not_after.to_datetime()))
}

/// Whether the certificate is of this public key (DER, SubjectPublicKeyInfo).
pub(crate) fn has_public_key(certificate: &CertificateDer<'_>, public_key: &[u8]) -> bool {
    parse(certificate).is_ok_and(|parsed| parsed.public_key().raw == public_key)
}

/// The URI names of a certificate, whatever they say; `None` if it is malformed.
pub(crate) fn uris_of(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let parsed = parse(certificate).ok()?;
    Some(uris(&parsed).ok()?.into_iter().map(str::to_owned).collect())
}

/// A certificate's serial number, in lower-case hexadecimal.
pub(crate) fn serial_of(certificate: &CertificateDer<'_>) -> Option<String> {
    let parsed = parse(certificate).ok()?;
    Some(parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerRefusal> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(PeerRefusal::BadCertificate),
    }
}

fn uris<'a>(certificate: &X509Certificate<'a>) -> Result<Vec<&'a str>, PeerRefusal> {
    let names = certificate.subject_alternative_name().map_err(|_| PeerRefusal::BadCertificate)?;
    let names = names.iter().flat_map(|extension| &extension.value.general_names);
    Ok(names
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect())
}

fn identity_of(certificate: &X509Certificate<'_>) -> Result<SpiffeId, PeerRefusal> {
    let [uri] = uris(certificate)?[..] else {
        return Err(PeerRefusal::BadCertificate);
    };
    SpiffeId::parse(uri).map_err(|_| PeerRefusal::BadCertificate)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
