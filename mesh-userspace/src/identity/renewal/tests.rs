//! The schedule against a simulated authority and simulated clocks.

use super::*;
use proptest::prelude::*;

fn id(number: usize) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/ns/shop/sa/a{number}")).unwrap()
}

fn ids(numbers: std::ops::Range<usize>) -> BTreeSet<SpiffeId> {
    numbers.map(id).collect()
}

/// Simulated time: both clocks run together.
#[derive(Clone, Copy)]
struct Clock {
    start: Now,
    passed: Duration,
}

impl Clock {
    fn new() -> Self {
        let wall = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        Self { start: Now { steady: Instant::now(), wall }, passed: Duration::ZERO }
    }

    fn now(&self) -> Now {
        Now { steady: self.start.steady + self.passed, wall: self.start.wall + self.passed }
    }

    fn advance(&mut self, by: Duration) {
        self.passed += by;
    }
}

const UNAVAILABLE: &str = "no answer";

/// An authority that is out of order during some spans of time.
struct Simulation {
    clock: Clock,
    schedule: Renewal,
    life: Duration,
    outages: Vec<(Duration, Duration)>,
    dice: Box<dyn FnMut() -> f64>,
    /// When each certificate was issued.
    issued: Vec<(SpiffeId, Duration)>,
    /// When the authority was asked in vain.
    failed: Vec<(SpiffeId, Duration)>,
}

impl Simulation {
    fn new(life: Duration, outages: Vec<(Duration, Duration)>, seed: u64) -> Self {
        let mut state = seed | 1;
        let dice = move || {
            // xorshift: any sequence will do.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        Self {
            clock: Clock::new(),
            schedule: Renewal::default(),
            life,
            outages,
            dice: Box::new(dice),
            issued: Vec::new(),
            failed: Vec::new(),
        }
    }

    fn is_out(&self) -> bool {
        self.outages.iter().any(|(from, to)| (*from..*to).contains(&self.clock.passed))
    }

    /// Runs until `end`; `check` sees every step.
    fn run_until(&mut self, end: Duration, mut check: impl FnMut(&Self)) {
        loop {
            let now = self.clock.now();
            for attempt in self.schedule.take_due(now, 64) {
                if self.is_out() {
                    self.failed.push((attempt.id.clone(), self.clock.passed));
                    self.schedule.failed(&attempt, UNAVAILABLE.to_owned(), false, now, (self.dice)());
                } else {
                    self.issued.push((attempt.id.clone(), self.clock.passed));
                    self.schedule.issued(&attempt, now.wall + self.life, 0, now, (self.dice)());
                }
            }
            check(self);
            let wait = self.schedule.wait(now).unwrap_or(Duration::MAX);
            // An answer takes a while, also one that fails.
            let step = wait.max(Duration::from_millis(1));
            if self.clock.passed.saturating_add(step) > end {
                return;
            }
            self.clock.advance(step);
        }
    }
}

fn seconds(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_secs)
}

