//! The clients that policy keeps out: what they saw, and who says why.

use crate::scene::Scene;
use anyhow::Result;
use mesh_tests::report::Call;
use mesh_tests::scrape::Metrics;
use std::net::SocketAddr;

/// One refused client and virtual address.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) client: &'static str,
    pub(crate) service: &'static str,
    pub(crate) vip: SocketAddr,
    /// What connect() failed with.
    pub(crate) errno: String,
    pub(crate) bytes_received: u64,
    /// Who refused, for what reason, by which policy and rule: as the counter that moved says it.
    pub(crate) by: Option<Ground>,
}

/// The labels of a verdict's counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ground {
    pub(crate) enforced_by: String,
    pub(crate) reason: String,
    pub(crate) policy: String,
    pub(crate) rule: String,
}

const FAMILY: &str = "nodemesh_policy_verdicts_total";

/// Two clients that may not reach `web`: one that a rule denies, one that no rule allows.
pub(crate) fn run(scene: &Scene) -> Result<Vec<Refused>> {
    let mut all = Vec::new();
    for family in [0, 1] {
        for client in ["intruder", "load"] {
            all.push(refused(scene, client, "web", scene.cluster.catalog.vips("web")[family])?);
        }
    }
    Ok(all)
}

fn refused(scene: &Scene, client: &'static str, service: &'static str, vip: SocketAddr) -> Result<Refused> {
    let cluster = &scene.cluster;
    let before = cluster.daemon("n1").metrics()?;
    let call: Call = cluster.attempt(client, &["call", "blocking", &vip.to_string()])?;
    let after =
        cluster.daemon("n1").wait_for_metrics("the verdict is counted", |after| moved(&before, after).is_some());
    // That nobody says why is told by the table, and makes the demo fail.
    let by = after.ok().and_then(|after| moved(&before, &after));
    let errno = call.errno.unwrap_or_else(|| "none".to_owned());
    Ok(Refused { client, service, vip, errno, bytes_received: call.bytes_received, by })
}

/// The denying counter that grew.
fn moved(before: &Metrics, after: &Metrics) -> Option<Ground> {
    let denying = after.matching(FAMILY, &[("verdict", "deny")]);
    let mut grown = denying.filter(|sample| {
        let labels: Vec<(&str, &str)> =
            sample.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        before.sum(FAMILY, &labels) < sample.value
    });
    let labels = &grown.next()?.labels;
    let label = |name: &str| labels.get(name).cloned().unwrap_or_default();
    Some(Ground {
        enforced_by: label("enforced_by"),
        reason: label("reason"),
        policy: label("policy"),
        rule: label("rule"),
    })
}
