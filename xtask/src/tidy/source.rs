//! A source file as the rules see it: comments and literals blanked, test code told from the rest.

use std::path::{Path, PathBuf};

/// One file.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Relative to the workspace.
    pub path: PathBuf,
    pub text: String,
    /// The text with comments, strings and characters blanked, line by line as long as before.
    pub code: String,
    /// The comments alone.
    pub comments: String,
    /// `code` with everything blanked that only tests compile.
    pub production: String,
    /// Files that hold the modules this file declares for tests only.
    pub test_modules: Vec<PathBuf>,
}

impl Source {
    pub(crate) fn new(path: impl Into<PathBuf>, text: impl Into<String>) -> Self {
        let (path, text) = (path.into(), text.into());
        let (code, comments) = split(&text);
        let (production, modules) = blank_tests(&code);
        let test_modules = modules.iter().flat_map(|module| module_files(&path, module)).collect();
        Self { path, text, code, comments, production, test_modules }
    }

    /// Nothing in this file is for production.
    pub(crate) fn mark_as_test(&mut self) {
        self.production = blank(&self.production);
    }

    /// `<crate>` and the path below its `src`, if it is there.
    pub(crate) fn place(&self) -> Option<(&str, &Path)> {
        let mut parts = self.path.components();
        let member = parts.next()?.as_os_str().to_str()?;
        let below = parts.as_path().strip_prefix("src").ok()?;
        Some((member, below))
    }
}

/// 1-based line of a byte offset.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// Where `module` may live when the file at `path` declares it.
fn module_files(path: &Path, module: &str) -> Vec<PathBuf> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let folder = if ["mod", "lib", "main"].contains(&stem) { folder.to_owned() } else { folder.join(stem) };
    vec![folder.join(format!("{module}.rs")), folder.join(module).join("mod.rs")]
}

fn blank(text: &str) -> String {
    text.chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect()
}

/// Code and comments, each with everything else blanked; literals are in neither.
fn split(text: &str) -> (String, String) {
    let characters: Vec<char> = text.chars().collect();
    let (mut code, mut comments) = (String::with_capacity(text.len()), String::with_capacity(text.len()));
    let mut at = 0;
    while at < characters.len() {
        let length = literal_or_comment(&characters, at);
        let part: String = characters[at..at + length.max(1)].iter().collect();
        let is_comment = part.starts_with("//") || part.starts_with("/*");
        code.push_str(&if length == 0 { part.clone() } else { blank(&part) });
        comments.push_str(&if is_comment { part } else { blank(&part) });
        at += length.max(1);
    }
    (code, comments)
}

/// Number of characters of the comment, string or character that starts here; 0 if none does.
fn literal_or_comment(characters: &[char], at: usize) -> usize {
    let rest = &characters[at..];
    let identifier_before = at > 0 && is_identifier(characters[at - 1]);
    match rest {
        ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
        ['/', '*', ..] => block_comment(rest),
        ['"', ..] => quoted(rest, 0),
        ['b' | 'c', '"', ..] if !identifier_before => quoted(rest, 1),
        ['r', '"' | '#', ..] if !identifier_before => raw_string(rest, 1),
        ['b' | 'c', 'r', '"' | '#', ..] if !identifier_before => raw_string(rest, 2),
        ['b', '\'', ..] if !identifier_before => character(&rest[1..]).map_or(0, |length| length + 1),
        ['\'', ..] => character(rest).unwrap_or(0),
        _ => 0,
    }
}

