//! Which endpoints one pick may take: not those that the connection has tried, and rather not those that are silent or on
//! trial.

use super::hash::{self, Draws};
use super::member::{EndpointId, Member, Members};
use super::plan::Plan;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// An endpoint is suspect once it has answered nothing for this many times as long as connecting takes usually.
const PATIENCE_FACTOR: u32 = 4;
/// Bounds of that: below, a pause of the network or of a scheduler; above, one lost SYN.
const PATIENCE_MIN: Duration = Duration::from_millis(50);
const PATIENCE_MAX: Duration = Duration::from_secs(1);
/// A silence of this length ejects, if others answered in the meantime: two retransmissions of a SYN within the network.
const SILENCE_LIMIT: Duration = Duration::from_secs(2);
/// Draws before all endpoints are looked at.
const DRAWS: usize = 8;

/// How the group's endpoints answer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// How long connecting takes on average.
    pub(super) connect: Option<Duration>,
    /// When an endpoint accepted last.
    pub(super) accepted_at: Option<Instant>,
}

impl Pace {
    /// How long a member may be silent before others are preferred.
    fn patience(&self, member: &Member, now: Instant) -> Duration {
        let Some(usual) = self.connect else { return PATIENCE_MAX };
        let own = Duration::from_secs_f32(member.connect.expected(usual.as_secs_f32(), now).max(0.0));
        own.max(usual).saturating_mul(PATIENCE_FACTOR).clamp(PATIENCE_MIN, PATIENCE_MAX)
    }

    pub(super) fn is_suspect(&self, member: &Member, now: Instant) -> bool {
        let silence = member.silence(now);
        silence >= PATIENCE_MIN && silence >= self.patience(member, now)
    }

    /// Whether a member has been silent for so long that callers who give up are right.
    pub(super) fn keeps_waiting(&self, member: &Member, now: Instant) -> bool {
        member.silence(now) >= PATIENCE_MAX
    }

    /// Whether a member has been silent for so long, while others were not, that it should be ejected.
    fn is_lost(&self, member: &Member, now: Instant) -> bool {
        let others_answer = self.accepted_at > member.silent_since;
        others_answer && member.silence(now) >= SILENCE_LIMIT
    }
}

/// The endpoints of one pick.
pub(super) struct Candidates<'a> {
    pub(super) members: &'a Members,
    pub(super) tried: &'a [EndpointId],
    pub(super) pace: Pace,
    pub(super) now: Instant,
    /// Whether also silent ones and those on trial are taken.
    pub(super) is_lax: bool,
    /// One that is silent for too long was seen.
    pub(super) lost: Cell<Option<u32>>,
    pub(super) passed_over: Cell<u64>,
}

impl Candidates<'_> {
    pub(super) fn accepts(&self, slot: u32) -> bool {
        if self.is_tried(slot) {
            return false;
        }
        let takes = self.is_lax || self.is_ready(slot);
        if !takes {
            self.passed_over.set(self.passed_over.get() + 1);
        }
        takes
    }

    pub(super) fn is_tried(&self, slot: u32) -> bool {
        !self.tried.is_empty() && self.tried.contains(&self.members.id_of(slot))
    }

    /// Whether it answers as usual, and is not busy with its trial.
    fn is_ready(&self, slot: u32) -> bool {
        self.takes_attempts(slot) && !self.pace.is_suspect(self.members.at(slot), self.now)
    }

    /// Whether a caller stays with it: a short silence does not part them.
    pub(super) fn keeps(&self, slot: u32) -> bool {
        !self.is_tried(slot) && self.takes_attempts(slot)
    }

    fn takes_attempts(&self, slot: u32) -> bool {
        let member = self.members.at(slot);
        let is_lost = self.pace.is_lost(member, self.now);
        if is_lost {
            self.lost.set(Some(slot));
        }
        let is_held = member.trouble.as_ref().is_some_and(|trouble| {
            trouble.is_paused(self.now) || (trouble.is_on_trial(self.now) && member.pending > 0)
        });
        !is_lost && !is_held
    }

    /// The index of a random entry that is acceptable, by weight.
    pub(super) fn draw(&self, plan: &Plan, draws: &mut Draws) -> Option<usize> {
        self.draw_but(plan, draws, None)
    }

    /// As [`Self::draw`], without one of the entries.
    pub(super) fn draw_but(&self, plan: &Plan, draws: &mut Draws, other: Option<usize>) -> Option<usize> {
        for _ in 0..DRAWS {
            let index = plan.draw(draws.draw())?;
            if Some(index) != other && self.accepts(plan.slot(index)) {
                return Some(index);
            }
        }
        let others = plan.weights().enumerate().filter(|(index, _)| Some(*index) != other);
        let accepted = others.filter(|(_, (slot, _))| self.accepts(*slot));
        any_by_weight(accepted.map(|(index, (_, weight))| (index, weight)), draws)
    }
}

/// One of a sequence, with a probability in proportion to its weight.
pub(super) fn any_by_weight<T>(sequence: impl Iterator<Item = (T, u64)>, draws: &mut Draws) -> Option<T> {
    let (mut total, mut chosen) = (0u64, None);
    for (item, weight) in sequence {
        total += weight;
        if hash::scale(draws.draw(), total) < weight {
            chosen = Some(item);
        }
    }
    chosen
}