proptest! {
    #[test]
    fn an_outage_shorter_than_four_tenths_of_a_life_lets_nothing_expire(
        life in seconds(30..90_000), start in 0.0..3.0, length in 0.0..0.4, seed: u64,
    ) {
        let from = life.mul_f64(start) + Duration::from_millis(1);
        let outage = (from, from + life.mul_f64(length));
        let mut simulation = Simulation::new(life, vec![outage], seed);
        simulation.schedule.want(&ids(0..5));
        simulation.run_until(life * 6, |simulation| {
            let now = simulation.clock.now();
            for (id, entry) in simulation.schedule.entries() {
                let held = entry.held().unwrap_or_else(|| panic!("{id} has no certificate"));
                assert!(held.not_after > now.wall, "{id} has expired");
            }
        });
        for number in 0..5 {
            let times = simulation.issued.iter().filter(|(issued, _)| *issued == id(number)).count();
            prop_assert!((6..=14).contains(&times), "{times} certificates in six lives");
        }
    }

    #[test]
    fn renewals_are_jittered_around_half_of_the_life(life in seconds(10..90_000), seed: u64) {
        let mut simulation = Simulation::new(life, Vec::new(), seed);
        simulation.schedule.want(&ids(0..64));
        simulation.run_until(life.mul_f64(0.56), |_| ());
        let renewals: Vec<_> = simulation.issued.iter().skip(64).map(|(_, at)| at.as_secs_f64() / life.as_secs_f64()).collect();
        prop_assert_eq!(renewals.len(), 64);
        prop_assert!(renewals.iter().all(|at| (0.449..0.551).contains(at)), "{:?}", renewals);
        let (first, last) = renewals.iter().fold((1.0_f64, 0.0_f64), |(a, b), at| (a.min(*at), b.max(*at)));
        prop_assert!(last - first > 0.04, "all at once: {first} to {last}");
    }

    #[test]
    fn pauses_between_failures_grow_and_are_bounded(life in seconds(2..90_000), seed: u64) {
        let mut simulation = Simulation::new(life, vec![(Duration::from_millis(1), life)], seed);
        simulation.schedule.want(&ids(0..1));
        simulation.run_until(life, |_| ());
        let times: Vec<_> = simulation.failed.iter().map(|(_, at)| *at).collect();
        let bound = (life / 20).clamp(Duration::from_secs(1), Duration::from_secs(10)).mul_f64(1.21);
        for (index, pair) in times.windows(2).enumerate() {
            let pause = pair[1] - pair[0];
            prop_assert!(pause <= bound, "{pause:?} is longer than {bound:?}");
            let least = Duration::from_millis(400 << index.min(8)).min(bound.mul_f64(0.8 / 1.21));
            prop_assert!(pause >= least.mul_f64(0.99), "pause {index} is {pause:?}");
        }
        prop_assert!(!times.is_empty(), "it was asked for at half of its life");
    }

    #[test]
    fn nothing_is_asked_for_what_is_not_wanted(
        steps in proptest::collection::vec((0_usize..8, 0_usize..8, 0_u64..40_000, any::<bool>()), 1..40), seed: u64,
    ) {
        let life = Duration::from_secs(60);
        let mut simulation = Simulation::new(life, Vec::new(), seed);
        let mut open: Vec<Attempt> = Vec::new();
        for (from, count, pause, answers) in steps {
            let wanted = ids(from..from + count);
            simulation.schedule.want(&wanted);
            let now = simulation.clock.now();
            prop_assert_eq!(simulation.schedule.entries().map(|(id, _)| id.clone()).collect::<BTreeSet<_>>(), wanted.clone());
            let due = simulation.schedule.take_due(now, 64);
            prop_assert!(due.iter().all(|attempt| wanted.contains(&attempt.id)));
            open.extend(due);
            if answers {
                // Late answers as well, for identities that have gone or come back.
                for attempt in open.drain(..) {
                    let is_current = simulation.schedule.awaits(&attempt);
                    let known = |schedule: &Renewal| schedule.entries().find(|(id, _)| **id == attempt.id).map(|(_, entry)| entry.held().copied());
                    let before = known(&simulation.schedule);
                    simulation.schedule.issued(&attempt, now.wall + life, 0, now, 0.5);
                    prop_assert!(is_current || known(&simulation.schedule) == before);
                    prop_assert!(!is_current || wanted.contains(&attempt.id));
                }
            }
            simulation.clock.advance(Duration::from_millis(pause));
        }
    }

    #[test]
    fn another_authority_renews_everything_within_a_quarter_of_the_life(life in seconds(10..14_000), age in 0.0..0.44, seed: u64) {
        let mut simulation = Simulation::new(life, Vec::new(), seed);
        simulation.schedule.want(&ids(0..32));
        simulation.run_until(Duration::ZERO, |_| ());
        simulation.clock.advance(life.mul_f64(age));
        let changed = simulation.clock.passed;
        let now = simulation.clock.now();
        let mut dice = std::mem::replace(&mut simulation.dice, Box::new(|| 0.5));
        simulation.schedule.set_epoch(1, now, &mut dice);
        simulation.issued.clear();
        let mut renewed = BTreeMap::new();
        while simulation.clock.passed <= changed + life / 4 + Duration::from_secs(1) {
            let now = simulation.clock.now();
            for attempt in simulation.schedule.take_due(now, 64) {
                simulation.schedule.issued(&attempt, now.wall + life, 1, now, 0.5);
                renewed.insert(attempt.id, simulation.clock.passed);
            }
            let wait = simulation.schedule.wait(simulation.clock.now()).unwrap_or_default();
            simulation.clock.advance(wait.max(Duration::from_millis(1)));
        }
        prop_assert_eq!(renewed.len(), 32);
        let times: BTreeSet<_> = renewed.values().collect();
        prop_assert!(times.len() > 16, "not all at once");
        // A second look at the same epoch changes nothing.
        let before: Vec<_> = simulation.schedule.entries().map(|(_, entry)| *entry.held().unwrap()).collect();
        simulation.schedule.set_epoch(1, simulation.clock.now(), || 0.0);
        let after: Vec<_> = simulation.schedule.entries().map(|(_, entry)| *entry.held().unwrap()).collect();
        prop_assert_eq!(before, after);
    }
}

