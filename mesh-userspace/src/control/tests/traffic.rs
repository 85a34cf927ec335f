//! Traffic policies and what services and nodes say about traffic: read as written, and the last good version stays.

use super::*;
use crate::engine::{Engine, Locality};
use crate::model::{
    Affinity, Algorithm, Catalog, Ejection, HealthCheck, Limits, NodeName, ObjectName, Prefer, Probe, Retry, SameNode,
    Traffic, TrafficPolicy, TrafficSpec, Update,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn scanned(files: &[(&str, &str)]) -> (tempfile::TempDir, Directory) {
    let directory = tempfile::tempdir().unwrap();
    let sound = [("mesh.yaml", MESH), ("node.yaml", NODE), ("web.yaml", &service("web", "10.96.0.1"))];
    for (file, text) in sound.iter().chain(files) {
        write(directory.path(), file, text);
    }
    write(directory.path(), "w.yaml", &workload("w", "10.0.1.1"));
    let mut catalog = Directory::new(directory.path());
    catalog.scan();
    (directory, catalog)
}

fn name(name: &str) -> ObjectName {
    ObjectName::parse("shop", name).unwrap()
}

fn policy<'c>(catalog: &'c Directory, policy: &str) -> &'c TrafficPolicy {
    let found = catalog.catalog().traffic.get(&name(policy));
    found.unwrap_or_else(|| panic!("no {policy}: {:?}", catalog.diagnostics()))
}

const FULL: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: web, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  loadBalancing: {algorithm: PeakEWMA, slowStart: 1m30s, preference: SameNode, failoverPercent: 0}
  sessionAffinity: {type: ClientIP, timeout: 10m}
  timeouts: {connect: 200ms, idle: 1h}
  retry: {attempts: 2, budgetPercent: 10, budgetMinimum: 1}
  ejection: {consecutiveFailures: 3, baseTime: 500ms, maxTime: 1m, maxPercent: 30}
  healthCheck:
    interval: 2s
    timeout: 100ms
    unhealthyAfter: 4
    healthyAfter: 2
    http: {path: '/healthz?full=1', host: 'web.shop:8080'}
  limits: {maxConnections: 100, maxPending: 10}
  sameNode: Tunnel
status: {}
";

#[test]
fn a_traffic_policy_says_what_was_written() {
    let (_directory, catalog) = scanned(&[("p.yaml", FULL)]);
    assert_eq!(catalog.diagnostics(), []);
    let probe = Probe::Http { path: "/healthz?full=1".into(), host: Some("web.shop:8080".into()) };
    let spec = TrafficSpec {
        algorithm: Some(Algorithm::PeakEwma),
        affinity: Some(Affinity::ClientIp(Duration::from_mins(10))),
        slow_start: Some(Duration::from_secs(90)),
        prefer: Some(Prefer::SameNode),
        failover_percent: Some(0),
        connect_timeout: Some(Duration::from_millis(200)),
        idle_timeout: Some(Duration::from_hours(1)),
        retry: Some(Retry { attempts: 2, budget_percent: 10, budget_minimum: 1 }),
        ejection: Some(Ejection {
            consecutive_failures: 3,
            base_time: Duration::from_millis(500),
            max_time: Duration::from_mins(1),
            max_percent: 30,
        }),
        health_check: Some(HealthCheck {
            probe,
            interval: Duration::from_secs(2),
            timeout: Duration::from_millis(100),
            unhealthy_after: 4,
            healthy_after: 2,
        }),
        limits: Some(Limits { max_connections: Some(100), max_pending: Some(10) }),
        same_node: Some(SameNode::Tunnel),
    };
    let expected = TrafficPolicy { name: name("web"), services: vec![name("web")], spec };
    assert_eq!(*policy(&catalog, "web"), expected);
    assert_eq!(crate::control::count(catalog.resolver())["TrafficPolicy"], 1);
}

