//! The node's identities, reloadable while connections run.

use super::material::Material;
use super::{Certificate, IdentityError, tls};
use crate::model::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig};
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use time::OffsetDateTime;

/// Client configurations kept at once; beyond it the least recently used goes, and with it its sessions.
const CLIENT_CONFIGS: usize = 4096;

/// The identities that this node holds, and TLS configurations for them. A cheap handle: clones share everything.
#[derive(Clone)]
pub struct Identities {
    shared: Arc<Shared>,
}

struct Shared {
    directory: PathBuf,
    trust_domain: TrustDomain,
    current: ArcSwap<Generation>,
    /// One reload at a time, so that an older reading never replaces a newer one.
    reloading: Mutex<()>,
}

/// What one reading of the directory gave. Configurations and sessions belong to it: what a reload takes back (a root,
/// an identity) cannot be reached by resuming an older session.
struct Generation {
    material: Arc<Material>,
    server: Arc<ServerConfig>,
    clients: Mutex<Clients>,
}

type Pair = (SpiffeId, SpiffeId);

#[derive(Default)]
struct Clients {
    configs: HashMap<Pair, (u64, Arc<ClientConfig>)>,
    /// Counts uses; tells which configuration has been idle longest.
    clock: u64,
}

impl Identities {
    /// Reads `bundle.pem` and `ns/<namespace>/sa/<service account>/{cert,key}.pem` under `directory`.
    ///
    /// # Errors
    /// If anything there cannot be used; says which file and what to do. An expired certificate is only warned of.
    pub fn load(directory: &Path, trust_domain: &TrustDomain) -> Result<Self, IdentityError> {
        let material = Arc::new(Material::read(directory, trust_domain, &tls::provider())?);
        let generation = Generation::new(material, trust_domain)?;
        Ok(Self {
            shared: Arc::new(Shared {
                directory: directory.to_owned(),
                trust_domain: trust_domain.clone(),
                current: ArcSwap::from_pointee(generation),
                reloading: Mutex::new(()),
            }),
        })
    }

    /// Reads the directory again. Handshakes from now on use what it says; established connections go on. Does
    /// nothing if nothing has changed.
    ///
    /// # Errors
    /// As [`Self::load`]; everything stays as it was then.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let shared = &self.shared;
        // The guarded value is (), which no panic can leave half-changed.
        let _one_at_a_time = shared.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let material = Arc::new(Material::read(&shared.directory, &shared.trust_domain, &tls::provider())?);
        if !material.is_same(&shared.current.load().material) {
            shared.current.store(Arc::new(Generation::new(material, &shared.trust_domain)?));
        }
        Ok(())
    }

    /// Whether this node can act as `id`.
    #[must_use]
    pub fn has(&self, id: &SpiffeId) -> bool {
        self.shared.current.load().material.locals.contains_key(id)
    }

    /// When the certificate that this node presents as `id` ends; `None` if it has none.
    #[must_use]
    pub fn expiry_of(&self, id: &SpiffeId) -> Option<OffsetDateTime> {
        self.shared.current.load().material.locals.get(id).map(|local| local.certificate.not_after)
    }

    /// The local identity that answers under a name ([`super::server_name`]): what a server has presented.
    #[must_use]
    pub fn identity_named(&self, server_name: &str) -> Option<SpiffeId> {
        self.shared.current.load().material.names.get(server_name).cloned()
    }

    /// The configuration with which `source`, an identity of this node, dials `destination` and nobody else. Sessions
    /// are resumed within the pair only. Ask for every new connection: a reload makes new configurations.
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
        self.shared.current.load().client_config(source, destination)
    }

    /// The configuration of every listener: the certificate is picked by the asked name, a client certificate of the
    /// trust domain is demanded. Ask for every accepted connection: a reload makes a new one (the same `Arc` is
    /// returned until then).
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.shared.current.load().server.clone()
    }

    /// The certificates of this node's identities, in the order of their SPIFFE IDs.
    #[must_use]
    pub fn certificates(&self) -> Vec<Certificate> {
        self.shared.current.load().material.locals.values().map(|local| local.certificate.clone()).collect()
    }
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identities").field("directory", &self.shared.directory).finish_non_exhaustive()
    }
}

impl Generation {
    fn new(material: Arc<Material>, trust_domain: &TrustDomain) -> Result<Self, IdentityError> {
        let server = tls::server_config(&material, trust_domain)?;
        Ok(Self { material, server, clients: Mutex::default() })
    }

    fn client_config(&self, source: &SpiffeId, destination: &SpiffeId) -> Result<Arc<ClientConfig>, IdentityError> {
        // Each change to the cache is one insert or remove: after a panic it is still a cache.
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = (source.clone(), destination.clone());
        clients.clock += 1;
        let now = clients.clock;
        if let Some((used, config)) = clients.configs.get_mut(&pair) {
            *used = now;
            return Ok(config.clone());
        }
        let config = tls::client_config(&self.material, source, destination)?;
        if clients.configs.len() >= CLIENT_CONFIGS {
            let idlest = clients.configs.iter().min_by_key(|(_, (used, _))| *used).map(|(pair, _)| pair.clone());
            idlest.and_then(|pair| clients.configs.remove(&pair));
        }
        clients.configs.insert(pair, (now, config.clone()));
        Ok(config)
    }
}
