//! Worlds: a switch, nodes on it, pods behind the nodes; all of them network namespaces.
//!
//! ```text
//!   pod eth0 10.98.<16n>.<p>, fd98:<n>::<p> -- bridge of the node (10.98.<16n>.1) -- eth0 172.31.0.<n>, fd98::<n> -- switch
//! ```
//! A node's pods have the 12 bits below 10.98.<16n>.0: the 256th is 10.98.<16n + 1>.0.
//!
//! Without a mesh, every pod reaches every other by plain routing. Addresses repeat in each world: no two worlds see
//! each other.

use crate::cgroup::Cgroup;
use crate::host::Host;
use crate::namespace::Namespace;
use crate::owner::Owner;
use crate::program::Place;
use crate::sweep;
use crate::topology::Topology;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// Host part of the first pod on a node; 1 is the node's bridge.
const FIRST_POD: u16 = 10;
/// One more than the host part of the last: a bridge has 1,023 ports.
const END_OF_PODS: u16 = FIRST_POD + 1_023;
/// Nodes whose pods have addresses: [`subnet`].
const MAX_NODES: usize = 15;
/// IFNAMSIZ without the final zero: nodes and pods lend their names to links.
const MAX_NAME: usize = 15;

/// A running testbed; dropping it kills every process in it and removes everything it made.
#[derive(Debug)]
pub struct World {
    // Dropped in this order: processes first, then namespaces, then files.
    cgroup: Cgroup,
    pods: BTreeMap<String, Pod>,
    hosts: BTreeMap<String, Host>,
    nodes: BTreeMap<String, Node>,
    switch: Namespace,
    folder: Folder,
    owner: Owner,
    congestion: Option<String>,
    mtu: u16,
}

/// A machine: its own network namespace, addresses on the switch, a control group, a folder.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    next_pod: u16,
    namespace: Namespace,
    daemon_cgroup: PathBuf,
    pods_cgroup: PathBuf,
    /// Of its units, if it has any.
    system_cgroup: Option<PathBuf>,
    folder: PathBuf,
}

/// A workload's place: network namespace, addresses, control group.
#[derive(Debug)]
pub struct Pod {
    name: String,
    node: String,
    namespace: Namespace,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    cgroup: PathBuf,
}

/// The world's files; dropping it unmounts what daemons mounted inside, and removes it.
#[derive(Debug)]
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = sweep::remove_folder(&self.0) {
            eprintln!("testbed: cannot remove {}: {error:#}", self.0.display());
        }
    }
}

impl World {
    /// Starts the description of a world; the name appears in the names of what it makes.
    #[must_use]
    pub fn named(name: &str) -> Topology {
        Topology { name: name.to_owned(), nodes: Vec::new(), congestion: None, mtu: 1_500 }
    }

