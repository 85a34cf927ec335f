//! Certificates that are replaced while traffic runs.

use anyhow::{Context, Result};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::Cluster;
use mesh_tests::wait::{self, BOUND};
use rustix::process::Signal;
use std::fs;
use std::path::PathBuf;

fn serial(cluster: &Cluster, node: &str, id: &str) -> Result<String> {
    let status = cluster.status(node)?;
    let certificates = status["certificates"].as_array().context("certificates are listed")?;
    let own = certificates.iter().find(|certificate| certificate["id"] == id).context("the identity is listed")?;
    Ok(own["serial"].as_str().context("a serial is a string")?.to_owned())
}

#[test]
fn identities_are_read_anew_on_sighup_and_a_broken_folder_changes_nothing() -> Result<()> {
    let cluster = Cluster::pair("hup")?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let daemon = cluster.daemon("n2");
    let id = cluster.authority.spiffe_id(NAMESPACE, "server");
    let old = serial(&cluster, "n2", &id)?;

    cluster.authority.issue(NAMESPACE, "server", &cluster.identities("n2"))?;
    assert_eq!(serial(&cluster, "n2", &id)?, old, "a new file alone changes nothing");
    daemon.signal(Signal::HUP)?;
    let renewed = wait::until_ok("the new certificate is in use", BOUND, || {
        let now = serial(&cluster, "n2", &id)?;
        anyhow::ensure!(now != old, "still {now}");
        Ok(now)
    })?;
    cluster.wait_until_served("client", "server")?;

    let folder: PathBuf = cluster.identities("n2").join("ns").join(NAMESPACE).join("sa").join("server");
    fs::write(folder.join("cert.pem"), "no certificate")?;
    daemon.signal(Signal::HUP)?;
    wait::until("the daemon says that it cannot read them", BOUND, || {
        daemon.log().contains("cannot read the identities anew").then_some(())
    })?;
    assert_eq!(serial(&cluster, "n2", &id)?, renewed);
    cluster.wait_until_served("client", "server")
}
