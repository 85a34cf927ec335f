//! Policies: what holds of the tables that any of them become, on any way there.

use super::policy_tests::{account, address, as_object, identity, policy, range, rule};
use super::properties::{any_update, apply};
use super::replay::Kernel;
use super::tests::{labels, name};
use super::*;
use crate::model::{AuthorizationPolicy, DefaultAction, PolicyAction, PolicyTarget, Rule, Source, SpiffePattern};
use mesh_common::policy::source::EVERYONE;
use mesh_common::policy::{Decision, Verdict, VerdictKey};
use mesh_common::service::{AppPort, CidrAction, CidrKey, Frontend};
use proptest::prelude::*;

fn any_source() -> impl Strategy<Value = Source> {
    let ranges = vec![
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.0.1.0/24",
        "10.0.1.1/32",
        "::/0",
        "fd01::/64",
        "fd01::1/128",
        "::ffff:10.0.0.0/110",
    ];
    prop_oneof![
        3 => prop::sample::select(ranges).prop_map(range),
        2 => prop::sample::select(vec!["web", "cart"]).prop_map(account),
        1 => Just(Source::ServiceAccount { namespace: "bank".into(), name: None }),
        1 => Just(Source::Namespace("shop".into())),
        2 => prop::sample::select(vec!["*", "spiffe://example.org/ns/*/sa/web", "spiffe://example.org/ns/shop/sa/c*"])
            .prop_map(|pattern| Source::Spiffe(SpiffePattern::parse(pattern).unwrap())),
    ]
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let sources = prop::option::weighted(0.8, prop::collection::vec(any_source(), 0..4));
    let ports = prop::sample::subsequence(vec![8080_u16, 8081, 9090], 0..3);
    (sources, ports).prop_map(|(sources, ports)| rule(sources, &ports))
}

fn any_policy() -> impl Strategy<Value = AuthorizationPolicy> {
    let target = prop_oneof![
        prop::sample::select(vec![
            labels(&[]),
            labels(&[("app", "web")]),
            labels(&[("tier", "front")]),
            labels(&[("tier", "x")])
        ])
        .prop_map(PolicyTarget::Selector),
        prop::sample::select(vec!["s0", "s1", "s2"]).prop_map(|service| PolicyTarget::Service(service.into())),
    ];
    let action = prop::sample::select(vec![PolicyAction::Allow, PolicyAction::Deny, PolicyAction::Audit]);
    let parts = (
        0..4_u8,
        prop::collection::vec(target, 0..3),
        action,
        prop::bool::weighted(0.2),
        prop::collection::vec(any_rule(), 0..4),
    );
    parts.prop_map(|(index, targets, action, dry_run, rules)| AuthorizationPolicy {
        name: name(&format!("p{index}")),
        targets,
        action,
        dry_run,
        rules,
    })
}

fn any_change() -> impl Strategy<Value = Update> {
    prop_oneof![
        4 => any_update(),
        2 => (any_update(), 0..IDENTITIES, any::<bool>()).prop_map(|(update, account, deny)| match update {
            Update::Upsert(Object::Workload(workload)) => {
                let mut workload = (*workload).clone();
                workload.identity = identity(account);
                workload.default_action = if deny { DefaultAction::Deny } else { DefaultAction::Allow };
                Update::Upsert(as_object(workload))
            }
            other => other,
        }),
        3 => any_policy().prop_map(|policy| Update::Upsert(Object::Policy(Arc::new(policy)))),
        1 => (0..4_u8).prop_map(|index| Update::Remove(ObjectKey::Policy(name(&format!("p{index}"))))),
    ]
}

/// As many as [`identity`] knows.
const IDENTITIES: usize = 3;
const CALLERS: [&str; 5] = ["10.0.1.1", "10.0.1.9", "192.0.2.9", "fd01::1", "fd02::9"];
const PORTS: [u16; 4] = [80, 8080, 8081, 9090];

