//! The engine's rules, one example each.

use super::*;
use crate::model::{
    Affinity, DefaultAction, DeniedError, Mesh, Mode, Prefer, Protocol, SameNode, ServicePort, SpiffeId, TargetPort,
    TransportChoice, TrustDomain,
};
use mesh_common::Ip;
use mesh_common::service::{AppPort, AppPortKey, CidrAction, CidrKey, FrontendKey, PROTO_TCP};
use std::collections::BTreeMap;

pub(super) fn name(name: &str) -> ObjectName {
    ObjectName::parse("shop", name).unwrap()
}

pub(super) fn node(name: &str) -> Node {
    Node { name: NodeName::parse(name).unwrap(), addresses: vec!["192.0.2.1".parse().unwrap()], zone: None }
}

pub(super) fn mesh(exclude: &[&str]) -> Mesh {
    Mesh {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        mode: Mode::Permissive,
        transport: TransportChoice::Auto,
        exclude: exclude.iter().map(|range| range.parse().unwrap()).collect(),
        default_action: DefaultAction::Allow,
        denied_error: DeniedError::AccessDenied,
        same_node: SameNode::Kernel,
        dns: None,
    }
}

pub(super) fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(super) fn service(called: &str, vips: &[&str], target: TargetPort) -> Service {
    Service {
        name: name(called),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        ports: vec![ServicePort { name: "http".into(), port: 80, protocol: Protocol::Tcp, target }],
        selector: labels(&[("app", "web")]),
        prefer: Prefer::Nobody,
        affinity: Affinity::None,
    }
}

pub(super) fn workload(called: &str, on: &str, addresses: &[&str]) -> Workload {
    Workload {
        uid: WorkloadUid::new(&format!("uid-{called}")),
        name: name(called),
        owner: called.into(),
        labels: labels(&[("app", "web"), ("tier", "front")]),
        identity: SpiffeId::parse("spiffe://example.org/ns/shop/sa/web").unwrap(),
        node: NodeName::parse(on).unwrap(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        netns: Some("/run/netns/x".into()),
        cgroup: None,
        mode: Mode::Permissive,
        port_modes: BTreeMap::new(),
        ports: [("http".to_owned(), 8080)].into(),
        weight: 100,
        is_terminating: false,
        default_action: DefaultAction::Allow,
    }
}

fn frontend_key(address: &str) -> FrontendKey {
    let address: SocketAddr = address.parse().unwrap();
    FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, 0)
}

/// An engine on node `n1` that knows nodes n1 and n2.
pub(super) fn engine_with(objects: Vec<Object>) -> Engine {
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    for object in [Object::Node(Arc::new(node("n1"))), Object::Node(Arc::new(node("n2")))].into_iter().chain(objects) {
        engine.handle_update(Update::Upsert(object), Instant::now());
    }
    engine
}

pub(super) fn upsert_workload(engine: &mut Engine, workload: Workload) {
    engine.handle_update(Update::Upsert(Object::Workload(Arc::new(workload))), Instant::now());
}

