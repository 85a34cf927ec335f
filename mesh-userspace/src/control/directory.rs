//! The catalog directory as it is, and what of each file's past still counts.

use super::diagnostic::{Diagnostic, Position, Source};
use super::document::{Broken, Contents, Document, MAX_FILE_BYTES, parse_documents};
use super::key::Key;
use super::resolve::Resolver;
use super::{Code, Severity};
use crate::model::Catalog;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files read from one directory.
const MAX_FILES: usize = 10_000;

/// Findings kept of all files together.
const MAX_FINDINGS: usize = 1_000;

/// A catalog directory with the memory of what was good in it.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    files: BTreeMap<String, FileState>,
    resolver: Resolver,
    scans: u64,
    /// Of the resolver, when last something changed.
    findings: Vec<Diagnostic>,
    /// Of the last scan, of everything.
    diagnostics: Vec<Diagnostic>,
}

#[derive(Debug, Default)]
struct FileState {
    /// What was read last; `None` if it could not be read.
    bytes: Option<Vec<u8>>,
    /// Objects as they stand: of the last good version each.
    documents: Vec<Arc<Document>>,
    diagnostics: Vec<Diagnostic>,
}

impl Directory {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            files: BTreeMap::new(),
            resolver: Resolver::default(),
            scans: 0,
            findings: Vec::new(),
            diagnostics: Vec::new(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn catalog(&self) -> &Catalog {
        self.resolver.catalog()
    }

    pub(super) fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// Findings of the last scan, errors first, then by file and place.
    pub(super) fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    /// Reads the directory again. If it cannot be read at all, everything stays as it is.
    pub(super) fn scan(&mut self) {
        let mut found = Vec::new();
        let mut changed = self.scans == 0;
        match list(&self.path) {
            Err(error) => found.push(unreadable_directory(&self.path, &error)),
            Ok(mut names) => {
                if names.len() > MAX_FILES {
                    let message = format!("the directory has more than {MAX_FILES} files; the rest is not read");
                    found.push(Source::new(".", "").diagnostic(Code::Limit, Position::FILE, None, message, None));
                    names.truncate(MAX_FILES);
                }
                let before = self.files.len();
                self.files.retain(|name, _| names.binary_search(name).is_ok());
                changed |= self.files.len() != before;
                for name in names {
                    changed |= self.read(&name);
                }
            }
        }
        self.scans += 1;
        if changed {
            let documents = self.files.values().flat_map(|file| &file.documents);
            self.findings = self.resolver.resolve(documents);
        }
        found.extend(self.findings.iter().cloned());
        found.extend(self.files.values().flat_map(|file| file.diagnostics.iter().cloned()));
        self.diagnostics = in_order(found);
    }

    /// Reads one file; whether anything about it is new.
    fn read(&mut self, name: &str) -> bool {
        let path = self.path.join(name);
        match read_bounded(&path) {
            Ok(bytes) => {
                let state = self.files.entry(name.to_owned()).or_default();
                if state.bytes.as_ref() == Some(&bytes) {
                    return false;
                }
                state.replace(parse_documents(name, &bytes));
                state.bytes = Some(bytes);
                true
            }
            // Gone since it was listed: as if it had not been.
            Err(_) if fs::symlink_metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) => {
                self.files.remove(name).is_some()
            }
            Err(error) => {
                let state = self.files.entry(name.to_owned()).or_default();
                state.bytes = None;
                let message = format!("the file cannot be read: {error}");
                let found = Source::new(name, "").diagnostic(Code::Unreadable, Position::FILE, None, message, None);
                state.replace(Contents::unknown(found));
                // Its objects stay as they are.
                false
            }
        }
    }
}

/// Errors first, then by file and place, and no more than anyone reads.
fn in_order(mut found: Vec<Diagnostic>) -> Vec<Diagnostic> {
    found.sort_by(|a, b| {
        (a.severity, &a.file, a.line, a.column, a.code).cmp(&(b.severity, &b.file, b.line, b.column, b.code))
    });
    if found.len() > MAX_FINDINGS {
        let message = format!("{} findings, of which {MAX_FINDINGS} are shown", found.len());
        found.truncate(MAX_FINDINGS);
        found.push(Source::new(".", "").diagnostic(Code::TooManyFindings, Position::FILE, None, message, None));
    }
    found
}

