//! What the verbs need beyond cargo: the standard library's source, bpf-linker, cargo-deny, and programs to run.

use crate::packages;
use crate::process::{cargo, output, run, target};
use anyhow::{Context, Result, bail};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

const BPF_LINKER: &str = "0.13.0";

const CARGO_DENY: &str = "0.20.2";

/// Installs whatever any verb needs and is missing; says so before it does.
pub(crate) fn everything() -> Result<()> {
    build_tools()?;
    packages::install()?;
    cargo_deny().map(|_| ())
}

/// Installs what the build needs and is missing.
pub(crate) fn build_tools() -> Result<()> {
    rust_src()?;
    bpf_linker()
}

/// Installs cargo-deny if it is missing, and returns where it is.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let path = target().join("tools/bin/cargo-deny");
    let installed = output(Command::new(&path).arg("--version"));
    if !installed.is_ok_and(|version| version.ends_with(CARGO_DENY)) {
        eprintln!("setup: building cargo-deny {CARGO_DENY} (about 4 minutes, once)");
        run(cargo()
            .args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--root"])
            .arg(target().join("tools"))
            .env_remove("RUSTFLAGS"))?;
    }
    Ok(path)
}

/// Where `build_tools` puts bpf-linker.
pub(crate) fn bpf_linker_path() -> PathBuf {
    target().join("tools/bin/bpf-linker")
}

fn sysroot() -> Result<PathBuf> {
    Ok(PathBuf::from(output(Command::new("rustc").arg("--print").arg("sysroot"))?))
}

/// eBPF programs build `core` themselves, so they need its source.
fn rust_src() -> Result<()> {
    if sysroot()?.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        return Ok(());
    }
    eprintln!("setup: installing rust-src");
    run(Command::new("rustup").args(["component", "add", "rust-src"]))
        .context("the eBPF object needs the standard library's source: install the component rust-src")
}

/// bpf-linker must match rustc's LLVM, so it is linked against the very library that rustc ships: no LLVM package.
fn bpf_linker() -> Result<()> {
    let installed = output(Command::new(bpf_linker_path()).arg("--version"));
    if installed.is_ok_and(|version| version.ends_with(BPF_LINKER)) {
        return Ok(());
    }
    eprintln!("setup: building bpf-linker {BPF_LINKER} against rustc's own LLVM (1 to 3 minutes, once)");
    let (library, major) = rustc_llvm(&sysroot()?.join("lib"))?;
    let prefix = target().join("tools/llvm");
    let folder = prefix.join("lib");
    std::fs::create_dir_all(&folder)?;
    let file_name = library.file_name().context("the LLVM library has a file name")?.to_owned();
    for name in [Path::new("libLLVM.so"), Path::new(&file_name)] {
        let link = folder.join(name);
        if link.symlink_metadata().is_ok() {
            std::fs::remove_file(&link)?;
        }
        symlink(&library, &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    run(cargo()
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force", "--no-default-features"])
        .args(["--features", &format!("llvm-{major}")])
        .arg("--root")
        .arg(target().join("tools"))
        .env("LLVM_PREFIX", &prefix)
        .env_remove("RUSTFLAGS"))
}

/// rustc's LLVM: `libLLVM.so.<major>.<minor>-rust-<version>`.
fn rustc_llvm(folder: &Path) -> Result<(PathBuf, String)> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(version) = name.strip_prefix("libLLVM.so.") {
            let major = version.split('.').next().unwrap_or_default().to_owned();
            return Ok((path, major));
        }
    }
    bail!("no libLLVM.so.* in {}: bpf-linker needs a rustc that ships LLVM as a shared library", folder.display())
}
