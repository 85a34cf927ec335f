//! Passive health: an endpoint whose connections fail gets none for a while, and then one at a time until one succeeds.

use super::EjectionCause;
use super::health::Probes;
use crate::model::Ejection;
use std::time::{Duration, Instant};

/// The first pause between attempts at an endpoint that does not answer.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// What has gone wrong at one endpoint.
#[derive(Clone, Debug, Default)]
pub(super) struct Trouble {
    /// Connects in a row that failed.
    failures: u32,
    /// Connections in a row that the endpoint reset without having sent a byte.
    resets: u32,
    ejected: Option<(Instant, EjectionCause)>,
    /// Back from an ejection, and nothing has succeeded since: one more failure ejects again.
    half_open: Option<EjectionCause>,
    /// It let an attempt run out of time: no other one before this moment.
    paused_until: Option<Instant>,
    /// How often the time out was doubled.
    doublings: u32,
    /// The last ejection's length and end.
    last: Option<(Duration, Instant)>,
    pub(super) probes: Probes,
}

impl Trouble {
    /// A connect failed. Whether that is one too many.
    pub(super) fn handle_failure(&mut self, policy: &Ejection) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.is_due(self.failures, policy)
    }

    /// A connection ended by a reset before the endpoint sent a byte. Whether that is one too many.
    pub(super) fn handle_reset(&mut self, policy: &Ejection) -> bool {
        self.resets = self.resets.saturating_add(1);
        self.is_due(self.resets, policy)
    }

    fn is_due(&self, failures: u32, policy: &Ejection) -> bool {
        let limit = policy.consecutive_failures;
        limit > 0 && self.ejected.is_none() && (failures >= limit || self.half_open.is_some())
    }

    /// The attempt that ran out of time was the endpoint's only word: asks it again after as long as it has cost so far, at
    /// most an ejection's time.
    pub(super) fn pause(&mut self, policy: &Ejection, now: Instant) {
        let longest = policy.base_time.max(FIRST_PAUSE);
        self.paused_until = Some(now + FIRST_PAUSE.saturating_mul(self.failures.max(1)).min(longest));
    }

    /// Out from now on, for the base time, doubled for each ejection before it; a time in service as long as the last
    /// ejection takes one doubling back.
    pub(super) fn eject(&mut self, cause: EjectionCause, policy: &Ejection, now: Instant) {
        if let Some((length, ended_at)) = self.last {
            let served = now.saturating_duration_since(ended_at).as_nanos() / length.as_nanos().max(1);
            let forgiven = u32::try_from(served).unwrap_or(u32::MAX);
            self.doublings = (self.doublings + 1).saturating_sub(forgiven);
        }
        let longest = policy.max_time.max(policy.base_time);
        let mut length = policy.base_time;
        // Doublings that would not make it longer are not kept, or they would have to be served off.
        let mut useful = 0;
        while useful < self.doublings && length < longest && !length.is_zero() {
            length = length.saturating_mul(2);
            useful += 1;
        }
        length = length.min(longest);
        self.doublings = useful;
        self.last = Some((length, now + length));
        self.ejected = Some((now + length, cause));
        self.half_open = None;
        self.paused_until = None;
    }

    /// Ends an ejection whose time is over. Whether it did.
    pub(super) fn handle_time(&mut self, now: Instant) -> bool {
        let Some((_, cause)) = self.ejected.take_if(|(until, _)| *until <= now) else { return false };
        self.half_open = Some(cause);
        true
    }

    /// The endpoint took a connection: what failed connects have brought is over. Whether an ejection ended.
    pub(super) fn handle_connected(&mut self, now: Instant) -> bool {
        self.failures = 0;
        self.paused_until = None;
        self.half_open.take_if(|cause| *cause != EjectionCause::Reset);
        self.end(now, |cause| cause != EjectionCause::Reset)
    }

    /// The endpoint sent a byte: all is well. Whether an ejection ended.
    pub(super) fn handle_first_byte(&mut self, now: Instant) -> bool {
        self.failures = 0;
        self.resets = 0;
        self.paused_until = None;
        self.half_open = None;
        self.end(now, |_| true)
    }

    fn end(&mut self, now: Instant, is_disproved: impl Fn(EjectionCause) -> bool) -> bool {
        let ended = self.ejected.take_if(|(_, cause)| is_disproved(*cause)).is_some();
        if let (true, Some((_, ended_at))) = (ended, &mut self.last) {
            *ended_at = now;
        }
        ended
    }

    pub(super) fn ejected(&self, now: Instant) -> Option<(Instant, EjectionCause)> {
        self.ejected.filter(|(until, _)| *until > now)
    }

    /// Whether it gets no connections while others do.
    pub(super) fn is_out(&self, now: Instant) -> bool {
        self.probes.is_unhealthy() || self.ejected(now).is_some()
    }

    /// Whether it gets one attempt at a time.
    pub(super) fn is_on_trial(&self, now: Instant) -> bool {
        self.half_open.is_some() || self.paused_until.is_some() || self.ejected.is_some_and(|(until, _)| until <= now)
    }

    pub(super) fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| until > now)
    }

    /// Whether nothing is left to remember.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let is_forgiven = self.last.is_none_or(|(length, ended_at)| {
            now.saturating_duration_since(ended_at) >= length.saturating_mul(self.doublings + 1)
        });
        self.failures == 0
            && self.resets == 0
            && self.ejected.is_none()
            && self.half_open.is_none()
            && self.paused_until.is_none()
            && is_forgiven
            && self.probes.is_unremarkable()
    }
}

/// How many of a group's endpoints may be out at once: never the only one, else at least one.
pub(super) fn most_ejected(endpoints: usize, max_percent: u32) -> usize {
    if endpoints < 2 {
        return 0;
    }
    let share = u64::try_from(endpoints).unwrap_or(u64::MAX).saturating_mul(u64::from(max_percent)) / 100;
    usize::try_from(share).unwrap_or(usize::MAX).max(1)
}
