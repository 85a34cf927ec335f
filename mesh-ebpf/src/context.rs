//! What programs read from and write to their contexts: the only pointer arithmetic.
//!
//! The verifier knows a context only by constant offsets from an unmodified pointer. LLVM likes to merge loads of two
//! branches into one load from a computed offset, which the verifier refuses; so every field is read volatile, and all
//! fields of both families are read before any branch chooses between them.

use aya_ebpf::bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockContext, SockOpsContext};
use core::ptr::{read_volatile, write_volatile};
use mesh_common::addr::Ip;

/// Reads a context field.
macro_rules! field {
    ($pointer:expr, $($path:tt)+) => {
        // SAFETY: the kernel passes a valid context, and every field read here exists in 6.1 and later.
        unsafe { read_volatile(&raw const (*$pointer).$($path)+) }
    };
}

/// `AF_INET`.
pub(crate) const AF_INET: u32 = 2;

/// An address family of `bpf_sock_addr`: which fields hold the destination.
pub(crate) trait Family {
    const AF: u16;
    fn address(ctx: &SockAddrContext) -> Ip;
    fn set_address(ctx: &SockAddrContext, address: Ip);
    /// The address that the socket is bound to; unspecified if it is not.
    fn bound(ctx: &SockAddrContext) -> Ip;
}

/// AF_INET sockets.
pub(crate) struct V4;
/// AF_INET6 sockets; a v4-mapped address is one of theirs.
pub(crate) struct V6;

impl Family for V4 {
    const AF: u16 = AF_INET as u16;

    #[inline(always)]
    fn address(ctx: &SockAddrContext) -> Ip {
        let raw: *mut bpf_sock_addr = ctx.sock_addr;
        Ip::from_v4(field!(raw, user_ip4).to_ne_bytes())
    }

    #[inline(always)]
    fn set_address(ctx: &SockAddrContext, address: Ip) {
        // SAFETY: the kernel passes a valid context; `user_ip4` is writable in connect4 and getpeername4.
        unsafe { write_volatile(&raw mut (*ctx.sock_addr).user_ip4, address.words()[3]) };
    }

    #[inline(always)]
    fn bound(ctx: &SockAddrContext) -> Ip {
        Ip::from_v4(field!(socket(ctx), src_ip4).to_ne_bytes())
    }
}

impl Family for V6 {
    const AF: u16 = 10;

    #[inline(always)]
    fn address(ctx: &SockAddrContext) -> Ip {
        let raw: *mut bpf_sock_addr = ctx.sock_addr;
        Ip::from_words([
            field!(raw, user_ip6[0]),
            field!(raw, user_ip6[1]),
            field!(raw, user_ip6[2]),
            field!(raw, user_ip6[3]),
        ])
    }

    #[inline(always)]
    fn set_address(ctx: &SockAddrContext, address: Ip) {
        let [a, b, c, d] = address.words();
        // SAFETY: the kernel passes a valid context; `user_ip6` is writable by words in connect6 and getpeername6.
        unsafe {
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[0], a);
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[1], b);
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[2], c);
            write_volatile(&raw mut (*ctx.sock_addr).user_ip6[3], d);
        }
    }

    #[inline(always)]
    fn bound(ctx: &SockAddrContext) -> Ip {
        let socket = socket(ctx);
        Ip::from_words([
            field!(socket, src_ip6[0]),
            field!(socket, src_ip6[1]),
            field!(socket, src_ip6[2]),
            field!(socket, src_ip6[3]),
        ])
    }
}

/// The destination port, network byte order.
#[inline(always)]
pub(crate) fn port_be(ctx: &SockAddrContext) -> u16 {
    let raw: *mut bpf_sock_addr = ctx.sock_addr;
    field!(raw, user_port) as u16
}

/// Replaces the destination port, network byte order.
#[inline(always)]
pub(crate) fn set_port_be(ctx: &SockAddrContext, port_be: u16) {
    // SAFETY: the kernel passes a valid context; `user_port` is writable, in full width only.
    unsafe { write_volatile(&raw mut (*ctx.sock_addr).user_port, u32::from(port_be)) };
}

/// `IPPROTO_*` of the socket.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    let raw: *mut bpf_sock_addr = ctx.sock_addr;
    field!(raw, protocol)
}

/// The calling socket; never null in sock_addr programs.
#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // Several parts of a program ask; LLVM would compute the field's address once for all of them, and the verifier takes
    // no address within the context.
    let raw: *mut bpf_sock_addr = core::hint::black_box(ctx.sock_addr);
    field!(raw, __bindgen_anon_1.sk)
}

/// The port that the calling socket is bound to, network byte order; 0 if it is not.
#[inline(always)]
pub(crate) fn local_port_be(ctx: &SockAddrContext) -> u16 {
    // Host byte order in the context.
    (field!(socket(ctx), src_port) as u16).to_be()
}

/// SO_MARK of the calling socket.
#[inline(always)]
pub(crate) fn mark(ctx: &SockAddrContext) -> u32 {
    field!(socket(ctx), mark)
}

/// `IPPROTO_*` of a socket that is being made.
#[inline(always)]
pub(crate) fn new_protocol(ctx: &SockContext) -> u32 {
    let raw: *mut bpf_sock = ctx.sock;
    field!(raw, protocol)
}

/// A connection as sock_ops sees it.
pub(crate) struct SockOpsSocket {
    pub(crate) local: Ip,
    /// Network byte order.
    pub(crate) local_port_be: u16,
    /// Where the connect went after the hook.
    pub(crate) remote: Ip,
    /// Network byte order.
    pub(crate) remote_port_be: u16,
}

