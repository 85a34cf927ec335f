//! How much may be polled, and by whom.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far what was polled may be ahead of the share.
pub(super) const BURST: Duration = Duration::from_millis(5);

/// What the threads of a daemon may take of one processor for it, and have taken.
#[derive(Debug)]
pub(in crate::runtime) struct Allowance {
    is_taken: AtomicBool,
    /// Nanoseconds since `since` up to which the share is used up.
    used_until: AtomicU64,
    since: Instant,
    /// How much of the share a nanosecond takes.
    price: f64,
    nanos: AtomicU64,
    pauses: AtomicU64,
}

/// What was polled so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    pub time: Duration,
    /// Times that it was given up because others wanted the processor.
    pub pauses: u64,
}

impl Allowance {
    /// `share` of one processor; `None` if that is none.
    pub(in crate::runtime) fn new(share: f64, since: Instant) -> Option<Arc<Self>> {
        (share > 0.0).then(|| {
            Arc::new(Self {
                is_taken: AtomicBool::new(false),
                used_until: AtomicU64::new(0),
                since,
                price: share.recip(),
                nanos: AtomicU64::new(0),
                pauses: AtomicU64::new(0),
            })
        })
    }

    pub(in crate::runtime) fn polled(&self) -> Polled {
        let time = Duration::from_nanos(self.nanos.load(Ordering::Relaxed));
        Polled { time, pauses: self.pauses.load(Ordering::Relaxed) }
    }

    /// The permission to poll, if nobody has it and there is something left of the share.
    pub(super) fn enter(&self, now: Instant) -> Option<Polling<'_>> {
        let ahead = self.used_until.load(Ordering::Relaxed).saturating_sub(self.at(now));
        if Duration::from_nanos(ahead) > BURST || self.is_taken.swap(true, Ordering::Acquire) {
            return None;
        }
        Some(Polling { allowance: self, began: now, until: now })
    }

    /// Polling was given up because others wanted the processor.
    pub(super) fn paused(&self) {
        self.pauses.fetch_add(1, Ordering::Relaxed);
    }

    fn at(&self, now: Instant) -> u64 {
        nanos(now.duration_since(self.since))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Whoever has this polls; when it is dropped, what that took is taken off the share.
pub(super) struct Polling<'a> {
    allowance: &'a Allowance,
    began: Instant,
    /// Looked at last.
    pub(super) until: Instant,
}

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        let (allowance, polled) = (self.allowance, self.until.duration_since(self.began));
        let used_until = allowance.used_until.load(Ordering::Relaxed).max(allowance.at(self.began));
        let used = nanos(polled.mul_f64(allowance.price));
        allowance.used_until.store(used_until.saturating_add(used), Ordering::Relaxed);
        allowance.nanos.fetch_add(nanos(polled), Ordering::Relaxed);
        allowance.is_taken.store(false, Ordering::Release);
    }
}
