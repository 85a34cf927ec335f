//! What applications' connections may take of the node: whoever carries one holds permits for it.

use super::Failure;
use crate::runtime::{Descriptor, Descriptors, Level, Place, Room};

/// The node's budget. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct Budget {
    descriptors: Descriptors,
    connections: Room,
}

/// What one connection holds; given back when dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Held {
    _descriptor: Descriptor,
    _place: Place,
}

impl Budget {
    /// `connections`: how many may be carried at once, both directions together.
    #[must_use]
    pub fn new(descriptors: Descriptors, connections: usize) -> Self {
        Self { descriptors, connections: Room::new("connections", connections) }
    }

    /// What a connection needs on this side: its application's socket. Connections between nodes pay for themselves.
    pub(super) fn connection(&self) -> Result<Held, Failure> {
        let place = self.connections.try_enter().ok_or(Failure::Spent(Spent::Connections))?;
        let descriptor = self.descriptors.for_application().ok_or(Failure::Spent(Spent::Descriptors))?;
        Ok(Held { _descriptor: descriptor, _place: place })
    }

    /// The descriptors that the daemon needs to serve a workload, or to probe an endpoint.
    pub fn for_daemon(&self, count: usize) -> Descriptor {
        self.descriptors.for_daemon(count)
    }

    /// How full it is.
    #[must_use]
    pub fn levels(&self) -> [Level; 2] {
        [self.descriptors.level(), self.connections.level()]
    }
}

/// What a budget has no more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    Descriptors,
    Connections,
}

impl Spent {
    /// A stable label.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptor_limit",
            Self::Connections => "connection_limit",
        }
    }

    /// In words.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Descriptors => "file descriptors",
            Self::Connections => "connections",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_holds_both_until_it_ends_and_the_refusal_says_which_is_short() {
        let budget = Budget::new(Descriptors::new(16), 3);
        let held: Vec<_> = (0..3).map(|_| budget.connection().unwrap()).collect();
        assert!(matches!(budget.connection(), Err(Failure::Spent(Spent::Connections))));
        drop(held);
        let own = budget.for_daemon(15);
        assert!(matches!(budget.connection(), Err(Failure::Spent(Spent::Descriptors))));
        drop(own);
        let [descriptors, connections] = budget.levels();
        assert_eq!((descriptors.used, descriptors.hits), (0, 1));
        assert_eq!((connections.used, connections.hits), (0, 1), "a refused connection keeps no place");
    }
}
