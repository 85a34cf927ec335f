//! Arming and disarming the workloads of this node.
//!
//! Arm: namespace, listeners, routing for client addresses, guard (sk_lookup), capture last. Disarm: the reverse,
//! capture first. Those in the node's own namespace: see [`super::host`]. The modes of its ports are in the kernel before a workload is armed and stay until it is disarmed.

use super::host::{Hosts, OwnPorts};
use crate::datapath::{Datapath, Tuples};
use crate::model::{Workload, WorkloadUid};
use crate::netns::{AliasRange, CaptureSocket, Namespace, Namespaces};
use crate::proxy::{Context, DatagramOutbound, Datagrams, LocalWorkload, Outbound};
use crate::runtime::{Cancellation, Descriptor};
use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use mesh_common::Ip;
use mesh_common::datagram::{ALIAS4, NUMBER_BITS};
use mesh_common::service::Pod;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A workload whose traffic is captured.
struct Armed {
    local: Arc<LocalWorkload>,
    /// What the kernel has of it.
    pod: Pod,
    listeners: JoinSet<()>,
    /// Those of the namespace and of what listens in it.
    _descriptors: Descriptor,
}

/// Desired and armed workloads of this node.
pub(super) struct Workloads {
    context: Arc<Context>,
    namespaces: Namespaces,
    tuples: Tuples,
    datagrams: Datagrams,
    outbound_port: u16,
    mark: u32,
    desired: Arc<BTreeMap<WorkloadUid, Arc<Workload>>>,
    armed: BTreeMap<WorkloadUid, Armed>,
    hosts: Hosts,
    next_index: u32,
}

impl Workloads {
    pub(super) fn new(
        context: Arc<Context>,
        namespaces: Namespaces,
        tuples: Tuples,
        datagrams: Datagrams,
        ports: OwnPorts,
        mark: u32,
    ) -> Self {
        let outbound_port = ports.outbound;
        let hosts = Hosts::new(context.clone(), namespaces.clone(), tuples.clone(), ports);
        Self {
            context,
            namespaces,
            tuples,
            datagrams,
            outbound_port,
            mark,
            desired: Arc::default(),
            armed: BTreeMap::new(),
            hosts,
            next_index: 1,
        }
    }

    /// What is armed now.
    pub(super) fn armed(&self) -> impl Iterator<Item = WorkloadUid> {
        self.armed.keys().cloned().chain(self.hosts.armed().map(|local| local.workload.uid.clone()))
    }

    fn is_armed(&self, uid: &WorkloadUid) -> bool {
        self.armed.contains_key(uid) || self.hosts.armed().any(|local| local.workload.uid == *uid)
    }

    /// Sets what should be armed.
    pub(super) fn want(&mut self, desired: Arc<BTreeMap<WorkloadUid, Arc<Workload>>>) {
        self.desired = desired;
    }

    /// Disarms what is no longer desired as it was armed.
    pub(super) async fn disarm_outdated(
        &mut self,
        desired: &BTreeMap<WorkloadUid, Arc<Workload>>,
        datapath: &mut Datapath,
    ) {
        let armed = self.armed.values().map(|armed| &armed.local).chain(self.hosts.armed());
        let outdated = armed
            .map(|local| &local.workload)
            .filter(|armed| desired.get(&armed.uid).is_none_or(|workload| needs_rearming(armed, workload)))
            .map(|workload| workload.uid.clone())
            .collect::<Vec<_>>();
        for uid in outdated {
            self.disarm(&uid, datapath).await;
        }
    }

    /// Disarms workloads whose namespace is gone from its path, or another one: holding it would keep it alive; and those
    /// whose cgroup is gone.
    pub(super) async fn disarm_vanished(&mut self, datapath: &mut Datapath) {
        let vanished: Vec<_> = self
            .armed
            .iter()
            .filter(|(_, armed)| !armed.local.namespace.is_still_at_its_path())
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in vanished {
            tracing::info!(workload = %uid, "the network namespace is gone");
            self.disarm(&uid, datapath).await;
        }
        for uid in self.hosts.vanished() {
            tracing::info!(workload = %uid, "the cgroup is gone");
            self.disarm(&uid, datapath).await;
        }
    }

