//! The identities that this node holds at one moment.

use super::{Certificate, name};
use crate::model::SpiffeId;
use rustls::sign::CertifiedKey;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One identity of this node, with one certificate.
#[derive(Debug)]
pub(super) struct Local {
    /// Dropping the last clone drops the key: aws-lc wipes what it frees.
    pub(super) key: Arc<CertifiedKey>,
    pub(super) certificate: Certificate,
    /// Another one for each certificate, also if an identity goes and comes back: what rests on this certificate is
    /// told apart by it.
    pub(super) number: u64,
}

impl Local {
    pub(super) fn new(key: Arc<CertifiedKey>, certificate: Certificate) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { key, certificate, number: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

/// All of them. A change makes a new set.
#[derive(Clone, Debug, Default)]
pub(super) struct Locals {
    by_id: BTreeMap<SpiffeId, Arc<Local>>,
    /// By the name that clients ask for.
    by_name: HashMap<Box<str>, Arc<Local>>,
}

impl Locals {
    pub(super) fn get(&self, id: &SpiffeId) -> Option<&Arc<Local>> {
        self.by_id.get(id)
    }

    pub(super) fn named(&self, server_name: &str) -> Option<&Arc<Local>> {
        self.by_name.get(server_name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Local>> {
        self.by_id.values()
    }

    pub(super) fn insert(&mut self, local: Arc<Local>) {
        let id = local.certificate.id.clone();
        self.by_name.insert(name::label(&id).into(), local.clone());
        self.by_id.insert(id, local);
    }

    pub(super) fn remove(&mut self, id: &SpiffeId) {
        if self.by_id.remove(id).is_some() {
            self.by_name.remove(name::label(id).as_str());
        }
    }

    /// These identities and no others; where the certificate is the same, what is here stays.
    pub(super) fn updated_to(&self, new: impl IntoIterator<Item = Local>) -> Self {
        let mut updated = Self::default();
        for local in new {
            let known = self.get(&local.certificate.id).filter(|known| known.key.cert == local.key.cert);
            updated.insert(known.cloned().unwrap_or_else(|| Arc::new(local)));
        }
        updated
    }
}
