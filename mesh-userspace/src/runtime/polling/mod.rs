//! Waiting for answers awake.
//!
//! A thread that sleeps until a socket has something costs whoever sends that an interrupt to another processor, and
//! itself the way out of a halted one: on a virtual machine some tens of microseconds for each leg of a request. Where an
//! answer usually comes soon, the thread looks for it instead of sleeping, and offers the processor to everyone else in
//! between ([ADR 0010](../../../docs/adr/0010-polling.md)).
//!
//! Bounds: one thread of the daemon at a time, a share of one processor in all, and nothing while others want the processor.

mod allowance;
mod conversation;
#[cfg(test)]
mod tests;

pub(super) use allowance::Allowance;
pub use allowance::Polled;
pub use conversation::{Conversation, Direction};

use allowance::Polling;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Whoever gets the processor when it is offered gives it back sooner than this, unless there is more to do than there are
/// processors.
const CONTENDED: Duration = Duration::from_micros(60);
/// Then the thread sleeps as ever for a while: twice as long each time that this happens, half as long as before each time
/// that it does not.
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What the conversations of a thread wait for.
struct Awaited {
    conversations: Cell<usize>,
    until: Cell<Option<Instant>>,
    /// The thread's poller, while it sleeps.
    poller: RefCell<Option<Waker>>,
}

thread_local! {
    static AWAITED: Awaited =
        const { Awaited { conversations: Cell::new(0), until: Cell::new(None), poller: RefCell::new(None) } };
}

impl Awaited {
    fn is_due(&self, now: Instant) -> bool {
        self.conversations.get() > 0 && self.until.get().is_some_and(|until| now < until)
    }

    fn extend(&self, until: Instant) {
        self.until.set(self.until.get().max(Some(until)));
        if let Some(poller) = self.poller.take() {
            poller.wake();
        }
    }
}

/// Polls for what this thread's conversations wait for, as far as the allowance goes. Never ends.
pub(super) async fn poll(allowance: Arc<Allowance>) {
    let (mut pause, mut paused_until) = (SHORTEST_PAUSE, None);
    loop {
        let polling = poll_fn(|cx| begin(cx, &allowance, paused_until)).await;
        if look(polling).await {
            pause = (pause / 2).max(SHORTEST_PAUSE);
        } else {
            allowance.paused();
            paused_until = Some(Instant::now() + pause);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }
}

fn begin<'a>(cx: &Context<'_>, allowance: &'a Allowance, paused_until: Option<Instant>) -> Poll<Polling<'a>> {
    AWAITED.with(|awaited| {
        let now = Instant::now();
        if awaited.is_due(now)
            && paused_until.is_none_or(|until| until <= now)
            && let Some(polling) = allowance.enter(now)
        {
            return Poll::Ready(polling);
        }
        // Whatever is awaited next wakes it.
        awaited.poller.replace(Some(cx.waker().clone()));
        Poll::Pending
    })
}

/// Looks until nothing is due any more; `false`: others want the processor.
async fn look(mut polling: Polling<'_>) -> bool {
    while AWAITED.with(|awaited| awaited.is_due(polling.until)) {
        // The runtime looks at the sockets, and does what there is to do.
        tokio::task::yield_now().await;
        let offered = Instant::now();
        std::thread::yield_now();
        polling.until = Instant::now();
        if polling.until.duration_since(offered) >= CONTENDED {
            return false;
        }
    }
    true
}
