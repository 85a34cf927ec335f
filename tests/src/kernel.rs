//! What the kernel holds of a daemon: pinned links, the programs they run, maps. Asked of the kernel itself, so that
//! "nothing is left" does not rest on the daemon's word.

use anyhow::{Context, Result};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Commands of bpf(2).
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const MAP_GET_FD_BY_ID: libc::c_long = 14;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const ENABLE_STATS: libc::c_long = 32;

/// `struct bpf_prog_info` up to `run_cnt`, in words (Linux 5.1).
const PROGRAM_WORDS: usize = 52;
/// Where `run_time_ns` and `run_cnt` are in it.
const RUN_TIME: usize = 48;
const RUN_COUNT: usize = 50;

/// `union bpf_attr`, as much of it as is used here; in words, for the commands lay different fields over it.
type Attributes = [u32; 6];

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// Its pin, relative to the pin folder: `links/connect4`, `netns/...`.
    pub name: PathBuf,
    pub id: u32,
    /// Id of the program that runs at it.
    pub program: u32,
}

/// The ids of everything that is pinned below a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pinned {
    /// By name.
    pub links: Vec<Link>,
    pub maps: Vec<u32>,
}

impl Pinned {
    /// Reads `links`, `netns` and `maps` below the pin folder of a daemon.
    ///
    /// # Errors
    /// If the folder or a pin cannot be read.
    pub fn below(folder: &Path) -> Result<Self> {
        let mut pinned = Self::default();
        for kind in ["links", "netns"] {
            for path in entries(&folder.join(kind))? {
                let [_, id, program] = info(&path)?;
                let name = path.strip_prefix(folder)?.to_owned();
                pinned.links.push(Link { name, id, program });
            }
        }
        for path in entries(&folder.join("maps"))? {
            pinned.maps.push(info(&path)?[1]);
        }
        pinned.links.sort();
        Ok(pinned)
    }

    /// Which of it the kernel still has, in words.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let links = self.links.iter().flat_map(|link| {
            let id = (LINK_GET_FD_BY_ID, link.id, format!("link {}", link.name.display()));
            [id, (PROG_GET_FD_BY_ID, link.program, format!("the program of {}", link.name.display()))]
        });
        let maps = self.maps.iter().map(|id| (MAP_GET_FD_BY_ID, *id, format!("map {id}")));
        links.chain(maps).filter(|(command, id, _)| exists(*command, *id)).map(|(_, _, what)| what).collect()
    }
}

/// How often a program has run while statistics were enabled, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunStats {
    pub runs: u64,
    pub nanoseconds: u64,
}

impl RunStats {
    /// Has the kernel count the runs of all programs as long as the descriptor lives (Linux 5.8).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn enable() -> Result<OwnedFd> {
        // Statistics of the run time are kind 0.
        open(ENABLE_STATS, [0; 6]).context("cannot enable the statistics of programs")
    }

    /// Of the program with this id.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(program: u32) -> Result<Self> {
        let object = open(PROG_GET_FD_BY_ID, [program, 0, 0, 0, 0, 0]).context("cannot open the program")?;
        let words: [u32; PROGRAM_WORDS] = ask(&object).context("cannot ask about the program")?;
        let wide = |at: usize| u64::from(words[at]) | (u64::from(words[at + 1]) << 32);
        Ok(Self { runs: wide(RUN_COUNT), nanoseconds: wide(RUN_TIME) })
    }
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    listed.map(|entry| Ok(entry?.path())).collect()
}

/// Type, id and, for links, the program's id of a pinned object.
fn info(pin: &Path) -> Result<[u32; 3]> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let [low, high] = halves(path.as_ptr() as u64);
    let object = open(OBJ_GET, [low, high, 0, 0, 0, 0]).with_context(|| format!("cannot open {}", pin.display()))?;
    let info: [u32; 32] = ask(&object).with_context(|| format!("cannot ask about {}", pin.display()))?;
    Ok([info[0], info[1], info[2]])
}

/// What the kernel tells about an object, as many words of it as asked for.
fn ask<const WORDS: usize>(object: &OwnedFd) -> io::Result<[u32; WORDS]> {
    let mut info = [0_u32; WORDS];
    let [low, high] = halves(info.as_mut_ptr() as u64);
    let words = [object.as_raw_fd(), size_of_val(&info) as i32].map(i32::cast_unsigned);
    bpf(OBJ_GET_INFO_BY_FD, [words[0], words[1], low, high, 0, 0])?;
    // The kernel has written it through the pointer.
    Ok(std::hint::black_box(info))
}

fn exists(command: libc::c_long, id: u32) -> bool {
    open(command, [id, 0, 0, 0, 0, 0]).is_ok()
}

fn open(command: libc::c_long, attributes: Attributes) -> io::Result<OwnedFd> {
    let descriptor = bpf(command, attributes)?;
    // SAFETY: these commands return a descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn bpf(command: libc::c_long, attributes: Attributes) -> io::Result<i32> {
    #[repr(C, align(8))]
    struct Aligned(Attributes);
    let attributes = Aligned(attributes);
    // SAFETY: the kernel reads the attributes' size in bytes, and follows the pointers in them to a C string or to a
    // buffer of the length given; both outlive the call.
    let outcome =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(&attributes), size_of_val(&attributes)) };
    match i32::try_from(outcome) {
        Ok(descriptor) if descriptor >= 0 => Ok(descriptor),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A 64-bit field in the words of this machine.
fn halves(value: u64) -> [u32; 2] {
    let bytes = value.to_ne_bytes();
    [0, 4].map(|at| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
}
