//! Who is captured, and where to: workloads of this node, service frontends, address ranges, workload ports.

use crate::abi::pod;
use crate::addr::Ip;

/// `IPPROTO_TCP`.
pub const PROTO_TCP: u16 = 6;

pod! {
    /// Value of `PODS` (key: netns cookie): a workload of this node whose connects are captured.
    pub struct Pod [40] {
        /// The workload's IPv4 address, or unspecified: where its in-pod IPv4 listener is bound.
        ip4: Ip,
        /// The workload's IPv6 address, or unspecified.
        ip6: Ip,
        /// Index of the workload in the daemon's tables; for telemetry.
        workload: u32,
        /// Outbound listener port, network byte order.
        outbound_port_be: u16,
        flags: u16,
    }
}

impl Pod {
    /// While the daemon is dead, connects go straight to their destination instead of being refused.
    pub const FAIL_OPEN: u16 = 1;
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
    /// Value of `SVC`, slot 0: which service this frontend belongs to and how many backends it has. Further slots are
    /// for backends that the kernel itself picks.
    pub struct Frontend [16] {
        service: u32,
        /// Number of usable backends; 0 refuses the connect at once.
        backends: u32,
        /// Reserved for slots other than 0.
        backend: u32,
        flags: u32,
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
    pub struct CidrAction [4] {
        action: u32,
    }
}

impl CidrAction {
    /// The range is left alone even if a shorter prefix is captured.
    pub const PASS: Self = Self::new(1);
    /// Addresses of meshed workloads: captured like a frontend.
    pub const CAPTURE: Self = Self::new(2);
}

pod! {
    /// Key of `APPPORTS`: a local workload's address and port; port 0 holds the address's default.
    pub struct AppPortKey [20] {
        addr: Ip,
        port_be: u16,
        ; reserved pad: [u8; 2]
    }
}

pod! {
    /// Value of `APPPORTS`: a [`crate::policy::Mode`] as a number.
    pub struct AppPort [4] {
        mode: u32,
    }
}

pod! {
    /// Key of `BYPASS`: a connection that `sk_lookup` lets pass. The daemon makes it to a local workload, or a
    /// workload's captured connection makes it to the daemon's listener from another address than the listener's.
    pub struct BypassKey [36] {
        remote: Ip,
        local: Ip,
        remote_port_be: u16,
        local_port_be: u16,
    }
}
