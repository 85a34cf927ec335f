//! What the small crates may depend on.

use super::Finding;
use std::path::Path;

/// The contract's crate depends on `core` alone (aya only to mark its types in user space), the programs on little more.
const MAY_DEPEND: &[(&str, &[&str])] =
    &[("mesh-common", &["aya"]), ("mesh-ebpf", &["aya-ebpf", "aya-log-ebpf", "mesh-common"])];

/// Checks the `Cargo.toml` of a member.
pub(crate) fn check(member: &str, manifest: &str) -> Vec<Finding> {
    let Some((_, allowed)) = MAY_DEPEND.iter().find(|(name, _)| *name == member) else { return Vec::new() };
    let path = Path::new(member).join("Cargo.toml");
    let mut section = "";
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(manifest.lines().map(str::trim)) {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
            continue;
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
        let dependency = section == "dependencies" && !name.is_empty() && !name.starts_with('#');
        if dependency && !allowed.contains(&name) {
            findings.push(Finding::new(
                &path,
                number,
                "dependencies",
                format!("`{member}` may not depend on `{name}`"),
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_dependency_of_the_contract_is_refused() {
        let manifest = "[package]\nname = \"x\"\n[dependencies]\n# why\naya = { optional = true }\nlibc.workspace = true\n\
                        [dev-dependencies]\nproptest = \"1\"\n";
        let lines: Vec<usize> = check("mesh-common", manifest).into_iter().map(|finding| finding.line).collect();
        assert_eq!(lines, [6]);
        assert!(check("mesh-userspace", manifest).is_empty());
    }
}