#[test]
fn those_without_a_certificate_go_first_and_batches_are_bounded() {
    let mut simulation = Simulation::new(Duration::from_secs(100), Vec::new(), 1);
    simulation.schedule.want(&ids(0..3));
    simulation.run_until(Duration::ZERO, |_| ());
    simulation.clock.advance(Duration::from_secs(80));
    simulation.schedule.want(&ids(0..6));
    let taken = simulation.schedule.take_due(simulation.clock.now(), 4);
    let taken: Vec<_> = taken.into_iter().map(|attempt| attempt.id).collect();
    assert_eq!((&taken[..3], taken.len()), (&[id(3), id(4), id(5)][..], 4));
    assert_eq!(simulation.schedule.take_due(simulation.clock.now(), 64).len(), 2, "each once");
}

#[test]
fn a_rotation_by_hand_does_not_wait_for_a_pause() {
    let mut simulation = Simulation::new(Duration::from_secs(3600), vec![(Duration::ZERO, Duration::from_secs(60))], 1);
    simulation.schedule.want(&ids(0..2));
    simulation.run_until(Duration::from_secs(59), |_| ());
    simulation.clock.advance(Duration::from_secs(2));
    simulation.schedule.rotate(Some(&id(1)), simulation.clock.now());
    assert!(simulation.schedule.take_due(simulation.clock.now(), 64).iter().any(|attempt| attempt.id == id(1)));
    simulation.run_until(Duration::from_secs(120), |_| ());
    simulation.schedule.rotate(None, simulation.clock.now());
    assert_eq!(simulation.schedule.take_due(simulation.clock.now(), 64)[0].id, id(0));
}

#[test]
fn nearing_the_end_is_said_once_for_each_step() {
    let mut simulation =
        Simulation::new(Duration::from_secs(1000), vec![(Duration::from_secs(1), Duration::from_secs(9000))], 1);
    simulation.schedule.want(&ids(0..1));
    simulation.run_until(Duration::ZERO, |_| ());
    let mut raised = Vec::new();
    for second in 0..1100 {
        simulation.clock.advance(Duration::from_secs(1));
        for (_, alarm) in simulation.schedule.alarms(simulation.clock.now()) {
            raised.push((second + 1, alarm));
        }
    }
    assert_eq!(raised, [(700, Alarm::Late), (900, Alarm::Urgent), (1000, Alarm::Expired)]);
}

#[test]
fn readiness_asks_for_an_answer_not_for_a_certificate() {
    let mut simulation = Simulation::new(Duration::from_secs(1000), Vec::new(), 1);
    let first = ids(0..2);
    simulation.schedule.want(&first);
    let now = simulation.clock.now();
    let due = simulation.schedule.take_due(now, 64);
    simulation.schedule.failed(&due[0], UNAVAILABLE.to_owned(), false, now, 0.5);
    simulation.schedule.issued(&due[1], now.wall + Duration::from_secs(9), 0, now, 0.5);
    assert!(!simulation.schedule.is_answered(&first), "silence is no answer");
    simulation.clock.advance(Duration::from_secs(1));
    let now = simulation.clock.now();
    let again = simulation.schedule.take_due(now, 64);
    simulation.schedule.failed(&again[0], "not your workload".to_owned(), true, now, 0.5);
    assert!(simulation.schedule.is_answered(&first));
    assert_eq!(simulation.schedule.last_error(&id(0)), Some("not your workload"));
}