/// The connection's ends.
#[inline(always)]
pub(crate) fn sock_ops_socket(ctx: &SockOpsContext) -> SockOpsSocket {
    let raw: *mut bpf_sock_ops = ctx.ops;
    let family = field!(raw, family);
    let local_ip4 = field!(raw, local_ip4);
    let local_ip6 =
        [field!(raw, local_ip6[0]), field!(raw, local_ip6[1]), field!(raw, local_ip6[2]), field!(raw, local_ip6[3])];
    let remote_ip4 = field!(raw, remote_ip4);
    let remote_ip6 = [
        field!(raw, remote_ip6[0]),
        field!(raw, remote_ip6[1]),
        field!(raw, remote_ip6[2]),
        field!(raw, remote_ip6[3]),
    ];
    // Host byte order, unlike every other port.
    let local_port = field!(raw, local_port);
    // Network byte order, in the upper half (little endian).
    let remote_port = field!(raw, remote_port);
    let (local, remote) = if family == AF_INET {
        (Ip::from_v4(local_ip4.to_ne_bytes()), Ip::from_v4(remote_ip4.to_ne_bytes()))
    } else {
        (Ip::from_words(local_ip6), Ip::from_words(remote_ip6))
    };
    let remote_port_be = (u32::from_be(remote_port) as u16).to_be();
    SockOpsSocket { local, local_port_be: (local_port as u16).to_be(), remote, remote_port_be }
}

/// The socket of a sock_ops event; null if it is not a full socket.
#[inline(always)]
pub(crate) fn sock_ops_sk(ctx: &SockOpsContext) -> *mut bpf_sock {
    let raw: *mut bpf_sock_ops = ctx.ops;
    field!(raw, __bindgen_anon_2.sk)
}

/// SO_MARK of a sock_ops event's socket; 0 if it is not a full socket.
#[inline(always)]
pub(crate) fn sock_ops_mark(ctx: &SockOpsContext) -> u32 {
    let socket = sock_ops_sk(ctx);
    if socket.is_null() { 0 } else { field!(socket, mark) }
}

/// Which event this is (`BPF_SOCK_OPS_*`).
#[inline(always)]
pub(crate) fn sock_ops_op(ctx: &SockOpsContext) -> u32 {
    let raw: *mut bpf_sock_ops = ctx.ops;
    field!(raw, op)
}

/// The old and the new TCP state of a STATE_CB event.
#[inline(always)]
pub(crate) fn sock_ops_states(ctx: &SockOpsContext) -> (u32, u32) {
    let raw: *mut bpf_sock_ops = ctx.ops;
    (field!(raw, __bindgen_anon_1.args[0]), field!(raw, __bindgen_anon_1.args[1]))
}

/// What the connection has sent so far and what of it is acknowledged, as sequence numbers: the first byte that is not,
/// and the next to be sent.
#[inline(always)]
pub(crate) fn sock_ops_sequence(ctx: &SockOpsContext) -> (u32, u32) {
    let raw: *mut bpf_sock_ops = ctx.ops;
    (field!(raw, snd_una), field!(raw, snd_nxt))
}

/// What TCP counted for a connection.
pub(crate) struct TcpCounts {
    pub(crate) bytes_acked: u64,
    pub(crate) bytes_received: u64,
    pub(crate) srtt_us: u32,
    pub(crate) retransmits: u32,
    pub(crate) segments_out: u32,
    pub(crate) segments_in: u32,
}

/// The connection's counters.
#[inline(always)]
pub(crate) fn tcp_counts(ctx: &SockOpsContext) -> TcpCounts {
    let raw: *mut bpf_sock_ops = ctx.ops;
    TcpCounts {
        bytes_acked: field!(raw, bytes_acked),
        bytes_received: field!(raw, bytes_received),
        // The kernel keeps eighths of a microsecond.
        srtt_us: field!(raw, srtt_us) >> 3,
        retransmits: field!(raw, total_retrans),
        segments_out: field!(raw, segs_out),
        segments_in: field!(raw, segs_in),
    }
}

/// A connection as sk_lookup sees it.
pub(crate) struct Arriving {
    pub(crate) protocol: u32,
    pub(crate) remote: Ip,
    /// Network byte order.
    pub(crate) remote_port_be: u16,
    pub(crate) local: Ip,
    /// Host byte order.
    pub(crate) local_port: u32,
}

/// The connection whose listener is being looked up.
#[inline(always)]
pub(crate) fn arriving(ctx: &SkLookupContext) -> Arriving {
    let raw: *mut bpf_sk_lookup = ctx.lookup;
    let family = field!(raw, family);
    let protocol = field!(raw, protocol);
    let remote_ip4 = field!(raw, remote_ip4);
    let remote_ip6 = [
        field!(raw, remote_ip6[0]),
        field!(raw, remote_ip6[1]),
        field!(raw, remote_ip6[2]),
        field!(raw, remote_ip6[3]),
    ];
    let remote_port_be = field!(raw, remote_port);
    let local_ip4 = field!(raw, local_ip4);
    let local_ip6 =
        [field!(raw, local_ip6[0]), field!(raw, local_ip6[1]), field!(raw, local_ip6[2]), field!(raw, local_ip6[3])];
    let local_port = field!(raw, local_port);
    let (remote, local) = if family == AF_INET {
        (Ip::from_v4(remote_ip4.to_ne_bytes()), Ip::from_v4(local_ip4.to_ne_bytes()))
    } else {
        (Ip::from_words(remote_ip6), Ip::from_words(local_ip6))
    };
    Arriving { protocol, remote, remote_port_be, local, local_port }
}
