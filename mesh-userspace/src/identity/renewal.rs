//! When certificates are asked for: on arrival, at half of their life, again after failures. Pure: time and randomness
//! are arguments.

use crate::model::SpiffeId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// The first retry comes after this, each further one after twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Retries are never further apart than this, nor than a twentieth of the certificate's life...
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// ...and that bound is never below this.
const SHORTEST_BOUND: Duration = Duration::from_secs(1);
/// Renewals for another authority are spread over a quarter of the certificate's life at most, and over this at most.
const LONGEST_SPREAD: Duration = Duration::from_secs(60 * 60);
/// How often the bundle is looked at where no certificate says more.
const BUNDLE_INTERVAL: Duration = Duration::from_secs(60);

/// Both clocks: pauses are measured by the steady one, lives of certificates by the one on the wall, which may be set.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) steady: Instant,
    pub(super) wall: OffsetDateTime,
}

/// An identity to ask a certificate for. The number tells this attempt from others for the same identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) id: SpiffeId,
    pub(super) number: u64,
}

/// What is known about a certificate in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// When it was put to use.
    pub(super) since: OffsetDateTime,
    pub(super) not_after: OffsetDateTime,
    pub(super) renew_at: OffsetDateTime,
    /// The authority's epoch when it was asked for.
    pub(super) epoch: u64,
}

/// How near a certificate that could not be renewed is to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Alarm {
    /// 30 % of its life is left.
    Late,
    /// 10 % is left.
    Urgent,
    Expired,
}

/// One wanted identity.
#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    in_flight: Option<u64>,
    /// No attempt before that, after failures.
    retry_at: Option<Instant>,
    failures: u32,
    held: Option<Held>,
    last_error: Option<String>,
    is_answered: bool,
    alarmed: Option<Alarm>,
}

impl Entry {
    pub(super) fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    fn is_due(&self, now: Now) -> bool {
        self.in_flight.is_none()
            && self.retry_at.is_none_or(|at| at <= now.steady)
            && self.held.is_none_or(|held| held.renew_at <= now.wall)
    }

    /// How long until it is due; `None` while an answer is awaited.
    pub(super) fn wait(&self, now: Now) -> Option<Duration> {
        if self.in_flight.is_some() {
            return None;
        }
        let retry = self.retry_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now.steady));
        let renewal = self.held.map_or(Duration::ZERO, |held| until(now.wall, held.renew_at));
        Some(retry.max(renewal))
    }

    fn alarm(&self, wall: OffsetDateTime) -> Option<Alarm> {
        let held = self.held?;
        let life = held.not_after - held.since;
        match held.not_after - wall {
            left if left <= time::Duration::ZERO => Some(Alarm::Expired),
            left if left <= life / 10 => Some(Alarm::Urgent),
            left if left <= life * 3 / 10 => Some(Alarm::Late),
            _ => None,
        }
    }
}

/// All identities that this node should have certificates of.
#[derive(Debug, Default)]
pub(super) struct Renewal {
    entries: BTreeMap<SpiffeId, Entry>,
    epoch: u64,
    attempts: u64,
}

impl Renewal {
    /// Sets what is wanted. New identities are due at once; those that are not wanted any more are forgotten, with
    /// answers that are still to come, and returned.
    pub(super) fn want(&mut self, ids: &BTreeSet<SpiffeId>) -> Vec<SpiffeId> {
        let gone: Vec<_> = self.entries.keys().filter(|id| !ids.contains(*id)).cloned().collect();
        for id in &gone {
            self.entries.remove(id);
        }
        for id in ids {
            self.entries.entry(id.clone()).or_default();
        }
        gone
    }

    /// At most `limit` identities to ask for now, those without a certificate first, then by the end of what they have.
    pub(super) fn take_due(&mut self, now: Now, limit: usize) -> Vec<Attempt> {
        let mut due: Vec<_> = self.entries.iter_mut().filter(|(_, entry)| entry.is_due(now)).collect();
        due.sort_by_key(|(_, entry)| entry.held.map(|held| held.not_after));
        let mut taken = Vec::new();
        for (id, entry) in due.into_iter().take(limit) {
            self.attempts += 1;
            entry.in_flight = Some(self.attempts);
            taken.push(Attempt { id: id.clone(), number: self.attempts });
        }
        taken
    }

    /// Whether an answer to this attempt is still of use.
    pub(super) fn awaits(&self, attempt: &Attempt) -> bool {
        self.entries.get(&attempt.id).is_some_and(|entry| entry.in_flight == Some(attempt.number))
    }

