//! One finding about a catalog, with its place, for people and for programs.

use super::{Code, Severity};
use serde::Serialize;
use std::fmt::Write;
use std::sync::Arc;

/// Findings kept for one file; what is wrong a thousand times is said often enough.
const MAX_FINDINGS: usize = 200;

/// Characters of a source line that a rendered finding shows.
const MAX_SOURCE_LINE: usize = 160;

/// A place in a file: line and column count from 1 and in characters; 0 is the file as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub line: u32,
    pub column: u32,
    /// Number of characters, at least 1 where there is a place at all.
    pub width: u32,
}

impl Position {
    /// The file as a whole.
    pub const FILE: Self = Self { line: 0, column: 0, width: 0 };
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    pub code: Code,
    pub severity: Severity,
    /// The file's name within the catalog directory; `.` is the directory itself.
    pub file: String,
    /// Counts from 1; 0 if the finding is about the file as a whole.
    pub line: u32,
    /// Counts characters from 1; 0 if the finding is about the file as a whole.
    pub column: u32,
    /// Kind and name of the object, as in `Service shop/cart`, where known.
    pub object: Option<String>,
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// The line's text, for [`Self::render`].
    #[serde(skip)]
    source: Option<String>,
    #[serde(skip)]
    width: u32,
}

impl Diagnostic {
    /// The finding as compilers show it, ending in a newline.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("{}[{}]: ", self.severity.as_str(), self.code);
        if let Some(object) = &self.object {
            let _ = write!(text, "{object}: ");
        }
        let _ = writeln!(text, "{}", self.message);
        let gutter = if self.line == 0 { 1 } else { self.line.ilog10() as usize + 1 };
        let _ = write!(text, "{:gutter$}--> {}", "", self.file);
        if self.line > 0 {
            let _ = write!(text, ":{}:{}", self.line, self.column);
        }
        text.push('\n');
        if let Some(source) = &self.source {
            let indent = self.column.saturating_sub(1) as usize;
            let room = source.chars().count().saturating_sub(indent).max(1);
            let carets = "^".repeat((self.width.max(1) as usize).min(room));
            let _ = writeln!(text, "{:gutter$} |", "");
            let _ = writeln!(text, "{} | {source}", self.line);
            let _ = writeln!(text, "{:gutter$} | {:indent$}{carets}", "", "");
        }
        if let Some(help) = &self.help {
            let _ = writeln!(text, "{:gutter$} = help: {help}", "");
        }
        text
    }
}

/// A file's text with its name: what findings point into.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) file: Arc<str>,
    pub(super) text: Arc<str>,
    /// Where each line begins, in bytes.
    lines: Arc<[usize]>,
}

impl Source {
    pub(super) fn new(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into(), lines: line_starts(text).into() }
    }

    /// The text of a line, counted from 1, without its end.
    pub(super) fn line(&self, number: u32) -> Option<&str> {
        let index = (number as usize).checked_sub(1)?;
        let start = *self.lines.get(index)?;
        let end = self.lines.get(index + 1).copied().unwrap_or(self.text.len());
        Some(self.text.get(start..end)?.trim_end_matches(['\r', '\n']))
    }

    /// A finding at a place in this file.
    #[must_use]
    pub(super) fn diagnostic(
        &self,
        code: Code,
        at: Position,
        object: Option<String>,
        message: String,
        help: Option<String>,
    ) -> Diagnostic {
        let line = self.line(at.line);
        // A line cut in the middle would move the marker; a place beyond the cut shows no line at all.
        let shown = line.filter(|_| (at.column as usize) < MAX_SOURCE_LINE).map(visible);
        Diagnostic {
            code,
            severity: code.severity(),
            file: self.file.to_string(),
            line: at.line,
            column: at.column,
            object,
            message,
            help,
            source: shown,
            width: at.width,
        }
    }
}

/// YAML's line breaks: line feed, carriage return, or both together.
fn line_starts(text: &str) -> Vec<usize> {
    let bytes = text.as_bytes();
    let breaks = bytes.iter().enumerate().filter(|(index, byte)| match byte {
        b'\n' => true,
        b'\r' => bytes.get(index + 1) != Some(&b'\n'),
        _ => false,
    });
    std::iter::once(0).chain(breaks.map(|(index, _)| index + 1)).collect()
}

/// The line as a terminal may show it: control characters (tabs among them) become one space each, so that the marker
/// stays below its place.
fn visible(line: &str) -> String {
    line.chars().take(MAX_SOURCE_LINE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Collects the findings of one file while it is read.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) source: Source,
    /// The object that is being read, once it is known.
    pub(super) object: Option<String>,
    found: Vec<Diagnostic>,
    errors: usize,
}

impl Findings {
    pub(super) fn new(source: Source) -> Self {
        Self { source, object: None, found: Vec::new(), errors: 0 }
    }

    pub(super) fn report(&mut self, code: Code, at: Position, message: String, help: Option<String>) {
        self.errors += usize::from(code.severity() == Severity::Error);
        if self.found.len() < MAX_FINDINGS {
            self.found.push(self.source.diagnostic(code, at, self.object.clone(), message, help));
        } else if self.found.len() == MAX_FINDINGS {
            let message = format!("more than {MAX_FINDINGS} findings, the rest is not shown");
            self.found.push(self.source.diagnostic(Code::TooManyFindings, Position::FILE, None, message, None));
        }
    }

    /// Errors so far, also those beyond what is kept.
    pub(super) fn errors(&self) -> usize {
        self.errors
    }

    pub(super) fn into_diagnostics(self) -> Vec<Diagnostic> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_reads_like_a_compilers() {
        let source = Source::new("routes.yaml", "kind: Service\nspec:\n  selectr: {app: cart}\n");
        let at = Position { line: 3, column: 3, width: 7 };
        let help = Some("did you mean `selector`?".to_owned());
        let object = Some("Service shop/cart".to_owned());
        let found = source.diagnostic(Code::UnknownField, at, object, "unknown field `selectr` in `spec`".into(), help);
        assert_eq!(
            found.render(),
            "error[M0203]: Service shop/cart: unknown field `selectr` in `spec`\n \
             --> routes.yaml:3:3\n  |\n3 |   selectr: {app: cart}\n  |   ^^^^^^^\n  = help: did you mean `selector`?\n"
        );
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!((json["code"].as_str(), json["severity"].as_str()), (Some("M0203"), Some("error")));
        assert_eq!((json["line"].as_u64(), json["column"].as_u64()), (Some(3), Some(3)));
    }

    #[test]
    fn every_kind_of_line_break_counts() {
        let source = Source::new("a.yaml", "one\ntwo\r\nthree\rfour");
        let lines: Vec<_> = (0..6).map(|number| source.line(number)).collect();
        assert_eq!(lines, [None, Some("one"), Some("two"), Some("three"), Some("four"), None]);
    }

    #[test]
    fn a_finding_about_a_file_has_no_line() {
        let found = Source::new("a.yaml", "").diagnostic(Code::Empty, Position::FILE, None, "empty".into(), None);
        assert_eq!(found.render(), "error[M0105]: empty\n --> a.yaml\n");
    }

    #[test]
    fn one_file_cannot_flood_the_report() {
        let mut findings = Findings::new(Source::new("a.yaml", "x"));
        for _ in 0..10_000 {
            findings.report(Code::Syntax, Position::FILE, "no".into(), None);
        }
        assert_eq!(findings.errors(), 10_000);
        let found = findings.into_diagnostics();
        assert_eq!((found.len(), found.last().unwrap().code), (MAX_FINDINGS + 1, Code::TooManyFindings));
    }
}
