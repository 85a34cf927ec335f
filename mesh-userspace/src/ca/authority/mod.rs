//! The authority itself: what is stored, the keys that sign, and the operations on both. It knows nothing of sockets.

mod issue;
mod nodes;
mod status;
mod tokens;
mod turn;

pub use issue::{Issued, init, issue};
pub use nodes::Joined;
pub use status::{IssuerStatus, NodeStatus, RotationStatus, Status, TokenStatus};
pub use tokens::{DEFAULT_TOKEN_TTL, MAX_TOKEN_TTL, NewToken};
pub use turn::Rotate;

use super::certificate::{self, DEFAULT_NODE_TTL, DEFAULT_TTL, MAX_TTL, Profile, Validity};
use super::digest::{Digest, sha256};
use super::key::Key;
use super::records::{IssuerRecord, State};
use super::rotation::Lives;
use super::store::{Store, Tables, View};
use super::{CaError, Reason, Refusal};
use crate::identity::{SignedChain, TrustBundle, files, pem};
use crate::model::TrustDomain;
use arc_swap::ArcSwap;
use rcgen::{Issuer, PublicKeyData};
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A copy of the present roots beside the store, for people and for tools; never read.
const ROOTS_FILE: &str = "ca.pem";

/// A certificate authority that is ready to sign. Methods that change something wait for the disk: call them where
/// blocking is allowed.
pub struct Authority {
    directory: PathBuf,
    trust_domain: TrustDomain,
    lives: Lives,
    store: Store,
    live: ArcSwap<Live>,
}

/// What signing and answering need, as the store has it. Made anew after each change of issuers.
pub(super) struct Live {
    state: State,
    roots: Vec<Root>,
    signers: Vec<Signer>,
}

struct Root {
    number: u64,
    certificate: CertificateDer<'static>,
    /// Of its public key: how tokens and clients name it.
    digest: Digest,
}

/// An intermediate that signs.
pub(super) struct Signer {
    root: u64,
    pub(super) root_certificate: CertificateDer<'static>,
    /// Of the root's public key.
    pub(super) root_digest: Digest,
    certificate: CertificateDer<'static>,
    until: OffsetDateTime,
    issuer: Issuer<'static, Key>,
}

impl Authority {
    /// Opens the authority that [`init`] made, for leaves that live for the default times.
    ///
    /// # Errors
    /// If there is none, another process has it open, or it cannot be used.
    pub fn open(directory: &Path) -> Result<Self, CaError> {
        Self::open_with(directory, Lives { workload: DEFAULT_TTL, node: DEFAULT_NODE_TTL }, OffsetDateTime::now_utc())
    }

    /// Opens the authority for leaves that live for `lives`; whatever is due by now is done.
    ///
    /// # Errors
    /// As [`Self::open`]; if a life is shorter than a second or longer than [`MAX_TTL`].
    pub fn open_with(directory: &Path, lives: Lives, now: OffsetDateTime) -> Result<Self, CaError> {
        check_life(lives.workload)?;
        check_life(lives.node)?;
        let store = Store::open(directory)?;
        let live = store.read(Live::read)?;
        let trust_domain = TrustDomain::parse(&live.state.trust_domain)
            .map_err(|error| CaError::store(store.path(), error, "restore the directory from a backup"))?;
        let live = ArcSwap::from_pointee(live);
        let authority = Self { directory: directory.to_owned(), trust_domain, lives, store, live };
        authority.tick(now)?;
        authority.export_roots()?;
        Ok(authority)
    }

    /// The trust domain that it was made for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// How long its certificates live.
    #[must_use]
    pub fn lives(&self) -> Lives {
        self.lives
    }

    /// The roots that nodes should trust now.
    #[must_use]
    pub fn bundle(&self) -> TrustBundle {
        self.live().bundle()
    }

    pub(super) fn live(&self) -> arc_swap::Guard<Arc<Live>> {
        self.live.load()
    }

    /// A leaf below the root that signs now. It ends with its issuer at the latest.
    pub(super) fn sign_leaf(
        &self,
        profile: Profile,
        uri: &str,
        key: &impl PublicKeyData,
        validity: Validity,
    ) -> Result<SignedChain, CaError> {
        let live = self.live();
        live.active()?.leaf(profile, uri, key, validity)
    }

    /// Reads the issuers anew, after a change of them.
    fn refresh(&self) -> Result<(), CaError> {
        self.reread()?;
        self.export_roots()
    }

    /// Notes that leaves of these lives are signed from now on: whoever serves says so first.
    pub(super) fn remember_lives(&self) -> Result<(), CaError> {
        self.remember_life(self.lives.longest())
    }

