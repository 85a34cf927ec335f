//! Removal of what killed test processes left behind.

use crate::{cgroup, ip, namespace, owner::Owner};
use anyhow::Result;
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::path::{Path, PathBuf};

/// What [`sweep`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub cgroups: Vec<String>,
    pub namespaces: Vec<String>,
    pub folders: Vec<String>,
}

impl Swept {
    /// Whether there was nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }
}

/// Removes the processes, control groups, namespaces, mounts and folders of worlds whose process has ended.
///
/// # Errors
/// If something cannot be removed.
pub fn sweep() -> Result<Swept> {
    sweep_of(|owner| !owner.is_alive())
}

/// Removes everything that this process made, for a process that is about to end without dropping it.
///
/// # Errors
/// If something cannot be removed.
pub fn sweep_own() -> Result<Swept> {
    sweep_of(Owner::is_this_process)
}

fn sweep_of(wanted: impl Fn(Owner) -> bool) -> Result<Swept> {
    let names_in = |folder: &Path| names_in(folder, &wanted);
    let mut swept = Swept::default();
    for name in names_in(&cgroup::mount_point()?) {
        cgroup::remove(&cgroup::mount_point()?.join(&name))?;
        swept.cgroups.push(name);
    }
    for name in names_in(Path::new(namespace::FOLDER)) {
        ip::netns("del", &name)?;
        swept.namespaces.push(name);
    }
    let temporary = std::env::temp_dir();
    for name in names_in(&temporary) {
        remove_folder(&temporary.join(&name))?;
        swept.folders.push(name);
    }
    Ok(swept)
}

/// Unmounts what is mounted below a folder, the deepest first, and removes it.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    for mount in mounts_below(folder) {
        unmount(&mount, UnmountFlags::DETACH)?;
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Mount points at or below a folder, the latest first.
pub(crate) fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = paths.filter(|path| path.starts_with(folder)).collect();
    below.reverse();
    below
}

fn names_in(folder: &Path, wanted: impl Fn(Owner) -> bool) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| Owner::parse(name).is_some_and(&wanted)).collect()
}
