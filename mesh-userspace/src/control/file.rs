//! The catalog directory as a source of updates: read once, then watched.

use super::directory::Directory;
use super::resolve::{self, Resolver};
use super::{Health, Severity, count};
use crate::model::{Catalog, Update};
use crate::telemetry::catalog::CatalogMetrics;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, timeout_at};

/// Updates that wait for the reconciler; a source that is ahead of it waits.
const QUEUE: usize = 256;

/// When the directory is read again.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Quiet time after a change before the directory is read: an editor's several steps count as one.
    pub debounce: Duration,
    /// Longest wait after the first change of a row that does not end.
    pub patience: Duration,
    /// How often the directory is read even though no change was reported: changes behind a symlink, a lost event.
    pub rescan: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { debounce: Duration::from_millis(100), patience: Duration::from_secs(1), rescan: Duration::from_secs(30) }
    }
}

/// Why a source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("the catalog directory {path} cannot be read: {source}; create it, or set catalog.directory")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("the catalog directory {path} cannot be watched: {source}")]
    Watch { path: PathBuf, source: notify::Error },
}

/// A watched catalog directory.
#[derive(Debug)]
pub struct FileSource;

impl FileSource {
    /// Starts to read and watch a directory with the default [`Settings`]; see [`Self::spawn_with`].
    ///
    /// # Errors
    /// If the directory cannot be read or watched.
    pub fn spawn(
        directory: &Path,
        metrics: CatalogMetrics,
    ) -> Result<(mpsc::Receiver<Update>, watch::Receiver<Health>), SourceError> {
        Self::spawn_with(directory, metrics, Settings::default())
    }

    /// Starts to read and watch a directory. The first update is a snapshot, also of a directory where much is
    /// broken; deltas follow. The task ends when the receiver is dropped; if the receiver ends before, it failed.
    ///
    /// # Errors
    /// If the directory cannot be read or watched.
    pub fn spawn_with(
        directory: &Path,
        metrics: CatalogMetrics,
        settings: Settings,
    ) -> Result<(mpsc::Receiver<Update>, watch::Receiver<Health>), SourceError> {
        std::fs::read_dir(directory).map_err(|source| SourceError::Directory { path: directory.to_owned(), source })?;
        // Watched before it is read: a change in between is then seen twice rather than never.
        let watched =
            Watched::start(directory).map_err(|source| SourceError::Watch { path: directory.to_owned(), source })?;
        let (updates, receiver) = mpsc::channel(QUEUE);
        let (health, health_receiver) =
            watch::channel(Health { objects: count(&Resolver::default()), ..Health::default() });
        let task = Task { settings, metrics, watched, updates, health, shown: None, errors: BTreeMap::new() };
        tokio::spawn(task.run(Directory::new(directory)));
        Ok((receiver, health_receiver))
    }
}

struct Task {
    settings: Settings,
    metrics: CatalogMetrics,
    watched: Watched,
    updates: mpsc::Sender<Update>,
    health: watch::Sender<Health>,
    /// The catalog as it was handed on.
    shown: Option<Catalog>,
    /// Errors by code, as the metrics show them.
    errors: BTreeMap<&'static str, u64>,
}

impl Task {
    async fn run(mut self, mut directory: Directory) {
        loop {
            let scanned = tokio::task::spawn_blocking(move || {
                directory.scan();
                directory
            });
            // A panic there is a defect; ending here drops the sender, which the receiver notices.
            let Ok(read) = scanned.await else {
                tracing::error!("reading the catalog failed unexpectedly");
                return;
            };
            directory = read;
            if !self.hand_on(&directory).await {
                return;
            }
            self.watched.renew(directory.path());
            tokio::select! {
                () = self.updates.closed() => return,
                () = self.change() => {}
            }
        }
    }

    /// Waits for changes to begin and to pause, or for the time to look anyway.
    async fn change(&self) {
        let changed = &self.watched.changed;
        if timeout_at(Instant::now() + self.settings.rescan, changed.notified()).await.is_err() {
            return;
        }
        let patience = Instant::now() + self.settings.patience;
        while Instant::now() < patience {
            let quiet = (Instant::now() + self.settings.debounce).min(patience);
            if timeout_at(quiet, changed.notified()).await.is_err() {
                return;
            }
        }
    }

    /// Sends what changed, then tells how things are. `false` if nobody listens any more.
    async fn hand_on(&mut self, directory: &Directory) -> bool {
        let catalog = directory.catalog();
        let updates = match &self.shown {
            None => vec![Update::Snapshot(catalog.clone())],
            Some(shown) => resolve::deltas(shown, catalog),
        };
        let changed = !updates.is_empty();
        for update in updates {
            if self.updates.send(update).await.is_err() {
                return false;
            }
        }
        if changed {
            self.shown = Some(catalog.clone());
        }
        self.report(directory, changed);
        true
    }

    fn report(&mut self, directory: &Directory, changed: bool) {
        let diagnostics = directory.diagnostics();
        let objects = count(directory.resolver());
        // Codes seen once stay, with 0: a series that vanishes looks like a lost scrape.
        self.errors.values_mut().for_each(|count| *count = 0);
        for diagnostic in diagnostics.iter().filter(|diagnostic| diagnostic.severity == Severity::Error) {
            *self.errors.entry(diagnostic.code.as_str()).or_default() += 1;
        }
        self.metrics.show(&objects, &self.errors);
        let now = SystemTime::now();
        if changed {
            self.metrics.applied(now);
        }
        self.health.send_modify(|health| {
            let known = &health.diagnostics;
            for news in diagnostics.iter().filter(|diagnostic| !known.contains(diagnostic)) {
                let text = news.render();
                match news.severity {
                    Severity::Error => tracing::error!(code = news.code.as_str(), "catalog: {}", text.trim_end()),
                    Severity::Warning => tracing::warn!(code = news.code.as_str(), "catalog: {}", text.trim_end()),
                }
            }
            if **known != *diagnostics {
                health.diagnostics = Arc::from(diagnostics);
            }
            health.objects = objects;
            if changed {
                health.generation += 1;
                health.applied_at = Some(now);
            }
        });
    }
}

/// The kernel's notifications about one directory.
struct Watched {
    changed: Arc<Notify>,
    /// `None` while the directory cannot be watched; the periodic reading goes on.
    watcher: Option<RecommendedWatcher>,
    /// Device and inode of what is watched: a directory made anew under the same path needs a new watch.
    identity: Option<(u64, u64)>,
}

impl Watched {
    fn start(directory: &Path) -> notify::Result<Self> {
        let changed = Arc::new(Notify::new());
        // Asked first: if the directory is replaced in between, the next reading finds another one and watches that.
        let identity = identity(directory);
        let watcher = watch(directory, Arc::clone(&changed))?;
        Ok(Self { changed, watcher: Some(watcher), identity })
    }

    fn renew(&mut self, directory: &Path) {
        let now = identity(directory);
        if now == self.identity && self.watcher.is_some() {
            return;
        }
        self.watcher = None;
        self.identity = now;
        if now.is_some() {
            match watch(directory, Arc::clone(&self.changed)) {
                Ok(watcher) => {
                    self.watcher = Some(watcher);
                    // It was read before it was watched.
                    self.changed.notify_one();
                }
                Err(error) => tracing::warn!(%error, "the catalog directory cannot be watched, only polled"),
            }
        }
    }
}

fn watch(directory: &Path, changed: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the directory is an event too; answering it by reading would never end.
        let is_access = event.as_ref().is_ok_and(|event| event.kind.is_access());
        if !is_access {
            changed.notify_one();
        }
    })?;
    watcher.watch(directory, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(directory).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