    /// Stops capture everywhere; connections that exist go on.
    pub(super) fn release_all(&mut self, datapath: &mut Datapath) {
        for armed in self.armed.values() {
            if let Err(error) = datapath.disarm_pod(armed.local.namespace.cookie()) {
                tracing::warn!(workload = %armed.local.workload.name, %error, "cannot stop capture");
            }
        }
        self.hosts.release_all(datapath);
    }

    /// Disarms everything.
    pub(super) async fn disarm_all(&mut self, datapath: &mut Datapath) {
        let all: Vec<_> = self.armed.keys().cloned().collect();
        for uid in all {
            self.disarm(&uid, datapath).await;
        }
        self.hosts.disarm_all(datapath).await;
    }

    /// Arms what is desired and not armed; returns what could not be, and why.
    pub(super) async fn arm_missing(&mut self, datapath: &mut Datapath) -> BTreeMap<WorkloadUid, String> {
        let mut failed = BTreeMap::new();
        let missing: Vec<_> = self.desired.values().filter(|workload| !self.is_armed(&workload.uid)).cloned().collect();
        for workload in missing {
            match self.arm(workload.clone(), datapath).await {
                Ok(()) => tracing::info!(workload = %workload.name, mode = ?workload.mode, "armed"),
                Err(error) => {
                    tracing::debug!(workload = %workload.name, error = format!("{error:#}"), "cannot arm; will try again");
                    failed.insert(workload.uid.clone(), format!("{error:#}"));
                }
            }
        }
        failed
    }

    async fn arm(&mut self, workload: Arc<Workload>, datapath: &mut Datapath) -> Result<()> {
        if workload.is_host_network() {
            let pod = self.pod(&workload, &[]);
            return self.hosts.arm(workload, pod, datapath).await;
        }
        let armed = self.arm_pod(workload, datapath).await?;
        self.armed.insert(armed.local.workload.uid.clone(), armed);
        Ok(())
    }

    async fn arm_pod(&mut self, workload: Arc<Workload>, datapath: &mut Datapath) -> Result<Armed> {
        let path = workload.netns.as_deref().context("the WorkloadEntry has no spec.netns")?;
        let namespace = self
            .namespaces
            .open(path)
            .await
            .with_context(|| format!("cannot open the network namespace {}", path.display()))?;
        if let Some(other) = self.armed.values().find(|armed| armed.local.namespace.cookie() == namespace.cookie()) {
            bail!(
                "{} is the network namespace of {} too: give each workload its own",
                path.display(),
                other.local.workload.name
            );
        }
        let core = self.armed.len() % self.context.cores.count();
        let bound = self.listen(&namespace, &workload, core).await?;
        let aliases = aliases(&workload, datapath.pod(namespace.cookie())?);
        let capturing = self.capture_datagrams(&namespace, &aliases).await?;
        self.namespaces.prepare(&namespace).await.context("cannot prepare routing for client addresses")?;
        let namespace = Arc::new(namespace);
        let local = Arc::new(LocalWorkload { workload, namespace, aliases, removed: Cancellation::default() });
        if let Err(error) = self.namespaces.alias(&local.namespace, local.aliases.clone()).await {
            self.restore(&local).await;
            return Err(error).context("cannot make aliases local to the workload's namespace");
        }
        let pod = match self.engage(&local, datapath) {
            Ok(pod) => pod,
            Err(error) => {
                self.restore(&local).await;
                return Err(error);
            }
        };
        let descriptors = self.context.budget.for_daemon(1 + bound.len() + capturing.len());
        let mut listeners = JoinSet::new();
        for listener in bound {
            let outbound =
                Outbound { context: self.context.clone(), local: local.clone(), tuples: self.tuples.clone() };
            listeners.spawn_on(outbound.serve(listener), self.context.cores.handle(core));
        }
        for (base, socket) in capturing {
            let outbound = DatagramOutbound {
                context: self.context.clone(),
                local: local.clone(),
                datagrams: self.datagrams.clone(),
                base,
                port: self.outbound_port,
            };
            listeners.spawn(outbound.serve(socket));
        }
        Ok(Armed { local, pod, listeners, _descriptors: descriptors })
    }

