//! The tables that this daemon alone writes, all from what the engine desires.

use super::table::OwnTable;
use crate::engine::{MapOp, is_group_header};
use mesh_common::addr::Endpoint;
use mesh_common::maps::{self, Spec};
use mesh_common::policy::{Matched, VerdictKey};
use mesh_common::service::{
    AppPort, AppPortKey, Backend, CidrAction, CidrKey, DatagramFrontend, Frontend, FrontendKey, Pod, RangeKey,
};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// An LPM trie's key as the kernel lays it out: the prefix length, then what it counts bits of.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct PrefixKey<K> {
    length: u32,
    range: K,
}

// SAFETY: repr(C), a u32 and four words behind it: no padding, every bit pattern is valid.
unsafe impl aya::Pod for PrefixKey<CidrKey> {}
// SAFETY: repr(C), a u32 and five words behind it: no padding, every bit pattern is valid.
unsafe impl aya::Pod for PrefixKey<RangeKey> {}

fn prefix<K: Copy>(length: u32, range: &K) -> PrefixKey<K> {
    PrefixKey { length, range: *range }
}

/// Waits for the programs that run now: those that have read a reference to a policy group ask for its header, and
/// refuse the connection if it is gone. MEMBARRIER_CMD_GLOBAL waits for an RCU grace period, within which every program
/// runs (kernel: not with nohz_full; a connect() at that very moment may then be refused in vain).
pub(super) fn wait_for_running_programs() {
    if let Err(error) = rustix::thread::membarrier(rustix::thread::MembarrierCommand::Global) {
        tracing::debug!(%error, "cannot wait for the programs that run now");
    }
}

pub(super) struct Tables {
    pub(super) pods: OwnTable<u64, Pod>,
    frontends: OwnTable<FrontendKey, Frontend>,
    backends: OwnTable<FrontendKey, Backend>,
    cidrs: OwnTable<PrefixKey<CidrKey>, CidrAction>,
    app_ports: OwnTable<AppPortKey, AppPort>,
    datagrams: OwnTable<Endpoint, DatagramFrontend>,
    verdicts: OwnTable<VerdictKey, Matched>,
    ranges: OwnTable<PrefixKey<RangeKey>, u32>,
}

impl Tables {
    pub(super) fn open(map: impl Fn(&Spec) -> anyhow::Result<Arc<OwnedFd>>) -> anyhow::Result<Self> {
        Ok(Self {
            pods: OwnTable::new(map(&maps::PODS)?, &maps::PODS)?,
            frontends: OwnTable::new(map(&maps::SVC)?, &maps::SVC)?,
            backends: OwnTable::new(map(&maps::BACKENDS)?, &maps::BACKENDS)?,
            cidrs: OwnTable::new(map(&maps::CIDR)?, &maps::CIDR)?,
            app_ports: OwnTable::new(map(&maps::APPPORTS)?, &maps::APPPORTS)?,
            datagrams: OwnTable::new(map(&maps::DATAGRAMS)?, &maps::DATAGRAMS)?,
            verdicts: OwnTable::new(map(&maps::VERDICTS)?, &maps::VERDICTS)?,
            ranges: OwnTable::new(map(&maps::RANGES)?, &maps::RANGES)?,
        })
    }

    /// The numbers of entries, as they change.
    pub(super) fn counts(&self) -> BTreeMap<&'static str, Arc<AtomicU64>> {
        BTreeMap::from([
            (maps::PODS.name, self.pods.count()),
            (maps::SVC.name, self.frontends.count()),
            (maps::BACKENDS.name, self.backends.count()),
            (maps::CIDR.name, self.cidrs.count()),
            (maps::APPPORTS.name, self.app_ports.count()),
            (maps::DATAGRAMS.name, self.datagrams.count()),
            (maps::VERDICTS.name, self.verdicts.count()),
            (maps::RANGES.name, self.ranges.count()),
        ])
    }

    /// Writes one entry; a setting is none.
    pub(super) fn apply(&self, op: &MapOp) -> anyhow::Result<()> {
        match op {
            MapOp::SetFrontend(key, value) => self.frontends.set(key, value),
            MapOp::RemoveFrontend(key) => self.frontends.remove(key),
            MapOp::SetBackend(key, value) => self.backends.set(key, value),
            MapOp::RemoveBackend(key) => self.backends.remove(key),
            MapOp::SetCidr(length, range, action) => self.cidrs.set(&prefix(*length, range), action),
            MapOp::RemoveCidr(length, range) => self.cidrs.remove(&prefix(*length, range)),
            MapOp::SetAppPort(key, value) => self.app_ports.set(key, value),
            MapOp::RemoveAppPort(key) => self.app_ports.remove(key),
            MapOp::SetDatagram(key, value) => self.datagrams.set(key, value),
            MapOp::RemoveDatagram(key) => self.datagrams.remove(key),
            MapOp::SetVerdict(key, value) => self.verdicts.set(key, value),
            MapOp::RemoveVerdict(key) => self.verdicts.remove(key),
            MapOp::SetRange(length, range, class) => self.ranges.set(&prefix(*length, range), class),
            MapOp::RemoveRange(length, range) => self.ranges.remove(&prefix(*length, range)),
            MapOp::SetDeniedErrno(_) => Ok(()),
        }
    }

    /// Removes all that these operations do not set, in the order of a difference.
    pub(super) fn retain_set_by(&self, ops: &[MapOp]) -> anyhow::Result<()> {
        let (mut frontends, mut cidrs, mut app_ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut verdicts, mut ranges, mut backends) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut datagrams = BTreeSet::new();
        for op in ops {
            match op {
                MapOp::SetFrontend(key, _) => drop(frontends.insert(*key)),
                MapOp::SetBackend(key, _) => drop(backends.insert(*key)),
                MapOp::SetCidr(length, range, _) => drop(cidrs.insert(prefix(*length, range))),
                MapOp::SetAppPort(key, _) => drop(app_ports.insert(*key)),
                MapOp::SetDatagram(key, _) => drop(datagrams.insert(*key)),
                MapOp::SetVerdict(key, _) => drop(verdicts.insert(*key)),
                MapOp::SetRange(length, range, _) => drop(ranges.insert(prefix(*length, range))),
                MapOp::RemoveFrontend(_)
                | MapOp::RemoveBackend(_)
                | MapOp::RemoveDatagram(_)
                | MapOp::RemoveCidr(..)
                | MapOp::RemoveAppPort(_)
                | MapOp::RemoveVerdict(_)
                | MapOp::RemoveRange(..)
                | MapOp::SetDeniedErrno(_) => {}
            }
        }
        // Capture goes before the guard, and both before the policies that they refer to.
        self.frontends.retain(|key| frontends.contains(key))?;
        self.backends.retain(|key| backends.contains(key))?;
        self.datagrams.retain(|key| datagrams.contains(key))?;
        self.cidrs.retain(|key| cidrs.contains(key))?;
        self.app_ports.retain(|key| app_ports.contains(key))?;
        wait_for_running_programs();
        self.verdicts.retain(|key| !is_group_header(key) || verdicts.contains(key))?;
        self.verdicts.retain(|key| verdicts.contains(key))?;
        self.ranges.retain(|key| ranges.contains(key))
    }
}
