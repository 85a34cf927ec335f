//! Changing the root without a dropped connection: a pure machine. Time and the nodes' reports in, steps out.
//!
//! A new root is first only *announced*: it is in the bundle, and signs nothing. Once every node uses that bundle,
//! the new root signs, and nodes are told to renew; the old one is *retiring* until the last leaf below it has ended.
//! So at no time does a node meet a certificate that it cannot verify.

use super::records::Seconds;
use super::{Reason, Refusal};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Beyond the longest life of a leaf, for clocks that differ.
const MARGIN: Duration = Duration::from_mins(1);

/// How far the change of the root is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "phase")]
pub(super) enum Phase {
    /// One root.
    #[default]
    Steady,
    /// `incoming` is in the bundle since its `version`; at the `deadline` it signs whatever nodes have said.
    Announced { incoming: u64, version: u64, since: Seconds, deadline: Seconds },
    /// The new root signs; `outgoing` leaves the bundle at `until`.
    Retiring { outgoing: u64, since: Seconds, until: Seconds },
}

/// What is to be done; the next phase follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Make a root and put it into the bundle.
    Announce,
    /// Let this root sign from now on, and tell nodes to renew.
    Switch { incoming: u64 },
    /// Take this root out of the bundle.
    Retire { outgoing: u64 },
}

/// What of a node matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reported<'a> {
    pub(super) node: &'a str,
    pub(super) revoked: bool,
    pub(super) seen: Seconds,
    /// The version of the bundle that it uses.
    pub(super) bundle: u64,
}

/// How long certificates live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lives {
    /// Workloads' certificates.
    pub workload: Duration,
    /// Nodes' certificates.
    pub node: Duration,
}

impl Lives {
    /// In seconds, rounded up.
    pub(super) fn longest(self) -> Seconds {
        seconds(self.workload.max(self.node) + Duration::from_millis(999))
    }
}

impl Phase {
    /// What the passing of time and the nodes' reports ask for.
    pub(super) fn poll<'a>(
        &self,
        now: Seconds,
        lives: Lives,
        nodes: impl IntoIterator<Item = Reported<'a>>,
    ) -> Option<Step> {
        match *self {
            Self::Steady => None,
            Self::Announced { incoming, deadline, .. } => {
                let waits = now < deadline && !self.waits_for(now, lives, nodes).is_empty();
                (!waits).then_some(Step::Switch { incoming })
            }
            Self::Retiring { outgoing, until, .. } => (now >= until).then_some(Step::Retire { outgoing }),
        }
    }

    /// What an operator's request asks for. `force` takes the next step without waiting.
    pub(super) fn request(&self, force: bool) -> Result<Step, Refusal> {
        match *self {
            Self::Steady => Ok(Step::Announce),
            Self::Announced { incoming, .. } if force => Ok(Step::Switch { incoming }),
            Self::Retiring { outgoing, .. } if force => Ok(Step::Retire { outgoing }),
            Self::Announced { .. } | Self::Retiring { .. } => Err(Refusal::new(
                Reason::RotationUnderWay,
                "the root is being rotated already: `nodemesh ca status` shows what it waits for; --now takes the next \
                 step without waiting",
            )),
        }
    }

    /// The nodes whose report is missing. One that has been silent for a node certificate's life has none that is
    /// valid any more, and must join again anyway.
    pub(super) fn waits_for<'a>(
        &self,
        now: Seconds,
        lives: Lives,
        nodes: impl IntoIterator<Item = Reported<'a>>,
    ) -> Vec<&'a str> {
        let Self::Announced { version: wanted, .. } = *self else { return Vec::new() };
        let alive = |node: &Reported<'_>| !node.revoked && node.seen.saturating_add(seconds(lives.node)) > now;
        let waiting = nodes.into_iter().filter(|node| alive(node) && node.bundle < wanted);
        waiting.map(|node| node.node).collect()
    }

    /// After [`Step::Announce`]: `incoming` is in the bundle since `version`.
    pub(super) fn announced(incoming: u64, version: u64, now: Seconds, lives: Lives) -> Self {
        Self::Announced { incoming, version, since: now, deadline: now.saturating_add(seconds(lives.node)) }
    }

    /// After [`Step::Switch`]: `outgoing` signs no more.
    ///
    /// `longest` is the longest life of any leaf that it may have signed, in seconds.
    pub(super) fn retiring(outgoing: u64, now: Seconds, longest: Seconds) -> Self {
        let until = now.saturating_add(longest).saturating_add(seconds(MARGIN));
        Self::Retiring { outgoing, since: now, until }
    }
}

/// Whether an intermediate with this life has used up two thirds of it, and a successor should sign.
pub(super) fn is_due(since: Seconds, until: Seconds, now: Seconds) -> bool {
    now - since >= (until - since) / 3 * 2
}

