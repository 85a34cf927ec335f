//! Tests, from the house rules to scenarios on a testbed.

use crate::process::{cargo, output, root, run, target};
use crate::{ebpf, instructions, packages, setup, tidy};
use anyhow::{Context, Result, bail};
use std::process::Command;
use std::time::Instant;

/// Scenarios at the same time: each runs several daemons and clients.
const SCENARIO_THREADS: &str = "--test-threads=2";

/// Everything but the eBPF programs, which build for another machine.
const WORKSPACE: [&str; 3] = ["--workspace", "--exclude", "mesh-ebpf"];

/// Runs all of it; the first failure ends it.
pub(crate) fn test() -> Result<()> {
    if output(Command::new("id").arg("-u"))? != "0" {
        bail!("scenarios make network namespaces, control groups and BPF programs: run this as root");
    }
    let started = Instant::now();
    step("setup", setup::everything)?;
    step("eBPF object", || ebpf::build(false))?;
    step("tidy", tidy::check)?;
    step("clippy", || {
        run(cargo().arg("clippy").args(WORKSPACE).args(["--all-targets", "--quiet", "--", "-D", "warnings"]))?;
        ebpf::lint()
    })?;
    step("build", || run(cargo().args(["build", "--quiet"]).args(WORKSPACE).arg("--all-targets")))?;
    step("unit tests", || run(cargo().args(["test", "--quiet"]).args(WORKSPACE).args(["--lib", "--bins"])))?;
    step("doc tests", || run(cargo().args(["test", "--quiet", "--doc"]).args(WORKSPACE)))?;
    step("instructions", instructions::check)?;
    step("scenarios", scenarios)?;
    step("demo", || run(Command::new(binary("demo")).arg("--once").current_dir(root())))?;
    report_sizes()?;
    eprintln!("test: all passed in {} s", started.elapsed().as_secs());
    Ok(())
}

/// Removes what killed test processes left behind.
pub(crate) fn clean_testbed() -> Result<()> {
    // Whoever left something behind has built it.
    if !binary("mesh-world").is_file() {
        run(cargo().args(["build", "--quiet", "--package", "mesh-tests", "--bin", "mesh-world"]))?;
    }
    sweep().map(|removed| match removed.as_str() {
        "" => eprintln!("clean-testbed: nothing was left behind"),
        removed => println!("{removed}"),
    })
}

/// The scenario of rotating certificates, for as long as a release deserves.
pub(crate) fn soak() -> Result<()> {
    step("setup", setup::everything)?;
    step("eBPF object", || ebpf::build(false))?;
    step("build", || run(cargo().args(["build", "--quiet"]).args(WORKSPACE).arg("--all-targets")))?;
    sweep()?;
    let how = ["--test", "rotation", "--", "--exact", "traffic_survives_every_rotation", "--show-output"];
    step("soak", || run(cargo().env("NODEMESH_SOAK", "1").arg("test").args(WORKSPACE).args(how)))
}

/// Two nodes with real programs, and a table of what happened between them.
pub(crate) fn demo(arguments: &[String]) -> Result<()> {
    setup::everything()?;
    eprintln!("demo: building the eBPF programs");
    ebpf::build(false)?;
    eprintln!("demo: building the daemon and the testbed (some minutes the first time)");
    run(cargo().args(["build", "--package", "mesh-userspace", "--package", "mesh-tests", "--bins"]))?;
    run(Command::new(binary("demo")).args(arguments).current_dir(root()))
}

/// Instructions of what runs often, held against the record or recorded.
pub(crate) fn instructions(arguments: &[String]) -> Result<()> {
    setup::everything()?;
    ebpf::build(false)?;
    eprintln!("instructions: building what is measured (some minutes the first time)");
    if arguments.iter().any(|argument| argument == "--record") { instructions::record() } else { instructions::check() }
}

/// Figures from the testbed, taken with the build that users run.
pub(crate) fn bench(arguments: &[String]) -> Result<()> {
    setup::everything()?;
    eprintln!("bench: building the eBPF programs");
    ebpf::build(false)?;
    eprintln!("bench: building the daemon and the testbed, optimised (some minutes the first time)");
    run(cargo().args(["build", "--release", "--package", "mesh-userspace", "--package", "mesh-tests", "--bins"]))?;
    let mut bench = Command::new(target().join("release/bench"));
    if arguments.first().is_none_or(|first| first.starts_with('-')) {
        bench.arg("--envoy").arg(packages::install_peers()?);
    }
    let is_micro = arguments.first().is_some_and(|first| first == "micro");
    if is_micro {
        eprintln!("bench: the time of what runs often, in the build that users run");
        run(cargo().args(["bench", "--package", "mesh-userspace", "--bench", "micro"]))?;
    }
    run(bench.args(arguments).current_dir(root()))?;
    // Last, for it may fail: the others are figures, not verdicts.
    if is_micro { instructions::check() } else { Ok(()) }
}

fn step(name: &str, verb: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("test: {name}");
    let started = Instant::now();
    verb().with_context(|| format!("{name} failed"))?;
    eprintln!("test: {name} took {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn scenarios() -> Result<()> {
    sweep()?;
    // The same selection of packages as in the steps before: another one has other features and builds all again.
    // What scenarios measure and print (memory, bytes held) is part of the run's output.
    let how = ["--no-fail-fast", "--test", "*", "--", SCENARIO_THREADS, "--show-output"];
    run(cargo().arg("test").args(WORKSPACE).args(how))?;
    let left = sweep()?;
    if !left.is_empty() {
        bail!("scenarios left something behind; it is gone now:\n{left}");
    }
    Ok(())
}

fn sweep() -> Result<String> {
    output(Command::new(binary("mesh-world")).arg("sweep"))
}

fn binary(name: &str) -> std::path::PathBuf {
    target().join("debug").join(name)
}

fn report_sizes() -> Result<()> {
    let mut sizes = Vec::new();
    for path in [binary("nodemeshd"), binary("nodemesh"), target().join("ebpf/mesh-ebpf.o")] {
        let bytes = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        sizes.push(format!("{name} {:.1} MB", bytes as f64 / 1e6));
    }
    eprintln!("test: sizes of the development build: {}", sizes.join(", "));
    Ok(())
}
