//! Which endpoint a caller had last: its connections stay together.

use super::member::EndpointId;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Callers that are remembered for one group: many times the addresses that the workloads of a node have.
pub const CALLERS_MAX: usize = 4_096;
/// When there are so many, those whose time is over are looked for this often at most.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
struct Remembered {
    id: EndpointId,
    until: Instant,
}

/// The callers of a group.
#[derive(Default)]
pub(super) struct Callers {
    remembered: HashMap<IpAddr, Remembered>,
    swept_at: Option<Instant>,
}

impl Callers {
    pub(super) fn get(&self, caller: IpAddr, now: Instant) -> Option<EndpointId> {
        let remembered = self.remembered.get(&caller.to_canonical())?;
        (remembered.until > now).then_some(remembered.id)
    }

    /// Whether a caller can be remembered.
    pub(super) fn has_room(&mut self, caller: IpAddr, now: Instant) -> bool {
        if self.remembered.len() < CALLERS_MAX || self.remembered.contains_key(&caller.to_canonical()) {
            return true;
        }
        if self.swept_at.is_none_or(|swept_at| now.saturating_duration_since(swept_at) >= SWEEP_INTERVAL) {
            self.swept_at = Some(now);
            self.remembered.retain(|_, remembered| remembered.until > now);
        }
        self.remembered.len() < CALLERS_MAX
    }

    pub(super) fn remember(&mut self, caller: IpAddr, id: EndpointId, until: Instant) {
        self.remembered.insert(caller.to_canonical(), Remembered { id, until });
    }

    pub(super) fn len(&self) -> usize {
        self.remembered.len()
    }
}
