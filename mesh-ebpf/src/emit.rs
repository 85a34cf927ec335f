//! What programs leave behind: counted outcomes, the errno of a refused connect, debug logs.

use crate::maps::{EVENTS, OUTCOMES};
use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP};
use aya_ebpf::helpers::bpf_set_retval;
use mesh_common::event::{self, CloseRecord, FlowRecord, VerdictRecord};
use mesh_common::outcome::Outcome;

/// Counts an outcome on this CPU.
#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    if let Some(counter) = OUTCOMES.get_ptr_mut(outcome as u32) {
        // Not atomic: stable Rust has no read-modify-write for this target. Per CPU, a count can be lost only if the
        // task is preempted between this load and this store and the next one counts the same outcome there.
        // SAFETY: a map element is 8-byte aligned and outlives the program.
        unsafe { counter.write(counter.read().wrapping_add(1)) };
    }
}

/// Makes the refused connect() fail with `errno` (positive); without it the application would see EPERM.
#[inline(always)]
pub(crate) fn set_errno(errno: i32) {
    // SAFETY: a plain helper call. It fails only for values that are no errno, and those do not occur.
    let _always_zero = unsafe { bpf_set_retval(-errno) };
}

/// Reports a verdict, unless the ring buffer's room is left to close records; then it is counted.
#[inline(always)]
pub(crate) fn verdict(record: &VerdictRecord) {
    let queued = queued();
    if !event::has_room_for_verdict(queued) || EVENTS.output::<VerdictRecord>(record, calling(queued)).is_err() {
        count(Outcome::VerdictLost);
    }
}

/// Tells of a connection that the kernel carries; of one that begins only if there is room as for a verdict. `false`: it
/// could not.
#[inline(always)]
pub(crate) fn flow(record: impl FnOnce() -> FlowRecord, is_end: bool) -> bool {
    let queued = queued();
    if !is_end && !event::has_room_for_verdict(queued) {
        return false;
    }
    let Some(mut entry) = EVENTS.reserve::<FlowRecord>(0) else {
        return false;
    };
    entry.write(record());
    entry.submit(calling(queued));
    true
}

/// Tells of a captured connection's end. `false`: it could not.
#[inline(always)]
pub(crate) fn closed(record: impl FnOnce() -> CloseRecord) -> bool {
    let queued = queued();
    let Some(mut entry) = EVENTS.reserve::<CloseRecord>(0) else {
        return false;
    };
    entry.write(record());
    entry.submit(calling(queued));
    true
}

/// Bytes that the daemon has not read.
#[inline(always)]
fn queued() -> u64 {
    EVENTS.query(u64::from(BPF_RB_AVAIL_DATA))
}

/// With 0 the kernel wakes the daemon only for a record before which it has read all.
#[inline(always)]
fn calling(queued: u64) -> u64 {
    if event::is_crowded(queued) { u64::from(BPF_RB_FORCE_WAKEUP) } else { 0 }
}

/// Logs a decision, in objects built with `cargo xtask build-ebpf --log`.
#[cfg(feature = "log")]
macro_rules! trace {
    ($($arguments:tt)*) => { ::aya_log_ebpf::debug!($($arguments)*) };
}
#[cfg(not(feature = "log"))]
macro_rules! trace {
    ($($arguments:tt)*) => {};
}
pub(crate) use trace;
