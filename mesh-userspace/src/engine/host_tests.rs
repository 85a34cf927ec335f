//! Workloads that share their node's address, one example each.

use super::policy_tests::{account, policy, rule};
use super::tests::{name, node, service, workload};
use super::*;
use crate::model::{Mode, PolicyAction, SpiffeId, TargetPort};
use mesh_common::Ip;
use mesh_common::service::{AppPort, AppPortKey, FrontendKey, PROTO_TCP};

const OUTBOUND: u16 = 15001;
const TUNNEL: u16 = 15008;

fn host(called: &str, on: &str, ports: &[(&str, u16)]) -> Workload {
    Workload {
        netns: None,
        cgroup: Some(format!("/sys/fs/cgroup/system/{called}").into()),
        identity: SpiffeId::parse(&format!("spiffe://example.org/ns/shop/sa/{called}")).unwrap(),
        ports: ports.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect(),
        ..workload(called, on, &["192.0.2.1"])
    }
}

fn engine(objects: Vec<Object>) -> Engine {
    let mut engine = Engine::new(NodeName::parse("n1").unwrap()).with_own_ports(OUTBOUND, &[TUNNEL]);
    for object in [Object::Node(Arc::new(node("n1")))].into_iter().chain(objects) {
        engine.handle_update(Update::Upsert(object), Instant::now());
    }
    engine
}

fn object(workload: Workload) -> Object {
    Object::Workload(Arc::new(workload))
}

fn frontend(engine: &Engine, address: &str) -> Option<mesh_common::service::Frontend> {
    let address: SocketAddr = address.parse().unwrap();
    let key = FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, 0);
    engine.desired().frontends.get(&key).copied()
}

fn guard(engine: &Engine, address: &str, port: u16) -> Option<AppPort> {
    let address: IpAddr = address.parse().unwrap();
    engine.desired().app_ports.get(&AppPortKey::new(address.into(), port.to_be())).copied()
}

#[test]
fn a_host_workload_is_in_the_mesh_on_its_declared_ports_and_its_address_is_not() {
    let mut web = host("web", "n1", &[("http", 8080), ("tunnel", TUNNEL), ("outbound", OUTBOUND)]);
    web.port_modes = [(9090, Mode::Strict), (7070, Mode::Disabled)].into();
    let engine = engine(vec![object(web)]);
    let tables = engine.desired();
    assert_eq!(tables.cidrs.iter().count(), 0, "the node's other ports are not the mesh's");
    for port in [8080, 9090] {
        let entry = frontend(&engine, &format!("192.0.2.1:{port}")).unwrap();
        assert_eq!((entry.service(), entry.backends()), (0, 1));
    }
    let permissive = AppPort::new(Mode::Permissive as u32, 0);
    let strict = AppPort::new(Mode::Strict as u32, 0);
    for address in ["192.0.2.1", "::"] {
        assert_eq!(guard(&engine, address, 8080), Some(permissive), "{address}");
        assert_eq!(guard(&engine, address, 9090), Some(strict), "{address}");
        for left_alone in [0, 22, 7070, TUNNEL] {
            assert_eq!(guard(&engine, address, left_alone), None, "{address}:{left_alone}");
            assert_eq!(frontend(&engine, &format!("192.0.2.1:{left_alone}")), None);
        }
    }
    assert_eq!(guard(&engine, "::", OUTBOUND), Some(strict), "nobody dials the listener from outside");
    assert!(tables.app_ports.get(&AppPortKey::new(Ip::UNSPECIFIED, 0)).is_none());
}

#[test]
fn another_nodes_host_workload_is_captured_and_not_guarded() {
    let engine = engine(vec![object(host("web", "n2", &[("http", 8080)]))]);
    assert!(frontend(&engine, "192.0.2.1:8080").is_some());
    assert_eq!(engine.desired().app_ports.iter().count(), 0);
}

#[test]
fn who_speaks_and_who_serves_is_told_by_identity_and_port() {
    let (a, b) = (host("a", "n1", &[("http", 8080)]), host("b", "n1", &[("http", 9090)]));
    let stranger = SpiffeId::parse("spiffe://example.org/ns/shop/sa/stranger").unwrap();
    let mut engine = engine(vec![object(a.clone()), object(b.clone())]);
    let snapshot = engine.desired().snapshot.clone();
    let address: IpAddr = "192.0.2.1".parse().unwrap();
    assert!(snapshot.workload_at(address).is_none());
    for (workload, port) in [(&a, 8080), (&b, 9090)] {
        assert_eq!(snapshot.workload_serving(SocketAddr::new(address, port)).unwrap().name, workload.name);
        assert_eq!(snapshot.workload_speaking(address, &workload.identity).unwrap().name, workload.name);
        assert!(snapshot.workload_speaking("192.0.2.2".parse().unwrap(), &workload.identity).is_none());
    }
    assert!(snapshot.workload_speaking(address, &stranger).is_none());
    assert!(snapshot.workload_serving(SocketAddr::new(address, 22)).is_none());
    engine.handle_update(Update::Remove(ObjectKey::Workload(name("a"))), Instant::now());
    let snapshot = &engine.desired().snapshot;
    assert!(snapshot.workload_speaking(address, &a.identity).is_none());
    assert!(snapshot.workload_speaking(address, &b.identity).is_some());
}

#[test]
fn a_service_reaches_a_host_workload_on_declared_ports_only() {
    let declared = service("declared", &["10.96.0.1"], TargetPort::Number(8080));
    let undeclared = service("undeclared", &["10.96.0.2"], TargetPort::Number(9090));
    let mut web = host("web", "n1", &[("http", 8080)]);
    let services = [declared, undeclared].map(|service| Object::Service(Arc::new(service)));
    let mut engine = engine(services.into_iter().chain([object(web.clone())]).collect());
    let backends =
        |engine: &Engine| ["10.96.0.1:80", "10.96.0.2:80"].map(|address| frontend(engine, address).unwrap().backends());
    assert_eq!(backends(&engine), [1, 0]);
    web.ports.insert("more".into(), 9090);
    engine.handle_update(Update::Upsert(object(web)), Instant::now());
    assert_eq!(backends(&engine), [1, 1]);
}

#[test]
fn policy_is_known_wherever_a_declared_port_is() {
    let web = host("web", "n1", &[("http", 8080)]);
    let mut engine = engine(vec![object(web)]);
    let deny = policy("deny", PolicyAction::Deny, vec![rule(Some(vec![account("client")]), &[])]);
    engine.handle_update(Update::Upsert(Object::Policy(Arc::new(deny))), Instant::now());
    let entry = frontend(&engine, "192.0.2.1:8080").unwrap();
    assert_ne!(entry.group(), 0);
    assert_eq!(u16::from_be(entry.target_port_be()), 8080);
    for address in ["192.0.2.1", "::"] {
        assert_eq!(guard(&engine, address, 8080).unwrap().group(), entry.group(), "{address}");
    }
    engine.handle_update(Update::Remove(ObjectKey::Policy(name("deny"))), Instant::now());
    assert_eq!(frontend(&engine, "192.0.2.1:8080").unwrap().group(), 0);
    assert_eq!(guard(&engine, "::", 8080).unwrap().group(), 0);
}
