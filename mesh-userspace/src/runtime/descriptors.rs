//! The file descriptors that the daemon may spend, so that none of its own needs ever meets EMFILE: whoever opens
//! descriptors because of others takes permits first, and is refused while the daemon still has some.

use super::Level;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// The part of the budget, one in so many, that connections of applications leave to connections between nodes: without
/// one of those no application's connection can be carried.
const LANES_SHARE: usize = 8;

/// The budget. Cheap to clone; all clones are the same budget.
#[derive(Clone, Debug)]
pub struct Descriptors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    size: usize,
    used: AtomicUsize,
    hits: AtomicU64,
}

/// Descriptors that are paid for; given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct Descriptor {
    budget: Descriptors,
    count: usize,
}

impl Descriptors {
    /// A budget of so many descriptors.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self(Arc::new(Inner { size, used: AtomicUsize::new(0), hits: AtomicU64::new(0) }))
    }

    /// One for a connection of an application, if there is one: some are left to connections between nodes.
    pub fn for_application(&self) -> Option<Descriptor> {
        self.take(self.0.size - self.0.size / LANES_SHARE)
    }

    /// How many are left to connections between nodes.
    #[must_use]
    pub fn lanes_share(&self) -> usize {
        self.0.size / LANES_SHARE
    }

    /// One for a connection between nodes, if there is one.
    pub fn for_lane(&self) -> Option<Descriptor> {
        self.take(self.0.size)
    }

    /// What the daemon needs to serve at all, such as the listeners of a workload: never refused, and what it takes is
    /// not there for others.
    pub fn for_daemon(&self, count: usize) -> Descriptor {
        self.0.used.fetch_add(count, Relaxed);
        Descriptor { budget: self.clone(), count }
    }

    fn take(&self, bound: usize) -> Option<Descriptor> {
        let taken = self.0.used.try_update(Relaxed, Relaxed, |used| (used < bound).then_some(used + 1));
        if taken.is_err() {
            self.0.hits.fetch_add(1, Relaxed);
            return None;
        }
        Some(Descriptor { budget: self.clone(), count: 1 })
    }

    #[must_use]
    pub fn level(&self) -> Level {
        let Inner { size, used, hits } = &*self.0;
        let (used, capacity) = (used.load(Relaxed) as u64, *size as u64);
        Level { bound: "descriptors", used, capacity, hits: hits.load(Relaxed) }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        self.budget.0.used.fetch_sub(self.count, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applications_leave_some_to_lanes_and_all_is_given_back() {
        let budget = Descriptors::new(16);
        let applications: Vec<_> = std::iter::from_fn(|| budget.for_application()).collect();
        assert_eq!(applications.len(), 14);
        let lanes: Vec<_> = std::iter::from_fn(|| budget.for_lane()).collect();
        assert_eq!((lanes.len(), budget.lanes_share()), (2, 2));
        assert_eq!(budget.level(), Level { bound: "descriptors", used: 16, capacity: 16, hits: 2 });
        drop((applications, lanes));
        assert_eq!(budget.level().used, 0);
        assert!(budget.for_application().is_some());
    }

    #[test]
    fn the_daemon_takes_what_it_needs_from_the_others() {
        let budget = Descriptors::new(16);
        let own = budget.for_daemon(20);
        assert!(budget.for_application().is_none() && budget.for_lane().is_none());
        drop(own);
        let _own = budget.for_daemon(13);
        let _last = budget.for_application().unwrap();
        assert!(budget.for_application().is_none());
    }
}
