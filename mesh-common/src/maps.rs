//! Every map of the eBPF object: name, kind, capacity. A test holds this list against the object file.

use crate::addr::{Endpoint, Ip};
use crate::{flow, outcome, policy, service};
use core::mem::size_of;

/// Slots of `CFG`, an array of `u64`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CfgSlot {
    /// CLOCK_MONOTONIC nanoseconds, written by the daemon's accepting loop.
    Heartbeat = 0,
    /// Age in nanoseconds after which the heartbeat is stale; 0 switches the check off.
    HeartbeatTimeout = 1,
    /// [`crate::ABI_VERSION`] of the daemon that created the maps.
    AbiVersion = 2,
    /// SO_MARK of the daemon's own sockets; sockets that carry it are never captured.
    OwnMark = 3,
    /// Port of the daemon's in-pod outbound listeners, host byte order.
    OutboundPort = 4,
    /// errno (positive) of a connect() that policy denies.
    DeniedErrno = 5,
    /// Cookie of the node's own network namespace; 0 while no workload runs in it.
    HostNetns = 6,
    /// Bit n: cgroups of host-network workloads exist at level n of the hierarchy (the root is level 0).
    HostLevels = 7,
}

/// Number of slots in `CFG`.
pub const CFG_SLOTS: u32 = 8;

/// A kind of map; the numbers are the kernel's `enum bpf_map_type`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hash = 1,
    Array = 2,
    PerCpuArray = 6,
    LruHash = 9,
    LpmTrie = 11,
    SkStorage = 24,
    RingBuf = 27,
}

/// A map's declaration.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    pub name: &'static str,
    pub kind: Kind,
    pub key_size: usize,
    pub value_size: usize,
    pub max_entries: u32,
    /// Allocated in full when the map is created (hash and LRU maps; `false` is `BPF_F_NO_PREALLOC`).
    pub preallocated: bool,
}

impl Spec {
    /// Whether a map with these properties is this one; `kind` is a `bpf_map_type`, `flags` are the map's.
    #[must_use]
    pub const fn describes(&self, kind: u32, key_size: u32, value_size: u32, max_entries: u32, flags: u32) -> bool {
        const BPF_F_NO_PREALLOC: u32 = 1;
        kind == self.kind as u32
            && key_size as usize == self.key_size
            && value_size as usize == self.value_size
            && max_entries == self.max_entries
            && (flags & BPF_F_NO_PREALLOC == 0) == self.preallocated
    }
}

pub const MAX_PODS: u32 = 4_096;
pub const MAX_FRONTENDS: u32 = 131_072;
pub const MAX_CIDRS: u32 = 524_288;
/// Connects that no accept() has followed yet: two thirds of a second of what two cores can do (KERNEL: 49k a second).
pub const MAX_TUPLES: u32 = 32_768;
/// Backends on this node, of all frontends.
pub const MAX_BACKENDS: u32 = 32_768;
/// Connections that the kernel carries now.
pub const MAX_ADMITTED: u32 = 16_384;
pub const MAX_FAILING: u32 = 1_024;
pub const MAX_APP_PORTS: u32 = 65_536;
pub const MAX_BYPASS: u32 = 16_384;
pub const MAX_HOSTS: u32 = 256;
pub const MAX_VERDICTS: u32 = 32_768;
pub const MAX_RANGES: u32 = 16_384;
pub const MAX_DATAGRAMS: u32 = 32_768;
/// Frontends that workloads have sent datagrams to, and [`MAX_CALLERS`].
pub const MAX_ALIASES: u32 = 49_152;
/// Datagram flows that the daemon delivers to workloads of the node.
pub const MAX_CALLERS: u32 = 16_384;
/// Bytes; a power of two and a multiple of the page size.
pub const EVENTS_BYTES: u32 = 1 << 20;

pub const CFG: Spec = array("CFG", Kind::Array, size_of::<u64>(), CFG_SLOTS);
pub const OUTCOMES: Spec = array("OUTCOMES", Kind::PerCpuArray, size_of::<u64>(), outcome::Outcome::ALL.len() as u32);
pub const PODS: Spec = hash("PODS", size_of::<u64>(), size_of::<service::Pod>(), MAX_PODS);
pub const SVC: Spec = hash("SVC", size_of::<service::FrontendKey>(), size_of::<service::Frontend>(), MAX_FRONTENDS);
pub const CIDR: Spec = Spec {
    name: "CIDR",
    kind: Kind::LpmTrie,
    key_size: size_of::<u32>() + size_of::<service::CidrKey>(),
    value_size: size_of::<service::CidrAction>(),
    max_entries: MAX_CIDRS,
    preallocated: false,
};
pub const ORIG: Spec = Spec {
    name: "ORIG",
    kind: Kind::SkStorage,
    key_size: size_of::<i32>(),
    value_size: size_of::<flow::OriginalDestination>(),
    max_entries: 0,
    preallocated: false,
};
pub const TUPLES: Spec = lru("TUPLES", size_of::<flow::TupleKey>(), size_of::<flow::OriginalDestination>(), MAX_TUPLES);
pub const APPPORTS: Spec =
    hash("APPPORTS", size_of::<service::AppPortKey>(), size_of::<service::AppPort>(), MAX_APP_PORTS);
