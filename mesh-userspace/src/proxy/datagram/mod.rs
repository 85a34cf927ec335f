//! UDP: captured datagrams are carried in flows, one per application socket and frontend, to an endpoint's node, and
//! delivered there from an alias that stands for the caller.
//!
//! A flow is to UDP what a connection is to TCP: its endpoint is picked once, policy is asked once on either side, and a
//! change of policy cuts it. It ends when nothing has passed for a while. Whatever has no room is dropped and counted:
//! nobody waits for UDP.

mod flow;
mod inbound;
mod life;
mod outbound;
mod shown;

pub use outbound::DatagramOutbound;

use crate::datapath::Aliases;
use crate::runtime::{Level, Room};
use crate::telemetry::datagrams::{DatagramMetrics, DirectionMetrics};
use crate::tunnel::{Carried, FlowSender, Lost};
use shown::Shown;
use std::sync::Arc;

/// Flows of this node's workloads as callers.
const MAX_OUTBOUND: usize = 32_768;
/// Flows that are delivered to this node's workloads; the kernel's table of callers has room for more.
const MAX_INBOUND: usize = 16_000;

/// What all flows of the node share. Cheap to clone.
#[derive(Clone)]
pub struct Datagrams(Arc<Common>);

struct Common {
    aliases: Aliases,
    shown: Shown,
    outbound: DirectionMetrics,
    inbound: DirectionMetrics,
    outbound_room: Room,
    inbound_room: Room,
}

impl Datagrams {
    #[must_use]
    pub fn new(aliases: Aliases, metrics: &DatagramMetrics) -> Self {
        Self(Arc::new(Common {
            shown: Shown::new(aliases.clone()),
            aliases,
            outbound: metrics.direction("outbound", MAX_OUTBOUND),
            inbound: metrics.direction("inbound", MAX_INBOUND),
            outbound_room: Room::new("udp_flows_outbound", MAX_OUTBOUND),
            inbound_room: Room::new("udp_flows_inbound", MAX_INBOUND),
        }))
    }

    /// How full it is, now and whenever it is asked again.
    pub fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        let rooms = [self.0.outbound_room.clone(), self.0.inbound_room.clone()];
        move || rooms.iter().map(Room::level).collect()
    }
}

/// Sends a payload to the other node and counts what becomes of it.
fn send(metrics: &DirectionMetrics, sender: &FlowSender, payload: &[u8], count: impl FnOnce(&DirectionMetrics, usize)) {
    match sender.send(payload) {
        Ok(carried) => {
            match carried {
                Carried::Datagram => {}
                Carried::DatagramInsteadOfOlder => metrics.dropped("send_buffer_full"),
                Carried::Stream => metrics.long(),
            }
            count(metrics, payload.len());
        }
        Err(Lost::QueueFull) => metrics.dropped("stream_queue_full"),
        Err(Lost::Closed) => metrics.dropped("flow_closed"),
    }
}
