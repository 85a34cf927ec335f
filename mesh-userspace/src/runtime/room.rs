//! A bound: so many at once, how many there are, and how often there was no room.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How full a bound is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// The bound's stable name.
    pub bound: &'static str,
    pub used: u64,
    pub capacity: u64,
    /// How often somebody was turned away, or had to wait.
    pub hits: u64,
}

/// Room for so many. Cheap to clone; all clones are the same room.
#[derive(Clone, Debug)]
pub struct Room(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bound: &'static str,
    capacity: usize,
    places: Arc<Semaphore>,
    hits: AtomicU64,
}

/// A place in a [`Room`]; given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Room {
    /// # Panics
    /// If the capacity is beyond [`Semaphore::MAX_PERMITS`].
    #[must_use]
    pub fn new(bound: &'static str, capacity: usize) -> Self {
        Self(Arc::new(Inner { bound, capacity, places: Arc::new(Semaphore::new(capacity)), hits: AtomicU64::new(0) }))
    }

    /// A place, unless all are taken: that is counted.
    pub fn try_enter(&self) -> Option<Place> {
        let place = Arc::clone(&self.0.places).try_acquire_owned().ok();
        if place.is_none() {
            self.0.hits.fetch_add(1, Relaxed);
        }
        place.map(|permit| Place { _permit: permit })
    }

    /// A place, as soon as there is one. To have to wait is counted.
    ///
    /// # Panics
    /// Never: the room is not closed.
    pub async fn enter(&self) -> Place {
        if let Some(place) = self.try_enter() {
            return place;
        }
        let permit = Arc::clone(&self.0.places).acquire_owned().await.expect("a room is never closed");
        Place { _permit: permit }
    }

    #[must_use]
    pub fn level(&self) -> Level {
        let Inner { bound, capacity, places, hits } = &*self.0;
        let used = capacity.saturating_sub(places.available_permits());
        Level { bound, used: used as u64, capacity: *capacity as u64, hits: hits.load(Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_room_tells_its_level_and_counts_who_found_none() {
        let room = Room::new("seats", 2);
        let first = room.try_enter().unwrap();
        let _second = room.enter().await;
        assert_eq!(room.level(), Level { bound: "seats", used: 2, capacity: 2, hits: 0 });
        assert!(room.clone().try_enter().is_none());
        drop(first);
        let _third = room.enter().await;
        assert_eq!(room.level(), Level { bound: "seats", used: 2, capacity: 2, hits: 1 });
    }

    #[tokio::test]
    async fn who_waits_is_counted_and_gets_the_place_that_comes_free() {
        let room = Room::new("seats", 1);
        let first = room.enter().await;
        let waiting = room.enter();
        let (_second, ()) = tokio::join!(waiting, async { drop(first) });
        assert_eq!(room.level(), Level { bound: "seats", used: 1, capacity: 1, hits: 1 });
    }
}
