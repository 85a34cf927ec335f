//! Following the catalog, and keeping the plan.

use super::Group;
use crate::balance::EndpointStatus;
use crate::balance::affinity::Callers;
use crate::balance::member::{EndpointId, Key, Place};
use crate::balance::plan::Sources;
use crate::engine::Endpoint;
use crate::model::{Affinity, Traffic};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

impl Group {
    pub(super) fn handle_list(&mut self, endpoints: &Arc<[Endpoint]>, now: Instant) {
        self.invalidate();
        self.tables.invalidate();
        let old = self.endpoints.replace(Arc::clone(endpoints));
        let is_first = old.is_none();
        let listed = old.iter().flat_map(|old| old.iter()).map(Key::of).zip(self.listed.drain(..));
        let mut known: HashMap<Key, u32> = listed.chain(self.members.left()).collect();
        for (index, endpoint) in (0..).zip(endpoints.iter()) {
            let joined_at = (!is_first).then_some(now);
            let slot = match known.remove(&Key::of(endpoint)) {
                Some(slot) => {
                    let member = self.members.at_mut(slot);
                    let place = std::mem::replace(&mut member.place, Place::Listed(index));
                    if matches!(place, Place::Left(_)) {
                        // Its connections count; what it was out for, it may have left for.
                        member.joined_at = joined_at;
                        member.trouble = None;
                    }
                    slot
                }
                None => self.members.insert(index, joined_at),
            };
            self.listed.push(slot);
        }
        for (key, slot) in known {
            self.members.at_mut(slot).place = Place::Left(Box::new(key));
            self.release_if_done(slot);
        }
    }

    pub(super) fn handle_traffic(&mut self, traffic: &Arc<Traffic>) {
        let old = std::mem::replace(&mut self.traffic, Arc::clone(traffic));
        if *old == **traffic {
            return;
        }
        self.invalidate();
        self.tables.invalidate();
        if traffic.affinity == Affinity::None {
            self.callers = Callers::default();
        }
        if traffic.health_check.is_none() {
            // Nobody would ever say that they have recovered.
            for slot in &self.listed {
                if let Some(trouble) = &mut self.members.at_mut(*slot).trouble {
                    trouble.probes = Default::default();
                }
            }
        }
    }

    /// Something happened that the plan does not hold.
    pub(super) fn invalidate(&mut self) {
        self.turns.pause(&self.plan, &mut self.members);
        self.is_planned = false;
    }

    /// Makes the plan hold what has happened until now.
    pub(super) fn refresh(&mut self, now: Instant) {
        if self.is_planned && self.plan.is_valid(now) {
            return;
        }
        self.turns.pause(&self.plan, &mut self.members);
        let sources = Sources {
            endpoints: self.endpoints.as_deref().unwrap_or_default(),
            listed: &self.listed,
            traffic: &self.traffic,
        };
        self.plan.compile(&mut self.members, &sources, now);
        self.plans += 1;
        self.is_planned = true;
    }

    pub(super) fn status(&self, endpoint: &Endpoint, slot: u32, now: Instant) -> EndpointStatus {
        let member = self.members.at(slot);
        let trouble = member.trouble.as_ref();
        let id: EndpointId = self.members.id_of(slot);
        EndpointStatus {
            id,
            endpoint: endpoint.clone(),
            open: member.open,
            pending: member.pending,
            is_healthy: trouble.is_none_or(|trouble| !trouble.probes.is_unhealthy()),
            ejected: trouble.and_then(|trouble| trouble.ejected(now)),
            is_on_trial: trouble.is_some_and(|trouble| trouble.is_on_trial(now)),
            is_suspect: self.pace().is_suspect(member, now),
            warmth_percent: member.warmth(self.traffic.slow_start, now) / 10,
            connect_latency: member.connect.last(),
            first_byte_latency: member.first_byte.last(),
        }
    }
}
