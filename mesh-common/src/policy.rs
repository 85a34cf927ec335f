//! The one decision about a connection to a workload, asked by the kernel (at connect() and in `sk_lookup`), by the
//! proxy on both sides, and by `nodemesh explain`.
//!
//! What the rules of a workload's policies say about one source and port is [`Matched`]: the kernel joins it from
//! `VERDICTS`, the daemon computes it from the rules. What follows from it is [`decide`], the same for all.

use crate::abi::pod;

/// A workload's (or port's) mutual-TLS mode.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Not meshed: neither captured nor guarded.
    Disabled = 0,
    /// Mutual TLS where the peer can, plaintext admitted.
    Permissive = 1,
    /// Mutual TLS only.
    Strict = 2,
}

impl Mode {
    /// Reads a mode back from a map; a number this version does not know is the safest mode.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Disabled,
            1 => Self::Permissive,
            _ => Self::Strict,
        }
    }

    /// As people and catalogs write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }
}

/// How a new connection to a workload arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The workload itself: remote and local address are the same.
    SelfTraffic,
    /// The daemon's own delivery of a connection that was decided when it came through the tunnel.
    Delivery,
    /// Through the tunnel, from a peer whose identity is proven.
    Authenticated,
    /// Anyone else, in plaintext, for an application port.
    Plaintext,
    /// Anyone else, for the port of the daemon's in-pod listener.
    MeshPort,
}

pod! {
    /// Key of `VERDICTS`: a policy group (a workload's policies and default, numbered; 0 is "none, allow"), one of the
    /// sources that a connection has ([`source`]), and a destination port, 0 for rules that hold for every port.
    pub struct VerdictKey [12] {
        group: u32,
        source: u32,
        port_be: u16,
        ; reserved pad: [u8; 2]
    }
}

/// The sources under which rules are filed. A connection has several: everyone, authenticated if it is, its identity,
/// and the class of its address.
pub mod source {
    /// Rules for every source. The entry for every port (0) exists for each group: it carries the group's flags.
    pub const EVERYONE: u32 = 0;
    /// Rules for every proven identity.
    pub const AUTHENTICATED: u32 = 1;
    /// The smallest number of an identity.
    pub const FIRST_IDENTITY: u32 = 2;
    /// Set in the number of an address class: what `RANGES` says about a source address, per group.
    pub const CLASS: u32 = 1 << 31;
}

pod! {
    /// Value of `VERDICTS`: of each kind, the number of the first rule that matches (1 is the group's first), or 0.
    pub struct Matched [24] {
        deny: u32,
        allow: u32,
        audit: u32,
        /// Rules of policies in dry-run: reported, never enforced.
        dry_deny: u32,
        dry_allow: u32,
        /// The group's [`Group`] flags; only in its header, 0 elsewhere.
        flags: u32,
    }
}

/// Flags of a policy group.
pub struct Group;

impl Group {
    /// It has a policy that allows: what no rule allows is denied.
    pub const HAS_ALLOW: u32 = 1;
    /// A policy in dry-run allows: what no rule allows would be denied.
    pub const HAS_DRY_ALLOW: u32 = 2;
    /// Without a policy that allows, the default is to deny.
    pub const DENY_BY_DEFAULT: u32 = 4;
}

impl Matched {
    /// No policy, default allow: group 0.
    pub const NOTHING: Self = Self::new(0, 0, 0, 0, 0, 0);
    /// Of a group that the kernel does not know: nothing is allowed.
    pub const UNKNOWN: Self = Self::new(0, 0, 0, 0, 0, Group::DENY_BY_DEFAULT);

    /// What both say together.
    #[inline(always)]
    #[must_use]
    pub const fn and(&self, other: &Self) -> Self {
        Self {
            deny: first(self.deny, other.deny),
            allow: first(self.allow, other.allow),
            audit: first(self.audit, other.audit),
            dry_deny: first(self.dry_deny, other.dry_deny),
            dry_allow: first(self.dry_allow, other.dry_allow),
            flags: self.flags | other.flags,
        }
    }
}

