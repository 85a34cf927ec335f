//! sk_lookup in a workload's namespace: the destination's guard. It runs for the first packet of a connection only.
//!
//! In the node's own namespace (`NODE`) it guards only the ports that workloads there declare, at every address but
//! loopback: one that nobody thought of must not be a way around. That a connection comes from there proves nothing.

use crate::{context, emit, maps};
use aya_ebpf::programs::SkLookupContext;
use mesh_common::capture;
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::policy::{self, Arrival, Matched, Mode, Verdict};
use mesh_common::service::{BypassKey, PROTO_TCP};

/// Decides whether the connection may look for its listener, and what to count.
#[inline(always)]
pub(crate) fn decide<const NODE: bool>(ctx: &SkLookupContext) -> (Verdict, Outcome) {
    let connection = context::arriving(ctx);
    if connection.protocol != u32::from(PROTO_TCP) {
        return (Verdict::Pass, Outcome::LookupNotTcp);
    }
    let local_port_be = (connection.local_port as u16).to_be();
    let mode = if NODE {
        maps::node_mode(connection.local, local_port_be)
    } else {
        maps::mode(connection.local, local_port_be)
    };
    let mode = mode.map(Mode::from_number);
    let is_self = if NODE {
        connection.local.is_loopback()
    } else {
        capture::is_self_traffic(connection.remote, connection.local)
    };
    let arrival = if is_self {
        Arrival::SelfTraffic
    } else {
        let arrival = capture::arrival(connection.local_port, maps::setting(CfgSlot::OutboundPort));
        let key = BypassKey::new(connection.remote, connection.local, connection.remote_port_be, local_port_be);
        if maps::is_bypassed(&key) { capture::announced(arrival) } else { arrival }
    };
    let decision = policy::decide(mode, arrival, &Matched::NOTHING);
    let outcome = capture::lookup_outcome(&decision);
    emit::trace!(ctx, "{:i}:{} {}", connection.local.octets(), connection.local_port, outcome as u32);
    (decision.verdict, outcome)
}
