//! cgroup/getpeername4 and 6: a captured socket answers with the address that the application connected to.

use crate::context::{self, Family};
use crate::maps::ORIG;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::flow::OriginalDestination;
use mesh_common::outcome::Outcome;

/// Rewrites the answer if the socket was captured.
#[inline(always)]
pub(crate) fn answer<F: Family>(ctx: &SockAddrContext) -> Option<Outcome> {
    // SAFETY: the map and the socket are valid for the program's run.
    let original = unsafe {
        bpf_sk_storage_get((&raw const ORIG).cast_mut().cast(), context::socket(ctx).cast(), core::ptr::null_mut(), 0)
    }
    .cast::<OriginalDestination>();
    // SAFETY: null or this socket's storage: one aligned record.
    let original = unsafe { original.as_ref() }?;
    F::set_address(ctx, original.addr());
    context::set_port_be(ctx, original.port_be());
    Some(Outcome::PeernameRewritten)
}
