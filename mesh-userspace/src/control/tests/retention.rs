//! What is broken never replaces what was good, and never keeps others from their place.

use super::*;
use crate::control::resolve::deltas;
use crate::engine::Engine;
use crate::model::{Catalog, NodeName, Object, ObjectName, Update};
use std::time::Instant;

fn scanned(files: &[(&str, &str)]) -> (tempfile::TempDir, Directory) {
    let directory = tempfile::tempdir().unwrap();
    for (file, text) in files {
        write(directory.path(), file, text);
    }
    let mut catalog = Directory::new(directory.path());
    catalog.scan();
    (directory, catalog)
}

/// Sound mesh and node, plus these.
fn with(files: &[(&str, &str)]) -> (tempfile::TempDir, Directory) {
    let mut all = vec![("00.yaml", MESH), ("01.yaml", NODE)];
    all.extend(files);
    scanned(&all)
}

fn rescan(directory: &tempfile::TempDir, catalog: &mut Directory, file: &str, text: &str) {
    write(directory.path(), file, text);
    catalog.scan();
}

fn names(catalog: &Directory) -> Vec<&str> {
    let Catalog { services, workloads, .. } = catalog.catalog();
    services.keys().chain(workloads.keys()).map(ObjectName::name).collect()
}

fn vip(catalog: &Directory, name: &str) -> String {
    catalog.catalog().services[&ObjectName::parse("shop", name).unwrap()].vips[0].to_string()
}

#[test]
fn a_document_that_breaks_keeps_its_last_good_version_and_lets_others_change() {
    let (directory, mut catalog) =
        with(&[("a.yaml", &[service("a", "10.96.0.1"), service("b", "10.96.0.2")].join("---\n"))]);
    assert_eq!(names(&catalog), ["a", "b"]);
    let broken = [service("a", "10.96.0.999"), service("b", "10.96.0.3")].join("---\n");
    rescan(&directory, &mut catalog, "a.yaml", &broken);
    assert_eq!((vip(&catalog, "a"), vip(&catalog, "b")), ("10.96.0.1".into(), "10.96.0.3".into()));
    assert_eq!(errors(&catalog), [("M0208", "a.yaml", 5, 14)]);
    rescan(&directory, &mut catalog, "a.yaml", &service("a", "10.96.0.4"));
    assert_eq!((names(&catalog), vip(&catalog, "a")), (vec!["a"], "10.96.0.4".into()));
    assert!(errors(&catalog).is_empty());
}

#[test]
fn a_file_that_does_not_parse_loses_nothing() {
    let good = [service("a", "10.96.0.1"), workload("b", "10.0.1.1")].join("---\n");
    let (directory, mut catalog) = with(&[("a.yaml", &good)]);
    let half = &good[..good.len() - 40];
    for broken in ["", "}{", "kind: Service\n", half, "apiVersion: v1\nkind: Service\nmetadata: {name: A}\nspec: {}\n"]
    {
        rescan(&directory, &mut catalog, "a.yaml", broken);
        assert_eq!(names(&catalog), ["a", "b"], "{broken}");
        assert!(!errors(&catalog).is_empty(), "{broken}");
    }
    std::fs::write(directory.path().join("a.yaml"), b"\xff\xfe").unwrap();
    catalog.scan();
    assert_eq!(names(&catalog), ["a", "b"]);
    // Sound, but empty of objects: that is what removes them, as does removing the file.
    rescan(&directory, &mut catalog, "a.yaml", "# moved\n");
    assert!(names(&catalog).is_empty());
    rescan(&directory, &mut catalog, "a.yaml", &good);
    std::fs::remove_file(directory.path().join("a.yaml")).unwrap();
    catalog.scan();
    assert!(names(&catalog).is_empty() && errors(&catalog).is_empty());
}