#[test]
fn a_service_leads_to_the_workloads_it_selects_in_both_families() {
    let engine = engine_with(vec![
        Object::Service(Arc::new(service("web", &["10.96.0.1", "fd00::1"], TargetPort::Name("http".into())))),
        Object::Workload(Arc::new(workload("a", "n1", &["10.0.1.2", "fd01::2"]))),
        Object::Workload(Arc::new(workload("b", "n2", &["10.0.2.2"]))),
    ]);
    let snapshot = &engine.desired().snapshot;
    let v4 = snapshot.frontend("10.96.0.1:80".parse().unwrap()).unwrap();
    let reached: Vec<_> = v4.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(reached, ["10.0.1.2:8080", "10.0.2.2:8080"]);
    let v6 = snapshot.frontend("[fd00::1]:80".parse().unwrap()).unwrap();
    assert_eq!(v6.endpoints.iter().map(|e| e.address.to_string()).collect::<Vec<_>>(), ["[fd01::2]:8080"]);
    assert_eq!(snapshot.frontend("[::ffff:10.96.0.1]:80".parse().unwrap()), Some(v4), "a mapped address is the same");
    assert_eq!(snapshot.frontend("10.96.0.1:81".parse().unwrap()), None);
    assert_eq!(snapshot.workload_at("10.0.2.2".parse().unwrap()).unwrap().name, name("b"));

    let header = engine.desired().frontends.get(&frontend_key("10.96.0.1:80")).unwrap();
    assert_eq!((header.service(), header.backends()), (v4.index, 2));
    assert_ne!(v4.index, 0);
    assert_eq!(
        engine.desired().cidrs.get(&(128, CidrKey::new(Ip::from_v4([10, 0, 1, 2])))),
        Some(&CidrAction::carry(0)),
        "a workload of this node"
    );
    let elsewhere = (128, CidrKey::new(Ip::from_v4([10, 0, 2, 2])));
    assert_eq!(engine.desired().cidrs.get(&elsewhere), Some(&CidrAction::CAPTURE));
}

type Spoil = fn(&mut Workload);

#[test]
fn unusable_workloads_are_no_endpoints() {
    let spoilers: [(&str, Spoil); 6] = [
        ("disabled", |w| w.mode = Mode::Disabled),
        ("weight 0", |w| w.weight = 0),
        ("no such port", |w| w.ports.clear()),
        ("unknown node", |w| w.node = NodeName::parse("n9").unwrap()),
        ("other family", |w| w.addresses = vec!["fd01::9".parse().unwrap()]),
        ("other labels", |w| w.labels = labels(&[("app", "db")])),
    ];
    for (what, spoil) in spoilers {
        let mut spoilt = workload("a", "n1", &["10.0.1.2"]);
        spoil(&mut spoilt);
        let mut engine = engine_with(vec![
            Object::Service(Arc::new(service("web", &["10.96.0.1"], TargetPort::Name("http".into())))),
            Object::Workload(Arc::new(spoilt)),
        ]);
        let backends =
            |engine: &Engine| engine.desired().frontends.get(&frontend_key("10.96.0.1:80")).unwrap().backends();
        assert_eq!(backends(&engine), 0, "{what}");
        upsert_workload(&mut engine, workload("a", "n1", &["10.0.1.2"]));
        assert_eq!(backends(&engine), 1, "{what}, repaired");
    }
}

#[test]
fn endpoints_come_and_go_with_their_node() {
    let mut engine = engine_with(vec![
        Object::Service(Arc::new(service("web", &["10.96.0.1"], TargetPort::Number(8080)))),
        Object::Workload(Arc::new(workload("a", "n2", &["10.0.2.2"]))),
    ]);
    let backends = |engine: &Engine| engine.desired().frontends.get(&frontend_key("10.96.0.1:80")).unwrap().backends();
    assert_eq!(backends(&engine), 1);
    engine.handle_update(Update::Remove(ObjectKey::Node(NodeName::parse("n2").unwrap())), Instant::now());
    assert_eq!(backends(&engine), 0);
    engine.handle_update(Update::Upsert(Object::Node(Arc::new(node("n2")))), Instant::now());
    assert_eq!(backends(&engine), 1);
}

