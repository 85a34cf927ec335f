//! Builds the eBPF object with the same stable toolchain as everything else.

use crate::process::{cargo, root, run, target};
use crate::setup;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Builds `target/ebpf/mesh-ebpf.o`; with `log`, programs log every decision through aya-log.
pub(crate) fn build(log: bool) -> Result<()> {
    let mut command = bpf_cargo("build")?;
    if log {
        command.args(["--features", "log"]);
    }
    run(&mut command).context("the eBPF object does not build")?;
    let build_folder = build_folder();
    let built = build_folder.join("bpfel-unknown-none/release/mesh-ebpf");
    let object = build_folder.join("mesh-ebpf.o");
    // An unchanged object keeps its time stamp, so that the daemon is not rebuilt for nothing.
    let bytes = std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    if std::fs::read(&object).ok().as_deref() != Some(&bytes) {
        std::fs::write(&object, bytes)?;
    }
    Ok(())
}

/// clippy for the programs, on their own target.
pub(crate) fn lint() -> Result<()> {
    run(bpf_cargo("clippy")?.args(["--", "-D", "warnings"])).context("clippy finds fault with the eBPF programs")
}

fn build_folder() -> PathBuf {
    target().join("ebpf")
}

fn bpf_cargo(verb: &str) -> Result<Command> {
    setup::build_tools()?;
    let linker = setup::bpf_linker_path();
    let mut command = cargo();
    command
        .current_dir(root().join("mesh-ebpf"))
        .args([verb, "--quiet", "--release", "--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .arg("--target-dir")
        .arg(build_folder())
        // Stable rustc, one unstable cargo flag: building `core` for the BPF target.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker)
        .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "none")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    Ok(command)
}
