//! `nodemesh validate`: what the daemon would say about a catalog, without a daemon.

use crate::admin::documents::DiagnosticRow;
use crate::control::{self, Diagnostic, Severity};
use std::io::{self, Write};
use std::path::Path;

/// What was found in a catalog directory.
pub(super) struct Report {
    found: Vec<Diagnostic>,
}

/// Reads and checks every file of a catalog directory.
///
/// # Errors
/// If there is no such directory, or it may not be read: nothing was checked then.
pub(super) fn check(directory: &Path) -> Result<Report, String> {
    // Asked first, so that a mistyped path is no finding about a catalog.
    if let Err(error) = std::fs::read_dir(directory) {
        return Err(format!("cannot read the catalog directory {}: {error}", directory.display()));
    }
    Ok(Report { found: control::validate(directory) })
}

impl Report {
    pub(super) fn errors(&self) -> usize {
        self.count(Severity::Error)
    }

    pub(super) fn warnings(&self) -> usize {
        self.count(Severity::Warning)
    }

    fn count(&self, severity: Severity) -> usize {
        self.found.iter().filter(|found| found.severity == severity).count()
    }

    pub(super) fn rows(&self) -> Vec<DiagnosticRow> {
        self.found.iter().map(row).collect()
    }

    /// Every finding as compilers show it, and a last line that sums up.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for found in &self.found {
            writeln!(out, "{}", found.render())?;
        }
        let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        match (self.errors(), self.warnings()) {
            (0, 0) => writeln!(out, "no findings"),
            (errors, warnings) => writeln!(out, "{}, {}", plural(errors, "error"), plural(warnings, "warning")),
        }
    }
}

fn row(found: &Diagnostic) -> DiagnosticRow {
    DiagnosticRow {
        file: found.file.clone(),
        line: found.line,
        column: found.column,
        code: found.code.to_string(),
        severity: found.severity.as_str().to_owned(),
        object: found.object.clone(),
        message: found.message.clone(),
        help: found.help.clone(),
    }
}