/// The smaller rule number, where 0 is none.
#[inline(always)]
const fn first(a: u32, b: u32) -> u32 {
    // None wraps to the largest number.
    let (a, b) = (a.wrapping_sub(1), b.wrapping_sub(1));
    let smaller = if a < b { a } else { b };
    smaller.wrapping_add(1)
}

/// What the rules of a group say about a connection, joined from `VERDICTS`. `sources` are those that the connection
/// has besides [`source::EVERYONE`], which also stands for "none" among them.
///
/// The group's header is asked for last: the daemon writes it last and removes it first, so that whoever finds it has
/// found all that there is. Without it the group is being taken away, or never was.
#[inline(always)]
#[must_use]
pub fn join<const N: usize>(
    group: u32,
    sources: [u32; N],
    port_be: u16,
    entry: impl Fn(&VerdictKey) -> Option<Matched>,
) -> Matched {
    if group == 0 {
        return Matched::NOTHING;
    }
    let mut matched = Matched::NOTHING;
    for source in sources {
        if source != source::EVERYONE {
            for port_be in [port_be, 0] {
                if let Some(more) = entry(&VerdictKey::new(group, source, port_be)) {
                    matched = matched.and(&more);
                }
            }
        }
    }
    if let Some(more) = entry(&VerdictKey::new(group, source::EVERYONE, port_be)) {
        matched = matched.and(&more);
    }
    match entry(&VerdictKey::new(group, source::EVERYONE, 0)) {
        Some(header) => matched.and(&header),
        None => Matched::UNKNOWN,
    }
}

#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Drop,
}

/// Why a verdict is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The address is not in the mesh, or its mode is `Disabled`.
    Unmeshed,
    /// The workload calls itself.
    SelfTraffic,
    /// Decided before.
    Delivery,
    /// No policy allows or denies, and the default is to allow.
    DefaultAllow,
    /// A rule allows.
    Allowed,
    /// A rule denies.
    Denied,
    /// Policies allow others, and no rule allows this.
    NotAllowed,
    /// No policy allows, and the default is to deny.
    DefaultDeny,
    /// Plaintext toward `Strict`.
    Strict,
    /// Nobody outside of the workload may dial the daemon's listener.
    MeshPort,
}

impl Reason {
    pub const ALL: [Self; 10] = [
        Self::Unmeshed,
        Self::SelfTraffic,
        Self::Delivery,
        Self::DefaultAllow,
        Self::Allowed,
        Self::Denied,
        Self::NotAllowed,
        Self::DefaultDeny,
        Self::Strict,
        Self::MeshPort,
    ];

    /// A stable label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unmeshed => "unmeshed",
            Self::SelfTraffic => "self",
            Self::Delivery => "delivery",
            Self::DefaultAllow => "default_allow",
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::NotAllowed => "not_allowed",
            Self::DefaultDeny => "default_deny",
            Self::Strict => "strict",
            Self::MeshPort => "mesh_port",
        }
    }
}

/// A verdict, why, and the rule that gave it (0 where no rule did).
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    pub reason: Reason,
    pub rule: u32,
}

impl Decision {
    #[inline(always)]
    const fn new(verdict: Verdict, reason: Reason, rule: u32) -> Self {
        Self { verdict, reason, rule }
    }
}

/// Decides whether a new connection may reach a workload in `mode` (`None`: an address that is not in the mesh), given
/// what the rules that are in force say about it.
#[inline(always)]
pub const fn decide(mode: Option<Mode>, arrival: Arrival, matched: &Matched) -> Decision {
    match (mode, arrival) {
        (_, Arrival::SelfTraffic) => Decision::new(Verdict::Pass, Reason::SelfTraffic, 0),
        (_, Arrival::Delivery) => Decision::new(Verdict::Pass, Reason::Delivery, 0),
        (None | Some(Mode::Disabled), _) => Decision::new(Verdict::Pass, Reason::Unmeshed, 0),
        (Some(Mode::Permissive | Mode::Strict), Arrival::MeshPort) => Decision::new(Verdict::Drop, Reason::MeshPort, 0),
        (Some(Mode::Strict), Arrival::Plaintext) => Decision::new(Verdict::Drop, Reason::Strict, 0),
        (Some(Mode::Permissive), Arrival::Plaintext)
        | (Some(Mode::Permissive | Mode::Strict), Arrival::Authenticated) => authorize(matched),
    }
}

