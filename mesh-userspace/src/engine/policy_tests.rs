//! Policies: one example each of what they become.

use super::replay::Kernel;
use super::tests::{labels, mesh, name, node, service, workload};
use super::*;
use crate::model::{
    AuthorizationPolicy, DefaultAction, DeniedError, PolicyAction, PolicyTarget, Rule, Source, SpiffeId, SpiffePattern,
    TargetPort,
};
use mesh_common::policy::Group;
use mesh_common::policy::source::{CLASS, FIRST_IDENTITY};

const ACCOUNTS: [&str; 3] = [
    "spiffe://example.org/ns/shop/sa/web",
    "spiffe://example.org/ns/shop/sa/cart",
    "spiffe://example.org/ns/bank/sa/web",
];

pub(super) fn identity(index: usize) -> SpiffeId {
    SpiffeId::parse(ACCOUNTS[index]).unwrap()
}

pub(super) fn policy(called: &str, action: PolicyAction, rules: Vec<Rule>) -> AuthorizationPolicy {
    AuthorizationPolicy { name: name(called), targets: Vec::new(), action, dry_run: false, rules }
}

pub(super) fn rule(sources: Option<Vec<Source>>, ports: &[u16]) -> Rule {
    Rule { name: "rule".into(), sources, ports: ports.to_vec() }
}

pub(super) fn account(name: &str) -> Source {
    Source::ServiceAccount { namespace: "shop".into(), name: Some(name.into()) }
}

pub(super) fn range(range: &str) -> Source {
    Source::Range(range.parse().unwrap())
}

fn with_policies(objects: Vec<Object>, policies: Vec<AuthorizationPolicy>) -> Engine {
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    let nodes = ["n1", "n2"].map(|n| Object::Node(Arc::new(node(n))));
    let policies = policies.into_iter().map(|policy| Object::Policy(Arc::new(policy)));
    for object in nodes.into_iter().chain(objects).chain(policies) {
        engine.handle_update(Update::Upsert(object), Instant::now());
    }
    engine
}

pub(super) fn as_object(workload: Workload) -> Object {
    Object::Workload(Arc::new(workload))
}

pub(super) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn rules_are_numbered_by_policy_name_and_keep_to_workloads_they_can_hold_for() {
    let nobody = rule(Some(Vec::new()), &[]);
    let mut elsewhere = policy("c", PolicyAction::Deny, vec![rule(None, &[])]);
    elsewhere.targets = vec![PolicyTarget::Selector(labels(&[("app", "db")]))];
    let mut selected = policy("b", PolicyAction::Allow, vec![nobody, rule(Some(vec![account("web")]), &[80, 0])]);
    selected.targets = vec![PolicyTarget::Selector(labels(&[("tier", "front")]))];
    let everywhere = policy("a", PolicyAction::Deny, vec![rule(None, &[]), rule(None, &[0])]);
    let engine = with_policies(
        vec![as_object(workload("w", "n2", &["10.0.2.2"]))],
        vec![selected, everywhere.clone(), elsewhere],
    );
    let snapshot = &engine.desired().snapshot;
    let group = snapshot.policies_of(&name("w"));
    let rules: Vec<_> = group.rules.iter().map(|rule| (rule.name.policy.name(), rule.ports.clone())).collect();
    assert_eq!(rules, [("a", None), ("b", Some([80].into()))]);
    assert_eq!(group.flags, Group::HAS_ALLOW);
    assert_eq!(snapshot.policy_group(group.number), Some(&group));
    assert_eq!(snapshot.policy(&name("a")).unwrap().as_ref(), &everywhere);
    assert_eq!(snapshot.policies().len(), 3);
}

#[test]
fn through_a_service_a_policy_holds_on_the_ports_that_the_service_targets() {
    let mut first = service("web", &["10.96.0.1"], TargetPort::Name("http".into()));
    first.selector = labels(&[("app", "web")]);
    let mut through =
        policy("p", PolicyAction::Deny, vec![rule(None, &[]), rule(None, &[8080, 9090]), rule(None, &[1])]);
    through.targets = vec![PolicyTarget::Service("web".into())];
    let mut engine = with_policies(
        vec![as_object(workload("w", "n1", &["10.0.1.2"])), Object::Service(Arc::new(first.clone()))],
        vec![through],
    );
    let ports = |engine: &Engine| -> Vec<Option<BTreeSet<u16>>> {
        engine.desired().snapshot.policies_of(&name("w")).rules.iter().map(|rule| rule.ports.clone()).collect()
    };
    assert_eq!(ports(&engine), [Some([8080].into()), Some([8080].into())]);
    // The service leads elsewhere, the workload's port has another number, the service selects others, and is gone.
    first.ports[0].target = TargetPort::Number(1);
    engine.handle_update(Update::Upsert(Object::Service(Arc::new(first.clone()))), Instant::now());
    assert_eq!(ports(&engine), [Some([1].into()), Some([1].into())]);
    first.ports[0].target = TargetPort::Name("http".into());
    engine.handle_update(Update::Upsert(Object::Service(Arc::new(first.clone()))), Instant::now());
    let mut moved = workload("w", "n1", &["10.0.1.2"]);
    moved.ports = [("http".to_owned(), 9090)].into();
    engine.handle_update(Update::Upsert(as_object(moved)), Instant::now());
    assert_eq!(ports(&engine), [Some([9090].into()), Some([9090].into())]);
    first.selector = labels(&[("app", "db")]);
    engine.handle_update(Update::Upsert(Object::Service(Arc::new(first))), Instant::now());
    assert!(ports(&engine).is_empty());
    assert!(engine.desired().verdicts.is_empty());
}

