//! Turns: each endpoint's turn comes as often as its weight says, and as evenly as can be.

use super::candidates::Candidates;
use super::hash;
use super::member::Members;
use super::plan::Plan;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Virtual time between two turns of an endpoint of average weight.
const MEAN_INTERVAL: u128 = 1 << 20;
/// Virtual time starts again from here.
const LATEST: u64 = 1 << 62;

/// Endpoints wait for their turns in virtual time, each for an interval inverse to its weight (earliest deadline first).
#[derive(Default)]
pub(super) struct Turns {
    /// When an entry's turn comes, and its index in the plan.
    queue: BinaryHeap<Reverse<(u64, u32)>>,
    now: u64,
}

impl Turns {
    /// The entry whose turn it is. One that is passed over has had its turn.
    pub(super) fn next(&mut self, plan: &Plan, members: &Members, seed: u64, candidates: &Candidates) -> Option<u32> {
        if self.queue.len() != plan.len() {
            self.fill(plan, members, seed);
        }
        for _ in 0..plan.len() {
            let mut head = self.queue.peek_mut()?;
            let Reverse((turn, index)) = *head;
            let index_in_plan = index as usize;
            self.now = self.now.max(turn);
            *head = Reverse((turn.saturating_add(interval(plan, index_in_plan)), index));
            drop(head);
            let slot = plan.slot(index_in_plan);
            if candidates.accepts(slot) {
                return Some(slot);
            }
        }
        None
    }

    /// Before the plan is compiled anew: members remember their turns, so that a change does not start the round again.
    pub(super) fn pause(&mut self, plan: &Plan, members: &mut Members) {
        let base = if self.now > LATEST { self.now } else { 0 };
        for Reverse((turn, index)) in self.queue.drain() {
            members.at_mut(plan.slot(index as usize)).turn = Some(turn - base.min(turn));
        }
        self.now -= base;
    }

    /// Members without a turn get one at random within their first interval: otherwise all nodes of a mesh would begin
    /// with the same endpoint.
    fn fill(&mut self, plan: &Plan, members: &Members, seed: u64) {
        self.queue.clear();
        for index in 0..plan.len() {
            let slot = plan.slot(index);
            let interval = interval(plan, index);
            let phase = || self.now + hash::scale(hash::pair(seed, u64::from(slot)), interval);
            let turn = members.at(slot).turn.unwrap_or_else(phase).clamp(self.now, self.now.saturating_add(interval));
            self.queue.push(Reverse((turn, u32::try_from(index).unwrap_or(u32::MAX))));
        }
    }
}

fn interval(plan: &Plan, index: usize) -> u64 {
    let mean = u128::from(plan.total()) / (plan.len() as u128).max(1);
    let interval = mean * MEAN_INTERVAL / u128::from(plan.weight(index)).max(1);
    u64::try_from(interval).unwrap_or(u64::MAX).max(1)
}
