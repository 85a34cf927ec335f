//! Cutting live connections, without any connection.

use super::super::fixture::{catalog, id, name, policy, snapshot, workload};
use super::*;
use crate::model::PolicyAction;
use std::time::Duration;

fn live(side: Side) -> Live {
    let (client, server) = (workload("client", "10.0.0.1"), workload("server", "10.0.0.2"));
    Live { side, caller: client.into(), source: [10, 0, 0, 1].into(), destination: server.into(), port: 8080 }
}

fn told(ticket: &mut Ticket) -> Option<Cut> {
    match ticket.poll_cut(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(cut) => Some(cut),
        Poll::Pending => None,
    }
}

#[test]
fn an_unchanged_mesh_cuts_nothing() {
    let registry = Registry::default();
    let mut tickets: Vec<_> = [Side::Source, Side::Destination].map(|side| registry.enter(live(side))).into();
    assert!(registry.recheck(&snapshot(catalog())).is_empty());
    assert!(tickets.iter_mut().all(|ticket| told(ticket).is_none()));
}

#[test]
fn a_policy_that_denies_cuts_both_ends_and_no_other_connection() {
    let registry = Registry::default();
    let mut tickets: Vec<_> = [Side::Source, Side::Destination].map(|side| registry.enter(live(side))).into();
    let mut other = registry.enter(Live {
        caller: workload("other", "10.0.0.3").into(),
        source: [10, 0, 0, 3].into(),
        ..live(Side::Destination)
    });
    let mut changed = catalog();
    changed.policies.insert(name("block"), policy("block", PolicyAction::Deny, "client").into());
    let changed = snapshot(changed);
    assert_eq!(registry.recheck(&changed), HashMap::from([("denied", 2)]));
    for ticket in &mut tickets {
        let cut = told(ticket).unwrap();
        assert_eq!(cut.to_string(), "deny: denied by rule 0 of policy shop/block");
    }
    assert_eq!(told(&mut other), None);
    assert!(registry.recheck(&changed).is_empty(), "each is cut once");
}

#[test]
fn a_port_that_the_rule_leaves_out_goes_on() {
    let registry = Registry::default();
    let mut changed = catalog();
    let mut block = policy("block", PolicyAction::Deny, "client");
    block.rules[0].ports = vec![9090];
    changed.policies.insert(name("block"), block.into());
    let changed = snapshot(changed);
    let _ticket = registry.enter(live(Side::Destination));
    assert!(registry.recheck(&changed).is_empty());
    let _ticket = registry.enter(Live { port: 9090, ..live(Side::Destination) });
    assert_eq!(registry.recheck(&changed), HashMap::from([("denied", 1)]));
}

#[test]
fn a_caller_that_is_gone_or_another_is_cut_at_the_destination() {
    let mut gone = catalog();
    gone.workloads.remove(&name("client"));
    let mut another = catalog();
    let renamed = crate::model::Workload { identity: id("thief"), ..workload("client", "10.0.0.1") };
    another.workloads.insert(name("client"), renamed.into());
    for changed in [gone, another] {
        let registry = Registry::default();
        let mut source = registry.enter(live(Side::Source));
        let mut destination = registry.enter(live(Side::Destination));
        assert_eq!(registry.recheck(&snapshot(changed)), HashMap::from([("source_gone", 1)]));
        assert_eq!(told(&mut destination), Some(Cut::SourceGone));
        // The source's own node disarms it.
        assert_eq!(told(&mut source), None);
    }
}

#[test]
fn a_destination_with_another_identity_is_cut() {
    let mut changed = catalog();
    let renamed = crate::model::Workload { identity: id("impostor"), ..workload("server", "10.0.0.2") };
    changed.workloads.insert(name("server"), renamed.into());
    let registry = Registry::default();
    let mut ticket = registry.enter(live(Side::Source));
    assert_eq!(registry.recheck(&snapshot(changed)), HashMap::from([("destination_changed", 1)]));
    assert_eq!(told(&mut ticket), Some(Cut::DestinationChanged));
}

#[tokio::test]
async fn whoever_waits_to_be_cut_is_woken_and_told_once() {
    let registry = Registry::default();
    let mut ticket = registry.enter(live(Side::Source));
    let waiting = tokio::spawn(async move { (ticket.cut().await, ticket) });
    // It waits from here on.
    tokio::task::yield_now().await;
    let mut changed = catalog();
    changed.policies.insert(name("block"), policy("block", PolicyAction::Deny, "client").into());
    assert_eq!(registry.recheck(&snapshot(changed)), HashMap::from([("denied", 1)]));
    let (cut, mut ticket) = tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap().unwrap();
    assert_eq!(cut.reason(), "denied");
    assert_eq!(told(&mut ticket), None);
}

#[test]
fn a_connection_that_has_ended_is_not_cut() {
    let registry = Registry::default();
    drop(registry.enter(live(Side::Destination)));
    let mut changed = catalog();
    changed.workloads.remove(&name("client"));
    assert!(registry.recheck(&snapshot(changed)).is_empty());
    assert!(registry.0.shards.iter().all(|shard| lock(shard).is_empty()));
}

#[test]
fn deliveries_are_known_while_they_last_in_either_form_of_the_address() {
    let registry = Registry::default();
    let (from, to) = ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:8080".parse().unwrap());
    let mapped = "[::ffff:10.0.0.1]:4000".parse().unwrap();
    let delivery = registry.delivering(mapped, to);
    assert!(registry.is_delivery(from, to) && !registry.is_delivery(to, from));
    drop(delivery);
    assert!(!registry.is_delivery(from, to));
}