    pub(crate) fn build(topology: &Topology) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the testbed makes network namespaces and control groups: run it as root"
        );
        let owner = Owner::new();
        let full_name = format!("{owner}-{}", topology.name);
        let folder = std::env::temp_dir().join(&full_name);
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let folder = Folder(folder);
        let cgroup = Cgroup::create(&full_name)?;
        let switch = Namespace::create(format!("{owner}-switch"))?;
        switch.ip(&[
            "link add name br0 type bridge forward_delay 0 mcast_snooping 0".into(),
            "link set dev br0 up".into(),
        ])?;
        let (pods, hosts, nodes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let congestion = topology.congestion.clone();
        let mtu = topology.mtu;
        let mut world = Self { cgroup, pods, hosts, nodes, switch, folder, owner, congestion, mtu };
        ensure!(topology.nodes.len() <= MAX_NODES, "a world has at most {MAX_NODES} nodes");
        for (number, plan) in (1..).zip(&topology.nodes) {
            world.add_node(&plan.name, number)?;
        }
        world.connect_nodes()?;
        for plan in &topology.nodes {
            for pod in &plan.pods {
                world.add_pod(&plan.name, pod)?;
            }
            for host in &plan.hosts {
                world.add_host(&plan.name, host)?;
            }
        }
        Ok(world)
    }

    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.get(name).unwrap_or_else(|| panic!("this world has no node {name:?}"))
    }

    /// # Panics
    /// If there is no such pod.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods.get(name).unwrap_or_else(|| panic!("this world has no pod {name:?}"))
    }

    /// # Panics
    /// If there is no such place in a node's own namespace.
    #[must_use]
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.get(name).unwrap_or_else(|| panic!("this world has no host process {name:?}"))
    }

    /// Where a pod, or a host process, runs.
    ///
    /// # Panics
    /// If there is neither of this name.
    #[must_use]
    pub fn place(&self, name: &str) -> Place {
        self.pods.get(name).map_or_else(|| self.host(name).into(), Place::from)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// All pods, by name.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// All places in nodes' own namespaces, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// The switch's namespace: its link to a node has the node's name and carries all that the node sends and receives.
    #[must_use]
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// The world's own folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// A control group of the world beside those of pods and daemons, for programs that are to be measured apart.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn group(&self, name: &str) -> Result<PathBuf> {
        self.cgroup.child(name)
    }

    /// The control group that everything in this world runs below.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Adds a pod to a node, also while everything runs.
    ///
    /// # Errors
    /// If the name is taken or does not fit a link, or the node has no address left.
    pub fn add_pod(&mut self, node: &str, name: &str) -> Result<&Pod> {
        check_name(name)?;
        ensure!(!self.pods.contains_key(name), "there is a pod {name} already");
        let node = self.nodes.get_mut(node).with_context(|| format!("this world has no node {node:?}"))?;
        let host = node.next_pod;
        ensure!(host < END_OF_PODS, "the node has no room for another pod");
        node.next_pod = host + 1;
        let number = node.number;
        let namespace = namespace(&format!("{}-{}-{name}", self.owner, node.name), self.congestion.as_deref())?;
        let pod = Pod {
            name: name.to_owned(),
            node: node.name.clone(),
            v4: subnet(number, host),
            v6: Ipv6Addr::new(0xfd98, number.into(), 0, 0, 0, 0, 0, host),
            cgroup: self.cgroup.child(&format!("{}/pods/{name}", node.name))?,
            namespace,
        };
        node.namespace.ip(&[link(name, self.mtu, &pod.namespace), format!("link set dev {name} master pods up")])?;
        pod.namespace.ip(&[
            format!("address add {}/20 dev eth0", pod.v4),
            format!("address add {}/64 dev eth0 nodad", pod.v6),
            "link set dev eth0 up".into(),
            format!("route add default via {}", subnet(number, 1)),
            format!("route add default via fd98:{number:x}::1"),
        ])?;
        Ok(self.pods.entry(name.to_owned()).or_insert(pod))
    }

    /// Adds a place in a node's own namespace, also while everything runs, or makes one anew that was removed.
    ///
    /// # Errors
    /// If there is no such node, or a pod of that name.
    pub fn add_host(&mut self, node: &str, name: &str) -> Result<&Host> {
        check_name(name)?;
        ensure!(!self.pods.contains_key(name), "there is a pod {name} already");
        let node = self.nodes.get_mut(node).with_context(|| format!("this world has no node {node:?}"))?;
        let system = self.cgroup.child(&format!("{}/system", node.name))?;
        let cgroup = self.cgroup.child(&format!("{}/system/{name}", node.name))?;
        node.system_cgroup = Some(system);
        let host = Host {
            name: name.to_owned(),
            node: node.name.clone(),
            place: Place { namespace: node.namespace.path().to_owned(), cgroup },
            addresses: [node.v4().into(), node.v6().into()],
        };
        Ok(self.hosts.entry(name.to_owned()).insert_entry(host).into_mut())
    }

    /// Removes the processes and the control group of a place in a node's own namespace.
    ///
    /// # Errors
    /// If there is none, or its processes do not end.
    pub fn remove_host(&mut self, name: &str) -> Result<()> {
        let host = self.hosts.remove(name).with_context(|| format!("this world has no host process {name:?}"))?;
        crate::cgroup::remove(&host.place.cgroup)
    }

    /// Removes a pod: its processes, its control group, the name of its namespace. Returns the link at the node's end,
    /// which disappears with the namespace: see [`Node::has_link`].
    ///
    /// # Errors
    /// If there is no such pod, or its processes do not end.
    pub fn remove_pod(&mut self, name: &str) -> Result<String> {
        let pod = self.pods.remove(name).with_context(|| format!("this world has no pod {name:?}"))?;
        crate::cgroup::remove(&pod.cgroup)?;
        Ok(name.to_owned())
    }

    fn add_node(&mut self, name: &str, number: u8) -> Result<()> {
        check_name(name)?;
        ensure!(!self.nodes.contains_key(name), "there is a node {name} already");
        let namespace = namespace(&format!("{}-{name}", self.owner), self.congestion.as_deref())?;
        let folder = self.folder.0.join(name);
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let node = Node {
            name: name.to_owned(),
            number,
            next_pod: FIRST_POD,
            daemon_cgroup: self.cgroup.child(&format!("{name}/daemon"))?,
            pods_cgroup: self.cgroup.child(&format!("{name}/pods"))?,
            system_cgroup: None,
            namespace,
            folder,
        };
        self.switch.ip(&[link(name, self.mtu, &node.namespace), format!("link set dev {name} master br0 up")])?;
        node.namespace.set_sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        node.namespace.ip(&[
            format!("address add {}/24 dev eth0", node.v4()),
            format!("address add {}/64 dev eth0 nodad", node.v6()),
            "link set dev eth0 up".into(),
            // Without an address of its own, a bridge takes another one whenever a pod goes, and the other pods do not know.
            format!(
                "link add name pods address 02:98:00:00:00:{number:02x} type bridge forward_delay 0 mcast_snooping 0"
            ),
            format!("address add {}/20 dev pods", node.gateways()[0]),
            format!("address add {}/64 dev pods nodad", node.gateways()[1]),
            "link set dev pods up".into(),
        ])?;
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    /// Routes each node's pods through it on all other nodes.
    fn connect_nodes(&self) -> Result<()> {
        for node in self.nodes.values() {
            let others = self.nodes.values().filter(|other| other.number != node.number);
            let routes: Vec<String> = others
                .flat_map(|other| {
                    let number = other.number;
                    [
                        format!("route add {}/20 via {}", subnet(number, 0), other.v4()),
                        format!("route add fd98:{number:x}::/64 via {}", other.v6()),
                    ]
                })
                .collect();
            node.namespace.ip(&routes)?;
        }
        Ok(())
    }
}

