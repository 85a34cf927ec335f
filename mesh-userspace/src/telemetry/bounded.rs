//! Counters of a family whose label sets others make up (names in a catalog, addresses on a network): never more than a
//! fixed number of series. Past that, one series without their labels counts the rest.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Series of one family.
pub(super) const SERIES: usize = 10_000;

/// What is told about a bounded family beside its samples.
pub(super) trait BoundedFamily: fmt::Debug + Send + Sync {
    fn name(&self) -> &'static str;
    /// Series in use.
    fn series(&self) -> u64;
    /// Times that the overflow series counted instead.
    fn dropped(&self) -> u64;
    /// Drops what has not been used for `idle` at `now`.
    fn expire(&self, now: Instant, idle: Duration);
}

#[derive(Debug)]
struct Count {
    count: u64,
    last_used: Instant,
}

#[derive(Debug)]
struct State<K> {
    series: HashMap<K, Count>,
    overflow: u64,
}

/// One such family.
#[derive(Debug)]
pub(super) struct BoundedCounters<K> {
    name: &'static str,
    capacity: usize,
    state: Mutex<State<K>>,
}

impl<K: Eq + Hash + Ord + Clone> BoundedCounters<K> {
    pub(super) fn new(name: &'static str, capacity: usize) -> Self {
        Self { name, capacity, state: Mutex::new(State { series: HashMap::new(), overflow: 0 }) }
    }

    /// Counts one. Takes a short lock: for what happens once a connection, not once a packet.
    pub(super) fn count(&self, key: K, now: Instant) {
        let mut state = self.lock();
        let room = state.series.len() < self.capacity;
        if let Some(found) = state.series.get_mut(&key) {
            found.count += 1;
            found.last_used = now;
        } else if room {
            state.series.insert(key, Count { count: 1, last_used: now });
        } else {
            state.overflow += 1;
        }
    }

    /// Every series in the order of its labels, and what the overflow series has counted.
    pub(super) fn read(&self) -> (Vec<(K, u64)>, u64) {
        let state = self.lock();
        let mut all: Vec<_> = state.series.iter().map(|(key, found)| (key.clone(), found.count)).collect();
        let overflow = state.overflow;
        drop(state);
        all.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        (all, overflow)
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        // Whole at any time: a panic elsewhere must not stop the counting.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Ord + Clone + fmt::Debug + Send> BoundedFamily for BoundedCounters<K> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn series(&self) -> u64 {
        self.lock().series.len() as u64
    }

    fn dropped(&self) -> u64 {
        self.lock().overflow
    }

    fn expire(&self, now: Instant, idle: Duration) {
        self.lock().series.retain(|_, found| now.saturating_duration_since(found.last_used) < idle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_is_counted_together() {
        let family = BoundedCounters::new("family", 2);
        let now = Instant::now();
        for key in ["a", "b", "c", "a", "d"] {
            family.count(key, now);
        }
        assert_eq!(family.read(), (vec![("a", 2), ("b", 1)], 2));
        assert_eq!((family.series(), family.dropped()), (2, 2));
    }

    #[test]
    fn an_idle_series_makes_room() {
        let family = BoundedCounters::new("family", 2);
        let (start, idle) = (Instant::now(), Duration::from_secs(10));
        family.count("a", start);
        family.count("b", start + Duration::from_secs(5));
        family.expire(start + idle, idle);
        family.count("c", start + idle);
        assert_eq!(family.read(), (vec![("b", 1), ("c", 1)], 0));
    }
}
