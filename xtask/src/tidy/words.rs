//! Words that must not appear, and where.

use super::Finding;
use super::layers::module_of;
use super::source::{Source, is_identifier, line_of, words};

/// Modules that are pure: time, randomness and input are their arguments.
const PURE: &[&str] = &["model", "engine", "balance"];
/// What pure modules must not name.
const IMPURE: &[&str] = &[
    "tokio",
    "aya",
    "socket2",
    "quinn",
    "rand",
    "libc",
    "rustix",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "SystemTime",
    "Instant::now",
    "std::fs",
    "std::process",
    "std::thread",
    "std::env",
];
/// Names that say nothing.
const EMPTY_NAMES: &[&str] = &["utils", "util", "helpers", "helper", "misc", "types", "common"];
const EMPTY_SUFFIXES: &[&str] = &["Manager", "Handler", "Data", "Info"];
/// How far above its block a SAFETY comment may start.
const SAFETY_DISTANCE: usize = 12;

pub(crate) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = purity(source);
    findings.extend(aya(source));
    findings.extend(unsafety(source));
    findings.extend(settings(source));
    findings.extend(names(source));
    findings.extend(unfinished(source));
    findings
}

fn found(source: &Source, code: &str, word: &str, rule: &'static str, message: &str) -> Vec<Finding> {
    let at = words(code, word).into_iter();
    at.map(|offset| Finding::new(&source.path, line_of(code, offset), rule, message)).collect()
}

fn purity(source: &Source) -> Vec<Finding> {
    let Some(("mesh-userspace", below)) = source.place() else { return Vec::new() };
    let Some(module) = module_of(below).filter(|module| PURE.contains(module)) else { return Vec::new() };
    let report = |word: &&str| {
        let message = format!("`{module}` is pure and may not name `{word}`: take it as an argument");
        found(source, &source.production, word, "purity", &message)
    };
    IMPURE.iter().flat_map(report).collect()
}

fn aya(source: &Source) -> Vec<Finding> {
    let Some(("mesh-userspace", below)) = source.place() else { return Vec::new() };
    if module_of(below) == Some("datapath") {
        return Vec::new();
    }
    found(source, &source.production, "aya", "aya", "only `datapath` names aya")
}

fn unsafety(source: &Source) -> Vec<Finding> {
    let path = source.path.to_string_lossy();
    let allowed = ["mesh-userspace/src/datapath", "mesh-userspace/src/netns", "mesh-ebpf/", "tests/"];
    let allowed = allowed.iter().any(|start| path.starts_with(start))
        || ["mesh-common/src/abi.rs", "mesh-common/src/addr.rs"].contains(&path.as_ref());
    let lines: Vec<&str> = source.text.lines().collect();
    let mut findings = Vec::new();
    for offset in words(&source.code, "unsafe") {
        let line = line_of(&source.code, offset);
        let rest = source.code[offset + "unsafe".len()..].trim_start();
        // `#[unsafe(no_mangle)]` is an attribute.
        if rest.starts_with('(') {
            continue;
        }
        if !allowed {
            findings.push(Finding::new(
                &source.path,
                line,
                "unsafe",
                "no `unsafe` outside of its rooms (STYLE: imports, 4)",
            ));
        }
        let justified = lines[line.saturating_sub(SAFETY_DISTANCE)..line].iter().any(|line| line.contains("SAFETY:"));
        if (rest.starts_with('{') || rest.starts_with("impl")) && !justified {
            findings.push(Finding::new(&source.path, line, "unsafe", "say why this is sound: `// SAFETY: ...`"));
        }
    }
    findings
}

fn settings(source: &Source) -> Vec<Finding> {
    let Some(("mesh-userspace", below)) = source.place() else { return Vec::new() };
    if below.starts_with("bin") || module_of(below) == Some("config") {
        return Vec::new();
    }
    ["std::env", "env::var", "env::vars", "env::args"]
        .iter()
        .flat_map(|word| found(source, &source.production, word, "settings", "only config.rs reads the environment"))
        .collect()
}

fn names(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let stem = source.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let folder = source.path.parent().and_then(|folder| folder.file_name()).and_then(|name| name.to_str());
    if EMPTY_NAMES.contains(&stem) || (stem == "mod" && folder.is_some_and(|name| EMPTY_NAMES.contains(&name))) {
        findings.push(Finding::new(&source.path, 1, "names", "this file's name says nothing about what is in it"));
    }
    for keyword in ["struct", "enum", "trait", "type", "mod"] {
        for offset in words(&source.code, keyword) {
            let name: String =
                source.code[offset + keyword.len()..].trim_start().chars().take_while(|&c| is_identifier(c)).collect();
            let empty = EMPTY_NAMES.contains(&name.as_str())
                || EMPTY_SUFFIXES.iter().any(|suffix| name.ends_with(suffix) && keyword != "mod");
            if empty {
                let line = line_of(&source.code, offset);
                findings.push(Finding::new(&source.path, line, "names", format!("the name `{name}` says nothing")));
            }
        }
    }
    findings
}

