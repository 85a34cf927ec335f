//! Programs inside pods: started in the pod's network namespace and control group, with a bounded life.

use crate::world::{Node, Pod};
use crate::{namespace, wait};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::de::DeserializeOwned;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How long a program that is run to its end may take.
pub const RUN_BOUND: Duration = Duration::from_secs(120);

/// Where a process runs: a network namespace and a control group.
#[derive(Clone, Debug)]
pub struct Place {
    pub namespace: PathBuf,
    pub cgroup: PathBuf,
}

impl From<&Pod> for Place {
    fn from(pod: &Pod) -> Self {
        Self { namespace: pod.namespace().path().to_owned(), cgroup: pod.cgroup().to_owned() }
    }
}

/// The node itself, outside of all pods.
impl From<&Node> for Place {
    fn from(node: &Node) -> Self {
        Self { namespace: node.namespace().path().to_owned(), cgroup: node.daemon_cgroup().to_owned() }
    }
}

impl From<&Self> for Place {
    fn from(place: &Self) -> Self {
        place.clone()
    }
}

/// A program and its arguments, not started yet.
#[derive(Debug)]
pub struct Program {
    command: Command,
    label: String,
    bound: Duration,
    input: Option<Vec<u8>>,
}

/// What a program printed and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    pub label: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// # Errors
    /// If the exit code is not 0; the message holds what was printed.
    pub fn success(self) -> Result<Self> {
        if !self.status.success() {
            bail!("{} ended with {}\n{}{}", self.label, self.status, self.stdout, self.stderr);
        }
        Ok(self)
    }

    /// # Errors
    /// If it did not print one JSON document.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("{} printed no document: {:?} {:?}", self.label, self.stdout, self.stderr))
    }
}

impl Program {
    /// Any program, found by `PATH`; settings that would send its traffic elsewhere (proxies) are not passed on.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        const PROXIES: [&str; 6] = ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];
        let label = Path::new(&program).file_name().unwrap_or(program.as_ref()).to_string_lossy().into_owned();
        let mut command = Command::new(program);
        for name in PROXIES {
            command.env_remove(name);
        }
        Self { command, label, bound: RUN_BOUND, input: None }
    }

    /// `mesh-probe`, the testbed's own client and server.
    pub fn probe(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        Self::new(binary("mesh-probe")).args(arguments)
    }

    /// A shell script.
    #[must_use]
    pub fn shell(script: &str) -> Self {
        Self::new("sh").args(["-c", script])
    }

    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(arguments);
        self
    }

    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// What it reads on its standard input; a started program's input stays open until then.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Another bound than [`RUN_BOUND`] for [`Self::run_in`].
    #[must_use]
    pub fn within(mut self, bound: Duration) -> Self {
        self.bound = bound;
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// If it cannot be started there.
    pub fn start_in(mut self, place: impl Into<Place>) -> Result<Running> {
        let place = place.into();
        let capture = Capture::new(&self.label)?;
        place_command(&mut self.command, &place)?;
        self.command.stdin(Stdio::piped()).stdout(capture.stdout.try_clone()?).stderr(capture.stderr.try_clone()?);
        let mut child = self
            .command
            .spawn()
            .with_context(|| format!("cannot start {} in {}", self.label, place.namespace.display()))?;
        if let Some(input) = &self.input
            && let Some(mut stdin) = child.stdin.take()
        {
            // A program that does not care for its input may have closed it.
            let _ = stdin.write_all(input);
        }
        Ok(Running { child, label: self.label, capture, namespace: place.namespace, bound: self.bound })
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// If it cannot be started or does not end within its bound. A bad exit code is no error here: see
    /// [`Output::success`].
    pub fn run_in(mut self, place: impl Into<Place>) -> Result<Output> {
        self.input.get_or_insert_default();
        self.start_in(place)?.wait()
    }
}

/// A started program; dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    label: String,
    capture: Capture,
    namespace: PathBuf,
    bound: Duration,
}

