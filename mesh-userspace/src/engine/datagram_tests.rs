//! UDP frontends, one example each.

use super::tests::{labels, mesh, name, node, service, workload};
use super::*;
use crate::model::{Mode, Protocol, ServicePort, TargetPort};
use mesh_common::service::{AppPort, AppPortKey, DatagramFrontend};
use std::collections::BTreeMap;

fn resolver(vips: &[&str]) -> Service {
    let ports = [("dns", 53, Protocol::Udp), ("dns-tcp", 53, Protocol::Tcp)].map(|(name, port, protocol)| {
        ServicePort { name: name.into(), port, protocol, target: TargetPort::Number(1053) }
    });
    Service { ports: ports.to_vec(), ..service("dns", vips, TargetPort::Number(1053)) }
}

fn engine(objects: Vec<Object>) -> Engine {
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    for object in [Object::Node(Arc::new(node("n1"))), Object::Node(Arc::new(node("n2")))].into_iter().chain(objects) {
        engine.handle_update(Update::Upsert(object), Instant::now());
    }
    engine
}

fn captured(engine: &Engine) -> BTreeMap<String, DatagramFrontend> {
    let entries = engine.desired().datagrams.iter();
    entries.map(|(at, entry)| (SocketAddr::from(*at).to_string(), *entry)).collect()
}

fn guard(engine: &Engine, address: &str) -> Option<AppPort> {
    let address: SocketAddr = address.parse().unwrap();
    engine.desired().app_ports.get(&AppPortKey::datagram(address.ip().into(), address.port().to_be())).copied()
}

#[test]
fn a_udp_port_leads_to_endpoints_and_its_workloads_are_called_by_their_addresses_too() {
    let engine = engine(vec![
        Object::Service(Arc::new(resolver(&["10.96.0.10", "fd00::10"]))),
        Object::Workload(Arc::new(workload("a", "n1", &["10.0.1.2", "fd01::2"]))),
        Object::Workload(Arc::new(workload("b", "n2", &["10.0.2.2"]))),
    ]);
    let captured = captured(&engine);
    let addresses: Vec<&str> = captured.keys().map(String::as_str).collect();
    assert_eq!(addresses, ["10.0.1.2:1053", "10.0.2.2:1053", "10.96.0.10:53", "[fd00::10]:53", "[fd01::2]:1053"]);
    let snapshot = &engine.desired().snapshot;
    for (address, entry) in &captured {
        assert_eq!(snapshot.datagram_target(entry.number()), Some(address.parse().unwrap()));
    }
    assert_eq!(captured["10.96.0.10:53"].backends(), 2);
    assert_eq!(captured["[fd00::10]:53"].backends(), 1);
    let view = snapshot.datagram_frontend("10.96.0.10:53".parse().unwrap()).unwrap();
    assert_eq!((view.port.protocol, view.endpoints.len()), (Protocol::Udp, 2));
    assert!(snapshot.frontend("10.96.0.10:53".parse().unwrap()).is_some(), "TCP has its own");
    assert_eq!(guard(&engine, "10.0.1.2:1053"), Some(AppPort::new(Mode::Permissive as u32, 0)));
    assert_eq!(guard(&engine, "10.0.2.2:1053"), None, "another node's");
    assert_eq!(guard(&engine, "10.0.1.2:53"), None);
}

#[test]
fn what_goes_leaves_nothing_and_what_stays_keeps_its_number() {
    let mut engine = engine(vec![
        Object::Service(Arc::new(resolver(&["10.96.0.10", "10.96.0.11"]))),
        Object::Workload(Arc::new(workload("a", "n1", &["10.0.1.2"]))),
    ]);
    let before = captured(&engine);
    engine.handle_update(Update::Upsert(Object::Service(Arc::new(resolver(&["10.96.0.10"])))), Instant::now());
    let after = captured(&engine);
    assert_eq!(after.keys().collect::<Vec<_>>(), ["10.0.1.2:1053", "10.96.0.10:53"]);
    assert_eq!(after["10.96.0.10:53"].number(), before["10.96.0.10:53"].number());
    assert_eq!(engine.desired().snapshot.datagram_target(before["10.96.0.11:53"].number()), None);

    let other = Workload { labels: labels(&[("app", "other")]), ..workload("a", "n1", &["10.0.1.2"]) };
    engine.handle_update(Update::Upsert(Object::Workload(Arc::new(other))), Instant::now());
    assert_eq!(captured(&engine)["10.96.0.10:53"].backends(), 0);
    assert_eq!(guard(&engine, "10.0.1.2:1053"), None);
    engine.handle_update(Update::Remove(ObjectKey::Service(name("dns"))), Instant::now());
    assert!(captured(&engine).is_empty());
}

#[test]
fn excluded_addresses_are_not_captured_and_yet_guarded() {
    let mut engine = engine(vec![
        Object::Service(Arc::new(resolver(&["10.96.0.10"]))),
        Object::Workload(Arc::new(workload("a", "n1", &["10.0.1.2"]))),
    ]);
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(mesh(&["10.96.0.0/16"])))), Instant::now());
    assert_eq!(captured(&engine).keys().collect::<Vec<_>>(), ["10.0.1.2:1053"]);
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(mesh(&["10.0.0.0/8"])))), Instant::now());
    assert!(captured(&engine).is_empty());
    assert!(guard(&engine, "10.0.1.2:1053").is_some());
    engine.handle_update(Update::Remove(ObjectKey::Mesh), Instant::now());
    assert_eq!(captured(&engine).len(), 2);
}
