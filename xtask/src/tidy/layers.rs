//! Who may import whom in `mesh-userspace`: the table of `mesh-userspace/src/lib.rs`, checked.

use super::Finding;
use super::source::{Source, is_identifier, line_of, matching, words};
use std::path::Path;

/// Every module of the library, and the others that it may name.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("engine", &["model"]),
    ("balance", &["model", "engine"]),
    ("identity", &["model", "engine", "balance"]),
    ("datapath", &["model", "engine", "balance", "identity"]),
    ("netns", &["model", "engine", "balance", "identity"]),
    ("control", &["model", "engine", "balance", "identity"]),
    ("tunnel", &["model", "engine", "balance", "identity"]),
    ("ca", &["model", "engine", "balance", "identity"]),
    ("dns", &["model", "engine", "balance", "identity"]),
    ("proxy", &["model", "engine", "balance", "identity", "datapath", "netns", "control", "tunnel", "ca", "dns"]),
    (
        "admin",
        &["model", "engine", "balance", "identity", "datapath", "netns", "control", "tunnel", "ca", "dns", "proxy"],
    ),
    (
        "config",
        &[
            "model", "engine", "balance", "identity", "datapath", "netns", "control", "tunnel", "ca", "dns", "proxy",
            "admin",
        ],
    ),
    (
        "app",
        &[
            "model", "engine", "balance", "identity", "datapath", "netns", "control", "tunnel", "ca", "dns", "proxy",
            "admin", "config",
        ],
    ),
    // `nodemesh join` speaks to an authority, which is on another node: not through this node's daemon.
    ("cli", &["model", "control", "admin", "ca", "identity"]),
    ("runtime", &[]),
    ("telemetry", &[]),
];

/// Leaves: they use nobody, anyone may use them.
const LEAVES: &[&str] = &["runtime", "telemetry"];

/// Imports that point the wrong way.
pub(crate) fn check(source: &Source) -> Vec<Finding> {
    let Some(("mesh-userspace", below)) = source.place() else { return Vec::new() };
    let Some(own) = module_of(below) else { return Vec::new() };
    let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == own) else {
        let message = format!("the module `{own}` is in no layer: add it to the table in xtask and to lib.rs");
        return vec![Finding::new(&source.path, 1, "layers", message)];
    };
    let wrong = |module: &str| {
        let known = MAY_IMPORT.iter().any(|(name, _)| *name == module);
        known && module != own && !allowed.contains(&module) && !LEAVES.contains(&module)
    };
    references(&source.production, below)
        .into_iter()
        .filter(|(_, module)| wrong(module))
        .map(|(offset, module)| {
            let message = format!("`{own}` may not import `{module}`: imports point to the left in lib.rs's list");
            Finding::new(&source.path, line_of(&source.production, offset), "layers", message)
        })
        .collect()
}

/// The top-level module that a file below `src` belongs to; `None` for the crate's root and for binaries.
pub(crate) fn module_of(below: &Path) -> Option<&str> {
    let first = below.iter().next()?.to_str()?;
    let name = first.strip_suffix(".rs").unwrap_or(first);
    (!["lib", "main", "bin"].contains(&name)).then_some(name)
}

/// Modules named through `crate::`, or through as many `super::` as lead to the crate's root.
fn references(code: &str, below: &Path) -> Vec<(usize, String)> {
    let is_root_of_folder = below.file_name().is_some_and(|name| name == "mod.rs");
    let depth = below.iter().count() - usize::from(is_root_of_folder);
    let up = "super::".repeat(depth);
    let mut found = Vec::new();
    for at in words(code, "crate") {
        if let Some(rest) = code[at..].strip_prefix("crate::") {
            found.extend(heads(rest).into_iter().map(|module| (at, module)));
        }
    }
    for (at, _) in code.match_indices(&up) {
        // One `super::` more would lead out of the crate: this is the inner part of a test module's path.
        let longer = code[..at].ends_with("super::");
        let inside_inline_module =
            code[..at].matches("mod ").any(|_| depth_at(code, at) > 0 && up.len() == "super::".len());
        if !longer && !inside_inline_module {
            found.extend(heads(&code[at + up.len()..]).into_iter().map(|module| (at, module)));
        }
    }
    found
}

fn depth_at(code: &str, at: usize) -> usize {
    let (open, close) = (code[..at].matches('{').count(), code[..at].matches('}').count());
    open.saturating_sub(close)
}

/// First names of a path or of each path of a group: `a::b` is `a`; `{a, b::{c}, d}` are `a`, `b`, `d`.
fn heads(path: &str) -> Vec<String> {
    let path = path.trim_start();
    let Some(end) = path.starts_with('{').then(|| matching(path, 0)).flatten() else {
        return vec![path.chars().take_while(|&c| is_identifier(c)).collect()];
    };
    let mut depth = 0;
    let mut names = vec![String::new()];
    let mut head = true;
    for c in path[1..end - 1].chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(String::new());
                head = true;
            }
            c if is_identifier(c) && depth == 0 && head => names.last_mut().expect("starts with one").push(c),
            c if c.is_whitespace() => {}
            _ => head = false,
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<usize> {
        let source = Source::new(Path::new("mesh-userspace/src").join(path), text);
        check(&source).into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn an_import_to_the_right_is_found_however_it_is_written() {
        assert_eq!(findings("model/node.rs", "use crate::engine::Tables;"), [1]);
        assert_eq!(findings("tunnel/lanes/pool.rs", "\nuse crate::{model::{Node, x}, datapath, tunnel};"), [2]);
        assert_eq!(findings("proxy/inbound.rs", "fn f() { crate::admin::serve() }"), [1]);
        assert_eq!(findings("engine/mod.rs", "use super::proxy::Proxy;"), [1]);
        assert_eq!(findings("engine/diff.rs", "use super::super::proxy::Proxy;"), [1]);
        assert_eq!(findings("config.rs", "use super::app;"), [1]);
        assert_eq!(findings("telemetry/mod.rs", "use crate::model::Node;"), [1]);
        assert_eq!(findings("netns/mod.rs", "use crate::tunnel::Peer;"), [1]);
    }

    #[test]
    fn imports_to_the_left_of_leaves_and_of_the_own_module_are_fine() {
        assert!(findings("proxy/inbound.rs", "use crate::{model::Node, tunnel, telemetry::x, proxy::y};").is_empty());
        assert!(findings("app/reconcile.rs", "use crate::config::Config; use super::sources;").is_empty());
        assert!(findings("bin/nodemeshd.rs", "use mesh_userspace::app;").is_empty());
        assert!(findings("engine/mod.rs", "// use crate::proxy;\n#[cfg(test)] mod t { use crate::proxy; }").is_empty());
        assert!(findings("engine/mod.rs", "mod proxy; mod inner { use super::proxy::x; }").is_empty());
    }

    #[test]
    fn a_module_without_a_layer_is_found() {
        assert_eq!(findings("novelty/mod.rs", ""), [1]);
    }
}