#[test]
fn equal_contents_share_a_group_and_an_unused_one_is_gone() {
    let deny = policy("p", PolicyAction::Deny, vec![rule(Some(vec![range("10.9.0.0/16")]), &[])]);
    let mut engine = with_policies(
        vec![as_object(workload("a", "n1", &["10.0.1.2"])), as_object(workload("b", "n2", &["10.0.2.2"]))],
        vec![deny.clone()],
    );
    let number = |engine: &Engine, of| engine.desired().snapshot.policies_of(&name(of)).number;
    let first = number(&engine, "a");
    assert_ne!(first, 0);
    assert_eq!(first, number(&engine, "b"));
    let mut cautious = workload("b", "n2", &["10.0.2.2"]);
    cautious.default_action = DefaultAction::Deny;
    engine.handle_update(Update::Upsert(as_object(cautious)), Instant::now());
    assert_ne!(first, number(&engine, "b"));
    let groups: BTreeSet<u32> = engine.desired().verdicts.iter().map(|(key, _)| key.group()).collect();
    assert_eq!(groups, [first, number(&engine, "b")].into());

    let mut changed = deny.clone();
    changed.dry_run = true;
    engine.handle_update(Update::Upsert(Object::Policy(Arc::new(changed))), Instant::now());
    assert_ne!(first, number(&engine, "a"), "other contents, another number");
    engine.handle_update(Update::Upsert(Object::Policy(Arc::new(deny))), Instant::now());
    assert_eq!(first, number(&engine, "a"), "the same contents, the same number");
    engine.handle_update(Update::Remove(ObjectKey::Policy(name("p"))), Instant::now());
    engine.handle_update(Update::Remove(ObjectKey::Workload(name("b"))), Instant::now());
    assert_eq!(number(&engine, "a"), 0);
    let tables = engine.desired();
    assert!(tables.verdicts.is_empty() && tables.ranges.is_empty());
    assert_eq!(tables.snapshot.policy_group(first), None);
}

#[test]
fn a_frontend_has_the_group_and_port_that_all_its_endpoints_share() {
    let web = service("web", &["10.96.0.1"], TargetPort::Name("http".into()));
    let endpoints = [workload("a", "n1", &["10.0.1.2"]), workload("b", "n2", &["10.0.2.2"])];
    let mut objects: Vec<_> = endpoints.into_iter().map(as_object).collect();
    objects.push(Object::Service(Arc::new(web)));
    let mut engine = with_policies(objects, vec![policy("p", PolicyAction::Deny, vec![rule(None, &[])])]);
    let header = |engine: &Engine| {
        let header = *engine.desired().frontends.values().next().unwrap();
        (header.backends(), header.group(), u16::from_be(header.target_port_be()))
    };
    let group = engine.desired().snapshot.policies_of(&name("a")).number;
    assert_eq!(header(&engine), (2, group, 8080));
    let mut other_port = workload("b", "n2", &["10.0.2.2"]);
    other_port.ports = [("http".to_owned(), 9090)].into();
    engine.handle_update(Update::Upsert(as_object(other_port)), Instant::now());
    assert_eq!(header(&engine), (2, 0, 0));
    let mut other_group = workload("b", "n2", &["10.0.2.2"]);
    other_group.default_action = DefaultAction::Deny;
    engine.handle_update(Update::Upsert(as_object(other_group)), Instant::now());
    assert_eq!(header(&engine), (2, 0, 0));
    engine.handle_update(Update::Remove(ObjectKey::Workload(name("b"))), Instant::now());
    assert_eq!(header(&engine), (1, group, 8080));
    engine.handle_update(Update::Remove(ObjectKey::Policy(name("p"))), Instant::now());
    assert_eq!(header(&engine), (1, 0, 0));
}

