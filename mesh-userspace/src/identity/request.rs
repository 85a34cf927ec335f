//! A key, the request for a certificate of it, and what is checked before that certificate is used.

use super::files::Key;
use super::locals::Local;
use super::source::{SignedChain, SigningRequest, SourceError};
use super::{Certificate, IdentityError, certificate, tls};
use crate::model::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData as _, SanType};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{Error, RootCertStore};
use rustls_pki_types::CertificateDer;
use std::fmt::Display;
use std::sync::Arc;
use time::OffsetDateTime;
use zeroize::Zeroize as _;

/// Longer chains are not looked at: a root, an intermediate and some for authorities of others.
const LONGEST_CHAIN: usize = 8;
/// A workload's certificate that lives longer than this is a mistake.
const LONGEST_LIFE: time::Duration = time::Duration::days(366);

/// A fresh P-256 key that waits for its certificate.
pub(super) struct Request {
    id: SpiffeId,
    key: FreshKey,
}

/// The generator's form of a key. It is wiped here; what aws-lc holds is wiped when it frees it (`OPENSSL_free` clears
/// all memory that it gives back).
struct FreshKey(KeyPair);

impl Drop for FreshKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Request {
    /// Makes a key, and the request to be sent.
    ///
    /// # Errors
    /// If the crypto library fails.
    pub(super) fn new(id: &SpiffeId) -> Result<(Self, SigningRequest), IdentityError> {
        let key = FreshKey(KeyPair::generate()?);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        let csr = params.serialize_request(&key.0)?.der().to_vec();
        Ok((Self { id: id.clone(), key }, SigningRequest { id: id.clone(), csr }))
    }

    /// The identity with the certificate that came back, if it is what was asked for.
    ///
    /// # Errors
    /// `Invalid` unless it leads to a trusted root, for both ends of a connection, and names exactly this identity and
    /// key, and is valid now.
    pub(super) fn accept(
        self,
        SignedChain(chain): SignedChain,
        roots: &Arc<RootCertStore>,
        now: OffsetDateTime,
    ) -> Result<Local, SourceError> {
        let invalid =
            |problem: &dyn Display| SourceError::Invalid(format!("the certificate of {}: {problem}", self.id));
        let leaf = chain.first().ok_or_else(|| invalid(&"the chain is empty"))?;
        if chain.len() > LONGEST_CHAIN {
            return Err(invalid(&format!("the chain has {} certificates", chain.len())));
        }
        let certificate = Certificate::parse(leaf).map_err(|refusal| invalid(&refusal))?;
        if certificate.id != self.id {
            return Err(invalid(&format!("it is of {}", certificate.id)));
        }
        if !certificate::has_public_key(leaf, &self.key.0.subject_public_key_info()) {
            return Err(invalid(&"it is of another key"));
        }
        certificate.check_time(now).map_err(|refusal| invalid(&format!("{refusal}; compare the clocks")))?;
        if certificate.not_after - certificate.not_before > LONGEST_LIFE {
            return Err(invalid(&"it lives longer than a year"));
        }
        check_usable(&chain, roots, now).map_err(|error| invalid(&error))?;
        let der = Key::from_pkcs8(self.key.0.serialize_der());
        let signing = any_supported_type(der.der()).map_err(|error| invalid(&error))?;
        Ok(Local::new(Arc::new(CertifiedKey::new(chain, signing)), certificate))
    }
}

/// Whether peers can believe it, as a server's certificate and as a client's.
fn check_usable(chain: &[CertificateDer<'_>], roots: &Arc<RootCertStore>, now: OffsetDateTime) -> Result<(), Error> {
    certificate::check_chain(chain, roots, now, &tls::provider())?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), tls::provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    verifier.verify_client_cert(leaf, intermediates, certificate::unix_time(now)?).map(|_| ())
}
