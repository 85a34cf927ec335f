//! Control groups of the testbed: below one private group, never the root.

use crate::wait;
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long killed processes may take to leave their group.
const EMPTY_BOUND: Duration = Duration::from_secs(10);

/// Where the unified hierarchy is mounted: `/sys/fs/cgroup`, or elsewhere in hybrid layouts.
///
/// # Errors
/// If it is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })
        .context("no cgroup2 file system is mounted: the testbed attaches its programs to control groups of version 2")
}

/// A control group; dropping it kills the processes in it and below, and removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a group right below the mount point.
    pub(crate) fn create(name: &str) -> Result<Self> {
        let root = mount_point()?;
        let path = root.join(name);
        if name.is_empty() || path == root || path.parent() != Some(&root) {
            bail!("refusing to use {} as the testbed's control group", path.display());
        }
        fs::create_dir(&path).with_context(|| format!("cannot make the control group {}", path.display()))?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a group below this one.
    pub(crate) fn child(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make the control group {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("testbed: {error:#}");
        }
    }
}

/// Opens a group so that a process can join it by writing `0`.
pub(crate) fn open_procs(group: &Path) -> Result<File> {
    let path = group.join("cgroup.procs");
    OpenOptions::new().write(true).open(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// Kills what runs in a group and below, waits for it to be gone, removes the groups.
pub(crate) fn remove(group: &Path) -> Result<()> {
    if !group.is_dir() {
        return Ok(());
    }
    let own = std::process::id();
    wait::until_ok("the control group becomes empty", EMPTY_BOUND, || {
        let inside = processes(group);
        if inside.contains(&own) {
            bail!("this process itself is in {}", group.display());
        }
        for pid in inside.into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            // It may have ended by itself since the group was read.
            let _ = kill_process(pid, Signal::KILL);
        }
        remove_tree(group)
    })
}

fn subgroups(group: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn processes(group: &Path) -> Vec<u32> {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for child in subgroups(group) {
        pids.extend(processes(&child));
    }
    pids
}

fn remove_tree(group: &Path) -> Result<()> {
    for child in subgroups(group) {
        remove_tree(&child)?;
    }
    fs::remove_dir(group).with_context(|| format!("cannot remove the control group {}", group.display()))
}
