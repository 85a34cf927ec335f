//! Which endpoint a pick takes.

use super::Group;
use crate::balance::algorithm::{least_connections, peak_ewma};
use crate::balance::candidates::{Candidates, Pace, any_by_weight};
use crate::balance::hash::{self, Draws};
use crate::balance::locality;
use crate::balance::member::EndpointId;
use crate::balance::plan::Sources;
use crate::balance::{EjectionCause, Exhausted, Pick};
use crate::model::{Affinity, Algorithm, Prefer};
use std::cell::Cell;
use std::net::IpAddr;
use std::time::Instant;

/// What one pick goes by.
struct Wish<'a> {
    caller: IpAddr,
    tried: &'a [EndpointId],
    algorithm: Algorithm,
}

impl Group {
    /// Chooses a member, and takes note of what it saw on the way.
    pub(super) fn choose(
        &mut self,
        caller: IpAddr,
        tried: &[EndpointId],
        random: u64,
        now: Instant,
    ) -> Result<u32, Exhausted> {
        if self.plan.total() == 0 {
            return Err(Exhausted::NoEndpoints);
        }
        let algorithm = self.traffic.algorithm;
        let Affinity::ClientIp(timeout) = self.traffic.affinity else {
            return self.search(&Wish { caller, tried, algorithm }, random, now);
        };
        if !self.callers.has_room(caller, now) {
            // Nobody needs to be remembered for this one, and it too keeps callers together.
            self.counts.callers_forgotten += 1;
            return self.search(&Wish { caller, tried, algorithm: Algorithm::Maglev }, random, now);
        }
        let slot = match self.remembered(caller, tried, now) {
            Some(slot) => slot,
            None => self.search(&Wish { caller, tried, algorithm }, random, now)?,
        };
        self.callers.remember(caller, self.members.id_of(slot), now + timeout);
        Ok(slot)
    }

    /// Where the caller's last connection went, if that takes another one.
    fn remembered(&mut self, caller: IpAddr, tried: &[EndpointId], now: Instant) -> Option<u32> {
        let slot = self.members.slot_of(self.callers.get(caller, now)?)?;
        let member = self.members.at(slot);
        member.index().filter(|_| self.plan.is_panic || !member.is_out(now))?;
        let candidates = self.candidates(tried, now, false);
        let keeps = candidates.keeps(slot);
        let lost = candidates.lost.take();
        self.handle_lost(lost, now);
        keeps.then_some(slot)
    }

    /// By the algorithm, among those that are ready; else any other tier's that is ready; else without minding silence
    /// and trials; else any tier's that is in; else any at all that was not tried: it may have recovered.
    fn search(&mut self, wish: &Wish, random: u64, now: Instant) -> Result<u32, Exhausted> {
        let mut draws = Draws::new(random);
        let is_local = self.traffic.prefer != Prefer::Nobody;
        let slot = self
            .by_algorithm(wish, false, &mut draws, now)
            .or_else(|| self.any(wish.tried, false, &mut draws, now).filter(|_| is_local))
            .or_else(|| self.by_algorithm(wish, true, &mut draws, now))
            .or_else(|| self.any(wish.tried, true, &mut draws, now))
            .or_else(|| self.any_at_all(wish.tried, &mut draws, now));
        slot.ok_or(Exhausted::AllTried)
    }

    fn by_algorithm(&mut self, wish: &Wish, is_lax: bool, draws: &mut Draws, now: Instant) -> Option<u32> {
        let candidates = Candidates {
            members: &self.members,
            tried: wish.tried,
            pace: Pace { connect: self.averages.connect.get(), accepted_at: self.accepted_at },
            now,
            is_lax,
            lost: Cell::default(),
            passed_over: Cell::default(),
        };
        let plan = &self.plan;
        let sources = Sources {
            endpoints: self.endpoints.as_deref().unwrap_or_default(),
            listed: &self.listed,
            traffic: &self.traffic,
        };
        let drawn = |draws: &mut Draws| candidates.draw(plan, draws).map(|index| plan.slot(index));
        let slot = match wish.algorithm {
            Algorithm::Random => drawn(draws),
            Algorithm::RoundRobin => self.turns.next(plan, &self.members, self.seed, &candidates),
            Algorithm::LeastConnections => least_connections(plan, &candidates, draws),
            Algorithm::PeakEwma => peak_ewma(plan, &self.averages, &candidates, draws),
            Algorithm::Maglev => self
                .tables
                .slot(wish.caller, plan, &sources, &candidates)
                .or_else(|| drawn(&mut Draws::new(hash::ip(wish.caller)))),
        };
        self.counts.passed_over += candidates.passed_over.get();
        let lost = candidates.lost.take();
        self.handle_lost(lost, now);
        slot
    }

    /// Any endpoint that is in, of whatever tier.
    fn any(&self, tried: &[EndpointId], is_lax: bool, draws: &mut Draws, now: Instant) -> Option<u32> {
        let candidates = self.candidates(tried, now, is_lax);
        let is_in = |slot: u32| !self.members.at(slot).is_out(now) && candidates.accepts(slot);
        any_by_weight(self.weights().filter(|(slot, _)| is_in(*slot)), draws)
    }

    fn any_at_all(&self, tried: &[EndpointId], draws: &mut Draws, now: Instant) -> Option<u32> {
        let candidates = self.candidates(tried, now, true);
        any_by_weight(self.weights().filter(|(slot, _)| candidates.accepts(*slot)), draws)
    }

    /// All endpoints of the catalog and their weights there.
    fn weights(&self) -> impl Iterator<Item = (u32, u64)> {
        let endpoints = self.endpoints.as_deref().unwrap_or_default();
        self.listed.iter().zip(endpoints).map(|(slot, endpoint)| (*slot, u64::from(endpoint.weight)))
    }

    fn candidates<'a>(&'a self, tried: &'a [EndpointId], now: Instant, is_lax: bool) -> Candidates<'a> {
        Candidates {
            members: &self.members,
            tried,
            pace: self.pace(),
            now,
            is_lax,
            lost: Cell::default(),
            passed_over: Cell::default(),
        }
    }

    pub(super) fn pace(&self) -> Pace {
        Pace { connect: self.averages.connect.get(), accepted_at: self.accepted_at }
    }

    /// A pick came across an endpoint that has been silent for too long.
    fn handle_lost(&mut self, lost: Option<u32>, now: Instant) {
        let is_wanted = self.traffic.ejection.consecutive_failures > 0 && self.has_room_for_ejection();
        if let Some(slot) = lost.filter(|_| is_wanted) {
            self.eject(slot, EjectionCause::Silent, now);
            self.refresh(now);
        }
    }

    /// The connection begins at a member.
    pub(super) fn begin(&mut self, slot: u32, is_first: bool, now: Instant) -> Pick {
        self.counts.picks += 1;
        self.open += 1;
        self.pending += 1;
        if is_first {
            self.budget.handle_connection(now);
        }
        let member = self.members.at_mut(slot);
        member.begin(now);
        self.counts.panics += u64::from(member.is_out(now));
        let index = member.index().expect("only listed members are chosen");
        let endpoints = self.endpoints.as_deref().unwrap_or_default();
        let endpoint = endpoints[index as usize].clone();
        let is_near = locality::tier(self.traffic.prefer, endpoint.locality) <= self.plan.nearest;
        self.counts.failovers += u64::from(!is_near);
        Pick { id: self.members.id_of(slot), endpoint }
    }
}
