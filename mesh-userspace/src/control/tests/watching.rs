//! The source over a real directory that changes in all the ways that directories change.

use super::*;
use crate::control::Health;
use crate::control::file::{FileSource, Settings, SourceError};
use crate::model::{Catalog, Object, ObjectKey, ObjectName, Update};
use crate::telemetry::catalog::CatalogMetrics;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Far more than any change takes.
const BOUND: Duration = Duration::from_secs(20);

/// Waits for a change, and never rescans unasked.
const EVENTS_ONLY: Settings = Settings {
    debounce: Duration::from_millis(20),
    patience: Duration::from_millis(500),
    rescan: Duration::from_secs(3_600),
};

struct Source {
    directory: tempfile::TempDir,
    updates: mpsc::Receiver<Update>,
    health: watch::Receiver<Health>,
    /// The catalog as a receiver puts it together.
    catalog: Catalog,
}

impl Source {
    async fn start(settings: Settings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in [("mesh.yaml", MESH), ("node.yaml", NODE), ("a.yaml", &service("a", "10.96.0.1"))] {
            write(directory.path(), file, text);
        }
        let (mut updates, health) =
            FileSource::spawn_with(directory.path(), CatalogMetrics::default(), settings).unwrap();
        let first = tokio::time::timeout(BOUND, updates.recv()).await.unwrap();
        let Some(Update::Snapshot(catalog)) = first else { panic!("not a snapshot: {first:?}") };
        Self { directory, updates, health, catalog }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// Takes updates until the catalog is as wanted; deltas only.
    async fn until(&mut self, what: &str, wanted: impl Fn(&Catalog) -> bool) {
        while !wanted(&self.catalog) {
            let update = tokio::time::timeout(BOUND, self.updates.recv()).await;
            match update.unwrap_or_else(|_| panic!("{what}: nothing more comes, at {:?}", self.catalog)).unwrap() {
                Update::Snapshot(_) => panic!("{what}: a second snapshot"),
                Update::Upsert(Object::Service(service)) => {
                    self.catalog.services.insert(service.name.clone(), service);
                }
                Update::Remove(ObjectKey::Service(name)) => {
                    self.catalog.services.remove(&name).unwrap();
                }
                other => panic!("{what}: {other:?}"),
            }
        }
    }

    async fn until_service(&mut self, what: &str, name: &str, vip: Option<&str>) {
        let key = ObjectName::parse("shop", name).unwrap();
        self.until(what, |catalog| catalog.services.get(&key).map(|s| s.vips[0].to_string()).as_deref() == vip).await;
    }

    async fn until_health(&mut self, what: &str, wanted: impl Fn(&Health) -> bool) {
        let health = tokio::time::timeout(BOUND, self.health.wait_for(|health| wanted(health))).await;
        assert!(health.is_ok(), "{what}");
    }

    async fn until_errors(&mut self, what: &str, codes: &[&str]) {
        self.until_health(what, |health| health.diagnostics.iter().map(|d| d.code.as_str()).eq(codes.iter().copied()))
            .await;
    }
}

#[tokio::test]
async fn files_come_change_and_go() {
    let mut source = Source::start(EVENTS_ONLY).await;
    source.until_service("as it was", "a", Some("10.96.0.1")).await;
    write(source.directory.path(), "b.yaml", &service("b", "10.96.0.2"));
    source.until_service("added", "b", Some("10.96.0.2")).await;
    write(source.directory.path(), "b.yaml", &service("b", "10.96.0.3"));
    source.until_service("changed", "b", Some("10.96.0.3")).await;
    std::fs::remove_file(source.path("b.yaml")).unwrap();
    source.until_service("removed", "b", None).await;
    source.until_service("untouched", "a", Some("10.96.0.1")).await;
}

#[tokio::test]
async fn editors_that_write_beside_and_rename_over_are_understood() {
    let mut source = Source::start(EVENTS_ONLY).await;
    write(source.directory.path(), ".a.yaml.swp", "not: [yaml");
    write(source.directory.path(), "a.yaml~", "not: [yaml");
    write(source.directory.path(), ".new", &service("a", "10.96.0.9"));
    std::fs::rename(source.path(".new"), source.path("a.yaml")).unwrap();
    source.until_service("renamed over", "a", Some("10.96.0.9")).await;
    std::fs::rename(source.path("a.yaml"), source.path("z.yml")).unwrap();
    write(source.directory.path(), "b.yaml", &service("b", "10.96.0.2"));
    // The same object under another file's name is no change at all: `b` is the next that is told.
    let next = tokio::time::timeout(BOUND, source.updates.recv()).await.unwrap();
    assert!(matches!(&next, Some(Update::Upsert(Object::Service(service))) if service.name.name() == "b"), "{next:?}");
}

#[tokio::test]
async fn a_broken_file_is_told_and_changes_nothing_until_it_is_repaired() {
    let mut source = Source::start(EVENTS_ONLY).await;
    write(source.directory.path(), "a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: a");
    // The service itself selects nothing, which is only a warning.
    source.until_errors("broken", &["M0104", "M0305"]).await;
    write(source.directory.path(), "b.yaml", &service("b", "10.96.0.2"));
    source.until_service("others go on", "b", Some("10.96.0.2")).await;
    assert_eq!(source.catalog.services.len(), 2);
    let generation = source.health.borrow().generation;
    write(source.directory.path(), "a.yaml", &service("a", "10.96.0.7"));
    source.until_service("repaired", "a", Some("10.96.0.7")).await;
    source
        .until_health("one more change", |health| health.generation > generation && health.applied_at.is_some())
        .await;
    source.until_errors("all well but for the warnings", &["M0305", "M0305"]).await;
    assert_eq!(source.health.borrow().objects[&"Service"], 2);
}

#[tokio::test]
async fn a_volume_that_swaps_its_symlink_is_understood() {
    let directory = tempfile::tempdir().unwrap();
    let version = |name: &str, vip: &str| {
        let version = directory.path().join(name);
        std::fs::create_dir(&version).unwrap();
        for (file, text) in [("mesh.yaml", MESH), ("node.yaml", NODE), ("a.yaml", &service("a", vip))] {
            write(&version, file, text);
        }
    };
    let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, directory.path().join(name)).unwrap();
    version("..1", "10.96.0.1");
    link("..1", "..data");
    for file in ["mesh.yaml", "node.yaml", "a.yaml"] {
        link(&format!("..data/{file}"), file);
    }
    let (mut updates, health) =
        FileSource::spawn_with(directory.path(), CatalogMetrics::default(), EVENTS_ONLY).unwrap();
    let first = tokio::time::timeout(BOUND, updates.recv()).await.unwrap();
    let Some(Update::Snapshot(catalog)) = first else { panic!("not a snapshot: {first:?}") };
    assert_eq!(catalog.services.len(), 1);
    let mut source = Source { directory: tempfile::tempdir().unwrap(), updates, health, catalog };
    version("..2", "10.96.0.2");
    link("..2", "..data_tmp");
    std::fs::rename(directory.path().join("..data_tmp"), directory.path().join("..data")).unwrap();
    std::fs::remove_dir_all(directory.path().join("..1")).unwrap();
    source.until_service("swapped", "a", Some("10.96.0.2")).await;
}

