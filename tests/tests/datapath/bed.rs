//! A workload's namespace, a neighbour on a wire, and a cgroup that this process moves into: enough to load the
//! datapath for real. One bed at a time, because a process has one cgroup.

use mesh_common::addr::Ip;
use mesh_common::datagram::ALIAS4;
use mesh_common::outcome::Outcome;
use mesh_common::service::Pod;
use mesh_userspace::datapath::{Config, Datapath, Event, Events};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::any::Any;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const POD4: &str = "10.77.0.2";
pub(crate) const POD6: &str = "fd77::2";
/// The first IPv6 alias.
pub(crate) const ALIAS6: &str = "fdaa:1:2:3:4:5::";
pub(crate) const NEIGHBOUR4: &str = "10.77.0.1";
pub(crate) const NEIGHBOUR6: &str = "fd77::1";
pub(crate) const OUTBOUND: u16 = 15001;
pub(crate) const MARK: u32 = 0x539;

static ONE_BED: Mutex<()> = Mutex::new(());
static COUNT: AtomicU32 = AtomicU32::new(0);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, as long as this lives: a thread stands in it and runs what it is told.
pub(crate) struct Netns {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    namespace: File,
    tid: i32,
}

impl Netns {
    pub(crate) fn new() -> Self {
        let (jobs, todo) = channel::<Job>();
        let (ready, made) = channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: a plain system call; it changes this thread only.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "cannot make a network namespace: {}", std::io::Error::last_os_error());
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            ready.send((namespace, rustix::thread::gettid().as_raw_nonzero().get())).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        let (namespace, tid) = made.recv().expect("privilege to make a network namespace (run as root)");
        let netns = Self { jobs: Some(jobs), thread: Some(thread), namespace, tid };
        netns.ip("link set lo up");
        netns
    }

    /// Runs `job` in the namespace; its panic is the caller's.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, result) = channel::<Result<T, Box<dyn Any + Send>>>();
        let job = move || drop(answer.send(catch_unwind(AssertUnwindSafe(job))));
        self.jobs.as_ref().unwrap().send(Box::new(job)).unwrap();
        match result.recv().unwrap() {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Runs `ip` with these words.
    pub(crate) fn ip(&self, words: &str) {
        assert!(self.ip_succeeds(words), "ip {words} failed");
    }

    pub(crate) fn ip_succeeds(&self, words: &str) -> bool {
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        self.run(move || Command::new("ip").args(words).output().expect("the `ip` program").status.success())
    }

    pub(crate) fn cookie(&self) -> u64 {
        self.run(|| {
            const SO_NETNS_COOKIE: libc::c_int = 71;
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let (mut cookie, mut length) = (0_u64, 8_u32);
            // SAFETY: the value and its length are live and of the size that the option has.
            let result = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    SO_NETNS_COOKIE,
                    (&raw mut cookie).cast(),
                    &raw mut length,
                )
            };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
            cookie
        })
    }

    /// The kernel's id of the thread in it: names the namespace to `ip`.
    pub(crate) fn thread_id(&self) -> i32 {
        self.tid
    }

    pub(crate) fn listen(&self, address: &str) -> TcpListener {
        let address: SocketAddr = address.parse().unwrap();
        self.run(move || TcpListener::bind(address).unwrap())
    }

    /// Whether this kernel makes Multipath TCP sockets.
    pub(crate) fn has_mptcp(&self) -> bool {
        self.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).is_ok())
    }

    pub(crate) fn socket(&self, domain: Domain, protocol: Protocol) -> Socket {
        self.run(move || {
            let kind = if protocol == Protocol::UDP { Type::DGRAM } else { Type::STREAM };
            Socket::new(domain, kind, Some(protocol)).unwrap()
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(self.jobs.take());
        self.thread.take().map(JoinHandle::join);
    }
}

/// Names a bed so that `cargo xtask clean-testbed` knows what a killed test left: pid, start time, sequence.
fn name() -> String {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // The 22nd field; the second one, in parentheses, may hold blanks.
    let started = stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(19)).unwrap();
    format!("nm-{}-{started}-{}-datapath", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A child cgroup that this process is in; it goes back and the cgroup goes away when this is dropped.
struct Cgroup {
    path: PathBuf,
    home: PathBuf,
}

impl Cgroup {
    fn enter(name: &str) -> Self {
        let root = cgroup_root();
        let memberships = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = memberships.lines().find_map(|line| line.strip_prefix("0::/")).expect("membership in cgroup v2");
        let cgroup = Self { path: root.join(name), home: root.join(own) };
        fs::create_dir(&cgroup.path).expect("privilege to make a cgroup (run as root)");
        move_into(&cgroup.path);
        cgroup
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        move_into(&self.home);
        // A child that has just ended may still be counted.
        wait_until("the cgroup to be empty", || remove_groups(&self.path).is_ok());
    }
}

/// Removes a cgroup and those within it.
fn remove_groups(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn move_into(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

pub(crate) fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut points = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(point))
    });
    points.next().expect("a mounted cgroup v2 hierarchy")
}

