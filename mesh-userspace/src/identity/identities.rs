//! The node's identities, which change while connections run.

use super::bundle::{Bundle, Root};
use super::files::BUNDLE_FILE;
use super::generation::Generation;
use super::locals::{Local, Locals};
use super::material::Material;
use super::status::{CertificateStatus, Issuance};
use super::{Certificate, IdentityError, certificate, name, tls};
use crate::model::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};

/// Requests to renew that wait at once.
const ROTATIONS: usize = 64;

/// The identities that this node holds, and TLS configurations for them. A cheap handle: clones share everything.
#[derive(Clone)]
pub struct Identities {
    shared: Arc<Shared>,
}

struct Shared {
    source: Source,
    trust_domain: TrustDomain,
    /// What is presented now; configurations read it at each handshake.
    locals: Arc<ArcSwap<Locals>>,
    current: ArcSwap<Generation>,
    /// One change at a time, so that an older one never replaces a newer one.
    changing: Mutex<()>,
    /// Sent to whenever `locals` or what is wanted has changed.
    changed: watch::Sender<()>,
}

/// Where certificates come from.
enum Source {
    Files(PathBuf),
    Authority {
        /// `None` until it is known.
        wanted: watch::Sender<Option<Arc<Wanted>>>,
        rotations: mpsc::Sender<Option<SpiffeId>>,
        issuance: ArcSwap<BTreeMap<SpiffeId, Issuance>>,
        bundle_version: AtomicU64,
    },
}

/// The identities that this node should have.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) ids: BTreeSet<SpiffeId>,
    /// Those that clients ask for.
    names: HashSet<String>,
}

/// What the holder of identities asks of the one who gets certificates for them.
#[derive(Debug)]
pub struct Orders {
    /// The identities that the node should have, once they are known.
    pub(super) wanted: watch::Receiver<Option<Arc<Wanted>>>,
    /// Renew one, or all, now.
    pub(super) rotations: mpsc::Receiver<Option<SpiffeId>>,
}

impl Identities {
    /// Reads `bundle.pem` and `ns/<namespace>/sa/<service account>/{cert,key}.pem` under `directory`.
    ///
    /// # Errors
    /// If anything there cannot be used; says which file and what to do. An expired certificate is only warned of.
    pub fn load(directory: &Path, trust_domain: &TrustDomain) -> Result<Self, IdentityError> {
        let Material { bundle, locals } = Material::read(directory, trust_domain, &tls::provider())?;
        let locals = Locals::default().updated_to(locals);
        Self::new(Source::Files(directory.to_owned()), trust_domain, bundle, locals)
    }

    /// No identity yet: those that are wanted come from a certificate authority, through an [`super::Issuer`]. The
    /// roots are those of `bundle.pem` under `directory`, until the authority says more.
    ///
    /// # Errors
    /// If the bundle cannot be used; says what to do.
    pub fn issued(directory: &Path, trust_domain: &TrustDomain) -> Result<(Self, Orders), IdentityError> {
        let bundle = Bundle::read(&directory.join(BUNDLE_FILE), trust_domain)?;
        let (wanted, wanted_receiver) = watch::channel(None);
        let (rotations, rotations_receiver) = mpsc::channel(ROTATIONS);
        let (issuance, bundle_version) = (ArcSwap::default(), AtomicU64::new(0));
        let source = Source::Authority { wanted, rotations, issuance, bundle_version };
        let identities = Self::new(source, trust_domain, bundle, Locals::default())?;
        Ok((identities, Orders { wanted: wanted_receiver, rotations: rotations_receiver }))
    }

    fn new(source: Source, trust_domain: &TrustDomain, bundle: Bundle, locals: Locals) -> Result<Self, IdentityError> {
        let locals = Arc::new(ArcSwap::from_pointee(locals));
        let generation = Generation::new(bundle, locals.clone(), trust_domain)?;
        Ok(Self {
            shared: Arc::new(Shared {
                source,
                trust_domain: trust_domain.clone(),
                locals,
                current: ArcSwap::from_pointee(generation),
                changing: Mutex::new(()),
                changed: watch::Sender::new(()),
            }),
        })
    }