#[test]
fn what_a_policy_leaves_out_has_its_default() {
    let silent = traffic("p", "{targetRefs: [{kind: Service, name: web}]}");
    let (directory, mut catalog) = scanned(&[("p.yaml", &silent)]);
    assert_eq!(policy(&catalog, "p").spec, TrafficSpec::default());
    let sparse = "{targetRefs: [{kind: Service, name: web}], sessionAffinity: {type: ClientIP}, retry: {attempts: 0}, \
                  ejection: {maxTime: 5s}, healthCheck: {interval: 500ms, grpc: {}}, limits: {maxPending: 1}}";
    write(directory.path(), "p.yaml", &traffic("p", sparse));
    catalog.scan();
    let spec = &policy(&catalog, "p").spec;
    assert_eq!(spec.affinity, Some(Affinity::ClientIp(Duration::from_secs(10_800))));
    assert_eq!(spec.retry, Some(Retry { attempts: 0, ..Retry::default() }));
    // The shorter one takes the base along, and a probe ends within its interval.
    let five = Duration::from_secs(5);
    assert_eq!(spec.ejection, Some(Ejection { base_time: five, max_time: five, ..Ejection::default() }));
    let half = Duration::from_millis(500);
    let check = spec.health_check.as_ref().unwrap();
    assert_eq!((check.interval, check.timeout, check.unhealthy_after, check.healthy_after), (half, half, 3, 1));
    assert_eq!(check.probe, Probe::Grpc { service: String::new() });
    assert_eq!(spec.limits, Some(Limits { max_connections: None, max_pending: Some(1) }));
}

#[test]
fn a_traffic_policy_that_breaks_keeps_its_last_good_version_and_none_stands_in() {
    let (directory, mut catalog) = scanned(&[("p.yaml", FULL)]);
    let before = policy(&catalog, "web").clone();
    let misspelt = FULL.replace("loadBalancing", "loadBalancer");
    for broken in [&*misspelt, &FULL[..FULL.len() - 60], "", "}{"] {
        write(directory.path(), "p.yaml", broken);
        catalog.scan();
        assert_eq!(*policy(&catalog, "web"), before, "{broken}");
        assert!(!errors(&catalog).is_empty(), "{broken}");
    }
    write(directory.path(), "p.yaml", &misspelt);
    let mut restarted = Directory::new(directory.path());
    restarted.scan();
    assert!(restarted.catalog().traffic.is_empty());
    assert_eq!(errors(&restarted), [("M0203", "p.yaml", 6, 3)]);
    std::fs::remove_file(directory.path().join("p.yaml")).unwrap();
    catalog.scan();
    assert!(catalog.catalog().traffic.is_empty() && errors(&catalog).is_empty());
}

fn compiled(catalog: &Catalog) -> Arc<crate::engine::Snapshot> {
    let mut engine = Engine::new(NodeName::parse("n1").unwrap());
    engine.handle_update(Update::Snapshot(catalog.clone()), Instant::now());
    Arc::clone(&engine.desired().snapshot)
}

fn held(catalog: &Directory) -> Traffic {
    let snapshot = compiled(catalog.catalog());
    let frontend = snapshot.frontend("10.96.0.1:80".parse().unwrap()).unwrap();
    Traffic::clone(&frontend.traffic)
}

#[test]
fn services_and_the_mesh_speak_where_no_policy_does() {
    let web = service("web", "10.96.0.1").replace(
        "spec:\n",
        "spec:\n  trafficDistribution: PreferClose\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: \
         {timeoutSeconds: 60}}\n",
    );
    let (directory, mut catalog) = scanned(&[("web.yaml", &web)]);
    assert_eq!(catalog.diagnostics(), []);
    let traffic_of = held(&catalog);
    assert_eq!((traffic_of.prefer, traffic_of.same_node), (Prefer::SameZone, SameNode::Kernel));
    assert_eq!(traffic_of.affinity, Affinity::ClientIp(Duration::from_mins(1)));
    write(directory.path(), "mesh.yaml", &MESH.replace("example.org", "example.org, sameNode: Tunnel"));
    catalog.scan();
    assert_eq!(held(&catalog).same_node, SameNode::Tunnel);
    let spec = "{targetRefs: [{kind: Service, name: web}], sameNode: Kernel, sessionAffinity: {type: None}, \
                loadBalancing: {preference: None}}";
    write(directory.path(), "p.yaml", &traffic("p", spec));
    catalog.scan();
    let traffic_of = held(&catalog);
    assert_eq!((traffic_of.prefer, traffic_of.affinity, traffic_of.same_node), Default::default());
    for (word, prefer) in [("PreferSameZone", Prefer::SameZone), ("PreferSameNode", Prefer::SameNode)] {
        write(directory.path(), "web.yaml", &web.replace("PreferClose", word));
        catalog.scan();
        assert_eq!(catalog.catalog().services[&name("web")].prefer, prefer);
    }
    write(
        directory.path(),
        "web.yaml",
        &web.replace("  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}\n", ""),
    );
    catalog.scan();
    let affinity = catalog.catalog().services[&name("web")].affinity;
    assert_eq!(affinity, Affinity::ClientIp(Duration::from_hours(3)));
}