#[test]
fn only_this_nodes_meshed_workloads_are_local_and_guarded() {
    let mut strict = workload("a", "n1", &["10.0.1.2"]);
    strict.mode = Mode::Strict;
    strict.port_modes = [(9090, Mode::Permissive)].into();
    let mut disabled = workload("c", "n1", &["10.0.1.3"]);
    disabled.mode = Mode::Disabled;
    let mut homeless = workload("d", "n1", &["10.0.1.4"]);
    homeless.netns = None;
    let engine = engine_with(vec![
        Object::Workload(Arc::new(strict)),
        Object::Workload(Arc::new(workload("b", "n2", &["10.0.2.2"]))),
        Object::Workload(Arc::new(disabled)),
        Object::Workload(Arc::new(homeless)),
    ]);
    let tables = engine.desired();
    assert_eq!(tables.local.values().map(|w| w.name.name()).collect::<Vec<_>>(), ["a"]);
    let key = |port: u16| AppPortKey::new(Ip::from_v4([10, 0, 1, 2]), port.to_be());
    let expected = BTreeMap::from([
        (key(0), AppPort::new(Mode::Strict as u32, 0)),
        (key(9090), AppPort::new(Mode::Permissive as u32, 0)),
    ]);
    assert!(tables.app_ports.sorted().into_iter().eq(expected.iter()));
    let captured: Vec<_> =
        tables.cidrs.sorted().into_keys().map(|(_, key)| IpAddr::from(key.addr()).to_string()).collect();
    assert_eq!(captured, ["10.0.1.2", "10.0.1.4", "10.0.2.2"], "disabled ones are not captured");
}

#[test]
fn excluded_ranges_win_over_everything_in_them() {
    let objects = || {
        vec![
            Object::Service(Arc::new(service("web", &["10.96.0.1"], TargetPort::Number(8080)))),
            Object::Workload(Arc::new(workload("a", "n2", &["10.0.2.2"]))),
            Object::Workload(Arc::new(workload("b", "n2", &["10.0.9.9"]))),
        ]
    };
    let mut engine = engine_with(objects());
    let open = engine.desired().clone();
    let exclude = ["10.96.0.0/16", "10.0.2.2/32", "fd00::/8"];
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(mesh(&exclude)))), Instant::now());
    let tables = engine.desired();
    assert!(tables.frontends.is_empty());
    assert_eq!(tables.snapshot.frontend("10.96.0.1:80".parse().unwrap()), None);
    let expected = BTreeMap::from([
        ((8, CidrKey::new("fd00::".parse::<IpAddr>().unwrap().into())), CidrAction::PASS),
        ((112, CidrKey::new(Ip::from_v4([10, 96, 0, 0]))), CidrAction::PASS),
        ((128, CidrKey::new(Ip::from_v4([10, 0, 2, 2]))), CidrAction::PASS),
        ((128, CidrKey::new(Ip::from_v4([10, 0, 9, 9]))), CidrAction::CAPTURE),
    ]);
    assert!(tables.cidrs.sorted().into_iter().eq(expected.iter()));
    engine.handle_update(Update::Remove(ObjectKey::Mesh), Instant::now());
    assert_eq!(engine.desired(), &open);
}

#[test]
fn the_first_by_name_has_a_contested_address_and_the_next_inherits_it() {
    let mut engine = engine_with(vec![
        Object::Service(Arc::new(service("web", &["10.96.0.1"], TargetPort::Number(8080)))),
        Object::Service(Arc::new(service("api", &["10.96.0.1"], TargetPort::Number(9090)))),
        Object::Workload(Arc::new(workload("b", "n1", &["10.0.1.2"]))),
        Object::Workload(Arc::new(workload("a", "n2", &["10.0.1.2"]))),
    ]);
    let owner = |engine: &Engine| {
        let snapshot = &engine.desired().snapshot;
        let view = snapshot.frontend("10.96.0.1:80".parse().unwrap()).unwrap();
        let endpoints: Vec<_> = view.endpoints.iter().map(|e| e.workload.name.name().to_owned()).collect();
        (view.service.name.name().to_owned(), endpoints, engine.desired().app_ports.len())
    };
    assert_eq!(owner(&engine), ("api".to_owned(), vec!["a".to_owned()], 0));
    engine.handle_update(Update::Remove(ObjectKey::Service(name("api"))), Instant::now());
    engine.handle_update(Update::Remove(ObjectKey::Workload(name("a"))), Instant::now());
    assert_eq!(owner(&engine), ("web".to_owned(), vec!["b".to_owned()], 1));
}

