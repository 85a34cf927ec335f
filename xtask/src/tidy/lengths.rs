//! How long files and functions may be. Test code does not count.

use super::source::{Source, is_identifier, line_of, matching, words};
use super::{Finding, Severity};

const FILE_SOFT: usize = 400;
const FILE_HARD: usize = 500;
const FUNCTION_SOFT: usize = 60;

/// Files that are kept shorter: what they do belongs elsewhere.
const SHORT: &[(&str, usize)] =
    &[("mesh-userspace/src/bin/", 60), ("mesh-userspace/src/app.rs", 150), ("mesh-userspace/src/runtime/", 200)];

/// Families of scenarios: one after the other, without structure that could be lost.
const SCENARIOS: &str = "tests/tests/";

pub(crate) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lines = production_lines(source);
    let path = source.path.to_string_lossy();
    let short = SHORT.iter().find(|(start, _)| path.starts_with(start)).map(|(_, limit)| *limit);
    let hard = short.unwrap_or(FILE_HARD);
    if lines > hard && !path.starts_with(SCENARIOS) {
        findings.push(Finding::new(&source.path, 1, "length", format!("{lines} lines, {hard} at most: split it")));
    } else if lines > FILE_SOFT {
        let message = format!("{lines} lines, better {FILE_SOFT} at most");
        findings.push(Finding::new(&source.path, 1, "length", message).with(Severity::Advice));
    }
    for (name, line, length) in functions(&source.production) {
        if length > FUNCTION_SOFT {
            let message = format!("`{name}` has {length} lines, better {FUNCTION_SOFT} at most");
            findings.push(Finding::new(&source.path, line, "length", message).with(Severity::Advice));
        }
    }
    findings
}

/// Lines of the file without those that only tests compile.
fn production_lines(source: &Source) -> usize {
    let lines = source.code.lines().zip(source.production.lines());
    lines.filter(|(code, production)| code == production).count()
}

fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for at in words(code, "fn") {
        let name: String = code[at + 2..].trim_start().chars().take_while(|&c| is_identifier(c)).collect();
        let body =
            code[at..].find(['{', ';']).map(|offset| at + offset).filter(|&offset| code[offset..].starts_with('{'));
        // A function pointer's type has no name, a declaration no body.
        if let Some(end) = body.filter(|_| !name.is_empty()).and_then(|open| matching(code, open)) {
            found.push((name, line_of(code, at), code[at..end].lines().count()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<Severity> {
        check(&Source::new(path, text)).into_iter().map(|finding| finding.severity).collect()
    }

    #[test]
    fn long_files_are_refused_and_longish_ones_reported() {
        assert!(findings("xtask/src/a.rs", &"x();\n".repeat(400)).is_empty());
        assert_eq!(findings("xtask/src/a.rs", &"x();\n".repeat(401)), [Severity::Advice]);
        assert_eq!(findings("xtask/src/a.rs", &"x();\n".repeat(501)), [Severity::Error]);
        assert_eq!(findings("tests/tests/a.rs", &"x();\n".repeat(501)), [Severity::Advice]);
        assert_eq!(findings("mesh-userspace/src/bin/nodemesh.rs", &"x();\n".repeat(61)), [Severity::Error]);
    }

    #[test]
    fn tests_do_not_count() {
        let tests = format!("x();\n#[cfg(test)]\nmod tests {{\n{}}}\n", "x();\n".repeat(600));
        assert!(findings("xtask/src/a.rs", &tests).is_empty());
    }

    #[test]
    fn long_functions_are_reported() {
        let long = format!("fn f() {{\n{}}}\n", "x();\n".repeat(60));
        assert_eq!(findings("xtask/src/a.rs", &long), [Severity::Advice]);
        assert!(findings("xtask/src/a.rs", &long.replacen("x();\n", "", 2)).is_empty());
    }
}
