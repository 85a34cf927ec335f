//! Who gets how much of the traffic now: compiled from catalog, localities, slow start, ejections and probes, and used until
//! one of them changes.

use super::locality::{self, Capacity, TIERS};
use super::member::Members;
use super::{hash, slow_start};
use crate::engine::Endpoint;
use crate::model::Traffic;
use std::time::{Duration, Instant};

/// While an endpoint is in slow start, weights are as old as this at most.
const WARMING_STEP_MAX: Duration = Duration::from_secs(1);
const WARMING_STEP_MIN: Duration = Duration::from_millis(10);
/// Steps of a slow start.
const WARMING_STEPS: u32 = 100;

/// An endpoint that takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The weights of all entries up to this one, it included.
    end: u64,
    pub(super) slot: u32,
}

/// The endpoints that take connections, with weights that hold everything but momentary load.
#[derive(Default)]
pub(super) struct Plan {
    entries: Vec<Entry>,
    pub(super) shares: [f64; TIERS],
    /// The first tier that the service has endpoints in.
    pub(super) nearest: usize,
    /// Every endpoint is out, so all of them are in.
    pub(super) is_panic: bool,
    pub(super) ejected: usize,
    /// When time changes it; `None`: never.
    valid_until: Option<Instant>,
}

/// What a plan is compiled from.
pub(super) struct Sources<'a> {
    pub(super) endpoints: &'a [Endpoint],
    /// The members of these endpoints, in the same order.
    pub(super) listed: &'a [u32],
    pub(super) traffic: &'a Traffic,
}

impl Plan {
    pub(super) fn is_valid(&self, now: Instant) -> bool {
        self.valid_until.is_none_or(|until| now < until)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Sum of all weights.
    pub(super) fn total(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.end)
    }

    pub(super) fn slot(&self, index: usize) -> u32 {
        self.entries[index].slot
    }

    pub(super) fn weight(&self, index: usize) -> u64 {
        let start = index.checked_sub(1).map_or(0, |before| self.entries[before].end);
        self.entries[index].end - start
    }

    /// Slots and their weights.
    pub(super) fn weights(&self) -> impl Iterator<Item = (u32, u64)> {
        let mut start = 0;
        self.entries.iter().map(move |entry| (entry.slot, entry.end - std::mem::replace(&mut start, entry.end)))
    }

    /// The index of a random entry, by weight; `None` if there is none.
    pub(super) fn draw(&self, random: u64) -> Option<usize> {
        let position = hash::scale(random, self.total());
        let index = self.entries.partition_point(|entry| entry.end <= position);
        (index < self.entries.len()).then_some(index)
    }

    /// Compiles the plan anew, in the room of the old one. Ends ejections and slow starts whose time is over.
    pub(super) fn compile(&mut self, members: &mut Members, sources: &Sources, now: Instant) {
        let Sources { endpoints, listed, traffic } = *sources;
        *self = Self { entries: std::mem::take(&mut self.entries), ..Self::default() };
        self.entries.clear();
        let mut capacities = [Capacity::default(); TIERS];
        for (endpoint, slot) in endpoints.iter().zip(listed) {
            let is_out = self.observe(members, *slot, traffic, now);
            let capacity = &mut capacities[locality::tier(traffic.prefer, endpoint.locality)];
            capacity.weight += u64::from(endpoint.weight);
            capacity.usable += if is_out { 0 } else { u64::from(endpoint.weight) };
        }
        self.nearest = capacities.iter().position(|capacity| capacity.weight > 0).unwrap_or(0);
        self.is_panic = capacities.iter().all(|capacity| capacity.usable == 0);
        if self.is_panic {
            capacities.iter_mut().for_each(|capacity| capacity.usable = capacity.weight);
        }
        self.shares = locality::shares(capacities, traffic.failover_percent);
        let factors = self.factors(members, sources, now);
        let mut end = 0;
        for (endpoint, slot) in endpoints.iter().zip(listed) {
            let tier = locality::tier(traffic.prefer, endpoint.locality);
            let Some(weight) = self.full_weight(members, endpoint, *slot, traffic, now) else { continue };
            end += factors[tier].map_or(weight, |factor| ((weight as f64 * factor).round() as u64).max(1));
            self.entries.push(Entry { end, slot: *slot });
        }
    }

    /// Brings a member up to date, and notes when time will change it. Whether it is out.
    fn observe(&mut self, members: &mut Members, slot: u32, traffic: &Traffic, now: Instant) -> bool {
        let member = members.at_mut(slot);
        if let Some(joined_at) = member.joined_at {
            if now.saturating_duration_since(joined_at) >= traffic.slow_start {
                member.joined_at = None;
            } else {
                let step = (traffic.slow_start / WARMING_STEPS).clamp(WARMING_STEP_MIN, WARMING_STEP_MAX);
                self.expire(now + step);
            }
        }
        let Some(trouble) = &mut member.trouble else { return false };
        trouble.handle_time(now);
        if let Some((until, _)) = trouble.ejected(now) {
            self.ejected += 1;
            self.expire(until);
        }
        trouble.is_out(now)
    }

    fn expire(&mut self, at: Instant) {
        self.valid_until = Some(self.valid_until.map_or(at, |until| until.min(at)));
    }

    /// An endpoint's weight among those of its tier; `None` if it gets nothing.
    fn full_weight(
        &self,
        members: &Members,
        endpoint: &Endpoint,
        slot: u32,
        traffic: &Traffic,
        now: Instant,
    ) -> Option<u64> {
        let member = members.at(slot);
        let tier = locality::tier(traffic.prefer, endpoint.locality);
        let gets_none = self.shares[tier] == 0.0 || endpoint.weight == 0 || (!self.is_panic && member.is_out(now));
        (!gets_none).then(|| u64::from(endpoint.weight) * u64::from(member.warmth(traffic.slow_start, now)))
    }

    /// By what each tier's weights are multiplied so that it gets its share; `None`: by nothing, since it gets all.
    fn factors(&self, members: &Members, sources: &Sources, now: Instant) -> [Option<f64>; TIERS] {
        if self.shares.iter().filter(|share| **share > 0.0).count() < 2 {
            return [None; TIERS];
        }
        let mut weights = [0u64; TIERS];
        for (endpoint, slot) in sources.endpoints.iter().zip(sources.listed) {
            let tier = locality::tier(sources.traffic.prefer, endpoint.locality);
            weights[tier] += self.full_weight(members, endpoint, *slot, sources.traffic, now).unwrap_or(0);
        }
        // Weights of all tiers together keep their size: rounding is then as fine as slow start's thousandths.
        let sum: u64 = weights.iter().sum();
        std::array::from_fn(|tier| (weights[tier] > 0).then(|| self.shares[tier] * sum as f64 / weights[tier] as f64))
    }
}

impl super::member::Member {
    /// Which part of its weight counts, in thousandths.
    pub(super) fn warmth(&self, slow_start: Duration, now: Instant) -> u32 {
        self.joined_at.map_or(slow_start::FULL_PERMILLE, |joined_at| {
            slow_start::warmth(now.saturating_duration_since(joined_at), slow_start)
        })
    }
}
