//! sock_ops: hands a captured connection's original destination to the daemon, and reports the connection's end.

use crate::maps::{self, ORIG, TUPLES};
use crate::{carried, congestion, context, emit};
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::capture;
use mesh_common::event::CloseRecord;
use mesh_common::flow::{OriginalDestination, TupleKey};
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::service::BypassKey;

/// `Ok(None)`: nothing of ours. `Err`: something was lost, and what.
#[inline(always)]
pub(crate) fn observe(ctx: &SockOpsContext) -> Result<Option<Outcome>, Outcome> {
    // Most calls are neither (five a connection): leave at once.
    match context::sock_ops_op(ctx) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            if carried::accepted(ctx) || is_delivery(ctx) {
                congestion::unpace(ctx);
            }
            Ok(None)
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            carried::established(ctx);
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// The source port is chosen and the SYN not yet sent: the record precedes the daemon's accept(), also with TCP Fast
/// Open, for which ACTIVE_ESTABLISHED would be too late.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) -> Result<Option<Outcome>, Outcome> {
    let Some(original) = original(ctx) else {
        return Ok(None);
    };
    // To the daemon or a neighbour.
    congestion::unpace(ctx);
    if original.flags() & OriginalDestination::CARRIED != 0 {
        return carried::connecting(ctx, &original);
    }
    TUPLES.insert(tuple_key(ctx, &original), original, 0).map_err(|_| Outcome::TupleLost)?;
    if let Some(announcement) = announcement(ctx, &original) {
        maps::announce(&announcement)?;
    }
    watch_states(ctx);
    Ok(Some(Outcome::TupleRecorded))
}

/// Whether the daemon has dialled: its mark is on the connection (`tcp_fwmark_accept`); in the node's own namespace, where
/// it uses none, the announcement is there until its connect() returns.
#[inline(always)]
fn is_delivery(ctx: &SockOpsContext) -> bool {
    let own_mark = maps::setting(CfgSlot::OwnMark) as u32;
    (own_mark != 0 && context::sock_ops_mark(ctx) == own_mark)
        || maps::is_bypassed(&carried::taken(&context::sock_ops_socket(ctx)))
}

/// Asks for the event of the connection's end.
#[inline(always)]
pub(crate) fn watch_states(ctx: &SockOpsContext) {
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    // It fails only for flags the kernel does not know; this one is older than every other thing used here.
    let _always_ok = ctx.set_cb_flags(flags as i32);
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) -> Result<Option<Outcome>, Outcome> {
    let (old, new) = context::sock_ops_states(ctx);
    if new != BPF_TCP_CLOSE {
        return Ok(None);
    }
    let Some(original) = original(ctx) else {
        return carried::served(ctx, old);
    };
    if original.flags() & OriginalDestination::CARRIED != 0 {
        return carried::closed(ctx, &original, old);
    }
    if old == BPF_TCP_SYN_SENT {
        // Never accepted: nobody else will take the record away. Gone already if the LRU evicted it.
        let _gone = TUPLES.remove(tuple_key(ctx, &original));
    }
    if let Some(announcement) = announcement(ctx, &original) {
        maps::retract(&announcement);
    }
    carried::told(emit::closed(|| close_record(ctx, &original)))
}

#[inline(always)]
fn close_record(ctx: &SockOpsContext, original: &OriginalDestination) -> CloseRecord {
    let socket = context::sock_ops_socket(ctx);
    let counts = context::tcp_counts(ctx);
    CloseRecord::new(
        original.connected_at_ns(),
        // SAFETY: a plain helper call.
        unsafe { bpf_ktime_get_ns() },
        original.netns_cookie(),
        original.cgroup(),
        counts.bytes_acked,
        counts.bytes_received,
        socket.local,
        original.addr(),
        counts.srtt_us,
        counts.retransmits,
        counts.segments_out,
        counts.segments_in,
        original.pid(),
        original.service(),
        socket.local_port_be,
        original.port_be(),
        original.family(),
    )
}

/// What the connect hook recorded for this socket, if it captured it. A copy.
#[inline(always)]
fn original(ctx: &SockOpsContext) -> Option<OriginalDestination> {
    // SAFETY: null or this socket's storage: one aligned record.
    unsafe { original_storage(ctx).as_ref() }.copied()
}

/// Where that record is; null if there is none.
#[inline(always)]
pub(crate) fn original_storage(ctx: &SockOpsContext) -> *mut OriginalDestination {
    let socket = context::sock_ops_sk(ctx);
    if socket.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: the map and the socket are valid for the program's run.
    unsafe { bpf_sk_storage_get((&raw const ORIG).cast_mut().cast(), socket.cast(), core::ptr::null_mut(), 0) }.cast()
}

#[inline(always)]
fn tuple_key(ctx: &SockOpsContext, original: &OriginalDestination) -> TupleKey {
    let socket = context::sock_ops_socket(ctx);
    TupleKey::new(original.netns_cookie(), socket.local, socket.local_port_be)
}

/// A workload may bind another of its addresses than the listener's: sk_lookup sees two addresses then, as for a
/// connection from outside, and must be told; to a listener in the node's own namespace, of every connection.
#[inline(always)]
fn announcement(ctx: &SockOpsContext, original: &OriginalDestination) -> Option<BypassKey> {
    let socket = context::sock_ops_socket(ctx);
    let is_told = original.flags() & OriginalDestination::ANNOUNCED != 0;
    if !is_told && capture::is_self_traffic(socket.local, socket.remote) {
        return None;
    }
    Some(BypassKey::new(socket.local, socket.remote, socket.local_port_be, original.listener_port_be()))
}
