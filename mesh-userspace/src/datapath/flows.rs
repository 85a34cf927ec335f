//! The handles that the proxy holds: taking a captured connection's record, announcing deliveries, showing life.

use super::table::Table;
use mesh_common::addr::Endpoint;
use mesh_common::flow::{Admitted, OriginalDestination, TupleKey};
use mesh_common::maps::CfgSlot;
use mesh_common::service::BypassKey;
use std::io;

/// Records of captured connections, by what the accepting listener sees of them.
#[derive(Clone)]
pub struct Tuples(pub(super) Table<TupleKey, OriginalDestination>);

impl Tuples {
    /// Takes the record of an accepted connection out of the map, so that nobody can replay it. `None`: the connection
    /// was not captured; reset it, never pass it on.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn take(&self, key: &TupleKey) -> io::Result<Option<OriginalDestination>> {
        self.0.take(key)
    }
}

/// Connections that the kernel carries between workloads of this node, as it has admitted them.
#[derive(Clone)]
pub struct Admissions(pub(super) Table<BypassKey, Admitted>);

impl Admissions {
    /// Those that live now.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn list(&self) -> io::Result<Vec<(BypassKey, Admitted)>> {
        self.0.entries()
    }
}

/// Connections that the daemon itself makes to local workloads: `sk_lookup` lets them pass.
#[derive(Clone)]
pub struct Bypass(pub(super) Table<BypassKey, u64>);

impl Bypass {
    /// Announces a connection before it is made.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn insert(&self, key: &BypassKey) -> io::Result<()> {
        self.0.set(key, &1)
    }

    /// Withdraws the announcement; an absent one (evicted) is no error.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn remove(&self, key: &BypassKey) -> io::Result<()> {
        self.0.delete(key).map(drop)
    }

    /// Announces a connection until the returned guard is dropped. It may be dropped once connect() has returned: an
    /// established connection is not looked up again.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn admit(&self, key: BypassKey) -> io::Result<Admission> {
        self.insert(&key)?;
        Ok(Admission { bypass: self.clone(), key })
    }
}

/// An announced connection; withdrawn when dropped.
#[must_use = "the announcement is withdrawn when this is dropped"]
pub struct Admission {
    bypass: Bypass,
    key: BypassKey,
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Err(error) = self.bypass.remove(&self.key) {
            tracing::warn!(%error, "cannot withdraw a delivery's admission; it stays until it is evicted");
        }
    }
}

/// Whom aliases stand for, and which alias a caller has ([`mesh_common::datagram`]).
#[derive(Clone)]
pub struct Aliases {
    pub(super) aliases: Table<Endpoint, Endpoint>,
    pub(super) callers: Table<BypassKey, Endpoint>,
}

impl Aliases {
    /// Has the programs show `alias` as `real`, from now on.
    ///
    /// # Errors
    ///
    /// The map is full, or the kernel's, for the map itself.
    pub fn show(&self, alias: Endpoint, real: Endpoint) -> io::Result<()> {
        self.aliases.set(&alias, &real)
    }

    /// Ends what [`Aliases::show`] began; an absent one is no error.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn hide(&self, alias: Endpoint) -> io::Result<()> {
        self.aliases.delete(&alias).map(drop)
    }

    /// Has a workload's port (local) see a caller (remote) behind an alias, and reach it there, until the returned guard
    /// is dropped. `None`: that port has that caller already, behind another alias.
    ///
    /// # Errors
    ///
    /// A map is full, or the kernel's, for the maps themselves.
    pub fn introduce(&self, call: BypassKey, alias: Endpoint) -> io::Result<Option<Introduction>> {
        if !self.callers.add(&call, &alias)? {
            return Ok(None);
        }
        let introduction = Introduction { aliases: self.clone(), call, alias };
        self.show(alias, Endpoint::new(call.remote(), call.remote_port_be()))?;
        Ok(Some(introduction))
    }
}

/// A caller that a workload knows; forgotten when dropped.
#[must_use = "the caller is forgotten when this is dropped"]
pub struct Introduction {
    aliases: Aliases,
    call: BypassKey,
    alias: Endpoint,
}

impl Drop for Introduction {
    fn drop(&mut self) {
        let outcome = self.aliases.callers.delete(&self.call).and_then(|_| self.aliases.hide(self.alias));
        if let Err(error) = outcome {
            tracing::warn!(%error, "cannot withdraw a datagram flow's entries; they stay until the next start");
        }
    }
}

/// The daemon's sign of life. Beat from the loop that accepts connections: a beat from elsewhere hides that it hangs.
#[derive(Clone)]
pub struct Heartbeat(pub(super) Table<u32, u64>);

impl Heartbeat {
    /// Tells the kernel that the daemon lives now.
    ///
    /// # Errors
    ///
    /// The kernel's, for the map itself.
    pub fn beat(&self) -> io::Result<()> {
        self.0.set(&(CfgSlot::Heartbeat as u32), &monotonic_nanoseconds())
    }
}

/// CLOCK_MONOTONIC in nanoseconds, the programs' `bpf_ktime_get_ns`.
#[must_use]
pub fn monotonic_nanoseconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both are never negative on this clock.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