fn block_comment(rest: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        match &rest[at..] {
            ['/', '*', ..] => {
                depth += 1;
                at += 2;
            }
            ['*', '/', ..] => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    at
}

fn quoted(rest: &[char], prefix: usize) -> usize {
    let mut at = prefix + 1;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_string(rest: &[char], prefix: usize) -> usize {
    let hashes = rest[prefix..].iter().take_while(|&&c| c == '#').count();
    if rest.get(prefix + hashes) != Some(&'"') {
        return 0;
    }
    let mut at = prefix + hashes + 1;
    while at < rest.len() {
        let closed = rest[at] == '"' && rest[at + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes;
        if closed {
            return at + 1 + hashes;
        }
        at += 1;
    }
    rest.len()
}

/// A character literal; a lifetime is none.
fn character(rest: &[char]) -> Option<usize> {
    match rest {
        ['\'', '\\', ..] => rest[3..].iter().position(|&c| c == '\'').map(|end| end + 4),
        ['\'', _, '\'', ..] => Some(3),
        _ => None,
    }
}

pub(crate) fn is_identifier(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Blanks items under `#[cfg(test)]`; returns the names of modules that such items declare without a body.
fn blank_tests(code: &str) -> (String, Vec<String>) {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let (mut out, mut modules) = (String::with_capacity(code.len()), Vec::new());
    let mut rest = code;
    while let Some(start) = rest.find(ATTRIBUTE) {
        let (before, item) = rest.split_at(start);
        out.push_str(before);
        let body = after_attributes(item);
        let end = item.len() - body.len() + item_end(body);
        let mut words = body.split_ascii_whitespace().skip_while(|word| word.starts_with("pub"));
        if let (Some("mod"), Some(name)) = (words.next(), words.next().and_then(|name| name.strip_suffix(';'))) {
            modules.push(name.to_owned());
        }
        out.push_str(&blank(&item[..end]));
        rest = &item[end..];
    }
    out.push_str(rest);
    (out, modules)
}

fn after_attributes(item: &str) -> &str {
    let mut rest = item.trim_start();
    while rest.starts_with("#[") {
        let length = matching(rest, 1).unwrap_or(rest.len());
        rest = rest[length..].trim_start();
    }
    rest
}

/// Where the item that starts here ends: after its `;` or its braces.
fn item_end(item: &str) -> usize {
    let mut nested = 0;
    for (at, c) in item.char_indices() {
        match c {
            '(' | '[' => nested += 1,
            ')' | ']' => nested -= 1,
            ';' if nested == 0 => return at + 1,
            '{' if nested == 0 => {
                let end = matching(item, at).unwrap_or(item.len());
                // `use a::{b};`
                return end + usize::from(item[end..].starts_with(';'));
            }
            _ => {}
        }
    }
    item.len()
}

/// The offset after the bracket that closes the one at `open`.
pub(crate) fn matching(text: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in text[open..].char_indices() {
        match c {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => {
                depth -= 1;
                if depth == 0 {
                    return Some(open + at + c.len_utf8());
                }
            }
            _ => {}
        }
    }
    None
}

/// Offsets at which `word` stands by itself.
pub(crate) fn words(code: &str, word: &str) -> Vec<usize> {
    let bounded = |at: usize| {
        let before = code[..at].chars().next_back().is_some_and(is_identifier);
        let after = code[at + word.len()..].chars().next().is_some_and(is_identifier);
        !before && !after
    };
    code.match_indices(word).map(|(at, _)| at).filter(|&at| bounded(at)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_stay() {
        let text = "a // b\n/* c /* d */ e */ f\n\"g\\\"h\" 'i' '\\'' b'j' b\"k\" r#\"l\"m\"# 'static r#type\n";
        let (code, comments) = split(text);
        assert_eq!(code.split_ascii_whitespace().collect::<Vec<_>>(), ["a", "f", "'static", "r#type"]);
        assert_eq!(comments.split_ascii_whitespace().collect::<String>(), "//b/*c/*d*/e*/");
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn what_only_tests_compile_is_no_production_code() {
        let source = Source::new(
            "mesh-userspace/src/engine/diff.rs",
            "fn a() {}\n#[cfg(test)]\nuse b::{c};\n#[cfg(test)]\n#[path = \"x\"]\nmod d {\n fn e() {}\n}\nfn f() {}\n\
             #[cfg(test)]\nmod g;\n#[cfg(test)]\npub(crate) mod h;\n",
        );
        assert_eq!(
            source.production.split_ascii_whitespace().collect::<Vec<_>>(),
            ["fn", "a()", "{}", "fn", "f()", "{}"]
        );
        assert!(source.test_modules.contains(&"mesh-userspace/src/engine/diff/g.rs".into()));
        assert!(source.test_modules.contains(&"mesh-userspace/src/engine/diff/h.rs".into()));
        let source = Source::new("mesh-userspace/src/engine/mod.rs", "#[cfg(test)] mod tests;");
        assert!(source.test_modules.contains(&"mesh-userspace/src/engine/tests.rs".into()));
    }

    #[test]
    fn a_word_is_not_found_inside_another() {
        assert_eq!(words("aya myaya aya_ebpf aya::x", "aya"), [0, 19]);
    }
}
