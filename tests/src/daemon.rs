//! `nodemeshd` on a node of the testbed.

use crate::access::{self, Access};
use crate::program::{Place, binary, place_command};
use crate::scrape::{self, Change, Metrics};
use crate::wait;
use crate::world::Node;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// TCP and UDP port of the tunnel on a node.
pub const TUNNEL_PORT: u16 = 15008;
/// TCP port of `/metrics` and `/readyz` on a node.
pub const METRICS_PORT: u16 = 9415;
/// TCP port of a certificate authority on a node.
pub const AUTHORITY_PORT: u16 = 9416;
/// TCP port of an authority's `/metrics` and `/readyz`.
const AUTHORITY_METRICS_PORT: u16 = 9417;

const READY_BOUND: Duration = Duration::from_secs(30);
/// Longer than the daemon's own drain deadline.
const STOP_BOUND: Duration = Duration::from_secs(60);

/// A daemon's files and place; the process itself may be stopped and started again.
#[derive(Debug)]
pub struct Daemon {
    node: String,
    /// What `nodemeshd` is told to do.
    verb: &'static [&'static str],
    place: Place,
    config: PathBuf,
    log: PathBuf,
    socket: PathBuf,
    bpffs: PathBuf,
    metrics: SocketAddr,
    child: Option<Child>,
    /// Soft and hard limit of open files, if not the test's own.
    descriptors: Option<u64>,
}

