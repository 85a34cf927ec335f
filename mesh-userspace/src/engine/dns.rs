//! The mesh's own DNS: a frontend for TCP and UDP that no service takes, and whose one backend is the daemon itself.

use super::Engine;
use crate::model::{DNS_PORT, Mesh};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

impl Engine {
    /// Follows `MeshConfig`, which the snapshot has already.
    pub(super) fn change_dns(&mut self, old: Option<&Arc<Mesh>>, new: Option<&Arc<Mesh>>) {
        let (old, new) = (servers(old), servers(new));
        for address in &new {
            self.datagrams.numbers.acquire(address);
        }
        for address in old.union(&new) {
            self.refresh_frontend(*address);
            self.refresh_datagram(*address);
        }
        for address in &old {
            self.datagrams.numbers.release(address);
        }
    }

    /// Whether the mesh's own DNS is asked at this address.
    pub(super) fn is_dns(&self, address: SocketAddr) -> bool {
        self.tables.snapshot.mesh.as_ref().is_some_and(|mesh| mesh.answers_dns_at(address))
    }
}

fn servers(mesh: Option<&Arc<Mesh>>) -> BTreeSet<SocketAddr> {
    let addresses = mesh.and_then(|mesh| mesh.dns.as_ref()).into_iter().flat_map(|dns| &dns.addresses);
    addresses.map(|address| SocketAddr::new(*address, DNS_PORT)).collect()
}
