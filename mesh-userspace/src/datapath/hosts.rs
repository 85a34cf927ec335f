//! Workloads in the node's own network namespace: which cgroups they are, and the guard of their ports.

use super::cgroup::{Cgroup, WorkloadCgroup};
use super::link::{self, Target};
use super::table::{OwnTable, Table};
use super::{Config, Datapath};
use anyhow::Context as _;
use mesh_common::maps::CfgSlot;
use mesh_common::service::Pod;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What this daemon has armed, and what it needs for it.
pub(super) struct Hosts {
    /// The cgroups that the programs are attached to: paths, and ids.
    attached: (Vec<PathBuf>, Vec<u64>),
    table: OwnTable<u64, Pod>,
    /// Levels of the armed workloads, by their cgroups' ids.
    armed: BTreeMap<u64, u32>,
    /// Levels that a predecessor's workloads need until they are armed again.
    inherited_levels: u64,
    is_guarded: bool,
}

impl Hosts {
    pub(super) fn new(
        config: &Config,
        cgroups: &[Cgroup],
        table: OwnTable<u64, Pod>,
        settings: &Table<u32, u64>,
    ) -> anyhow::Result<Self> {
        let levels = settings.get(&(CfgSlot::HostLevels as u32)).context("cannot read map CFG")?;
        Ok(Self {
            attached: (config.cgroups.clone(), cgroups.iter().map(|cgroup| cgroup.id).collect()),
            table,
            armed: BTreeMap::new(),
            inherited_levels: levels.unwrap_or_default(),
            is_guarded: false,
        })
    }

    /// The number of armed workloads, as it changes.
    pub(super) fn count(&self) -> Arc<AtomicU64> {
        self.table.count()
    }

    /// Whether the node's own namespace is guarded.
    pub(super) fn is_guarded(&self) -> bool {
        self.is_guarded
    }

    /// Drops what a predecessor armed and this daemon did not.
    pub(super) fn settle(&mut self, settings: &Table<u32, u64>) -> anyhow::Result<()> {
        self.table.retain(|cgroup| self.armed.contains_key(cgroup))?;
        self.inherited_levels = 0;
        self.write_levels(settings)?;
        if self.is_guarded { Ok(()) } else { set(settings, CfgSlot::HostNetns, 0) }
    }

    fn write_levels(&self, settings: &Table<u32, u64>) -> anyhow::Result<()> {
        let levels = self.armed.values().fold(self.inherited_levels, |levels, level| levels | 1 << level);
        set(settings, CfgSlot::HostLevels, levels)
    }
}

fn set(settings: &Table<u32, u64>, slot: CfgSlot, value: u64) -> anyhow::Result<()> {
    settings.set(&(slot as u32), &value).context("cannot write map CFG")
}

impl Datapath {
    /// Opens the cgroup of a workload in the node's own network namespace.
    ///
    /// # Errors
    ///
    /// No cgroup, one that the programs do not see, one too deep, or the daemon's own; the message says what to do.
    pub fn workload_cgroup(&self, path: &Path) -> anyhow::Result<WorkloadCgroup> {
        let (paths, ids) = &self.hosts.attached;
        WorkloadCgroup::open(path, paths, ids)
    }

    /// Guards the declared ports of the node's own network namespace, and has its sockets' makers recorded.
    ///
    /// # Errors
    ///
    /// The kernel refuses the attachment, or the map cannot be written.
    pub fn attach_node(&mut self, netns: BorrowedFd<'_>, cookie: u64) -> anyhow::Result<()> {
        let inode = rustix::fs::fstat(netns).context("cannot inspect the node's network namespace")?.st_ino;
        self.programs.guard_node(&self.pins.node(), Target { fd: netns, id: inode })?;
        self.hosts.is_guarded = true;
        set(&self.settings, CfgSlot::HostNetns, cookie)
    }

    /// Takes the node's guard away. That there is none is no error.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or the map cannot be written.
    pub fn detach_node(&mut self) -> anyhow::Result<()> {
        set(&self.settings, CfgSlot::HostNetns, 0)?;
        link::remove(&self.pins.node())?;
        self.hosts.is_guarded = false;
        Ok(())
    }

    /// Starts capturing the connects of a cgroup's processes in the node's own namespace: the last step of arming.
    /// Sockets that are there already belong to nobody, and may not connect to the mesh from now on.
    ///
    /// # Errors
    ///
    /// The map is full or cannot be written.
    pub fn arm_host(&mut self, cgroup: &WorkloadCgroup, pod: Pod) -> anyhow::Result<()> {
        self.hosts.armed.insert(cgroup.id(), cgroup.level());
        self.hosts.write_levels(&self.settings)?;
        self.hosts.table.set(&cgroup.id(), &pod).inspect_err(|_| {
            self.hosts.armed.remove(&cgroup.id());
        })
    }

    /// Stops capturing: the first step of disarming. A cgroup that is not armed, or is gone, is no error.
    ///
    /// # Errors
    ///
    /// The map cannot be written.
    pub fn disarm_host(&mut self, cgroup: &WorkloadCgroup) -> anyhow::Result<()> {
        self.hosts.table.remove(&cgroup.id())?;
        self.hosts.armed.remove(&cgroup.id());
        self.hosts.write_levels(&self.settings)
    }
}
