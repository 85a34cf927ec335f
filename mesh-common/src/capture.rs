//! The pure parts of the hooks' decisions, so that they are tested on the host: which connects are captured, where
//! they go, and how a connection to a workload arrives. The map look-ups between them are in the hooks.

use crate::addr::{Endpoint, Ip};
use crate::outcome::Outcome;
use crate::policy::{self, Arrival, Decision, Reason};
use crate::service::{Backend, CidrAction, Frontend, PROTO_TCP, Pod};

/// What the connect hook does with a connect().
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leave the connect alone.
    Pass(Outcome),
    /// Rewrite it to the daemon's listener on this address of the workload.
    Capture(Ip),
    /// Rewrite it to this backend on the node: the kernel carries the connection.
    Carry(Endpoint),
}

/// A connect() that fails at once: why, and the errno that the application sees (a positive number).
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub outcome: Outcome,
    pub errno: i32,
}

/// `ECONNREFUSED` on every Linux architecture that has eBPF.
pub const ECONNREFUSED: i32 = 111;
/// `EACCES`, likewise.
pub const EACCES: i32 = 13;
/// `EADDRNOTAVAIL`, likewise.
pub const EADDRNOTAVAIL: i32 = 99;

/// What the connect hook knows about the call before it looks anything up.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// `IPPROTO_*` of the socket.
    pub protocol: u32,
    /// SO_MARK of the socket.
    pub mark: u32,
    pub destination: Ip,
}

/// Why a workload's connect is left alone without any look-up, if it is. `own_mark` 0 exempts nothing.
#[inline(always)]
#[must_use]
pub fn exemption(call: &Call, pod: &Pod, own_mark: u32) -> Option<Outcome> {
    if call.protocol != u32::from(PROTO_TCP) {
        Some(Outcome::ConnectProtocol)
    } else if own_mark != 0 && call.mark == own_mark {
        Some(Outcome::ConnectOwn)
    } else if call.destination.is_loopback() || call.destination.is_unspecified() {
        Some(Outcome::ConnectLoopback)
    } else if pod.flags() & Pod::HOST_NETWORK == 0 && (call.destination == pod.ip4() || call.destination == pod.ip6()) {
        // In the node's own namespace the same address may be another workload's.
        Some(Outcome::ConnectSelf)
    } else {
        None
    }
}

/// What the tables say about a destination that is in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The service's number, or 0 for a workload's address.
    pub service: u32,
    /// The policy group of whoever answers, or 0: nobody denies, or only the proxy can tell who it will be.
    pub group: u32,
    /// The port that the group's rules see, network byte order.
    pub port_be: u16,
}

impl Target {
    /// From what the kernel found in `SVC` (slot 0).
    ///
    /// # Errors
    ///
    /// The frontend has no backend: the connect is refused at once, as a closed port would.
    #[inline(always)]
    pub const fn from_frontend(frontend: &Frontend) -> Result<Self, Refusal> {
        if frontend.backends() == 0 {
            Err(Refusal { outcome: Outcome::ConnectNoEndpoints, errno: ECONNREFUSED })
        } else {
            let (service, group) = (frontend.service(), frontend.group());
            Ok(Self { service, group, port_be: frontend.target_port_be() })
        }
    }

    /// From what the kernel found in `CIDR` for a connect to this port; an action this version does not know leaves the
    /// destination alone.
    ///
    /// # Errors
    ///
    /// The destination is not captured, and why.
    #[inline(always)]
    pub const fn from_range(action: Option<CidrAction>, port_be: u16) -> Result<Self, Outcome> {
        match action {
            Some(found) if found.is_meshed() => Ok(Self { service: 0, group: found.group(), port_be }),
            Some(found) if found.action() == CidrAction::PASS.action() => Err(Outcome::ConnectExcluded),
            _ => Err(Outcome::ConnectUnmeshed),
        }
    }
}

/// Where the kernel's draw among a frontend's backends falls.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// The kernel does not draw for this frontend.
    Nowhere,
    /// On a backend of this node: the one whose share of the weights holds this point.
    Here(u32),
    /// On a backend that is not on this node.
    Elsewhere,
}

/// Draws by weight; `random` is any number.
#[inline(always)]
pub const fn draw(frontend: &Frontend, random: u32) -> Draw {
    if frontend.local_slots() == 0 {
        return Draw::Nowhere;
    }
    let point = ((random as u64 * frontend.total_weight() as u64) >> 32) as u32;
    if point < frontend.local_weight() { Draw::Here(point) } else { Draw::Elsewhere }
}

