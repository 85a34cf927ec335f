//! A connection a request.

use crate::Options;
use crate::connection::{CLOSE, Connection, Poll};
use crate::measure::Measure;
use anyhow::Result;
use mesh_tests::report::Requests;
use rustix::event::epoll::EventFlags;
use std::time::Instant;

/// More than this many end the run.
const FAILURES: u64 = 100;

struct Slot {
    connection: Connection,
    began: Instant,
    has_asked: bool,
}

impl Slot {
    fn begin(options: &Options, poll: &Poll, number: u64) -> Result<Self> {
        let began = Instant::now();
        let connection = Connection::begin(options.destination)?;
        poll.add(connection.stream(), number, EventFlags::OUT)?;
        Ok(Self { connection, began, has_asked: false })
    }

    /// Goes on as far as it can; whether the response has come and the server has closed: who closes
    /// first keeps the port in TIME_WAIT, and a client that did would run out of ports.
    fn advance(&mut self, poll: &Poll, number: u64) -> Result<bool> {
        if self.has_asked {
            return self.connection.receive_to_end();
        }
        self.connection.send(CLOSE)?;
        self.has_asked = true;
        poll.modify(self.connection.stream(), number, EventFlags::IN)?;
        Ok(false)
    }
}

pub(crate) fn run(options: &Options) -> Result<Requests> {
    let mut poll = Poll::new()?;
    let mut measure = Measure::start()?;
    let deadline = measure.started() + options.duration();
    let mut slots = Vec::with_capacity(options.connections);
    for number in 0..options.connections {
        slots.push(Slot::begin(options, &poll, number as u64)?);
    }
    let mut ready = Vec::new();
    loop {
        ready.clear();
        ready.extend(poll.wait()?);
        for &number in &ready {
            let slot = &mut slots[number as usize];
            match slot.advance(&poll, number) {
                Ok(false) => continue,
                Ok(true) => measure.answered(slot.began.elapsed()),
                Err(error) if measure.failures() < FAILURES => {
                    eprintln!("mesh-load: {error:#}");
                    measure.failed();
                }
                Err(error) => return Err(error.context(format!("after {FAILURES} failures"))),
            }
            // The old connection is closed when its slot is taken.
            *slot = Slot::begin(options, &poll, number)?;
        }
        if Instant::now() >= deadline || options.is_enough(measure.count()) {
            return Ok(measure.report());
        }
    }
}
