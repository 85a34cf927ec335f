//! One flow at the caller's side: what becomes of its datagrams before it is open, while it is, and after it has failed.

use super::life::Life;
use super::send;
use crate::proxy::session::Session;
use crate::telemetry::datagrams::DirectionMetrics;
use crate::tunnel::FlowSender;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Datagrams, and their bytes, that wait while a flow is being opened; older ones make room.
const WAITING: usize = 64;
const WAITING_BYTES: usize = 256 * 1024;
/// What has waited is kept until the first answer, if it has no more bytes than this: it goes to another endpoint if the
/// first one turns out to have nobody at the port.
const KEPT_BYTES: usize = 4 * 1024;

pub(super) struct Flow {
    state: Mutex<State>,
    pub(super) life: Life,
}

enum State {
    Opening(Waiting),
    Open {
        sender: FlowSender,
        session: Arc<Session>,
        /// What has waited, and may have reached nobody.
        unanswered: Waiting,
    },
    /// Could not be opened, or has broken; why.
    Failed(&'static str),
}

/// Datagrams in the order in which they came.
#[derive(Debug, Default)]
struct Waiting {
    datagrams: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Waiting {
    /// Adds one; how many older ones have made room.
    fn push(&mut self, payload: &[u8]) -> usize {
        self.bytes += payload.len();
        self.datagrams.push_back(payload.to_vec());
        let mut dropped = 0;
        while self.datagrams.len() > WAITING || self.bytes > WAITING_BYTES {
            self.bytes -= self.datagrams.pop_front().map_or(0, |oldest| oldest.len());
            dropped += 1;
        }
        dropped
    }

    /// Itself, if it is little enough to be kept.
    fn kept(self) -> Self {
        if self.bytes <= KEPT_BYTES { self } else { Self::default() }
    }
}

impl Flow {
    pub(super) fn new() -> Self {
        Self { state: Mutex::new(State::Opening(Waiting::default())), life: Life::new() }
    }

    /// A datagram of the application.
    pub(super) fn take(&self, metrics: &DirectionMetrics, payload: &[u8]) {
        self.life.request();
        match &mut *self.lock() {
            State::Open { sender, session, .. } => request(metrics, sender, session, payload),
            State::Failed(reason) => metrics.dropped(reason),
            State::Opening(waiting) => (0..waiting.push(payload)).for_each(|_| metrics.dropped("opening")),
        }
    }

    /// It is open: sends what has waited, and from now on all that comes.
    pub(super) fn release(&self, metrics: &DirectionMetrics, sender: FlowSender, session: &Arc<Session>) {
        let mut state = self.lock();
        let mut unanswered = Waiting::default();
        if let State::Opening(waiting) = &mut *state {
            waiting.datagrams.iter().for_each(|payload| request(metrics, &sender, session, payload));
            unanswered = std::mem::take(waiting).kept();
        }
        *state = State::Open { sender, session: Arc::clone(session), unanswered };
    }

    /// What has waited has most likely arrived.
    pub(super) fn forget_unanswered(&self) {
        if let State::Open { unanswered, .. } = &mut *self.lock() {
            *unanswered = Waiting::default();
        }
    }

    /// It is to be opened anew, elsewhere.
    pub(super) fn reopen(&self) {
        let mut state = self.lock();
        if let State::Open { unanswered, .. } = &mut *state {
            *state = State::Opening(std::mem::take(unanswered));
        }
    }

    /// It has failed for this reason: what waits, and what still comes, is lost.
    pub(super) fn fail(&self, metrics: &DirectionMetrics, reason: &'static str) {
        let former = std::mem::replace(&mut *self.lock(), State::Failed(reason));
        if let State::Opening(waiting) = former {
            waiting.datagrams.iter().for_each(|_| metrics.dropped(reason));
        }
    }

    /// Every critical section here leaves the state whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn request(metrics: &DirectionMetrics, sender: &FlowSender, session: &Session, payload: &[u8]) {
    send(metrics, sender, payload, |metrics, bytes| {
        metrics.request(bytes);
        session.request(bytes);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_bounded_by_number_and_by_bytes_and_the_oldest_make_room() {
        let mut waiting = Waiting::default();
        let dropped: usize = (0..WAITING + 3).map(|number| waiting.push(&[u8::try_from(number).unwrap()])).sum();
        assert_eq!((dropped, waiting.datagrams.len(), waiting.bytes), (3, WAITING, WAITING));
        assert_eq!(waiting.datagrams.front().unwrap(), &[3]);
        let dropped = waiting.push(&vec![0; WAITING_BYTES]);
        assert_eq!((dropped, waiting.datagrams.len(), waiting.bytes), (WAITING, 1, WAITING_BYTES));
        // One that is longer than all that may wait is lost itself.
        assert_eq!(waiting.push(&vec![0; WAITING_BYTES + 1]), 2);
        assert_eq!((waiting.datagrams.len(), waiting.bytes), (0, 0));
    }

    #[test]
    fn only_little_is_kept_for_another_endpoint() {
        let mut waiting = Waiting::default();
        waiting.push(&[1; 1_200]);
        waiting.push(&[2; 1_200]);
        let mut kept = waiting.kept();
        assert_eq!((kept.datagrams.len(), kept.bytes), (2, 2_400));
        kept.push(&[3; KEPT_BYTES]);
        assert_eq!(kept.kept().datagrams.len(), 0);
    }
}
