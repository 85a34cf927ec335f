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

pod! {
    /// A connection that the kernel carries between two workloads of this node has begun, or one of its sockets closed.
    pub struct FlowRecord [136] {
        /// CLOCK_MONOTONIC nanoseconds of the connect; with the two ends it names the connection.
        connected_at_ns: u64,
        at_ns: u64,
        /// The source's network namespace and cgroup; 0 in a record of the destination's socket, like all that only the
        /// source knows.
        netns_cookie: u64,
        cgroup: u64,
        /// As the kernel counts them, of the reporting socket; see [`FlowRecord::bytes_sent`].
        bytes_acked: u64,
        bytes_received: u64,
        source: Ip,
        /// The destination's own address.
        backend: Ip,
        /// What the application connected to.
        destination: Ip,
        srtt_us: u32,
        retransmits: u32,
        segments_in: u32,
        pid: u32,
        service: u32,
        /// The number of the source's identity.
        identity: u32,
        source_port_be: u16,
        backend_port_be: u16,
        destination_port_be: u16,
        flags: u16,
        ; reserved pad: [u8; 8]
    }
}

impl FlowRecord {
    /// The connection is established. Without this flag a socket has closed; one that was never connected tells its end
    /// alone ([`Self::UNANSWERED`]), and one that TCP_REPAIR made look connected tells nothing.
    pub const OPENED: u16 = 1;
    /// It is the destination's socket that reports.
    pub const BY_DESTINATION: u16 = 2;
    /// The socket was never connected.
    pub const UNANSWERED: u16 = 4;
    /// The peer has acknowledged the socket's FIN.
    pub const FIN_ACKED: u16 = 8;
    /// The destination's socket reports, too.
    pub const SERVED: u16 = 16;

    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes of the application that the peer has acknowledged. The kernel counts a FIN as a byte, and the SYN of the end
    /// that dialled.
    #[must_use]
    pub const fn bytes_sent(&self) -> u64 {
        let syn = !self.has(Self::BY_DESTINATION) && !self.has(Self::UNANSWERED);
        self.bytes_acked.saturating_sub(syn as u64 + self.has(Self::FIN_ACKED) as u64)
    }
}

/// Whether the peer of a socket that closes has acknowledged its FIN. `old` is the state (`BPF_TCP_*`) that it leaves.
#[inline(always)]
#[must_use]
pub const fn is_fin_acked(old: u32, snd_una: u32, snd_nxt: u32) -> bool {
    const FIN_WAIT2: u32 = 5;
    const LAST_ACK: u32 = 9;
    const CLOSING: u32 = 11;
    old == FIN_WAIT2 || (old == LAST_ACK || old == CLOSING) && snd_una == snd_nxt
}

/// Whether a [`VerdictRecord`] (or one of a connection that begins) may take room in `EVENTS`, of which `queued` bytes are taken: verdicts leave half of it
/// to close records, however many connections are refused.
#[inline(always)]
#[must_use]
pub const fn has_room_for_verdict(queued: u64) -> bool {
    queued < crate::maps::EVENTS_BYTES as u64 / 2
}

/// Whether so much is queued in `EVENTS` that its reader is to be woken, although it knows of records and lets them
/// gather for a while: so that verdicts do not find the room spent that is theirs.
#[inline(always)]
#[must_use]
pub const fn is_crowded(queued: u64) -> bool {
    queued >= crate::maps::EVENTS_BYTES as u64 / 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::EVENTS_BYTES;

    #[test]
    fn a_record_counts_the_applications_bytes() {
        let record = |acked, flags| {
            let ip = Ip::UNSPECIFIED;
            FlowRecord::new(0, 0, 0, 0, acked, 0, ip, ip, ip, 0, 0, 0, 0, 0, 0, 0, 0, 0, flags).bytes_sent()
        };
        assert_eq!(record(102, FlowRecord::FIN_ACKED), 100, "SYN and FIN");
        assert_eq!(record(101, 0), 100, "SYN");
        assert_eq!(record(101, FlowRecord::BY_DESTINATION | FlowRecord::FIN_ACKED), 100, "FIN");
        assert_eq!(record(100, FlowRecord::BY_DESTINATION), 100);
        assert_eq!(record(0, FlowRecord::UNANSWERED), 0);
    }

    #[test]
    fn a_fin_is_acknowledged_where_the_state_says_so() {
        assert!(is_fin_acked(5, 1, 2) && is_fin_acked(9, 2, 2) && is_fin_acked(11, 2, 2));
        assert!(!is_fin_acked(9, 1, 2) && !is_fin_acked(4, 2, 2) && !is_fin_acked(1, 2, 2));
    }

    #[test]
    fn records_differ_in_size() {
        assert_ne!(size_of::<CloseRecord>(), size_of::<VerdictRecord>());
        assert_ne!(size_of::<CloseRecord>(), size_of::<FlowRecord>());
        assert_ne!(size_of::<VerdictRecord>(), size_of::<FlowRecord>());
    }

    #[test]
    fn the_reader_is_called_before_a_verdict_finds_no_room() {
        assert!(!is_crowded(0) && is_crowded(u64::from(EVENTS_BYTES)));
        let called_at = (0..u64::from(EVENTS_BYTES)).find(|queued| is_crowded(*queued)).unwrap();
        // What is written until the reader comes.
        assert!(has_room_for_verdict(called_at + u64::from(EVENTS_BYTES) / 4));
    }

    #[test]
    fn verdicts_leave_half_of_the_ring_buffer_to_close_records() {
        assert!(has_room_for_verdict(0));
        assert!(!has_room_for_verdict(u64::from(EVENTS_BYTES) / 2));
        assert!(!has_room_for_verdict(u64::from(EVENTS_BYTES)));
    }
}
