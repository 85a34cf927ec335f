//! A service under load, in simulated time: connections come, endpoints answer as they are told to, failed attempts are
//! retried as the proxy does.

use super::{World, caller, number};
use crate::balance::{ConnectFailure, EndpointId};
use crate::engine::Endpoint;
use crate::model::Traffic;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What an endpoint does with an attempt.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// It takes the connection after so long, and answers with a byte after so long again.
    Accept {
        connect: Duration,
        first_byte: Duration,
    },
    Refuse,
    /// Packets are dropped.
    Nothing,
    /// It takes the connection and resets it.
    Reset,
}

/// An endpoint that is well.
pub(super) const WELL: Answer =
    Answer::Accept { connect: Duration::from_millis(1), first_byte: Duration::from_millis(1) };

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Connected,
    FirstByte,
    Reset,
    Closes,
    Refused,
    TimesOut,
}

struct Connection {
    arrived_at: Instant,
    picked_at: Instant,
    id: Option<EndpointId>,
    at: usize,
    tried: Vec<EndpointId>,
}

/// What happened to a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    pub(super) arrived_at: Duration,
    /// From arrival until an endpoint took it; `None` if none did.
    pub(super) latency: Option<Duration>,
}

/// Behaviour of endpoint `number` after some time.
pub(super) type Behaviour = fn(number: usize, time: Duration) -> Answer;

pub(super) struct Simulation {
    pub(super) world: World,
    behaviour: Behaviour,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    connections: Vec<Connection>,
    /// When each pick was made, and of whom.
    pub(super) picks: Vec<(Duration, usize)>,
    pub(super) outcomes: Vec<Outcome>,
    pub(super) connect_timeout: Duration,
    /// How long an application uses a connection after the first byte.
    pub(super) hold: Duration,
    pub(super) per_second: u32,
    next_arrival: Instant,
}

impl Simulation {
    pub(super) fn new(endpoints: &Arc<[Endpoint]>, traffic: Traffic, behaviour: Behaviour) -> Self {
        let world = World::new(endpoints, traffic);
        Self {
            next_arrival: world.now,
            world,
            behaviour,
            events: BinaryHeap::new(),
            connections: Vec::new(),
            picks: Vec::new(),
            outcomes: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            hold: Duration::from_millis(3),
            per_second: 500,
        }
    }

    /// Runs until this time after the start.
    pub(super) fn run_until(&mut self, end: Duration) {
        let end = self.world.start + end;
        loop {
            let next_event = self.events.peek().map_or(end, |Reverse((at, _, _))| *at);
            if next_event.min(self.next_arrival) >= end {
                break;
            }
            if self.next_arrival <= next_event {
                self.arrive();
            } else if let Some(Reverse((at, index, event))) = self.events.pop() {
                self.world.now = at;
                self.handle(index as usize, event);
            }
        }
        self.world.now = end;
    }

    /// The share of picks in a time that went to an endpoint.
    pub(super) fn share(&self, of: usize, from: Duration, to: Duration) -> f64 {
        let within: Vec<_> = self.picks.iter().filter(|(at, _)| *at >= from && *at < to).collect();
        within.iter().filter(|(_, number)| *number == of).count() as f64 / within.len() as f64
    }

    /// The 99th percentile of the latencies of connections that arrived in a time; one that failed is the slowest.
    pub(super) fn p99(&self, from: Duration, to: Duration) -> Duration {
        let within = self.outcomes.iter().filter(|outcome| outcome.arrived_at >= from && outcome.arrived_at < to);
        let mut latencies: Vec<_> = within.map(|outcome| outcome.latency.unwrap_or(Duration::MAX)).collect();
        latencies.sort_unstable();
        latencies[latencies.len() * 99 / 100]
    }

    pub(super) fn failed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.latency.is_none()).count()
    }

    fn arrive(&mut self) {
        self.world.now = self.next_arrival;
        // Between half and one and a half of the mean interval.
        let mean = Duration::from_secs(1) / self.per_second;
        self.next_arrival += mean / 2 + mean.mul_f64((self.world.draws.draw() >> 11) as f64 / (1u64 << 53) as f64);
        let now = self.world.now;
        self.connections.push(Connection { arrived_at: now, picked_at: now, id: None, at: 0, tried: Vec::new() });
        self.attempt(self.connections.len() - 1);
    }

    fn attempt(&mut self, index: usize) {
        let now = self.world.now;
        let connection = &mut self.connections[index];
        let from = caller(u32::try_from(index).unwrap() % 250);
        let Ok(pick) = self.world.group.pick(from, &connection.tried, self.world.draws.draw(), now) else {
            self.finish(index, None);
            return;
        };
        connection.picked_at = now;
        connection.id = Some(pick.id);
        connection.at = number(&pick.endpoint);
        let since = now - self.world.start;
        self.picks.push((since, connection.at));
        let (event, after) = match (self.behaviour)(connection.at, since) {
            Answer::Accept { connect, .. } if connect < self.connect_timeout => (Event::Connected, connect),
            Answer::Accept { .. } | Answer::Nothing => (Event::TimesOut, self.connect_timeout),
            Answer::Refuse => (Event::Refused, Duration::from_micros(200)),
            Answer::Reset => (Event::Connected, Duration::from_millis(1)),
        };
        self.later(after, index, event);
    }

    fn handle(&mut self, index: usize, event: Event) {
        let now = self.world.now;
        let (id, at) = (self.connections[index].id.unwrap(), self.connections[index].at);
        let group = &mut self.world.group;
        match event {
            Event::Connected => {
                group.handle_connected(id, now - self.connections[index].picked_at, now);
                self.finish(index, Some(now));
                let (next, after) = match (self.behaviour)(at, now - self.world.start) {
                    Answer::Accept { first_byte, .. } => (Event::FirstByte, first_byte),
                    Answer::Reset => (Event::Reset, Duration::from_millis(1)),
                    Answer::Refuse | Answer::Nothing => (Event::Closes, self.hold),
                };
                self.later(after, index, next);
            }
            Event::FirstByte => {
                let Answer::Accept { first_byte, .. } = (self.behaviour)(at, now - self.world.start) else { return };
                group.handle_first_byte(id, first_byte, now);
                self.later(self.hold, index, Event::Closes);
            }
            Event::Reset => {
                group.handle_reset(id, now);
                group.handle_closed(id, now);
            }
            Event::Closes => group.handle_closed(id, now),
            Event::Refused | Event::TimesOut => {
                let failure = if event == Event::Refused { ConnectFailure::Refused } else { ConnectFailure::Timeout };
                group.handle_failed(id, failure, now);
                let tried = &mut self.connections[index].tried;
                tried.push(id);
                let attempts = self.world.traffic.retry.attempts as usize;
                if tried.len() <= attempts && group.handle_retry(now).is_ok() {
                    self.attempt(index);
                } else {
                    self.finish(index, None);
                }
            }
        }
    }

    fn finish(&mut self, index: usize, taken_at: Option<Instant>) {
        let arrived_at = self.connections[index].arrived_at;
        let latency = taken_at.map(|at| at - arrived_at);
        self.outcomes.push(Outcome { arrived_at: arrived_at - self.world.start, latency });
    }

    fn later(&mut self, after: Duration, index: usize, event: Event) {
        self.events.push(Reverse((self.world.now + after, index as u64, event)));
    }
}
