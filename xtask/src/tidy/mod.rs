//! House rules that no compiler checks: imports, purity, unsafe code, lengths, names; then formatting and licences.

mod layers;
mod lengths;
mod manifests;
mod source;
mod words;

use crate::process::{cargo, output, root, run, target};
use crate::setup;
use anyhow::{Context, Result, bail};
use source::Source;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MEMBERS: &[&str] = &["mesh-common", "mesh-ebpf", "mesh-userspace", "tests", "xtask"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// Fails the verb.
    Error,
    /// Is printed.
    Advice,
}

/// A rule that is not kept, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub path: PathBuf,
    pub line: usize,
    pub rule: &'static str,
    pub message: String,
    pub severity: Severity,
}

impl Finding {
    fn new(path: &Path, line: usize, rule: &'static str, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, rule, message: message.into(), severity: Severity::Error }
    }

    fn with(self, severity: Severity) -> Self {
        Self { severity, ..self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Advice => "advice",
        };
        write!(f, "{}:{}: {severity}: {} [{}]", self.path.display(), self.line, self.message, self.rule)
    }
}

/// Checks the house rules, the formatting, and what `deny.toml` says about dependencies.
pub(crate) fn check() -> Result<()> {
    let findings = rules()?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    if errors > 0 {
        bail!("{errors} house rules are not kept");
    }
    run(cargo().args(["fmt", "--all", "--", "--check"])).context("run `cargo fmt --all`")?;
    dependencies()
}

/// Holds the dependencies against `deny.toml`, without the network: only what this machine builds is looked at, so
/// everything is in the local registry cache after a build.
fn dependencies() -> Result<()> {
    let deny = setup::cargo_deny()?;
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not name its host")?;
    let metadata = target().join("metadata.json");
    let text = output(cargo().args(["metadata", "--locked", "--format-version", "1", "--filter-platform", host]))?;
    std::fs::write(&metadata, text).with_context(|| format!("cannot write {}", metadata.display()))?;
    // What it prints when all is well are crates of other platforms that are not in the cache.
    output(
        Command::new(deny)
            .current_dir(root())
            .args(["--offline", "--log-level", "error", "--metadata-path"])
            .arg(&metadata)
            .args(["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]),
    )
    .context("dependencies break deny.toml")?;
    Ok(())
}

fn rules() -> Result<Vec<Finding>> {
    let mut sources = Vec::new();
    let mut findings = Vec::new();
    for member in MEMBERS {
        let manifest = root().join(member).join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        findings.extend(manifests::check(member, &text));
        collect(&root().join(member), &mut sources)?;
    }
    mark_test_files(&mut sources);
    for source in &sources {
        findings.extend(layers::check(source));
        findings.extend(words::check(source));
        findings.extend(lengths::check(source));
    }
    Ok(findings)
}

fn collect(folder: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .with_context(|| format!("cannot read {}", folder.display()))?;
    paths.sort();
    for path in paths {
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            collect(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            sources.push(Source::new(path.strip_prefix(root())?, text));
        }
    }
    Ok(())
}

/// Modules in files of their own that are declared under `#[cfg(test)]`, and what they declare in turn.
fn mark_test_files(sources: &mut [Source]) {
    let mut test_files: BTreeSet<PathBuf> = sources.iter().flat_map(|source| source.test_modules.clone()).collect();
    let folders: Vec<PathBuf> = test_files.iter().map(|path| path.with_extension("")).collect();
    let below = |path: &Path| folders.iter().any(|folder| path.starts_with(folder));
    test_files.extend(sources.iter().map(|source| source.path.clone()).filter(|path| below(path)));
    for source in sources {
        if test_files.contains(&source.path) {
            source.mark_as_test();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_declared_for_tests_is_test_code_with_all_below_it() {
        let mut sources = vec![
            Source::new("mesh-userspace/src/engine/mod.rs", "#[cfg(test)]\nmod tests;"),
            Source::new("mesh-userspace/src/engine/tests.rs", "mod more; use tokio::x;"),
            Source::new("mesh-userspace/src/engine/tests/more.rs", "use tokio::x;"),
            Source::new("mesh-userspace/src/engine/diff.rs", "use tokio::x;"),
        ];
        mark_test_files(&mut sources);
        let impure: Vec<bool> = sources.iter().map(|source| !words::check(source).is_empty()).collect();
        assert_eq!(impure, [false, false, false, true]);
    }

    #[test]
    fn a_finding_says_where_and_which_rule() {
        let finding = Finding::new(Path::new("a/b.rs"), 7, "names", "no");
        assert_eq!(finding.to_string(), "a/b.rs:7: error: no [names]");
    }
}
