//! A connection's verdict with the names of what decided it. One function for both sides of the proxy, for the recheck
//! of live connections, and for `explain`; what the kernel decided is named from the same policy groups.

use crate::engine::{GroupRule, PolicyGroup, RuleName, Snapshot};
use crate::model::{ObjectName, PolicyAction, SpiffeId, Workload};
use mesh_common::policy::{self, Arrival, Decision, Matched, Reason, Verdict};
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// Who calls: a proven identity, if there is one, and an address.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    pub identity: Option<&'a SpiffeId>,
    pub address: IpAddr,
}

/// A verdict, why, and whose word it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruling {
    pub verdict: Verdict,
    pub reason: Reason,
    /// The policy whose rule decided. Where no rule allows ([`Reason::NotAllowed`]): the policy that allows others, if
    /// there is only one.
    pub policy: Option<ObjectName>,
    pub rule: Option<Arc<str>>,
}

/// What is known about one connection before its first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedVerdict {
    pub ruling: Ruling,
    /// The rule of an AUDIT policy that matches.
    pub audit: Option<RuleName>,
    /// What would be with the policies in dry-run in force, if that is another verdict.
    pub dry_run: Option<Ruling>,
}

impl NamedVerdict {
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.ruling.is_denied()
    }

    fn of_mode(decision: Decision) -> Self {
        Self { ruling: Ruling::unnamed(decision), audit: None, dry_run: None }
    }
}

impl Ruling {
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.verdict == Verdict::Drop
    }

    /// `allow` or `deny`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        if self.is_denied() { "deny" } else { "allow" }
    }

    fn unnamed(decision: Decision) -> Self {
        Self { verdict: decision.verdict, reason: decision.reason, policy: None, rule: None }
    }

    /// Names the rule behind a decision about a workload of this group; `with_dry_run`: one that would be.
    #[must_use]
    pub fn by_group(group: &PolicyGroup, decision: Decision, with_dry_run: bool) -> Self {
        let decided = group.rule(decision.rule).map(|rule| rule.name.clone());
        let (policy, rule) = match decided {
            Some(RuleName { policy, rule }) => (Some(policy), Some(rule)),
            None if decision.reason == Reason::NotAllowed => (only_allowing(group, with_dry_run), None),
            None => (None, None),
        };
        Self { policy, rule, ..Self::unnamed(decision) }
    }
}

impl fmt::Display for Ruling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.word(), self.reason.as_str())?;
        match (&self.policy, &self.rule) {
            (Some(policy), Some(rule)) => write!(f, " by rule {rule} of policy {policy}"),
            (Some(policy), None) => write!(f, " by policy {policy}: no rule of it matches"),
            _ => Ok(()),
        }
    }
}

/// Decides about a new connection to a port of a workload.
#[must_use]
pub fn decide(
    snapshot: &Snapshot,
    destination: &Workload,
    port: u16,
    arrival: Arrival,
    caller: Caller<'_>,
) -> NamedVerdict {
    let group = snapshot.policies_of(&destination.name);
    let matched = group.matched(caller.identity, caller.address, port);
    let decision = policy::decide(Some(destination.mode_of(port)), arrival, &matched);
    if is_by_rules(decision.reason) { by_rules(&group, &matched, decision) } else { NamedVerdict::of_mode(decision) }
}

/// What the group's rules say about a connection that was decided like this.
#[must_use]
pub fn by_rules(group: &PolicyGroup, matched: &Matched, decision: Decision) -> NamedVerdict {
    NamedVerdict {
        ruling: Ruling::by_group(group, decision, false),
        audit: group.rule(matched.audit()).map(|rule| rule.name.clone()),
        dry_run: group.dry_run_difference(matched).map(|would_be| Ruling::by_group(group, would_be, true)),
    }
}

/// Whether the rules were asked, and not the mode alone.
fn is_by_rules(reason: Reason) -> bool {
    match reason {
        Reason::DefaultAllow | Reason::Allowed | Reason::Denied | Reason::NotAllowed | Reason::DefaultDeny => true,
        Reason::Unmeshed | Reason::SelfTraffic | Reason::Delivery | Reason::Strict | Reason::MeshPort => false,
    }
}

/// The policy that allows others, if there is only one.
fn only_allowing(group: &PolicyGroup, with_dry_run: bool) -> Option<ObjectName> {
    let counts = |rule: &&GroupRule| rule.action == PolicyAction::Allow && (with_dry_run || !rule.dry_run);
    let policies: BTreeSet<&ObjectName> = group.rules.iter().filter(counts).map(|rule| &rule.name.policy).collect();
    match policies.len() {
        1 => policies.first().copied().cloned(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Source;
    use mesh_common::policy::Group;

    fn rule(policy: &str, rule: &str, action: PolicyAction, from: Option<&str>) -> GroupRule {
        GroupRule {
            name: RuleName { policy: ObjectName::parse("shop", policy).unwrap(), rule: rule.into() },
            action,
            dry_run: false,
            sources: from.map(|namespace| vec![Source::Namespace(namespace.into())]),
            ports: None,
        }
    }

    fn verdict(group: &PolicyGroup, namespace: &str) -> NamedVerdict {
        let identity = SpiffeId::parse(&format!("spiffe://example.org/ns/{namespace}/sa/web")).unwrap();
        let matched = group.matched(Some(&identity), [10, 0, 0, 1].into(), 80);
        by_rules(group, &matched, policy::authorize(&matched))
    }

    #[test]
    fn the_rule_that_decides_is_named() {
        let rules = vec![
            rule("block", "bad", PolicyAction::Deny, Some("evil")),
            rule("let", "friends", PolicyAction::Allow, Some("good")),
        ];
        let group = PolicyGroup { number: 7, flags: Group::HAS_ALLOW, rules };
        let denied = verdict(&group, "evil");
        assert_eq!(denied.ruling.to_string(), "deny: denied by rule bad of policy shop/block");
        let allowed = verdict(&group, "good");
        assert!(!allowed.is_denied());
        assert_eq!(allowed.ruling.to_string(), "allow: allowed by rule friends of policy shop/let");
        let other = verdict(&group, "other");
        assert_eq!(other.ruling.to_string(), "deny: not_allowed by policy shop/let: no rule of it matches");
    }

    #[test]
    fn of_several_policies_that_do_not_allow_none_is_blamed() {
        let rules =
            vec![rule("a", "0", PolicyAction::Allow, Some("good")), rule("b", "0", PolicyAction::Allow, Some("fine"))];
        let group = PolicyGroup { number: 7, flags: Group::HAS_ALLOW, rules };
        assert_eq!(verdict(&group, "other").ruling.to_string(), "deny: not_allowed");
    }

    #[test]
    fn audit_and_dry_run_are_told_beside_the_verdict() {
        let trial = GroupRule { dry_run: true, ..rule("trial", "soon", PolicyAction::Deny, Some("old")) };
        let group =
            PolicyGroup { number: 7, flags: 0, rules: vec![rule("log", "all", PolicyAction::Audit, None), trial] };
        let told = verdict(&group, "old");
        assert_eq!(told.ruling.to_string(), "allow: default_allow");
        assert_eq!(told.audit.unwrap().policy.to_string(), "shop/log");
        assert_eq!(told.dry_run.unwrap().to_string(), "deny: denied by rule soon of policy shop/trial");
        assert_eq!(verdict(&group, "new").dry_run, None, "the same verdict with and without it is no difference");
    }
}
