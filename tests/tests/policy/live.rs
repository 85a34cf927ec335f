//! A change of policy reaches connections that exist.

use crate::{CUT, PORT, start, wait_until_cut};
use anyhow::{Result, ensure};
use mesh_tests::policy::account;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use std::time::Instant;

const MANY: &str = "1000";

#[test]
fn a_change_of_policy_cuts_what_it_forbids_and_nothing_else() -> Result<()> {
    let (mut cluster, _echo) = start("cut")?;
    let vips = cluster.catalog.vips("server").map(|vip| vip.to_string());
    let mut crowd = cluster.hold("client", [vips[0].as_str(), "--greet", "--count", MANY])?;
    let one = cluster.hold("other", [vips[1].as_str(), "--greet", "--chatter"])?;
    cluster.catalog.policy("block").action("DENY").for_app("server").rule("no-other", &[account("other")], &[PORT]);
    cluster.catalog.write()?;
    wait_until_cut(&cluster, "denied", 1)?;
    let ended = one.wait()?;
    let call: Call = ended.json()?;
    ensure!(!call.ok, "{call:?}");
    ensure!(call.error.as_deref().is_some_and(|error| error.contains("reset")), "the application sees RST: {call:?}");
    let refused = cluster.attempt("other", &["call", "blocking", &vips[0], "--greet"])?;
    assert_eq!(refused.errno.as_deref(), Some("EACCES"), "{refused:?}");
    wait::until("the access log of whoever cut it tells the rule", BOUND, || {
        cluster.daemons().find_map(|daemon| {
            let accesses = daemon.accesses();
            let cut = accesses.iter().find(|access| access.reason.as_deref() == Some("cut"))?;
            let told = (cut.policy.as_deref(), cut.rule.as_deref());
            (told == (Some("default/block"), Some("no-other"))).then_some(())
        })
    })?;

    // The thousand are as they were, and still carry bytes when they end.
    ensure!(crowd.is_running(), "{}", crowd.printed());
    let call: Call = crowd.wait()?.success()?.json()?;
    assert_eq!(call.connections.to_string(), MANY);

    // What policy allows again works again.
    ensure!(cluster.catalog.remove_policy("block"));
    cluster.catalog.write()?;
    cluster.wait_until_served("other", "server")
}

#[test]
fn a_thousand_connections_are_cut_by_one_change() -> Result<()> {
    let (mut cluster, _echo) = start("crowd")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let crowd = cluster.hold("client", [vip.as_str(), "--greet", "--count", MANY])?;
    let mut one = cluster.hold("other", [vip.as_str(), "--greet", "--chatter"])?;
    // Nobody is named: the client is not allowed any more.
    cluster.catalog.policy("callers").for_app("server").rule("other", &[account("other")], &[]);
    let started = Instant::now();
    cluster.catalog.write()?;
    wait_until_cut(&cluster, "not_allowed", MANY.parse()?)?;
    println!("{MANY} live connections were cut {} ms after the catalog was written", started.elapsed().as_millis());
    let call: Call = crowd.wait()?.json()?;
    assert_eq!((call.ok, call.connections), (false, 0), "{call:?}");
    ensure!(one.is_running(), "{}", one.printed());
    one.wait()?.success()?;
    Ok(())
}

#[test]
fn a_connection_ends_with_the_identity_it_was_made_under() -> Result<()> {
    let (mut cluster, _echo) = start("renamed")?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let held = cluster.hold("other", [vip.as_str(), "--greet"])?;
    let mut client = cluster.hold("client", [vip.as_str(), "--greet"])?;
    ensure!(cluster.catalog.remove("other"));
    cluster.catalog.write()?;
    // Whichever node hears of it first ends it: the caller's by disarming, the other by cutting.
    wait::until_ok("a node says why it has ended the connection", BOUND, || {
        let cut = cluster.daemon("n2").metrics()?.count(CUT, &[("reason", "source_gone")]);
        let removed = cluster.daemon("n1").metrics()?.failed("source", "workload_removed");
        let log = cluster.daemon("n1").log_end();
        ensure!(cut == 1 || removed == 1, "cut {cut}, removed {removed}\n{log}");
        Ok(())
    })?;
    let call: Call = held.wait()?.json()?;
    ensure!(!call.ok, "{call:?}");
    ensure!(client.is_running(), "{}", client.printed());
    client.wait()?.success()?;
    Ok(())
}
