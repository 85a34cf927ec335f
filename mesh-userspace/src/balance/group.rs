//! One frontend's endpoints: picks, and what becomes of them.

mod choose;
mod outcome;
mod view;

use super::affinity::Callers;
use super::algorithm::Averages;
use super::budget::RetryBudget;
use super::consistent::Tables;
use super::member::{EndpointId, Members};
use super::plan::Plan;
use super::round_robin::Turns;
use super::{ConnectFailure, Counts, EjectionCause, EndpointStatus, Exhausted, Levels, Pick};
use crate::engine::{Endpoint, Locality};
use crate::model::Traffic;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The state of one frontend's endpoints. Its size is bounded by the endpoints of the catalog and those that left it with
/// connections.
pub struct Group {
    seed: u64,
    /// `None` before the first list.
    endpoints: Option<Arc<[Endpoint]>>,
    traffic: Arc<Traffic>,
    members: Members,
    /// The member of each endpoint.
    listed: Vec<u32>,
    plan: Plan,
    /// Whether the plan holds what has happened; time apart.
    is_planned: bool,
    turns: Turns,
    tables: Tables,
    callers: Callers,
    budget: RetryBudget,
    averages: Averages,
    accepted_at: Option<Instant>,
    open: u32,
    pending: u32,
    counts: Counts,
}

