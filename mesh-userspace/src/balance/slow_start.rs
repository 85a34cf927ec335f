//! A new endpoint's share grows with time: caches and compilers warm up.

use std::time::Duration;

/// What a new endpoint starts with.
const START_PERMILLE: u32 = 100;
pub(super) const FULL_PERMILLE: u32 = 1_000;

/// Which part of its weight counts, in thousandths, this long after an endpoint joined: from a tenth to all of it, in a
/// straight line.
pub(super) fn warmth(since_joined: Duration, slow_start: Duration) -> u32 {
    if since_joined >= slow_start {
        return FULL_PERMILLE;
    }
    let gained = since_joined.as_nanos() * u128::from(FULL_PERMILLE - START_PERMILLE) / slow_start.as_nanos().max(1);
    // Below 900: the quotient of the times is below 1.
    START_PERMILLE + gained as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmth_grows_in_a_straight_line_from_a_tenth_to_all() {
        let slow_start = Duration::from_secs(90);
        for (seconds, permille) in [(0, 100), (10, 200), (45, 550), (89, 990), (90, 1_000), (10_000, 1_000)] {
            assert_eq!(warmth(Duration::from_secs(seconds), slow_start), permille);
        }
        assert_eq!(warmth(Duration::ZERO, Duration::ZERO), 1_000);
    }
}
