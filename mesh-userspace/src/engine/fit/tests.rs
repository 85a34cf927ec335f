use super::*;
use crate::engine::policy_tests::{account, policy, range, rule};
use crate::engine::tests::{engine_with, labels, mesh, node, service, upsert_workload, workload};
use crate::engine::{Engine, diff, is_group_header};
use crate::model::{Object, PolicyAction, PolicyTarget, TargetPort};
use mesh_common::service::PROTO_TCP;

/// `web` and `db` on this node and `far` on another, each behind a service and with a policy of its own.
fn engine() -> Engine {
    let mut objects = vec![Object::Mesh(Arc::new(mesh(&[]))), Object::Node(Arc::new(node("n1")))];
    objects.push(Object::Node(Arc::new(node("n2"))));
    for (number, app) in [(1, "web"), (2, "db"), (3, "far")] {
        let mut service = service(app, &[&format!("10.96.0.{number}")], TargetPort::Number(8080));
        service.selector = labels(&[("app", app)]);
        objects.push(Object::Service(Arc::new(service)));
        let ranges = (0..number).map(|n| range(&format!("192.0.{n}.0/24"))).chain([account("web")]).collect();
        let mut policy = policy(app, PolicyAction::Allow, vec![rule(Some(ranges), &[])]);
        policy.targets = vec![PolicyTarget::Selector(labels(&[("app", app)]))];
        objects.push(Object::Policy(Arc::new(policy)));
    }
    let mut engine = engine_with(objects);
    for (app, node, address) in [("web", "n1", "10.0.1.2"), ("db", "n1", "10.0.1.3"), ("far", "n2", "10.0.2.2")] {
        let mut workload = workload(app, node, &[address]);
        workload.labels = labels(&[("app", app)]);
        upsert_workload(&mut engine, workload);
    }
    engine
}

fn frontend(tables: &Tables, number: u8) -> Option<Frontend> {
    let key = FrontendKey::new(Ip::from(std::net::IpAddr::from([10, 96, 0, number])), 80_u16.to_be(), PROTO_TCP, 0);
    tables.frontends.get(&key).copied()
}

fn groups(tables: &Tables) -> BTreeSet<u32> {
    tables.verdicts.iter().map(|(key, _)| key.group()).collect()
}

#[test]
fn what_fits_is_left_as_it_is() {
    let tables = engine().desired().clone();
    let (fitted, left_out) = fit(tables.clone(), &Capacity::KERNEL);
    assert!(left_out.is_empty());
    assert!(diff(&tables, &fitted).is_empty());
}

#[test]
fn a_group_is_written_as_a_whole_or_not_at_all_and_nothing_asks_one_that_is_not_there() {
    let tables = engine().desired().clone();
    assert_eq!((groups(&tables).len(), tables.ranges.len()), (3, 6));
    for ranges in 0..=6 {
        let (fitted, left_out) = fit(tables.clone(), &Capacity { ranges, ..Capacity::KERNEL });
        assert!(fitted.ranges.len() <= ranges);
        assert_eq!(left_out.get("RANGES").copied().unwrap_or(0), 6 - fitted.ranges.len());
        let there = groups(&fitted);
        let headers = fitted.verdicts.iter().filter(|(key, _)| is_group_header(key)).count();
        assert_eq!(headers, there.len());
        for group in &there {
            let of = |tables: &Tables| tables.ranges.iter().filter(|((_, key), _)| key.group() == *group).count();
            assert_eq!(of(&fitted), of(&tables), "a group has all its ranges");
        }
        for number in 1..=3 {
            let (before, after) = (frontend(&tables, number).unwrap(), frontend(&fitted, number).unwrap());
            let is_there = there.contains(&before.group());
            assert_eq!(after.group(), if is_there { before.group() } else { 0 });
            assert_eq!(after.local_slots(), if is_there { before.local_slots() } else { 0 }, "the daemon picks");
            assert_eq!(after.backends(), before.backends());
        }
        for (key, action) in fitted.cidrs.iter() {
            let before = tables.cidrs.get(key).unwrap();
            let expected = if there.contains(&before.group()) { *before } else { CidrAction::CAPTURE };
            assert_eq!(*action, expected);
        }
        // The guard names the group that is not there, and so lets nothing pass.
        assert_eq!(fitted.app_ports, tables.app_ports);
        assert_eq!(fitted.local, tables.local);
    }
    let (fitted, _) = fit(tables.clone(), &Capacity { verdicts: 0, ..Capacity::KERNEL });
    assert!(fitted.verdicts.is_empty() && fitted.ranges.is_empty() && fitted.backends.is_empty());
}

#[test]
fn backends_without_room_are_the_daemons_to_pick() {
    let tables = engine().desired().clone();
    assert_eq!(tables.backends.len(), 2);
    let (fitted, left_out) = fit(tables.clone(), &Capacity { backends: 1, ..Capacity::KERNEL });
    assert_eq!(left_out, LeftOut::from([("BACKENDS", 1)]));
    let slots = |tables: &Tables| [1, 2].map(|number| frontend(tables, number).unwrap().local_slots());
    assert_eq!((slots(&tables), slots(&fitted)), ([1, 1], [1, 0]));
    assert_eq!(frontend(&fitted, 2).unwrap().group(), frontend(&tables, 2).unwrap().group());
    assert_eq!(fitted.backends.len(), 1);
}

#[test]
fn a_workload_whose_guard_has_no_room_is_not_armed() {
    let tables = engine().desired().clone();
    let guards = tables.app_ports.len();
    let (fitted, left_out) = fit(tables.clone(), &Capacity { app_ports: guards - 1, ..Capacity::KERNEL });
    assert_eq!(fitted.local.len(), 1);
    let armed = fitted.local.values().next().unwrap();
    let address = Ip::from(armed.addresses[0]);
    assert!(!fitted.app_ports.is_empty() && fitted.app_ports.iter().all(|(key, _)| key.addr() == address));
    assert_eq!(left_out, LeftOut::from([("APPPORTS", guards - fitted.app_ports.len())]));
}

#[test]
fn frontends_and_addresses_stay_in_their_order_as_far_as_there_is_room() {
    let tables = engine().desired().clone();
    let capacity = Capacity { frontends: 2, cidrs: 1, ..Capacity::KERNEL };
    let (fitted, left_out) = fit(tables.clone(), &capacity);
    assert!(frontend(&fitted, 1).is_some() && frontend(&fitted, 2).is_some() && frontend(&fitted, 3).is_none());
    assert_eq!(left_out, LeftOut::from([("SVC", 1), ("CIDR", tables.cidrs.len() - 1)]));
    assert_eq!(fit(tables, &capacity).0, fitted, "the same contents fit in the same way");
}
