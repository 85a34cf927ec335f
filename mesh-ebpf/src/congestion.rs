//! Congestion control of connections that do not leave the node: none that paces. BBR arms timers that cost more than all
//! the rest of such a connection (docs/adr/0009-congestion-control.md); user space does the same for its own sockets.

use aya_ebpf::helpers::generated::{bpf_getsockopt, bpf_setsockopt};
use aya_ebpf::programs::SockOpsContext;
use mesh_common::capture;

/// `SOL_TCP` and `TCP_CONGESTION` of `linux/tcp.h`.
const SOL_TCP: i32 = 6;
const TCP_CONGESTION: i32 = 13;

/// Has the socket do without pacing. To be called before the kernel has made it ready to send data: from then on it would
/// go on. Nothing is lost where the kernel refuses.
#[inline(always)]
pub(crate) fn unpace(ctx: &SockOpsContext) {
    let mut name = [0_u8; capture::CONGESTION_NAME];
    // SAFETY: a valid context, and a buffer of the length that is said.
    let known =
        unsafe { bpf_getsockopt(ctx.ops.cast(), SOL_TCP, TCP_CONGESTION, name.as_mut_ptr().cast(), name.len() as i32) };
    if known != 0 || !capture::paces(&name) {
        return;
    }
    let _refused = choose(ctx, *b"cubic\0") != 0 && choose(ctx, *b"reno\0\0") != 0;
}

#[inline(always)]
fn choose(ctx: &SockOpsContext, mut name: [u8; 6]) -> i64 {
    // SAFETY: as above.
    unsafe { bpf_setsockopt(ctx.ops.cast(), SOL_TCP, TCP_CONGESTION, name.as_mut_ptr().cast(), name.len() as i32) }
}