#[test]
fn what_cannot_be_read_stays() {
    let (directory, mut catalog) = with(&[("a.yaml", &service("a", "10.96.0.1"))]);
    let path = directory.path().join("a.yaml");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere.yaml", &path).unwrap();
    catalog.scan();
    assert_eq!((names(&catalog), errors(&catalog)), (vec!["a"], vec![("M0101", "a.yaml", 0, 0)]));
    // A pipe without a writer must not hold the source up.
    std::fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    catalog.scan();
    assert_eq!((names(&catalog), errors(&catalog)), (vec!["a"], vec![("M0101", "a.yaml", 0, 0)]));

    let moved = directory.path().with_extension("away");
    std::fs::rename(directory.path(), &moved).unwrap();
    catalog.scan();
    assert_eq!(names(&catalog), ["a"]);
    assert_eq!(errors(&catalog)[0], ("M0100", ".", 0, 0));
    std::fs::rename(&moved, directory.path()).unwrap();
}

#[test]
fn a_newcomer_does_not_displace_who_was_there() {
    let (directory, mut catalog) =
        with(&[("m.yaml", &service("m", "10.96.0.1")), ("w.yaml", &workload("w", "10.0.1.1"))]);
    // Each sorts before the incumbent, by file and by name.
    rescan(&directory, &mut catalog, "a.yaml", &service("a", "10.96.0.1"));
    rescan(&directory, &mut catalog, "b.yaml", &workload("b", "10.0.1.1"));
    rescan(&directory, &mut catalog, "c.yaml", &service("m", "10.96.0.7"));
    assert_eq!((names(&catalog), vip(&catalog, "m")), (vec!["m", "w"], "10.96.0.1".into()));
    assert_eq!(errors(&catalog).iter().map(|found| found.0).collect::<Vec<_>>(), ["M0307", "M0308", "M0301"]);
    // They inherit what becomes free.
    for file in ["m.yaml", "w.yaml"] {
        std::fs::remove_file(directory.path().join(file)).unwrap();
    }
    catalog.scan();
    assert_eq!((names(&catalog), vip(&catalog, "m")), (vec!["a", "m", "b"], "10.96.0.7".into()));
    assert!(errors(&catalog).is_empty());
}

#[test]
fn an_edit_that_collides_leaves_the_version_before_it_in_force() {
    let (directory, mut catalog) =
        with(&[("a.yaml", &service("a", "10.96.0.1")), ("b.yaml", &service("b", "10.96.0.2"))]);
    rescan(&directory, &mut catalog, "a.yaml", &service("a", "10.96.0.2"));
    assert_eq!((vip(&catalog, "a"), vip(&catalog, "b")), ("10.96.0.1".into(), "10.96.0.2".into()));
    assert_eq!(errors(&catalog), [("M0307", "a.yaml", 5, 14)]);
    // Both at once, so that the two change places: no collision.
    write(directory.path(), "b.yaml", &service("b", "10.96.0.1"));
    catalog.scan();
    assert_eq!((vip(&catalog, "a"), vip(&catalog, "b")), ("10.96.0.2".into(), "10.96.0.1".into()));
    assert!(errors(&catalog).is_empty());
}

#[test]
fn the_mesh_config_outlives_its_removal() {
    let (directory, mut catalog) = with(&[("w.yaml", &workload("w", "10.0.1.1"))]);
    std::fs::remove_file(directory.path().join("00.yaml")).unwrap();
    catalog.scan();
    assert_eq!((names(&catalog), errors(&catalog)), (vec!["w"], vec![("M0303", ".", 0, 0)]));
    // A new trust domain reaches every workload.
    rescan(&directory, &mut catalog, "mesh.yaml", &MESH.replace("example.org", "example.net"));
    let workload = catalog.catalog().workloads.values().next().unwrap();
    assert_eq!(workload.identity.as_str(), "spiffe://example.net/ns/shop/sa/default");
}