/// The backend whose share holds a point; `slot` finds slots, of which the first is 1. `None` if one is missing: the
/// slots are being rewritten.
#[inline(always)]
#[must_use]
pub fn backend_at(slots: u32, point: u32, slot: impl Fn(u32) -> Option<Backend>) -> Option<Backend> {
    let (mut low, mut high) = (1, slots);
    let mut found = None;
    let mut step = 0;
    while step < Frontend::SLOT_STEPS && low <= high {
        step += 1;
        let middle = (low + high) / 2;
        let backend = slot(middle)?;
        if backend.cumulative() > point {
            found = Some(backend);
            high = middle - 1;
        } else {
            low = middle + 1;
        }
    }
    found
}

/// Whether a socket that is bound to `bound` will be seen by a backend under the workload's own address: another one,
/// loopback above all, may not even get there.
#[inline(always)]
#[must_use]
pub fn is_plain_source(bound: Ip, own: Ip) -> bool {
    !own.is_unspecified() && (bound.is_unspecified() || bound == own)
}

/// How long the daemon picks in place of a backend that did not take a connection: it tries others, the kernel cannot.
pub const FAILING_NS: u64 = 10_000_000_000;

/// Whether a connection that was never made speaks against its backend: it was refused, or the SYN was sent in vain. One
/// that the application gave up at once does not.
#[inline(always)]
#[must_use]
pub const fn speaks_against(segments_in: u32, retransmits: u32) -> bool {
    segments_in != 0 || retransmits != 0
}

/// The workload's address of the destination's family: where its connects are captured, and what the destination sees
/// as their source. Unspecified if it has none.
#[inline(always)]
#[must_use]
pub fn own_address(pod: &Pod, destination: Ip) -> Ip {
    if destination.is_v4() { pod.ip4() } else { pod.ip6() }
}

/// The refusal of a connect that policy denies; `errno` is the setting of [`crate::maps::CfgSlot::DeniedErrno`].
#[inline(always)]
pub const fn denied(decision: &Decision, errno: u64) -> Result<(), Refusal> {
    match decision.verdict {
        policy::Verdict::Pass => Ok(()),
        policy::Verdict::Drop => {
            let errno = if errno == ECONNREFUSED as u64 { ECONNREFUSED } else { EACCES };
            Err(Refusal { outcome: Outcome::ConnectDenied, errno })
        }
    }
}

/// Whether the daemon has not shown a sign of life for `timeout` nanoseconds; `timeout` 0 switches the check off.
#[inline(always)]
#[must_use]
pub const fn heartbeat_is_stale(now: u64, heartbeat: u64, timeout: u64) -> bool {
    // A heartbeat of "the future" was written between our clock read and the map read: alive.
    timeout != 0 && now.saturating_sub(heartbeat) > timeout
}

/// Captures a meshed destination, unless the daemon is silent or the workload lacks an address of the right family.
///
/// # Errors
///
/// The connect must be refused.
#[inline(always)]
pub fn capture(destination: Ip, pod: &Pod, daemon_is_silent: bool) -> Result<Verdict, Refusal> {
    if daemon_is_silent {
        return if pod.flags() & Pod::FAIL_OPEN != 0 {
            Ok(Verdict::Pass(Outcome::ConnectFailOpen))
        } else {
            Err(Refusal { outcome: Outcome::ConnectDaemonDown, errno: ECONNREFUSED })
        };
    }
    let listener = own_address(pod, destination);
    if listener.is_unspecified() {
        Err(Refusal { outcome: Outcome::ConnectNoAddress, errno: EADDRNOTAVAIL })
    } else {
        Ok(Verdict::Capture(listener))
    }
}

/// Whether a connection is the workload's traffic with itself. A remote or local loopback address can only be that:
/// the kernel drops such packets when they come from a wire.
#[inline(always)]
#[must_use]
pub fn is_self_traffic(remote: Ip, local: Ip) -> bool {
    remote == local || remote.is_loopback() || local.is_loopback()
}

/// How a connection arrives that is neither self traffic nor the daemon's own delivery.
#[inline(always)]
#[must_use]
pub const fn arrival(local_port: u32, mesh_port: u64) -> Arrival {
    if local_port as u64 == mesh_port { Arrival::MeshPort } else { Arrival::Plaintext }
}

