//! The catalog changes while traffic runs: what should stay stays, what is wrong is told and changes nothing.

use anyhow::Result;
use mesh_tests::catalog::Catalog;
use mesh_tests::cluster::Cluster;
use mesh_tests::policy::account;
use mesh_tests::program::{Program, binary};
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use mesh_userspace::admin::documents::{DiagnosticRow, Document, ServiceRow};
use std::fs;
use std::net::SocketAddr;

/// Three instances of one service on two nodes, and clients on both.
fn cluster(name: &str) -> Result<Cluster> {
    let topology = World::named(name).node("n1").pods(&["client", "web-a"]).node("n2").pods(&["web-b", "web-c"]);
    Cluster::start(topology, |catalog| {
        // What the daemons carry is looked at here, on one node or between two.
        catalog.same_node("Tunnel");
        catalog.service("web", 80, 8080);
        for name in ["web-a", "web-b", "web-c"] {
            catalog.workload(name).of_app("web");
        }
    })
}

fn endpoints(cluster: &Cluster, node: &str, service: &str) -> Option<u64> {
    let document: Document<ServiceRow> = cluster.document(node, &["get", "services"]).ok()?;
    document.items.iter().find(|row| row.name == service).map(|row| row.endpoints.total)
}

/// Waits until both nodes see this many endpoints of a service.
fn wait_for_endpoints(cluster: &Cluster, service: &str, wanted: Option<u64>) -> Result<()> {
    for node in ["n1", "n2"] {
        wait::until(&format!("{node} sees {wanted:?} endpoints of {service}"), BOUND, || {
            (endpoints(cluster, node, service) == wanted).then_some(())
        })?;
    }
    Ok(())
}

fn generation(cluster: &Cluster, node: &str) -> Result<u64> {
    Ok(cluster.status(node)?["config"]["generation"].as_u64().unwrap_or_default())
}

fn many(cluster: &Cluster, vip: SocketAddr, count: u32) -> Result<Call> {
    cluster.run_probe("client", ["many", &vip.to_string(), "--greet", "--count", &count.to_string()])
}