pub const BYPASS: Spec = lru("BYPASS", size_of::<service::BypassKey>(), size_of::<u64>(), MAX_BYPASS);
pub const HOSTS: Spec = hash("HOSTS", size_of::<u64>(), size_of::<service::Pod>(), MAX_HOSTS);
pub const OWNER: Spec = Spec {
    name: "OWNER",
    kind: Kind::SkStorage,
    key_size: size_of::<i32>(),
    value_size: size_of::<u64>(),
    max_entries: 0,
    preallocated: false,
};
pub const BACKENDS: Spec =
    hash("BACKENDS", size_of::<service::FrontendKey>(), size_of::<service::Backend>(), MAX_BACKENDS);
pub const ADMITTED: Spec = lru("ADMITTED", size_of::<service::BypassKey>(), size_of::<flow::Admitted>(), MAX_ADMITTED);
/// Backends on this node that did not take a connection lately: until when the daemon picks in their place.
pub const FAILING: Spec = lru("FAILING", size_of::<Endpoint>(), size_of::<u64>(), MAX_FAILING);
/// The destinations' sockets of connections that the kernel carries: when those were made.
pub const SERVED: Spec = Spec {
    name: "SERVED",
    kind: Kind::SkStorage,
    key_size: size_of::<i32>(),
    value_size: size_of::<u64>(),
    max_entries: 0,
    preallocated: false,
};
pub const VERDICTS: Spec =
    hash("VERDICTS", size_of::<policy::VerdictKey>(), size_of::<policy::Matched>(), MAX_VERDICTS);
pub const RANGES: Spec = Spec {
    name: "RANGES",
    kind: Kind::LpmTrie,
    key_size: size_of::<u32>() + size_of::<service::RangeKey>(),
    value_size: size_of::<u32>(),
    max_entries: MAX_RANGES,
    preallocated: false,
};
pub const DATAGRAMS: Spec =
    hash("DATAGRAMS", size_of::<Endpoint>(), size_of::<service::DatagramFrontend>(), MAX_DATAGRAMS);
pub const ALIASES: Spec = hash("ALIASES", size_of::<Endpoint>(), size_of::<Endpoint>(), MAX_ALIASES);
pub const CALLERS: Spec = hash("CALLERS", size_of::<service::BypassKey>(), size_of::<Endpoint>(), MAX_CALLERS);
pub const EVENTS: Spec = Spec {
    name: "EVENTS",
    kind: Kind::RingBuf,
    key_size: 0,
    value_size: 0,
    max_entries: EVENTS_BYTES,
    preallocated: true,
};

/// Every map, once.
pub const ALL: &[Spec] = &[
    CFG, OUTCOMES, PODS, SVC, BACKENDS, CIDR, ORIG, TUPLES, APPPORTS, BYPASS, ADMITTED, FAILING, SERVED, HOSTS, OWNER,
    VERDICTS, RANGES, DATAGRAMS, ALIASES, CALLERS, EVENTS,
];

/// What all maps of a node may take when they are created and empty, in bytes (KERNEL: 64k LRU entries are ~10 MB).
pub const IDLE_BUDGET_BYTES: u64 = 16 << 20;

const fn array(name: &'static str, kind: Kind, value_size: usize, max_entries: u32) -> Spec {
    Spec { name, kind, key_size: size_of::<u32>(), value_size, max_entries, preallocated: true }
}

const fn hash(name: &'static str, key_size: usize, value_size: usize, max_entries: u32) -> Spec {
    Spec { name, kind: Kind::Hash, key_size, value_size, max_entries, preallocated: false }
}

const fn lru(name: &'static str, key_size: usize, value_size: usize, max_entries: u32) -> Spec {
    Spec { name, kind: Kind::LruHash, key_size, value_size, max_entries, preallocated: true }
}

const _: () = assert!(size_of::<Ip>() == 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_are_unique() {
        let mut names = std::collections::BTreeSet::new();
        for spec in ALL {
            assert!(spec.name.len() <= 15, "{} is longer than BPF_OBJ_NAME_LEN allows", spec.name);
            assert!(names.insert(spec.name));
        }
    }

    #[test]
    fn preallocated_maps_stay_within_the_idle_budget() {
        // A preallocated hash element costs key + value, each rounded up to 8, plus ~48 bytes of bookkeeping.
        let bytes: u64 = ALL
            .iter()
            .filter(|spec| spec.preallocated)
            .map(|spec| {
                let element = match spec.kind {
                    Kind::LruHash | Kind::Hash => {
                        spec.key_size.next_multiple_of(8) + spec.value_size.next_multiple_of(8) + 64
                    }
                    Kind::RingBuf => 1,
                    _ => spec.value_size,
                };
                element as u64 * u64::from(spec.max_entries)
            })
            .sum();
        assert!(bytes <= IDLE_BUDGET_BYTES, "preallocated maps take {bytes} bytes");
    }
}