    /// A leaf of this life is signed: the next change of the root waits for the longest of them.
    fn remember_life(&self, longest: i64) -> Result<(), CaError> {
        if self.live().state.longest_leaf >= longest {
            return Ok(());
        }
        self.store.write(|change| {
            let mut state = change.state()?;
            state.longest_leaf = state.longest_leaf.max(longest);
            change.put_state(&state)
        })?;
        self.reread()
    }

    /// Reads the store anew, where the roots are as they were.
    fn reread(&self) -> Result<(), CaError> {
        self.live.store(Arc::new(self.store.read(Live::read)?));
        Ok(())
    }

    fn export_roots(&self) -> Result<(), CaError> {
        let path = self.directory.join(ROOTS_FILE);
        let text = pem(&self.bundle().roots);
        if files::read_text(&path)? != text {
            files::write(&path, text.as_bytes(), files::PUBLIC)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Live {
    fn read<T: Tables>(view: &View<'_, T>) -> Result<Self, CaError> {
        let state = view.state()?;
        let issuers = view.issuers()?;
        let roots: Vec<Root> =
            issuers.iter().filter(|issuer| issuer.is_root()).map(Root::of).collect::<Result<_, _>>()?;
        let signing = issuers.iter().filter(|issuer| !issuer.is_root() && issuer.signs);
        let signers = signing.map(|issuer| Signer::read(view, issuer, &roots)).collect::<Result<_, _>>()?;
        Ok(Self { state, roots, signers })
    }

    pub(super) fn bundle(&self) -> TrustBundle {
        TrustBundle {
            roots: self.roots.iter().map(|root| root.certificate.clone()).collect(),
            version: self.state.version,
            epoch: self.state.epoch,
        }
    }

    /// One for each root below which anything was signed.
    pub(super) fn signers(&self) -> &[Signer] {
        &self.signers
    }

    /// Below the root that signs now.
    pub(super) fn active(&self) -> Result<&Signer, CaError> {
        let active = self.signers.iter().find(|signer| signer.root == self.state.root);
        active.ok_or_else(|| Refusal::new(Reason::Internal, "no intermediate certificate signs").into())
    }
}

impl Root {
    fn of(record: &IssuerRecord) -> Result<Self, CaError> {
        let certificate = CertificateDer::from(record.certificate.clone());
        let digest = public_key_digest(&certificate).ok_or_else(|| broken(record))?;
        Ok(Self { number: record.number, certificate, digest })
    }
}

impl Signer {
    fn read<T: Tables>(view: &View<'_, T>, record: &IssuerRecord, roots: &[Root]) -> Result<Self, CaError> {
        let key = view.key(record.number)?.ok_or_else(|| broken(record))?;
        let root = roots.iter().find(|root| root.number == record.root).ok_or_else(|| broken(record))?;
        let certificate = CertificateDer::from(record.certificate.clone());
        let issuer = Issuer::from_ca_cert_der(&certificate, Key::from_der(&key)?)?;
        let until = Validity::of(&certificate).ok_or_else(|| broken(record))?.not_after;
        let (root_certificate, root_digest) = (root.certificate.clone(), root.digest);
        Ok(Self { root: root.number, root_certificate, root_digest, certificate, until, issuer })
    }

    /// Leaf and intermediate.
    pub(super) fn leaf(
        &self,
        profile: Profile,
        uri: &str,
        key: &impl PublicKeyData,
        validity: Validity,
    ) -> Result<SignedChain, CaError> {
        let validity = Validity { not_after: validity.not_after.min(self.until), ..validity };
        if validity.not_before >= validity.not_after {
            return Err(Refusal::new(Reason::Lifetime, "no certificate is made that would never be valid").into());
        }
        let leaf = certificate::leaf(profile, uri, key, validity, &self.issuer)?;
        Ok(SignedChain(vec![leaf, self.certificate.clone()]))
    }
}

fn broken(record: &IssuerRecord) -> CaError {
    Refusal::new(
        Reason::Internal,
        format!("the store's issuer {} is incomplete: restore it from a backup", record.number),
    )
    .into()
}

fn check_life(life: Duration) -> Result<(), Refusal> {
    if life >= Duration::from_secs(1) && life <= MAX_TTL {
        return Ok(());
    }
    let days = MAX_TTL.as_secs() / (24 * 60 * 60);
    Err(Refusal::new(Reason::Lifetime, format!("a certificate's life must be between 1 s and {days} days")))
}

/// The hash of a certificate's public key (SubjectPublicKeyInfo).
pub(super) fn public_key_digest(certificate: &CertificateDer<'_>) -> Option<Digest> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(sha256(parsed.public_key().raw))
}