/// How a connection of [`arrival`] arrives that is in `BYPASS`: only sock_ops announces connections to the daemon's
/// listener, those of the workload itself; all others are the daemon's.
#[inline(always)]
#[must_use]
pub const fn announced(arrival: Arrival) -> Arrival {
    match arrival {
        Arrival::SelfTraffic | Arrival::MeshPort => Arrival::SelfTraffic,
        Arrival::Delivery | Arrival::Authenticated | Arrival::Plaintext => Arrival::Delivery,
    }
}

/// Whether what sk_lookup decided is worth a record: refusals, and plaintext that was admitted.
#[inline(always)]
#[must_use]
pub const fn is_recorded(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::LookupDenied
            | Outcome::LookupCarriedDenied
            | Outcome::LookupStrict
            | Outcome::LookupMeshPort
            | Outcome::LookupPlaintext
    )
}

/// What sk_lookup counts for a decision.
#[inline(always)]
#[must_use]
pub const fn lookup_outcome(decision: &Decision, arrival: Arrival) -> Outcome {
    let is_carried = matches!(arrival, Arrival::Authenticated);
    match decision.reason {
        Reason::SelfTraffic => Outcome::LookupSelf,
        Reason::Delivery => Outcome::LookupBypass,
        Reason::Unmeshed => Outcome::LookupUnknown,
        Reason::MeshPort => Outcome::LookupMeshPort,
        Reason::Strict => Outcome::LookupStrict,
        Reason::Allowed | Reason::DefaultAllow if is_carried => Outcome::LookupCarried,
        Reason::Denied | Reason::NotAllowed | Reason::DefaultDeny if is_carried => Outcome::LookupCarriedDenied,
        Reason::Denied | Reason::NotAllowed | Reason::DefaultDeny => Outcome::LookupDenied,
        Reason::Allowed | Reason::DefaultAllow => Outcome::LookupPlaintext,
    }
}

/// Room for the name of a congestion control (`TCP_CA_NAME_MAX`).
pub const CONGESTION_NAME: usize = 16;

