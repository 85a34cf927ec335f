//! As many requests as are answered.

use crate::Options;
use crate::connection::{KEEP, Poll, open_all};
use crate::measure::Measure;
use anyhow::Result;
use mesh_tests::report::Requests;
use rustix::event::epoll::EventFlags;
use std::time::Instant;

pub(crate) fn run(options: &Options) -> Result<Requests> {
    let mut connections = open_all(options.destination, options.connections)?;
    let mut poll = Poll::new()?;
    for (number, connection) in (0..).zip(&connections) {
        poll.add(connection.stream(), number, EventFlags::IN)?;
    }
    let mut measure = Measure::start()?;
    let mut sent = vec![measure.started(); connections.len()];
    for connection in &mut connections {
        connection.send(KEEP)?;
    }
    let deadline = measure.started() + options.duration();
    loop {
        for number in poll.wait()? {
            let number = number as usize;
            if connections[number].receive()? {
                let now = Instant::now();
                measure.answered(now - sent[number]);
                sent[number] = now;
                connections[number].send(KEEP)?;
            }
        }
        if Instant::now() >= deadline || options.is_enough(measure.count()) {
            return Ok(measure.report());
        }
    }
}
