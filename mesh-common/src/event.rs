//! Records of the `EVENTS` ring buffer. They are told apart by their size.

use crate::abi::pod;
use crate::addr::Ip;

pod! {
    /// A captured connection's application socket closed (sock_ops STATE_CB, new state TCP_CLOSE).
    pub struct CloseRecord [128] {
        /// CLOCK_MONOTONIC nanoseconds.
        connected_at_ns: u64,
        closed_at_ns: u64,
        netns_cookie: u64,
        cgroup: u64,
        /// Bytes the peer acknowledged; the kernel counts SYN and FIN in it (KERNEL: +2 on a clean close).
        bytes_acked: u64,
        bytes_received: u64,
        source: Ip,
        destination: Ip,
        /// Smoothed round-trip time in microseconds.
        srtt_us: u32,
        retransmits: u32,
        segments_out: u32,
        segments_in: u32,
        pid: u32,
        service: u32,
        source_port_be: u16,
        destination_port_be: u16,
        family: u16,
        ; reserved pad: [u8; 18]
    }
}

pod! {
    /// A hook refused a connection because of policy or mode, or admitted plaintext: what a person asks about later.
    pub struct VerdictRecord [80] {
        /// CLOCK_MONOTONIC nanoseconds.
        decided_at_ns: u64,
        /// The caller's network namespace at connect(); 0 in sk_lookup.
        netns_cookie: u64,
        /// The caller's address: at connect() the workload's own, in sk_lookup the packet's.
        source: Ip,
        destination: Ip,
        /// The [`crate::outcome::Outcome`], as a number.
        outcome: u32,
        /// The destination's policy group.
        group: u32,
        /// The number of the source's identity at connect(); 0 in sk_lookup.
        identity: u32,
        /// The rule of the group that decided, or 0.
        rule: u32,
        pid: u32,
        /// Service of the frontend at connect(), or 0.
        service: u32,
        /// 0 at connect(): not chosen yet.
        source_port_be: u16,
        destination_port_be: u16,
        ; reserved pad: [u8; 4]
    }
}

/// Whether a [`VerdictRecord`] may take room in `EVENTS`, of which `queued` bytes are taken: verdicts leave half of it
/// to close records, however many connections are refused.
#[inline(always)]
#[must_use]
pub const fn has_room_for_verdict(queued: u64) -> bool {
    queued < crate::maps::EVENTS_BYTES as u64 / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::EVENTS_BYTES;

    #[test]
    fn verdicts_leave_half_of_the_ring_buffer_to_close_records() {
        assert!(has_room_for_verdict(0));
        assert!(!has_room_for_verdict(u64::from(EVENTS_BYTES) / 2));
        assert!(!has_room_for_verdict(u64::from(EVENTS_BYTES)));
    }
}