    /// Reads the directory again. Handshakes from now on use what it says; established connections go on. Identities
    /// whose certificate is the same keep their sessions, unless the roots have changed. Certificates that come from
    /// an authority are left alone.
    ///
    /// # Errors
    /// As [`Self::load`]; everything stays as it was then.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let Source::Files(directory) = &self.shared.source else { return Ok(()) };
        self.change(|| {
            let material = Material::read(directory, &self.shared.trust_domain, &tls::provider())?;
            let generation = self.generation_for(material.bundle)?;
            self.replace_locals(|locals| locals.updated_to(material.locals));
            self.replace_generation(generation);
            Ok(())
        })
    }

    /// Whether this node can act as `id`.
    #[must_use]
    pub fn has(&self, id: &SpiffeId) -> bool {
        self.shared.locals.load().get(id).is_some()
    }

    /// Waits until this node can act as `id`, if it is about to: a workload that has just arrived speaks before its
    /// certificate has come. Says whether it can.
    pub async fn wait_for(&self, id: &SpiffeId, limit: Duration) -> bool {
        self.wait(limit, || self.has(id), |wanted| wanted.ids.contains(id)).await
    }

    /// [`Self::wait_for`] by the name that a client asks for.
    pub async fn wait_for_name(&self, server_name: &str, limit: Duration) -> bool {
        let is_there = || self.shared.locals.load().named(server_name).is_some();
        self.wait(limit, is_there, |wanted| wanted.names.contains(server_name)).await
    }

    async fn wait(&self, limit: Duration, is_there: impl Fn() -> bool, is_wanted: impl Fn(&Wanted) -> bool) -> bool {
        if is_there() {
            return true;
        }
        let Source::Authority { wanted, .. } = &self.shared.source else { return false };
        let mut changes = self.shared.changed.subscribe();
        let arrival = async {
            loop {
                if is_there() {
                    return true;
                }
                let is_coming = wanted.borrow().as_deref().is_some_and(&is_wanted);
                if !is_coming || changes.changed().await.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout(limit, arrival).await.unwrap_or(false)
    }

    /// Says which identities this node should have from now on: those of its workloads. Those that come from files are
    /// what is in the files.
    pub fn want(&self, ids: BTreeSet<SpiffeId>) {
        let Source::Authority { wanted, .. } = &self.shared.source else { return };
        if wanted.borrow().as_ref().is_some_and(|known| known.ids == ids) {
            return;
        }
        let names = ids.iter().map(name::label).collect();
        wanted.send_replace(Some(Arc::new(Wanted { ids, names })));
        self.shared.changed.send_replace(());
    }

    /// Has changed whenever identities have come or gone, or others are wanted.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }

    /// Asks for new certificates now, of one identity or of all; the number of identities concerned.
    ///
    /// # Errors
    /// If certificates come from files, the identity is not one of this node, or too many such requests wait.
    pub fn rotate(&self, only: Option<&SpiffeId>) -> Result<usize, IdentityError> {
        let Source::Authority { wanted, rotations, .. } = &self.shared.source else {
            let reason = "certificates come from files: issue them again and send the daemon SIGHUP";
            return Err(IdentityError::Refused(reason.to_owned()));
        };
        let wanted = wanted.borrow().clone();
        let ids = wanted.as_ref().map(|wanted| &wanted.ids);
        if let Some(id) = only.filter(|id| !ids.is_some_and(|ids| ids.contains(id))) {
            return Err(IdentityError::Refused(format!("no workload of this node has the identity {id}")));
        }
        rotations
            .try_send(only.cloned())
            .map_err(|_| IdentityError::Refused("too many requests wait: try again".to_owned()))?;
        Ok(only.map_or(ids.map_or(0, BTreeSet::len), |_| 1))
    }

    /// When the certificate that this node presents as `id` ends; `None` if it has none.
    #[must_use]
    pub fn expiry_of(&self, id: &SpiffeId) -> Option<OffsetDateTime> {
        self.shared.locals.load().get(id).map(|local| local.certificate.not_after)
    }

    /// The local identity that answers under a name ([`super::server_name`]): what a server has presented.
    #[must_use]
    pub fn identity_named(&self, server_name: &str) -> Option<SpiffeId> {
        self.shared.locals.load().named(server_name).map(|local| local.certificate.id.clone())
    }

    /// The configuration with which `source`, an identity of this node, dials `destination` and nobody else. Sessions
    /// are resumed within the pair only. Ask for every new connection: a new certificate of `source`, or new roots,
    /// make a new configuration.
    ///
    /// # Errors
    /// If this node has no certificate of `source`, or `destination` is of another trust domain.
    pub fn client_config(&self, source: &SpiffeId, destination: &SpiffeId) -> Result<Arc<ClientConfig>, IdentityError> {
        if destination.trust_domain() != self.shared.trust_domain.as_str() {
            return Err(IdentityError::Foreign {
                id: destination.clone(),
                trust_domain: self.shared.trust_domain.clone(),
            });
        }
        let local = self.shared.locals.load().get(source).cloned();
        let local = local.ok_or_else(|| IdentityError::Unknown(source.clone()))?;
        self.shared.current.load().client_config(&local, destination)
    }

    /// The configuration of every listener: the certificate is picked by the asked name, a client certificate of the
    /// trust domain is demanded. Ask for every accepted connection: new roots make a new one (the same `Arc` is
    /// returned until then, whatever certificates come and go).
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.shared.current.load().server.clone()
    }

    /// The certificates of this node's identities, in the order of their SPIFFE IDs.
    #[must_use]
    pub fn certificates(&self) -> Vec<Certificate> {
        self.shared.locals.load().iter().map(|local| local.certificate.clone()).collect()
    }

    /// Every identity that this node has or should have, in the order of their SPIFFE IDs.
    #[must_use]
    pub fn status(&self) -> Vec<CertificateStatus> {
        let locals = self.shared.locals.load();
        let held = |id: &SpiffeId| locals.get(id).map(|local| local.certificate.clone());
        match &self.shared.source {
            Source::Files(_) => {
                let now = OffsetDateTime::now_utc();
                locals.iter().map(|local| CertificateStatus::of_file(local.certificate.clone(), now)).collect()
            }
            Source::Authority { wanted, issuance, .. } => {
                let (wanted, issuance) = (wanted.borrow().clone(), issuance.load());
                let status = |id: &SpiffeId| CertificateStatus {
                    id: id.clone(),
                    certificate: held(id),
                    source: "ca",
                    issuance: issuance.get(id).cloned().unwrap_or_default(),
                };
                wanted.iter().flat_map(|wanted| &wanted.ids).map(status).collect()
            }
        }
    }

    /// The chain that this node presents as `id`, leaf first.
    #[must_use]
    pub fn chain(&self, id: &SpiffeId) -> Option<Vec<CertificateDer<'static>>> {
        self.shared.locals.load().get(id).map(|local| local.key.cert.clone())
    }

    /// The roots that are trusted, and the version that the authority gives to the bundle (0 for files).
    #[must_use]
    pub fn bundle(&self) -> (Vec<Root>, u64) {
        let version = match &self.shared.source {
            Source::Files(_) => 0,
            Source::Authority { bundle_version, .. } => bundle_version.load(Ordering::Relaxed),
        };
        let certificates = self.shared.current.load().bundle.certificates.clone();
        (certificates.iter().filter_map(|root| certificate::root(root).ok()).collect(), version)
    }

    pub(super) fn roots(&self) -> Arc<rustls::RootCertStore> {
        self.shared.current.load().bundle.roots.clone()
    }

    /// Presents these certificates from now on, in place of older ones of the same identities.
    pub(super) fn put(&self, locals: Vec<Local>) {
        self.change(|| {
            self.replace_locals(|present| {
                let mut next = present.clone();
                locals.into_iter().for_each(|local| next.insert(Arc::new(local)));
                next
            });
        });
    }

    /// Forgets identities with their keys and sessions. Established connections go on.
    pub(super) fn remove(&self, ids: &[SpiffeId]) {
        self.change(|| {
            self.replace_locals(|locals| {
                let mut next = locals.clone();
                ids.iter().for_each(|id| next.remove(id));
                next
            });
        });
    }

    /// Trusts these roots from now on, and no others. Says whether they are others than before.
    ///
    /// # Errors
    /// If the roots cannot be used; nothing has changed then.
    pub(super) fn trust(&self, roots: Vec<CertificateDer<'static>>, version: u64) -> Result<bool, IdentityError> {
        let bundle = Bundle::new(roots, &self.shared.trust_domain)
            .map_err(|unusable| IdentityError::Refused(format!("the bundle cannot be used: {}", unusable.problem)))?;
        let is_new = self.change(|| {
            let generation = self.generation_for(bundle)?;
            let is_new = generation.is_some();
            self.replace_generation(generation);
            Ok::<_, IdentityError>(is_new)
        })?;
        if let Source::Authority { bundle_version, .. } = &self.shared.source {
            bundle_version.store(version, Ordering::Relaxed);
        }
        Ok(is_new)
    }

    /// Identities whose certificate does not come from a root that is trusted now.
    pub(super) fn orphans(&self, now: OffsetDateTime) -> Vec<SpiffeId> {
        let (roots, provider) = (self.roots(), tls::provider());
        let is_orphan = |local: &&Arc<Local>| {
            let at = now.min(local.certificate.not_after);
            certificate::check_chain(&local.key.cert, &roots, at, &provider).is_err()
        };
        self.shared.locals.load().iter().filter(is_orphan).map(|local| local.certificate.id.clone()).collect()
    }

    /// Shows how issuance is doing.
    pub(super) fn report(&self, states: BTreeMap<SpiffeId, Issuance>) {
        if let Source::Authority { issuance, .. } = &self.shared.source {
            issuance.store(Arc::new(states));
        }
    }

    fn change<T>(&self, change: impl FnOnce() -> T) -> T {
        // The guarded value is (), which no panic can leave half-changed.
        let _one_at_a_time = self.shared.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = change();
        self.shared.changed.send_replace(());
        outcome
    }

    fn replace_locals(&self, next: impl FnOnce(&Locals) -> Locals) {
        let locals = self.shared.locals.load_full();
        let next = Arc::new(next(&locals));
        self.shared.locals.store(next.clone());
        self.shared.current.load().retain(&next);
    }

    /// Configurations for a bundle, unless it is the present one.
    fn generation_for(&self, bundle: Bundle) -> Result<Option<Generation>, IdentityError> {
        let shared = &self.shared;
        let is_new = !shared.current.load().bundle.is_same(&bundle);
        is_new.then(|| Generation::new(bundle, shared.locals.clone(), &shared.trust_domain)).transpose()
    }

    fn replace_generation(&self, generation: Option<Generation>) {
        if let Some(generation) = generation {
            self.shared.current.store(Arc::new(generation));
        }
    }
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identities").field("trust_domain", &self.shared.trust_domain).finish_non_exhaustive()
    }
}
