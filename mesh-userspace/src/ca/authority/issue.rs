//! Making an authority, and certificates in files.

use super::{Authority, check_life};
use crate::ca::certificate::{self, BACK_DATED, MAX_TTL, Profile, Validity};
use crate::ca::key::Key;
use crate::ca::records::State;
use crate::ca::rotation::{Phase, seconds};
use crate::ca::store::{FORMAT, Store};
use crate::ca::{CaError, Reason, Refusal};
use crate::identity::{Certificate, IdentityError, SignedChain, files, pem};
use crate::model::{ObjectName, SpiffeId, TrustDomain};
use rustls_pki_types::CertificateDer;
use std::path::Path;
use std::time::Duration;
use time::OffsetDateTime;
use zeroize::Zeroizing;

/// Makes an authority for `trust_domain` in `directory`: a root, and an intermediate that signs.
///
/// # Errors
/// If an authority is there already, which is never overwritten, or the files cannot be written.
pub fn init(directory: &Path, trust_domain: &TrustDomain) -> Result<(), CaError> {
    let now = OffsetDateTime::now_utc();
    let root = certificate::root(trust_domain, now)?;
    let store = Store::create(directory)?;
    store.write(|change| {
        let mut state = State {
            format: FORMAT,
            trust_domain: trust_domain.to_string(),
            next: 0,
            version: 1,
            epoch: 0,
            root: 0,
            longest_leaf: 0,
            phase: Phase::Steady,
        };
        state.root = super::turn::add_root(change, &mut state, &root, now)?;
        super::turn::add_intermediate(change, &mut state, trust_domain, &root, now)?;
        change.put_state(&state)
    })?;
    drop(store);
    // Written by opening: the copy of the roots.
    Authority::open(directory).map(drop)
}

/// Issues a certificate to a service account, valid for `ttl` from now, and stores it with its key and the roots in
/// the identity directory `out`.
///
/// # Errors
/// If the authority cannot be used, `ttl` is less than a second or longer than [`MAX_TTL`], or the files cannot be
/// written.
pub fn issue(directory: &Path, account: &ObjectName, ttl: Duration, out: &Path) -> Result<Certificate, CaError> {
    check_life(ttl)?;
    let authority = Authority::open(directory)?;
    let id = SpiffeId::for_service_account(authority.trust_domain(), account)
        .map_err(|error| Refusal::new(Reason::ForeignIdentity, error.to_string()))?;
    let issued = authority.sign(&id, Validity::starting_now(ttl)?)?;
    authority.add_to_bundle(out)?;
    issued.store(out)?;
    Ok(issued.certificate)
}

impl Authority {
    /// Makes a key and a certificate of it. The certificate ends with its issuer at the latest.
    ///
    /// # Errors
    /// If `id` is of another trust domain, or `validity` is empty, longer than [`MAX_TTL`] or after the issuer's end.
    pub fn sign(&self, id: &SpiffeId, validity: Validity) -> Result<Issued, CaError> {
        if id.trust_domain() != self.trust_domain.as_str() {
            let (id, trust_domain) = (id.clone(), self.trust_domain.clone());
            return Err(IdentityError::Foreign { id, trust_domain }.into());
        }
        let life = validity.not_after - validity.not_before;
        if life > MAX_TTL + BACK_DATED {
            let days = MAX_TTL.as_secs() / (24 * 60 * 60);
            let message = format!("a certificate's life may not be longer than {days} days");
            return Err(Refusal::new(Reason::Lifetime, message).into());
        }
        let longest = Duration::try_from(life).unwrap_or_default();
        let key = Key::generate()?;
        let chain = self.sign_leaf(Profile::Workload, id.as_str(), &key, validity)?;
        self.remember_life(seconds(longest))?;
        let certificate =
            Certificate::parse(&chain.0[0]).map_err(|refusal| Refusal::new(Reason::Internal, refusal.to_string()))?;
        Ok(Issued { certificate, chain, key_pem: key.to_pem() })
    }

    /// Makes sure that the bundle of the identity directory `out` holds these roots; roots already there stay.
    ///
    /// # Errors
    /// If the bundle cannot be read or written.
    pub fn add_to_bundle(&self, out: &Path) -> Result<(), CaError> {
        files::make_directory(out)?;
        let path = out.join(files::BUNDLE_FILE);
        let text = files::read_text(&path)?;
        let mut roots =
            if text.is_empty() { Vec::new() } else { files::read_certificates(&path, "remove it, and issue again")? };
        let known = roots.len();
        for root in self.bundle().roots {
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
        if roots.len() > known {
            files::write(&path, pem(&roots).as_bytes(), files::PUBLIC)?;
        }
        Ok(())
    }
}

/// A certificate fresh from the authority, with its key.
pub struct Issued {
    pub certificate: Certificate,
    chain: SignedChain,
    key_pem: Zeroizing<String>,
}

impl Issued {
    /// The leaf, and the intermediate that signed it.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain.0
    }

    /// The key, PKCS #8 in PEM.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Writes `ns/<namespace>/sa/<service account>/{cert,key}.pem` under the identity directory `out`, replacing older
    /// ones.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn store(&self, out: &Path) -> Result<(), CaError> {
        let id = &self.certificate.id;
        let directory = out.join("ns").join(id.namespace()).join("sa").join(id.service_account());
        files::make_directory(&directory)?;
        files::write(&directory.join(files::KEY_FILE), self.key_pem.as_bytes(), files::PRIVATE)?;
        files::write(&directory.join(files::CERTIFICATE_FILE), pem(&self.chain.0).as_bytes(), files::PUBLIC)?;
        Ok(())
    }
}
