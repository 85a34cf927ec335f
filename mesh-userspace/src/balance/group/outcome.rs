//! What becomes of picks, and what that says about endpoints.

use super::Group;
use crate::balance::ejection::most_ejected;
use crate::balance::member::Place;
use crate::balance::{ConnectFailure, EjectionCause};
use std::time::Instant;

/// How much slower than the average a failed connect counts where latency decides: who refuses fast is not fast.
const FAILURE_PENALTY: u32 = 10;

impl Group {
    /// An attempt is over without a connection.
    pub(super) fn end_attempt(&mut self) {
        self.open = self.open.saturating_sub(1);
        self.pending = self.pending.saturating_sub(1);
    }

    pub(super) fn fail(&mut self, slot: u32, failure: ConnectFailure, now: Instant) {
        let pace = self.pace();
        let policy = self.traffic.ejection;
        let member = self.members.at_mut(slot);
        let is_timeout = failure == ConnectFailure::Timeout;
        // If it answered others in the meantime, a single attempt was lost, not the endpoint.
        let is_silent = is_timeout && pace.is_suspect(member, now);
        let penalty = pace.connect.unwrap_or_default().saturating_mul(FAILURE_PENALTY).max(member.silence(now));
        member.open = member.open.saturating_sub(1);
        member.settle(!is_timeout, now);
        member.connect.sample(penalty, now);
        if member.index().is_none() {
            return;
        }
        let trouble = member.trouble();
        let is_due = trouble.handle_failure(&policy);
        if is_silent {
            trouble.pause(&policy, now);
        }
        if is_due {
            self.eject(slot, failure.into(), now);
        }
    }

    /// Ejects a member, if not too many are out already.
    pub(super) fn eject(&mut self, slot: u32, cause: EjectionCause, now: Instant) {
        self.refresh(now);
        if !self.has_room_for_ejection() {
            self.counts.ejections_withheld += 1;
            return;
        }
        let policy = self.traffic.ejection;
        self.members.at_mut(slot).trouble().eject(cause, &policy, now);
        self.counts.ejections[cause as usize] += 1;
        self.invalidate();
    }

    /// Whether one more endpoint may be out, as far as the plan knows.
    pub(super) fn has_room_for_ejection(&self) -> bool {
        self.plan.ejected < most_ejected(self.listed.len(), self.traffic.ejection.max_percent)
    }

    /// After a success: what is over is forgotten.
    pub(super) fn forgive(&mut self, slot: u32, is_ejection_over: bool, now: Instant) {
        if is_ejection_over {
            self.invalidate();
        }
        let member = self.members.at_mut(slot);
        member.trouble.take_if(|trouble| trouble.is_over(now));
    }

    /// A member that has left and has no connection any more is forgotten.
    pub(super) fn release_if_done(&mut self, slot: u32) {
        let member = self.members.at(slot);
        if member.open == 0 && matches!(member.place, Place::Left(_)) {
            self.members.release(slot);
        }
    }
}
