//! How much a task may do before others get the thread ([ADR 0011](../../../docs/adr/0011-turns.md)).

use std::cell::Cell;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Bytes of a turn while nobody else is in a hurry: tokio counts operations, of which 128 large ones take milliseconds.
const LONG: usize = 512 * 1024;
/// While others talk on this thread: some tens of microseconds, of which each of their messages waits for a few.
const SHORT: usize = 64 * 1024;
/// A thread on which somebody has talked is one on which somebody talks, for so long.
const TALKING: Duration = Duration::from_millis(20);

thread_local! {
    /// When a connection of this thread had an answer last.
    static TALKED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A connection of this thread has exchanged messages.
pub(super) fn talked(now: Instant) {
    TALKED.set(Some(now));
}

fn is_talking(now: Instant) -> bool {
    TALKED.get().is_some_and(|last| now.saturating_duration_since(last) < TALKING)
}

/// What one poll of a task has done.
#[derive(Debug, Default)]
pub struct Turn {
    bytes: usize,
}

impl Turn {
    /// What to read at once of what one would read by oneself: no more than a turn.
    #[must_use]
    pub fn piece(wanted: usize) -> usize {
        Self::piece_at(wanted, Instant::now)
    }

    fn piece_at(wanted: usize, now: impl FnOnce() -> Instant) -> usize {
        if wanted > SHORT && is_talking(now()) { SHORT } else { wanted }
    }

    /// Counts bytes that were carried.
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
    }

    /// Whether others are to have the thread; see [`let_others`].
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over_at(Instant::now)
    }

    fn is_over_at(&self, now: impl FnOnce() -> Instant) -> bool {
        self.bytes >= LONG || (self.bytes >= SHORT && is_talking(now()))
    }
}

/// Goes on after the others. While somebody talks, those are included whose sockets have become ready meanwhile: a task that
/// merely wakes itself is polled again before the runtime looks at sockets. Otherwise they are looked at less often, and
/// more has gathered in them then.
pub fn let_others<T>(cx: &mut Context<'_>) -> Poll<T> {
    if !is_talking(Instant::now()) {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    // What is dropped holds nothing: the runtime has the waker.
    let _always_pending = pin!(tokio::task::yield_now()).poll(cx);
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::os::unix::net::UnixStream;
    use tokio::io::AsyncReadExt as _;

    #[test]
    fn turns_are_short_while_somebody_talks() {
        TALKED.set(None);
        let start = Instant::now();
        let is_over = |bytes, now| {
            let mut turn = Turn::default();
            turn.add(bytes);
            turn.is_over_at(|| now)
        };
        assert!(!is_over(LONG - 1, start) && is_over(LONG, start));
        talked(start);
        assert!(!is_over(SHORT - 1, start) && is_over(SHORT, start));
        assert!(is_over(SHORT, start + TALKING / 2) && !is_over(SHORT, start + TALKING));
    }

    #[test]
    fn pieces_are_short_while_somebody_talks() {
        TALKED.set(None);
        let start = Instant::now();
        let pieces = |now| [LONG, 5].map(|wanted| Turn::piece_at(wanted, || now));
        assert_eq!(pieces(start), [LONG, 5]);
        talked(start);
        assert_eq!((pieces(start), pieces(start + TALKING)), ([SHORT, 5], [LONG, 5]));
    }

    #[test]
    fn sockets_are_looked_at_between_two_turns() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(1000).build().unwrap();
        runtime.block_on(async {
            let (near, far) = UnixStream::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            let mut far = tokio::net::UnixStream::from_std(far).unwrap();
            let reader = tokio::spawn(async move { far.read_u8().await.unwrap() });
            // The reader waits for its socket from here on.
            tokio::task::yield_now().await;
            let (mut near, mut turns) = (Some(near), 0);
            let busy = tokio::spawn(poll_fn(move |cx| {
                if let Some(mut near) = near.take() {
                    std::io::Write::write_all(&mut near, &[7]).unwrap();
                }
                turns += 1;
                // However long the test has been kept from running.
                talked(Instant::now());
                if reader.is_finished() { Poll::Ready(turns) } else { let_others(cx) }
            }));
            let turns = busy.await.unwrap();
            assert!(turns <= 4, "the reader had to wait for {turns} turns");
        });
    }
}
