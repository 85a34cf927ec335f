//! cgroup/sock_create, and who calls in the node's own network namespace: there the cgroup says it, of the socket's
//! maker (recorded when it was made) and of its user (who calls connect() now).

use crate::context;
use crate::maps::{self, OWNER};
use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie};
use aya_ebpf::programs::SockContext;
use mesh_common::host::{self, Attribution, LEVELS};
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::service::{PROTO_TCP, Pod};

/// The workload that calls connect().
pub(crate) struct Caller {
    pub(crate) pod: Pod,
    /// See `OriginalDestination::cgroup`.
    pub(crate) cgroup: u64,
    /// Nobody can say that it is this workload's: the connect may not go into the mesh.
    pub(crate) is_handed: bool,
}

/// Records the workload in whose cgroup the socket is made. `Err`: it could not be, and the socket's connects to the
/// mesh will be refused.
#[inline(always)]
pub(crate) fn record_maker(ctx: &SockContext) -> Result<(), Outcome> {
    // SAFETY: a plain helper call with the program's own context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.sock.cast()) };
    if !is_nodes_own(netns_cookie) || context::new_protocol(ctx) != u32::from(PROTO_TCP) {
        return Ok(());
    }
    let Some((cgroup, _)) = current() else {
        return Ok(());
    };
    // SAFETY: the map and the socket are valid for the program's run; a null initial value means zeroed.
    let maker = unsafe {
        bpf_sk_storage_get(
            (&raw const OWNER).cast_mut().cast(),
            ctx.sock.cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<u64>();
    if maker.is_null() {
        return Err(Outcome::OwnerLost);
    }
    // SAFETY: not null, so it is this socket's storage, and nobody else has the socket yet.
    unsafe { maker.write(cgroup) };
    Ok(())
}

/// The workload that calls connect() on a socket of the node's own namespace; `None` elsewhere, and if none has to do
/// with it.
#[inline(always)]
pub(crate) fn caller(socket: *mut bpf_sock, netns_cookie: u64) -> Option<Caller> {
    if !is_nodes_own(netns_cookie) {
        return None;
    }
    let user = current();
    // A workload that has left the mesh is none any more.
    let maker = maker(socket).and_then(|cgroup| maps::host(cgroup).map(|pod| (cgroup, pod)));
    let (user_cgroup, maker_cgroup) = (user.map_or(0, |(cgroup, _)| cgroup), maker.map_or(0, |(cgroup, _)| cgroup));
    let (cgroup, pod) = user.or(maker)?;
    match host::attribute(maker_cgroup, user_cgroup) {
        Attribution::Nobody => None,
        Attribution::Workload(_) => Some(Caller { pod, cgroup, is_handed: false }),
        Attribution::Handed => Some(Caller { pod, cgroup, is_handed: true }),
    }
}

#[inline(always)]
fn is_nodes_own(netns_cookie: u64) -> bool {
    // 0, the setting's value while no workload runs there, is nobody's cookie.
    netns_cookie == maps::setting(CfgSlot::HostNetns)
}

/// The workload of the innermost cgroup around the current process.
#[inline(always)]
fn current() -> Option<(u64, Pod)> {
    let levels = maps::setting(CfgSlot::HostLevels);
    let mut level = LEVELS;
    while level > 0 {
        level -= 1;
        if !host::has_level(levels, level) {
            continue;
        }
        // SAFETY: a plain helper call; 0 where the process's own cgroup is above this level.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if cgroup != 0
            && let Some(pod) = maps::host(cgroup)
        {
            return Some((cgroup, pod));
        }
    }
    None
}

/// The cgroup of the workload that made the socket.
#[inline(always)]
fn maker(socket: *mut bpf_sock) -> Option<u64> {
    // SAFETY: the map and the socket are valid for the program's run.
    let maker =
        unsafe { bpf_sk_storage_get((&raw const OWNER).cast_mut().cast(), socket.cast(), core::ptr::null_mut(), 0) }
            .cast::<u64>();
    // SAFETY: null or this socket's storage: one aligned number, written before anybody had the socket.
    unsafe { maker.as_ref() }.copied()
}