    async fn listen(&self, namespace: &Namespace, workload: &Workload, core: usize) -> Result<Vec<TcpListener>> {
        let mut bound = Vec::new();
        for address in &workload.addresses {
            let address = SocketAddr::new(*address, self.outbound_port);
            let listening = self.namespaces.listen(namespace, address, self.mark).await;
            let listener =
                listening.with_context(|| format!("cannot listen on {address} in the workload's namespace"))?;
            bound.push(self.context.cores.listener(core, listener)?);
        }
        Ok(bound)
    }

    /// A socket for each family that the workload has aliases of, with the first of them.
    async fn capture_datagrams(
        &self,
        namespace: &Namespace,
        aliases: &[AliasRange],
    ) -> Result<Vec<(Ip, CaptureSocket)>> {
        let mut sockets = Vec::new();
        for AliasRange { range, own } in aliases {
            let capturing =
                self.namespaces.capture_datagrams(namespace, own.is_ipv4(), self.outbound_port, self.mark).await;
            let socket = capturing.with_context(|| {
                format!("cannot take datagrams at port {} in the workload's namespace", self.outbound_port)
            })?;
            sockets.push((range.network().into(), socket));
        }
        Ok(sockets)
    }

    /// Takes back what the namespace was prepared with.
    async fn restore(&self, local: &LocalWorkload) {
        if let Err(cleanup) = self.namespaces.restore(&local.namespace).await {
            tracing::warn!(workload = %local.workload.name, %cleanup, "cannot remove routing for client addresses");
        }
    }

    /// The steps that show: the guard, the inbound side's table, and capture last.
    fn engage(&mut self, local: &Arc<LocalWorkload>, datapath: &mut Datapath) -> Result<Pod> {
        let workload = &local.workload;
        datapath
            .attach_netns(workload.uid.as_str(), local.namespace.as_fd())
            .context("cannot attach to the workload's network namespace")?;
        self.context.locals.insert(local);
        let pod = self.pod(workload, &local.aliases);
        if let Err(error) = datapath.arm_pod(local.namespace.cookie(), pod) {
            self.context.locals.remove(local);
            datapath.detach_netns(workload.uid.as_str()).ok();
            return Err(error).context("cannot arm capture");
        }
        Ok(pod)
    }

    fn pod(&mut self, workload: &Workload, aliases: &[AliasRange]) -> Pod {
        let of_family = |v4: bool| {
            workload.addresses.iter().find(|address| address.is_ipv4() == v4).map_or(Ip::UNSPECIFIED, |a| Ip::from(*a))
        };
        let index = self.next_index;
        self.next_index = self.next_index.wrapping_add(1).max(1);
        let identity = self.identity_number(workload);
        let flags = if workload.is_host_network() { Pod::HOST_NETWORK } else { 0 };
        let alias = |v4: bool| {
            let range = aliases.iter().find(|range| range.own.is_ipv4() == v4);
            range.map_or(Ip::UNSPECIFIED, |range| Ip::from(range.range.network()))
        };
        let port = self.outbound_port.to_be();
        Pod::new(of_family(true), of_family(false), index, port, flags, identity, alias(true), alias(false))
    }

    fn identity_number(&self, workload: &Workload) -> u32 {
        self.context.snapshot.load().identity_number(&workload.identity)
    }

