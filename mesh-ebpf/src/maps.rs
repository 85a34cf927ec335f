//! Every map of the object, as `mesh_common::maps` declares it (a test holds the two together).

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use mesh_common::addr::{Endpoint, Ip};
use mesh_common::flow::{Admitted, OriginalDestination, TupleKey};
use mesh_common::maps::{self, CfgSlot};
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::EVERYONE;
use mesh_common::policy::{Matched, VerdictKey};
use mesh_common::service::{
    AppPort, AppPortKey, Backend, BypassKey, CidrAction, CidrKey, DatagramFrontend, Frontend, FrontendKey, PROTO_TCP,
    Pod, RangeKey,
};

#[map]
static CFG: Array<u64> = Array::with_max_entries(maps::CFG.max_entries, 0);
#[map]
pub(crate) static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);
#[map]
static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(maps::PODS.max_entries, BPF_F_NO_PREALLOC);
#[map]
static SVC: HashMap<FrontendKey, Frontend> = HashMap::with_max_entries(maps::SVC.max_entries, BPF_F_NO_PREALLOC);
#[map]
static BACKENDS: HashMap<FrontendKey, Backend> =
    HashMap::with_max_entries(maps::BACKENDS.max_entries, BPF_F_NO_PREALLOC);
#[map]
static CIDR: LpmTrie<CidrKey, CidrAction> = LpmTrie::with_max_entries(maps::CIDR.max_entries, BPF_F_NO_PREALLOC);
#[btf_map]
pub(crate) static ORIG: SkStorage<OriginalDestination> = SkStorage::new();
#[map]
pub(crate) static TUPLES: LruHashMap<TupleKey, OriginalDestination> =
    LruHashMap::with_max_entries(maps::TUPLES.max_entries, 0);
#[map]
static APPPORTS: HashMap<AppPortKey, AppPort> =
    HashMap::with_max_entries(maps::APPPORTS.max_entries, BPF_F_NO_PREALLOC);
#[map]
static BYPASS: LruHashMap<BypassKey, u64> = LruHashMap::with_max_entries(maps::BYPASS.max_entries, 0);
#[map]
static ADMITTED: LruHashMap<BypassKey, Admitted> = LruHashMap::with_max_entries(maps::ADMITTED.max_entries, 0);
#[map]
static FAILING: LruHashMap<Endpoint, u64> = LruHashMap::with_max_entries(maps::FAILING.max_entries, 0);
#[btf_map]
pub(crate) static SERVED: SkStorage<u64> = SkStorage::new();
#[map]
static HOSTS: HashMap<u64, Pod> = HashMap::with_max_entries(maps::HOSTS.max_entries, BPF_F_NO_PREALLOC);
#[btf_map]
pub(crate) static OWNER: SkStorage<u64> = SkStorage::new();
#[map]
static VERDICTS: HashMap<VerdictKey, Matched> =
    HashMap::with_max_entries(maps::VERDICTS.max_entries, BPF_F_NO_PREALLOC);
#[map]
static RANGES: LpmTrie<RangeKey, u32> = LpmTrie::with_max_entries(maps::RANGES.max_entries, BPF_F_NO_PREALLOC);
#[map]
static DATAGRAMS: HashMap<Endpoint, DatagramFrontend> =
    HashMap::with_max_entries(maps::DATAGRAMS.max_entries, BPF_F_NO_PREALLOC);
