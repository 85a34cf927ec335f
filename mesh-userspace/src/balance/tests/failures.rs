//! Ejection, trials, probes, and the budget, step by step.

use super::{CALLER, World, equal, number};
use crate::balance::{ConnectFailure, EjectionCause, Exhausted};
use crate::model::{Ejection, HealthCheck, Limits, Probe, Retry, Traffic};
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

impl World {
    /// Connections to an endpoint, each of which fails at once.
    fn fail_at(&mut self, wanted: usize, failures: usize) {
        for _ in 0..failures {
            let pick = self.pick_at(wanted);
            self.group.handle_failed(pick.id, ConnectFailure::Refused, self.now);
        }
    }

    fn succeed_at(&mut self, wanted: usize) {
        let pick = self.pick_at(wanted);
        self.group.handle_connected(pick.id, MILLISECOND, self.now);
        self.group.handle_first_byte(pick.id, MILLISECOND, self.now);
        self.group.handle_closed(pick.id, self.now);
    }

    /// Connections that an endpoint takes, and resets.
    fn reset_at(&mut self, wanted: usize, resets: usize) {
        for _ in 0..resets {
            let pick = self.pick_at(wanted);
            self.group.handle_connected(pick.id, MILLISECOND, self.now);
            self.group.handle_reset(pick.id, self.now);
            self.group.handle_closed(pick.id, self.now);
        }
    }

    fn is_ejected(&self, wanted: usize) -> bool {
        self.status(wanted).ejected.is_some()
    }

    /// For how long an endpoint is out from now on.
    fn out_for(&self, wanted: usize) -> Duration {
        self.status(wanted).ejected.expect("it is ejected").0 - self.now
    }
}

#[test]
fn as_many_failures_in_a_row_as_the_policy_says_eject() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.fail_at(1, 4);
    world.succeed_at(1);
    world.fail_at(1, 4);
    assert!(!world.is_ejected(1));
    world.fail_at(1, 1);
    assert_eq!(world.status(1).ejected, Some((world.now + 10 * SECOND, EjectionCause::Refused)));
    assert_eq!(world.visits(300, 3)[1], 0);
    assert_eq!(world.group.counts().ejections_by(EjectionCause::Refused), 1);
    assert_eq!(world.group.levels(world.now).ejected, 1);
}

#[test]
fn an_endpoint_comes_back_on_time_and_one_more_failure_ejects_it_for_twice_as_long() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.fail_at(1, 5);
    for length in [20, 40, 80, 160, 300, 300] {
        world.now += world.out_for(1);
        assert!(!world.is_ejected(1) && world.status(1).is_on_trial);
        world.fail_at(1, 1);
        assert_eq!(world.out_for(1), length * SECOND);
    }
}

#[test]
fn a_success_ends_the_trial_and_time_in_service_takes_doublings_back() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.fail_at(1, 5);
    world.now += 10 * SECOND;
    world.fail_at(1, 1);
    world.now += 20 * SECOND;
    world.succeed_at(1);
    assert!(!world.status(1).is_on_trial);
    // Out for 20 s; after 20 s in service it has served one doubling off, and gets another one.
    world.now += 20 * SECOND;
    world.fail_at(1, 5);
    assert_eq!(world.out_for(1), 20 * SECOND);
    world.now += 20 * SECOND;
    world.succeed_at(1);
    world.now += 60 * SECOND;
    world.fail_at(1, 5);
    assert_eq!(world.out_for(1), 10 * SECOND);
}

#[test]
fn on_trial_one_attempt_is_made_at_a_time() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.fail_at(1, 5);
    world.now += 10 * SECOND;
    let trial = world.pick_at(1);
    assert_eq!(world.visits(300, 3)[1], 0);
    assert!(world.group.counts().passed_over > 0);
    world.group.handle_connected(trial.id, MILLISECOND, world.now);
    assert!(world.visits(300, 3)[1] > 50);
}

#[test]
fn at_most_the_policys_share_is_out_at_once() {
    let ejection = Ejection { max_percent: 50, ..Ejection::default() };
    let mut world = World::new(&equal(5), Traffic { ejection, ..Traffic::default() });
    for endpoint in 0..4 {
        world.fail_at(endpoint, 5);
    }
    assert_eq!(
        (0..5).map(|endpoint| world.is_ejected(endpoint)).collect::<Vec<_>>(),
        [true, true, false, false, false]
    );
    assert_eq!(world.group.counts().ejections_withheld, 2);
    // Once there is room, failures eject again.
    world.now += 10 * SECOND;
    world.fail_at(2, 5);
    assert!(world.is_ejected(2) && !world.is_ejected(3));
}