/// Whether connections under this congestion control wait by timers: all versions of BBR, and nothing else of Linux.
#[inline(always)]
#[must_use]
pub const fn paces(name: &[u8; CONGESTION_NAME]) -> bool {
    matches!(name, [b'b', b'b', b'r', ..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Group, Matched, Mode};

    fn ip(text: &str) -> Ip {
        text.parse::<core::net::IpAddr>().unwrap().into()
    }

    fn pod(flags: u16) -> Pod {
        Pod::new(ip("10.0.0.5"), ip("fd00::5"), 1, 15001_u16.to_be(), flags, 2, Ip::UNSPECIFIED, Ip::UNSPECIFIED)
    }

    fn call(destination: &str) -> Call {
        Call { protocol: 6, mark: 0, destination: ip(destination) }
    }

    #[test]
    fn only_tcp_of_others_to_others_is_considered() {
        let mark = 0x539;
        assert_eq!(exemption(&call("10.96.0.1"), &pod(0), mark), None);
        assert_eq!(
            exemption(&Call { protocol: 17, ..call("10.96.0.1") }, &pod(0), mark),
            Some(Outcome::ConnectProtocol)
        );
        assert_eq!(exemption(&Call { mark, ..call("10.96.0.1") }, &pod(0), mark), Some(Outcome::ConnectOwn));
        for loopback in ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"] {
            assert_eq!(exemption(&call(loopback), &pod(0), mark), Some(Outcome::ConnectLoopback), "{loopback}");
        }
        for own in ["10.0.0.5", "::ffff:10.0.0.5", "fd00::5"] {
            assert_eq!(exemption(&call(own), &pod(0), mark), Some(Outcome::ConnectSelf), "{own}");
        }
    }

    #[test]
    fn a_node_shares_its_address_with_its_workloads() {
        for own in ["10.0.0.5", "fd00::5"] {
            assert_eq!(exemption(&call(own), &pod(Pod::HOST_NETWORK), 0x539), None, "{own}");
        }
        assert_eq!(exemption(&call("127.0.0.1"), &pod(Pod::HOST_NETWORK), 0x539), Some(Outcome::ConnectLoopback));
    }

    #[test]
    fn an_unset_own_mark_exempts_no_unmarked_socket() {
        assert_eq!(exemption(&call("10.96.0.1"), &pod(0), 0), None);
    }

    #[test]
    fn a_frontend_without_backends_refuses() {
        let refusal = Target::from_frontend(&Frontend::new(7, 0, 5, 0, 0, 0, 0, 0)).unwrap_err();
        assert_eq!(refusal, Refusal { outcome: Outcome::ConnectNoEndpoints, errno: ECONNREFUSED });
        let target = Target { service: 7, group: 5, port_be: 8080 };
        assert_eq!(Target::from_frontend(&Frontend::new(7, 1, 5, 8080, 0, 0, 0, 0)), Ok(target));
    }

    #[test]
    fn ranges_capture_exclude_or_miss() {
        let captured = Target { service: 0, group: 5, port_be: 80 };
        assert_eq!(Target::from_range(Some(CidrAction::capture(5)), 80), Ok(captured));
        assert_eq!(Target::from_range(Some(CidrAction::PASS), 80), Err(Outcome::ConnectExcluded));
        assert_eq!(Target::from_range(Some(CidrAction::new(99, 5)), 80), Err(Outcome::ConnectUnmeshed));
        assert_eq!(Target::from_range(None, 80), Err(Outcome::ConnectUnmeshed));
    }

    #[test]
    fn a_draw_follows_the_weights() {
        assert_eq!(draw(&Frontend::new(7, 2, 0, 0, 0, 10, 4, 0), 0), Draw::Nowhere);
        let frontend = Frontend::new(7, 2, 0, 0, 0, 10, 4, 2);
        assert_eq!(draw(&frontend, 0), Draw::Here(0));
        assert_eq!(draw(&frontend, u32::MAX / 10 * 4 - 1), Draw::Here(3));
        assert_eq!(draw(&frontend, u32::MAX / 10 * 4 + 3), Draw::Elsewhere);
        assert_eq!(draw(&frontend, u32::MAX), Draw::Elsewhere);
        let all = Frontend::new(7, 2, 0, 0, 0, u32::MAX, u32::MAX, 2);
        assert_eq!(draw(&all, u32::MAX), Draw::Here(u32::MAX - 1));
    }

    proptest::proptest! {
        #[test]
        fn a_point_is_found_in_the_share_that_holds_it(
            weights in proptest::collection::vec(1_u32..1000, 1..Frontend::MAX_SLOTS as usize),
            at: proptest::sample::Index,
        ) {
            let mut sum = 0;
            let slots: Vec<_> = weights
                .iter()
                .map(|weight| {
                    sum += weight;
                    Backend::new(Ip::UNSPECIFIED, 0, 0, sum)
                })
                .collect();
            let point = at.index(sum as usize) as u32;
            let slot = |slot: u32| slots.get(slot as usize - 1).copied();
            let expected = slots.iter().find(|slot| slot.cumulative() > point).copied();
            proptest::prop_assert_eq!(backend_at(slots.len() as u32, point, slot), expected);
        }
    }

    #[test]
    fn the_largest_number_of_slots_is_searched_whole_and_a_missing_slot_finds_nothing() {
        let slot = |slot| Some(Backend::new(Ip::UNSPECIFIED, 0, 0, slot));
        for point in 0..Frontend::MAX_SLOTS {
            assert_eq!(backend_at(Frontend::MAX_SLOTS, point, slot), slot(point + 1));
        }
        assert_eq!(backend_at(4, 0, |at| slot(at).filter(|_| at != 1)), None);
        assert_eq!(backend_at(4, 9, slot), None, "the header is newer than the slots");
    }

    #[test]
    fn a_source_is_plain_if_it_is_the_workloads_own() {
        assert!(is_plain_source(ip("0.0.0.0"), ip("10.0.0.5")) && is_plain_source(ip("10.0.0.5"), ip("10.0.0.5")));
        assert!(!is_plain_source(ip("127.0.0.1"), ip("10.0.0.5")) && !is_plain_source(ip("10.0.0.6"), ip("10.0.0.5")));
        assert!(!is_plain_source(ip("::"), Ip::UNSPECIFIED), "a workload without an address of the family");
    }

    #[test]
    fn what_policy_denies_is_refused_with_the_errno_of_the_mesh() {
        let decide = |flags| policy::authorize(&Matched::new(0, 0, 0, 0, 0, flags));
        assert_eq!(denied(&decide(0), 111), Ok(()));
        for (setting, errno) in [(0, EACCES), (13, EACCES), (111, ECONNREFUSED), (99_999, EACCES)] {
            let refusal = Refusal { outcome: Outcome::ConnectDenied, errno };
            assert_eq!(denied(&decide(Group::HAS_ALLOW), setting), Err(refusal));
        }
    }

    #[test]
    fn every_refusal_of_the_guard_is_recorded() {
        for outcome in Outcome::ALL.iter().filter(|outcome| outcome.hook() == "sk_lookup") {
            let expected = outcome.verdict() == "drop" || *outcome == Outcome::LookupPlaintext;
            assert_eq!(is_recorded(*outcome), expected, "{outcome:?}");
        }
    }

    #[test]
    fn the_heartbeat_goes_stale_after_its_timeout_and_zero_never_does() {
        assert!(!heartbeat_is_stale(100, 0, 100));
        assert!(heartbeat_is_stale(101, 0, 100));
        assert!(!heartbeat_is_stale(100, 105, 1));
        assert!(!heartbeat_is_stale(u64::MAX, 0, 0));
    }

    #[test]
    fn a_capture_goes_to_the_workloads_own_address_of_the_destinations_family() {
        assert_eq!(capture(ip("10.96.0.1"), &pod(0), false), Ok(Verdict::Capture(ip("10.0.0.5"))));
        assert_eq!(capture(ip("::ffff:10.96.0.1"), &pod(0), false), Ok(Verdict::Capture(ip("::ffff:10.0.0.5"))));
        assert_eq!(capture(ip("fd00:96::1"), &pod(0), false), Ok(Verdict::Capture(ip("fd00::5"))));
        let v4_only = Pod::new(ip("10.0.0.5"), Ip::UNSPECIFIED, 1, 0, 0, 2, Ip::UNSPECIFIED, Ip::UNSPECIFIED);
        let refusal = capture(ip("fd00:96::1"), &v4_only, false).unwrap_err();
        assert_eq!(refusal, Refusal { outcome: Outcome::ConnectNoAddress, errno: EADDRNOTAVAIL });
    }

    #[test]
    fn a_silent_daemon_refuses_or_lets_pass_as_the_workload_says() {
        let refusal = capture(ip("10.96.0.1"), &pod(0), true).unwrap_err();
        assert_eq!(refusal, Refusal { outcome: Outcome::ConnectDaemonDown, errno: ECONNREFUSED });
        let open = capture(ip("10.96.0.1"), &pod(Pod::FAIL_OPEN), true);
        assert_eq!(open, Ok(Verdict::Pass(Outcome::ConnectFailOpen)));
    }

    #[test]
    fn self_traffic_is_told_from_arrivals() {
        assert!(is_self_traffic(ip("fd00::5"), ip("fd00::5")));
        assert!(is_self_traffic(ip("8.8.8.8"), ip("127.0.0.1")));
        assert!(is_self_traffic(ip("127.0.0.1"), ip("10.0.0.5")));
        assert!(!is_self_traffic(ip("10.0.0.6"), ip("10.0.0.5")));
        assert_eq!(arrival(15001, 15001), Arrival::MeshPort);
        assert_eq!(arrival(80, 15001), Arrival::Plaintext);
        assert_eq!(announced(arrival(15001, 15001)), Arrival::SelfTraffic);
        assert_eq!(announced(arrival(80, 15001)), Arrival::Delivery);
    }

    #[test]
    fn a_counted_lookup_outcome_says_the_verdict_that_was_given() {
        let modes = [None, Some(Mode::Disabled), Some(Mode::Permissive), Some(Mode::Strict)];
        let arrivals =
            [Arrival::SelfTraffic, Arrival::Delivery, Arrival::Authenticated, Arrival::Plaintext, Arrival::MeshPort];
        let denied = Matched::new(1, 0, 0, 0, 0, 0);
        for (mode, arrival, matched) in modes.into_iter().flat_map(|mode| {
            arrivals.into_iter().flat_map(move |arrival| [(mode, arrival, Matched::NOTHING), (mode, arrival, denied)])
        }) {
            let decision = policy::decide(mode, arrival, &matched);
            let counted = lookup_outcome(&decision, arrival).verdict();
            let expected = if decision.verdict == policy::Verdict::Drop { "drop" } else { "pass" };
            assert_eq!(counted, expected, "{mode:?} {arrival:?}");
        }
    }

    #[test]
    fn all_versions_of_bbr_pace_and_nothing_else() {
        let name = |text: &[u8]| {
            let mut name = [0; CONGESTION_NAME];
            name[..text.len()].copy_from_slice(text);
            name
        };
        for (text, is_paced) in [("bbr", true), ("bbr3", true), ("cubic", false), ("reno", false), ("bb", false)] {
            assert_eq!(paces(&name(text.as_bytes())), is_paced, "{text}");
        }
    }
}