    /// Writes the workloads anew whose identities the kernel's tables have under another number by now.
    ///
    /// # Errors
    /// If the kernel's table cannot be written.
    pub(super) fn renumber(&mut self, datapath: &mut Datapath) -> Result<()> {
        let snapshot = self.context.snapshot.load();
        let renumbered = |pod: Pod, workload: &Workload| {
            let identity = snapshot.identity_number(&workload.identity);
            let renumbered = Pod::new(
                pod.ip4(),
                pod.ip6(),
                pod.workload(),
                pod.outbound_port_be(),
                pod.flags(),
                identity,
                pod.alias4(),
                pod.alias6(),
            );
            (renumbered != pod).then_some(renumbered)
        };
        for armed in self.armed.values_mut() {
            if let Some(pod) = renumbered(armed.pod, &armed.local.workload) {
                armed.pod = pod;
                datapath.arm_pod(armed.local.namespace.cookie(), pod)?;
            }
        }
        self.hosts.renumber(datapath, renumbered)
    }

    async fn disarm(&mut self, uid: &WorkloadUid, datapath: &mut Datapath) {
        let Some(mut armed) = self.armed.remove(uid) else { return self.hosts.disarm(uid, datapath).await };
        let local = armed.local;
        let warn = |step: &str, error: &dyn std::fmt::Display| {
            tracing::warn!(workload = %local.workload.name, %error, "while disarming: {step}");
        };
        if let Err(error) = datapath.disarm_pod(local.namespace.cookie()) {
            warn("stop capture", &error);
        }
        self.context.locals.remove(&local);
        if let Err(error) = datapath.detach_netns(uid.as_str()) {
            warn("detach from the network namespace", &error);
        }
        if let Err(error) = self.namespaces.restore(&local.namespace).await {
            warn("remove routing for client addresses", &error);
        }
        // First: its connections, on other threads, are to know why their lanes end.
        local.removed.cancel();
        self.context.tunnel.forget(uid);
        // The listeners' tasks own the descriptors that keep the namespace alive.
        while armed.listeners.join_next().await.is_some() {}
        tracing::info!(workload = %local.workload.name, "disarmed");
    }
}

/// Where a workload's datagrams are redirected to, for each family that it has an address of. Its IPv6 range is what an
/// earlier daemon has given it, if one has: its sockets may be connected there.
fn aliases(workload: &Workload, armed_as: Option<Pod>) -> Vec<AliasRange> {
    let of_family = |v4: bool| workload.addresses.iter().find(|address| address.is_ipv4() == v4).copied();
    let v4 = of_family(true).and_then(|own| Some(AliasRange { range: range(ALIAS4, IPV4_PREFIX)?, own }));
    let v6 = of_family(false).and_then(|own| {
        let known = armed_as.map(|pod| pod.alias6()).filter(|alias| !alias.is_unspecified());
        let range = range(known.unwrap_or_else(random_alias6), IPV6_PREFIX)?;
        Some(AliasRange { range, own })
    });
    v4.into_iter().chain(v6).collect()
}

const IPV4_PREFIX: u8 = (u32::BITS - NUMBER_BITS) as u8;
const IPV6_PREFIX: u8 = (u128::BITS - NUMBER_BITS) as u8;

fn range(first: Ip, prefix: u8) -> Option<IpNet> {
    IpNet::new(first.into(), prefix).ok()
}

/// A unique local address (RFC 4193) that nobody else can guess.
fn random_alias6() -> Ip {
    let mut octets: [u8; 16] = rand::random();
    octets[0] = 0xfd;
    octets[13..].fill(0);
    Ip::from_v6(octets)
}

/// Whether a change of a workload reaches what arming set up. Labels, weight, modes and ports live in tables: changing
/// them cuts no connection.
fn needs_rearming(armed: &Workload, desired: &Workload) -> bool {
    let shape = |workload: &Workload| {
        let mut addresses: Vec<IpAddr> = workload.addresses.clone();
        addresses.sort();
        (addresses, workload.netns.clone(), workload.cgroup.clone(), workload.identity.clone(), workload.name.clone())
    };
    shape(armed) != shape(desired)
}
