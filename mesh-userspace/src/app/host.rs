//! Arming and disarming this node's workloads in the node's own network namespace.
//!
//! They share what is the node's: one listener for each of their addresses, and the guard of the ports that they
//! declare. Both are there while one of them is armed. Nothing else of the node's namespace is changed.

use crate::datapath::{Datapath, Tuples, WorkloadCgroup};
use crate::model::{Workload, WorkloadUid};
use crate::netns::{Namespace, Namespaces};
use crate::proxy::{Context, HostOutbound, LocalWorkload};
use crate::runtime::Cancellation;
use anyhow::{Context as _, Result, bail};
use mesh_common::service::Pod;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The daemon's own network namespace, which is its node's.
const NODE_NETNS: &str = "/proc/self/ns/net";

/// Ports that the daemon itself listens on.
#[derive(Clone, Debug)]
pub(super) struct OwnPorts {
    /// For captured connections.
    pub(super) outbound: u16,
    pub(super) others: Vec<u16>,
}

struct Armed {
    local: Arc<LocalWorkload>,
    cgroup: WorkloadCgroup,
    /// As the kernel has it.
    pod: Pod,
}

struct Listener {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// The armed ones, and what they share.
pub(super) struct Hosts {
    context: Arc<Context>,
    namespaces: Namespaces,
    tuples: Tuples,
    ports: OwnPorts,
    armed: BTreeMap<WorkloadUid, Armed>,
    /// While one is armed.
    node: Option<Arc<Namespace>>,
    listeners: BTreeMap<SocketAddr, Listener>,
}

impl Hosts {
    pub(super) fn new(context: Arc<Context>, namespaces: Namespaces, tuples: Tuples, ports: OwnPorts) -> Self {
        Self { context, namespaces, tuples, ports, armed: BTreeMap::new(), node: None, listeners: BTreeMap::new() }
    }

    pub(super) fn armed(&self) -> impl Iterator<Item = &Arc<LocalWorkload>> {
        self.armed.values().map(|armed| &armed.local)
    }

    /// Arms a workload; what it leaves behind when it cannot is taken away again.
    pub(super) async fn arm(&mut self, workload: Arc<Workload>, pod: Pod, datapath: &mut Datapath) -> Result<()> {
        let outcome = self.try_arm(workload, pod, datapath).await;
        if outcome.is_err() {
            self.tidy(datapath).await;
        }
        outcome
    }

    async fn try_arm(&mut self, workload: Arc<Workload>, pod: Pod, datapath: &mut Datapath) -> Result<()> {
        let path = workload.cgroup.as_deref().context("the WorkloadEntry has no spec.cgroup")?;
        let taken = workload.declared_ports().into_iter().find(|port| self.ports.are(*port));
        if let Some(port) = taken {
            bail!("port {port} is nodemeshd's own on every node: the workload cannot declare it");
        }
        let cgroup = datapath.workload_cgroup(path)?;
        if let Some(other) = self.armed.values().find(|other| other.cgroup.id() == cgroup.id()) {
            bail!("{} is the cgroup of {} too: give each workload its own", path.display(), other.local.workload.name);
        }
        let namespace = self.node().await?;
        for address in &workload.addresses {
            self.listen(&namespace, SocketAddr::new(*address, self.ports.outbound)).await?;
        }
        datapath
            .attach_node(namespace.as_fd(), namespace.cookie())
            .context("cannot attach to the node's network namespace")?;
        let local =
            Arc::new(LocalWorkload { workload, namespace, aliases: Vec::new(), removed: Cancellation::default() });
        // The accepting side must know whom the kernel may name.
        self.context.locals.insert_host(cgroup.id(), &local);
        if let Err(error) = datapath.arm_host(&cgroup, pod) {
            self.context.locals.remove(&local);
            return Err(error).context("cannot arm capture");
        }
        self.armed.insert(local.workload.uid.clone(), Armed { local, cgroup, pod });
        Ok(())
    }

    async fn node(&mut self) -> Result<Arc<Namespace>> {
        if let Some(node) = &self.node {
            return Ok(node.clone());
        }
        let opened = self.namespaces.open(Path::new(NODE_NETNS)).await;
        let node = Arc::new(opened.context("cannot open the node's network namespace")?);
        Ok(self.node.insert(node).clone())
    }

