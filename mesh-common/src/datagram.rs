//! UDP: which datagrams are captured and where they go. The pure parts; the map look-ups are in the hooks.
//!
//! A captured datagram goes to an **alias**: an address that is local to the workload's namespace and nowhere else, and
//! whose last bits are the number of the frontend it was sent to. So the daemon's one socket there learns the frontend
//! from the datagram itself, whoever's socket sent it and however many frontends that socket speaks to. Deliveries come
//! from an alias too ([`DELIVERY`]), and `ALIASES` says whom an alias stands for.
//!
//! No packet from a wire can have an alias as its source: the kernel drops IPv4 packets whose source is an address of
//! its own, and the IPv6 aliases of each workload have a random prefix that leaves the workload as little as they do.

use crate::addr::Ip;
use crate::capture::{self, EADDRNOTAVAIL, ECONNREFUSED, Refusal};
use crate::outcome::Outcome;
use crate::policy::{self, Arrival, Decision, Reason};
use crate::service::{DatagramFrontend, Pod};

/// The first IPv4 alias of every workload: 245.0.0.0/8 is of the reserved class E, which nobody routes.
pub const ALIAS4: Ip = Ip::from_v4([245, 0, 0, 0]);
/// Bits of a frontend's number.
pub const NUMBER_BITS: u32 = 24;
/// The largest number of a frontend.
pub const LAST_NUMBER: u32 = (1 << NUMBER_BITS) - 1;
/// The number whose alias the daemon's deliveries come from.
pub const DELIVERY: u32 = 1;
/// The smallest number of a frontend.
pub const FIRST_NUMBER: u32 = 2;

/// The alias of a number; `base` is the workload's first alias.
#[inline(always)]
#[must_use]
pub const fn alias(base: Ip, number: u32) -> Ip {
    let [a, b, c, d] = base.words();
    Ip::from_words([a, b, c, d | (number & LAST_NUMBER).to_be()])
}

/// The number of an alias of `base`; `None` if it is none.
#[inline(always)]
#[must_use]
pub fn number(base: Ip, alias: Ip) -> Option<u32> {
    let (known, asked) = (base.words(), alias.words());
    let low = LAST_NUMBER.to_be();
    let is_alias = known[..3] == asked[..3] && known[3] & !low == asked[3] & !low;
    is_alias.then_some(u32::from_be(asked[3] & low))
}

/// The workload's first alias of the destination's family; unspecified if it has none.
#[inline(always)]
#[must_use]
pub fn base_of(pod: &Pod, destination: Ip) -> Ip {
    if destination.is_v4() { pod.alias4() } else { pod.alias6() }
}

/// Why a workload's datagram is left alone without any look-up, if it is.
#[inline(always)]
#[must_use]
pub fn exemption(mark: u32, destination: Ip, pod: &Pod, own_mark: u32) -> Option<Outcome> {
    if own_mark != 0 && mark == own_mark {
        Some(Outcome::DatagramOwn)
    } else if destination.is_loopback() || destination.is_unspecified() {
        Some(Outcome::DatagramLoopback)
    } else if destination == pod.ip4() || destination == pod.ip6() {
        Some(Outcome::DatagramSelf)
    } else {
        None
    }
}

/// A frontend that somebody answers at.
///
/// # Errors
///
/// It has no backend: refused at once, as a closed port would.
#[inline(always)]
pub const fn answered(frontend: &DatagramFrontend) -> Result<(), Refusal> {
    if frontend.backends() == 0 {
        Err(Refusal { outcome: Outcome::DatagramNoEndpoints, errno: ECONNREFUSED })
    } else {
        Ok(())
    }
}

/// The refusal of a datagram that policy denies; `errno` is the setting of [`crate::maps::CfgSlot::DeniedErrno`].
#[inline(always)]
pub const fn denied(decision: &Decision, errno: u64) -> Result<(), Refusal> {
    match capture::denied(decision, errno) {
        Ok(()) => Ok(()),
        Err(Refusal { errno, .. }) => Err(Refusal { outcome: Outcome::DatagramDenied, errno }),
    }
}

/// Where a datagram for a frontend goes: its alias, or `None` if it goes where it was sent to, because the daemon is
/// silent and the workload fails open.
///
/// # Errors
///
/// The datagram must be refused.
#[inline(always)]
pub fn redirect(
    pod: &Pod,
    destination: Ip,
    frontend: &DatagramFrontend,
    daemon_is_silent: bool,
) -> Result<Option<Ip>, Refusal> {
    if daemon_is_silent {
        return if pod.flags() & Pod::FAIL_OPEN != 0 {
            Ok(None)
        } else {
            Err(Refusal { outcome: Outcome::DatagramDaemonDown, errno: ECONNREFUSED })
        };
    }
    let base = base_of(pod, destination);
    if base.is_unspecified() {
        Err(Refusal { outcome: Outcome::DatagramNoAddress, errno: EADDRNOTAVAIL })
    } else {
        Ok(Some(alias(base, frontend.number())))
    }
}

/// How a datagram for a guarded port arrives. A workload's traffic with its own address can be told from a forgery only
/// where the kernel drops forgeries: IPv4, and loopback.
#[inline(always)]
#[must_use]
pub fn arrival(remote: Ip, local: Ip, is_from_alias: bool) -> Arrival {
    if is_from_alias {
        Arrival::Delivery
    } else if remote.is_loopback() || local.is_loopback() || (remote == local && local.is_v4()) {
        Arrival::SelfTraffic
    } else {
        Arrival::Plaintext
    }
}

