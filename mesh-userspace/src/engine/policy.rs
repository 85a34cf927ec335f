//! A workload's policies, compiled: which rules hold for it, and what they say about a caller.

use crate::model::{ObjectName, PolicyAction, Source, SpiffeId};
use mesh_common::policy::{Decision, Group, Matched, authorize, authorize_with_dry_run};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

/// All policies of a workload and its default. Workloads with the same ones share a group, and its number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyGroup {
    /// In kernel maps; 0 is the group without policies whose default is to allow.
    pub number: u32,
    /// [`Group`] flags.
    pub flags: u32,
    /// In the order of policies' names and of rules in them; a rule's number is its place, from 1.
    pub rules: Vec<GroupRule>,
}

/// One rule of one policy, as it holds for the group's workloads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleName {
    pub policy: ObjectName,
    pub rule: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupRule {
    pub name: RuleName,
    pub action: PolicyAction,
    pub dry_run: bool,
    /// `None`: everyone, also callers without an identity.
    pub sources: Option<Vec<Source>>,
    /// `None`: every port.
    pub ports: Option<BTreeSet<u16>>,
}

impl PolicyGroup {
    /// Whether it is group 0: nothing is denied.
    pub(super) fn is_default(&self) -> bool {
        self.flags == 0 && self.rules.is_empty()
    }

    /// What the rules say about a caller: its proven identity if it has one, its address, the workload's port.
    #[must_use]
    pub fn matched(&self, identity: Option<&SpiffeId>, address: IpAddr, port: u16) -> Matched {
        let address = address.to_canonical();
        let mut matched = Matched::new(0, 0, 0, 0, 0, self.flags);
        for (rule, number) in self.rules.iter().zip(1..) {
            if rule.matches(identity, address, port) {
                matched = matched.and(&rule.alone(number));
            }
        }
        matched
    }

    /// The rule of a number that [`Self::matched`] gave.
    #[must_use]
    pub fn rule(&self, number: u32) -> Option<&GroupRule> {
        self.rules.get(usize::try_from(number).ok()?.checked_sub(1)?)
    }

    /// What would be with the policies in dry-run in force, if that is another verdict.
    #[must_use]
    pub fn dry_run_difference(&self, matched: &Matched) -> Option<Decision> {
        let would_be = authorize_with_dry_run(matched);
        (would_be.verdict != authorize(matched).verdict).then_some(would_be)
    }
}

impl GroupRule {
    fn matches(&self, identity: Option<&SpiffeId>, address: IpAddr, port: u16) -> bool {
        let source = self.sources.as_ref().is_none_or(|sources| {
            sources.iter().any(|source| match source {
                Source::Range(range) => range.contains(&address),
                by_identity => identity.is_some_and(|identity| by_identity.matches_identity(identity)),
            })
        });
        source && self.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }

    /// What this rule alone says where it matches.
    #[must_use]
    pub fn alone(&self, number: u32) -> Matched {
        match (self.action, self.dry_run) {
            (PolicyAction::Deny, false) => Matched::new(number, 0, 0, 0, 0, 0),
            (PolicyAction::Allow, false) => Matched::new(0, number, 0, 0, 0, 0),
            (PolicyAction::Audit, _) => Matched::new(0, 0, number, 0, 0, 0),
            (PolicyAction::Deny, true) => Matched::new(0, 0, 0, number, 0, 0),
            (PolicyAction::Allow, true) => Matched::new(0, 0, 0, 0, number, 0),
        }
    }
}

/// The flag that a policy of this action gives to the groups it is in.
#[must_use]
pub(crate) fn flag(action: PolicyAction, dry_run: bool) -> u32 {
    match (action, dry_run) {
        (PolicyAction::Allow, false) => Group::HAS_ALLOW,
        (PolicyAction::Allow, true) => Group::HAS_DRY_ALLOW,
        (PolicyAction::Deny | PolicyAction::Audit, _) => 0,
    }
}