impl FileState {
    /// Takes over what is sound in the new contents, and keeps the last good version of what is broken there. A
    /// document that is broken beyond recognition may be any of the file's objects: then none is taken away. Where
    /// there is no good version, the strictest that the document may have meant stands in.
    fn replace(&mut self, new: Contents) {
        let Contents { documents, broken, diagnostics } = new;
        let unrecognised = broken.iter().any(|broken| broken.key.is_none());
        let unread = broken.iter().any(|broken| broken.key.is_none() && broken.stand_in.is_none());
        let there: BTreeSet<&Key> = documents.iter().map(|document| &document.key).collect();
        let named: BTreeSet<&Key> = broken.iter().filter_map(|broken| broken.key.as_ref()).collect();
        let is_kept = |old: &Arc<Document>| match old.stands_in {
            // Where its document is still legible it says again what stands in for it.
            true => unread,
            false => unrecognised || named.contains(&old.key),
        };
        let kept: Vec<_> = self.documents.drain(..).filter(|old| is_kept(old) && !there.contains(&old.key)).collect();
        let stand_ins = stand_ins(&broken, &there, &named, &kept);
        self.documents = [documents, kept, stand_ins].concat();
        self.diagnostics = diagnostics;
    }
}

/// What stands in for the broken documents that have no good version, neither among those there nor among those kept.
fn stand_ins(
    broken: &[Broken],
    there: &BTreeSet<&Key>,
    named: &BTreeSet<&Key>,
    kept: &[Arc<Document>],
) -> Vec<Arc<Document>> {
    let good = |key: &Key| there.contains(key) || kept.iter().any(|old| old.key == *key);
    // Policies that are kept because a document may be any of them: each answers for one that has lost its name.
    let mut lost: Vec<_> = kept.iter().filter(|old| old.key.is_policy() && !named.contains(&old.key)).collect();
    let mut stand_ins: Vec<Arc<Document>> = Vec::new();
    for Broken { stand_in, nameless, .. } in broken {
        let Some(stand_in) = stand_in else { continue };
        if good(&stand_in.key) {
            lost.retain(|old| old.key != stand_in.key);
        } else if let Some(index) = lost.iter().position(|old| old.key.namespace() == stand_in.key.namespace())
            && *nameless
        {
            lost.swap_remove(index);
        } else {
            stand_ins.push(Arc::clone(stand_in));
        }
    }
    stand_ins
}

/// Names of the catalog's files in order: `*.yaml` and `*.yml`, hidden ones left out (editors' and mounts' own).
fn list(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let is_catalog = Path::new(&name).extension().is_some_and(|ending| ending == "yaml" || ending == "yml");
        if is_catalog && !name.starts_with('.') && !fs::metadata(directory.join(&name)).is_ok_and(|file| file.is_dir())
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// At most one byte more than a file may have, which is enough to refuse it.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Asked before opening: opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn unreadable_directory(path: &Path, error: &io::Error) -> Diagnostic {
    let message = format!("the catalog directory {} cannot be read: {error}", path.display());
    Source::new(".", "").diagnostic(Code::Directory, Position::FILE, None, message, None)
}

/// Checks a catalog as it is on disk: a directory, or one file by itself. Errors come first, then warnings, each by
/// file and place; empty if all is well.
#[must_use]
pub fn validate(path: &Path) -> Vec<Diagnostic> {
    if path.is_file() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut alone = Directory::new(path.parent().unwrap_or(Path::new(".")));
        alone.read(&name);
        return alone.files.into_values().flat_map(|file| file.diagnostics).collect();
    }
    let mut directory = Directory::new(path);
    directory.scan();
    directory.diagnostics
}

/// Whether any finding is an error.
#[must_use]
pub fn has_errors(diagnostics: &[Diagnostic]) -> bool {
    diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
}
