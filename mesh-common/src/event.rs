//! Records of the `EVENTS` ring buffer.

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