#[test]
fn zones_and_terminating_workloads_decide_who_is_an_endpoint() {
    let node = |name: &str, address: &str, zone: &str| {
        let labelled = format!("{{name: {name}, labels: {{topology.kubernetes.io/zone: {zone}}}}}");
        NODE.replace("{name: n1}", &labelled).replace("192.0.2.1", address)
    };
    let nodes =
        [node("n1", "192.0.2.1", "a"), node("n2", "192.0.2.2", "a"), node("n3", "192.0.2.3", "b")].join("---\n");
    let on = |name: &str, address: &str, node: &str| workload(name, address).replace("node: n1", node);
    let (directory, mut catalog) = scanned(&[
        ("node.yaml", &nodes),
        ("w2.yaml", &on("w2", "10.0.1.2", "node: n2")),
        ("w3.yaml", &on("w3", "10.0.1.3", "node: n3")),
        ("w4.yaml", &on("w4", "10.0.1.4", "node: n1\n  terminating: false")),
    ]);
    assert_eq!(catalog.diagnostics(), []);
    let endpoints = |catalog: &Directory| -> Vec<(String, Locality)> {
        let snapshot = compiled(catalog.catalog());
        let frontend = snapshot.frontend("10.96.0.1:80".parse().unwrap()).unwrap();
        frontend.endpoints.iter().map(|end| (end.workload.name.name().to_owned(), end.locality)).collect()
    };
    let all = [
        ("w".to_owned(), Locality::SameNode),
        ("w2".to_owned(), Locality::SameZone),
        ("w3".to_owned(), Locality::Elsewhere),
        ("w4".to_owned(), Locality::SameNode),
    ];
    assert_eq!(endpoints(&catalog), all);
    write(directory.path(), "w4.yaml", &on("w4", "10.0.1.4", "node: n1\n  terminating: true"));
    catalog.scan();
    assert_eq!(endpoints(&catalog), all[..3]);
    assert!(catalog.catalog().workloads[&name("w4")].is_terminating);
}

#[test]
fn nothing_takes_the_address_of_the_meshs_own_dns() {
    let mesh =
        MESH.replace("example.org", "example.org, dns: {addresses: [10.96.0.10], upstream: [\"192.0.2.53:53\"]}");
    let on_its_port = service("dns", "10.96.0.10").replace("port: 80", "port: 53");
    let (directory, mut catalog) = scanned(&[("dns.yaml", &on_its_port)]);
    assert_eq!((catalog.diagnostics(), catalog.catalog().services.len()), (&[][..], 2));
    write(directory.path(), "mesh.yaml", &mesh);
    write(directory.path(), "beside.yaml", &service("beside", "10.96.0.10"));
    write(directory.path(), "v.yaml", &workload("v", "10.96.0.10"));
    catalog.scan();
    let dns = catalog.catalog().mesh.as_ref().unwrap().dns.clone().unwrap();
    assert_eq!((&*dns.domain, dns.upstream.len()), ("cluster.local", 1));
    // Another port of the address is free.
    assert_eq!(errors(&catalog), [("M0307", "dns.yaml", 5, 14), ("M0311", "v.yaml", 6, 15)]);
    let snapshot = compiled(catalog.catalog());
    assert!(snapshot.frontend("10.96.0.10:53".parse().unwrap()).is_none());
    assert!(snapshot.mesh.as_ref().unwrap().answers_dns_at("10.96.0.10:53".parse().unwrap()));
}