impl Running {
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.label))
    }

    /// What it has printed so far.
    #[must_use]
    pub fn printed(&self) -> String {
        format!("{}{}", self.capture.stdout(), self.capture.stderr())
    }

    /// Waits until it prints a text.
    ///
    /// # Errors
    /// If it does not within the bound, or ends before.
    pub fn wait_for_text(&mut self, text: &str) -> Result<()> {
        let what = format!("{} prints {text:?}", self.label);
        wait::until_ok(&what, wait::BOUND, || {
            let printed = self.printed();
            if printed.contains(text) { Ok(()) } else { bail!("it printed {printed:?}") }
        })
    }

    /// Waits until something listens on a TCP port in its namespace, on any address.
    ///
    /// # Errors
    /// If nothing does within the bound, or the program ends before.
    pub fn wait_for_listener(&mut self, port: u16) -> Result<()> {
        let what = format!("{} listens on port {port}", self.label);
        let namespace = self.namespace.clone();
        let wanted = [format!("/proc/{}/net/tcp", self.pid()), format!("/proc/{}/net/tcp6", self.pid())];
        wait::until_ok(&what, wait::BOUND, || {
            if let Ok(Some(status)) = self.child.try_wait() {
                // A server that puts itself into the background is found through its namespace.
                if !status.success() {
                    bail!("it ended with {status}: {}", self.printed());
                }
                return listens_in(&namespace, port);
            }
            if wanted.iter().any(|path| listens(&fs::read_to_string(path).unwrap_or_default(), port)) {
                return Ok(());
            }
            bail!("nothing listens; it printed {:?}", self.printed())
        })
    }

    /// Waits for its end, closing its input first.
    ///
    /// # Errors
    /// If it does not end within its bound; it is killed then.
    pub fn wait(mut self) -> Result<Output> {
        drop(self.child.stdin.take());
        let child = &mut self.child;
        let status = wait::until(&self.label, self.bound, || child.try_wait().transpose())
            .with_context(|| format!("it printed {:?} {:?}", self.capture.stdout(), self.capture.stderr()))??;
        let (stdout, stderr) = (self.capture.stdout(), self.capture.stderr());
        Ok(Output { label: self.label.clone(), status, stdout, stderr })
    }

    /// Ends it by SIGTERM and waits.
    ///
    /// # Errors
    /// If it does not end within its bound; it is killed then.
    pub fn stop(self) -> Result<Output> {
        self.signal(Signal::TERM)?;
        self.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Makes a command start in a namespace and a control group. Everything that can fail or allocate happens before the
/// fork.
pub(crate) fn place_command(command: &mut Command, place: &Place) -> Result<()> {
    let namespace = &place.namespace;
    let namespace = File::open(namespace).with_context(|| format!("cannot open {}", namespace.display()))?;
    let cgroup = crate::cgroup::open_procs(&place.cgroup)?;
    let enter = move || -> io::Result<()> {
        // The group first: sockets belong to the group they are made in.
        rustix::io::write(&cgroup, b"0")?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes two system calls on descriptors that are open already,
    // and neither allocates nor takes a lock.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// A binary of this workspace, next to the running one.
///
/// # Panics
/// If it has not been built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("this process has an executable");
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not built: run this through `cargo xtask test` or `cargo build --workspace`")
    })
}

/// What a program prints, in files without a name: nothing to clean up, nothing that blocks when full.
#[derive(Debug)]
struct Capture {
    stdout: File,
    stderr: File,
}

impl Capture {
    fn new(label: &str) -> Result<Self> {
        let file = || tempfile::tempfile().with_context(|| format!("cannot capture what {label} prints"));
        Ok(Self { stdout: file()?, stderr: file()? })
    }

    fn stdout(&self) -> String {
        read(&self.stdout)
    }

    fn stderr(&self) -> String {
        read(&self.stderr)
    }
}

/// Reads from the start without moving the offset that the program writes at.
fn read(file: &File) -> String {
    use std::os::unix::fs::FileExt;
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) | Err(_) => break,
            Ok(count) => filled += count,
        }
    }
    bytes.truncate(filled);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether a table as in `/proc/net/tcp` has a listening socket on the port.
fn listens(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit_once(':'));
        let state = fields.nth(1);
        local.is_some_and(|(_, hex)| u16::from_str_radix(hex, 16) == Ok(port)) && state == Some("0A")
    })
}

fn listens_in(namespace: &Path, port: u16) -> Result<()> {
    let found = namespace::enter(namespace, || {
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        tables.iter().any(|path| listens(&fs::read_to_string(path).unwrap_or_default(), port))
    })?;
    if found { Ok(()) } else { bail!("nothing listens on port {port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue\n   \
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000\n   \
        1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000\n";

    #[test]
    fn a_listener_is_told_from_a_connection() {
        assert!(listens(TABLE, 8080));
        assert!(!listens(TABLE, 8081));
        assert!(!listens(TABLE, 80));
    }
}
