//! Hands the eBPF object to the daemon: the object is built by `cargo xtask build-ebpf`, whose path arrives in
//! `NODEMESH_EBPF_OBJECT`, or lies where that verb leaves it.
#![allow(clippy::disallowed_methods, reason = "cargo speaks to build scripts through the environment")]

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=NODEMESH_EBPF_OBJECT");
    let object = std::env::var_os("NODEMESH_EBPF_OBJECT").map_or_else(default_object, PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    assert!(
        object.is_file(),
        "no eBPF object at {}: run `cargo xtask build-ebpf` first (every other xtask verb does it by itself)",
        object.display()
    );
    println!("cargo::rustc-env=NODEMESH_EBPF_OBJECT={}", object.display());
}

fn default_object() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    Path::new(&manifest).join("../target/ebpf/mesh-ebpf.o")
}