#[test]
fn streams_survive_every_change_that_is_not_about_them() -> Result<()> {
    let mut cluster = cluster("changes")?;
    let _servers = ["web-a", "web-b", "web-c"]
        .map(|pod| cluster.serve(pod, 8080, &["--greet", "--name", pod]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    wait_for_endpoints(&cluster, "web", Some(3))?;
    let vip = cluster.catalog.vips("web")[0];
    // By the pods' own addresses, so that it is known where each stream goes; chattering and idle ones.
    let direct = |pod: &str| SocketAddr::new(cluster.world.pod(pod).v4().into(), 8080).to_string();
    let stays = [direct("web-a"), direct("web-b")];
    let mut held = Vec::new();
    for address in &stays {
        held.push(cluster.hold("client", [address, "--greet", "--count", "4", "--chatter"])?);
        held.push(cluster.hold("client", [address, "--greet", "--count", "4"])?);
    }
    let doomed = cluster.hold("client", [&direct("web-c"), "--greet", "--count", "2"])?;
    let captured = cluster.outcome("n1", "connect", "captured")?;
    assert_eq!(captured, 18);

    // Services come and go, and change.
    for round in 0..5 {
        cluster.catalog.service(&format!("extra-{round}"), 1000 + round, 8080).selector =
            [("app".to_owned(), "web".to_owned())].into();
    }
    cluster.catalog.write()?;
    wait_for_endpoints(&cluster, "extra-4", Some(3))?;
    assert_eq!(many(&cluster, cluster.catalog.vips("extra-4")[0], 20)?.connections, 20);
    for round in 0..5 {
        cluster.catalog.remove_service(&format!("extra-{round}"));
    }
    cluster.catalog.service_mut("web").ports.push((81, 8080.into()));
    cluster.catalog.write()?;
    wait_for_endpoints(&cluster, "extra-0", None)?;

    // Labels and weights: an instance leaves the service, and gets no new connection, but keeps its old ones.
    cluster.catalog.workload("web-b").label("app", "retired");
    cluster.catalog.workload("web-a").weight = 1;
    cluster.catalog.write()?;
    wait_for_endpoints(&cluster, "web", Some(2))?;
    let spread = many(&cluster, vip, 200)?;
    assert!(!spread.servers.contains_key("web-b"), "{:?}", spread.servers);
    assert!(spread.servers["web-c"] > 150, "100 times the weight: {:?}", spread.servers);

    // A workload goes: its own streams end, the others' do not.
    cluster.catalog.remove("web-c");
    cluster.catalog.write()?;
    wait_for_endpoints(&cluster, "web", Some(1))?;
    assert!(!doomed.wait()?.status.success());
    assert_eq!(many(&cluster, vip, 50)?.servers.keys().collect::<Vec<_>>(), ["web-a"]);

    // A pod that was not there before, and one that comes back into the service.
    let pod = cluster.world.add_pod("n2", "web-d")?;
    cluster.catalog.add(pod, None).of_app("web");
    cluster.catalog.workload("web-b").label("app", "web");
    cluster.catalog.workload("web-a").weight = 100;
    cluster.catalog.write()?;
    let _new = cluster.serve("web-d", 8080, &["--greet", "--name", "web-d"])?;
    wait_for_endpoints(&cluster, "web", Some(3))?;
    wait::until_ok("the new pod is armed", BOUND, || {
        let spread = many(&cluster, vip, 60)?;
        anyhow::ensure!(
            ["web-a", "web-b", "web-d"].iter().all(|name| spread.servers.contains_key(*name)),
            "{spread:?}"
        );
        Ok(())
    })?;

    for held in held {
        let call: Call = held.wait()?.success()?.json()?;
        assert_eq!(call.connections, 4);
    }
    Ok(())
}

#[test]
fn a_broken_file_is_told_with_code_and_place_and_changes_nothing() -> Result<()> {
    let mut cluster = cluster("broken")?;
    let _servers = ["web-a", "web-b", "web-c"]
        .map(|pod| cluster.serve(pod, 8080, &["--greet", "--name", pod]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let vip = cluster.catalog.vips("web")[0];
    wait_for_endpoints(&cluster, "web", Some(3))?;
    let held = cluster.hold("client", [&vip.to_string(), "--greet", "--count", "6", "--chatter"])?;
    let validate = |arguments: &[&str]| {
        let folder = cluster.catalog.folder().display().to_string();
        let program = Program::new(binary("nodemesh")).args([&["validate", &folder], arguments].concat());
        program.run_in(cluster.world.node("n1"))
    };
    let sound = validate(&[])?;
    assert_eq!((sound.status.code(), sound.stdout.trim()), (Some(0), "no findings"));
    let generations = [generation(&cluster, "n1")?, generation(&cluster, "n2")?];

    // A misspelt field in the service that clients use.
    let path = cluster.catalog.folder().join("services.yaml");
    let whole = fs::read_to_string(&path)?;
    let bad = whole.replacen("selector:", "selektor:", 1);
    assert_ne!(bad, whole);
    let line = bad.lines().position(|line| line.contains("selektor:")).expect("it is there") as u32 + 1;
    let column =
        bad.lines().nth(line as usize - 1).and_then(|line| line.find("selektor")).expect("it is there") as u32 + 1;
    cluster.catalog.write_file("services.yaml", &bad)?;
    for node in ["n1", "n2"] {
        let found = wait::until(&format!("{node} tells what is wrong"), BOUND, || {
            let document: Document<DiagnosticRow> = cluster.document(node, &["get", "diagnostics"]).ok()?;
            document.items.into_iter().find(|row| row.file == "services.yaml")
        })?;
        assert_eq!((found.code.as_str(), found.line, found.column), ("M0203", line, column), "{found:?}");
        assert_eq!(found.severity, "error");
        let text = format!("{} {}", found.message, found.help.unwrap_or_default());
        assert!(text.contains("selektor") && text.contains("selector"), "{text}");
        assert!(cluster.status(node)?["config"]["errors"].as_u64() > Some(0));
        let errors = cluster.daemon(node).metrics()?.count("nodemesh_config_errors", &[("code", "M0203")]);
        assert_eq!(errors, 1);
        let log = cluster.daemon(node).log();
        assert!(log.contains("M0203") && log.contains(&format!("services.yaml:{line}:{column}")), "{log}");
    }
    let told = validate(&["-o", "json"])?;
    assert_eq!(told.status.code(), Some(3));
    let document: Document<DiagnosticRow> = told.json()?;
    assert!(document.items.iter().any(|row| row.code == "M0203" && (row.line, row.column) == (line, column)));
    let told = validate(&[])?;
    assert_eq!(told.status.code(), Some(3));
    assert!(told.stdout.contains(&format!("services.yaml:{line}:{column}")), "{}", told.stdout);

    // No YAML at all, beside it.
    cluster.catalog.write_file("torn.yaml", "apiVersion: v1\nkind: [Service\n")?;
    for node in ["n1", "n2"] {
        wait::until(&format!("{node} tells of the torn file"), BOUND, || {
            let document: Document<DiagnosticRow> = cluster.document(node, &["get", "diagnostics"]).ok()?;
            document.items.into_iter().find(|row| row.file == "torn.yaml" && row.line > 0)
        })?;
    }

    // Nothing of it took effect.
    assert_eq!([generation(&cluster, "n1")?, generation(&cluster, "n2")?], generations);
    wait_for_endpoints(&cluster, "web", Some(3))?;
    let spread = many(&cluster, vip, 90)?;
    assert_eq!((spread.connections, spread.servers.len()), (90, 3));

    // Good files beside the broken ones still apply.
    let pod = cluster.world.add_pod("n1", "late")?;
    cluster.catalog.add(pod, None).of_app("web");
    cluster.catalog.write_only("workloads.yaml")?;
    let _late = cluster.serve("late", 8080, &["--greet", "--name", "late"])?;
    wait_for_endpoints(&cluster, "web", Some(4))?;

    // Repaired, it applies, and the findings go.
    cluster.catalog.remove_file("torn.yaml")?;
    cluster.catalog.service_mut("web").ports.push((81, 8080.into()));
    cluster.catalog.write()?;
    let second = SocketAddr::new(vip.ip(), 81);
    for node in ["n1", "n2"] {
        wait::until(&format!("{node} has no findings"), BOUND, || {
            let status = cluster.status(node).ok()?;
            (status["config"]["errors"].as_u64() == Some(0)).then_some(())
        })?;
        let metrics = cluster.daemon(node).metrics()?;
        assert_eq!(metrics.count("nodemesh_config_errors", &[]), 0);
    }
    wait::until_ok("the second port works", BOUND, || many(&cluster, second, 1))?;
    assert_eq!(many(&cluster, second, 40)?.connections, 40);
    assert_eq!(held.wait()?.success()?.json::<Call>()?.connections, 6);
    assert!(cluster.outcome("n1", "connect", "captured")? >= 6 + 90 + 40);
    Ok(())
}

#[test]
fn a_catalog_that_is_emptied_and_filled_again_needs_no_restart() -> Result<()> {
    let mut cluster = Cluster::pair("emptied")?;
    let _echo = cluster.serve("server", 8080, &[])?;
    cluster.wait_until_served("client", "server")?;
    let files = ["workloads.yaml", "services.yaml"];
    for file in files {
        cluster.catalog.remove_file(file)?;
    }
    for node in ["n1", "n2"] {
        wait::until(&format!("{node} has no workload"), BOUND, || {
            let status = cluster.status(node).ok()?;
            (status["workloads"]["armed"].as_u64() == Some(0)).then_some(())
        })?;
    }
    // Unmeshed now: the application's own address is reached directly.
    let direct = SocketAddr::new(cluster.world.pod("server").v4().into(), 8080);
    let captured = cluster.outcome("n1", "connect", "captured")?;
    let call = cluster.run_probe("client", ["call", "blocking", &direct.to_string()])?;
    assert!(call.ok);
    assert_eq!(cluster.outcome("n1", "connect", "captured")?, captured);
    cluster.catalog.write()?;
    cluster.wait_until_served("client", "server")?;
    assert!(cluster.outcome("n1", "connect", "captured")? > captured);
    // The description of the test's own catalog is what it was: nothing but files changed.
    let _: &Catalog = &cluster.catalog;
    cluster.catalog.workload("server").weight = 50;
    cluster.catalog.write()?;
    cluster.wait_until_served("client", "server")
}

/// Waits until a node finds this in a file of the catalog.
fn wait_for_finding(cluster: &Cluster, node: &str, file: &str, code: &str) -> Result<DiagnosticRow> {
    wait::until(&format!("{node} tells of {code} in {file}"), BOUND, || {
        let document: Document<DiagnosticRow> = cluster.document(node, &["get", "diagnostics"]).ok()?;
        document.items.into_iter().find(|row| row.file == file && row.code == code)
    })
}

/// Waits until calls to `server` from `client` and from `other` go well, or do not.
fn wait_for_calls(cluster: &Cluster, client: bool, other: bool) -> Result<()> {
    let vip = cluster.catalog.vips("server")[0].to_string();
    for (pod, wanted) in [("client", client), ("other", other)] {
        wait::until_ok(
            &format!("a call from {pod} is {}", if wanted { "answered" } else { "refused" }),
            BOUND,
            || {
                let call = cluster.attempt(pod, &["call", "blocking", &vip])?;
                anyhow::ensure!(call.ok == wanted, "{call:?}");
                Ok(())
            },
        )?;
    }
    Ok(())
}

#[test]
fn a_policy_that_breaks_stays_in_force_and_one_that_never_was_good_closes() -> Result<()> {
    let topology = World::named("policies").node("n1").pods(&["client", "other"]).node("n2").pod("server");
    let mut cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    wait_for_calls(&cluster, true, true)?;
    let from_client = [account("client")];
    cluster.catalog.policy("server").for_app("server").rule("from-client", &from_client, &[8080]);
    cluster.catalog.write()?;
    wait_for_calls(&cluster, true, false)?;
    // The source's node refuses by itself: the other one may not have read the policy yet.
    let generations = wait::until("both nodes have read the policy", wait::BOUND, || {
        let [n1, n2] = ["n1", "n2"].map(|node| generation(&cluster, node).ok());
        (n1.is_some() && n1 == n2).then_some([n1?, n2?])
    })?;

    // Misspelt: told, and as before.
    let sound = fs::read_to_string(cluster.catalog.folder().join("policies.yaml"))?;
    let broken = sound.replace("sources:", "source:");
    assert_ne!(broken, sound);
    cluster.catalog.write_file("policies.yaml", &broken)?;
    for node in ["n1", "n2"] {
        let found = wait_for_finding(&cluster, node, "policies.yaml", "M0203")?;
        assert!(found.help.as_deref().is_some_and(|help| help.contains("`sources`")), "{found:?}");
    }
    wait_for_calls(&cluster, true, false)?;
    assert_eq!([generation(&cluster, "n1")?, generation(&cluster, "n2")?], generations);

    // A daemon that starts now has never seen it sound: it lets nobody in.
    cluster.daemon_mut("n2").stop()?;
    cluster.daemon_mut("n2").start()?;
    wait_for_finding(&cluster, "n2", "policies.yaml", "M0321")?;
    wait_for_calls(&cluster, false, false)?;
    let validate = cluster.nodemesh("n1", &["validate", &cluster.catalog.folder().display().to_string()])?;
    assert!(validate.status.code() == Some(3) && validate.stdout.contains("error[M0321]"), "{validate:?}");

    // Mended, it is what it says; removed, nothing is denied.
    cluster.catalog.write()?;
    wait_for_calls(&cluster, true, false)?;
    assert!(cluster.catalog.remove_policy("server"));
    cluster.catalog.write()?;
    wait_for_calls(&cluster, true, true)
}

#[test]
fn defaults_of_mesh_namespace_and_workload_decide_where_no_policy_does() -> Result<()> {
    let topology = World::named("defaults").node("n1").pods(&["client", "other"]).node("n2").pod("server");
    let mut cluster = Cluster::start(topology, |catalog| {
        catalog.service("server", 80, 8080);
        catalog.default_action("deny");
        catalog.denied_error("ECONNREFUSED");
    })?;
    let _echo = cluster.serve("server", 8080, &[])?;
    wait_for_calls(&cluster, false, false)?;
    let vip = cluster.catalog.vips("server")[0].to_string();
    let call = cluster.attempt("client", &["call", "blocking", &vip])?;
    assert_eq!(call.errno.as_deref(), Some("ECONNREFUSED"), "{call:?}");
    cluster.catalog.namespace("default", "nodemesh.io/default-action", "allow");
    cluster.catalog.write()?;
    wait_for_calls(&cluster, true, true)?;
    cluster.catalog.workload("server").default_action("deny");
    let rules = "rules: [{sources: [{type: SPIFFE, spiffe: 'spiffe://mesh.test/ns/*/sa/other'}]}]";
    let policy = "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: by-hand}\n";
    cluster.catalog.document("by-hand", &format!("{policy}spec: {{{rules}}}\n"));
    cluster.catalog.write()?;
    wait_for_calls(&cluster, false, true)?;
    assert!(cluster.catalog.remove_document("by-hand"));
    cluster.catalog.write()?;
    wait_for_calls(&cluster, false, false)
}
