//! How much each node may ask for: a bucket for each, refilled with time.

use crate::model::NodeName;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What a node may ask for at once: every identity of a large node, several times over.
const CAPACITY: f64 = 2048.0;
/// What it gets back every second.
const REFILL: f64 = 32.0;
/// Buckets kept; full ones are forgotten first, since a new one is full.
const BUCKETS: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Limits {
    buckets: HashMap<NodeName, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn at(self, now: Instant) -> f64 {
        (self.left + now.saturating_duration_since(self.at).as_secs_f64() * REFILL).min(CAPACITY)
    }
}

impl Limits {
    /// Takes what a request costs; `false` if the node has to wait.
    pub(super) fn take(&mut self, node: &NodeName, cost: usize, now: Instant) -> bool {
        if self.buckets.len() >= BUCKETS && !self.buckets.contains_key(node) {
            self.buckets.retain(|_, bucket| bucket.at(now) < CAPACITY);
        }
        let bucket = self.buckets.entry(node.clone()).or_insert(Bucket { left: CAPACITY, at: now });
        let left = bucket.at(now);
        *bucket = Bucket { left, at: now };
        if left < cost as f64 {
            return false;
        }
        bucket.left -= cost as f64;
        true
    }
}

/// The longest wait that a refusal may lead to.
pub(super) const FULL_AGAIN: Duration = Duration::from_secs((CAPACITY / REFILL) as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greedy_node_waits_and_others_do_not() {
        let mut limits = Limits::default();
        let (greedy, other) = (NodeName::parse("greedy").unwrap(), NodeName::parse("other").unwrap());
        let start = Instant::now();
        assert!(limits.take(&greedy, CAPACITY as usize, start));
        assert!(!limits.take(&greedy, 1, start));
        assert!(limits.take(&other, 1, start));
        assert!(limits.take(&greedy, REFILL as usize, start + Duration::from_secs(1)));
        assert!(!limits.take(&greedy, CAPACITY as usize, start + FULL_AGAIN / 2));
        assert!(limits.take(&greedy, CAPACITY as usize, start + FULL_AGAIN * 3));
    }
}
