//! Each algorithm gives endpoints what their weights say, as long as nothing else speaks.

use super::{World, caller, equal, number, weighted};
use crate::balance::{EndpointId, Exhausted};
use crate::model::{Affinity, Algorithm, Limits, Traffic};
use proptest::prelude::*;
use std::time::Duration;

const PICKS: usize = 20_000;

fn by(algorithm: Algorithm) -> Traffic {
    Traffic { algorithm, ..Traffic::default() }
}

/// Whether a count is what a share of `picks` draws would give, within six standard deviations.
fn is_likely(count: usize, share: f64, picks: usize) -> bool {
    let expected = share * picks as f64;
    (count as f64 - expected).abs() <= 6.0 * (expected * (1.0 - share)).sqrt() + 1.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_shares_follow_the_weights(weights in prop::collection::vec(0u32..1_000, 1..12)) {
        let total: u32 = weights.iter().sum();
        prop_assume!(total > 0);
        let seen = World::new(&weighted(&weights), by(Algorithm::Random)).visits(PICKS, weights.len());
        for (weight, seen) in weights.iter().zip(seen) {
            prop_assert!(is_likely(seen, f64::from(*weight) / f64::from(total), PICKS), "{weight} of {total}: {seen}");
        }
    }

    #[test]
    fn round_robin_shares_are_the_weights_to_one_turn(weights in prop::collection::vec(1u32..1_000, 1..12)) {
        let total: usize = weights.iter().map(|weight| *weight as usize).sum();
        let mut world = World::new(&weighted(&weights), by(Algorithm::RoundRobin));
        let mut seen = vec![0usize; weights.len()];
        for picks in 1..=2_000 {
            seen[world.visit(super::CALLER)] += 1;
            for (weight, seen) in weights.iter().zip(&seen) {
                // Smooth: at no time is anybody far from what is due. With many endpoints, several may be due at once.
                let due = f64::from(picks) * f64::from(*weight) / total as f64;
                prop_assert!((*seen as f64 - due).abs() <= 2.0, "after {picks}: {seen}, due {due}");
            }
        }
    }

    #[test]
    fn idle_endpoints_share_by_weight_under_least_connections(weights in prop::collection::vec(1u32..1_000, 1..12)) {
        let total: u32 = weights.iter().sum();
        let seen = World::new(&weighted(&weights), by(Algorithm::LeastConnections)).visits(PICKS, weights.len());
        for (weight, seen) in weights.iter().zip(seen) {
            prop_assert!(is_likely(seen, f64::from(*weight) / f64::from(total), PICKS), "{weight} of {total}: {seen}");
        }
    }

    #[test]
    fn open_connections_are_levelled_by_weight(weights in prop::collection::vec(1u32..20, 1..10)) {
        let total: u32 = weights.iter().sum();
        let mut world = World::new(&weighted(&weights), by(Algorithm::LeastConnections));
        for _ in 0..total * 7 {
            let pick = world.pick(&[]);
            world.group.handle_connected(pick.id, Duration::from_millis(1), world.now);
        }
        for (index, weight) in weights.iter().enumerate() {
            prop_assert!(world.status(index).open.abs_diff(weight * 7) <= 1, "{:?}", world.status(index));
        }
    }

    #[test]
    fn maglev_shares_follow_the_weights(weights in prop::collection::vec(1u32..50, 2..8)) {
        let total: u32 = weights.iter().sum();
        let mut world = World::new(&weighted(&weights), by(Algorithm::Maglev));
        let mut seen = vec![0usize; weights.len()];
        for index in 0..PICKS {
            seen[world.visit(caller(index as u32))] += 1;
        }
        for (weight, seen) in weights.iter().zip(seen) {
            let share = f64::from(*weight) / f64::from(total);
            // Callers are spread at random over the table, which is exact to a place for each endpoint.
            let slack = PICKS as f64 * weights.len() as f64 / 2_039.0;
            let expected = share * PICKS as f64;
            let bound = 6.0 * (expected * (1.0 - share)).sqrt() + slack;
            prop_assert!((seen as f64 - expected).abs() <= bound, "{weight} of {total}: {seen}, not {expected}");
        }
    }

    #[test]
    fn peak_ewma_draws_by_weight_where_all_are_as_fast(weights in prop::collection::vec(1u32..100, 2..8)) {
        let total: u32 = weights.iter().sum();
        let mut world = World::new(&weighted(&weights), by(Algorithm::PeakEwma));
        let seen = world.visits(PICKS, weights.len());
        for (weight, seen) in weights.iter().zip(seen) {
            prop_assert!(is_likely(seen, f64::from(*weight) / f64::from(total), PICKS), "{weight} of {total}: {seen}");
        }
    }

    #[test]
    fn whatever_happens_a_pick_is_untried_and_counts_balance(
        count in 1usize..6,
        algorithm in prop::sample::select(vec![
            Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConnections, Algorithm::PeakEwma, Algorithm::Maglev,
        ]),
        is_sticky: bool,
        steps in prop::collection::vec((0u8..9, any::<u64>()), 1..300),
    ) {
        let affinity = if is_sticky { Affinity::ClientIp(Duration::from_secs(2)) } else { Affinity::None };
        let mut world = World::new(&equal(count), Traffic { affinity, ..by(algorithm) });
        scramble(&mut world, count, &steps)?;
    }
}

