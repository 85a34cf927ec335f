//! What is known about each endpoint, and the numbers under which the proxy speaks of them.

use super::ejection::Trouble;
use super::latency::Latency;
use crate::engine::Endpoint;
use crate::model::WorkloadUid;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Names an endpoint of one group, for as long as it is in the catalog or has connections; never one after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointId {
    slot: u32,
    generation: u32,
}

/// What makes an endpoint the same one in the next list.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    workload: WorkloadUid,
    address: SocketAddr,
}

impl Key {
    pub(super) fn of(endpoint: &Endpoint) -> Self {
        Self { workload: endpoint.workload.uid.clone(), address: endpoint.address }
    }
}

/// Where a member is in the catalog's list.
pub(super) enum Place {
    Listed(u32),
    /// It has left, and its connections live on: if it comes back, they count.
    Left(Box<Key>),
    /// The slot waits for another endpoint.
    Free,
}

/// One endpoint's state.
pub(super) struct Member {
    generation: u32,
    pub(super) place: Place,
    /// Connections that were picked and have not ended, the pending ones included.
    pub(super) open: u32,
    pub(super) pending: u32,
    /// Since when attempts are pending and none has been answered.
    pub(super) silent_since: Option<Instant>,
    /// When it joined the others; `None` once it is warm.
    pub(super) joined_at: Option<Instant>,
    pub(super) connect: Latency,
    pub(super) first_byte: Latency,
    /// When its next turn comes, in the virtual time of round robin.
    pub(super) turn: Option<u64>,
    /// Only where something has failed: most endpoints never do.
    pub(super) trouble: Option<Box<Trouble>>,
}

impl Member {
    fn new(generation: u32) -> Self {
        Self {
            generation,
            place: Place::Free,
            open: 0,
            pending: 0,
            silent_since: None,
            joined_at: None,
            connect: Latency::default(),
            first_byte: Latency::default(),
            turn: None,
            trouble: None,
        }
    }

    /// An attempt begins.
    pub(super) fn begin(&mut self, now: Instant) {
        self.open += 1;
        self.pending += 1;
        self.silent_since.get_or_insert(now);
    }

    /// An attempt is not pending any more. Silence lasts while others are, unless this one was `answered`.
    pub(super) fn settle(&mut self, answered: bool, now: Instant) {
        self.pending = self.pending.saturating_sub(1);
        if self.pending == 0 {
            self.silent_since = None;
        } else if answered {
            self.silent_since = Some(now);
        }
    }

    /// For how long it has answered nothing, though asked.
    pub(super) fn silence(&self, now: Instant) -> Duration {
        self.silent_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub(super) fn trouble(&mut self) -> &mut Trouble {
        self.trouble.get_or_insert_default()
    }

    /// Whether it gets no connections while others do: it is ejected or unhealthy.
    pub(super) fn is_out(&self, now: Instant) -> bool {
        self.trouble.as_ref().is_some_and(|trouble| trouble.is_out(now))
    }

    pub(super) fn index(&self) -> Option<u32> {
        match self.place {
            Place::Listed(index) => Some(index),
            Place::Left(_) | Place::Free => None,
        }
    }
}

/// The members of a group, in slots that are used again.
#[derive(Default)]
pub(super) struct Members {
    slots: Vec<Member>,
    free: Vec<u32>,
}

impl Members {
    /// `None` if the endpoint is gone.
    pub(super) fn slot_of(&self, id: EndpointId) -> Option<u32> {
        let member = self.slots.get(id.slot as usize)?;
        (member.generation == id.generation && !matches!(member.place, Place::Free)).then_some(id.slot)
    }

    pub(super) fn id_of(&self, slot: u32) -> EndpointId {
        EndpointId { slot, generation: self.at(slot).generation }
    }

    pub(super) fn at(&self, slot: u32) -> &Member {
        &self.slots[slot as usize]
    }

    pub(super) fn at_mut(&mut self, slot: u32) -> &mut Member {
        &mut self.slots[slot as usize]
    }

    pub(super) fn insert(&mut self, index: u32, joined_at: Option<Instant>) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Member::new(0));
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 endpoints fit into memory")
        });
        let member = self.at_mut(slot);
        member.place = Place::Listed(index);
        member.joined_at = joined_at;
        slot
    }

    /// A member without connections that is in no list any more: its id becomes invalid.
    pub(super) fn release(&mut self, slot: u32) {
        let member = self.at_mut(slot);
        *member = Member::new(member.generation.wrapping_add(1));
        self.free.push(slot);
    }

    /// The members that have left, and their slots.
    pub(super) fn left(&self) -> impl Iterator<Item = (Key, u32)> {
        (0..).zip(&self.slots).filter_map(|(slot, member)| match &member.place {
            Place::Left(key) => Some((Key::clone(key), slot)),
            Place::Listed(_) | Place::Free => None,
        })
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.slots.len()
    }
}
