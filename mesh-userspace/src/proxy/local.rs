//! The workloads of this node that are armed: reachable through their network namespaces.

use crate::engine::Snapshot;
use crate::model::Workload;
use crate::netns::Namespace;
use arc_swap::ArcSwap;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// One armed workload. Its namespace stays open for as long as this lives, so whoever holds it must let go when
/// `removed` is cancelled.
pub struct LocalWorkload {
    pub workload: Arc<Workload>,
    pub namespace: Namespace,
    pub removed: CancellationToken,
}

impl LocalWorkload {
    /// The workload as the catalog has it now: what does not need arming anew, such as the name that metrics show it
    /// under, may have changed since.
    #[must_use]
    pub fn current<'a>(&'a self, snapshot: &'a Snapshot) -> &'a Workload {
        self.known(snapshot).unwrap_or(&self.workload)
    }

    /// [`Self::current`], if the catalog still has it.
    #[must_use]
    pub fn known<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a Workload> {
        snapshot.workload(&self.workload.name).filter(|known| known.uid == self.workload.uid).map(Arc::as_ref)
    }
}

/// Armed workloads by address: read per connection, replaced by the reconciler alone.
#[derive(Clone, Default)]
pub struct LocalWorkloads(Arc<ArcSwap<HashMap<IpAddr, Arc<LocalWorkload>>>>);

impl LocalWorkloads {
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<Arc<LocalWorkload>> {
        self.0.load().get(&address).cloned()
    }

    /// Every armed workload once.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<LocalWorkload>> {
        let mut all: Vec<_> = self.0.load().values().cloned().collect();
        all.sort_unstable_by_key(Arc::as_ptr);
        all.dedup_by(|a, b| Arc::ptr_eq(a, b));
        all
    }

    /// Adds a workload under all its addresses.
    pub fn insert(&self, local: &Arc<LocalWorkload>) {
        let mut next = HashMap::clone(&self.0.load());
        for address in &local.workload.addresses {
            next.insert(*address, local.clone());
        }
        self.0.store(Arc::new(next));
    }

    /// Removes exactly this incarnation of a workload.
    pub fn remove(&self, local: &Arc<LocalWorkload>) {
        let mut next = HashMap::clone(&self.0.load());
        next.retain(|_, other| !Arc::ptr_eq(other, local));
        self.0.store(Arc::new(next));
    }
}
