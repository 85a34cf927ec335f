//! A bound on log lines: a burst, then a steady rate. What is held back is counted and told with the next line.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines at once.
const BURST: u32 = 50;
/// After a burst one more line each of these.
const INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Bucket {
    lines: u32,
    /// Up to when the bucket was filled.
    filled_at: Option<Instant>,
    held_back: u64,
}

/// Decides which lines are written.
#[derive(Debug)]
pub(super) struct LineLimit(Mutex<Bucket>);

impl Default for LineLimit {
    fn default() -> Self {
        Self(Mutex::new(Bucket { lines: BURST, filled_at: None, held_back: 0 }))
    }
}

impl LineLimit {
    /// Whether a line may be written; if so, how many were held back since the last one.
    pub(super) fn ask(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let filled_at = *bucket.filled_at.get_or_insert(now);
        let intervals = now.saturating_duration_since(filled_at).as_millis() / INTERVAL.as_millis();
        let gained = u32::try_from(intervals).unwrap_or(u32::MAX).min(BURST);
        if gained > 0 {
            bucket.lines = (bucket.lines + gained).min(BURST);
            bucket.filled_at = Some(if gained == BURST { now } else { filled_at + INTERVAL * gained });
        }
        if bucket.lines == 0 {
            bucket.held_back += 1;
            return None;
        }
        bucket.lines -= 1;
        Some(std::mem::take(&mut bucket.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_held_back_and_told_with_the_next_line() {
        let limit = LineLimit::default();
        let start = Instant::now();
        let written = (0..BURST + 30).filter(|_| limit.ask(start).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(limit.ask(start + INTERVAL / 2), None);
        assert_eq!(limit.ask(start + INTERVAL), Some(31));
        assert_eq!(limit.ask(start + INTERVAL), None);
        assert_eq!(limit.ask(start + INTERVAL * 2), Some(1));
    }

    #[test]
    fn after_silence_a_burst_is_allowed_again() {
        let limit = LineLimit::default();
        let start = Instant::now();
        while limit.ask(start).is_some() {}
        let later = start + Duration::from_hours(1);
        assert_eq!((0..2 * BURST).filter(|_| limit.ask(later).is_some()).count(), BURST as usize);
    }
}
