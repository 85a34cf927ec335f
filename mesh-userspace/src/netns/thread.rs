//! The threads that change namespaces: one for everything, and those that carry traffic for their own connections.

use super::alias::{self, AliasRange};
use super::datagram::{self, CaptureSocket};
use super::diag::SocketTable;
use super::routing::{self, Sysctls};
use super::socket;
use crate::runtime::Level;
use rustix::fs::fstat;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::Socket;
use std::cell::OnceCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Jobs that wait for the thread; beyond it callers wait to hand theirs over. Each takes tens of microseconds.
const QUEUE: usize = 256;

type Job = Box<dyn FnOnce(&Home) + Send>;

thread_local! {
    /// The way back of a thread that enters namespaces by itself.
    static HOME: OnceCell<Home> = const { OnceCell::new() };
}

/// Lets the calling thread make sockets of other namespaces by itself, which saves waking another thread for each. Not
/// for threads that run what they have not been given by this crate: between two calls they are at home.
///
/// # Errors
/// If its own namespace cannot be opened: there would be no way back.
pub fn enter_from_this_thread() -> io::Result<()> {
    let home = Home::here()?;
    // Twice is no harm: a thread has one home.
    HOME.with(|known| known.set(home)).ok();
    Ok(())
}

/// A handle to the thread; it ends when the last handle is gone. Calls made from anywhere are served one by one.
#[derive(Clone, Debug)]
pub struct Namespaces {
    jobs: mpsc::Sender<Job>,
    /// Jobs that found the queue full.
    waited: Arc<AtomicU64>,
}

/// An open network namespace. The kernel keeps it while this lives, even if its last process ends; dropping it
/// releases it. Sockets made in it keep it as well.
#[derive(Debug)]
pub struct Namespace {
    file: Arc<File>,
    path: PathBuf,
    cookie: u64,
    /// What [`Namespaces::prepare`] has learnt and [`Namespaces::restore`] needs.
    sysctl: Mutex<Sysctls>,
}

impl Namespace {
    /// The namespace's cookie, as BPF programs see it.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Where it was opened; may be gone or another namespace by now.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn sysctl(&self) -> MutexGuard<'_, Sysctls> {
        // A plain value, whole at any time.
        self.sysctl.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the path that it was opened at still leads to it. Once it does not, holding on to the namespace is what
    /// keeps it alive.
    #[must_use]
    pub fn is_still_at_its_path(&self) -> bool {
        match (std::fs::metadata(&self.path), self.file.metadata()) {
            (Ok(there), Ok(here)) => (there.dev(), there.ino()) == (here.dev(), here.ino()),
            // Only a path that is known to lead nowhere counts: a passing failure must not cut a pod off.
            (Err(error), _) => error.kind() != io::ErrorKind::NotFound,
            (_, Err(_)) => true,
        }
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Namespaces {
    /// Starts the thread.
    ///
    /// # Errors
    /// If no thread can be started, or its own namespace cannot be opened: there would be no way back.
    pub fn spawn() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>(QUEUE);
        let (report, started) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new().name("netns".to_owned()).spawn(move || serve(queue, &report))?;
        started.recv().map_err(|_| dead())??;
        Ok(Self { jobs, waited: Arc::default() })
    }

    /// How many jobs wait, now and whenever it is asked again.
    pub fn levels(&self) -> impl Fn() -> Vec<Level> + Send + Sync + 'static {
        // Who only looks must not keep the thread.
        let (jobs, waited) = (self.jobs.downgrade(), Arc::clone(&self.waited));
        move || {
            let used = jobs.upgrade().map_or(0, |jobs| QUEUE - jobs.capacity());
            let hits = waited.load(Relaxed);
            vec![Level { bound: "netns_queue", used: used as u64, capacity: QUEUE as u64, hits }]
        }
    }

    /// Ends when the thread has died, which only a bug or a namespace that cannot be left brings about. All calls fail
    /// from then on: the daemon should end too.
    pub async fn died(&self) {
        self.jobs.closed().await;
    }

    /// Opens the namespace at `path` (`/run/netns/...`, `/proc/<pid>/ns/net`).
    ///
    /// # Errors
    /// If there is none, or the daemon may not enter it.
    pub async fn open(&self, path: &Path) -> io::Result<Namespace> {
        let path = path.to_owned();
        self.run(move |home| {
            // O_NONBLOCK: what is there may be no namespace but a pipe that nobody writes to.
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
            let file = Arc::new(file);
            let cookie = home.inside(&file, socket::netns_cookie)?;
            Ok(Namespace { file, path, cookie, sysctl: Mutex::default() })
        })
        .await
    }

    /// Listens inside the namespace, without blocking. `mark` (0: none) is inherited by accepted sockets, whose replies
    /// to clients outside would be routed to `lo` once the namespace is prepared: mark listeners for local clients only.
    ///
    /// # Errors
    /// If the address is not the namespace's, or taken.
    pub async fn listen(&self, namespace: &Namespace, address: SocketAddr, mark: u32) -> io::Result<TcpListener> {
        let file = namespace.file.clone();
        self.run(move |home| home.inside(&file, || socket::listen(address, mark))).await
    }

