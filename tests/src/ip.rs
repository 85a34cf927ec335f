//! The `ip` program, always told which namespace to work in.

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::process::{Command, Stdio};

/// Runs many commands in one namespace by one process; the first that fails ends it.
pub(crate) fn batch(namespace: &str, lines: &[String]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", namespace, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `ip`: install iproute2")?;
    let mut stdin = child.stdin.take().context("the child has a stdin")?;
    stdin.write_all(lines.join("\n").as_bytes()).context("cannot write to `ip`")?;
    stdin.write_all(b"\n")?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "`ip -n {namespace}` refused: {}\nof:\n  {}",
            String::from_utf8_lossy(&output.stderr).trim(),
            lines.join("\n  ")
        );
    }
    Ok(())
}

/// `ip netns add|del NAME`: the only verbs used outside a namespace.
pub(crate) fn netns(verb: &str, name: &str) -> Result<()> {
    let output = Command::new("ip").args(["netns", verb, name]).output().context("cannot start `ip`")?;
    if !output.status.success() {
        bail!("`ip netns {verb} {name}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
