//! Workloads in their node's own network namespace: who calls there, which the namespace does not say.
//!
//! A socket has a maker and a user, and descriptors can be passed on: a connection is a workload's only if both are
//! of its cgroup. Everything in a node's namespace that is not a workload's is left alone.

/// Levels of the cgroup hierarchy at which workloads can be told: the root is level 0, and no workload's.
pub const LEVELS: u32 = 32;

/// Whose a connect() is.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribution {
    /// No workload has to do with it.
    Nobody,
    /// The workload's whose cgroup has this id.
    Workload(u64),
    /// One made the socket and another one uses it, and at least one of them is a workload.
    Handed,
}

/// Attributes a connect(): `maker` and `user` are the ids of the workloads' cgroups that the socket was made in and
/// that the calling process is in; 0 is no workload's.
#[inline(always)]
pub const fn attribute(maker: u64, user: u64) -> Attribution {
    if maker == 0 && user == 0 {
        Attribution::Nobody
    } else if maker == user {
        Attribution::Workload(user)
    } else {
        Attribution::Handed
    }
}

/// Whether workloads' cgroups exist at a level: bit n of `levels` is level n.
#[inline(always)]
#[must_use]
pub const fn has_level(levels: u64, level: u32) -> bool {
    level < LEVELS && levels & (1 << level) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connect_is_a_workloads_only_if_it_made_and_uses_the_socket() {
        assert_eq!(attribute(0, 0), Attribution::Nobody);
        assert_eq!(attribute(7, 7), Attribution::Workload(7));
        for (maker, user) in [(7, 8), (8, 7), (7, 0), (0, 7)] {
            assert_eq!(attribute(maker, user), Attribution::Handed, "{maker} {user}");
        }
    }

    #[test]
    fn levels_are_bits() {
        assert!(has_level(0b1010, 3) && has_level(0b1010, 1));
        assert!(!has_level(0b1010, 2) && !has_level(u64::MAX, LEVELS));
    }
}