#[test]
fn only_identities_of_this_node_are_filed_one_by_one() {
    let rules = vec![
        rule(Some(vec![account("web"), account("cart")]), &[80]),
        rule(Some(vec![Source::Spiffe(SpiffePattern::parse("*").unwrap()), account("web")]), &[]),
    ];
    let mut far = workload("b", "n2", &["10.0.2.2"]);
    far.identity = identity(1);
    let mut engine = with_policies(
        vec![as_object(workload("a", "n1", &["10.0.1.2"])), as_object(far)],
        vec![policy("p", PolicyAction::Allow, rules)],
    );
    let filed =
        |engine: &Engine| -> BTreeSet<u32> { engine.desired().verdicts.iter().map(|(key, _)| key.source()).collect() };
    let web = engine.desired().snapshot.identity_number(&identity(0));
    assert!((FIRST_IDENTITY..CLASS).contains(&web));
    assert_eq!(engine.desired().snapshot.identity(web), Some(&identity(0)));
    assert_eq!(engine.desired().snapshot.identity_number(&identity(1)), 0);
    assert_eq!(filed(&engine), [0, 1, web].into());
    // The other workload moves here; the first one leaves.
    let mut near = workload("b", "n1", &["10.0.2.2"]);
    near.identity = identity(1);
    engine.handle_update(Update::Upsert(as_object(near)), Instant::now());
    let cart = engine.desired().snapshot.identity_number(&identity(1));
    assert_eq!(filed(&engine), [0, 1, web, cart].into());
    engine.handle_update(Update::Remove(ObjectKey::Workload(name("a"))), Instant::now());
    assert_eq!(filed(&engine), [0, 1, cart].into());
    assert_eq!(engine.desired().snapshot.identity(web), None);
}

#[test]
fn ranges_of_one_family_never_hold_addresses_of_the_other() {
    let rules = vec![
        rule(Some(vec![range("::/0")]), &[1]),
        rule(Some(vec![range("0.0.0.0/0")]), &[2]),
        rule(Some(vec![range("::ffff:10.0.0.0/104")]), &[3]),
    ];
    let objects = vec![as_object(workload("a", "n1", &["10.0.1.2"]))];
    for absent in 0..=rules.len() {
        let mut rules = rules.clone();
        if absent < rules.len() {
            rules.remove(absent);
        }
        let engine = with_policies(objects.clone(), vec![policy("p", PolicyAction::Deny, rules)]);
        let (tables, kernel) = (engine.desired(), Kernel::of(engine.desired()));
        let group = tables.snapshot.policies_of(&name("a"));
        for (caller, port) in ["10.1.1.1", "::ffff:10.1.1.1", "192.0.2.1", "fd00::1"]
            .map(address)
            .iter()
            .flat_map(|caller| (1..5).map(move |port| (*caller, port)))
        {
            let expected = match (port, caller.to_canonical()) {
                (1, caller) => caller.is_ipv6() && absent != 0,
                (2, caller) => caller.is_ipv4() && absent != 1,
                (3, caller) => caller.to_string().starts_with("10.") && absent != 2,
                _ => false,
            };
            assert_eq!(group.matched(None, caller, port).deny() != 0, expected, "{caller} {port} without {absent}");
            assert_eq!(
                kernel.plaintext(group.number, caller, port),
                group.matched(None, caller, port),
                "{caller} {port}"
            );
        }
    }
}

#[test]
fn the_errno_of_denied_connects_is_the_meshs() {
    let mut engine = with_policies(Vec::new(), Vec::new());
    let mut refusing = mesh(&[]);
    assert_eq!(engine.desired().denied_errno, 0);
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(refusing.clone()))), Instant::now());
    assert_eq!(engine.desired().denied_errno, 13);
    refusing.denied_error = DeniedError::ConnectionRefused;
    let before = engine.desired().clone();
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(refusing))), Instant::now());
    assert_eq!(diff(&before, engine.desired()), [MapOp::SetDeniedErrno(111)]);
}

#[test]
fn one_policy_among_many_touches_only_its_workloads() {
    let mut catalog = Catalog { nodes: [(node("n1").name, Arc::new(node("n1")))].into(), ..Catalog::default() };
    for index in 0..1_000_u32 {
        let [_, _, high, low] = index.to_be_bytes();
        let mut workload = workload(&format!("w{index}"), "n1", &[&format!("10.0.{high}.{low}")]);
        workload.labels = labels(&[("app", &format!("app-{index}"))]);
        let mut policy = policy(&format!("p{index}"), PolicyAction::Allow, vec![rule(None, &[80])]);
        policy.targets = vec![PolicyTarget::Selector(workload.labels.clone())];
        catalog.workloads.insert(workload.name.clone(), Arc::new(workload));
        catalog.policies.insert(policy.name.clone(), Arc::new(policy));
    }
    let mut changed = (*catalog.policies[&name("p7")]).clone();
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    engine.handle_update(Update::Snapshot(catalog), Instant::now());
    let before = engine.desired().clone();
    changed.rules[0].ports = vec![81];
    engine.handle_update(Update::Upsert(Object::Policy(Arc::new(changed))), Instant::now());
    let ops = diff(&before, engine.desired());
    let kinds: Vec<_> = ops
        .iter()
        .map(|op| match op {
            MapOp::SetVerdict(key, _) | MapOp::RemoveVerdict(key) => format!("verdict {}", u16::from_be(key.port_be())),
            MapOp::SetAppPort(..) => "guard".to_owned(),
            MapOp::SetCidr(..) => "capture".to_owned(),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, ["verdict 81", "verdict 0", "guard", "capture", "verdict 0", "verdict 80"]);
    let (old, new) = (&before.snapshot.groups, &engine.desired().snapshot.groups);
    assert_eq!(new.iter().filter(|(name, group)| !Arc::ptr_eq(group, old.get(*name).unwrap())).count(), 1);
}