#[test]
fn one_of_two_may_be_out_and_the_only_one_never() {
    let ejection = Ejection { max_percent: 10, ..Ejection::default() };
    let mut world = World::new(&equal(2), Traffic { ejection, ..Traffic::default() });
    world.fail_at(0, 5);
    world.fail_at(1, 50);
    assert!(world.is_ejected(0) && !world.is_ejected(1));
    let mut world = World::new(&equal(1), Traffic { ejection, ..Traffic::default() });
    world.fail_at(0, 50);
    assert!(!world.is_ejected(0));
}

#[test]
fn zero_failures_switch_ejection_off() {
    let ejection = Ejection { consecutive_failures: 0, ..Ejection::default() };
    let mut world = World::new(&equal(3), Traffic { ejection, ..Traffic::default() });
    world.fail_at(1, 50);
    world.reset_at(2, 50);
    assert_eq!(world.group.levels(world.now).ejected, 0);
}

#[test]
fn resets_before_any_byte_eject_though_the_connects_succeed() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.reset_at(1, 4);
    world.succeed_at(1);
    world.reset_at(1, 5);
    assert_eq!(world.status(1).ejected, Some((world.now + 10 * SECOND, EjectionCause::Reset)));
    world.now += 10 * SECOND;
    world.reset_at(1, 1);
    assert_eq!(world.out_for(1), 20 * SECOND);
    world.now += 20 * SECOND;
    world.succeed_at(1);
    assert!(!world.status(1).is_on_trial);
}

#[test]
fn probes_take_an_endpoint_out_and_bring_it_back() {
    let health_check =
        HealthCheck { probe: Probe::Tcp, interval: SECOND, timeout: SECOND, unhealthy_after: 2, healthy_after: 2 };
    let mut world = World::new(&equal(3), Traffic { health_check: Some(health_check), ..Traffic::default() });
    let id = world.status(1).id;
    let probe = |world: &mut World, healthy| world.group.handle_probe(id, healthy, world.now);
    probe(&mut world, false);
    assert!(world.status(1).is_healthy && world.visits(300, 3)[1] > 50);
    probe(&mut world, false);
    assert!(!world.status(1).is_healthy && world.visits(300, 3)[1] == 0);
    assert_eq!(world.group.levels(world.now).unhealthy, 1);
    probe(&mut world, true);
    probe(&mut world, true);
    assert!(world.status(1).is_healthy && world.visits(300, 3)[1] > 50);
    // What nobody probes any more is not held unhealthy for ever.
    probe(&mut world, false);
    probe(&mut world, false);
    world.traffic = Traffic::default().into();
    world.follow(&equal(3));
    assert!(world.status(1).is_healthy && world.visits(300, 3)[1] > 50);
}

#[test]
fn when_all_are_out_all_are_in() {
    let health_check =
        HealthCheck { probe: Probe::Tcp, interval: SECOND, timeout: SECOND, unhealthy_after: 1, healthy_after: 1 };
    let mut world = World::new(&equal(3), Traffic { health_check: Some(health_check), ..Traffic::default() });
    world.fail_at(0, 5);
    let ids: Vec<_> = (1..3).map(|endpoint| world.status(endpoint).id).collect();
    for id in ids {
        world.group.handle_probe(id, false, world.now);
    }
    assert_eq!(world.group.counts().panics, 0);
    let mut seen = [0; 3];
    for _ in 0..300 {
        let pick = world.pick(&[]);
        seen[number(&pick.endpoint)] += 1;
        world.group.handle_cancelled(pick.id, world.now);
    }
    assert!(seen.iter().all(|seen| *seen > 50), "{seen:?}");
    assert_eq!(world.group.counts().panics, 300);
    // Success is proof: the ejected endpoint is in again, and from then on it is the only one.
    world.succeed_at(0);
    assert!(!world.is_ejected(0));
    assert_eq!(world.visits(300, 3), [300, 0, 0]);
}

#[test]
fn a_connection_tries_every_endpoint_once_and_those_that_are_out_last() {
    let mut world = World::new(&equal(4), Traffic::default());
    world.fail_at(3, 5);
    for _ in 0..100 {
        let mut tried = Vec::new();
        let mut order = Vec::new();
        for _ in 0..4 {
            let pick = world.pick(&tried);
            world.group.handle_cancelled(pick.id, world.now);
            tried.push(pick.id);
            order.push(number(&pick.endpoint));
        }
        assert_eq!(order.pop(), Some(3));
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2]);
        assert_eq!(world.group.pick(CALLER, &tried, 5, world.now), Err(Exhausted::AllTried));
    }
}