    /// A certificate has come and is in use. `epoch` is the authority's when it was asked for, `dice` uniform in 0..1.
    pub(super) fn issued(&mut self, attempt: &Attempt, not_after: OffsetDateTime, epoch: u64, now: Now, dice: f64) {
        if !self.awaits(attempt) {
            return;
        }
        let life = until(now.wall, not_after);
        let mut held =
            Held { since: now.wall, not_after, renew_at: now.wall + life.mul_f64(0.5 * (0.9 + 0.2 * dice)), epoch };
        if epoch < self.epoch {
            // The authority has changed while the answer was on its way.
            hasten(&mut held, now, dice);
        }
        let answered = Entry { held: Some(held), is_answered: true, ..Entry::default() };
        self.entries.insert(attempt.id.clone(), answered);
    }

    /// The attempt brought nothing. What is in use stays in use.
    pub(super) fn failed(&mut self, attempt: &Attempt, error: String, is_answer: bool, now: Now, dice: f64) {
        let Some(entry) = self.entries.get_mut(&attempt.id).filter(|entry| entry.in_flight == Some(attempt.number))
        else {
            return;
        };
        let life = entry.held.map(|held| until(held.since, held.not_after));
        entry.in_flight = None;
        entry.retry_at = Some(now.steady + retry_after(entry.failures, life).mul_f64(0.8 + 0.4 * dice));
        entry.failures = entry.failures.saturating_add(1);
        entry.last_error = Some(error);
        entry.is_answered |= is_answer;
    }

    /// The authority's epoch: what was asked for under a smaller one is renewed soon, not all at once. `dice` is called
    /// for each.
    pub(super) fn set_epoch(&mut self, epoch: u64, now: Now, mut dice: impl FnMut() -> f64) {
        if epoch <= self.epoch {
            return;
        }
        self.epoch = epoch;
        for held in self.entries.values_mut().filter_map(|entry| entry.held.as_mut()) {
            if held.epoch < epoch {
                hasten(held, now, dice());
            }
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Makes one identity, or all, due now.
    pub(super) fn rotate(&mut self, only: Option<&SpiffeId>, now: Now) {
        for (_, entry) in self.entries.iter_mut().filter(|(id, _)| only.is_none_or(|only| only == *id)) {
            entry.retry_at = None;
            if let Some(held) = &mut entry.held {
                held.renew_at = held.renew_at.min(now.wall);
            }
        }
    }

    /// How long until something is due; `None` if nothing ever is by itself.
    pub(super) fn wait(&self, now: Now) -> Option<Duration> {
        self.entries.values().filter_map(|entry| entry.wait(now)).min()
    }

    /// How often to look whether the bundle has changed: often enough for the shortest-lived certificate.
    pub(super) fn bundle_interval(&self) -> Duration {
        let lives = self.entries.values().filter_map(|entry| entry.held.map(|held| until(held.since, held.not_after)));
        lives.min().map_or(BUNDLE_INTERVAL, |life| (life / 12).clamp(Duration::from_secs(1), BUNDLE_INTERVAL))
    }

    /// Whether the authority has given or refused each of these certificates at least once, as far as it is still
    /// wanted.
    pub(super) fn is_answered(&self, ids: &BTreeSet<SpiffeId>) -> bool {
        ids.iter().filter_map(|id| self.entries.get(id)).all(|entry| entry.is_answered)
    }

    /// Why the last attempt for an identity failed.
    pub(super) fn last_error(&self, id: &SpiffeId) -> Option<&str> {
        self.entries.get(id)?.last_error()
    }

    /// Certificates that have come nearer to their end than when this was last asked.
    pub(super) fn alarms(&mut self, now: Now) -> Vec<(SpiffeId, Alarm)> {
        let mut raised = Vec::new();
        for (id, entry) in &mut self.entries {
            let alarm = entry.alarm(now.wall);
            if let Some(level) = alarm.filter(|_| alarm > entry.alarmed) {
                raised.push((id.clone(), level));
            }
            entry.alarmed = alarm;
        }
        raised
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&SpiffeId, &Entry)> {
        self.entries.iter()
    }
}

/// Brings a renewal forward, to somewhere within a quarter of the certificate's life.
fn hasten(held: &mut Held, now: Now, dice: f64) {
    let spread = (until(held.since, held.not_after) / 4).min(LONGEST_SPREAD);
    held.renew_at = held.renew_at.min(now.wall + spread.mul_f64(dice));
}

/// The pause after the `failures + 1`st failure in a row.
fn retry_after(failures: u32, life: Option<Duration>) -> Duration {
    let bound = life.map_or(LONGEST_RETRY, |life| (life / 20).clamp(SHORTEST_BOUND, LONGEST_RETRY));
    FIRST_RETRY.saturating_mul(1 << failures.min(16)).min(bound)
}

/// From one time to a later one; zero if it is not later.
fn until(from: OffsetDateTime, to: OffsetDateTime) -> Duration {
    (to - from).try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests;
