use super::*;
use crate::engine::diff;
use crate::engine::tests::{engine_with, mesh, node, service, upsert_workload, workload};
use crate::engine::{MapOp, Tables};
use crate::model::{
    Affinity, Algorithm, HealthCheck, Limits, Node, NodeName, Object, Probe, TargetPort, TrafficPolicy, TrafficSpec,
    Update,
};
use mesh_common::service::{CidrAction, CidrKey};
use std::time::{Duration, Instant};

const VIP: &str = "10.96.0.1:80";

fn engine(spec: TrafficSpec, prefer: Prefer) -> Engine {
    let mut service = service("web", &["10.96.0.1"], TargetPort::Number(8080));
    service.prefer = prefer;
    let policy = TrafficPolicy { name: service.name.clone(), services: vec![service.name.clone()], spec };
    let zoned = |name: &str, zone: &str| Object::Node(Arc::new(Node { zone: Some(zone.into()), ..node(name) }));
    let mut engine = engine_with(vec![
        zoned("n1", "east"),
        zoned("n2", "east"),
        zoned("n3", "west"),
        Object::Service(Arc::new(service)),
        Object::Traffic(Arc::new(policy)),
    ]);
    for (name, node, address) in [("a", "n1", 2), ("b", "n1", 3), ("c", "n2", 4), ("d", "n3", 5)] {
        let mut workload = workload(name, node, &[&format!("10.0.1.{address}")]);
        workload.weight = u32::from(address as u8) * 10;
        upsert_workload(&mut engine, workload);
    }
    engine
}

/// The header's weights, and the slots.
fn drawn(tables: &Tables) -> (u32, u32, Vec<(String, u32)>) {
    let address: SocketAddr = VIP.parse().unwrap();
    let key = |slot| FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, slot);
    let header = tables.frontends.get(&key(0)).unwrap();
    let slots = (1..=header.local_slots()).map(|slot| tables.backends.get(&key(slot)).unwrap());
    let slots = slots.map(|slot| (SocketAddr::from(slot.endpoint()).to_string(), slot.cumulative())).collect();
    (header.total_weight(), header.local_weight(), slots)
}

#[test]
fn the_kernel_draws_between_the_endpoints_here_and_all_that_the_service_prefers() {
    let slots = vec![("10.0.1.2:8080".to_owned(), 20), ("10.0.1.3:8080".to_owned(), 50)];
    for (prefer, total) in [(Prefer::Nobody, 140), (Prefer::SameZone, 90), (Prefer::SameNode, 50)] {
        let engine = engine(TrafficSpec::default(), prefer);
        assert_eq!(drawn(engine.desired()), (total, 50, slots.clone()), "{prefer:?}");
    }
}

#[test]
fn what_only_the_daemon_can_do_leaves_the_pick_to_it() {
    let probe = HealthCheck {
        probe: Probe::Tcp,
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        unhealthy_after: 1,
        healthy_after: 1,
    };
    let specs = [
        TrafficSpec { same_node: Some(SameNode::Tunnel), ..TrafficSpec::default() },
        TrafficSpec { algorithm: Some(Algorithm::LeastConnections), ..TrafficSpec::default() },
        TrafficSpec { affinity: Some(Affinity::ClientIp(Duration::from_secs(1))), ..TrafficSpec::default() },
        TrafficSpec { limits: Some(Limits { max_connections: Some(1), max_pending: None }), ..TrafficSpec::default() },
        TrafficSpec { slow_start: Some(Duration::from_secs(1)), ..TrafficSpec::default() },
        TrafficSpec { health_check: Some(probe), ..TrafficSpec::default() },
        TrafficSpec { idle_timeout: Some(Duration::from_secs(1)), ..TrafficSpec::default() },
        TrafficSpec { connect_timeout: Some(Duration::from_secs(1)), ..TrafficSpec::default() },
    ];
    for spec in specs {
        let engine = engine(spec.clone(), Prefer::Nobody);
        assert_eq!(drawn(engine.desired()), (0, 0, vec![]), "{spec:?}");
        assert_eq!(engine.desired().backends.iter().count(), 0);
    }
}

#[test]
fn endpoints_in_the_nodes_own_namespace_have_no_slot() {
    let mut engine = engine(TrafficSpec::default(), Prefer::Nobody);
    let mut host = workload("b", "n1", &["10.0.1.3"]);
    (host.netns, host.cgroup) = (None, Some("/sys/fs/cgroup/b".into()));
    upsert_workload(&mut engine, host);
    assert_eq!(drawn(engine.desired()).2, [("10.0.1.2:8080".to_owned(), 20)]);
}

#[test]
fn an_endpoint_touches_only_the_slots_of_its_frontend_from_its_own_on() {
    let mut engine = engine(TrafficSpec::default(), Prefer::Nobody);
    let before = engine.desired().clone();
    let mut changed = workload("b", "n1", &["10.0.1.3"]);
    changed.weight = 7;
    upsert_workload(&mut engine, changed);
    let ops = diff(&before, engine.desired());
    let [MapOp::SetBackend(key, backend), MapOp::SetFrontend(header_key, header)] = ops[..] else { panic!("{ops:?}") };
    assert_eq!((key.slot(), backend.cumulative(), header_key.slot()), (2, 27, 0));
    assert_eq!((header.total_weight(), header.local_weight()), (117, 27));
}

#[test]
fn weights_of_any_size_keep_their_proportion() {
    let mut engine = engine(TrafficSpec::default(), Prefer::SameNode);
    for (name, address, weight) in [("a", "10.0.1.2", u32::MAX), ("b", "10.0.1.3", u32::MAX / 2)] {
        let mut large = workload(name, "n1", &[address]);
        large.weight = weight;
        upsert_workload(&mut engine, large);
    }
    let (total, local, slots) = drawn(engine.desired());
    assert_eq!((total, local), (slots[1].1, slots[1].1));
    let share = f64::from(slots[0].1) / f64::from(total);
    assert!((share - 2.0 / 3.0).abs() < 1e-6, "{share}");
}

#[test]
fn the_meshs_word_holds_for_workloads_own_addresses() {
    let mut engine = engine(TrafficSpec::default(), Prefer::Nobody);
    let action = |engine: &Engine, address: [u8; 4]| {
        *engine.desired().cidrs.get(&(128, CidrKey::new(mesh_common::Ip::from_v4(address)))).unwrap()
    };
    assert_eq!(action(&engine, [10, 0, 1, 2]), CidrAction::carry(0));
    assert_eq!(action(&engine, [10, 0, 1, 4]), CidrAction::CAPTURE, "on another node");
    let tunnel = Mesh { same_node: SameNode::Tunnel, ..mesh(&[]) };
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(tunnel))), Instant::now());
    assert_eq!(action(&engine, [10, 0, 1, 2]), CidrAction::CAPTURE);
    assert_eq!(drawn(engine.desired()).2, []);
    engine.handle_update(Update::Upsert(Object::Mesh(Arc::new(mesh(&[])))), Instant::now());
    assert_eq!(action(&engine, [10, 0, 1, 2]), CidrAction::carry(0));
    let mut gone = workload("a", "n2", &["10.0.1.2"]);
    gone.node = NodeName::parse("n2").unwrap();
    upsert_workload(&mut engine, gone);
    assert_eq!(action(&engine, [10, 0, 1, 2]), CidrAction::CAPTURE, "it has moved");
}
