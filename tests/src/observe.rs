//! What scenarios ask of a cluster: a client in a pod, a daemon's counters, its documents.

use crate::cluster::Cluster;
use crate::program::{Program, Running, binary};
use crate::report::Call;
use crate::scrape::Metrics;
use crate::wait;
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::ffi::OsStr;

impl Cluster {
    /// Runs `mesh-probe` in a pod; it must succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn run_probe<S: AsRef<OsStr>>(&self, pod: &str, arguments: impl IntoIterator<Item = S>) -> Result<Call> {
        Program::probe(arguments).run_in(self.world.place(pod))?.success()?.json()
    }

    /// Starts `mesh-probe hold` in a pod and waits until all its connections are open. They end with
    /// [`Running::wait`].
    ///
    /// # Errors
    /// If one of them cannot be opened.
    pub fn hold<S: AsRef<OsStr>>(&self, pod: &str, arguments: impl IntoIterator<Item = S>) -> Result<Running> {
        let mut running = Program::probe(["hold"]).args(arguments).start_in(self.world.place(pod))?;
        running.wait_for_text("holding")?;
        Ok(running)
    }

    /// Starts `mesh-probe echo` in a pod and waits until it listens.
    ///
    /// # Errors
    /// If it does not.
    pub fn serve(&self, pod: &str, port: u16, arguments: &[&str]) -> Result<Running> {
        let program = Program::probe(["echo", "--port", &port.to_string()]).args(arguments);
        let mut running = program.start_in(self.world.place(pod))?;
        running.wait_for_listener(port)?;
        Ok(running)
    }

    /// Kernel counter of a node.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn outcome(&self, node: &str, hook: &str, reason: &str) -> Result<u64> {
        let labels = [("hook", hook), ("reason", reason)];
        Ok(self.daemon(node).metrics()?.count("nodemesh_kernel_outcomes_total", &labels))
    }

    /// What `nodemesh ... -o json` prints.
    ///
    /// # Errors
    /// If it fails or prints something else.
    pub fn document<T: DeserializeOwned>(&self, node: &str, arguments: &[&str]) -> Result<T> {
        self.nodemesh(node, &[arguments, &["-o", "json"]].concat())?.success()?.json()
    }

    /// The one row of `nodemesh status`.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn status(&self, node: &str) -> Result<Value> {
        let mut document: Value = self.document(node, &["status"])?;
        document.pointer_mut("/items/0").map(Value::take).context("status is one row")
    }

    /// Waits until a condition on a node's counters holds; returns them.
    ///
    /// # Errors
    /// If it does not within the bound; the message holds the family's samples.
    pub fn wait_for_metrics(
        &self,
        node: &str,
        family: &str,
        mut holds: impl FnMut(&Metrics) -> bool,
    ) -> Result<Metrics> {
        wait::until_ok(&format!("{family} of {node} is as expected"), wait::BOUND, || {
            let metrics = self.daemon(node).metrics()?;
            if holds(&metrics) {
                return Ok(metrics);
            }
            let lines: Vec<&str> = metrics.text().lines().filter(|line| line.starts_with(family)).collect();
            bail!("{}", lines.join("\n"))
        })
    }

    /// `nodemeshd` with a verb and this node's configuration, where the daemon runs.
    ///
    /// # Errors
    /// If it cannot be started or does not end.
    pub fn nodemeshd(&self, node: &str, verb: &str) -> Result<crate::program::Output> {
        let daemon = self.daemon(node);
        let program = Program::new(binary("nodemeshd")).args([verb, "-c"]).args([daemon.config()]);
        program.run_in(daemon.place())
    }
}