impl Daemon {
    /// Writes the configuration for a node and leaves the daemon stopped.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn new(node: &Node, catalog: &Path, identities: &Path) -> Result<Self> {
        Self::with(node, catalog, identities, |_| {})
    }

    /// [`Self::new`] with a chance to change the configuration document.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn with(node: &Node, catalog: &Path, identities: &Path, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let folder = node.folder();
        let (socket, bpffs) = (folder.join("admin.sock"), folder.join("bpffs"));
        fs::create_dir_all(&bpffs).with_context(|| format!("cannot make {}", bpffs.display()))?;
        let listen = [SocketAddr::from((node.v4(), TUNNEL_PORT)), SocketAddr::from((node.v6(), TUNNEL_PORT))];
        let mut document = json!({
            "node": node.name(),
            "cgroup": node.workload_cgroups(),
            "catalog": {"directory": catalog},
            "identity": {"directory": identities},
            "tunnel": {"listen": listen},
            "datapath": {"bpffs": bpffs, "pin": "nodemesh", "heartbeatTimeout": "2s"},
            "admin": {"socket": socket, "listen": format!("0.0.0.0:{METRICS_PORT}")},
            "log": {"level": "info", "format": "json"},
        });
        change(&mut document);
        let config = folder.join("nodemeshd.yaml");
        let text = serde_saphyr::to_string(&document)?;
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let metrics = SocketAddr::from((node.v4(), METRICS_PORT));
        let log = folder.join("nodemeshd.log");
        let (node, place) = (node.name().to_owned(), node.into());
        Ok(Self { node, verb: &["run"], place, config, log, socket, bpffs, metrics, child: None, descriptors: None })
    }

    /// A certificate authority on a node, which keeps its state in `folder` (made by `nodemeshd ca init`): writes its
    /// configuration and leaves it stopped.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn authority(node: &Node, catalog: &Path, folder: &Path, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let socket = node.folder().join("ca.sock");
        let listen = [SocketAddr::from((node.v4(), AUTHORITY_PORT)), SocketAddr::from((node.v6(), AUTHORITY_PORT))];
        let mut document = json!({
            "directory": folder,
            "catalog": {"directory": catalog},
            "listen": listen,
            "admin": {"socket": socket, "listen": format!("0.0.0.0:{AUTHORITY_METRICS_PORT}")},
            "log": {"level": "info", "format": "json"},
        });
        change(&mut document);
        let config = node.folder().join("ca.yaml");
        let text = serde_saphyr::to_string(&document)?;
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let metrics = SocketAddr::from((node.v4(), AUTHORITY_METRICS_PORT));
        let (log, bpffs) = (node.folder().join("ca.log"), node.folder().join("bpffs"));
        let (node, place) = (node.name().to_owned(), node.into());
        Ok(Self {
            node,
            verb: &["ca", "run"],
            place,
            config,
            log,
            socket,
            bpffs,
            metrics,
            child: None,
            descriptors: None,
        })
    }

    /// Limits the files that it may have open from its next start on.
    pub fn limit_descriptors(&mut self, limit: u64) {
        self.descriptors = Some(limit);
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// If it ends or is not ready within 30 s; the message holds the end of its log.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_until_ready()
    }

    /// Starts it without waiting.
    ///
    /// # Errors
    /// If it runs already or cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the daemon of {} runs already", self.node);
        let log = File::options().create(true).append(true).open(&self.log).context("cannot open the daemon's log")?;
        let mut command = match self.descriptors {
            Some(limit) => {
                let mut limited = Command::new("prlimit");
                limited.arg(format!("--nofile={limit}:{limit}")).arg(binary("nodemeshd"));
                limited
            }
            None => Command::new(binary("nodemeshd")),
        };
        command.args(self.verb).arg("-c").arg(&self.config);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        place_command(&mut command, &self.place)?;
        self.child = Some(command.spawn().context("cannot start nodemeshd")?);
        Ok(())
    }

    /// Waits until `/readyz` says yes.
    ///
    /// # Errors
    /// If it ends or is not ready within 30 s; the message holds the end of its log.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.wait_until_ready_within(READY_BOUND)
    }

    /// [`Self::wait_until_ready`] with another bound.
    ///
    /// # Errors
    /// If it ends or is not ready in time; the message holds the end of its log.
    pub fn wait_until_ready_within(&mut self, bound: Duration) -> Result<()> {
        let mut ended = None;
        let answer = wait::until_ok("the daemon is ready", bound, || {
            if let Some(status) = self.child.as_mut().context("it was not started")?.try_wait()? {
                ended = Some(status);
                return Ok(());
            }
            let response = scrape::get(&self.place.namespace, self.metrics, "/readyz")?;
            if response.status == 200 { Ok(()) } else { bail!("/readyz says {}: {}", response.status, response.body) }
        });
        if let Some(status) = ended {
            self.child = None;
            bail!("the daemon of {} ended with {status} before it was ready:\n{}", self.node, self.log_end());
        }
        answer.with_context(|| format!("the log of {} ends with:\n{}", self.node, self.log_end()))
    }

    /// Asks it to drain and waits for its end.
    ///
    /// # Errors
    /// If it does not end within its bound.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(STOP_BOUND)
    }

    /// Ends it at once, without a chance to clean up.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait(STOP_BOUND)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If it does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().with_context(|| format!("the daemon of {} does not run", self.node))?;
        kill_process(Pid::from_child(child), signal)
            .with_context(|| format!("cannot signal the daemon of {}", self.node))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not run or does not end within the bound.
    pub fn wait(&mut self, bound: Duration) -> Result<ExitStatus> {
        let child = self.child.as_mut().with_context(|| format!("the daemon of {} does not run", self.node))?;
        let status = wait::until("the daemon ends", bound, || child.try_wait().transpose())
            .with_context(|| format!("the log of {} ends with:\n{}", self.node, self.log_end()))??;
        self.child = None;
        Ok(status)
    }

    /// # Errors
    /// If it does not run.
    pub fn pid(&self) -> Result<u32> {
        self.child.as_ref().map(Child::id).with_context(|| format!("the daemon of {} does not run", self.node))
    }

    /// Reads `/metrics`.
    ///
    /// # Errors
    /// If it does not answer with 200 and an exposition.
    pub fn metrics(&self) -> Result<Metrics> {
        let response = self.get("/metrics")?;
        ensure!(response.status == 200, "/metrics of {} says {}: {}", self.node, response.status, response.body);
        Metrics::parse(&response.body)
    }

    /// Reads `/metrics` before and after something.
    ///
    /// # Errors
    /// If that fails, or a reading does.
    pub fn change_during<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<(T, Change)> {
        let before = self.metrics()?;
        let done = act()?;
        Ok((done, Change { before, after: self.metrics()? }))
    }

    /// Reads `/metrics` until they say what is expected.
    ///
    /// # Errors
    /// If they do not within the bound; the message holds the last reading.
    pub fn wait_for_metrics(&self, what: &str, expected: impl Fn(&Metrics) -> bool) -> Result<Metrics> {
        wait::until_ok(what, wait::BOUND, || {
            let metrics = self.metrics()?;
            if expected(&metrics) { Ok(metrics) } else { bail!("the metrics of {} say\n{}", self.node, metrics.text()) }
        })
    }

    /// GETs a path of its TCP port.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn get(&self, path: &str) -> Result<scrape::Response> {
        scrape::get(&self.place.namespace, self.metrics, path)
    }

    /// Its admin socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Where it mounts its bpffs.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Name of its node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Everything it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The finished connections in its log.
    #[must_use]
    pub fn accesses(&self) -> Vec<Access> {
        access::parse(&self.log())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- the log of {} ends with ----\n{}\n----", self.node, self.log_end());
        }
    }
}
