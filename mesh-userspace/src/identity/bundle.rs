//! The roots that are trusted here.

use super::files;
use super::{IdentityError, certificate};
use crate::model::TrustDomain;
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use std::path::Path;
use std::sync::Arc;
use time::OffsetDateTime;

const FIX: &str = "put the mesh's root certificates there (ca.pem of `nodemeshd ca init`)";

/// Root certificates of one trust domain, at least one.
#[derive(Clone, Debug)]
pub(super) struct Bundle {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) roots: Arc<RootCertStore>,
}

/// What is worth telling about a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub subject: String,
    /// Lower-case hexadecimal.
    pub serial: String,
    pub not_after: OffsetDateTime,
    /// SHA-256 of the public key (SubjectPublicKeyInfo), lower-case hexadecimal.
    pub public_key_sha256: String,
    pub certificate: CertificateDer<'static>,
}

impl Bundle {
    /// # Errors
    /// Says which file and certificate cannot be used.
    pub(super) fn read(path: &Path, trust_domain: &TrustDomain) -> Result<Self, IdentityError> {
        let certificates = files::read_certificates(path, FIX)?;
        Self::new(certificates, trust_domain)
            .map_err(|Unusable { problem, fix }| IdentityError::file(path, problem, fix))
    }

    /// # Errors
    /// If there is no root, one is malformed, or one is of another trust domain.
    pub(super) fn new(
        certificates: Vec<CertificateDer<'static>>,
        trust_domain: &TrustDomain,
    ) -> Result<Self, Unusable> {
        if certificates.is_empty() {
            return Err(Unusable { problem: "it holds no certificate".to_owned(), fix: FIX });
        }
        let mut roots = RootCertStore::empty();
        for (index, root) in certificates.iter().enumerate() {
            let unusable = |problem: &dyn std::fmt::Display| Unusable {
                problem: format!("certificate {}: {problem}", index + 1),
                fix: FIX,
            };
            let claimed = certificate::claimed_trust_domain(root).map_err(|refusal| unusable(&refusal))?;
            if let Some(claimed) = claimed.filter(|claimed| claimed != trust_domain.as_str()) {
                let number = index + 1;
                return Err(Unusable {
                    problem: format!(
                        "certificate {number} is the root of trust domain {claimed}, not of {trust_domain}"
                    ),
                    fix: "remove it, or correct `trustDomain` in the MeshConfig",
                });
            }
            roots.add(root.clone()).map_err(|error| unusable(&error))?;
        }
        Ok(Self { certificates, roots: Arc::new(roots) })
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

/// What is wrong with a bundle.
#[derive(Debug)]
pub(super) struct Unusable {
    pub(super) problem: String,
    pub(super) fix: &'static str,
}
