//! sock_ops of connections that the kernel carries between workloads of this node: admitted at the destination before
//! the SYN leaves, and told of, at both ends, when they begin and end.

use crate::context::{self, SockOpsSocket};
use crate::maps::{self, SERVED};
use crate::{emit, sock_ops};
use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_SYN_SENT};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::addr::{Endpoint, Ip};
use mesh_common::capture;
use mesh_common::event::{self, FlowRecord};
use mesh_common::flow::{Admitted, OriginalDestination};
use mesh_common::outcome::Outcome;
use mesh_common::service::{BypassKey, Pod};

/// The source is about to send its SYN.
#[inline(always)]
pub(crate) fn connecting(ctx: &SockOpsContext, original: &OriginalDestination) -> Result<Option<Outcome>, Outcome> {
    // A workload that has been disarmed since connect() is none any more.
    let pod = caller(original).ok_or(Outcome::AdmissionLost)?;
    let socket = context::sock_ops_socket(ctx);
    let admitted = Admitted::new(
        original.connected_at_ns(),
        capture::own_address(&pod, socket.remote),
        original.addr(),
        pod.identity(),
        original.service(),
        original.pid(),
        original.port_be(),
        0,
    );
    maps::admit(&dialled(&socket), &admitted)?;
    sock_ops::watch_states(ctx);
    Ok(Some(Outcome::FlowAdmitted))
}

/// The source's socket is connected. TCP_REPAIR connects without a SYN (kernel: `tcp_connect` calls this hook all the
/// same): where nothing has come in, nobody has answered.
#[inline(always)]
pub(crate) fn established(ctx: &SockOpsContext) {
    // SAFETY: null or this socket's storage, one aligned record; nobody else changes it while the socket is locked.
    let Some(original) = (unsafe { sock_ops::original_storage(ctx).as_mut() }) else {
        return;
    };
    if original.flags() & OriginalDestination::CARRIED == 0 || context::tcp_counts(ctx).segments_in == 0 {
        return;
    }
    original.mark_established();
    let original = *original;
    let socket = context::sock_ops_socket(ctx);
    maps::mark_established(&dialled(&socket));
    let identity = caller(&original).map_or(0, |pod| pod.identity());
    if !emit::flow(|| flow(ctx, &socket, &original, identity, FlowRecord::OPENED), false) {
        emit::count(Outcome::OpenLost);
    }
}

/// The source's socket closes.
#[inline(always)]
pub(crate) fn closed(
    ctx: &SockOpsContext,
    original: &OriginalDestination,
    old: u32,
) -> Result<Option<Outcome>, Outcome> {
    let socket = context::sock_ops_socket(ctx);
    let key = dialled(&socket);
    let (identity, served) = match maps::admitted(&key) {
        Some(admitted) => (admitted.identity(), admitted.flags() & Admitted::SERVED != 0),
        None => (caller(original).map_or(0, |pod| pod.identity()), false),
    };
    if !maps::dismiss(&key) {
        emit::count(Outcome::AdmissionEvicted);
    }
    if old != BPF_TCP_SYN_SENT && original.flags() & OriginalDestination::ESTABLISHED == 0 {
        // Nobody was ever asked: see `established`.
        return Ok(None);
    }
    let mut flags = ending(ctx, old);
    if served {
        flags |= FlowRecord::SERVED;
    }
    if old == BPF_TCP_SYN_SENT {
        flags |= FlowRecord::UNANSWERED;
        let counts = context::tcp_counts(ctx);
        if capture::speaks_against(counts.segments_in, counts.retransmits) {
            let backend = Endpoint::new(socket.remote, socket.remote_port_be);
            maps::fails(&backend, now() + capture::FAILING_NS);
        }
    }
    told(emit::flow(|| flow(ctx, &socket, original, identity, flags), true))
}

