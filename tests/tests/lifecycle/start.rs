//! Daemons that may not start.

use crate::{Footprints, is_mounted, pins};
use anyhow::Result;
use mesh_tests::authority::Authority;
use mesh_tests::catalog::{Catalog, NAMESPACE};
use mesh_tests::cgroup;
use mesh_tests::cluster::{Cluster, TRUST_DOMAIN};
use mesh_tests::daemon::Daemon;
use mesh_tests::kernel::Pinned;
use mesh_tests::program::{Output, Program, binary};
use mesh_tests::report::Call;
use mesh_tests::world::World;
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// `nodemeshd run` with a changed copy of a daemon's configuration; it must end by itself.
fn run_changed(daemon: &Daemon, name: &str, change: impl FnOnce(&mut Value)) -> Result<Output> {
    let mut document: Value = serde_saphyr::from_str(&fs::read_to_string(daemon.config())?)?;
    change(&mut document);
    let path = daemon.config().with_file_name(name);
    fs::write(&path, serde_saphyr::to_string(&document)?)?;
    let program = Program::new(binary("nodemeshd")).args(["run", "-c"]).args([&path]);
    program.within(Duration::from_secs(30)).run_in(daemon.place())
}

fn elsewhere(daemon: &Daemon, config: &mut Value) {
    config["tunnel"]["listen"] = json!(["127.0.0.1:15009"]);
    config["admin"] = json!({"socket": daemon.socket().with_file_name("second.sock"), "listen": "127.0.0.1:9416"});
}

#[test]
fn a_second_daemon_on_the_same_node_is_refused_and_disturbs_nothing() -> Result<()> {
    let cluster = Cluster::pair("second")?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let daemon = cluster.daemon("n1");
    let held = cluster.hold("client", [&cluster.catalog.vips("server")[0].to_string(), "--chatter"])?;
    let before = Pinned::below(&pins(daemon))?;

    let same_pins = run_changed(daemon, "second.yaml", |config| elsewhere(daemon, config))?;
    assert!(same_pins.stderr.contains("another nodemeshd is running"), "{same_pins:?}");
    assert!(!daemon.socket().with_file_name("second.sock").exists());
    let all_the_same = run_changed(daemon, "same.yaml", |_| {})?;
    assert!(all_the_same.stderr.contains("9415: Address already in use"), "{all_the_same:?}");
    let cleanup = cluster.nodemeshd("n1", "cleanup")?;
    assert!(cleanup.stderr.contains("another nodemeshd is running"), "{cleanup:?}");
    for refused in [same_pins, all_the_same, cleanup] {
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    }

    assert_eq!(Pinned::below(&pins(daemon))?, before);
    assert_eq!(cluster.status("n1")?["ready"], json!(true));
    assert_eq!(held.wait()?.success()?.json::<Call>()?.connections, 1);
    cluster.wait_until_served("client", "server")
}

#[test]
fn a_start_that_cannot_succeed_says_why_and_leaves_nothing() -> Result<()> {
    let world = World::named("badstart").node("n1").pod("client").build()?;
    let folder = world.folder();
    let authority = Authority::create(&folder.join("ca"), TRUST_DOMAIN)?;
    let catalog = Catalog::of(&world, folder.join("catalog"), TRUST_DOMAIN)?;
    catalog.write()?;
    let identities = folder.join("identity");
    authority.issue(NAMESPACE, "client", &identities)?;
    let daemon = Daemon::new(world.node("n1"), catalog.folder(), &identities)?;
    let untouched = Footprints::of_world(&world)?;

    let no_mesh = folder.join("no-mesh");
    fs::create_dir(&no_mesh)?;
    fs::copy(catalog.folder().join("nodes.yaml"), no_mesh.join("nodes.yaml"))?;
    let foreign = folder.join("foreign");
    Authority::create(&folder.join("foreign-ca"), "elsewhere.test")?.issue(NAMESPACE, "client", &foreign)?;
    let torn = folder.join("torn");
    authority.issue(NAMESPACE, "client", &torn)?;
    fs::write(torn.join("ns/default/sa/client/cert.pem"), "not a certificate")?;
    let open = folder.join("open");
    authority.issue(NAMESPACE, "client", &open)?;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(open.join("ns/default/sa/client/key.pem"), readable)?;
    let root = cgroup::mount_point()?;
    let absent = folder.join("absent");

    type Change<'a> = Box<dyn Fn(&mut Value) + 'a>;
    let cases: [(&str, Change<'_>, Vec<String>); 9] = [
        ("the root cgroup", Box::new(|c| c["cgroup"] = json!(root)), vec!["root of the cgroup".into()]),
        ("no such cgroup", Box::new(|c| c["cgroup"] = json!(absent)), vec![absent.display().to_string()]),
        ("no MeshConfig", Box::new(|c| c["catalog"]["directory"] = json!(no_mesh)), vec!["MeshConfig".into()]),
        ("no catalog", Box::new(|c| c["catalog"]["directory"] = json!(absent)), vec![absent.display().to_string()]),
        ("no identities", Box::new(|c| c["identity"]["directory"] = json!(absent)), vec![absent.display().to_string()]),
        (
            "another trust domain",
            Box::new(|c| c["identity"]["directory"] = json!(foreign)),
            vec!["elsewhere.test".into(), TRUST_DOMAIN.into()],
        ),
        ("a torn certificate", Box::new(|c| c["identity"]["directory"] = json!(torn)), vec!["cert.pem".into()]),
        ("a key for all to read", Box::new(|c| c["identity"]["directory"] = json!(open)), vec!["key.pem".into()]),
        (
            "an address of others",
            Box::new(|c| c["tunnel"]["listen"] = json!(["192.0.2.1:15008"])),
            vec!["tunnel.listen".into()],
        ),
    ];
    for (what, change, words) in cases {
        let output = run_changed(&daemon, "bad.yaml", |config| change(config))?;
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        for word in words {
            assert!(output.stderr.contains(&word), "{what} must be told with {word:?}: {}", output.stderr);
        }
        assert!(!output.stderr.contains("panicked"), "{what}: {}", output.stderr);
        assert!(!is_mounted(daemon.bpffs())? && !daemon.socket().exists(), "{what} left something");
        assert_eq!(Footprints::of_world(&world)?, untouched, "{what} left something");
    }
    let unknown = run_changed(&daemon, "bad.yaml", |config| config["tunnels"] = json!({}))?;
    assert!(!unknown.status.success() && unknown.stderr.contains("tunnels"), "{unknown:?}");
    // The same folders are fine as they should be.
    let mut daemon = daemon;
    daemon.start()?;
    assert!(daemon.stop()?.success());
    Ok(())
}
