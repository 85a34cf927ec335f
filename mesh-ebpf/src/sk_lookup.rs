//! sk_lookup in a workload's namespace: the destination's guard. It runs for the first packet of a connection only.
//!
//! In the node's own namespace (`NODE`) it guards only the ports that workloads there declare, at every address but
//! loopback: one that nobody thought of must not be a way around. That a connection comes from there proves nothing.

use crate::context::{self, Arriving};
use crate::{datagram_guard, emit, maps};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::programs::SkLookupContext;
use mesh_common::addr::Ip;
use mesh_common::capture;
use mesh_common::event::VerdictRecord;
use mesh_common::maps::CfgSlot;
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::{AUTHENTICATED, EVERYONE};
use mesh_common::policy::{self, Arrival, Matched, Mode, Verdict};
use mesh_common::service::{BypassKey, PROTO_TCP, PROTO_UDP};

/// Decides whether the connection may look for its listener, and what to count.
#[inline(always)]
pub(crate) fn decide<const NODE: bool>(ctx: &SkLookupContext) -> (Verdict, Outcome) {
    let connection = context::arriving(ctx);
    // In the node's own namespace UDP is not the mesh's.
    if !NODE && connection.protocol == u32::from(PROTO_UDP) {
        return datagram_guard::decide(&connection);
    }
    if connection.protocol != u32::from(PROTO_TCP) {
        return (Verdict::Pass, Outcome::LookupNotTcp);
    }
    let local_port_be = (connection.local_port as u16).to_be();
    let app_port = if NODE {
        maps::node_app_port(connection.local, local_port_be)
    } else {
        maps::app_port(connection.local, local_port_be)
    };
    let mode = app_port.map(|app_port| Mode::from_number(app_port.mode()));
    let is_self = if NODE {
        connection.local.is_loopback()
    } else {
        capture::is_self_traffic(connection.remote, connection.local)
    };
    let (arrival, admitted) = if is_self {
        (Arrival::SelfTraffic, None)
    } else {
        let arrival = capture::arrival(connection.local_port, maps::setting(CfgSlot::OutboundPort));
        let key = BypassKey::new(connection.remote, connection.local, connection.remote_port_be, local_port_be);
        if maps::is_bypassed(&key) {
            (capture::announced(arrival), None)
        } else {
            // Nobody is admitted to the node's own namespace, nor to the daemon's listener.
            let is_open = !NODE && matches!(arrival, Arrival::Plaintext);
            match if is_open { maps::admitted(&key) } else { None } {
                Some(admitted) => (Arrival::Authenticated, Some((admitted.identity(), admitted.speaker()))),
                None => (arrival, None),
            }
        }
    };
    let group = app_port.map_or(0, |app_port| app_port.group());
    let matched = match (mode, arrival) {
        (Some(Mode::Permissive), Arrival::Plaintext) | (_, Arrival::Authenticated) => {
            let (identity, address) = admitted.unwrap_or((EVERYONE, connection.remote));
            matched(group, identity, address, local_port_be)
        }
        // Nothing else is left to the rules.
        _ => Matched::NOTHING,
    };
    let decision = policy::decide(mode, arrival, &matched);
    let outcome = capture::lookup_outcome(&decision, arrival);
    emit::trace!(ctx, "{:i}:{} {}", connection.local.octets(), connection.local_port, outcome as u32);
    if capture::is_recorded(outcome) {
        let identity = admitted.map_or(0, |(identity, _)| identity);
        report(&connection, local_port_be, outcome, group, identity, decision.rule);
    }
    (decision.verdict, outcome)
}

/// What the rules say about a caller: one whose identity the kernel has proven, or [`EVERYONE`].
#[inline(always)]
fn matched(group: u32, identity: u32, address: Ip, local_port_be: u16) -> Matched {
    if group == 0 {
        return Matched::NOTHING;
    }
    let proven = if identity == EVERYONE { EVERYONE } else { AUTHENTICATED };
    policy::join(group, [proven, identity, maps::class(group, address)], local_port_be, maps::matched)
}

#[inline(always)]
fn report(connection: &Arriving, local_port_be: u16, outcome: Outcome, group: u32, identity: u32, rule: u32) {
    emit::verdict(&VerdictRecord::new(
        // SAFETY: a plain helper call.
        unsafe { bpf_ktime_get_ns() },
        0,
        connection.remote,
        connection.local,
        outcome as u32,
        group,
        identity,
        rule,
        0,
        0,
        connection.remote_port_be,
        local_port_be,
    ));
}