/// A connection was accepted: if the kernel carries it, its end here will be told, too. Says whether it does.
#[inline(always)]
pub(crate) fn accepted(ctx: &SockOpsContext) -> bool {
    let socket = context::sock_ops_socket(ctx);
    let key = taken(&socket);
    let Some(admitted) = maps::admitted(&key) else {
        return false;
    };
    let Some(made) = storage(ctx, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) else {
        // What it sends will be what the source has received.
        return true;
    };
    // SAFETY: not null, so it is this socket's storage: one aligned number.
    unsafe { made.write(admitted.connected_at_ns()) };
    sock_ops::watch_states(ctx);
    maps::mark_served(&key);
    true
}

/// A socket closes that did not dial.
#[inline(always)]
pub(crate) fn served(ctx: &SockOpsContext, old: u32) -> Result<Option<Outcome>, Outcome> {
    let Some(made) = storage(ctx, 0) else {
        return Ok(None);
    };
    // SAFETY: as in `accepted`.
    let connected_at_ns = unsafe { made.read() };
    let socket = context::sock_ops_socket(ctx);
    let flags = ending(ctx, old) | FlowRecord::BY_DESTINATION;
    told(emit::flow(
        || {
            let counts = context::tcp_counts(ctx);
            FlowRecord::new(
                connected_at_ns,
                now(),
                0,
                0,
                counts.bytes_acked,
                counts.bytes_received,
                socket.remote,
                socket.local,
                Ip::UNSPECIFIED,
                counts.srtt_us,
                counts.retransmits,
                counts.segments_in,
                0,
                0,
                0,
                socket.remote_port_be,
                socket.local_port_be,
                0,
                flags,
            )
        },
        true,
    ))
}

/// What comes of having told something, or not.
#[inline(always)]
pub(crate) fn told(is_told: bool) -> Result<Option<Outcome>, Outcome> {
    if is_told { Ok(Some(Outcome::EventEmitted)) } else { Err(Outcome::EventLost) }
}

#[inline(always)]
fn ending(ctx: &SockOpsContext, old: u32) -> u16 {
    let (una, next) = context::sock_ops_sequence(ctx);
    if event::is_fin_acked(old, una, next) { FlowRecord::FIN_ACKED } else { 0 }
}

/// What the source's socket reports.
#[inline(always)]
fn flow(
    ctx: &SockOpsContext,
    socket: &SockOpsSocket,
    original: &OriginalDestination,
    identity: u32,
    flags: u16,
) -> FlowRecord {
    let counts = context::tcp_counts(ctx);
    FlowRecord::new(
        original.connected_at_ns(),
        now(),
        original.netns_cookie(),
        original.cgroup(),
        counts.bytes_acked,
        counts.bytes_received,
        socket.local,
        socket.remote,
        original.addr(),
        counts.srtt_us,
        counts.retransmits,
        counts.segments_in,
        original.pid(),
        original.service(),
        identity,
        socket.local_port_be,
        socket.remote_port_be,
        original.port_be(),
        flags,
    )
}

/// The workload that dialled.
#[inline(always)]
fn caller(original: &OriginalDestination) -> Option<Pod> {
    match maps::pod(original.netns_cookie()) {
        Some(pod) => Some(pod),
        None => maps::host(original.cgroup()),
    }
}

/// The connection as its destination sees it, from the socket that dialled.
#[inline(always)]
fn dialled(socket: &SockOpsSocket) -> BypassKey {
    BypassKey::new(socket.local, socket.remote, socket.local_port_be, socket.remote_port_be)
}

/// Likewise, from the socket that was dialled.
#[inline(always)]
pub(crate) fn taken(socket: &SockOpsSocket) -> BypassKey {
    BypassKey::new(socket.remote, socket.local, socket.remote_port_be, socket.local_port_be)
}

/// What this socket has in `SERVED`.
#[inline(always)]
fn storage(ctx: &SockOpsContext, flags: u64) -> Option<*mut u64> {
    let socket = context::sock_ops_sk(ctx);
    if socket.is_null() {
        return None;
    }
    // SAFETY: the map and the socket are valid for the program's run; a null initial value means zeroed.
    let storage = unsafe {
        bpf_sk_storage_get((&raw const SERVED).cast_mut().cast(), socket.cast(), core::ptr::null_mut(), flags)
    }
    .cast::<u64>();
    if storage.is_null() { None } else { Some(storage) }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a plain helper call.
    unsafe { bpf_ktime_get_ns() }
}