#[map]
static ALIASES: HashMap<Endpoint, Endpoint> = HashMap::with_max_entries(maps::ALIASES.max_entries, BPF_F_NO_PREALLOC);
#[map]
static CALLERS: HashMap<BypassKey, Endpoint> = HashMap::with_max_entries(maps::CALLERS.max_entries, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(maps::EVENTS_BYTES, 0);

/// A setting; 0 until the daemon has written it.
#[inline(always)]
pub(crate) fn setting(slot: CfgSlot) -> u64 {
    match CFG.get_ptr(slot as u32) {
        // SAFETY: the array's element lives as long as the map; the daemon writes it concurrently, hence volatile.
        Some(value) => unsafe { value.read_volatile() },
        None => 0,
    }
}

/// The workload of a network namespace. A copy: the entry may be removed while the program runs.
#[inline(always)]
pub(crate) fn pod(netns_cookie: u64) -> Option<Pod> {
    // SAFETY: without preallocation a removed element is freed after a grace period, which this program holds off.
    unsafe { PODS.get(netns_cookie) }.copied()
}

/// The workload of a cgroup in the node's own network namespace. A copy, as for `pod`.
#[inline(always)]
pub(crate) fn host(cgroup: u64) -> Option<Pod> {
    // SAFETY: as for `pod`.
    unsafe { HOSTS.get(cgroup) }.copied()
}

/// The header of a TCP frontend.
#[inline(always)]
pub(crate) fn frontend(addr: Ip, port_be: u16) -> Option<Frontend> {
    // SAFETY: as for `pod`.
    unsafe { SVC.get(FrontendKey::new(addr, port_be, PROTO_TCP, 0)) }.copied()
}

/// A backend of a TCP frontend on this node.
#[inline(always)]
pub(crate) fn backend(addr: Ip, port_be: u16, slot: u32) -> Option<Backend> {
    // SAFETY: as for `pod`.
    unsafe { BACKENDS.get(FrontendKey::new(addr, port_be, PROTO_TCP, slot)) }.copied()
}

/// Until when the daemon picks in place of this backend, CLOCK_MONOTONIC nanoseconds; 0 if it does not fail.
#[inline(always)]
pub(crate) fn failing_until(backend: &Endpoint) -> u64 {
    // SAFETY: an aligned number, whatever becomes of the entry meanwhile: the LRU reuses entries and frees none.
    FAILING.get_ptr(backend).map_or(0, |until| unsafe { until.read_volatile() })
}

/// Has the daemon pick in place of this backend for a while.
#[inline(always)]
pub(crate) fn fails(backend: &Endpoint, until: u64) {
    // Without it the kernel goes on trying: no worse than before.
    let _unheeded = FAILING.insert(backend, until, 0);
}

/// The action of the longest prefix that holds `addr`.
#[inline(always)]
pub(crate) fn range(addr: Ip) -> Option<CidrAction> {
    CIDR.get(Key::new(128, CidrKey::new(addr))).copied()
}

/// Mode and policy group of a local workload's port: the port's own, else the address's default.
#[inline(always)]
pub(crate) fn app_port(addr: Ip, port_be: u16) -> Option<AppPort> {
    // SAFETY: as for `pod`.
    if let Some(port) = unsafe { APPPORTS.get(AppPortKey::new(addr, port_be)) } {
        return Some(*port);
    }
    // SAFETY: as for `pod`.
    unsafe { APPPORTS.get(AppPortKey::new(addr, 0)) }.copied()
}

/// The class of a source address among the rules of a policy group; [`EVERYONE`] if none names it.
#[inline(always)]
pub(crate) fn class(group: u32, addr: Ip) -> u32 {
    const ALL_BITS: u32 = 32 + 128;
    RANGES.get(Key::new(ALL_BITS, RangeKey::new(group, addr))).copied().unwrap_or(EVERYONE)
}

/// What a policy group's rules say about one source and port.
#[inline(always)]
pub(crate) fn matched(key: &VerdictKey) -> Option<Matched> {
    // SAFETY: as for `pod`.
    unsafe { VERDICTS.get(key) }.copied()
}

/// What guards a port of the node's own network namespace: at this address, else at any.
#[inline(always)]
pub(crate) fn node_app_port(addr: Ip, port_be: u16) -> Option<AppPort> {
    // SAFETY: as for `pod`.
    if let Some(port) = unsafe { APPPORTS.get(AppPortKey::new(addr, port_be)) } {
        return Some(*port);
    }
    // SAFETY: as for `pod`.
    unsafe { APPPORTS.get(AppPortKey::new(Ip::UNSPECIFIED, port_be)) }.copied()
}

/// Whether this connection was announced: by the daemon as its own delivery, or by [`announce`].
#[inline(always)]
pub(crate) fn is_bypassed(key: &BypassKey) -> bool {
    BYPASS.get_ptr(key).is_some()
}

/// Announces a captured connection whose ends do not show that it stays inside its workload.
#[inline(always)]
pub(crate) fn announce(key: &BypassKey) -> Result<(), Outcome> {
    BYPASS.insert(key, 1, 0).map_err(|_| Outcome::TupleLost)
}

/// Takes an announcement back.
#[inline(always)]
pub(crate) fn retract(key: &BypassKey) {
    // Gone already if the LRU evicted it.
    let _gone = BYPASS.remove(key);
}

/// Admits a connection that the kernel carries, as its destination will see it.
#[inline(always)]
pub(crate) fn admit(key: &BypassKey, admitted: &Admitted) -> Result<(), Outcome> {
    ADMITTED.insert(key, admitted, 0).map_err(|_| Outcome::AdmissionLost)
}

/// Who is behind a connection that the kernel carries. A copy.
#[inline(always)]
pub(crate) fn admitted(key: &BypassKey) -> Option<Admitted> {
    // SAFETY: the LRU reuses entries and frees none. One that is reused while it is read was the oldest of thousands.
    unsafe { ADMITTED.get(key) }.copied()
}

/// Notes that the destination's socket reports its end.
#[inline(always)]
pub(crate) fn mark_served(key: &BypassKey) {
    if let Some(admitted) = ADMITTED.get_ptr_mut(key) {
        // SAFETY: an aligned element that outlives the program, as for `admitted`.
        unsafe { (*admitted).mark_served() };
    }
}

/// Notes that the destination has answered.
#[inline(always)]
pub(crate) fn mark_established(key: &BypassKey) {
    if let Some(admitted) = ADMITTED.get_ptr_mut(key) {
        // SAFETY: as for `mark_served`.
        unsafe { (*admitted).mark_established() };
    }
}

/// Takes an admission back. `false`: the LRU has evicted it.
#[inline(always)]
pub(crate) fn dismiss(key: &BypassKey) -> bool {
    ADMITTED.remove(key).is_ok()
}

/// A UDP frontend. A copy, as for `pod`.
#[inline(always)]
pub(crate) fn datagram_frontend(addr: Ip, port_be: u16) -> Option<DatagramFrontend> {
    // SAFETY: as for `pod`.
    unsafe { DATAGRAMS.get(Endpoint::new(addr, port_be)) }.copied()
}

/// What guards a UDP port of a local workload.
#[inline(always)]
pub(crate) fn datagram_port(addr: Ip, port_be: u16) -> Option<AppPort> {
    // SAFETY: as for `pod`.
    unsafe { APPPORTS.get(AppPortKey::datagram(addr, port_be)) }.copied()
}

/// Whom an alias stands for.
#[inline(always)]
pub(crate) fn alias(alias: &Endpoint) -> Option<Endpoint> {
    // SAFETY: as for `pod`.
    unsafe { ALIASES.get(alias) }.copied()
}

/// The alias of a caller (remote) whose datagrams the daemon delivers to a workload's port (local).
#[inline(always)]
pub(crate) fn caller(key: &BypassKey) -> Option<Endpoint> {
    // SAFETY: as for `pod`.
    unsafe { CALLERS.get(key) }.copied()
}