#[test]
fn without_a_mesh_config_nothing_has_an_identity() {
    let (_directory, catalog) = scanned(&[("n.yaml", NODE), ("w.yaml", &workload("w", "10.0.1.1"))]);
    assert!(catalog.catalog().workloads.is_empty());
    assert_eq!((catalog.catalog().nodes.len(), errors(&catalog)), (1, vec![("M0303", ".", 0, 0)]));
}

#[test]
fn a_workloads_settings_come_from_where_they_were_written() {
    let full = "\
apiVersion: nodemesh.io/v1alpha1
kind: WorkloadEntry
metadata:
  name: web-1
  namespace: shop
  uid: 7f9c
  labels: {app: web, app.kubernetes.io/name: shopfront, nodemesh.io/mode: strict}
spec:
  node: n1
  addresses: [10.0.1.1, \"fd01::1\"]
  serviceAccount: web
  netns: /run/netns/web-1
  ports: {http: 8080}
  weight: 0
  portModes: {\"8080\": permissive, 9090: disabled}
";
    let (_directory, catalog) = with(&[("w.yaml", full), ("x.yaml", &workload("plain", "10.0.1.2"))]);
    assert!(errors(&catalog).is_empty(), "{:?}", catalog.diagnostics());
    let workloads = &catalog.catalog().workloads;
    let web = &workloads[&ObjectName::parse("shop", "web-1").unwrap()];
    assert_eq!((web.uid.as_str(), &*web.owner, web.weight), ("7f9c", "shopfront", 0));
    assert_eq!(web.identity.as_str(), "spiffe://example.org/ns/shop/sa/web");
    assert_eq!(web.mode, crate::model::Mode::Strict);
    assert_eq!(web.port_modes.len(), 2);
    assert_eq!(web.netns.as_deref(), Some(Path::new("/run/netns/web-1")));
    let plain = &workloads[&ObjectName::parse("shop", "plain").unwrap()];
    assert_eq!((plain.uid.as_str(), &*plain.owner, plain.weight), ("shop/plain", "web", 100));
    assert_eq!((plain.mode, &plain.netns), (crate::model::Mode::Permissive, &None));
}

#[test]
fn deltas_lead_an_engine_to_the_same_tables_as_a_snapshot() {
    let (directory, mut catalog) =
        with(&[("a.yaml", &service("a", "10.96.0.1")), ("w.yaml", &workload("w", "10.0.1.1"))]);
    let node = NodeName::parse("n1").unwrap();
    let mut engine = Engine::new(node.clone());
    let mut shown = catalog.catalog().clone();
    engine.handle_update(Update::Snapshot(shown.clone()), Instant::now());
    let edits: [(&str, String); 5] = [
        ("a.yaml", service("a", "10.96.0.2")),
        ("w.yaml", workload("w", "10.0.1.7")),
        ("00.yaml", MESH.replace("example.org", "example.org, excludeCIDRs: [10.0.0.0/8]")),
        ("b.yaml", [service("b", "10.96.0.3"), workload("v", "10.0.1.8")].join("---\n")),
        ("01.yaml", NODE.replace("n1", "n2")),
    ];
    for (file, text) in edits {
        rescan(&directory, &mut catalog, file, &text);
        let updates = deltas(&shown, catalog.catalog());
        assert!(!updates.is_empty(), "{file}");
        assert!(!updates.iter().any(|update| matches!(update, Update::Snapshot(_))));
        updates.into_iter().for_each(|update| engine.handle_update(update, Instant::now()));
        shown = catalog.catalog().clone();
        let mut fresh = Engine::new(node.clone());
        fresh.handle_update(Update::Snapshot(shown.clone()), Instant::now());
        assert_eq!(engine.desired(), fresh.desired(), "{file}");
    }
    assert_eq!(deltas(&shown, &shown), []);
    let removal = deltas(&shown, &Catalog::default());
    assert!(removal.iter().all(|update| matches!(update, Update::Remove(_))));
    let addition = deltas(&Catalog::default(), &shown);
    assert!(matches!(addition.first(), Some(Update::Upsert(Object::Mesh(_)))));
}