/// What each table says of each probe: of plaintext, and of connects by this node's identities.
fn probe(kernel: &Kernel, tables: &Tables) -> Vec<Option<Decision>> {
    let destinations = ["10.0.1.1", "10.0.1.2", "fd01::1", "10.96.0.1"].map(address);
    let targets = destinations.iter().flat_map(|ip| PORTS.map(|port| SocketAddr::new(*ip, port)));
    let numbers = (0..IDENTITIES).map(|index| tables.snapshot.identity_number(&identity(index)));
    let numbers: Vec<u32> = numbers.collect();
    targets
        .flat_map(|to| CALLERS.map(address).map(|from| (from, to)))
        .flat_map(|(from, to)| {
            let connects = numbers.iter().map(move |identity| kernel.connecting(*identity, from, to));
            std::iter::once(Some(kernel.arriving(from, to))).chain(connects)
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn tables_depend_on_the_policies_that_are_there_alone(changes in prop::collection::vec(any_change(), 0..40)) {
        let this = NodeName::parse("n1").unwrap();
        let (mut catalog, mut engine) = (Catalog::default(), Engine::new(this.clone()));
        let mut kernel = Kernel::of(engine.desired());
        for update in changes {
            apply(&mut catalog, update.clone());
            let previous = engine.desired().clone();
            engine.handle_update(update, Instant::now());
            diff(&previous, engine.desired()).into_iter().for_each(|op| kernel.apply(op));
        }
        let tables = engine.desired();
        prop_assert_eq!(&kernel, &Kernel::of(tables));
        let mut fresh = Engine::new(this.clone());
        fresh.handle_update(Update::Snapshot(catalog.clone()), Instant::now());
        prop_assert_eq!(fresh.desired(), tables);
        let mut stale = Engine::new(this);
        let gone = policy("gone", PolicyAction::Deny, vec![rule(None, &[])]);
        stale.handle_update(Update::Upsert(Object::Policy(Arc::new(gone))), Instant::now());
        stale.handle_update(Update::Snapshot(catalog), Instant::now());
        prop_assert_eq!(stale.desired(), tables);
    }

    #[test]
    fn the_kernel_joins_what_the_rules_say(changes in prop::collection::vec(any_change(), 0..40)) {
        let mut engine = Engine::new(NodeName::parse("n1").unwrap());
        changes.into_iter().for_each(|update| engine.handle_update(update, Instant::now()));
        let (tables, kernel) = (engine.desired(), Kernel::of(engine.desired()));
        let snapshot = &tables.snapshot;
        for (group, from, port) in snapshot.groups_by_number.values().flat_map(|group| {
            CALLERS.map(address).into_iter().flat_map(move |from| PORTS.map(|port| (group, from, port)))
        }) {
            prop_assert_eq!(kernel.plaintext(group.number, from, port), group.matched(None, from, port));
            for (id, number) in snapshot.identities.iter() {
                let joined = kernel.authenticated(group.number, *number, from, port);
                prop_assert_eq!(joined, group.matched(Some(id), from, port));
            }
        }
        for (address, workload) in snapshot.addresses.iter() {
            let group = snapshot.policies_of(&workload.name);
            let guards = tables.app_ports.iter().filter(|(key, _)| key.addr() == (*address).into());
            guards.for_each(|(_, guard)| assert_eq!(guard.group(), group.number));
            let captured = kernel.cidrs.get(&(128, CidrKey::new((*address).into())));
            prop_assert!(captured.is_none_or(|found| *found == CidrAction::PASS || found.group() == group.number));
        }
    }

    #[test]
    fn no_step_of_a_change_lets_through_what_is_denied_before_and_after(
        before in prop::collection::vec(any_change(), 0..25),
        after in prop::collection::vec(any_change(), 0..10),
    ) {
        let mut engine = Engine::new(NodeName::parse("n1").unwrap());
        before.into_iter().for_each(|update| engine.handle_update(update, Instant::now()));
        let old = engine.desired().clone();
        after.into_iter().for_each(|update| engine.handle_update(update, Instant::now()));
        let new = engine.desired();
        let mut kernel = Kernel::of(&old);
        // Numbers of identities that both have: others' pods are armed after and disarmed before.
        let both = Tables { snapshot: Arc::clone(&new.snapshot), ..old.clone() };
        let kept = |index: usize| old.snapshot.identity_number(&identity(index)) == new.snapshot.identity_number(&identity(index));
        let kept: Vec<bool> = std::iter::once(true).chain((0..IDENTITIES).map(kept)).collect();
        let denied = |decision: &Option<Decision>| decision.is_some_and(|decision| decision.verdict == Verdict::Drop);
        let (first, last) = (probe(&kernel, &both), probe(&Kernel::of(new), &both));
        for op in diff(&old, new) {
            kernel.apply(op);
            for (index, now) in probe(&kernel, &both).iter().enumerate() {
                if kept[index % kept.len()] && denied(&first[index]) && denied(&last[index]) {
                    prop_assert!(denied(now), "{op:?}: {:?} became {now:?}", first[index]);
                }
            }
            // And nothing refers to a group that is not there.
            let guards = kernel.app_ports.values().map(AppPort::group);
            let ranges = kernel.cidrs.values().map(CidrAction::group);
            let frontends = kernel.frontends.values().map(Frontend::group);
            for group in guards.chain(ranges).chain(frontends).filter(|group| *group != 0) {
                prop_assert!(kernel.verdicts.contains_key(&VerdictKey::new(group, EVERYONE, 0)), "{op:?}: {group}");
            }
        }
    }
}