/// Waits for `condition`, a few seconds at most.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

pub(crate) struct Bed {
    pub(crate) pod: Netns,
    pub(crate) neighbour: Netns,
    pub(crate) config: Config,
    // Dropped in this order: the pins, the cgroup, the directory that the bpffs is mounted on, the turn.
    _leftovers: Leftovers,
    _cgroup: Cgroup,
    _directory: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// Cleans up after a test that failed half-way.
struct Leftovers(Config);

impl Drop for Leftovers {
    fn drop(&mut self) {
        if let Err(error) = mesh_userspace::datapath::cleanup(&self.0) {
            eprintln!("cannot clean up {:?}: {error:#}", self.0);
        }
    }
}

impl Bed {
    pub(crate) fn new() -> Self {
        let turn = ONE_BED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = name();
        let cgroup = Cgroup::enter(&name);
        let directory = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().unwrap();
        let config = Config {
            bpffs: directory.path().join("bpf"),
            pin: name,
            cgroups: vec![cgroup.path.clone()],
            heartbeat_timeout: Duration::from_secs(600),
            outbound_port: OUTBOUND,
            mark: MARK,
        };
        let (pod, neighbour) = (Netns::new(), Netns::new());
        pod.ip(&format!("link add eth0 type veth peer name eth0 netns {}", neighbour.tid));
        for (netns, v4, v6) in [(&pod, POD4, POD6), (&neighbour, NEIGHBOUR4, NEIGHBOUR6)] {
            netns.ip(&format!("address add {v4}/24 dev eth0"));
            netns.ip(&format!("address add {v6}/64 dev eth0 nodad"));
            netns.ip("link set eth0 up");
        }
        let leftovers = Leftovers(config.clone());
        Self { pod, neighbour, config, _leftovers: leftovers, _cgroup: cgroup, _directory: directory, _turn: turn }
    }

    /// A cgroup within the bed's, which goes with the bed.
    pub(crate) fn subgroup(&self, name: &str) -> PathBuf {
        let path = self.config.cgroups[0].join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Moves this process into a cgroup of the bed.
    pub(crate) fn stand_in(&self, cgroup: &Path) {
        assert!(cgroup.starts_with(&self.config.cgroups[0]), "{} is not the bed's", cgroup.display());
        move_into(cgroup);
    }

    /// The datapath, beating, with the pod armed and guarded.
    pub(crate) fn armed(&self) -> Datapath {
        let mut datapath = Datapath::load(&self.config).unwrap();
        datapath.heartbeat().beat().unwrap();
        datapath.attach_netns("default/pod.1", self.pod.as_fd()).unwrap();
        datapath.arm_pod(self.pod.cookie(), pod_entry(0)).unwrap();
        datapath
    }
}

pub(crate) fn pod_entry(flags: u16) -> Pod {
    Pod::new(ip(POD4), ip(POD6), 1, OUTBOUND.to_be(), flags, 2, ALIAS4, ip(ALIAS6))
}

pub(crate) fn ip(text: &str) -> Ip {
    text.parse::<IpAddr>().unwrap().into()
}

pub(crate) fn socket_address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn connect(socket: &Socket, to: &str) -> std::io::Result<()> {
    socket.connect(&SockAddr::from(socket_address(to)))
}

/// What an outcome's counter says.
pub(crate) fn counted(datapath: &Datapath, outcome: Outcome) -> u64 {
    let outcomes = datapath.counters().outcomes();
    outcomes.iter().find(|(counted, _)| *counted == outcome).unwrap().1
}

const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;

pub(crate) fn program_exists(id: u32) -> bool {
    exists(BPF_PROG_GET_FD_BY_ID, id)
}

pub(crate) fn link_exists(id: u32) -> bool {
    exists(BPF_LINK_GET_FD_BY_ID, id)
}

fn exists(command: libc::c_int, id: u32) -> bool {
    let attr = [id, 0, 0];
    // SAFETY: the attribute is live and its size is passed; a descriptor that is returned is closed below.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(&attr)) };
    if fd < 0 {
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOENT));
        return false;
    }
    // SAFETY: the descriptor was returned just now and is nobody else's.
    unsafe { libc::close(fd as libc::c_int) };
    true
}

/// The next record of the programs.
pub(crate) async fn next_event(events: &mut Events) -> Event {
    tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            match events.take() {
                Some(event) => return event,
                None => events.wait().await.unwrap(),
            }
        }
    })
    .await
    .unwrap()
}
