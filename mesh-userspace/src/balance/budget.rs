//! A bound on retries: a share of the connections there were lately, so that retries do not multiply a service's load
//! just when it is in trouble.

use crate::model::Retry;
use std::time::{Duration, Instant};

/// The window is this many seconds long, in steps of one second.
const SECONDS: usize = 10;

#[derive(Clone, Copy, Debug, Default)]
struct Second {
    connections: u32,
    retries: u32,
}

/// What happened in the last ten seconds.
#[derive(Debug, Default)]
pub(super) struct RetryBudget {
    /// The present second is at `seconds[present]`, the one before it before it, in a ring.
    seconds: [Second; SECONDS],
    present: usize,
    /// When the present second began.
    began_at: Option<Instant>,
}

impl RetryBudget {
    pub(super) fn handle_connection(&mut self, now: Instant) {
        self.advance(now);
        let second = &mut self.seconds[self.present];
        second.connections = second.connections.saturating_add(1);
    }

    /// Takes a retry from the budget, if it has room.
    pub(super) fn handle_retry(&mut self, policy: &Retry, now: Instant) -> bool {
        self.advance(now);
        let allowed = self.left(policy, now) > 0;
        if allowed {
            let second = &mut self.seconds[self.present];
            second.retries = second.retries.saturating_add(1);
        }
        allowed
    }

    /// How many retries there is room for.
    pub(super) fn left(&self, policy: &Retry, now: Instant) -> u32 {
        let passed = self.began_at.map_or(0, |began_at| now.saturating_duration_since(began_at).as_secs());
        let expired = usize::try_from(passed).unwrap_or(SECONDS).min(SECONDS);
        let valid = (expired..SECONDS).map(|age| self.seconds[(self.present + SECONDS - (age - expired)) % SECONDS]);
        let (mut connections, mut retries) = (0u64, 0u64);
        for second in valid {
            connections += u64::from(second.connections);
            retries += u64::from(second.retries);
        }
        let share = connections * u64::from(policy.budget_percent) / 100;
        let allowed = share + u64::from(policy.budget_minimum) * SECONDS as u64;
        u32::try_from(allowed.saturating_sub(retries)).unwrap_or(u32::MAX)
    }

    fn advance(&mut self, now: Instant) {
        let began_at = *self.began_at.get_or_insert(now);
        let passed = now.saturating_duration_since(began_at).as_secs();
        for _ in 0..passed.min(SECONDS as u64) {
            self.present = (self.present + 1) % SECONDS;
            self.seconds[self.present] = Second::default();
        }
        self.began_at = Some(began_at + Duration::from_secs(passed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Retry = Retry { attempts: 3, budget_percent: 20, budget_minimum: 1 };

    /// How many of `retries` are allowed.
    fn spend(budget: &mut RetryBudget, retries: usize, now: Instant) -> usize {
        (0..retries).filter(|_| budget.handle_retry(&POLICY, now)).count()
    }

    #[test]
    fn retries_are_a_share_of_the_last_ten_seconds_connections_and_a_minimum() {
        let (start, mut budget) = (Instant::now(), RetryBudget::default());
        assert_eq!(budget.left(&POLICY, start), 10);
        for _ in 0..200 {
            budget.handle_connection(start);
        }
        assert_eq!(spend(&mut budget, 1_000, start), 40 + 10);
        assert_eq!(budget.left(&POLICY, start), 0);
    }

    #[test]
    fn what_is_older_than_ten_seconds_neither_earns_nor_costs() {
        let (start, mut budget) = (Instant::now(), RetryBudget::default());
        for _ in 0..100 {
            budget.handle_connection(start);
        }
        let later = start + Duration::from_millis(5_500);
        assert_eq!(spend(&mut budget, 25, later), 25);
        assert_eq!(budget.left(&POLICY, start + Duration::from_millis(9_900)), 5);
        // The connections are gone, the retries still count: 10 are allowed, 25 were made.
        assert_eq!(spend(&mut budget, 9, start + Duration::from_secs(10)), 0);
        assert_eq!(budget.left(&POLICY, start + Duration::from_secs(15)), 10);
        assert_eq!(spend(&mut budget, 100, start + Duration::from_secs(15)), 10);
        assert_eq!(budget.left(&POLICY, start + Duration::from_hours(1)), 10);
        assert_eq!(spend(&mut budget, 100, start + Duration::from_hours(1)), 10);
    }

    #[test]
    fn retries_of_a_total_outage_stay_within_the_share_second_by_second() {
        let (start, mut budget) = (Instant::now(), RetryBudget::default());
        let (mut connections, mut retries) = (0, 0);
        for millisecond in (0..60_000).step_by(2) {
            let now = start + Duration::from_millis(millisecond);
            budget.handle_connection(now);
            connections += 1;
            retries += spend(&mut budget, 3, now);
        }
        // A fifth and the minimum of one a second, over each window: nothing near the threefold that was asked for.
        assert!(retries <= connections / 5 + 60 + 10, "{retries} of {connections}");
        assert!(retries >= connections / 5, "{retries} of {connections}");
    }
}
