//! A captured connection's record on its way from the connect hook to the daemon.

use crate::abi::pod;
use crate::addr::{Endpoint, Ip};

pod! {
    /// What the connect hook knew: kept in the socket's `ORIG` storage, copied to `TUPLES` by sock_ops, read (and
    /// deleted) by the daemon when it accepts.
    pub struct OriginalDestination [56] {
        /// CLOCK_MONOTONIC nanoseconds (`bpf_ktime_get_ns`) of the connect.
        connected_at_ns: u64,
        netns_cookie: u64,
        /// cgroup of the process that called connect(); telemetry only: file descriptors can be passed. In the node's
        /// own namespace: the cgroup of the workload that made the socket and called, which is who it is.
        cgroup: u64,
        addr: Ip,
        /// Process id (tgid) that called connect(); telemetry only.
        pid: u32,
        /// Service of the frontend, or 0 for a workload address.
        service: u32,
        /// Network byte order.
        port_be: u16,
        /// `AF_INET` or `AF_INET6` of the *socket*.
        family: u16,
        /// Where the hook rewrote the connect to: the listener's port, network byte order.
        listener_port_be: u16,
        flags: u16,
    }
}

impl OriginalDestination {
    /// The caller is a workload in the node's own namespace, whose listener is within reach of everything there:
    /// `sk_lookup` admits announced connections to it only.
    pub const ANNOUNCED: u16 = 1;
    /// The kernel carries the connection: the hook rewrote it to a backend on this node, not to the daemon.
    pub const CARRIED: u16 = 2;
    /// The kernel's draw fell on backends that are not on this node: the daemon is to pick one of those.
    pub const ELSEWHERE: u16 = 4;
    /// The connection that the kernel carries was answered by its destination.
    pub const ESTABLISHED: u16 = 8;

    /// Touches the flags alone.
    #[inline(always)]
    pub const fn mark_established(&mut self) {
        self.flags |= Self::ESTABLISHED;
    }

    #[inline(always)]
    #[must_use]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint::new(self.addr(), self.port_be())
    }
}

pod! {
    /// Value of `ADMITTED` (key: [`crate::service::BypassKey`]): a connection that the kernel carries, as long as its
    /// source's socket lives. Written before the SYN leaves; `sk_lookup` at the destination believes nothing else.
    pub struct Admitted [56] {
        /// CLOCK_MONOTONIC nanoseconds of the connect.
        connected_at_ns: u64,
        /// The address that the source speaks under: its own in the catalog, whatever the packets have.
        speaker: Ip,
        /// What the application connected to.
        destination: Ip,
        /// The number of the source's identity.
        identity: u32,
        /// Service of the frontend, or 0 for a workload's address.
        service: u32,
        pid: u32,
        destination_port_be: u16,
        flags: u16,
    }
}

impl Admitted {
    /// The destination's socket reports its end, too.
    pub const SERVED: u16 = 1;
    /// The destination has answered.
    pub const ESTABLISHED: u16 = 2;

    /// Touches the flags alone: whoever else has the entry meanwhile keeps the rest of it.
    #[inline(always)]
    pub const fn mark_served(&mut self) {
        self.flags |= Self::SERVED;
    }

    /// Likewise.
    #[inline(always)]
    pub const fn mark_established(&mut self) {
        self.flags |= Self::ESTABLISHED;
    }
}

pod! {
    /// Key of `TUPLES`: the connection as the accepting listener sees it.
    pub struct TupleKey [32] {
        netns_cookie: u64,
        source: Ip,
        source_port_be: u16,
        ; reserved pad: [u8; 6]
    }
}