/// Does anything to a group that the proxy may do.
fn scramble(world: &mut World, count: usize, steps: &[(u8, u64)]) -> Result<(), TestCaseError> {
    use crate::balance::ConnectFailure::{Refused, Timeout};
    let mut ejected = 0;
    let (mut pending, mut open): (Vec<EndpointId>, Vec<EndpointId>) = (Vec::new(), Vec::new());
    for (step, random) in steps {
        let at = |list: &Vec<EndpointId>| (*random as usize) % list.len().max(1);
        world.now += Duration::from_millis(random % 700);
        match step {
            0..=2 => {
                let tried: Vec<_> = world.group.statuses(world.now).map(|status| status.id).collect();
                let tried = &tried[..(*random as usize) % (tried.len() + 1)];
                match world.group.pick(caller(u32::from(*step)), tried, *random, world.now) {
                    Ok(pick) => {
                        prop_assert!(!tried.contains(&pick.id));
                        pending.push(pick.id);
                    }
                    Err(why) => prop_assert_eq!(
                        (why, tried.len()),
                        (Exhausted::AllTried, world.group.statuses(world.now).count())
                    ),
                }
            }
            3 if !pending.is_empty() => {
                let id = pending.swap_remove(at(&pending));
                world.group.handle_connected(id, Duration::from_millis(random % 50), world.now);
                open.push(id);
            }
            4 if !pending.is_empty() => {
                let failure = if random % 2 == 0 { Refused } else { Timeout };
                world.group.handle_failed(pending.swap_remove(at(&pending)), failure, world.now);
            }
            5 if !pending.is_empty() => world.group.handle_cancelled(pending.swap_remove(at(&pending)), world.now),
            6 if !open.is_empty() => world.group.handle_closed(open.swap_remove(at(&open)), world.now),
            7 if !open.is_empty() => world.group.handle_reset(open[at(&open)], world.now),
            8 => {
                let joined = count + (*random as usize) % 3;
                let traffic = world.traffic.clone();
                world.group.handle_view(&equal(joined), &traffic, world.now);
            }
            _ => {}
        }
        let levels = world.group.levels(world.now);
        prop_assert_eq!((levels.pending as usize, levels.open as usize), (pending.len(), pending.len() + open.len()));
        // A list that shrinks may leave more out than would have been let.
        let most = (levels.endpoints / 2).max(u32::from(levels.endpoints > 1));
        prop_assert!(levels.ejected <= most.max(ejected), "{levels:?}");
        ejected = levels.ejected;
    }
    Ok(())
}

#[test]
fn nothing_is_picked_where_nothing_takes_connections() {
    for endpoints in [weighted(&[]), weighted(&[0, 0])] {
        let mut world = World::new(&endpoints, Traffic::default());
        assert_eq!(world.group.pick(super::CALLER, &[], 5, world.now), Err(Exhausted::NoEndpoints));
        assert_eq!(world.group.counts().exhausted_by(Exhausted::NoEndpoints), 1);
    }
}

#[test]
fn the_extremes_of_randomness_stay_within_the_endpoints() {
    let mut world = World::new(&weighted(&[0, u32::MAX, 0, u32::MAX, 0]), Traffic::default());
    for (random, expected) in [(0, 1), (u64::MAX / 2, 1), (u64::MAX / 2 + 1, 3), (u64::MAX, 3)] {
        let pick = world.group.pick(super::CALLER, &[], random, world.now).unwrap();
        assert_eq!(number(&pick.endpoint), expected);
    }
}

#[test]
fn equal_endpoints_take_turns_in_one_order() {
    let mut world = World::new(&equal(4), by(Algorithm::RoundRobin));
    let round: Vec<usize> = (0..4).map(|_| world.visit(super::CALLER)).collect();
    for _ in 0..5 {
        assert_eq!((0..4).map(|_| world.visit(super::CALLER)).collect::<Vec<_>>(), round);
    }
}

#[test]
fn nodes_begin_their_rounds_with_different_endpoints() {
    let first = |seed| {
        let mut world = World::seeded(seed, &equal(8), by(Algorithm::RoundRobin));
        world.visit(super::CALLER)
    };
    let firsts: std::collections::BTreeSet<usize> = (0..64).map(first).collect();
    assert!(firsts.len() >= 6, "{firsts:?}");
}

#[test]
fn a_round_goes_on_when_the_list_changes() {
    let mut world = World::new(&equal(6), by(Algorithm::RoundRobin));
    let traffic = world.traffic.clone();
    let mut seen = vec![0; 6];
    for _ in 0..600 {
        // A list of the same endpoints, as after a change elsewhere in their objects.
        world.group.handle_view(&equal(6), &traffic, world.now);
        seen[world.visit(super::CALLER)] += 1;
    }
    assert_eq!(seen, vec![100; 6]);
}

#[test]
fn limits_shed_what_is_above_them_and_admit_again_below() {
    let limits = Limits { max_connections: Some(3), max_pending: Some(2) };
    let mut world = World::new(&equal(2), Traffic { limits, ..Traffic::default() });
    let [first, second] = [world.pick(&[]), world.pick(&[])];
    let refused = |world: &mut World| world.group.pick(super::CALLER, &[], 1, world.now).unwrap_err();
    assert_eq!(refused(&mut world), Exhausted::MaxPending);
    world.group.handle_connected(first.id, Duration::from_millis(1), world.now);
    let third = world.pick(&[]);
    world.group.handle_connected(third.id, Duration::from_millis(1), world.now);
    assert_eq!(refused(&mut world), Exhausted::MaxConnections);
    // Also a connection whose endpoint has left the catalog counts until it ends.
    let traffic = world.traffic.clone();
    world.group.handle_view(&weighted(&[]), &traffic, world.now);
    world.group.handle_view(&equal(1), &traffic, world.now);
    assert_eq!(refused(&mut world), Exhausted::MaxConnections);
    world.group.handle_closed(first.id, world.now);
    world.group.handle_cancelled(second.id, world.now);
    world.pick(&[]);
    let counts = world.group.counts();
    assert_eq!((counts.exhausted_by(Exhausted::MaxPending), counts.exhausted_by(Exhausted::MaxConnections)), (1, 2));
}
