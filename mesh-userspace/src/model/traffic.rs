//! How a service's connections are spread over its endpoints, and what is done when those fail.

use super::{Mesh, ObjectName, Service};
use std::time::Duration;

/// A `TrafficPolicy`: what its namespace's services that it names are to do. What it does not say has a default that is
/// right without any policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficPolicy {
    pub name: ObjectName,
    /// Services of the policy's namespace.
    pub services: Vec<ObjectName>,
    pub spec: TrafficSpec,
}

/// What a policy states; `None` leaves the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficSpec {
    pub algorithm: Option<Algorithm>,
    pub affinity: Option<Affinity>,
    pub slow_start: Option<Duration>,
    pub prefer: Option<Prefer>,
    pub failover_percent: Option<u32>,
    pub connect_timeout: Option<Duration>,
    pub idle_timeout: Option<Duration>,
    pub retry: Option<Retry>,
    pub ejection: Option<Ejection>,
    pub health_check: Option<HealthCheck>,
    pub limits: Option<Limits>,
    pub same_node: Option<SameNode>,
}

/// How an endpoint is picked for a new connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// By weight alone.
    #[default]
    Random,
    RoundRobin,
    /// The endpoint with the fewest open connections for its weight.
    LeastConnections,
    /// Of two random ones, that with the lower peak of moving latency times open connections.
    PeakEwma,
    /// Consistent hashing of the caller's address: few callers move when an endpoint comes or goes.
    Maglev,
}

impl Algorithm {
    /// As catalogs write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Random => "Random",
            Self::RoundRobin => "RoundRobin",
            Self::LeastConnections => "LeastConnections",
            Self::PeakEwma => "PeakEWMA",
            Self::Maglev => "Maglev",
        }
    }
}

/// Whether the connections of one caller stay together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Affinity {
    #[default]
    None,
    /// All connections from one address go to one endpoint for this long after the last one, while it takes any.
    ClientIp(Duration),
}

/// Which endpoints are preferred: Kubernetes' `trafficDistribution`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefer {
    #[default]
    Nobody,
    SameZone,
    /// Then the same zone, then all.
    SameNode,
}

impl Prefer {
    /// As catalogs write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nobody => "None",
            Self::SameZone => "SameZone",
            Self::SameNode => "SameNode",
        }
    }
}

/// How traffic between two workloads of one node travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SameNode {
    /// As plain TCP that the kernel has admitted.
    #[default]
    Kernel,
    /// As between nodes.
    Tunnel,
}

impl SameNode {
    /// As catalogs write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "Kernel",
            Self::Tunnel => "Tunnel",
        }
    }
}

/// Other endpoints are tried while no byte of the application has been consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Attempts after the first one; 0 retries nothing.
    pub attempts: u32,
    /// Retries at once, as a share of the service's connections of the last ten seconds.
    pub budget_percent: u32,
    /// Retries per second that the budget allows in any case.
    pub budget_minimum: u32,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 3, budget_percent: 20, budget_minimum: 10 }
    }
}

/// When an endpoint gets no connections for a while because connections to it fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Failed connects in a row that eject; 0 switches ejection off.
    pub consecutive_failures: u32,
    /// First time out; doubles with each ejection that follows soon.
    pub base_time: Duration,
    pub max_time: Duration,
    /// At most this share of a service's endpoints is out at once; at least one may be.
    pub max_percent: u32,
}

impl Default for Ejection {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            base_time: Duration::from_secs(10),
            max_time: Duration::from_mins(5),
            max_percent: 50,
        }
    }
}

/// Probes that the daemon makes of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub probe: Probe,
    pub interval: Duration,
    pub timeout: Duration,
    /// Failures in a row after which an endpoint is unhealthy.
    pub unhealthy_after: u32,
    /// Successes in a row after which it is healthy again.
    pub healthy_after: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    Tcp,
    /// `GET path`; 200 to 399 is healthy.
    Http {
        path: String,
        host: Option<String>,
    },
    /// `grpc.health.v1.Health/Check`.
    Grpc {
        service: String,
    },
}

/// Circuit breaking: what is above a bound is refused at once, with a counted reason. Of this node's connections to a
/// service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub max_connections: Option<u32>,
    /// Connections that no endpoint has accepted yet.
    pub max_pending: Option<u32>,
}

/// What holds for one service: a policy's word, else the service's own, else the mesh's, else the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    pub algorithm: Algorithm,
    pub affinity: Affinity,
    /// How long a new endpoint's share grows to its full size; zero: at once.
    pub slow_start: Duration,
    pub prefer: Prefer,
    /// The preferred endpoints are enough while at least this share of them takes connections; below it others help.
    pub failover_percent: u32,
    /// `None`: the daemon's own bound.
    pub connect_timeout: Option<Duration>,
    /// `None`: connections may be silent forever.
    pub idle_timeout: Option<Duration>,
    pub retry: Retry,
    pub ejection: Ejection,
    pub health_check: Option<HealthCheck>,
    pub limits: Limits,
    pub same_node: SameNode,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            affinity: Affinity::default(),
            slow_start: Duration::ZERO,
            prefer: Prefer::default(),
            failover_percent: 70,
            connect_timeout: None,
            idle_timeout: None,
            retry: Retry::default(),
            ejection: Ejection::default(),
            health_check: None,
            limits: Limits::default(),
            same_node: SameNode::default(),
        }
    }
}

impl Traffic {
    /// What holds for a service under the policy that names it, if one does.
    #[must_use]
    pub fn of(mesh: Option<&Mesh>, service: &Service, policy: Option<&TrafficPolicy>) -> Self {
        let silent = TrafficSpec::default();
        let spec = policy.map_or(&silent, |policy| &policy.spec);
        let default = Self::default();
        Self {
            algorithm: spec.algorithm.unwrap_or_default(),
            affinity: spec.affinity.unwrap_or(service.affinity),
            slow_start: spec.slow_start.unwrap_or_default(),
            prefer: spec.prefer.unwrap_or(service.prefer),
            failover_percent: spec.failover_percent.unwrap_or(default.failover_percent),
            connect_timeout: spec.connect_timeout,
            idle_timeout: spec.idle_timeout,
            retry: spec.retry.unwrap_or_default(),
            ejection: spec.ejection.unwrap_or_default(),
            health_check: spec.health_check.clone(),
            limits: spec.limits.unwrap_or_default(),
            same_node: spec.same_node.or(mesh.map(|mesh| mesh.same_node)).unwrap_or_default(),
        }
    }

    /// Whether the kernel's own pick, by weight among this node's endpoints, is what the service asks for.
    #[must_use]
    pub fn is_for_the_kernel(&self) -> bool {
        self.same_node == SameNode::Kernel
            && self.algorithm == Algorithm::Random
            && self.affinity == Affinity::None
            && self.limits == Limits::default()
            && self.slow_start.is_zero()
            // The kernel knows no probes' findings and keeps no time.
            && self.health_check.is_none()
            && self.connect_timeout.is_none()
            && self.idle_timeout.is_none()
    }
}
