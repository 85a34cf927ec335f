//! Maglev's promises: even tables, and few callers that move.

use super::{World, caller, endpoints_of, equal};
use crate::balance::hash;
use crate::balance::maglev::{Place, Table};
use crate::engine::Locality;
use crate::model::{Algorithm, Traffic};
use proptest::prelude::*;
use std::time::Duration;

const KEYS: u64 = 100_000;

fn places(slots: impl Iterator<Item = u32>) -> Vec<Place> {
    slots.map(|slot| Place { hash: hash::pair(5, u64::from(slot)), slot, weight: 100 }).collect()
}

/// How many of all keys have another endpoint in the other table.
fn moved(left: &Table, right: &Table) -> u64 {
    (0..KEYS).filter(|key| left.get(hash::mix(*key)) != right.get(hash::mix(*key))).count() as u64
}

#[test]
fn when_one_of_a_hundred_leaves_hardly_more_than_its_own_keys_move() {
    let full = Table::build(places(0..100));
    assert!(full.len() >= 100 * 100);
    for gone in [0, 17, 50, 99] {
        let rest = Table::build(places((0..100).filter(|slot| *slot != gone)));
        let moved = moved(&full, &rest);
        // A hundredth must move; up to two hundredths more may.
        assert!((KEYS / 100 * 8 / 10..=KEYS * 3 / 100).contains(&moved), "{moved} of {KEYS} keys moved");
    }
}

#[test]
fn tables_do_not_hang_on_the_order_of_endpoints() {
    let mut reversed = places(0..50);
    reversed.reverse();
    assert_eq!(moved(&Table::build(places(0..50)), &Table::build(reversed)), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_endpoint_has_places_in_proportion_to_its_weight(weights in prop::collection::vec(1u32..=100, 1..60)) {
        let mut places = places(0..u32::try_from(weights.len()).unwrap());
        places.iter_mut().zip(&weights).for_each(|(place, weight)| place.weight = *weight);
        let table = Table::build(places);
        prop_assert!(table.len() >= 100 * weights.len());
        let mut seen = vec![0u32; weights.len()];
        for place in 0..table.len() as u64 {
            // The middle of each place's interval.
            let hash = ((u128::from(place) * 2 + 1) << 63) / table.len() as u128;
            seen[table.get(hash as u64).unwrap() as usize] += 1;
        }
        let total: u32 = weights.iter().sum();
        for (weight, seen) in weights.iter().zip(seen) {
            let due = table.len() as f64 * f64::from(*weight) / f64::from(total);
            // One place by rounding, and the last round, in which not everybody has had its turn.
            let slack = 2.0 + weights.len() as f64 * f64::from(*weight) / f64::from(total);
            prop_assert!((f64::from(seen) - due).abs() <= slack, "weight {weight} of {total}: {seen}, not {due}");
        }
    }
}

#[test]
fn callers_stay_while_an_endpoint_leaves_comes_back_or_is_out() {
    let mut world = World::new(&equal(10), Traffic { algorithm: Algorithm::Maglev, ..Traffic::default() });
    let all = |world: &mut World| (0..2_000).map(|index| world.visit(caller(index))).collect::<Vec<_>>();
    let before = all(&mut world);
    assert_eq!(all(&mut world), before);
    let moved = |after: &[usize]| {
        let others = before.iter().zip(after).filter(|(before, _)| **before != 3);
        others.filter(|(before, after)| before != after).count()
    };
    // Out: its callers find other endpoints, which are the same each time; nobody else moves.
    for _ in 0..5 {
        let pick = world.pick_at(3);
        world.group.handle_failed(pick.id, crate::balance::ConnectFailure::Refused, world.now);
    }
    let out = all(&mut world);
    assert!(!out.contains(&3) && moved(&out) == 0);
    assert_eq!(all(&mut world), out);
    world.now += Duration::from_secs(10);
    let trial = world.pick_at(3);
    world.group.handle_connected(trial.id, Duration::from_millis(1), world.now);
    world.group.handle_closed(trial.id, world.now);
    assert_eq!(all(&mut world), before);
    // Gone: hardly anybody else moves.
    let without = endpoints_of((0..10).filter(|number| *number != 3).map(|number| (number, 100, Locality::Elsewhere)));
    world.follow(&without);
    let gone = all(&mut world);
    assert!(!gone.contains(&3) && moved(&gone) <= 2_000 * 5 / 100, "{} moved", moved(&gone));
    world.follow(&equal(10));
    assert_eq!(all(&mut world), before);
}

#[test]
fn a_new_endpoint_takes_its_callers_over_one_by_one() {
    let traffic = Traffic { algorithm: Algorithm::Maglev, slow_start: Duration::from_secs(100), ..Traffic::default() };
    let mut world = World::new(&equal(4), traffic);
    world.follow(&equal(5));
    let mut before = 0;
    for (seconds, permille) in [(0, 20), (50, 110), (100, 200)] {
        world.now += Duration::from_secs(seconds) - (world.now - world.start);
        let its: Vec<u32> = (0..20_000).filter(|index| world.visit(caller(*index)) == 4).collect();
        assert!(its.len().abs_diff(20 * permille) < 300, "{} at {seconds} s", its.len());
        assert!(its.len() > before);
        before = its.len();
    }
}