#[tokio::test]
async fn what_no_event_tells_is_found_by_looking() {
    let elsewhere = tempfile::tempdir().unwrap();
    write(elsewhere.path(), "b.yaml", &service("b", "10.96.0.2"));
    let mut source = Source::start(Settings { rescan: Duration::from_millis(50), ..EVENTS_ONLY }).await;
    std::os::unix::fs::symlink(elsewhere.path().join("b.yaml"), source.path("b.yaml")).unwrap();
    source.until_service("linked", "b", Some("10.96.0.2")).await;
    write(elsewhere.path(), "b.yaml", &service("b", "10.96.0.3"));
    source.until_service("changed behind the link", "b", Some("10.96.0.3")).await;
}

#[tokio::test]
async fn a_directory_made_anew_is_watched_again() {
    let mut source = Source::start(Settings { rescan: Duration::from_millis(50), ..EVENTS_ONLY }).await;
    let path = source.directory.path().to_owned();
    let away = path.with_extension("away");
    std::fs::rename(&path, &away).unwrap();
    source.until_errors("gone", &["M0100", "M0305"]).await;
    std::fs::create_dir(&path).unwrap();
    for (file, text) in [("mesh.yaml", MESH), ("node.yaml", NODE), ("a.yaml", &service("a", "10.96.0.8"))] {
        write(&path, file, text);
    }
    source.until_service("back", "a", Some("10.96.0.8")).await;
    std::fs::remove_dir_all(&away).unwrap();
}

#[tokio::test]
async fn a_missing_directory_is_an_error_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("conf.d");
    let error = FileSource::spawn(&missing, CatalogMetrics::default()).unwrap_err();
    assert!(matches!(error, SourceError::Directory { .. }));
    assert!(error.to_string().contains("conf.d") && error.to_string().contains("create it"), "{error}");
}

#[tokio::test]
async fn the_source_ends_with_its_receiver() {
    let source = Source::start(EVENTS_ONLY).await;
    let Source { updates, mut health, .. } = source;
    drop(updates);
    // The task holds the other end of the health channel.
    let ended = tokio::time::timeout(BOUND, async { while health.changed().await.is_ok() {} }).await;
    assert!(ended.is_ok());
}
