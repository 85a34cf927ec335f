//! The workloads of this node that are armed: reachable through their network namespaces.

use crate::engine::Snapshot;
use crate::model::Workload;
use crate::netns::{AliasRange, Namespace};
use crate::runtime::Cancellation;
use arc_swap::ArcSwap;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// One armed workload. Its namespace stays open for as long as this lives, so whoever holds it must let go when
/// `removed` is cancelled.
pub struct LocalWorkload {
    pub workload: Arc<Workload>,
    /// The node's own, of workloads there; they share it.
    pub namespace: Arc<Namespace>,
    /// Where its datagrams are redirected to; none of workloads in the node's own namespace, and of those whose UDP is
    /// not captured.
    pub aliases: Vec<AliasRange>,
    pub removed: Cancellation,
}

impl LocalWorkload {
    /// The workload as the catalog has it now: what does not need arming anew, such as the name that metrics show it
    /// under, may have changed since.
    #[must_use]
    pub fn current<'a>(&'a self, snapshot: &'a Snapshot) -> &'a Workload {
        self.known(snapshot).unwrap_or(&self.workload)
    }

    /// The address from which the daemon reaches the application for a caller: the caller's, except in the node's own
    /// namespace, whose routing would have to be changed for the answers.
    #[must_use]
    pub fn delivers_from(&self, caller: IpAddr, destination: IpAddr) -> IpAddr {
        if self.workload.is_host_network() { destination } else { caller }
    }

    /// [`Self::current`], if the catalog still has it.
    #[must_use]
    pub fn known<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a Workload> {
        snapshot.workload(&self.workload.name).filter(|known| known.uid == self.workload.uid).map(Arc::as_ref)
    }
}

/// Armed workloads: read per connection, replaced by the reconciler alone.
#[derive(Clone, Default)]
pub struct LocalWorkloads(Arc<ArcSwap<Armed>>);

#[derive(Clone, Default)]
struct Armed {
    /// Those that have their addresses to themselves.
    by_address: HashMap<IpAddr, Arc<LocalWorkload>>,
    /// Those in the node's own namespace.
    by_cgroup: HashMap<u64, Arc<LocalWorkload>>,
}

impl LocalWorkloads {
    /// The workload that a connection to this address and port is for.
    #[must_use]
    pub fn serving(&self, snapshot: &Snapshot, destination: SocketAddr) -> Option<Arc<LocalWorkload>> {
        let armed = self.0.load();
        if let Some(local) = armed.by_address.get(&destination.ip()) {
            return Some(local.clone());
        }
        let wanted = snapshot.workload_serving(destination)?;
        armed.by_cgroup.values().find(|local| local.workload.uid == wanted.uid).cloned()
    }

    /// The workload in the node's own namespace whose cgroup has this id.
    #[must_use]
    pub fn of_cgroup(&self, id: u64) -> Option<Arc<LocalWorkload>> {
        self.0.load().by_cgroup.get(&id).cloned()
    }

    /// Every armed workload once.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<LocalWorkload>> {
        let armed = self.0.load();
        let first =
            |(address, local): &(&IpAddr, &Arc<LocalWorkload>)| local.workload.addresses.first() == Some(*address);
        let pods = armed.by_address.iter().filter(first).map(|(_, local)| local);
        pods.chain(armed.by_cgroup.values()).cloned().collect()
    }

    /// Adds a workload under all its addresses.
    pub fn insert(&self, local: &Arc<LocalWorkload>) {
        let mut next = Armed::clone(&self.0.load());
        for address in &local.workload.addresses {
            next.by_address.insert(*address, local.clone());
        }
        self.0.store(Arc::new(next));
    }

    /// Adds a workload in the node's own namespace under its cgroup's id.
    pub fn insert_host(&self, cgroup: u64, local: &Arc<LocalWorkload>) {
        let mut next = Armed::clone(&self.0.load());
        next.by_cgroup.insert(cgroup, local.clone());
        self.0.store(Arc::new(next));
    }

    /// Removes exactly this incarnation of a workload.
    pub fn remove(&self, local: &Arc<LocalWorkload>) {
        let mut next = Armed::clone(&self.0.load());
        next.by_address.retain(|_, other| !Arc::ptr_eq(other, local));
        next.by_cgroup.retain(|_, other| !Arc::ptr_eq(other, local));
        self.0.store(Arc::new(next));
    }
}