    /// Makes [`Self::dial_socket`]'s connections work: adds a rule and a route for [`routing::MARK`], for IPv4 and (where
    /// the namespace has it) IPv6, and sets `net.ipv4.tcp_fwmark_accept` and `tcp_tw_reuse`. Idempotent.
    ///
    /// # Errors
    /// If the kernel refuses, or the namespace is the daemon's own or the machine's, whose routing is never touched.
    pub async fn prepare(&self, namespace: &Namespace) -> io::Result<()> {
        let (file, cookie) = (namespace.file.clone(), namespace.cookie);
        let sysctl = self
            .run(move |home| {
                home.refuse_own(&file, cookie)?;
                home.inside(&file, routing::prepare)
            })
            .await?;
        if sysctl != Sysctls::default() {
            // A second call finds what the first one did, and knows less.
            *namespace.sysctl() = sysctl;
        }
        Ok(())
    }

    /// Removes what [`Self::prepare`] added, also if an earlier daemon did, and nothing else. Idempotent.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub async fn restore(&self, namespace: &Namespace) -> io::Result<()> {
        let (file, cookie) = (namespace.file.clone(), namespace.cookie);
        let sysctl = *namespace.sysctl();
        self.run(move |home| {
            home.refuse_own(&file, cookie)?;
            home.inside(&file, || routing::restore(sysctl))
        })
        .await?;
        *namespace.sysctl() = Sysctls::default();
        Ok(())
    }

    /// A socket inside the namespace that will connect from `source`, any client's address; bound, so that its port is
    /// known, marked, not blocking, not yet connected. A port of 0 means any free one; never give the client's own port:
    /// if the client's connection ends in this namespace, both would be the same connection to the kernel. IPv4-mapped
    /// sources give IPv4 sockets.
    ///
    /// # Errors
    /// `AddrInUse` if no port is left for this source.
    pub async fn dial_socket(&self, namespace: &Namespace, source: SocketAddr, mark: u32) -> io::Result<Socket> {
        self.enter(namespace, move || socket::dial(source, mark)).await
    }

    /// As [`Self::dial_socket`], with a port that others may have, too, if they lead elsewhere: which one of those that
    /// the namespace gives out follows from `choice`, and neighbouring choices are different ports. If it cannot be had
    /// for where the socket is then connected to, connect() says `AddrNotAvailable`.
    ///
    /// # Errors
    /// `AddrInUse` if somebody has this port for all destinations.
    pub async fn dial_shared(
        &self,
        namespace: &Namespace,
        source: SocketAddr,
        mark: u32,
        choice: u16,
    ) -> io::Result<Socket> {
        self.enter(namespace, move || socket::dial_shared(source, mark, choice)).await
    }

    /// Makes exactly these ranges of addresses local to the namespace, in place of those that this or an earlier daemon
    /// made; [`Self::restore`] removes them.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub async fn alias(&self, namespace: &Namespace, ranges: Vec<AliasRange>) -> io::Result<()> {
        let (file, cookie) = (namespace.file.clone(), namespace.cookie);
        self.run(move |home| {
            home.refuse_own(&file, cookie)?;
            home.inside(&file, || alias::set(&ranges))
        })
        .await
    }

    /// A socket inside the namespace that datagrams to any alias of the family and this port arrive at. Must be called
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// If the port is taken.
    pub async fn capture_datagrams(
        &self,
        namespace: &Namespace,
        is_ipv4: bool,
        port: u16,
        mark: u32,
    ) -> io::Result<CaptureSocket> {
        let file = namespace.file.clone();
        let socket = self.run(move |home| home.inside(&file, || datagram::capture(is_ipv4, port, mark))).await?;
        CaptureSocket::new(socket)
    }

    /// A socket inside the namespace that speaks from an alias, and a port of its own there, to an application; not
    /// blocking.
    ///
    /// # Errors
    /// `AddrInUse` if no port is left.
    pub async fn deliver_datagrams(
        &self,
        namespace: &Namespace,
        alias: IpAddr,
        application: SocketAddr,
        mark: u32,
    ) -> io::Result<UdpSocket> {
        let file = namespace.file.clone();
        self.run(move |home| home.inside(&file, || datagram::deliver(alias, application, mark))).await
    }

    /// The namespace's TCP sockets, to look at and to end. It stays with that namespace wherever it is used.
    ///
    /// # Errors
    /// If the kernel has no INET_DIAG (`CONFIG_INET_DIAG`).
    pub async fn sockets(&self, namespace: &Namespace) -> io::Result<SocketTable> {
        let file = namespace.file.clone();
        self.run(move |home| home.inside(&file, SocketTable::open)).await
    }

    /// Makes something in a namespace: here, if this thread may enter it.
    async fn enter<T: Send + 'static>(
        &self,
        namespace: &Namespace,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if HOME.with(|home| home.get().is_some()) {
            return HOME.with(|home| home.get().ok_or_else(dead)?.inside(&namespace.file, make));
        }
        let file = namespace.file.clone();
        self.run(move |home| home.inside(&file, make)).await
    }

    /// Has the thread do something. If the caller goes away meanwhile, the outcome is dropped, sockets and all.
    async fn run<T: Send + 'static>(&self, job: impl FnOnce(&Home) -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |home| {
            // Nobody waits any more: the outcome is dropped.
            let _ = reply.send(job(home));
        });
        if let Err(full) = self.jobs.try_send(job) {
            let job = match full {
                mpsc::error::TrySendError::Full(job) => job,
                mpsc::error::TrySendError::Closed(_) => return Err(dead()),
            };
            self.waited.fetch_add(1, Relaxed);
            self.jobs.send(job).await.map_err(|_| dead())?;
        }
        answer.await.map_err(|_| dead())?
    }
}

