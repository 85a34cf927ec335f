//! bpf(2) calls that aya does not offer: links that can be updated in place, shared map handles without `&mut`, and
//! look-up-and-delete in one call. Every call is a small `repr(C)` prefix of the kernel's `union bpf_attr`; the kernel
//! takes what is missing as zero.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

/// `BPF_ANY`, `BPF_NOEXIST`, `BPF_EXIST`: what a map update demands of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Update {
    Any = 0,
    New = 1,
    Existing = 2,
}

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttachType {
    SockCreate = 2,
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    SkLookup = 36,
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetachAttr {
    link: u32,
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// `struct bpf_map_info`, as far as it is used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MapShape {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

/// `struct bpf_link_info`, as far as it is used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkState {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) program: u32,
    reserved: u32,
    /// cgroup links: the cgroup's id. netns links: the namespace's inode in the first half, the attach type after it.
    target: [u32; 2],
    rest: [u32; 2],
}

const LINK_CGROUP: u32 = 3;
const LINK_NETNS: u32 = 5;

impl LinkState {
    /// What the link is attached to: a cgroup's id or a network namespace's inode; 0 once that is gone.
    pub(super) fn target(&self) -> u64 {
        match self.kind {
            LINK_CGROUP => {
                let [low, high] = self.target.map(u32::to_ne_bytes);
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&low);
                bytes[4..].copy_from_slice(&high);
                u64::from_ne_bytes(bytes)
            }
            LINK_NETNS => u64::from(self.target[0]),
            _ => 0,
        }
    }
}

fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<RawFd> {
    // SAFETY: `attr` is a live repr(C) prefix of bpf_attr and its size is passed; the pointers inside it are made by
    // this module's callers from buffers of the sizes that the map or object has.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor to us (close-on-exec), nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens a pinned map or link.
pub(super) fn get_object(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf(OBJ_GET, &mut ObjectAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 }).map(owned)
}

/// Pins a link at a path of a bpffs.
pub(super) fn pin_object(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(OBJ_PIN, &mut ObjectAttr { path: path.as_ptr() as u64, fd: number(fd), flags: 0 }).map(drop)
}

fn info<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let address = std::ptr::from_mut(&mut info) as u64;
    bpf(OBJ_GET_INFO_BY_FD, &mut InfoAttr { fd: number(fd), length: size_of::<T>() as u32, info: address })?;
    Ok(info)
}

/// What the kernel says about a map.
pub(super) fn map_shape(map: BorrowedFd<'_>) -> io::Result<MapShape> {
    info(map)
}

/// What the kernel says about a link.
pub(super) fn link_state(link: BorrowedFd<'_>) -> io::Result<LinkState> {
    info(link)
}

/// Attaches a program to a cgroup or a network namespace.
pub(super) fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, kind: AttachType) -> io::Result<OwnedFd> {
    let mut attr =
        LinkCreateAttr { program: number(program), target: number(target), attach_type: kind as u32, flags: 0 };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

/// Replaces a link's program at once: no connect() in between runs without one. `ENOLINK`: its target is gone.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link: number(link), program: number(program), flags: 0, old_program: 0 };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link now, whoever else holds it.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut LinkDetachAttr { link: number(link) }).map(drop)
}

fn element<K, V>(map: BorrowedFd<'_>, key: &K, value: *const V, flags: u64) -> ElementAttr {
    ElementAttr { map: number(map), reserved: 0, key: std::ptr::from_ref(key) as u64, value: value as u64, flags }
}

/// `None` where the kernel says ENOENT.
pub(super) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read<K: aya::Pod, V: aya::Pod>(command: libc::c_int, map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::uninit();
    let found = absent(bpf(command, &mut element(map, key, value.as_mut_ptr(), 0)))?;
    // SAFETY: the kernel has filled the value, whose size the table has checked against the map's, and every bit
    // pattern of a Pod is valid.
    Ok(found.map(|_| unsafe { value.assume_init() }))
}

/// Looks a key up. The caller guarantees that `K` and `V` have the map's sizes.
pub(super) fn map_lookup<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    read(MAP_LOOKUP_ELEM, map, key)
}

/// Looks a key up and deletes it (hash maps: kernel 5.14).
pub(super) fn map_take<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    read(MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

/// Every CPU's value of a per-CPU array's element.
pub(super) fn map_lookup_per_cpu(map: BorrowedFd<'_>, index: u32, cpus: usize) -> io::Result<Vec<u64>> {
    let mut values = vec![0_u64; cpus];
    bpf(MAP_LOOKUP_ELEM, &mut element(map, &index, values.as_mut_ptr(), 0))?;
    Ok(values)
}

/// Writes an entry.
pub(super) fn map_update<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
    update: Update,
) -> io::Result<()> {
    bpf(MAP_UPDATE_ELEM, &mut element(map, key, value, update as u64)).map(drop)
}

/// Deletes an entry; `false` if there was none.
pub(super) fn map_delete<K: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    absent(bpf(MAP_DELETE_ELEM, &mut element::<K, u8>(map, key, std::ptr::null(), 0))).map(|found| found.is_some())
}

/// All entries of a hash map or LPM trie. Entries written meanwhile may be missed.
pub(super) fn map_entries<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    map_scan(map, size_of::<K>(), size_of::<V>(), |keys, values| {
        let pairs = keys.chunks_exact(size_of::<K>()).zip(values.chunks_exact(size_of::<V>()));
        entries.extend(pairs.map(|(key, value)| {
            // SAFETY: the slices have the types' sizes, and every bit pattern of a Pod is valid.
            unsafe { (key.as_ptr().cast::<K>().read_unaligned(), value.as_ptr().cast::<V>().read_unaligned()) }
        }));
    })?;
    Ok(entries)
}

/// The number of entries of a hash map or LPM trie.
pub(super) fn map_count(map: BorrowedFd<'_>, key_size: usize, value_size: usize) -> io::Result<u64> {
    let mut count = 0;
    map_scan(map, key_size, value_size, |keys, _| count += (keys.len() / key_size) as u64)?;
    Ok(count)
}

/// Shows `visit` the keys and values of a hash map or LPM trie, some hundred a call.
fn map_scan(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    // A hash map's bucket must fit, or the kernel says ENOSPC; buckets are as many as entries, so they are short.
    const CHUNK: usize = 512;
    // The kernel stores values at multiples of 8 in its memory, but packs them here.
    let (mut keys, mut values) = (vec![0_u8; CHUNK * key_size], vec![0_u8; CHUNK * value_size]);
    // A position is a bucket's number (hash maps) or a key (tries).
    let (mut from, mut to) = (vec![0_u8; key_size.max(4)], vec![0_u8; key_size.max(4)]);
    let mut first = true;
    loop {
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { from.as_ptr() as u64 },
            out_batch: to.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: CHUNK as u32,
            map: number(map),
            element_flags: 0,
            flags: 0,
        };
        let more = absent(bpf(MAP_LOOKUP_BATCH, &mut attr))?.is_some();
        let count = (attr.count as usize).min(CHUNK);
        visit(&keys[..count * key_size], &values[..count * value_size]);
        if !more {
            return Ok(());
        }
        std::mem::swap(&mut from, &mut to);
        first = false;
    }
}

/// Bytes of kernel memory that a map is charged with (fdinfo's `memlock`).
pub(super) fn map_bytes(map: &OwnedFd) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other("the kernel's fdinfo of a map has no memlock line"))
}
