//! Near endpoints are preferred, and others help as soon as those do not suffice.

use super::{CALLER, World, caller, endpoints_of};
use crate::balance::ConnectFailure;
use crate::engine::Locality::{self, Elsewhere, SameNode, SameZone};
use crate::model::{Affinity, Algorithm, Ejection, Prefer, Traffic};
use proptest::prelude::*;
use std::time::Duration;

/// All may be out, so that each endpoint that fails is.
fn preferring(prefer: Prefer, algorithm: Algorithm) -> Traffic {
    let ejection = Ejection { max_percent: 100, ..Ejection::default() };
    Traffic { prefer, algorithm, ejection, ..Traffic::default() }
}

fn world(localities: &[Locality], traffic: Traffic) -> World {
    let numbered = localities.iter().enumerate().map(|(number, locality)| (number, 100, *locality));
    World::new(&endpoints_of(numbered), traffic)
}

fn eject(world: &mut World, endpoint: usize) {
    let others = world.group.statuses(world.now).filter(|status| super::number(&status.endpoint) != endpoint);
    let others: Vec<_> = others.map(|status| status.id).collect();
    for _ in 0..5 {
        let pick = world.pick(&others);
        world.group.handle_failed(pick.id, ConnectFailure::Refused, world.now);
    }
    assert!(world.status(endpoint).ejected.is_some());
}

const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConnections, Algorithm::PeakEwma, Algorithm::Maglev];

/// Shares of visits by many callers, in thousandths, of those endpoints that are near.
fn near_permille(world: &mut World, near: usize) -> usize {
    const VISITS: usize = 10_000;
    let near = (0..VISITS).filter(|index| world.visit(caller(*index as u32)) < near).count();
    near * 1_000 / VISITS
}

#[test]
fn the_near_tier_is_used_alone_from_exactly_the_threshold_on() {
    let localities = [[SameZone; 10], [Elsewhere; 10]].concat();
    for algorithm in ALGORITHMS {
        let mut world = world(&localities, preferring(Prefer::SameZone, algorithm));
        for out in 0..3 {
            eject(&mut world, out);
        }
        assert_eq!(near_permille(&mut world, 10), 1_000, "{algorithm:?}");
        assert_eq!(world.group.counts().failovers, 0);
        // 6 of 10 take connections where 7 are wanted: a seventh of the traffic goes elsewhere.
        eject(&mut world, 3);
        let near = near_permille(&mut world, 10);
        assert!(near.abs_diff(857) < 25, "{algorithm:?}: {near}");
        assert!(world.group.counts().failovers > 1_000);
        world.now += Duration::from_secs(10);
        assert_eq!(near_permille(&mut world, 10), 1_000, "{algorithm:?}");
    }
}

#[test]
fn traffic_prefers_the_node_then_the_zone_then_anybody() {
    let localities = [[SameNode; 2], [SameZone; 2], [Elsewhere; 2]].concat();
    for algorithm in ALGORITHMS {
        let mut world = world(&localities, preferring(Prefer::SameNode, algorithm));
        let near = |world: &mut World, near| near_permille(world, near);
        assert_eq!(near(&mut world, 2), 1_000);
        eject(&mut world, 0);
        let share = near(&mut world, 2);
        assert!(share.abs_diff(714) < 25, "{algorithm:?}: {share}");
        assert_eq!(near(&mut world, 4), 1_000);
        eject(&mut world, 1);
        assert_eq!((near(&mut world, 2), near(&mut world, 4)), (0, 1_000));
        eject(&mut world, 2);
        eject(&mut world, 3);
        assert_eq!(near(&mut world, 4), 0);
        eject(&mut world, 4);
        eject(&mut world, 5);
        // Panic: all count as whole, so the nearest serve again.
        assert_eq!(near(&mut world, 2), 1_000);
    }
}

#[test]
fn a_retry_goes_elsewhere_when_the_near_ones_were_tried() {
    let localities = [SameNode, Elsewhere];
    for algorithm in ALGORITHMS {
        let mut world = world(&localities, preferring(Prefer::SameNode, algorithm));
        let near = world.status(0).id;
        assert_eq!(super::number(&world.pick(&[near]).endpoint), 1, "{algorithm:?}");
        assert_eq!(world.group.counts().failovers, 1);
    }
}

#[test]
fn a_silent_near_endpoint_does_not_keep_callers_waiting_while_others_answer() {
    let mut world = world(&[SameNode, Elsewhere], preferring(Prefer::SameNode, Algorithm::Random));
    world.visit(CALLER);
    world.pick(&[]);
    world.now += Duration::from_millis(60);
    assert_eq!(world.visit(CALLER), 1);
}