fn unfinished(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for word in ["todo!", "unimplemented!", "dbg!", "#[ignore"] {
        for (offset, _) in source.code.match_indices(word) {
            let line = line_of(&source.code, offset);
            findings.push(Finding::new(
                &source.path,
                line,
                "unfinished",
                format!("`{word}` is not for the main branch"),
            ));
        }
    }
    for word in ["TODO", "FIXME", "XXX", "HACK"] {
        findings.extend(found(source, &source.comments, word, "unfinished", "do it now, or open an issue"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<(&'static str, usize)> {
        check(&Source::new(path, text)).into_iter().map(|finding| (finding.rule, finding.line)).collect()
    }

    #[test]
    fn pure_modules_name_no_clock_no_socket_and_no_runtime() {
        for bad in ["use tokio::sync::mpsc;", "let t = Instant::now();", "std::fs::read(p)", "use std::net::TcpStream;"]
        {
            assert_eq!(rules("mesh-userspace/src/engine/mod.rs", bad), [("purity", 1)], "{bad}");
            assert!(rules("mesh-userspace/src/proxy/mod.rs", bad).is_empty(), "{bad}");
        }
        let fine = "fn f(now: Instant) {} // tokio\n#[cfg(test)] mod t { use tokio::x; }";
        assert!(rules("mesh-userspace/src/model/mesh.rs", fine).is_empty());
    }

    #[test]
    fn only_datapath_names_aya() {
        assert_eq!(rules("mesh-userspace/src/app/running.rs", "\nuse aya::Ebpf;"), [("aya", 2)]);
        assert!(rules("mesh-userspace/src/datapath/load.rs", "use aya::Ebpf;").is_empty());
    }

    #[test]
    fn unsafe_code_stays_in_its_rooms_and_says_why() {
        let explained = "// SAFETY: it is.\nunsafe { x() }";
        assert_eq!(rules("mesh-userspace/src/proxy/relay.rs", explained), [("unsafe", 2)]);
        assert_eq!(rules("mesh-common/src/maps.rs", explained), [("unsafe", 2)]);
        for path in
            ["mesh-userspace/src/netns/mod.rs", "mesh-common/src/abi.rs", "mesh-ebpf/src/ctx.rs", "tests/src/a.rs"]
        {
            assert!(rules(path, explained).is_empty(), "{path}");
            assert_eq!(rules(path, "unsafe { x() }"), [("unsafe", 1)], "{path}");
            assert_eq!(rules(path, "unsafe impl Send for X {}"), [("unsafe", 1)], "{path}");
            assert!(rules(path, "#[unsafe(no_mangle)]\nunsafe fn f() {}").is_empty(), "{path}");
        }
    }

    #[test]
    fn only_config_reads_the_environment() {
        assert!(rules("mesh-userspace/src/tunnel/mod.rs", "std::env::var(x)").contains(&("settings", 1)));
        assert!(rules("mesh-userspace/src/config.rs", "std::env::var(x)").is_empty());
        assert!(rules("mesh-userspace/src/tunnel/mod.rs", "env!(\"X\")").is_empty());
    }

    #[test]
    fn names_that_say_nothing_are_refused() {
        assert_eq!(rules("xtask/src/utils.rs", ""), [("names", 1)]);
        assert_eq!(rules("mesh-userspace/src/proxy/misc/mod.rs", ""), [("names", 1)]);
        for bad in
            ["struct LaneManager;", "pub(crate) enum PodInfo {}", "trait Handler {}", "type RowData = u8;", "mod util;"]
        {
            assert_eq!(rules("xtask/src/main.rs", bad), [("names", 1)], "{bad}");
        }
        assert!(rules("xtask/src/main.rs", "struct Database; struct Infos; x: PhantomData<T>").is_empty());
    }

    #[test]
    fn unfinished_work_is_refused_and_its_names_may_be_spoken_of() {
        for bad in ["todo!()", "unimplemented!()", "dbg!(x)", "#[ignore] fn t() {}", "x(); // TODO later", "/// FIXME"]
        {
            assert_eq!(rules("xtask/src/main.rs", bad), [("unfinished", 1)], "{bad}");
        }
        assert!(rules("xtask/src/main.rs", "const X: &str = \"todo!() // TODO\";").is_empty());
    }
}