/// What the rules say, where the mode leaves it to them: DENY before ALLOW before the default.
#[inline(always)]
pub const fn authorize(matched: &Matched) -> Decision {
    by_rules(matched.deny, matched.allow, matched.flags & Group::HAS_ALLOW != 0, matched.flags)
}

/// [`authorize`] as it would be with the policies in dry-run in force.
#[inline(always)]
pub const fn authorize_with_dry_run(matched: &Matched) -> Decision {
    by_rules(
        first(matched.deny, matched.dry_deny),
        first(matched.allow, matched.dry_allow),
        matched.flags & (Group::HAS_ALLOW | Group::HAS_DRY_ALLOW) != 0,
        matched.flags,
    )
}

#[inline(always)]
const fn by_rules(deny: u32, allow: u32, has_allow: bool, flags: u32) -> Decision {
    if deny != 0 {
        Decision::new(Verdict::Drop, Reason::Denied, deny)
    } else if allow != 0 {
        Decision::new(Verdict::Pass, Reason::Allowed, allow)
    } else if has_allow {
        Decision::new(Verdict::Drop, Reason::NotAllowed, 0)
    } else if flags & Group::DENY_BY_DEFAULT != 0 {
        Decision::new(Verdict::Drop, Reason::DefaultDeny, 0)
    } else {
        Decision::new(Verdict::Pass, Reason::DefaultAllow, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARRIVALS: [Arrival; 5] =
        [Arrival::SelfTraffic, Arrival::Delivery, Arrival::Authenticated, Arrival::Plaintext, Arrival::MeshPort];

    fn matched(deny: u32, allow: u32, flags: u32) -> Matched {
        Matched::new(deny, allow, 0, 0, 0, flags)
    }

    fn verdict(mode: Mode, arrival: Arrival, matched: &Matched) -> Verdict {
        decide(Some(mode), arrival, matched).verdict
    }

    #[test]
    fn strict_admits_only_authenticated_and_self_traffic() {
        let strict = |arrival| verdict(Mode::Strict, arrival, &Matched::NOTHING);
        assert_eq!(strict(Arrival::Plaintext), Verdict::Drop);
        assert_eq!(strict(Arrival::MeshPort), Verdict::Drop);
        assert_eq!(strict(Arrival::Authenticated), Verdict::Pass);
        assert_eq!(strict(Arrival::Delivery), Verdict::Pass);
        assert_eq!(strict(Arrival::SelfTraffic), Verdict::Pass);
    }

    #[test]
    fn permissive_admits_plaintext_but_never_the_mesh_port() {
        assert_eq!(verdict(Mode::Permissive, Arrival::Plaintext, &Matched::NOTHING), Verdict::Pass);
        assert_eq!(verdict(Mode::Permissive, Arrival::MeshPort, &Matched::NOTHING), Verdict::Drop);
    }

    #[test]
    fn what_is_not_in_the_mesh_is_left_alone() {
        let denied = matched(1, 0, 0);
        for arrival in ARRIVALS {
            assert_eq!(decide(None, arrival, &denied).verdict, Verdict::Pass);
            assert_eq!(verdict(Mode::Disabled, arrival, &denied), Verdict::Pass);
        }
    }

    #[test]
    fn denying_rules_come_before_allowing_ones_and_those_before_the_default() {
        let of = |deny, allow, flags| decide(Some(Mode::Strict), Arrival::Authenticated, &matched(deny, allow, flags));
        assert_eq!(of(2, 1, Group::HAS_ALLOW), Decision::new(Verdict::Drop, Reason::Denied, 2));
        assert_eq!(of(0, 3, Group::HAS_ALLOW), Decision::new(Verdict::Pass, Reason::Allowed, 3));
        assert_eq!(of(0, 0, Group::HAS_ALLOW), Decision::new(Verdict::Drop, Reason::NotAllowed, 0));
        assert_eq!(of(0, 0, Group::DENY_BY_DEFAULT), Decision::new(Verdict::Drop, Reason::DefaultDeny, 0));
        assert_eq!(of(0, 0, 0), Decision::new(Verdict::Pass, Reason::DefaultAllow, 0));
        assert_eq!(of(0, 3, Group::DENY_BY_DEFAULT), Decision::new(Verdict::Pass, Reason::Allowed, 3));
    }

    #[test]
    fn plaintext_is_held_to_the_rules_too() {
        let denied = decide(Some(Mode::Permissive), Arrival::Plaintext, &matched(0, 0, Group::HAS_ALLOW));
        assert_eq!(denied, Decision::new(Verdict::Drop, Reason::NotAllowed, 0));
    }

    #[test]
    fn policies_in_dry_run_change_only_what_would_be() {
        let matched = Matched::new(0, 0, 0, 4, 0, Group::HAS_DRY_ALLOW);
        assert_eq!(authorize(&matched).verdict, Verdict::Pass);
        assert_eq!(authorize_with_dry_run(&matched), Decision::new(Verdict::Drop, Reason::Denied, 4));
        let matched = Matched::new(0, 0, 0, 0, 0, Group::HAS_DRY_ALLOW);
        assert_eq!(authorize_with_dry_run(&matched).reason, Reason::NotAllowed);
    }

    #[test]
    fn of_several_matches_the_first_rule_is_named() {
        let a = Matched::new(0, 7, 3, 0, 9, 1);
        let b = Matched::new(5, 2, 0, 0, 0, 2);
        assert_eq!(a.and(&b), Matched::new(5, 2, 3, 0, 9, 3));
        assert_eq!(a.and(&b), b.and(&a));
        assert_eq!(a.and(&Matched::NOTHING), a);
    }

    #[test]
    fn a_join_takes_what_holds_for_each_source_on_the_port_and_on_every_port() {
        let entry = |key: &VerdictKey| match (key.group(), key.source(), key.port_be()) {
            (9, source::EVERYONE, 0) => Some(Matched::new(0, 0, 0, 0, 0, Group::HAS_ALLOW)),
            (9, source::EVERYONE, 80) => Some(Matched::new(0, 0, 5, 0, 0, 0)),
            (9, source::AUTHENTICATED, 0) => Some(Matched::new(0, 4, 0, 0, 0, 0)),
            (9, 77, 80) => Some(Matched::new(0, 3, 0, 0, 6, 0)),
            (9, 78, 0) => Some(Matched::new(2, 0, 0, 0, 0, 0)),
            // Without its header.
            (8, 77, 80) => Some(Matched::new(0, 1, 0, 0, 0, 0)),
            _ => None,
        };
        let allow = Group::HAS_ALLOW;
        let authenticated = [source::AUTHENTICATED, 77, source::EVERYONE];
        assert_eq!(join(9, authenticated, 80, entry), Matched::new(0, 3, 5, 0, 6, allow));
        assert_eq!(join(9, authenticated, 81, entry), Matched::new(0, 4, 0, 0, 0, allow));
        assert_eq!(join(9, [78], 81, entry), Matched::new(2, 0, 0, 0, 0, allow));
        assert_eq!(join(9, [source::EVERYONE], 81, entry), Matched::new(0, 0, 0, 0, 0, allow));
        assert_eq!(join(0, authenticated, 80, entry), Matched::NOTHING);
    }

    #[test]
    fn a_group_without_its_header_lets_nothing_pass() {
        let entry = |key: &VerdictKey| (key.source() == 77).then_some(Matched::new(0, 1, 0, 0, 0, 0));
        assert_eq!(authorize(&join(8, [77], 80, entry)), Decision::new(Verdict::Drop, Reason::DefaultDeny, 0));
    }

    #[test]
    fn an_unknown_mode_is_read_as_strict() {
        assert_eq!(Mode::from_number(77), Mode::Strict);
        for mode in [Mode::Disabled, Mode::Permissive, Mode::Strict] {
            assert_eq!(Mode::from_number(mode as u32), mode);
        }
    }
}
