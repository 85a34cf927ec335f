//! The algorithms that look at load: which entry of a plan is the least burdened one.

use super::candidates::Candidates;
use super::hash::{self, Draws};
use super::latency::Average;
use super::plan::Plan;

/// Latencies below this are the same: without a floor, the first endpoint that ever answered would seem the slowest.
const LATENCY_FLOOR: f32 = 0.000_1;

/// The entry with the fewest open connections for its weight; among equals a random one by weight.
pub(super) fn least_connections(plan: &Plan, candidates: &Candidates, draws: &mut Draws) -> Option<u32> {
    let mut best: Option<(u32, u64, u32)> = None;
    let mut equals = 0u64;
    for (slot, weight) in plan.weights() {
        if !candidates.accepts(slot) {
            continue;
        }
        let open = candidates.members.at(slot).open;
        let order = best.map_or(std::cmp::Ordering::Less, |(least_open, its_weight, _)| {
            (u128::from(open) * u128::from(its_weight)).cmp(&(u128::from(least_open) * u128::from(weight)))
        });
        if order.is_gt() {
            continue;
        }
        equals = if order.is_lt() { weight } else { equals + weight };
        if hash::scale(draws.draw(), equals) < weight {
            best = Some((open, weight, slot));
        }
    }
    best.map(|(_, _, slot)| slot)
}

/// Average latencies of a group.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Averages {
    pub(super) connect: Average,
    pub(super) first_byte: Average,
}

/// Of two random entries the one with the lower cost.
pub(super) fn peak_ewma(plan: &Plan, averages: &Averages, candidates: &Candidates, draws: &mut Draws) -> Option<u32> {
    let first = candidates.draw(plan, draws)?;
    let cost = |index| cost(plan, index, averages, candidates);
    let second = if plan.len() > 1 { candidates.draw_but(plan, draws, Some(first)) } else { None };
    let index = second.filter(|second| cost(*second) < cost(first)).unwrap_or(first);
    Some(plan.slot(index))
}

/// What one more connection is expected to cost at an entry: its latency, times how many connections share it, relative
/// to its weight. (A weight counts once in being drawn; counted fully here, too, it would count twice where nothing is
/// open.) An attempt that is pending counts with the time that it has been pending for.
fn cost(plan: &Plan, index: usize, averages: &Averages, candidates: &Candidates) -> f32 {
    let (member, now) = (candidates.members.at(plan.slot(index)), candidates.now);
    let connect = member.connect.expected(averages.connect.seconds(), now).max(member.silence(now).as_secs_f32());
    let first_byte = member.first_byte.expected(averages.first_byte.seconds(), now);
    let mean = plan.total() as f32 / plan.len() as f32;
    let load = member.open as f32 * mean / plan.weight(index) as f32;
    (connect + first_byte).max(LATENCY_FLOOR) * (1.0 + load)
}