/// What the guard counts for a decision about a datagram.
#[inline(always)]
#[must_use]
pub const fn outcome(decision: &Decision) -> Outcome {
    match decision.reason {
        Reason::SelfTraffic => Outcome::DatagramSelfTraffic,
        Reason::Delivery => Outcome::DatagramDelivered,
        Reason::Unmeshed => Outcome::DatagramUnguarded,
        Reason::MeshPort => Outcome::DatagramMeshPort,
        Reason::Strict => Outcome::DatagramStrict,
        Reason::Denied | Reason::NotAllowed | Reason::DefaultDeny => Outcome::DatagramPolicy,
        Reason::Allowed | Reason::DefaultAllow => Outcome::DatagramPlaintext,
    }
}

/// The verdict about a datagram for the daemon's port at the workload's own address: nobody has business there.
pub const MESH_PORT: (policy::Verdict, Outcome) = (policy::Verdict::Drop, Outcome::DatagramMeshPort);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Matched, Mode};

    fn ip(text: &str) -> Ip {
        text.parse::<core::net::IpAddr>().unwrap().into()
    }

    fn pod(flags: u16) -> Pod {
        Pod::new(ip("10.0.0.5"), ip("fd00::5"), 1, 0, flags, 2, ALIAS4, ip("fd12:3456:789a:bcde:f012:3456::"))
    }

    #[test]
    fn an_alias_carries_its_number() {
        for base in [ALIAS4, pod(0).alias6()] {
            for number in [DELIVERY, FIRST_NUMBER, 0x01_02_03, LAST_NUMBER] {
                assert_eq!(super::number(base, alias(base, number)), Some(number));
            }
        }
        assert_eq!(alias(ALIAS4, 0x01_02_03), ip("245.1.2.3"));
        assert_eq!(number(ALIAS4, ip("246.1.2.3")), None);
        assert_eq!(number(ALIAS4, ip("fd12:3456:789a:bcde:f012:3456::2")), None);
        assert_eq!(number(pod(0).alias6(), ip("fd12:3456:789a:bcde:f012:3457::2")), None);
    }

    #[test]
    fn the_daemon_and_the_workload_itself_are_left_alone() {
        let destination = ip("10.96.0.1");
        assert_eq!(exemption(0, destination, &pod(0), 7), None);
        assert_eq!(exemption(0, destination, &pod(0), 0), None, "an unset mark exempts no unmarked socket");
        assert_eq!(exemption(7, destination, &pod(0), 7), Some(Outcome::DatagramOwn));
        for loopback in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
            assert_eq!(exemption(0, ip(loopback), &pod(0), 7), Some(Outcome::DatagramLoopback), "{loopback}");
        }
        for own in ["10.0.0.5", "::ffff:10.0.0.5", "fd00::5"] {
            assert_eq!(exemption(0, ip(own), &pod(0), 7), Some(Outcome::DatagramSelf), "{own}");
        }
    }

    #[test]
    fn a_datagram_is_redirected_to_the_alias_of_its_frontend() {
        let frontend = DatagramFrontend::new(1, 1, 0, 0x0a0b, 0, 0);
        assert_eq!(redirect(&pod(0), ip("10.96.0.1"), &frontend, false), Ok(Some(ip("245.0.10.11"))));
        let v6 = redirect(&pod(0), ip("fd96::1"), &frontend, false);
        assert_eq!(v6, Ok(Some(ip("fd12:3456:789a:bcde:f012:3456:0:a0b"))));
        assert_eq!(redirect(&pod(Pod::FAIL_OPEN), ip("10.96.0.1"), &frontend, true), Ok(None));
        let refused = redirect(&pod(0), ip("10.96.0.1"), &frontend, true).unwrap_err();
        assert_eq!(refused, Refusal { outcome: Outcome::DatagramDaemonDown, errno: ECONNREFUSED });
        let bare = Pod::new(ip("10.0.0.5"), Ip::UNSPECIFIED, 1, 0, 0, 2, ALIAS4, Ip::UNSPECIFIED);
        let refused = redirect(&bare, ip("fd96::1"), &frontend, false).unwrap_err();
        assert_eq!(refused, Refusal { outcome: Outcome::DatagramNoAddress, errno: EADDRNOTAVAIL });
        assert!(answered(&frontend).is_ok());
        assert_eq!(
            answered(&DatagramFrontend::new(1, 0, 0, 2, 0, 0)),
            Err(Refusal { outcome: Outcome::DatagramNoEndpoints, errno: ECONNREFUSED })
        );
    }

    #[test]
    fn only_where_the_kernel_drops_forgeries_is_the_own_address_believed() {
        assert_eq!(arrival(ip("10.0.0.5"), ip("10.0.0.5"), false), Arrival::SelfTraffic);
        assert_eq!(arrival(ip("fd00::5"), ip("fd00::5"), false), Arrival::Plaintext);
        assert_eq!(arrival(ip("::1"), ip("::1"), false), Arrival::SelfTraffic);
        assert_eq!(arrival(ip("10.0.0.6"), ip("10.0.0.5"), false), Arrival::Plaintext);
        assert_eq!(arrival(ip("245.0.0.1"), ip("10.0.0.5"), true), Arrival::Delivery);
    }

    #[test]
    fn a_counted_outcome_says_the_verdict_that_was_given() {
        let modes = [None, Some(Mode::Disabled), Some(Mode::Permissive), Some(Mode::Strict)];
        let denied = Matched::new(1, 0, 0, 0, 0, 0);
        for mode in modes {
            for arrival in [Arrival::SelfTraffic, Arrival::Delivery, Arrival::Plaintext, Arrival::MeshPort] {
                for matched in [Matched::NOTHING, denied] {
                    let decision = policy::decide(mode, arrival, &matched);
                    let expected = if decision.verdict == policy::Verdict::Drop { "drop" } else { "pass" };
                    assert_eq!(outcome(&decision).verdict(), expected, "{mode:?} {arrival:?}");
                }
            }
        }
    }
}
