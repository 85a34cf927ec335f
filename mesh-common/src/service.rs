//! Who is captured, and where to: workloads of this node, service frontends, address ranges, workload ports.

use crate::abi::pod;
use crate::addr::{Endpoint, Ip};

/// `IPPROTO_TCP`.
pub const PROTO_TCP: u16 = 6;
/// `IPPROTO_UDP`.
pub const PROTO_UDP: u16 = 17;

pod! {
    /// Value of `PODS` (key: netns cookie) and of `HOSTS` (key: cgroup id): a workload of this node whose connects are
    /// captured.
    pub struct Pod [76] {
        /// The workload's IPv4 address, or unspecified: where its in-pod IPv4 listener is bound.
        ip4: Ip,
        /// The workload's IPv6 address, or unspecified.
        ip6: Ip,
        /// Index of the workload in the daemon's tables; for telemetry.
        workload: u32,
        /// Outbound listener port, network byte order.
        outbound_port_be: u16,
        flags: u16,
        /// The number of its identity as a source in `VERDICTS`.
        identity: u32,
        /// The first of its IPv4 aliases ([`crate::datagram`]), or unspecified: its UDP over IPv4 is not captured.
        alias4: Ip,
        /// The first of its IPv6 aliases, or unspecified. Random, and known in this workload only.
        alias6: Ip,
    }
}

impl Pod {
    /// While the daemon is dead, connects go straight to their destination instead of being refused.
    pub const FAIL_OPEN: u16 = 1;
    /// It runs in its node's own network namespace: its address is its node's, and others have it too.
    pub const HOST_NETWORK: u16 = 2;
}

pod! {
    /// Key of `SVC`: a frontend (virtual ip:port) and a slot; slot 0 is its header.
    pub struct FrontendKey [24] {
        addr: Ip,
        port_be: u16,
        protocol: u16,
        slot: u32,
    }
}

pod! {
    /// Value of `SVC`, slot 0: which service this frontend belongs to and how many backends it has. Those that the
    /// kernel itself may pick are in `BACKENDS`, from slot 1 on.
    pub struct Frontend [28] {
        /// 0 for the declared port of a workload in its node's own network namespace.
        service: u32,
        /// Number of usable backends; 0 refuses the connect at once.
        backends: u32,
        /// The policy group that all backends share, or 0: the proxy decides once it has picked one.
        group: u32,
        /// With a group: the port that the backends' rules see, network byte order.
        target_port_be: u16,
        flags: u16,
        /// What the kernel draws from: the weights of the backends here that it may pick, and of all that its draw is
        /// between. Scaled, where the sum would not fit.
        total_weight: u32,
        /// The part of it that the backends in `BACKENDS` have.
        local_weight: u32,
        /// How many slots of `BACKENDS` this frontend has; 0: the daemon picks.
        local_slots: u32,
    }
}

impl Frontend {
    /// Backends that the kernel can choose from: what a search of [`SLOT_STEPS`] steps finds. With more of them on a
    /// node, the daemon picks.
    pub const MAX_SLOTS: u32 = 1_023;
    /// Steps of the search: each halves what is left.
    pub const SLOT_STEPS: u32 = 10;
}

pod! {
    /// Value of `BACKENDS` (key: as `SVC`, slots from 1 on): a backend in a pod of this node.
    pub struct Backend [24] {
        addr: Ip,
        port_be: u16,
        flags: u16,
        /// The sum of the weights of this slot and those before it.
        cumulative: u32,
    }
}

impl Backend {
    #[inline(always)]
    #[must_use]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint::new(self.addr, self.port_be)
    }
}

pod! {
    /// Data of the `CIDR` LPM trie's key; the prefix length counts within these 128 bits (IPv4: 96 + n).
    pub struct CidrKey [16] {
        addr: Ip,
    }
}

pod! {
    /// Value of `CIDR`.
    pub struct CidrAction [8] {
        action: u32,
        /// Policy group of the workload that has the address, or 0.
        group: u32,
    }
}

impl CidrAction {
    /// The range is left alone even if a shorter prefix is captured.
    pub const PASS: Self = Self::new(Self::PASSES, 0);
    /// Addresses of meshed workloads: captured like a frontend.
    pub const CAPTURE: Self = Self::capture(0);
    const PASSES: u32 = 1;
    const CAPTURES: u32 = 2;
    const CARRIES: u32 = 3;

    /// Captures an address whose workload is in a policy group.
    #[must_use]
    pub const fn capture(group: u32) -> Self {
        Self::new(Self::CAPTURES, group)
    }

    /// The address of a workload in a pod of this node: the kernel carries what goes there.
    #[must_use]
    pub const fn carry(group: u32) -> Self {
        Self::new(Self::CARRIES, group)
    }

    /// Whether connects to the address go into the mesh.
    #[inline(always)]
    #[must_use]
    pub const fn is_meshed(&self) -> bool {
        self.action == Self::CAPTURES || self.action == Self::CARRIES
    }

    /// Whether the kernel itself carries them.
    #[inline(always)]
    #[must_use]
    pub const fn is_carried(&self) -> bool {
        self.action == Self::CARRIES
    }
}

pod! {
    /// Key of `APPPORTS`: a local workload's address and port; port 0 holds the address's default. In the node's own
    /// namespace there is no default, and an unspecified address holds what is said of a port at any of its addresses.
    ///
    /// The reserved bytes are zero for what is said of TCP; [`AppPortKey::datagram`] names a UDP port.
    pub struct AppPortKey [20] {
        addr: Ip,
        port_be: u16,
        ; reserved pad: [u8; 2]
    }
}

impl AppPortKey {
    /// A UDP port that a service leads to. There is no default: other UDP ports are not guarded, for they may be those
    /// of the workload's own calls, whose answers come without a connection.
    #[inline(always)]
    #[must_use]
    pub const fn datagram(addr: Ip, port_be: u16) -> Self {
        Self { addr, port_be, pad: PROTO_UDP.to_ne_bytes() }
    }
}

pod! {
    /// Value of `DATAGRAMS` (key: address and UDP port): a frontend whose datagrams are captured.
    pub struct DatagramFrontend [20] {
        /// 0 for a workload's own address.
        service: u32,
        /// Number of usable backends; 0 refuses at once.
        backends: u32,
        /// The policy group that all backends share, or 0: the proxy decides once it has picked one.
        group: u32,
        /// Stands for the frontend in the address that a datagram is redirected to.
        number: u32,
        /// With a group: the port that the backends' rules see, network byte order.
        target_port_be: u16,
        flags: u16,
    }
}

pod! {
    /// Value of `APPPORTS`: a [`crate::policy::Mode`] as a number, and the workload's policy group.
    pub struct AppPort [8] {
        mode: u32,
        group: u32,
    }
}

pod! {
    /// Data of the `RANGES` LPM trie's key: a policy group, all of whose 32 bits count, and a source address (prefix
    /// length 32 + 96 + n for IPv4). The value is the address's class ([`crate::policy::source::CLASS`] is set): which
    /// of the group's rules hold for it is filed under that number.
    pub struct RangeKey [20] {
        group: u32,
        addr: Ip,
    }
}

pod! {
    /// Key of `BYPASS` and `ADMITTED`: a connection as its destination sees it. In `BYPASS`: one that `sk_lookup` lets pass. The daemon makes it to a local workload, or a
    /// workload's captured connection makes it to the daemon's listener from another address than the listener's.
    pub struct BypassKey [36] {
        remote: Ip,
        local: Ip,
        remote_port_be: u16,
        local_port_be: u16,
    }
}
