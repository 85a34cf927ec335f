//! Requests at a steady rate. One that finds no free connection waits, and its time counts from when it was due: a slow
//! answer is not hidden by the requests that it held up.

use crate::Options;
use crate::connection::{Connection, KEEP, Poll, open_all};
use crate::measure::Measure;
use anyhow::{Result, ensure};
use mesh_tests::report::Requests;
use rustix::event::epoll::EventFlags;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// The timer's number among what is ready.
const TIMER: u64 = u64::MAX;

pub(crate) fn run(options: &Options, rate: u32) -> Result<Requests> {
    ensure!(rate > 0, "--rate: at least one request a second");
    let connections = open_all(options.destination, options.connections)?;
    let mut poll = Poll::new()?;
    for (number, connection) in (0..).zip(&connections) {
        poll.add(connection.stream(), number, EventFlags::IN)?;
    }
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    poll.add(&timer, TIMER, EventFlags::IN)?;
    let measure = Measure::start()?;
    let total = (options.seconds * f64::from(rate)) as u64;
    let mut paced = Paced {
        interval: Duration::from_secs(1) / rate,
        total: options.requests.map_or(total, |limit| limit.min(total)),
        due: 0,
        waiting: VecDeque::new(),
        free: (0..connections.len()).collect(),
        asked: vec![measure.started(); connections.len()],
        connections,
        timer,
        measure,
    };
    paced.turn()?;
    while paced.measure.count() < paced.total {
        for number in poll.wait()? {
            if number != TIMER {
                paced.receive(number as usize)?;
            }
        }
        paced.turn()?;
    }
    Ok(paced.measure.report())
}

struct Paced {
    interval: Duration,
    total: u64,
    /// How many requests have been due.
    due: u64,
    /// When requests were due that no connection has taken yet.
    waiting: VecDeque<Instant>,
    /// The longest free one first: all are used.
    free: VecDeque<usize>,
    /// When the request that a connection carries was due.
    asked: Vec<Instant>,
    connections: Vec<Connection>,
    timer: OwnedFd,
    measure: Measure,
}

impl Paced {
    /// When a request is due. The multiplication keeps rounding from adding up.
    fn due_at(&self, request: u64) -> Instant {
        let nanos = self.interval.as_nanos() as u64;
        self.measure.started() + Duration::from_nanos(nanos * request)
    }

    fn receive(&mut self, number: usize) -> Result<()> {
        if self.connections[number].receive()? {
            self.measure.answered(self.asked[number].elapsed());
            self.free.push_back(number);
        }
        Ok(())
    }

    /// Sends what is due, and sets the timer for what is not.
    fn turn(&mut self) -> Result<()> {
        let now = Instant::now();
        while self.due < self.total && self.due_at(self.due) <= now {
            self.waiting.push_back(self.due_at(self.due));
            self.due += 1;
        }
        while !self.waiting.is_empty() && !self.free.is_empty() {
            let (Some(asked), Some(number)) = (self.waiting.pop_front(), self.free.pop_front()) else { break };
            self.asked[number] = asked;
            self.connections[number].send(KEEP)?;
        }
        if self.due < self.total {
            let rest = self.due_at(self.due).saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            let value = Timespec { tv_sec: rest.as_secs().cast_signed(), tv_nsec: rest.subsec_nanos().into() };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            // Setting it again also takes back that it has expired.
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        } else {
            let never = Timespec { tv_sec: 0, tv_nsec: 0 };
            let never = Itimerspec { it_interval: never, it_value: never };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &never)?;
        }
        Ok(())
    }
}
