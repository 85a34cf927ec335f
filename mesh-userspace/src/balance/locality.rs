//! Near endpoints first: tiers, and how much of the traffic each of them gets.

use crate::engine::Locality;
use crate::model::Prefer;

pub(super) const TIERS: usize = 3;

/// The tier of an endpoint: 0 is preferred to 1, and 1 to 2.
pub(super) fn tier(prefer: Prefer, locality: Locality) -> usize {
    match (prefer, locality) {
        (Prefer::Nobody, _) | (_, Locality::SameNode) | (Prefer::SameZone, Locality::SameZone) => 0,
        (Prefer::SameNode, Locality::SameZone) | (Prefer::SameZone, Locality::Elsewhere) => 1,
        (Prefer::SameNode, Locality::Elsewhere) => 2,
    }
}

/// A tier's weight in all, and that of its endpoints that take connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Capacity {
    pub(super) weight: u64,
    pub(super) usable: u64,
}

/// Each tier's share of the traffic; they add up to 1, if any endpoint is usable.
///
/// With `h` the usable share of a tier's weight, and `f` the threshold, the tier can serve `a = min(1, h / f)` of the
/// traffic. Each tier takes what it can of what the nearer ones have left; if all together cannot serve everything, their
/// shares grow in proportion. So from the threshold on a tier serves alone, and below it just as much goes elsewhere as
/// there is missing.
pub(super) fn shares(tiers: [Capacity; TIERS], failover_percent: u32) -> [f64; TIERS] {
    let mut left = 1.0f64;
    let mut shares = tiers.map(|tier| {
        let share = serviceable(tier, failover_percent).min(left);
        left -= share;
        share
    });
    let sum: f64 = shares.iter().sum();
    if sum > 0.0 && left > 0.0 {
        shares.iter_mut().for_each(|share| *share /= sum);
    }
    shares
}

/// Which part of the traffic a tier can serve.
fn serviceable(tier: Capacity, failover_percent: u32) -> f64 {
    let usable = u128::from(tier.usable) * 100;
    let needed = u128::from(tier.weight) * u128::from(failover_percent);
    // In whole numbers, so that exactly at the threshold is at the threshold.
    match tier.usable {
        0 => 0.0,
        _ if usable >= needed => 1.0,
        _ => usable as f64 / needed as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(capacities: [(u64, u64); TIERS], failover_percent: u32) -> [f64; TIERS] {
        shares(capacities.map(|(usable, weight)| Capacity { weight, usable }), failover_percent)
    }

    #[test]
    fn the_near_tier_serves_alone_from_exactly_the_threshold_on() {
        assert_eq!(of([(700, 1_000), (900, 900), (0, 0)], 70), [1.0, 0.0, 0.0]);
        let [near, far, _] = of([(699, 1_000), (900, 900), (0, 0)], 70);
        assert!((near - 699.0 / 700.0).abs() < 1e-9 && (far - 1.0 / 700.0).abs() < 1e-9, "{near} {far}");
    }

    #[test]
    fn what_a_tier_cannot_serve_goes_to_the_next_and_then_to_the_last() {
        let close = |left: [f64; TIERS], right: [f64; TIERS]| {
            assert!(left.iter().zip(right).all(|(left, right)| (left - right).abs() < 1e-9), "{left:?}, not {right:?}");
        };
        close(of([(50, 100), (100, 100), (100, 100)], 100), [0.5, 0.5, 0.0]);
        close(of([(50, 100), (30, 100), (100, 100)], 100), [0.5, 0.3, 0.2]);
        close(of([(0, 100), (100, 100), (100, 100)], 70), [0.0, 1.0, 0.0]);
        close(of([(0, 0), (0, 0), (1, 100)], 70), [0.0, 0.0, 1.0]);
        // Nothing is whole: all help in proportion to what they have.
        close(of([(10, 100), (30, 100), (0, 0)], 100), [0.25, 0.75, 0.0]);
        close(of([(0, 0), (0, 9), (0, 1)], 70), [0.0, 0.0, 0.0]);
        close(of([(1, 100), (100, 100), (0, 0)], 0), [1.0, 0.0, 0.0]);
    }

    #[test]
    fn preferences_make_tiers() {
        use Locality::{Elsewhere, SameNode, SameZone};
        let tiers = |prefer| [SameNode, SameZone, Elsewhere].map(|locality| tier(prefer, locality));
        assert_eq!(tiers(Prefer::Nobody), [0, 0, 0]);
        assert_eq!(tiers(Prefer::SameZone), [0, 0, 1]);
        assert_eq!(tiers(Prefer::SameNode), [0, 1, 2]);
    }

    proptest! {
        #[test]
        fn shares_add_up_and_only_usable_tiers_have_one(
            tiers in prop::array::uniform3((0u64..1_000, 0u64..1_000)), failover_percent in 0u32..=100,
        ) {
            let tiers = tiers.map(|(usable, lost)| (usable, usable + lost));
            let shares = of(tiers, failover_percent);
            let any = tiers.iter().any(|(usable, _)| *usable > 0);
            let sum: f64 = shares.iter().sum();
            prop_assert!((sum - f64::from(u8::from(any))).abs() < 1e-9, "{shares:?}");
            for ((usable, _), share) in tiers.into_iter().zip(shares) {
                prop_assert!(share >= 0.0 && (usable > 0 || share == 0.0));
            }
        }
    }
}
