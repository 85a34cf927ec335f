//! What this process may take of the machine, and the list of its bounds.

use crate::runtime::{Descriptors, Level};
use crate::telemetry::bounds::{self, Bound};
use prometheus_client::registry::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors of the daemon itself that no bound counts: maps, links, listeners, the runtime, files that are read.
const OWN: u64 = 128;
/// Of a small limit the daemon keeps one in so many for itself, though not less than [`OWN`].
const KEPT: u64 = 4;

/// Raises the soft limit of open files to the hard one, and gives the limit that holds now.
pub(super) fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, current = ?limit.current, "cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// What is left of the limit of open files for traffic, when the daemon's own needs are met: what it has and `bounded`,
/// which is what parts that have bounds of their own may open. Where the limit is too small for all of them at once,
/// they share a part of it.
pub(super) fn descriptors(limit: u64, bounded: u64) -> Descriptors {
    let kept = OWN.saturating_add(bounded).min((limit / KEPT).max(OWN));
    let size = limit.saturating_sub(kept);
    if size < OWN {
        tracing::warn!(limit, kept, "the limit of open files leaves next to nothing for connections: raise it");
    }
    // What counts them counts in usize.
    Descriptors::new(usize::try_from(size).unwrap_or(usize::MAX))
}

type Levels = Box<dyn Fn() -> Vec<Level> + Send + Sync>;

/// Whom a scrape asks how full bounds are.
#[derive(Default)]
pub(super) struct Sources(Vec<Levels>);

impl Sources {
    pub(super) fn add(&mut self, levels: impl Fn() -> Vec<Level> + Send + Sync + 'static) {
        self.0.push(Box::new(levels));
    }

    /// The sum of all bounds so far: where each place is a connection, the descriptors that they may take.
    pub(super) fn capacity(&self) -> u64 {
        self.0.iter().flat_map(|levels| levels()).map(|level| level.capacity).sum()
    }

    /// Shows the bounds in the scrape.
    pub(super) fn show(self, registry: &mut Registry) {
        bounds::register(registry, move || {
            let levels = self.0.iter().flat_map(|levels| levels());
            let bound = |Level { bound, used, capacity, hits }| Bound { name: bound, used, capacity, hits };
            levels.map(bound).collect()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_keeps_what_it_needs_and_a_small_limit_is_shared() {
        let size = |limit, bounded| descriptors(limit, bounded).level().capacity;
        assert_eq!(size(1_048_576, 1_000), 1_048_576 - 1_128);
        assert_eq!(size(1_024, 1_000), 768);
        assert_eq!(size(256, 1_000), 128);
        assert_eq!(size(64, 1_000), 0);
    }
}
