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
