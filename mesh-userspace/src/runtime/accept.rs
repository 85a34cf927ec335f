//! Accepting connections through whatever accept() may say (accept(2), "Error handling").

use rustix::io::Errno;
use std::io;
use std::time::Duration;

/// Pause after an accept that failed for want of something: trying again at once would only burn the CPU.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// It doubles up to this while nothing changes.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why accept() failed although the listener is sound: a stable label.
#[must_use]
fn accept_failure(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => "descriptors",
        Some(Errno::NOBUFS | Errno::NOMEM) => "memory",
        Some(Errno::CONNABORTED | Errno::CONNRESET | Errno::INTR) => "aborted",
        _ => "other",
    }
}

/// One accept loop's patience.
#[derive(Debug)]
pub struct Acceptor<F> {
    failed: F,
    pause: Duration,
}

impl<F: Fn(&'static str)> Acceptor<F> {
    /// `failed` is told the reason of every failure.
    pub fn new(failed: F) -> Self {
        Self { failed, pause: FIRST_PAUSE }
    }

    /// The next connection. Dropping the future loses none, if dropping those of `accept` does not.
    pub async fn next<T, A: Future<Output = io::Result<T>>>(&mut self, accept: impl Fn() -> A) -> T {
        loop {
            let error = match accept().await {
                Ok(accepted) => {
                    self.pause = FIRST_PAUSE;
                    return accepted;
                }
                Err(error) => error,
            };
            let reason = accept_failure(&error);
            (self.failed)(reason);
            if reason == "aborted" {
                // Of one connection, not of the listener.
                continue;
            }
            if self.pause == FIRST_PAUSE {
                // Once: what lasts is in the counter.
                tracing::warn!(%error, reason, "cannot accept a connection; will try again");
            }
            tokio::time::sleep(self.pause).await;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[tokio::test(start_paused = true)]
    async fn what_is_short_is_waited_for_and_what_was_aborted_is_not() {
        let script = RefCell::new(vec![Ok(7), Err(Errno::MFILE), Err(Errno::NOBUFS), Err(Errno::CONNABORTED)]);
        let told = RefCell::new(Vec::new());
        let mut acceptor = Acceptor::new(|reason| told.borrow_mut().push(reason));
        let start = tokio::time::Instant::now();
        let accepted = acceptor.next(async || script.borrow_mut().pop().unwrap().map_err(io::Error::from)).await;
        assert_eq!(accepted, 7);
        assert_eq!(*told.borrow(), ["aborted", "memory", "descriptors"]);
        assert_eq!(start.elapsed(), FIRST_PAUSE * 3);
    }

    #[tokio::test(start_paused = true)]
    async fn the_pause_is_bounded_and_short_again_after_a_success() {
        let failures = Cell::new(20);
        let mut acceptor = Acceptor::new(|_| {});
        let accept = async || {
            let left = failures.get();
            failures.set(left - 1);
            if left > 0 { Err(io::Error::from(Errno::MFILE)) } else { Ok(()) }
        };
        let start = tokio::time::Instant::now();
        acceptor.next(accept).await;
        // 10, 20, .. 640 ms, then a second each.
        assert_eq!(start.elapsed(), FIRST_PAUSE * 127 + LONGEST_PAUSE * 13);
        failures.set(1);
        let start = tokio::time::Instant::now();
        acceptor.next(accept).await;
        assert_eq!(start.elapsed(), FIRST_PAUSE);
    }
}
