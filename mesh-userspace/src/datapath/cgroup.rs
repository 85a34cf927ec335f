//! The cgroups whose sockets the programs see, and those of workloads below them.

use anyhow::{Context as _, bail, ensure};
use mesh_common::host::LEVELS;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The inode of a cgroup2 hierarchy's root.
const ROOT_INODE: u64 = 1;

/// An open cgroup v2 directory that is not the root.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) directory: File,
    /// The cgroup's id, as links report it.
    pub(super) id: u64,
    path: PathBuf,
}

impl Cgroup {
    /// Opens the cgroup and refuses what is none, and the root: a program there would see every socket of the machine,
    /// the operator's own connection included.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let directory = File::open(path).with_context(|| format!("cannot open the cgroup {}", path.display()))?;
        let filesystem =
            rustix::fs::fstatfs(&directory).with_context(|| format!("cannot inspect {}", path.display()))?;
        ensure!(
            filesystem.f_type == libc::CGROUP2_SUPER_MAGIC,
            "{} is not in a cgroup v2 hierarchy; its mount point is in /proc/self/mounts under the type cgroup2",
            path.display()
        );
        let id = directory.metadata().with_context(|| format!("cannot inspect {}", path.display()))?.ino();
        // Every cgroup but the root has this file, also seen through a cgroup namespace.
        let is_root = id == ROOT_INODE || !path.join("cgroup.type").exists();
        ensure!(
            !is_root,
            "{} is the root of the cgroup hierarchy: nodemeshd never attaches there, because its programs would then \
             see every socket of this machine; name the cgroup that holds the workloads",
            path.display()
        );
        Ok(Self { directory, id, path: path.to_owned() })
    }

    /// Opens the cgroups of a configuration. None may be within another: its programs would run twice for the inner
    /// one's sockets.
    pub(super) fn open_all(paths: &[PathBuf]) -> anyhow::Result<Vec<Self>> {
        ensure!(!paths.is_empty(), "no cgroup is configured: name the one that holds the workloads");
        let cgroups = paths.iter().map(|path| Self::open(path)).collect::<anyhow::Result<Vec<_>>>()?;
        for (index, cgroup) in cgroups.iter().enumerate() {
            let above = ancestors(&cgroup.path)?;
            for (other, place) in cgroups.iter().zip(0..) {
                ensure!(
                    place == index || (other.id != cgroup.id && !above.contains(&other.id)),
                    "the cgroup {} is, or is within, {}: name only the outer one, or the programs would run twice for \
                     each of its sockets",
                    cgroup.path.display(),
                    other.path.display()
                );
            }
        }
        Ok(cgroups)
    }
}

/// The cgroup of a workload in the node's own network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadCgroup {
    path: PathBuf,
    id: u64,
    level: u32,
}

impl WorkloadCgroup {
    /// Opens a workload's cgroup, which must be one of `attached` or within one: elsewhere no program sees its sockets.
    pub(super) fn open(path: &Path, attached: &[PathBuf], attached_ids: &[u64]) -> anyhow::Result<Self> {
        let Cgroup { id, .. } = Cgroup::open(path)?;
        let above = ancestors(path)?;
        if !attached_ids.iter().any(|outer| *outer == id || above.contains(outer)) {
            let names: Vec<_> = attached.iter().map(|path| path.display().to_string()).collect();
            bail!(
                "{} is in none of the cgroups that nodemeshd attaches to ({}): add it, or a cgroup around it, to \
                 `cgroup` in the daemon's configuration and restart the daemon",
                path.display(),
                names.join(", ")
            );
        }
        ensure!(
            above.last() == Some(&ROOT_INODE),
            "cannot tell how deep {} is: only a part of the cgroup hierarchy is mounted; give the daemon all of it, \
             as in /sys/fs/cgroup of the machine",
            path.display()
        );
        let level = u32::try_from(above.len()).unwrap_or(u32::MAX);
        ensure!(level < LEVELS, "{} is deeper in the cgroup hierarchy than {} levels", path.display(), LEVELS - 1);
        ensure_not_own(path, id)?;
        Ok(Self { path: path.to_owned(), id, level })
    }

    /// As BPF programs know it; never another cgroup's again.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The root of the hierarchy is at level 0.
    pub(super) fn level(&self) -> u32 {
        self.level
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the path that it was opened at still leads to it.
    #[must_use]
    pub fn is_still_at_its_path(&self) -> bool {
        match std::fs::metadata(&self.path) {
            Ok(there) => there.ino() == self.id,
            // Only a path that is known to lead nowhere counts: a passing failure must not cut a workload off.
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        }
    }
}

/// The ids of the cgroups around one, innermost first, as far as they are mounted.
fn ancestors(path: &Path) -> anyhow::Result<Vec<u64>> {
    let whole = path.canonicalize().with_context(|| format!("cannot open the cgroup {}", path.display()))?;
    let mut ids = Vec::new();
    for outer in whole.ancestors().skip(1) {
        let filesystem = rustix::fs::statfs(outer).with_context(|| format!("cannot inspect {}", outer.display()))?;
        if filesystem.f_type != libc::CGROUP2_SUPER_MAGIC {
            break;
        }
        ids.push(outer.metadata().with_context(|| format!("cannot inspect {}", outer.display()))?.ino());
    }
    Ok(ids)
}

/// The daemon's own connections would be captured, by itself.
fn ensure_not_own(path: &Path, id: u64) -> anyhow::Result<()> {
    let whole = path.canonicalize().with_context(|| format!("cannot open the cgroup {}", path.display()))?;
    let memberships = std::fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let own = memberships.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let is_own = whole.ancestors().any(|root| {
        let inside = root.join(own);
        root.metadata().is_ok_and(|metadata| metadata.ino() == ROOT_INODE)
            && inside.ancestors().any(|outer| outer.metadata().is_ok_and(|metadata| metadata.ino() == id))
    });
    ensure!(!is_own, "nodemeshd itself runs in {}: give the workload a cgroup of its own", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> PathBuf {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let point = fields.next()?;
            (fields.next()? == "cgroup2").then_some(point)
        });
        root.expect("a mounted cgroup2 hierarchy").into()
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Cgroup::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("not in a cgroup v2 hierarchy"), "{error}");
    }

    #[test]
    fn the_root_cgroup_is_refused() {
        let error = Cgroup::open(&root()).unwrap_err().to_string();
        assert!(error.contains("root of the cgroup hierarchy"), "{error}");
    }

    #[test]
    fn no_cgroup_at_all_is_refused() {
        assert!(Cgroup::open_all(&[]).unwrap_err().to_string().contains("no cgroup is configured"));
    }
}
