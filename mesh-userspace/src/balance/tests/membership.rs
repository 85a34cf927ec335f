//! Endpoints come, stay, leave and return; what is known of them does the same.

use super::{CALLER, World, endpoints_of, equal, number};
use crate::balance::{ConnectFailure, EndpointId, Exhausted};
use crate::engine::Locality;
use crate::model::{Algorithm, Traffic};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

fn without(count: usize, gone: usize) -> Arc<[crate::engine::Endpoint]> {
    let rest = (0..count).filter(|number| *number != gone);
    endpoints_of(rest.map(|number| (number, 100, Locality::Elsewhere)))
}

#[test]
fn what_is_known_of_endpoints_that_stay_survives_a_new_list() {
    let mut world = World::new(&equal(4), Traffic::default());
    for _ in 0..5 {
        let pick = world.pick_at(2);
        world.group.handle_failed(pick.id, ConnectFailure::Refused, world.now);
    }
    let pick = world.pick_at(1);
    world.group.handle_connected(pick.id, Duration::from_millis(7), world.now);
    world.follow(&without(5, 0));
    assert!(world.status(2).ejected.is_some());
    assert_eq!((world.status(1).id, world.status(1).open), (pick.id, 1));
    world.group.handle_closed(pick.id, world.now);
    assert_eq!(world.status(1).open, 0);
}

#[test]
fn outcomes_of_endpoints_that_are_gone_change_no_others() {
    let mut world = World::new(&equal(2), Traffic::default());
    let pick = world.pick_at(1);
    let gone = world.pick_at(1);
    world.follow(&equal(1));
    // It is remembered while it has connections, and its slot is nobody else's.
    world.group.handle_failed(gone.id, ConnectFailure::Timeout, world.now);
    world.group.handle_connected(pick.id, Duration::from_millis(1), world.now);
    world.group.handle_reset(pick.id, world.now);
    world.group.handle_closed(pick.id, world.now);
    world.follow(&without(3, 1));
    let fresh = world.status(2);
    assert!(fresh.id != pick.id);
    for id in [pick.id, gone.id] {
        world.group.handle_probe(id, false, world.now);
        world.group.handle_first_byte(id, Duration::from_secs(9), world.now);
        world.group.handle_reset(id, world.now);
    }
    assert_eq!(world.status(2), fresh);
    assert_eq!(world.group.levels(world.now).open, 0);
}

#[test]
fn an_endpoint_that_returns_finds_its_connections_again() {
    let mut world = World::new(&equal(3), Traffic { algorithm: Algorithm::LeastConnections, ..Traffic::default() });
    for _ in 0..30 {
        let pick = world.pick(&[]);
        world.group.handle_connected(pick.id, Duration::from_millis(1), world.now);
    }
    let id = world.status(1).id;
    world.follow(&without(3, 1));
    world.follow(&equal(3));
    assert_eq!((world.status(1).id, world.status(1).open), (id, 10));
    // So it is not flooded.
    let mut seen = [0; 3];
    for _ in 0..30 {
        let pick = world.pick(&[]);
        world.group.handle_connected(pick.id, Duration::from_millis(1), world.now);
        seen[number(&pick.endpoint)] += 1;
    }
    assert_eq!(seen, [10, 10, 10]);
}

#[test]
fn state_is_bounded_by_endpoints_and_connections() {
    let mut world = World::new(&equal(1), Traffic { algorithm: Algorithm::RoundRobin, ..Traffic::default() });
    let mut ids: BTreeSet<String> = BTreeSet::new();
    let mut held: Vec<EndpointId> = Vec::new();
    for generation in 0..1_000 {
        let numbered = (0..10).map(|number| (generation * 10 + number, 100, Locality::Elsewhere));
        world.follow(&endpoints_of(numbered));
        let pick = world.pick(&[]);
        ids.insert(format!("{:?}", pick.id));
        held.push(pick.id);
        if held.len() > 5 {
            world.group.handle_failed(held.remove(0), ConnectFailure::Refused, world.now);
        }
    }
    assert_eq!(ids.len(), 1_000, "no id is used twice");
    assert!(world.group.slots() <= 10 + 10 + 6, "{} slots", world.group.slots());
}

#[test]
fn an_empty_service_says_so_and_recovers() {
    let mut world = World::new(&equal(2), Traffic::default());
    world.visits(10, 2);
    world.follow(&equal(0));
    assert_eq!(world.group.pick(CALLER, &[], 1, world.now), Err(Exhausted::NoEndpoints));
    world.follow(&equal(2));
    world.visits(10, 2);
}

#[test]
fn new_endpoints_warm_up_and_the_first_list_is_warm() {
    for algorithm in [Algorithm::Random, Algorithm::RoundRobin] {
        let slow_start = Duration::from_secs(100);
        let mut world = World::new(&equal(4), Traffic { slow_start, algorithm, ..Traffic::default() });
        assert!(world.group.statuses(world.now).all(|status| status.warmth_percent == 100));
        world.follow(&equal(5));
        for (seconds, warmth) in [(0, 10), (30, 37), (50, 55), (99, 99), (100, 100), (1_000, 100)] {
            world.now = world.start + Duration::from_secs(seconds);
            assert_eq!(world.status(4).warmth_percent, warmth);
            let seen = world.visits(20_000, 5)[4];
            let due = 20_000 * warmth as usize / (400 + warmth as usize);
            assert!(seen.abs_diff(due) < 350, "{algorithm:?} after {seconds} s: {seen}, not {due}");
        }
    }
}

#[test]
fn turns_in_slow_start_follow_time_pick_by_pick() {
    let slow_start = Duration::from_secs(10);
    let mut world =
        World::new(&equal(4), Traffic { slow_start, algorithm: Algorithm::RoundRobin, ..Traffic::default() });
    world.follow(&equal(5));
    let mut seen = [0usize; 5];
    for _ in 0..10_000 {
        world.now += Duration::from_millis(1);
        seen[world.visit(CALLER)] += 1;
    }
    // The mean of w / (4 + w) for w from 0.1 to 1 is 0.118.
    assert!(seen[4].abs_diff(1_180) < 30, "{seen:?}");
    assert!(seen[..4].iter().all(|seen| seen.abs_diff(2_205) < 30), "{seen:?}");
}

#[test]
fn while_nothing_changes_nobody_looks_at_all_endpoints() {
    let endpoints = equal(100_000);
    for algorithm in [Algorithm::Random, Algorithm::RoundRobin, Algorithm::PeakEwma] {
        let mut world = World::new(&endpoints, Traffic { algorithm, ..Traffic::default() });
        for _ in 0..100_000 {
            world.visit(CALLER);
            world.follow(&endpoints);
        }
        assert_eq!(world.group.plans(), 1);
    }
}

#[test]
fn a_member_stays_small() {
    assert!(std::mem::size_of::<crate::balance::member::Member>() <= 144);
}
