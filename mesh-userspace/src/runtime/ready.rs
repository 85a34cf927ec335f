//! Readiness as ownership: the process is ready when every blocker has been dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Says whether the process is ready, and if not, what it waits for.
#[derive(Clone)]
pub struct Ready(Arc<Mutex<BTreeMap<&'static str, usize>>>);

/// Holds readiness back for as long as it lives.
#[must_use]
pub struct Blocker {
    ready: Ready,
    reason: &'static str,
}

impl Ready {
    /// A process that is not ready before the returned token is dropped: nobody who asks can be earlier than the first
    /// reason to wait.
    pub fn blocked(reason: &'static str) -> (Self, Blocker) {
        let ready = Self(Arc::default());
        let blocker = ready.block(reason);
        (ready, blocker)
    }

    /// Blocks readiness until the returned token is dropped.
    pub fn block(&self, reason: &'static str) -> Blocker {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
        Blocker { ready: self.clone(), reason }
    }

    /// What readiness waits for; empty when ready.
    #[must_use]
    pub fn outstanding(&self) -> Vec<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        let mut outstanding = self.ready.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = outstanding.get_mut(self.reason) {
            *count -= 1;
            if *count == 0 {
                outstanding.remove(self.reason);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_every_blocker_is_gone() {
        let (ready, first) = Ready::blocked("catalog");
        assert_eq!(ready.outstanding(), ["catalog"]);
        let second = ready.block("catalog");
        let third = ready.block("programs");
        assert_eq!(ready.outstanding(), ["catalog", "programs"]);
        drop(first);
        drop(third);
        assert_eq!(ready.outstanding(), ["catalog"]);
        drop(second);
        assert!(ready.outstanding().is_empty());
    }
}
