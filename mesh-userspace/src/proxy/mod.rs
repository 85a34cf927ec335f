//! The proxy: carries captured connections into the tunnel and authenticated streams to workloads.

mod balancers;
mod budget;
mod carried;
mod datagram;
mod dial;
pub mod explain;
mod failure;
mod health;
mod host;
mod inbound;
mod kernel;
mod local;
mod outbound;
mod plaintext;
mod registry;
pub mod relay;
mod report;
mod route;
mod session;
pub mod verdict;

pub use balancers::{BalancerStatus, Balancers, Frontend};
pub use budget::{Budget, Spent};
pub use carried::Carried;
pub use datagram::{DatagramOutbound, Datagrams};
pub use dial::{Dialler, LOOKERS};
pub use failure::Failure;
pub use health::{EndpointHealth, HealthChecks};
pub use host::HostOutbound;
pub use inbound::Inbound;
pub use local::{LocalWorkload, LocalWorkloads};
pub use outbound::Outbound;
pub use plaintext::PlaintextSweep;
pub use registry::{Cut, Live, Registry, Side, Ticket};
pub use report::Reports;
pub use session::Edges;

use crate::dns;
use crate::engine::Snapshot;
use crate::model::NodeName;
use crate::runtime::{Cores, Level, Room};
use crate::telemetry::balance::BalanceMetrics;
use crate::telemetry::bounds::AcceptFailures;
use crate::telemetry::connections::ConnectionMetrics;
use crate::telemetry::live::LiveConnections;
use crate::tunnel::Tunnel;
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// What both directions work with.
pub struct Context {
    pub node: NodeName,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub locals: LocalWorkloads,
    pub tunnel: Tunnel,
    /// Port of every node's tunnel.
    pub tunnel_port: u16,
    /// Bound on reaching an application or the other node.
    pub connect_timeout: Duration,
    pub metrics: ConnectionMetrics,
    /// Its edges that were asked for lately.
    pub edges: Edges,
    pub live: LiveConnections,
    /// Which endpoints connections go to.
    pub balancers: Balancers,
    pub balance: BalanceMetrics,
    /// What the probes of this node's endpoints say.
    pub health: EndpointHealth,
    /// What policy said, counted and logged.
    pub reports: Reports,
    /// What a change of policy must reach.
    pub registry: Registry,
    /// What the kernel carries within this node.
    pub carried: Carried,
    /// Answers what workloads ask the mesh's own DNS.
    pub dns: dns::Server,
    /// What applications' connections may take of the node.
    pub budget: Budget,
    /// What listeners could not accept.
    pub accepts: AcceptFailures,
    /// Looks at the sockets of applications that may be ending.
    pub looks: Room,
    /// The threads that serve connections.
    pub cores: Cores,
    /// Every connection's task; drained when the daemon stops.
    pub connections: TaskTracker,
}

impl Context {
    /// How full the bounds of the proxy and the tunnel's pools are.
    #[must_use]
    pub fn levels(&self) -> Vec<Level> {
        let mut levels = self.tunnel.levels();
        levels.extend(self.budget.levels());
        let [used, capacity, hits] = self.reports.plaintext.level();
        let plaintext = Level { bound: "plaintext_callers", used, capacity, hits };
        levels.extend([self.looks.level(), self.carried.level(), self.balancers.level(), plaintext]);
        levels
    }
}

#[cfg(test)]
mod fixture;
