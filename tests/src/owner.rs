//! Names of everything that a test process makes: they tell who made it, so that leftovers can be told from what is
//! in use.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

/// First part of every name (network namespaces, cgroups, directories).
const PREFIX: &str = "nm";

/// One world of one process: `nm-<pid>-<start time>-<sequence>`. The start time (clock ticks after boot) tells a
/// process from a later one with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pid: u32,
    started: u64,
    sequence: u32,
}

impl Owner {
    /// A tag that no other world of any process has.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        let started = start_time(pid).unwrap_or_default();
        Self { pid, started, sequence: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Reads the tag at the start of a name; `None` for names that no world gave.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.strip_prefix('-')?.splitn(4, '-');
        let mut next = || parts.next();
        let (pid, started, sequence) = (next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?);
        Some(Self { pid, started, sequence })
    }

    /// Whether this process made it.
    pub(crate) fn is_this_process(self) -> bool {
        self.pid == std::process::id() && self.is_alive()
    }

    /// Whether the process that made it still runs.
    pub(crate) fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}-{}-{}-{}", self.pid, self.started, self.sequence)
    }
}

/// Field 22 of `/proc/<pid>/stat`; the second field is a program's name in parentheses and may hold anything.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_gives_back_its_owner() {
        let owner = Owner::new();
        assert_eq!(Owner::parse(&owner.to_string()), Some(owner));
        assert_eq!(Owner::parse(&format!("{owner}-n1-web")), Some(owner));
        assert_ne!(Owner::new(), owner);
    }

    #[test]
    fn names_of_others_have_no_owner() {
        for name in ["", "nm", "nm-1", "nm-1-2", "nm-x-2-3", "nmap-1-2-3", "web-1-2-3", "nm-1-2-3x"] {
            assert_eq!(Owner::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_process_that_ended_or_gave_its_pid_to_another_is_not_alive() {
        let owner = Owner::new();
        assert!(owner.is_alive());
        assert!(!Owner { started: owner.started + 1, ..owner }.is_alive());
        assert!(!Owner { pid: u32::MAX, ..owner }.is_alive());
    }
}
