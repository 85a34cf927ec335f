//! Policies that report only.

use crate::{VERDICTS, start, wait_for_verdicts};
use anyhow::{Context, Result, ensure};
use mesh_tests::policy::account;
use mesh_tests::wait::{self, BOUND};
use mesh_userspace::admin::documents::Document;
use mesh_userspace::admin::policies::PolicyRow;

#[test]
fn audit_and_dry_run_report_and_enforce_nothing() -> Result<()> {
    let (mut cluster, _echo) = start("dry-run")?;
    cluster.catalog.policy("watch").action("AUDIT").for_app("server").rule("all", &[account("*")], &[]);
    let trial = cluster.catalog.policy("trial").action("DENY").dry_run(true);
    trial.for_app("server").rule("no-other", &[account("other")], &[]);
    cluster.catalog.write()?;
    let policies =
        || -> Result<Vec<PolicyRow>> { Ok(cluster.document::<Document<PolicyRow>>("n2", &["get", "policies"])?.items) };
    wait::until("both nodes have the policies", BOUND, || (policies().ok()?.len() == 2).then_some(()))?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let before = cluster.daemon("n2").metrics()?;
    for caller in ["client", "other"] {
        let call = cluster.attempt(caller, &["call", "blocking", &vip, "--greet"])?;
        ensure!(call.ok, "{caller}: {call:?}");
    }
    let n2 = cluster.daemon("n2");
    let audit = [("verdict", "audit"), ("policy", "default/watch"), ("rule", "all"), ("enforced_by", "destination")];
    wait_for_verdicts(n2, &before, &audit, 2)?;
    let would_be = [("verdict", "dry_run_deny"), ("policy", "default/trial"), ("rule", "no-other")];
    wait_for_verdicts(n2, &before, &would_be, 1)?;
    assert_eq!(n2.metrics()?.count(VERDICTS, &[("verdict", "deny")]), 0);
    let log = n2.log();
    for parts in [["\"audit\"", "default/watch"], ["\"dry_run_deny\"", "default/trial"]] {
        ensure!(log.lines().any(|line| parts.iter().all(|part| line.contains(part))), "{parts:?}: {log}");
    }

    let rows = policies()?;
    let find = |name: &str| rows.iter().find(|row| row.name == name).with_context(|| format!("{rows:?}"));
    let (trial, watch) = (find("trial")?, find("watch")?);
    assert_eq!((trial.action.as_str(), trial.dry_run, trial.hits), ("DENY", true, 1));
    assert_eq!((watch.action.as_str(), watch.dry_run, watch.hits), ("AUDIT", false, 2));
    assert_eq!((trial.workloads.total, trial.workloads.local), (1, 1));
    assert_eq!(trial.rules[0].sources, ["account default/other"]);
    Ok(())
}
