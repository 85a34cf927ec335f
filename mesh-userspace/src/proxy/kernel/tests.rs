//! Names for what the kernel decided.

use super::*;
use crate::engine::{GroupRule, RuleName};
use crate::model::{ObjectName, PolicyAction};
use mesh_common::policy::Group;

fn group() -> PolicyGroup {
    let rule = |policy: &str, action, dry_run| GroupRule {
        name: RuleName { policy: ObjectName::parse("shop", policy).unwrap(), rule: "0".into() },
        action,
        dry_run,
        sources: None,
        ports: Some([80].into()),
    };
    let rules = vec![
        rule("block", PolicyAction::Deny, false),
        rule("let", PolicyAction::Allow, false),
        rule("trial", PolicyAction::Deny, true),
    ];
    PolicyGroup { number: 5, flags: Group::HAS_ALLOW, rules }
}

#[test]
fn the_kernels_rule_is_the_one_that_is_named() {
    let group = group();
    for (verdict, rule, reason) in [
        (Verdict::Drop, 1, Reason::Denied),
        (Verdict::Drop, 0, Reason::NotAllowed),
        (Verdict::Pass, 2, Reason::Allowed),
    ] {
        let decision = decided(&group, verdict, rule);
        assert_eq!((decision.verdict, decision.reason, decision.rule), (verdict, reason, rule));
    }
    let open = PolicyGroup { flags: 0, ..group };
    assert_eq!(decided(&open, Verdict::Pass, 0).reason, Reason::DefaultAllow);
    let closed = PolicyGroup { flags: Group::DENY_BY_DEFAULT, ..open };
    assert_eq!(decided(&closed, Verdict::Drop, 0).reason, Reason::DefaultDeny);
}

#[test]
fn a_verdict_of_a_group_that_is_gone_is_told_without_a_name() {
    let snapshot = Snapshot::default();
    let record = |group, rule| {
        let (source, destination) = (Ip::from_v4([10, 0, 0, 1]), Ip::from_v4([10, 0, 0, 2]));
        VerdictRecord::new(0, 0, source, destination, 0, group, 0, rule, 0, 0, 0, 80_u16.to_be())
    };
    for (group, rule, verdict, reason) in [
        (9, 1, Verdict::Drop, Reason::Denied),
        (9, 0, Verdict::Drop, Reason::NotAllowed),
        (9, 4, Verdict::Pass, Reason::Allowed),
        // The group without policies needs no entry.
        (0, 0, Verdict::Pass, Reason::DefaultAllow),
    ] {
        let record = record(group, rule);
        let told = name(&snapshot, &record, verdict, None, [10, 0, 0, 1].into(), 80);
        assert_eq!((told.ruling.verdict, told.ruling.reason), (verdict, reason));
        assert_eq!((told.ruling.policy, told.ruling.rule), (None, None));
        assert_eq!(destination(&record), "10.0.0.2:80".parse().unwrap());
    }
}