#[test]
fn one_endpoint_among_many_services_touches_only_its_own() {
    let mut engine = engine_with(Vec::new());
    let mut catalog = Catalog { nodes: [(node("n1").name, Arc::new(node("n1")))].into(), ..Catalog::default() };
    for index in 0..2_000u32 {
        let app = labels(&[("app", &format!("app-{index}"))]);
        let [_, _, high, low] = index.to_be_bytes();
        let mut service = service(&format!("s{index}"), &[&format!("10.96.{high}.{low}")], TargetPort::Number(80));
        service.selector = app.clone();
        let mut workload = workload(&format!("w{index}"), "n1", &[&format!("10.0.{high}.{low}")]);
        workload.labels = app;
        catalog.services.insert(service.name.clone(), Arc::new(service));
        catalog.workloads.insert(workload.name.clone(), Arc::new(workload));
    }
    let mut moved = (*catalog.workloads[&name("w7")]).clone();
    engine.handle_update(Update::Snapshot(catalog), Instant::now());
    let before = engine.desired().clone();
    moved.weight = 0;
    upsert_workload(&mut engine, moved);

    let ops = diff(&before, engine.desired());
    assert!(
        matches!(ops.as_slice(), [MapOp::SetFrontend(key, header), MapOp::RemoveBackend(slot)]
        if *key == frontend_key("10.96.0.7:80") && header.backends() == 0 && slot.addr() == key.addr()),
        "{ops:?}"
    );
    // Untouched views are the very same allocation: nothing else was compiled again.
    let (old, new) = (&before.snapshot.frontends, &engine.desired().snapshot.frontends);
    let recompiled: Vec<_> =
        new.iter().filter(|(address, view)| !Arc::ptr_eq(view, old.get(*address).unwrap())).collect();
    assert_eq!(recompiled.len(), 1);
}

#[test]
fn the_caller_learns_when_the_last_update_came() {
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    assert_eq!((engine.generation(), engine.updated_at()), (0, None));
    let now = Instant::now();
    engine.handle_update(Update::Snapshot(Catalog::default()), now);
    assert_eq!((engine.generation(), engine.updated_at()), (1, Some(now)));
}

#[test]
fn the_meshs_own_dns_is_a_frontend_that_no_service_takes() {
    let with_dns = |exclude: &[&str]| Mesh {
        dns: Some(Arc::new(crate::model::Dns {
            domain: "cluster.local".into(),
            addresses: vec!["10.96.0.10".parse().unwrap()],
            upstream: Vec::new(),
        })),
        ..mesh(exclude)
    };
    let mut claimant = service("dns", &["10.96.0.10"], TargetPort::Number(53));
    claimant.ports[0].port = crate::model::DNS_PORT;
    let mut engine = engine_with(vec![
        Object::Mesh(Arc::new(with_dns(&[]))),
        Object::Node(Arc::new(node("n1"))),
        Object::Service(Arc::new(claimant)),
    ]);
    let key = frontend_key("10.96.0.10:53");
    let frontend =
        |engine: &Engine| engine.desired().frontends.get(&key).map(|found| (found.service(), found.backends()));
    assert_eq!(frontend(&engine), Some((0, 1)));
    assert!(engine.desired().snapshot.frontends().is_empty());
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(with_dns(&["10.96.0.0/24"])))), Instant::now());
    assert_eq!(frontend(&engine), None);
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(with_dns(&[])))), Instant::now());
    assert_eq!(frontend(&engine), Some((0, 1)));
    // Who was there all the while inherits it.
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(mesh(&[])))), Instant::now());
    assert_eq!(frontend(&engine), Some((1, 0)));
    assert_eq!(engine.desired().snapshot.frontends().len(), 1);
}
