//! Which stream of a connection sends first ([ADR 0012](../../../../docs/adr/0012-quic-socket.md)).
//!
//! quinn can take the streams of one priority in turns of a packet, or one until nothing of it waits. Turns of a packet make
//! the most work of many streams: each batch of packets holds a little of everyone's, and wakes everyone at the far end. So
//! a stream is sent until nothing of it waits, and its priority falls with what it has sent: streams that send as much as
//! they can have turns of [`TURN`], and one that says little goes before those that say much.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes of a turn. Priorities have room for 2^31 of them, which is 512 TiB.
const TURN: u64 = 256 * 1024;
/// How far one who has been silent may be behind the one who has sent most. As much may wait to be sent of each stream, and
/// nobody makes others wait for more.
const MOST_BEHIND: u64 = super::STREAM_WINDOW as u64;

/// What the stream of a connection has sent that has sent most, as [`Share`] counts.
#[derive(Debug, Default)]
pub(super) struct Foremost(AtomicU64);

/// What a stream has sent. One that was silent counts as if it had sent almost what the foremost has: its silence is not
/// a claim.
#[derive(Debug, Default)]
pub(super) struct Share {
    sent: u64,
    turns: u32,
}

impl Share {
    /// The priority from here on, if it is another one.
    pub(super) fn next(&mut self, foremost: &Foremost) -> Option<i32> {
        self.sent = self.sent.max(foremost.0.load(Relaxed).saturating_sub(MOST_BEHIND));
        let turns = u32::try_from(self.sent / TURN).unwrap_or(u32::MAX);
        let former = std::mem::replace(&mut self.turns, turns);
        (turns != former).then(|| 0_i32.saturating_sub_unsigned(turns))
    }

    pub(super) fn add(&mut self, bytes: u64, foremost: &Foremost) {
        self.sent += bytes;
        // Most streams are behind, and only read.
        if self.sent > foremost.0.load(Relaxed) {
            foremost.0.fetch_max(self.sent, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream as its writer sees it: the priority it has now.
    #[derive(Default)]
    struct Writer {
        share: Share,
        priority: i32,
    }

    impl Writer {
        fn write(&mut self, bytes: u64, foremost: &Foremost) -> i32 {
            if let Some(priority) = self.share.next(foremost) {
                self.priority = priority;
            }
            self.share.add(bytes, foremost);
            self.priority
        }
    }

    #[test]
    fn streams_that_send_all_they_can_take_turns() {
        let foremost = Foremost::default();
        let mut writers: [Writer; 3] = Default::default();
        let mut sent = [0; 3];
        for _ in 0..3000 {
            // As quinn does: of the highest priority the one that it is at.
            let next = (0..3).max_by_key(|index| writers[*index].priority).unwrap();
            sent[next] += TURN / 4;
            writers[next].write(TURN / 4, &foremost);
        }
        let (least, most) = (sent.iter().min().unwrap(), sent.iter().max().unwrap());
        assert!(most - least <= 2 * TURN, "{sent:?}");
    }

    #[test]
    fn who_says_little_goes_first() {
        let foremost = Foremost::default();
        let (mut bulk, mut little) = (Writer::default(), Writer::default());
        for _ in 0..10_000 {
            let ahead = little.write(200, &foremost);
            assert!(bulk.write(TURN, &foremost) <= ahead);
        }
        assert!(little.priority - bulk.priority >= 3, "{} and {}", little.priority, bulk.priority);
    }

    #[test]
    fn silence_is_no_claim() {
        let foremost = Foremost::default();
        let (mut old, mut new) = (Writer::default(), Writer::default());
        for _ in 0..1000 {
            old.write(TURN, &foremost);
        }
        let mut ahead = 0;
        while new.write(TURN, &foremost) > old.priority {
            ahead += TURN;
        }
        assert!(ahead <= MOST_BEHIND + TURN, "{ahead} bytes before the other one's turn");
    }

    #[test]
    fn priorities_end_where_their_numbers_do() {
        let foremost = Foremost::default();
        let mut writer = Writer::default();
        writer.share.add(u64::MAX, &foremost);
        assert_eq!(writer.write(0, &foremost), i32::MIN);
    }
}
