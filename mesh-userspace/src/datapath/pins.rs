//! Where the kernel keeps what must survive the daemon: `<bpffs>/<pin>/{maps,links,netns}`.

use super::bpf;
use super::link;
use anyhow::{Context as _, bail, ensure};
use mesh_common::ABI_VERSION;
use mesh_common::maps::{self, CfgSlot};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A directory at the root of a bpffs that nodemesh mounted: the last one to leave unmounts it.
const MOUNTED_BY_US: &str = "nodemesh_mounted";
/// Longer names of network namespaces are shortened and get a hash.
const LONGEST_NAME: usize = 200;

/// The pin folder, held exclusively: one daemon at a time.
pub(super) struct Pins {
    bpffs: PathBuf,
    folder: PathBuf,
    /// Released when the process ends, however it ends.
    lock: OwnedFd,
}

impl Pins {
    /// Opens the pin folder; mounts a bpffs and makes the folder where they are missing.
    pub(super) fn open(bpffs: &Path, pin: &str) -> anyhow::Result<Self> {
        let folder = folder(bpffs, pin)?;
        if !is_bpffs(bpffs)? {
            mount(bpffs)?;
        }
        for directory in [folder.clone(), folder.join("maps"), folder.join("links"), folder.join("netns")] {
            fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let lock = lock(&folder)?;
        Ok(Self { bpffs: bpffs.to_owned(), folder, lock })
    }

    /// The pin folder, if it is there.
    pub(super) fn find(bpffs: &Path, pin: &str) -> anyhow::Result<Option<Self>> {
        let folder = folder(bpffs, pin)?;
        if !bpffs.exists() || !is_bpffs(bpffs)? || !folder.exists() {
            return Ok(None);
        }
        let lock = lock(&folder)?;
        Ok(Some(Self { bpffs: bpffs.to_owned(), folder, lock }))
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.folder.join("maps").join(name)
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.folder.join("links").join(name)
    }

    pub(super) fn netns(&self, name: &str) -> PathBuf {
        self.folder.join("netns").join(file_name(name))
    }

    /// The pins of the cgroups' links.
    pub(super) fn link_pins(&self) -> anyhow::Result<Vec<PathBuf>> {
        list(&self.folder.join("links"))
    }

    /// The pins of the sk_lookup links.
    pub(super) fn netns_pins(&self) -> anyhow::Result<Vec<PathBuf>> {
        list(&self.folder.join("netns"))
    }

    /// The pin of the node's own namespace's link: a name that [`file_name`] gives to nobody.
    pub(super) fn node(&self) -> PathBuf {
        self.folder.join("netns").join("__node")
    }

    /// Removes the sk_lookup links of all namespaces but `names`, and the node's own unless `node` is kept.
    pub(super) fn retain_netns(&self, names: &[&str], node: bool) -> anyhow::Result<()> {
        let wanted: BTreeSet<PathBuf> =
            names.iter().map(|name| self.netns(name)).chain(node.then(|| self.node())).collect();
        self.netns_pins()?.iter().filter(|pin| !wanted.contains(*pin)).try_for_each(|pin| link::remove(pin))
    }

    /// Whether a predecessor of the same ABI left its maps here, all of them and in this version's shape.
    pub(super) fn are_adoptable(&self) -> anyhow::Result<bool> {
        for spec in maps::ALL {
            let path = self.map(spec.name);
            let Some(map) = bpf::absent(bpf::get_object(&path)).with_context(|| cannot_open(&path))? else {
                return Ok(false);
            };
            let info = bpf::map_shape(map.as_fd()).with_context(|| cannot_open(&path))?;
            if !spec.describes(info.kind, info.key_size, info.value_size, info.max_entries, info.flags) {
                return Ok(false);
            }
            if spec.name == maps::CFG.name {
                let version: Option<u64> = bpf::map_lookup(map.as_fd(), &(CfgSlot::AbiVersion as u32))?;
                if version != Some(u64::from(ABI_VERSION)) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Detaches and unpins everything; connects first, so that nothing is captured that nobody would take.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        let mut links = self.link_pins()?;
        links.sort_by_key(|path| !path.to_string_lossy().contains("connect"));
        links.extend(self.netns_pins()?);
        links.iter().try_for_each(|pin| link::remove(pin))?;
        for map in list(&self.folder.join("maps"))? {
            fs::remove_file(&map).with_context(|| format!("cannot unpin {}", map.display()))?;
        }
        Ok(())
    }

    /// Removes the (cleared) folder, and unmounts the bpffs if nodemesh mounted it and nobody else uses it.
    pub(super) fn release(self) -> anyhow::Result<()> {
        for directory in [self.folder.join("maps"), self.folder.join("links"), self.folder.join("netns")] {
            remove_directory(&directory)?;
        }
        remove_directory(&self.folder)?;
        if !self.is_ours_to_unmount()? {
            return Ok(());
        }
        let Self { bpffs, lock, .. } = self;
        // It stands in the mount.
        drop(lock);
        match rustix::mount::unmount(&bpffs, UnmountFlags::empty()) {
            // Somebody stands in it: it is theirs now.
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot unmount {}", bpffs.display())),
        }
    }

    /// Whether nodemesh mounted the bpffs and nobody has pins in it.
    fn is_ours_to_unmount(&self) -> anyhow::Result<bool> {
        let marker = self.bpffs.join(MOUNTED_BY_US);
        let mut others = list(&self.bpffs)?;
        // A name with a dot is the kernel's own (`maps.debug`): it lets nobody else make one.
        others.retain(|path| *path != marker && path.extension().is_none());
        Ok(marker.exists() && others.is_empty())
    }
}

fn folder(bpffs: &Path, pin: &str) -> anyhow::Result<PathBuf> {
    let valid = !pin.is_empty() && pin.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    ensure!(valid, "the pin folder's name {pin:?} may hold letters, digits, '-' and '_' only");
    Ok(bpffs.join(pin))
}

fn lock(folder: &Path) -> anyhow::Result<OwnedFd> {
    let directory = rustix::fs::open(folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| cannot_open(folder))?;
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(directory),
        Err(Errno::WOULDBLOCK) => bail!("another nodemeshd is running with the pins in {}", folder.display()),
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", folder.display())),
    }
}

fn cannot_open(path: &Path) -> String {
    format!("cannot open {}", path.display())
}

fn is_bpffs(path: &Path) -> anyhow::Result<bool> {
    match rustix::fs::statfs(path) {
        Ok(filesystem) => Ok(filesystem.f_type == libc::BPF_FS_MAGIC),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot inspect {}", path.display())),
    }
}

fn mount(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("bpf", path, "bpf", flags, Some(c"mode=0700"))
        .with_context(|| format!("cannot mount a bpffs at {}", path.display()))?;
    let marker = path.join(MOUNTED_BY_US);
    fs::create_dir(&marker).with_context(|| format!("cannot make {}", marker.display()))
}

fn list(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot list {}", directory.display()))?,
    };
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn remove_directory(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// A namespace's name as a file name of a bpffs, which allows no dots: other bytes than letters, digits and `-`
/// become `_xx`.
fn file_name(name: &str) -> String {
    let mut file_name = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            file_name.push(char::from(byte));
        } else {
            file_name.push_str(&format!("_{byte:02x}"));
        }
    }
    if file_name.len() > LONGEST_NAME {
        // FNV-1a: stable across versions, unlike std's hasher, since a successor must find the pin.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        file_name.truncate(LONGEST_NAME);
        file_name.push_str(&format!("__{hash:016x}"));
    }
    file_name
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn namespace_names_become_legal_and_distinct_file_names(a: String, b: String) {
            let (x, y) = (file_name(&a), file_name(&b));
            prop_assert!(x.len() <= 255 && !x.contains(['.', '/']));
            prop_assert_eq!(a == b, x == y);
            prop_assert!(x != "__node");
        }
    }

    #[test]
    fn long_names_that_share_a_beginning_stay_distinct() {
        let (a, b) = ("x".repeat(400) + "a", "x".repeat(400) + "b");
        assert_ne!(file_name(&a), file_name(&b));
        assert!(file_name(&a).len() <= 255);
    }

    #[test]
    fn the_pin_folder_is_a_plain_name() {
        for bad in ["", "a/b", "..", "a.b"] {
            assert!(folder(Path::new("/bpf"), bad).is_err(), "{bad:?}");
        }
        assert_eq!(folder(Path::new("/bpf"), "node-1_x").unwrap(), Path::new("/bpf/node-1_x"));
    }
}