    async fn listen(&mut self, namespace: &Namespace, address: SocketAddr) -> Result<()> {
        if self.listeners.contains_key(&address) {
            return Ok(());
        }
        let listening = self.namespaces.listen(namespace, address, 0).await.with_context(|| {
            format!("cannot listen on {address}: the workload's address must be one of this node's own")
        })?;
        let outbound = HostOutbound {
            context: self.context.clone(),
            netns_cookie: namespace.cookie(),
            tuples: self.tuples.clone(),
        };
        let stop = CancellationToken::new();
        let (cores, core) = (&self.context.cores, self.listeners.len() % self.context.cores.count());
        let listener = cores.listener(core, listening)?;
        let task = cores.handle(core).spawn(outbound.serve(listener, stop.clone()));
        self.listeners.insert(address, Listener { stop, task });
        Ok(())
    }

    /// Those whose cgroup is gone from its path, or another one: no process can be in it again.
    pub(super) fn vanished(&self) -> Vec<WorkloadUid> {
        let gone = self.armed.iter().filter(|(_, armed)| !armed.cgroup.is_still_at_its_path());
        gone.map(|(uid, _)| uid.clone()).collect()
    }

    /// Stops capture everywhere; connections that exist go on.
    pub(super) fn release_all(&mut self, datapath: &mut Datapath) {
        for armed in self.armed.values() {
            if let Err(error) = datapath.disarm_host(&armed.cgroup) {
                tracing::warn!(workload = %armed.local.workload.name, %error, "cannot stop capture");
            }
        }
    }

    /// Writes the workloads anew whose entry is not as `renumbered` says it should be.
    pub(super) fn renumber(
        &mut self,
        datapath: &mut Datapath,
        renumbered: impl Fn(Pod, &Workload) -> Option<Pod>,
    ) -> Result<()> {
        for armed in self.armed.values_mut() {
            if let Some(pod) = renumbered(armed.pod, &armed.local.workload) {
                datapath.arm_host(&armed.cgroup, pod)?;
                armed.pod = pod;
            }
        }
        Ok(())
    }

    /// Disarms a workload; one that is not armed is no error.
    pub(super) async fn disarm(&mut self, uid: &WorkloadUid, datapath: &mut Datapath) {
        let Some(Armed { local, cgroup, .. }) = self.armed.remove(uid) else { return };
        if let Err(error) = datapath.disarm_host(&cgroup) {
            tracing::warn!(workload = %local.workload.name, %error, "while disarming: stop capture");
        }
        self.context.locals.remove(&local);
        // First: its connections, on other threads, are to know why their lanes end.
        local.removed.cancel();
        self.context.tunnel.forget(uid);
        tracing::info!(workload = %local.workload.name, "disarmed");
        drop(local);
        self.tidy(datapath).await;
    }

    pub(super) async fn disarm_all(&mut self, datapath: &mut Datapath) {
        for uid in self.armed.keys().cloned().collect::<Vec<_>>() {
            self.disarm(&uid, datapath).await;
        }
    }

    /// Takes away what no armed workload needs.
    async fn tidy(&mut self, datapath: &mut Datapath) {
        let addresses = self.armed.values().flat_map(|armed| &armed.local.workload.addresses);
        let needed: BTreeSet<_> = addresses.map(|address| SocketAddr::new(*address, self.ports.outbound)).collect();
        let unneeded: Vec<_> = self.listeners.keys().filter(|address| !needed.contains(address)).copied().collect();
        for listener in unneeded.iter().filter_map(|address| self.listeners.remove(address)).collect::<Vec<_>>() {
            listener.stop.cancel();
            if let Err(error) = listener.task.await {
                tracing::error!(%error, "a listener for captured connections failed");
            }
        }
        if self.armed.is_empty()
            && self.node.take().is_some()
            && let Err(error) = datapath.detach_node()
        {
            tracing::warn!(error = format!("{error:#}"), "cannot detach from the node's network namespace");
        }
    }
}

impl OwnPorts {
    fn are(&self, port: u16) -> bool {
        port == self.outbound || self.others.contains(&port)
    }
}
