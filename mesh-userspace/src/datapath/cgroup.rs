//! The cgroup whose sockets the programs see.

use anyhow::{Context as _, ensure};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The inode of a cgroup2 hierarchy's root.
const ROOT_INODE: u64 = 1;

/// An open cgroup v2 directory that is not the root.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) directory: File,
    /// The cgroup's id, as links report it.
    pub(super) id: u64,
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
        Ok(Self { directory, id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Cgroup::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("not in a cgroup v2 hierarchy"), "{error}");
    }

    #[test]
    fn the_root_cgroup_is_refused() {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let point = fields.next()?;
            (fields.next()? == "cgroup2").then_some(point)
        });
        let error = Cgroup::open(Path::new(root.expect("a mounted cgroup2 hierarchy"))).unwrap_err().to_string();
        assert!(error.contains("root of the cgroup hierarchy"), "{error}");
    }
}
