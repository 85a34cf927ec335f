//! Endpoints that are slow, or new, under load: algorithms that look at load give them less.

use super::equal;
use super::simulation::{Answer, Simulation, WELL};
use crate::model::{Algorithm, Traffic};
use std::time::Duration;

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

const SLOW: Duration = Duration::from_millis(200);
const MILLISECOND: Duration = Duration::from_millis(1);

/// Packets of endpoint 2 take 200 ms more.
fn far(number: usize, _: Duration) -> Answer {
    if number == 2 { Answer::Accept { connect: SLOW, first_byte: SLOW } } else { WELL }
}

/// The application of endpoint 2 takes 200 ms more to answer.
fn lazy(number: usize, _: Duration) -> Answer {
    if number == 2 { Answer::Accept { connect: MILLISECOND, first_byte: SLOW } } else { WELL }
}

fn by(algorithm: Algorithm) -> Traffic {
    Traffic { algorithm, ..Traffic::default() }
}

#[test]
fn a_slow_replica_gets_less_than_a_fifth_of_its_equal_share() {
    for algorithm in [Algorithm::LeastConnections, Algorithm::PeakEwma] {
        for behaviour in [far, lazy] {
            for per_second in [150, 500, 2_000] {
                let mut simulation = Simulation::new(&equal(5), by(algorithm), behaviour);
                simulation.per_second = per_second;
                simulation.run_until(seconds(30.0));
                let share = simulation.share(2, seconds(1.0), seconds(30.0));
                assert!(share < 0.2 / 5.0, "{algorithm:?} at {per_second} a second: {share}");
            }
        }
    }
}

#[test]
fn peak_ewma_avoids_a_slow_replica_also_where_connections_are_rare() {
    let mut simulation = Simulation::new(&equal(5), by(Algorithm::PeakEwma), lazy);
    simulation.per_second = 10;
    simulation.run_until(seconds(300.0));
    let share = simulation.share(2, seconds(10.0), seconds(300.0));
    assert!(share < 0.2 / 5.0, "{share}");
}

#[test]
fn a_replica_that_was_slow_gets_its_share_again() {
    fn recovering(number: usize, time: Duration) -> Answer {
        if number == 2 && time < seconds(30.0) { Answer::Accept { connect: SLOW, first_byte: SLOW } } else { WELL }
    }
    for algorithm in [Algorithm::LeastConnections, Algorithm::PeakEwma] {
        let mut simulation = Simulation::new(&equal(5), by(algorithm), recovering);
        simulation.run_until(seconds(180.0));
        let share = simulation.share(2, seconds(150.0), seconds(180.0));
        assert!(share > 0.1, "{algorithm:?}: {share}");
    }
}

#[test]
fn load_aware_algorithms_share_evenly_among_equals() {
    for algorithm in [Algorithm::LeastConnections, Algorithm::PeakEwma] {
        let mut simulation = Simulation::new(&equal(5), by(algorithm), |_, _| WELL);
        simulation.run_until(seconds(60.0));
        for endpoint in 0..5 {
            let share = simulation.share(endpoint, seconds(0.0), seconds(60.0));
            assert!((0.18..0.22).contains(&share), "{algorithm:?}, {endpoint}: {share}");
        }
    }
}

#[test]
fn a_new_endpoint_is_neither_flooded_nor_starved() {
    for algorithm in [Algorithm::LeastConnections, Algorithm::PeakEwma] {
        let mut simulation = Simulation::new(&equal(4), by(algorithm), |_, _| WELL);
        simulation.run_until(seconds(10.0));
        simulation.world.follow(&equal(5));
        simulation.run_until(seconds(12.0));
        let share = simulation.share(4, seconds(10.0), seconds(12.0));
        assert!((0.1..0.3).contains(&share), "{algorithm:?}: {share}");
    }
}
