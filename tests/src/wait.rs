//! Waiting for a condition, with a bound.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How long a scenario waits for something that normally takes milliseconds, on a machine that is busy.
pub const BOUND: Duration = Duration::from_secs(20);

const PAUSE: Duration = Duration::from_millis(10);

/// Asks until the answer is something; polls every 10 ms.
///
/// # Errors
/// If there is none within the bound; the message names `what`.
pub fn until<T>(what: &str, bound: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {bound:?}");
        }
        pause();
    }
}

/// Like [`until`], with the last refusal in the error message.
///
/// # Errors
/// If it does not succeed within the bound.
pub fn until_ok<T>(what: &str, bound: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let mut last = None;
    until(what, bound, || attempt().map_err(|error| last = Some(error)).ok()).map_err(|timeout| match last.take() {
        Some(cause) => cause.context(timeout.to_string()),
        None => timeout,
    })
}

#[expect(clippy::disallowed_methods, reason = "the one place that polls; every caller passes a bound")]
fn pause() {
    std::thread::sleep(PAUSE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_the_first_answer() {
        let mut left = 3;
        let answer = until("three", BOUND, || {
            left -= 1;
            (left == 0).then_some("here")
        });
        assert_eq!(answer.unwrap(), "here");
    }

    #[test]
    fn giving_up_says_what_was_missing_and_why() {
        let error = until_ok::<()>("the moon", Duration::ZERO, || bail!("too far")).unwrap_err();
        assert_eq!(format!("{error:#}"), "the moon: not within 0ns: too far");
    }
}
