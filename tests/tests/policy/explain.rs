//! `nodemesh explain` says what really happens.

use crate::{PORT, start};
use anyhow::{Result, ensure};
use mesh_tests::policy::{account, range};
use mesh_tests::wait::{self, BOUND};
use std::net::SocketAddr;

#[test]
fn an_explanation_agrees_with_what_happens() -> Result<()> {
    let (mut cluster, _echo) = start("explain")?;
    let _second = cluster.serve("server", 9090, &["--greet"])?;
    let outsider = cluster.world.pod("outsider").v4().to_string();
    cluster.catalog.workload("server").mode("permissive").port_modes.insert(9090, "strict".to_owned());
    let callers = cluster.catalog.policy("callers").for_app("server");
    callers.rule("client", &[account("client")], &[]).rule("there", &[range(&format!("{outsider}/32"))], &[PORT]);
    cluster.catalog.write()?;
    let explain = |source: &str, destination: &str| cluster.nodemesh("n1", &["explain", source, destination]);
    wait::until("the policy is there", BOUND, || {
        (explain("default/other", "default/server:80").ok()?.status.code() == Some(3)).then_some(())
    })?;
    let own = cluster.world.pod("server").v4();
    let (vip, direct) = (cluster.catalog.vips("server")[0], |port| SocketAddr::new(own.into(), port));
    let mut refused = Vec::new();
    for (pod, source) in [("client", "default/client"), ("other", "default/other"), ("outsider", outsider.as_str())] {
        for (name, address) in [
            ("default/server:80".to_owned(), vip),
            (vip.to_string(), vip),
            (direct(PORT).to_string(), direct(PORT)),
            (direct(9090).to_string(), direct(9090)),
        ] {
            if pod == "outsider" && address == vip {
                continue;
            }
            let call = cluster.attempt(pod, &["call", "blocking", &address.to_string(), "--greet"])?;
            let told = explain(source, &name)?;
            let expected = if call.ok { 0 } else { 3 };
            ensure!(told.status.code() == Some(expected), "{source} to {name}: {call:?}\n{}", told.stdout);
            if !call.ok {
                refused.push(format!("{pod} {name}"));
                ensure!(told.stdout.contains("deny"), "{}", told.stdout);
            }
        }
    }
    // Both answers were seen: `other` has no way in, and the outsider one.
    assert_eq!(refused.len(), 5, "{refused:?}");
    let told = explain("default/other", "default/server")?.stdout;
    for part in ["spiffe://mesh.test/ns/default/sa/other", "node n2", "mtls over lanes", "policy default/callers"] {
        ensure!(told.contains(part), "{part} is not in {told}");
    }
    let unknown = explain("default/nobody", "default/server")?;
    ensure!(unknown.status.code() == Some(1) && unknown.stderr.contains("no workload default/nobody"), "{unknown:?}");
    Ok(())
}
