//! TLS configurations that rest on one bundle.

use super::bundle::Bundle;
use super::locals::{Local, Locals};
use super::{IdentityError, tls};
use crate::model::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Client configurations kept at once; beyond it the least recently used goes, and with it its sessions.
const CLIENT_CONFIGS: usize = 4096;

/// Configurations and sessions belong to one bundle: a root that is taken back cannot be reached by resuming an older
/// session. Certificates come and go within it.
pub(super) struct Generation {
    pub(super) bundle: Bundle,
    pub(super) server: Arc<ServerConfig>,
    clients: Mutex<Clients>,
}

type Pair = (SpiffeId, SpiffeId);

#[derive(Default)]
struct Clients {
    configs: HashMap<Pair, Made>,
    /// Counts uses; tells which configuration has been idle longest.
    clock: u64,
}

struct Made {
    used: u64,
    /// The certificate of the source that it presents: [`Local::number`].
    certificate: u64,
    config: Arc<ClientConfig>,
}

impl Generation {
    pub(super) fn new(
        bundle: Bundle,
        locals: Arc<ArcSwap<Locals>>,
        trust_domain: &TrustDomain,
    ) -> Result<Self, IdentityError> {
        let server = tls::server_config(&bundle.roots, locals, trust_domain)?;
        Ok(Self { bundle, server, clients: Mutex::default() })
    }

    pub(super) fn client_config(
        &self,
        source: &Local,
        destination: &SpiffeId,
    ) -> Result<Arc<ClientConfig>, IdentityError> {
        let mut clients = self.clients();
        let pair = (source.certificate.id.clone(), destination.clone());
        clients.clock += 1;
        let now = clients.clock;
        if let Some(made) = clients.configs.get_mut(&pair).filter(|made| made.certificate == source.number) {
            made.used = now;
            return Ok(made.config.clone());
        }
        let config = tls::client_config(&self.bundle.roots, source, destination)?;
        if clients.configs.len() >= CLIENT_CONFIGS && !clients.configs.contains_key(&pair) {
            let idlest = clients.configs.iter().min_by_key(|(_, made)| made.used).map(|(pair, _)| pair.clone());
            idlest.and_then(|pair| clients.configs.remove(&pair));
        }
        clients.configs.insert(pair, Made { used: now, certificate: source.number, config: config.clone() });
        Ok(config)
    }

    /// Lets go of what presents certificates that `locals` does not hold.
    pub(super) fn retain(&self, locals: &Locals) {
        self.clients()
            .configs
            .retain(|(source, _), made| locals.get(source).is_some_and(|local| local.number == made.certificate));
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        // Each change to the cache is one insert or remove: after a panic it is still a cache.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
