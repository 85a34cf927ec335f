//! Pods that come and go, daemons that start, drain, die, hang, and are refused. What is left is asked of the kernel.

mod crash;
mod identities;
mod pods;
mod start;
mod stop;

use anyhow::Result;
use mesh_tests::cluster::Cluster;
use mesh_tests::daemon::Daemon;
use mesh_tests::namespace::Namespace;
use mesh_tests::program::Program;
use mesh_tests::report::Call;
use mesh_tests::wait::{self, BOUND};
use mesh_tests::world::World;
use mesh_userspace::admin::documents::{Document, WorkloadRow};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The daemon's listener in pods.
pub(crate) const OUTBOUND: u16 = 15001;

pub(crate) fn pins(daemon: &Daemon) -> PathBuf {
    daemon.bpffs().join("nodemesh")
}

pub(crate) fn is_mounted(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    Ok(mounts.lines().filter_map(|line| line.split(' ').nth(1)).any(|mounted| Path::new(mounted) == path))
}

/// What a daemon may change within a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footprints {
    pub(crate) rules: String,
    pub(crate) routes: String,
    /// What turns marks of packets into marks of answers.
    pub(crate) sysctls: String,
    pub(crate) has_listener: bool,
}

impl Footprints {
    pub(crate) fn of(namespace: &Namespace) -> Result<Self> {
        let ip = |arguments: &[&str]| -> Result<String> {
            let mut command = std::process::Command::new("ip");
            let output = command.args(["-n", namespace.name()]).args(arguments).output()?;
            // What the kernel adds by itself comes and goes with links, and differs from world to world.
            let text = String::from_utf8(output.stdout)?;
            Ok(text.lines().filter(|line| !line.contains("proto kernel")).collect::<Vec<_>>().join("\n"))
        };
        let inside = namespace.enter(|| -> Result<(String, bool)> {
            let tables = ["tcp", "tcp6"].map(|name| fs::read_to_string(Path::new("/proc/thread-self/net").join(name)));
            let suffix = format!(":{OUTBOUND:04X} ");
            let has_listener = tables.into_iter().flatten().any(|table| {
                table.lines().any(|line| line.split_once(&suffix).is_some_and(|(_, rest)| rest.contains(" 0A ")))
            });
            let sysctls = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect", "ipv4/tcp_tw_reuse"];
            let values = sysctls.map(|name| fs::read_to_string(Path::new("/proc/sys/net").join(name)));
            Ok((values.into_iter().collect::<std::io::Result<String>>()?, has_listener))
        })??;
        Ok(Self {
            rules: ip(&["-4", "rule"])? + &ip(&["-6", "rule"])?,
            routes: ip(&["-4", "route", "show", "table", "all"])? + &ip(&["-6", "route", "show", "table", "all"])?,
            sysctls: inside.0,
            has_listener: inside.1,
        })
    }

    pub(crate) fn of_world(world: &World) -> Result<Vec<Self>> {
        let namespaces = world.nodes().map(mesh_tests::world::Node::namespace);
        namespaces.chain(world.pods().map(mesh_tests::world::Pod::namespace)).map(Self::of).collect()
    }
}

/// Whether a process has a descriptor of a network namespace.
pub(crate) fn holds_namespace(pid: u32, inode: u64) -> Result<bool> {
    let wanted = format!("net:[{inode}]");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?;
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    Ok(targets.into_iter().any(|target| target.to_string_lossy() == wanted))
}

pub(crate) fn call(cluster: &Cluster, pod: &str, destination: SocketAddr) -> Result<Call> {
    let arguments = ["call", "blocking", &destination.to_string(), "--timeout-millis", "5000"];
    Program::probe(arguments).run_in(cluster.world.pod(pod))?.json()
}

#[track_caller]
pub(crate) fn assert_refused(cluster: &Cluster, pod: &str, destination: SocketAddr) -> Result<()> {
    let call = call(cluster, pod, destination)?;
    assert_eq!(call.errno.as_deref(), Some("ECONNREFUSED"), "{pod} to {destination}: {call:?}");
    Ok(())
}

pub(crate) fn wait_until_refused(cluster: &Cluster, pod: &str, destination: SocketAddr) -> Result<()> {
    wait::until(&format!("{destination} refuses {pod}"), BOUND, || {
        (call(cluster, pod, destination).ok()?.errno.as_deref() == Some("ECONNREFUSED")).then_some(())
    })
}

pub(crate) fn wait_for_state(cluster: &Cluster, node: &str, workload: &str, state: &str) -> Result<WorkloadRow> {
    wait::until(&format!("{workload} is {state} on {node}"), BOUND, || {
        let document: Document<WorkloadRow> = cluster.document(node, &["get", "workloads"]).ok()?;
        document.items.into_iter().find(|row| row.name == workload && row.state == state)
    })
}
