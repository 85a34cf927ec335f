//! Policy between real applications: who gets through, by which rule, who is told, and what happens to connections that
//! a change catches.

mod dry_run;
mod edges;
mod explain;
mod live;
mod plaintext;
#[path = "../stranger/mod.rs"]
mod stranger;

use anyhow::{Result, bail};
use mesh_tests::cluster::Cluster;
use mesh_tests::daemon::Daemon;
use mesh_tests::program::Running;
use mesh_tests::scrape::{Change, Metrics};
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;

pub(crate) const PORT: u16 = 8080;
const VERDICTS: &str = "nodemesh_policy_verdicts_total";
pub(crate) const CUT: &str = "nodemesh_policy_connections_cut_total";

/// Meshed and STRICT: `client` and `other` on n1, `server` on n2 behind a service. Not in the catalog: `outsider` on
/// n1.
pub(crate) fn start(name: &str) -> Result<(Cluster, Running)> {
    let topology = World::named(name).node("n1").pods(&["client", "other", "outsider"]).node("n2").pod("server");
    let cluster = Cluster::start(topology, |catalog| {
        assert!(catalog.remove("outsider"));
        catalog.mesh("mode", "strict");
        catalog.service("server", 80, PORT);
    })?;
    let echo = cluster.serve("server", PORT, &["--greet"])?;
    cluster.wait_until_served("client", "server")?;
    cluster.wait_until_served("other", "server")?;
    Ok((cluster, echo))
}

/// Waits until a node counts `count` more (or more) verdicts with these labels than before.
pub(crate) fn wait_for_verdicts(daemon: &Daemon, before: &Metrics, labels: &[(&str, &str)], count: u64) -> Result<()> {
    wait::until_ok(&format!("{} counts {count} verdicts {labels:?}", daemon.node()), BOUND, || {
        let after = daemon.metrics()?;
        let counted = Change { before: before.clone(), after }.of(|metrics| metrics.count(VERDICTS, labels));
        if counted >= count { Ok(()) } else { bail!("it has counted {counted}") }
    })
}

/// Waits until a node has cut so many connections for a reason since its start.
pub(crate) fn wait_for_cuts(daemon: &Daemon, reason: &str, count: u64) -> Result<()> {
    wait::until_ok(&format!("{} cuts {count} connections ({reason})", daemon.node()), BOUND, || {
        let cut = daemon.metrics()?.count(CUT, &[("reason", reason)]);
        if cut == count { Ok(()) } else { bail!("it has cut {cut}") }
    })
}

/// Waits until each of so many connections was cut for a reason since the daemons' start: by the node that heard of
/// the change first, or by both.
pub(crate) fn wait_until_cut(cluster: &Cluster, reason: &str, count: u64) -> Result<()> {
    wait::until_ok(&format!("{count} connections are cut ({reason})"), BOUND, || {
        let cuts = cluster.daemons().map(|daemon| Ok(daemon.metrics()?.count(CUT, &[("reason", reason)])));
        let cut: u64 = cuts.sum::<Result<u64>>()?;
        if (count..=2 * count).contains(&cut) { Ok(()) } else { bail!("the nodes have cut {cut}") }
    })
}