#[test]
fn affinity_stays_with_an_endpoint_until_that_takes_no_connections() {
    for algorithm in ALGORITHMS {
        let affinity = Affinity::ClientIp(Duration::from_secs(60));
        let mut world = world(&[Elsewhere; 5], Traffic { affinity, ..preferring(Prefer::Nobody, algorithm) });
        let chosen = world.visit(CALLER);
        for _ in 0..100 {
            assert_eq!(world.visit(CALLER), chosen, "{algorithm:?}");
            world.now += Duration::from_secs(59);
        }
        // A failed attempt: the connection's next one goes elsewhere, and the caller with it.
        let pick = world.pick(&[]);
        world.group.handle_failed(pick.id, ConnectFailure::Refused, world.now);
        let retried = world.pick(&[pick.id]);
        assert_ne!(retried.id, pick.id);
        world.group.handle_connected(retried.id, Duration::from_millis(1), world.now);
        let moved = world.visit(CALLER);
        assert_eq!(moved, super::number(&retried.endpoint));
        // Ejected: it goes on with another one, and stays there.
        for _ in 0..5 {
            let id = world.status(moved).id;
            world.group.handle_failed(id, ConnectFailure::Refused, world.now);
        }
        let last = world.visit(CALLER);
        assert_ne!(last, moved);
        world.now += Duration::from_secs(11);
        assert_eq!(world.visit(CALLER), last);
    }
}

#[test]
fn affinity_ends_after_its_time_and_is_bounded() {
    let affinity = Affinity::ClientIp(Duration::from_secs(60));
    let mut world = world(&[Elsewhere; 5], Traffic { affinity, ..Traffic::default() });
    let seen: std::collections::BTreeSet<usize> = (0..200)
        .map(|_| {
            world.now += Duration::from_secs(60);
            world.visit(CALLER)
        })
        .collect();
    assert_eq!(seen.len(), 5);
    for index in 0..10_000 {
        world.visit(caller(index));
    }
    assert_eq!(world.group.levels(world.now).callers, 4_096);
    assert!(world.group.counts().callers_forgotten >= 10_000 - 4_096);
    // Also who is not remembered stays where it is.
    let chosen = world.visit(caller(9_999));
    assert!((0..100).all(|_| world.visit(caller(9_999)) == chosen));
    // There is room again when the others' time is over.
    world.now += Duration::from_secs(61);
    world.visit(caller(9_999));
    assert_eq!(world.group.levels(world.now).callers, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn shares_of_a_tier_follow_the_weights_also_while_others_help(
        near in prop::collection::vec(1u32..100, 2..6), far in prop::collection::vec(1u32..100, 1..4), percent in 0u32..=100,
    ) {
        let numbered = near.iter().map(|weight| (*weight, SameNode)).chain(far.iter().map(|weight| (*weight, Elsewhere)));
        let endpoints = endpoints_of(numbered.enumerate().map(|(number, (weight, at))| (number, weight, at)));
        let traffic = Traffic { failover_percent: percent, ..preferring(Prefer::SameNode, Algorithm::RoundRobin) };
        let mut world = World::new(&endpoints, traffic);
        eject(&mut world, 0);
        let seen = world.visits(20_000, near.len() + far.len());
        let total: u32 = near.iter().sum();
        let usable = total - near[0];
        let share = (f64::from(usable) * 100.0 / (f64::from(total) * f64::from(percent))).min(1.0);
        let expected = |weight: u32, of: u32, share: f64| 20_000.0 * share * f64::from(weight) / f64::from(of);
        for (weight, seen) in near.iter().zip(&seen).skip(1) {
            prop_assert!((*seen as f64 - expected(*weight, usable, share)).abs() < 4.0);
        }
        for (weight, seen) in far.iter().zip(&seen[near.len()..]) {
            prop_assert!((*seen as f64 - expected(*weight, far.iter().sum(), 1.0 - share)).abs() < 4.0);
        }
    }
}

#[test]
fn what_the_kernel_has_chosen_against_is_not_picked_while_another_takes_connections() {
    for algorithm in ALGORITHMS {
        for prefer in [Prefer::Nobody, Prefer::SameNode] {
            let mut world = world(&[SameNode, SameNode, SameZone, Elsewhere], preferring(prefer, algorithm));
            for index in 0..200 {
                let pick = world.group.pick_elsewhere(caller(index), world.draws.draw(), world.now).unwrap();
                assert!(super::number(&pick.endpoint) >= 2, "{algorithm:?}, {prefer:?}");
                world.group.handle_cancelled(pick.id, world.now);
            }
            // As a first attempt: nothing of the retry budget is spent.
            assert_eq!(world.group.counts().retries, 0);
            eject(&mut world, 2);
            for index in 0..50 {
                let pick = world.group.pick_elsewhere(caller(index), world.draws.draw(), world.now).unwrap();
                assert_eq!(super::number(&pick.endpoint), 3, "{algorithm:?}, {prefer:?}");
                world.group.handle_cancelled(pick.id, world.now);
            }
        }
    }
}

#[test]
fn near_ones_are_picked_after_all_where_nobody_else_takes_connections() {
    for algorithm in ALGORITHMS {
        let mut alone = world(&[SameNode, SameNode], preferring(Prefer::Nobody, algorithm));
        assert!(alone.group.pick_elsewhere(CALLER, 1, alone.now).is_ok(), "{algorithm:?}: no other is listed");
        let mut world = world(&[SameNode, Elsewhere], preferring(Prefer::Nobody, algorithm));
        eject(&mut world, 1);
        let pick = world.group.pick_elsewhere(CALLER, 1, world.now).unwrap();
        assert_eq!(super::number(&pick.endpoint), 0, "{algorithm:?}: the other is out");
    }
    let mut nobody = world(&[], preferring(Prefer::Nobody, Algorithm::Random));
    assert!(nobody.group.pick_elsewhere(CALLER, 1, nobody.now).is_err());
}
