//! Which answers usually come soon.

use super::AWAITED;
use crate::runtime::turn;
use std::time::{Duration, Instant};

/// What usually takes longer than this is slept for.
const LONGEST: Duration = Duration::from_micros(300);
/// A longer wait says no more than this one: one late answer is not to be remembered for ever.
pub(super) const LATE: Duration = Duration::from_micros(1000);

/// The directions of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToTunnel,
    FromTunnel,
}

/// A connection as a conversation: how soon each side usually answers the other. To be kept on the thread that serves it.
#[derive(Debug, Default)]
pub struct Conversation {
    /// Who spoke last, and when.
    last: Option<(Direction, Instant)>,
    /// How soon each direction usually follows the other.
    pub(super) usual: [Option<Duration>; 2],
    is_awaited: bool,
}

impl Conversation {
    /// Something has passed.
    pub fn passed(&mut self, direction: Direction) {
        self.passed_at(direction, Instant::now());
    }

    pub(super) fn passed_at(&mut self, direction: Direction, now: Instant) {
        if let Some((last, at)) = self.last
            && last != direction
        {
            self.learn(direction, now.duration_since(at));
            turn::talked(now);
            self.release();
        }
        self.last = Some((direction, now));
        let [to_tunnel, from_tunnel] = self.usual;
        let answer = if direction == Direction::ToTunnel { from_tunnel } else { to_tunnel };
        if let Some(usual) = answer.filter(|usual| *usual <= LONGEST) {
            self.expect(now + (2 * usual).min(LONGEST));
        }
    }

    /// A moving average.
    fn learn(&mut self, direction: Direction, waited: Duration) {
        let waited = waited.min(LATE);
        let usual = &mut self.usual[direction as usize];
        *usual = Some(usual.map_or(waited, |usual| (3 * usual + waited) / 4));
    }

    fn expect(&mut self, until: Instant) {
        AWAITED.with(|awaited| {
            if !std::mem::replace(&mut self.is_awaited, true) {
                awaited.conversations.set(awaited.conversations.get() + 1);
            }
            awaited.extend(until);
        });
    }

    fn release(&mut self) {
        if std::mem::take(&mut self.is_awaited) {
            AWAITED.with(|awaited| awaited.conversations.set(awaited.conversations.get().saturating_sub(1)));
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.release();
    }
}
