//! Endpoints that fail under load: how soon they are left alone, what it costs until then, how they come back.

use super::equal;
use super::simulation::{Answer, Simulation, WELL};
use crate::balance::EjectionCause;
use crate::model::{Algorithm, Traffic};
use std::time::Duration;

const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConnections, Algorithm::PeakEwma, Algorithm::Maglev];

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Endpoint 2 drops all packets from the 10th to the 60th second.
fn blackholed(number: usize, time: Duration) -> Answer {
    let is_dark = (seconds(10.0)..seconds(60.0)).contains(&time);
    if number == 2 && is_dark { Answer::Nothing } else { WELL }
}

#[test]
fn a_blackholed_replica_gets_next_to_nothing_after_a_tenth_of_a_second() {
    for algorithm in ALGORITHMS {
        let mut simulation = Simulation::new(&equal(5), Traffic { algorithm, ..Traffic::default() }, blackholed);
        simulation.run_until(seconds(30.0));
        let before = simulation.share(2, seconds(0.0), seconds(10.0));
        let after = simulation.share(2, seconds(10.1), seconds(30.0));
        assert!(before > 0.1 && after < 0.001, "{algorithm:?}: {before} before, {after} after");
        // Also over the time in which it was found out: the share of the first five seconds is below a percent.
        let meanwhile = simulation.share(2, seconds(10.0), seconds(15.0));
        assert!(meanwhile < 0.01, "{algorithm:?}: {meanwhile}");
        let p99 = simulation.p99(seconds(10.1), seconds(30.0));
        assert!(p99 <= seconds(0.002), "{algorithm:?}: {p99:?}");
        assert_eq!(simulation.failed(), 0, "{algorithm:?}: retries have carried every connection");
    }
}

#[test]
fn a_blackholed_replica_is_ejected_within_five_seconds_and_comes_back() {
    for algorithm in ALGORITHMS {
        let mut simulation = Simulation::new(&equal(5), Traffic { algorithm, ..Traffic::default() }, blackholed);
        simulation.run_until(seconds(15.0));
        let status = simulation.world.status(2);
        assert!(status.ejected.is_some(), "{algorithm:?}: {status:?}");
        // It is well from the 60th second on; it was out for 10, 20 and 40 seconds at most.
        simulation.run_until(seconds(130.0));
        let status = simulation.world.status(2);
        assert!(status.ejected.is_none() && !status.is_on_trial, "{algorithm:?}: {status:?}");
        let share = simulation.share(2, seconds(110.0), seconds(130.0));
        assert!(share > 0.1, "{algorithm:?}: {share}");
        assert!(simulation.outcomes.len() > 60_000 && simulation.failed() == 0);
    }
}

#[test]
fn also_few_connections_find_a_blackholed_replica_out() {
    for per_second in [1, 5, 50] {
        let mut simulation = Simulation::new(&equal(5), Traffic::default(), blackholed);
        simulation.per_second = per_second;
        simulation.run_until(seconds(55.0));
        let picks = simulation.picks.iter().filter(|(at, number)| *number == 2 && *at > seconds(10.0)).count();
        assert!(picks <= 9, "{picks} connections waited at {per_second} a second");
        assert!(simulation.world.group.counts().ejections_by(EjectionCause::Silent) > 0);
    }
}

#[test]
fn a_replica_that_refuses_is_ejected_after_five_and_no_connection_is_lost() {
    fn refusing(number: usize, time: Duration) -> Answer {
        if number == 2 && time > seconds(10.0) { Answer::Refuse } else { WELL }
    }
    for algorithm in ALGORITHMS {
        let mut simulation = Simulation::new(&equal(5), Traffic { algorithm, ..Traffic::default() }, refusing);
        simulation.run_until(seconds(19.9));
        let picks = simulation.picks.iter().filter(|(at, number)| *number == 2 && *at > seconds(10.0)).count();
        assert!((1..=5).contains(&picks), "{algorithm:?}: {picks}");
        simulation.run_until(seconds(100.0));
        assert_eq!(simulation.failed(), 0);
        let share = simulation.share(2, seconds(10.0), seconds(100.0));
        assert!(share < 0.001, "{algorithm:?}: {share}");
    }
}

#[test]
fn a_replica_that_resets_what_it_takes_is_ejected() {
    fn resetting(number: usize, time: Duration) -> Answer {
        if number == 2 && time > seconds(10.0) { Answer::Reset } else { WELL }
    }
    let mut simulation = Simulation::new(&equal(5), Traffic::default(), resetting);
    simulation.run_until(seconds(15.0));
    assert_eq!(simulation.world.status(2).ejected.map(|(_, cause)| cause), Some(EjectionCause::Reset));
    assert!(simulation.share(2, seconds(10.2), seconds(15.0)) < 0.001);
}

#[test]
fn when_all_fail_the_budget_bounds_what_retries_add() {
    fn down(_: usize, time: Duration) -> Answer {
        if time > seconds(10.0) { Answer::Refuse } else { WELL }
    }
    let mut simulation = Simulation::new(&equal(5), Traffic::default(), down);
    simulation.run_until(seconds(60.0));
    let (connections, attempts) = (simulation.outcomes.len(), simulation.picks.len());
    // A fifth of the connections, and ten a second.
    let retries = attempts - connections;
    assert!(retries > connections / 6 && retries <= connections / 5 + 10 * 60 + 200, "{retries} for {connections}");
}

#[test]
fn a_pause_of_everything_ejects_nobody() {
    fn paused(_: usize, time: Duration) -> Answer {
        // Whoever is asked within the pause answers when it ends.
        let is_within = time > seconds(10.0);
        let left = if is_within { seconds(13.0).saturating_sub(time) } else { Duration::ZERO };
        Answer::Accept { connect: left + Duration::from_millis(1), first_byte: Duration::from_millis(1) }
    }
    let mut simulation = Simulation::new(&equal(5), Traffic::default(), paused);
    simulation.run_until(seconds(20.0));
    let counts = simulation.world.group.counts();
    assert_eq!((counts.ejections.iter().sum::<u64>(), simulation.failed()), (0, 0));
    for endpoint in 0..5 {
        let share = simulation.share(endpoint, seconds(10.0), seconds(20.0));
        assert!((0.15..0.25).contains(&share), "{endpoint}: {share}");
    }
}

#[test]
fn a_replica_far_away_is_not_taken_for_a_dead_one() {
    fn far(number: usize, _: Duration) -> Answer {
        let connect = Duration::from_millis(if number == 2 { 150 } else { 1 });
        Answer::Accept { connect, first_byte: connect }
    }
    for per_second in [5, 50, 500] {
        let mut simulation = Simulation::new(&equal(5), Traffic::default(), far);
        simulation.per_second = per_second;
        simulation.run_until(seconds(120.0));
        assert_eq!(simulation.world.group.counts().ejections, [0; 5]);
        let share = simulation.share(2, seconds(10.0), seconds(120.0));
        assert!(share > 0.1, "{share} at {per_second} a second");
    }
}