impl Group {
    /// A group without endpoints. The seed decides with whom round robin begins.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            endpoints: None,
            traffic: Arc::default(),
            members: Members::default(),
            listed: Vec::new(),
            plan: Plan::default(),
            is_planned: false,
            turns: Turns::default(),
            tables: Tables::default(),
            callers: Callers::default(),
            budget: RetryBudget::default(),
            averages: Averages::default(),
            accepted_at: None,
            open: 0,
            pending: 0,
            counts: Counts::default(),
        }
    }

    /// Follows the catalog. What is known of endpoints that stay is kept; those that join start slowly, except for the
    /// first list's. Free if nothing changed.
    pub fn handle_view(&mut self, endpoints: &Arc<[Endpoint]>, traffic: &Arc<Traffic>, now: Instant) {
        let is_same_list = self.endpoints.as_ref().is_some_and(|known| Arc::ptr_eq(known, endpoints));
        if !is_same_list {
            self.handle_list(endpoints, now);
        }
        if !Arc::ptr_eq(&self.traffic, traffic) {
            self.handle_traffic(traffic);
        }
    }

    /// Picks an endpoint for a caller's connection, which from now on is open and pending there. `tried` are the
    /// endpoints that this connection has failed at; `random` is uniform over all of `u64`.
    pub fn pick(&mut self, caller: IpAddr, tried: &[EndpointId], random: u64, now: Instant) -> Result<Pick, Exhausted> {
        let slot = self.admit().and_then(|()| {
            self.refresh(now);
            self.choose(caller, tried, random, now)
        });
        let slot = slot.inspect_err(|why| self.counts.exhausted[*why as usize] += 1)?;
        Ok(self.begin(slot, tried.is_empty(), now))
    }

    /// [`Self::pick`] among the endpoints of other nodes, if there are any: the kernel has drawn among all of them, and the
    /// draw did not fall on one of this node.
    pub fn pick_elsewhere(&mut self, caller: IpAddr, random: u64, now: Instant) -> Result<Pick, Exhausted> {
        let endpoints = self.endpoints.as_deref().unwrap_or_default().iter().zip(&self.listed);
        let here = endpoints.filter(|(endpoint, _)| endpoint.locality == Locality::SameNode);
        let here: Vec<EndpointId> = here.map(|(_, slot)| self.members.id_of(*slot)).collect();
        if here.len() == self.listed.len() {
            return self.pick(caller, &[], random, now);
        }
        let slot = self.admit().and_then(|()| {
            self.refresh(now);
            self.choose(caller, &here, random, now)
        });
        let slot = slot.inspect_err(|why| self.counts.exhausted[*why as usize] += 1)?;
        Ok(self.begin(slot, true, now))
    }

    /// Asks for one more attempt at a connection that has failed; to be asked before each pick but the first.
    pub fn handle_retry(&mut self, now: Instant) -> Result<(), Exhausted> {
        if self.budget.handle_retry(&self.traffic.retry, now) {
            self.counts.retries += 1;
            return Ok(());
        }
        self.counts.exhausted[Exhausted::RetryBudget as usize] += 1;
        Err(Exhausted::RetryBudget)
    }

    /// The endpoint took the connection, `latency` after the pick.
    pub fn handle_connected(&mut self, id: EndpointId, latency: Duration, now: Instant) {
        self.pending = self.pending.saturating_sub(1);
        self.averages.connect.sample(latency);
        self.accepted_at = Some(now);
        let Some(slot) = self.members.slot_of(id) else { return };
        let member = self.members.at_mut(slot);
        member.settle(true, now);
        member.connect.sample(latency, now);
        let ended = member.trouble.as_mut().is_some_and(|trouble| trouble.handle_connected(now));
        self.forgive(slot, ended, now);
    }

    /// The endpoint's first byte came back, `latency` after it could have.
    pub fn handle_first_byte(&mut self, id: EndpointId, latency: Duration, now: Instant) {
        self.averages.first_byte.sample(latency);
        let Some(slot) = self.members.slot_of(id) else { return };
        let member = self.members.at_mut(slot);
        member.first_byte.sample(latency, now);
        let ended = member.trouble.as_mut().is_some_and(|trouble| trouble.handle_first_byte(now));
        self.forgive(slot, ended, now);
    }

    /// The endpoint did not take the connection: the attempt is over.
    pub fn handle_failed(&mut self, id: EndpointId, failure: ConnectFailure, now: Instant) {
        self.end_attempt();
        let Some(slot) = self.members.slot_of(id) else { return };
        self.fail(slot, failure, now);
        self.release_if_done(slot);
    }

    /// The connection was given up, by its caller or by policy, before the endpoint took it. That says nothing about the
    /// endpoint, unless it was silent for unusually long: then it has let the caller wait, and that is a time-out.
    pub fn handle_cancelled(&mut self, id: EndpointId, now: Instant) {
        self.end_attempt();
        let Some(slot) = self.members.slot_of(id) else { return };
        if self.pace().is_suspect(self.members.at(slot), now) {
            self.fail(slot, ConnectFailure::Timeout, now);
        } else {
            let member = self.members.at_mut(slot);
            member.open = member.open.saturating_sub(1);
            member.settle(false, now);
        }
        self.release_if_done(slot);
    }

    /// The endpoint reset a connection that it had taken, without having sent a byte. `handle_closed` follows.
    pub fn handle_reset(&mut self, id: EndpointId, now: Instant) {
        let Some(slot) = self.members.slot_of(id) else { return };
        let policy = self.traffic.ejection;
        if self.members.at_mut(slot).trouble().handle_reset(&policy) {
            self.eject(slot, EjectionCause::Reset, now);
        }
    }

    /// A connection that the endpoint had taken has ended.
    pub fn handle_closed(&mut self, id: EndpointId, _now: Instant) {
        self.open = self.open.saturating_sub(1);
        let Some(slot) = self.members.slot_of(id) else { return };
        let member = self.members.at_mut(slot);
        member.open = member.open.saturating_sub(1);
        self.release_if_done(slot);
    }

    /// An active probe of the endpoint ended. Without a health check in the traffic policy it says nothing.
    pub fn handle_probe(&mut self, id: EndpointId, healthy: bool, _now: Instant) {
        let traffic = Arc::clone(&self.traffic);
        let (Some(slot), Some(policy)) = (self.members.slot_of(id), &traffic.health_check) else { return };
        if self.members.at_mut(slot).trouble().probes.handle(healthy, policy) {
            self.invalidate();
        }
    }

    /// How the catalog's endpoints fare, in its order.
    pub fn statuses(&self, now: Instant) -> impl Iterator<Item = EndpointStatus> {
        let endpoints = self.endpoints.as_deref().unwrap_or_default();
        endpoints.iter().zip(&self.listed).map(move |(endpoint, slot)| self.status(endpoint, *slot, now))
    }

    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    #[must_use]
    pub fn levels(&self, now: Instant) -> Levels {
        let troubled = || self.listed.iter().filter_map(|slot| self.members.at(*slot).trouble.as_ref());
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Levels {
            endpoints: count(self.listed.len()),
            ejected: count(troubled().filter(|trouble| trouble.ejected(now).is_some()).count()),
            unhealthy: count(troubled().filter(|trouble| trouble.probes.is_unhealthy()).count()),
            open: self.open,
            pending: self.pending,
            retries_left: self.budget.left(&self.traffic.retry, now),
            callers: count(self.callers.len()),
        }
    }

    fn admit(&self) -> Result<(), Exhausted> {
        let limits = self.traffic.limits;
        if limits.max_connections.is_some_and(|max| self.open >= max) {
            return Err(Exhausted::MaxConnections);
        }
        if limits.max_pending.is_some_and(|max| self.pending >= max) {
            return Err(Exhausted::MaxPending);
        }
        Ok(())
    }
}