fn dead() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the thread that works in network namespaces has died")
}

fn serve(mut queue: mpsc::Receiver<Job>, report: &std::sync::mpsc::SyncSender<io::Result<()>>) {
    let home = match Home::here() {
        Ok(home) => home,
        Err(error) => {
            // The receiver waits for exactly this.
            let _ = report.send(Err(error));
            return;
        }
    };
    let _ = report.send(Ok(()));
    while let Some(job) = queue.blocking_recv() {
        job(&home);
    }
}

/// The daemon's own namespace.
struct Home {
    file: File,
    cookie: u64,
}

impl Home {
    fn here() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/thread-self/ns/net")?, cookie: socket::netns_cookie()? })
    }

    /// Does something in another namespace and comes back, also from a panic. Without a way back the process ends:
    /// sockets would be made in a wrong place from then on.
    fn inside<T>(&self, namespace: &File, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        enter(namespace)?;
        let _back = Back(&self.file);
        work()
    }

    /// Rules and routes of the machine itself, or of the daemon's own namespace, are not the mesh's to change.
    fn refuse_own(&self, namespace: &File, cookie: u64) -> io::Result<()> {
        let refuse = |whose: &str| {
            let text = format!("refusing to change the routing of {whose} network namespace: give each pod its own");
            Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
        };
        if cookie == self.cookie {
            return refuse("the daemon's own");
        }
        // Where process 1 cannot be seen (another PID namespace, no ptrace), there is nothing to compare with.
        if let Ok(machine) = File::open("/proc/1/ns/net") {
            let (one, other) = (fstat(&machine)?, fstat(namespace)?);
            if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino) {
                return refuse("the machine's");
            }
        }
        Ok(())
    }
}

/// Returns to a namespace when dropped.
struct Back<'a>(&'a File);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if let Err(error) = enter(self.0) {
            tracing::error!(%error, "cannot leave a pod's network namespace");
            std::process::abort();
        }
    }
}

fn enter(namespace: &File) -> io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|error| {
        let text = match error {
            rustix::io::Errno::INVAL => "it is no network namespace".to_owned(),
            rustix::io::Errno::PERM => "entering a network namespace needs CAP_SYS_ADMIN".to_owned(),
            other => format!("cannot enter the network namespace: {other}"),
        };
        io::Error::new(io::Error::from(error).kind(), text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_thread_is_noticed_by_everyone() {
        let namespaces = Namespaces::spawn().unwrap();
        let waiting = tokio::spawn({
            let namespaces = namespaces.clone();
            async move { namespaces.died().await }
        });
        let outcome = namespaces.run::<()>(|_| panic!("a bug")).await;
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        waiting.await.unwrap();
        let later = namespaces.open(Path::new("/proc/self/ns/net")).await;
        assert_eq!(later.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_does_not_disturb_the_others() {
        let namespaces = Namespaces::spawn().unwrap();
        let (proceed, wait) = std::sync::mpsc::channel::<()>();
        let impatient = namespaces.run(move |_| {
            // Ends when the sender is dropped.
            let _ = wait.recv();
            Ok(())
        });
        assert!(tokio::time::timeout(std::time::Duration::from_millis(1), impatient).await.is_err());
        drop(proceed);
        assert_eq!(namespaces.run(|home| Ok(home.cookie)).await.unwrap(), socket::netns_cookie().unwrap());
    }

    #[tokio::test]
    async fn a_thread_that_may_enters_by_itself_and_is_back_even_after_a_panic() {
        let namespaces = Namespaces::spawn().unwrap();
        let namespace = namespaces.open(Path::new("/proc/self/ns/net")).await.unwrap();
        let thread = || Ok(std::thread::current().id());
        let here = std::thread::current().id();
        assert_ne!(namespaces.enter(&namespace, thread).await.unwrap(), here);
        enter_from_this_thread().unwrap();
        assert_eq!(namespaces.enter(&namespace, thread).await.unwrap(), here);
        let home = Home::here().unwrap();
        let away =
            std::panic::AssertUnwindSafe(|| home.inside(&namespace.file, || -> io::Result<()> { panic!("a bug") }));
        assert!(std::panic::catch_unwind(away).is_err());
        assert_eq!(socket::netns_cookie().unwrap(), home.cookie);
    }
}
