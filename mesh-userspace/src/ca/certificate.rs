//! What the certificates of a mesh say: roots, intermediates, and the three kinds of leaves.

use super::key::{Key, random};
use super::{CaError, Reason, Refusal};
use crate::identity::certificate::validity;
use crate::model::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use std::fmt::Write;
use std::time::Duration;
use time::OffsetDateTime;

/// How long a workload's certificate lives unless told otherwise.
pub const DEFAULT_TTL: Duration = Duration::from_hours(12);
/// How long a node's certificate lives unless told otherwise.
pub const DEFAULT_NODE_TTL: Duration = Duration::from_hours(168);
/// The longest life of a leaf: what an intermediate has left when its successor takes over.
pub const MAX_TTL: Duration = Duration::from_hours(30 * 24);
/// How long a root lives.
pub(super) const ROOT_TTL: Duration = Duration::from_hours(10 * 365 * 24);
/// How long an intermediate lives.
pub(super) const INTERMEDIATE_TTL: Duration = Duration::from_hours(90 * 24);
/// Leaves start in the past, for peers whose clocks are slow.
pub const BACK_DATED: Duration = Duration::from_mins(1);
/// Issuers start further in the past: a leaf that was valid on a slow clock must not fail for its issuer.
const ISSUER_BACK_DATED: Duration = Duration::from_hours(24);

/// From when to when a certificate is valid, both inclusive, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// From now (60 s ago, for slow clocks) until `ttl` from now.
    ///
    /// # Errors
    /// If `ttl` is zero, or so long that the end has no date.
    pub fn starting_now(ttl: Duration) -> Result<Self, Refusal> {
        Self::starting_at(OffsetDateTime::now_utc(), ttl)
    }

    /// [`Self::starting_now`] with the time as an argument.
    ///
    /// # Errors
    /// Likewise.
    pub fn starting_at(now: OffsetDateTime, ttl: Duration) -> Result<Self, Refusal> {
        let end = time::Duration::try_from(ttl).ok().and_then(|ttl| now.checked_add(ttl));
        match end {
            Some(not_after) if ttl >= Duration::from_secs(1) => Ok(Self { not_before: now - BACK_DATED, not_after }),
            _ => {
                let message = "a certificate's life must be at least a second and end before the year 9999";
                Err(Refusal::new(Reason::Lifetime, message))
            }
        }
    }

    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (not_before, not_after) = validity(certificate).ok()?;
        Some(Self { not_before, not_after })
    }
}

/// What a leaf is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Profile {
    /// Both ends of a tunnel.
    Workload,
    /// A client of the authority.
    Node,
    /// The authority's own server.
    Server,
}

impl Profile {
    /// The label of `nodemesh_ca_issued_total`.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Workload => "workload",
            Self::Node => "node",
            Self::Server => "server",
        }
    }

    fn usages(self) -> Vec<ExtendedKeyUsagePurpose> {
        match self {
            Self::Workload => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Self::Node => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Self::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        }
    }
}

/// A certificate authority's certificate and key.
pub(super) struct Made {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: Key,
}

/// A root of a trust domain.
pub(super) fn root(trust_domain: &TrustDomain, now: OffsetDateTime) -> Result<Made, CaError> {
    let key = Key::generate()?;
    let uri = format!("spiffe://{trust_domain}");
    let mut params = issuer_params(&uri, &name("root", trust_domain)?, issuer_validity(now, ROOT_TTL), 1)?;
    params.use_authority_key_identifier_extension = false;
    let certificate = params.self_signed(&key)?.der().clone();
    Ok(Made { certificate, key })
}

/// An intermediate below `root`; it ends with the root at the latest.
pub(super) fn intermediate(trust_domain: &TrustDomain, root: &Made, now: OffsetDateTime) -> Result<Made, CaError> {
    let key = Key::generate()?;
    let issuer = Issuer::from_ca_cert_der(&root.certificate, &root.key)?;
    let mut validity = issuer_validity(now, INTERMEDIATE_TTL);
    if let Some(of_root) = Validity::of(&root.certificate) {
        validity.not_after = validity.not_after.min(of_root.not_after);
        validity.not_before = validity.not_before.max(of_root.not_before);
    }
    let uri = format!("spiffe://{trust_domain}");
    let params = issuer_params(&uri, &name("intermediate", trust_domain)?, validity, 0)?;
    let certificate = params.signed_by(&key, &issuer)?.der().clone();
    Ok(Made { certificate, key })
}

/// A leaf with this one name. Nothing of it comes from whoever asked for it but the public key.
pub(super) fn leaf(
    profile: Profile,
    uri: &str,
    key: &impl PublicKeyData,
    validity: Validity,
    issuer: &Issuer<'_, Key>,
) -> Result<CertificateDer<'static>, CaError> {
    let mut params = params(uri, validity)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = profile.usages();
    params.use_authority_key_identifier_extension = true;
    Ok(params.signed_by(key, issuer)?.der().clone())
}

fn issuer_validity(now: OffsetDateTime, ttl: Duration) -> Validity {
    Validity { not_before: now - ISSUER_BACK_DATED, not_after: now + ttl }
}

/// Issuers of one trust domain have different names, so that chains are told apart by issuer.
fn name(kind: &str, trust_domain: &TrustDomain) -> Result<String, CaError> {
    let mut name = format!("nodemesh {kind} {trust_domain}");
    // A common name has 64 letters at most.
    name.truncate(64 - 9);
    write!(name, " {}", hexadecimal(&random::<4>()?)).expect("writing to a String");
    Ok(name)
}

fn issuer_params(uri: &str, name: &str, validity: Validity, below: u8) -> Result<CertificateParams, CaError> {
    let mut params = params(uri, validity)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// What all certificates here have in common: one URI name, a random serial number.
fn params(uri: &str, validity: Validity) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    // A certificate without a subject marks its names as critical, as SPIFFE asks.
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    let mut serial = random::<16>()?;
    // Positive, and 16 bytes long in any encoding.
    serial[0] = serial[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
