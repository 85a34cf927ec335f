//! What the kernel tells about captured connections when the application's socket closes.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Round-trip time and retransmissions of applications' sockets.
#[derive(Clone, Debug)]
pub struct FlowMetrics {
    rtt: Histogram,
    retransmits: Counter,
    closed: Counter,
}

/// Upper bounds in seconds: a captured connection ends in its own namespace, so tens of microseconds are usual.
const RTT_BUCKETS: [f64; 10] = [20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 5e-3, 20e-3, 0.1, 0.5];

impl FlowMetrics {
    /// Adds the families to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let flows =
            Self { rtt: Histogram::new(RTT_BUCKETS), retransmits: Counter::default(), closed: Counter::default() };
        registry.register_with_unit(
            "tcp_rtt",
            "Smoothed round-trip time of captured connections at their end, from the kernel",
            Unit::Seconds,
            flows.rtt.clone(),
        );
        registry.register(
            "tcp_retransmits",
            "Segments that captured connections' sockets sent again, from the kernel",
            flows.retransmits.clone(),
        );
        registry.register("close_records", "Close records read from the kernel's event buffer", flows.closed.clone());
        flows
    }

    /// One captured socket closed.
    pub fn closed(&self, srtt_us: u32, retransmits: u32) {
        self.closed.inc();
        self.retransmits.inc_by(u64::from(retransmits));
        if srtt_us > 0 {
            self.rtt.observe(f64::from(srtt_us) / 1e6);
        }
    }
}