pub(super) fn seconds(duration: Duration) -> Seconds {
    Seconds::try_from(duration.as_secs()).unwrap_or(Seconds::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIVES: Lives = Lives { workload: Duration::from_secs(100), node: Duration::from_secs(1000) };

    fn node(name: &str, seen: Seconds, bundle: u64) -> Reported<'_> {
        Reported { node: name, revoked: false, seen, bundle }
    }

    #[test]
    fn the_new_root_signs_once_every_living_node_uses_its_bundle() {
        let phase = Phase::announced(7, 2, 0, LIVES);
        let switch = Some(Step::Switch { incoming: 7 });
        assert_eq!(phase.poll(1, LIVES, []), switch, "without nodes there is nobody to wait for");
        assert_eq!(phase.poll(1, LIVES, [node("a", 0, 2), node("b", 0, 1)]), None);
        assert_eq!(phase.waits_for(1, LIVES, [node("a", 0, 2), node("b", 0, 1)]), ["b"]);
        assert_eq!(phase.poll(1, LIVES, [node("a", 0, 2), node("b", 0, 3)]), switch);
        assert_eq!(phase.poll(1, LIVES, [node("a", 0, 2), Reported { revoked: true, ..node("b", 0, 1) }]), switch);
        assert_eq!(phase.poll(1, LIVES, [node("a", 0, 2), node("b", -1000, 1)]), switch, "its certificate has ended");
        assert_eq!(phase.poll(999, LIVES, [node("b", 998, 1)]), None);
        assert_eq!(phase.poll(1000, LIVES, [node("b", 999, 1)]), switch, "the deadline");
    }

    #[test]
    fn the_old_root_stays_until_its_last_leaf_has_ended() {
        let phase = Phase::retiring(3, 10, 1000);
        assert_eq!(phase.poll(1069, LIVES, []), None);
        assert_eq!(phase.poll(1070, LIVES, []), Some(Step::Retire { outgoing: 3 }));
    }

    #[test]
    fn a_request_during_a_rotation_is_refused_unless_it_insists() {
        assert_eq!(Phase::Steady.request(false), Ok(Step::Announce));
        for (phase, next) in [
            (Phase::announced(7, 2, 0, LIVES), Step::Switch { incoming: 7 }),
            (Phase::retiring(3, 0, 1000), Step::Retire { outgoing: 3 }),
        ] {
            assert_eq!(phase.request(false).unwrap_err().reason, Reason::RotationUnderWay);
            assert_eq!(phase.request(true), Ok(next));
        }
    }

    #[test]
    fn a_successor_signs_after_two_thirds_of_a_life() {
        assert!(!is_due(0, 90, 59));
        assert!(is_due(0, 90, 60));
        assert!(is_due(0, 90, 1000));
    }

    /// A mesh as the rotation sees it: who trusts what, and what signs.
    struct Mesh {
        phase: Phase,
        bundle: (u64, Vec<u64>),
        signs: u64,
        /// Of each node: when it was last seen, which version it said to use, which roots it really uses.
        nodes: Vec<(Seconds, u64, Vec<u64>)>,
        /// Root and end of every leaf.
        leaves: Vec<(u64, Seconds)>,
        next: u64,
    }

    impl Mesh {
        fn take(&mut self, step: &Step, now: Seconds) {
            match *step {
                Step::Announce => {
                    self.bundle = (self.bundle.0 + 1, [&self.bundle.1[..], &[self.next]].concat());
                    self.phase = Phase::announced(self.next, self.bundle.0, now, LIVES);
                    self.next += 1;
                }
                Step::Switch { incoming } => {
                    self.phase = Phase::retiring(self.signs, now, LIVES.longest());
                    self.signs = incoming;
                }
                Step::Retire { outgoing } => {
                    self.bundle.0 += 1;
                    self.bundle.1.retain(|root| *root != outgoing);
                    self.phase = Phase::Steady;
                }
            }
        }

        fn poll(&mut self, now: Seconds) {
            let nodes = self.nodes.clone();
            let reports = nodes.iter().map(|(seen, version, _)| node("n", *seen, *version));
            if let Some(step) = self.phase.poll(now, LIVES, reports) {
                self.take(&step, now);
            }
        }
    }

    proptest! {
        /// Whatever the order of questions, rotations and time: a node that keeps asking believes every leaf that
        /// has not ended, and the bundle always holds the root that signs.
        #[test]
        fn nodes_that_ask_believe_every_leaf(actions in proptest::collection::vec((0u8..6, 0usize..3, 1i64..400), 1..200)) {
            let mut now = 0;
            let nodes = vec![(0, 1, vec![0]); 3];
            let mut mesh =
                Mesh { phase: Phase::Steady, bundle: (1, vec![0]), signs: 0, nodes, leaves: Vec::new(), next: 1 };
            for (action, index, pause) in actions {
                match action {
                    // Asks: says what it uses, then uses what it gets.
                    0..=2 => {
                        let said = mesh.nodes[index].2.clone();
                        let version = if said == mesh.bundle.1 { mesh.bundle.0 } else { mesh.nodes[index].1 };
                        mesh.nodes[index] = (now, version, mesh.bundle.1.clone());
                    }
                    3 => mesh.leaves.push((mesh.signs, now + 100)),
                    4 => now += pause,
                    _ => if let Ok(step) = mesh.phase.request(false) { mesh.take(&step, now) },
                }
                mesh.poll(now);
                mesh.leaves.retain(|(_, end)| *end > now);
                prop_assert!(mesh.bundle.1.contains(&mesh.signs));
                // Who has been silent for a node certificate's life is not waited for, and must join again.
                for (_, _, roots) in mesh.nodes.iter().filter(|(seen, ..)| now - seen < 1000) {
                    for (root, _) in &mesh.leaves {
                        prop_assert!(roots.contains(root), "a node that uses {roots:?} meets a leaf below {root}");
                    }
                }
                for (root, _) in &mesh.leaves {
                    prop_assert!(mesh.bundle.1.contains(root), "a leaf outlives its root's place in the bundle");
                }
            }
        }
    }
}