#[test]
fn an_endpoint_that_lets_an_attempt_time_out_is_asked_again_later_and_longer_each_time() {
    let mut world = World::new(&equal(3), Traffic::default());
    // What is usual here: a millisecond.
    world.visits(300, 3);
    for pause in 1..=4 {
        let pick = world.pick_at(1);
        world.now += SECOND;
        world.visits(9, 1 + 2);
        world.group.handle_failed(pick.id, ConnectFailure::Timeout, world.now);
        assert!(world.status(1).is_on_trial && !world.is_ejected(1));
        world.now += pause * SECOND - MILLISECOND;
        assert_eq!(world.visits(300, 3)[1], 0);
        world.now += MILLISECOND;
    }
    let pick = world.pick_at(1);
    world.group.handle_failed(pick.id, ConnectFailure::Timeout, world.now);
    assert_eq!(world.status(1).ejected, Some((world.now + 10 * SECOND, EjectionCause::Timeout)));
}

#[test]
fn an_answer_ends_suspicion_and_the_ejection_that_came_of_silence() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.visits(300, 3);
    let pick = world.pick_at(1);
    world.now += 60 * MILLISECOND;
    assert!(world.status(1).is_suspect);
    assert_eq!(world.visits(300, 3)[1], 0);
    world.now += 2 * SECOND;
    world.visits(300, 3);
    assert_eq!(world.status(1).ejected.map(|(_, cause)| cause), Some(EjectionCause::Silent));
    world.group.handle_connected(pick.id, 2 * SECOND, world.now);
    assert!(!world.is_ejected(1) && !world.status(1).is_suspect && !world.status(1).is_on_trial);
    assert!(world.visits(300, 3)[1] > 50);
}

#[test]
fn when_nobody_answers_nobody_is_suspect_alone_and_nobody_is_ejected_for_it() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.visits(300, 3);
    for _ in 0..30 {
        world.pick(&[]);
    }
    // Everything stands still, as when this node itself is stopped.
    world.now += 30 * SECOND;
    let mut seen = [0; 3];
    for _ in 0..300 {
        seen[number(&world.pick(&[]).endpoint)] += 1;
    }
    assert!(seen.iter().all(|seen| *seen > 50), "{seen:?}");
    assert_eq!(world.group.levels(world.now).ejected, 0);
}

#[test]
fn callers_that_give_up_count_against_an_endpoint_only_if_it_let_them_wait() {
    let mut world = World::new(&equal(3), Traffic::default());
    world.visits(300, 3);
    for _ in 0..50 {
        let pick = world.pick_at(1);
        world.group.handle_cancelled(pick.id, world.now + 10 * MILLISECOND);
    }
    assert!(!world.is_ejected(1) && !world.status(1).is_on_trial);
    for _ in 0..5 {
        let pick = world.pick_at(1);
        world.now += SECOND;
        world.group.handle_cancelled(pick.id, world.now);
        world.now += 9 * SECOND;
    }
    assert_eq!(world.group.counts().ejections_by(EjectionCause::Timeout), 1);
}

#[test]
fn retries_end_where_the_budget_ends() {
    let retry = Retry { attempts: 3, budget_percent: 20, budget_minimum: 1 };
    let mut world = World::new(&equal(3), Traffic { retry, ..Traffic::default() });
    world.visits(100, 3);
    assert_eq!(world.group.levels(world.now).retries_left, 30);
    let allowed = (0..1_000).filter(|_| world.group.handle_retry(world.now).is_ok()).count();
    assert_eq!(allowed, 30);
    let counts = world.group.counts();
    assert_eq!((counts.retries, counts.exhausted_by(Exhausted::RetryBudget)), (30, 970));
    // A retry's own pick is no new connection that would earn more retries.
    let (first, now) = (world.status(0).id, world.now);
    world.pick(&[first]);
    assert_eq!(world.group.levels(now).retries_left, 0);
}

#[test]
fn a_shed_connection_is_not_counted_as_one() {
    let limits = Limits { max_connections: Some(0), max_pending: None };
    let mut world = World::new(&equal(3), Traffic { limits, ..Traffic::default() });
    assert_eq!(world.group.pick(CALLER, &[], 5, world.now), Err(Exhausted::MaxConnections));
    let levels = world.group.levels(world.now);
    assert_eq!((world.group.counts().picks, levels.open, levels.pending), (0, 0, 0));
}
