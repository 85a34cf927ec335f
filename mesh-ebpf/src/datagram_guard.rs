//! sk_lookup for UDP in a workload's namespace. There are no connections: it runs for every datagram whose socket is not
//! connected, and guards only the ports that services lead to, for all others may be those of the workload's own calls.

use crate::context::Arriving;
use crate::maps;
use mesh_common::addr::Endpoint;
use mesh_common::datagram;
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::policy::{self, Arrival, Matched, Mode, Verdict};

/// Decides whether a datagram may look for its socket, and what to count.
#[inline(always)]
pub(crate) fn decide(datagram: &Arriving) -> (Verdict, Outcome) {
    let local_port_be = (datagram.local_port as u16).to_be();
    let Some(guard) = maps::datagram_port(datagram.local, local_port_be) else {
        return unguarded(datagram);
    };
    let is_from_alias = maps::alias(&Endpoint::new(datagram.remote, datagram.remote_port_be)).is_some();
    let arrival = datagram::arrival(datagram.remote, datagram.local, is_from_alias);
    let mode = Mode::from_number(guard.mode());
    let group = guard.group();
    let matched = if group != 0 && matches!((mode, arrival), (Mode::Permissive, Arrival::Plaintext)) {
        policy::join(group, [maps::class(group, datagram.remote)], local_port_be, maps::matched)
    } else {
        Matched::NOTHING
    };
    let decision = policy::decide(Some(mode), arrival, &matched);
    (decision.verdict, datagram::outcome(&decision))
}

/// The daemon's port is reached through aliases, which nobody guards; at the workload's own address it is nobody's.
#[inline(always)]
fn unguarded(datagram: &Arriving) -> (Verdict, Outcome) {
    let is_mesh_port = u64::from(datagram.local_port) == maps::setting(CfgSlot::OutboundPort);
    if is_mesh_port && maps::app_port(datagram.local, 0).is_some() {
        datagram::MESH_PORT
    } else {
        (Verdict::Pass, Outcome::DatagramUnguarded)
    }
}