impl Node {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its address on the switch.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 0, self.number)
    }

    /// Its address on the switch.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, self.number.into())
    }

    /// Its addresses towards its pods, where they send what leaves them.
    #[must_use]
    pub fn gateways(&self) -> [IpAddr; 2] {
        [subnet(self.number, 1).into(), Ipv6Addr::new(0xfd98, self.number.into(), 0, 0, 0, 0, 0, 1).into()]
    }

    /// Its files: the daemon's configuration, sockets, logs, bpffs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where its daemon runs.
    #[must_use]
    pub fn daemon_cgroup(&self) -> &Path {
        &self.daemon_cgroup
    }

    /// The parent of its pods' groups: the daemon attaches here.
    #[must_use]
    pub fn pods_cgroup(&self) -> &Path {
        &self.pods_cgroup
    }

    /// The control groups that the daemon attaches to: that of its pods, and that of its units if it has any.
    #[must_use]
    pub fn workload_cgroups(&self) -> Vec<&Path> {
        std::iter::once(&self.pods_cgroup).chain(&self.system_cgroup).map(PathBuf::as_path).collect()
    }

    /// Whether it has a link of this name; a pod's link goes when the pod's namespace does.
    ///
    /// # Errors
    /// If the node's namespace cannot be entered.
    pub fn has_link(&self, name: &str) -> Result<bool> {
        // Sysctls show the links of the asking thread's namespace; /sys/class/net those of the mount's.
        self.namespace.enter(|| Path::new("/proc/sys/net/ipv4/conf").join(name).exists())
    }
}

impl Pod {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the node that it runs on.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Both addresses, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Where its processes run.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}

/// An address of a node's pods, by its host part of 12 bits.
fn subnet(node: u8, host: u16) -> Ipv4Addr {
    let [high, low] = host.to_be_bytes();
    Ipv4Addr::new(10, 98, node << 4 | high, low)
}

/// Tells `ip` to make a link to the `eth0` of a namespace.
fn link(name: &str, mtu: u16, to: &Namespace) -> String {
    format!("link add name {name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", to.name())
}

fn namespace(name: &str, congestion: Option<&str>) -> Result<Namespace> {
    let namespace = Namespace::create(name.to_owned())?;
    if let Some(congestion) = congestion {
        namespace.set_sysctls(&[("ipv4/tcp_congestion_control", congestion)])?;
    }
    Ok(namespace)
}

fn check_name(name: &str) -> Result<()> {
    let sound = !name.is_empty()
        && name.len() <= MAX_NAME
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !["br0", "eth0", "lo", "pods"].contains(&name);
    if !sound {
        bail!("{name:?} cannot name a node or a pod: it also names a link, so 1 to {MAX_NAME} of a-z, 0-9 and '-'");
    }
    Ok(())
}
