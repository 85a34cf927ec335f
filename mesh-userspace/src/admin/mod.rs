//! What the daemon answers when asked: versioned JSON on a local socket for the CLI; metrics, readiness and liveness on
//! a TCP port. It reads snapshots; the few things that it can be told to do stand beside them: renewing certificates,
//! and a certificate authority's tokens, nodes and rotation where one runs in the process.

mod authority;
pub mod ca_documents;
mod certificates;
pub mod documents;
pub mod endpoints;
mod identity_rows;
mod pages;
pub mod policies;
mod policy_rows;
mod rows;
mod server;
mod socket;
pub mod traffic;

pub use authority::Hosted;
pub use certificates::Certificates;
pub use documents::DEFAULT_SOCKET;
pub use policy_rows::PolicySources;
pub use server::{Config, Server};

use crate::telemetry::Metrics;
use crate::telemetry::live::Snapshot;
use documents::{DiagnosticRow, LaneRow, ServiceRow, Status, WorkloadRow};
use endpoints::EndpointRow;
use std::fmt;
use std::sync::Arc;

/// A question that another room answers. It is asked on a blocking thread, so it may do short system calls.
pub type Ask<T> = Arc<dyn Fn() -> T + Send + Sync>;

/// Everything that is shown, as the composition root wires it. Rows may come in any order.
#[derive(Clone)]
pub struct Sources {
    pub metrics: Arc<Metrics>,
    /// What readiness still waits for, one phrase each; empty once the daemon is ready.
    pub not_ready: Ask<Vec<String>>,
    /// `ready` and `not_ready` are filled in from the closure above.
    pub status: Ask<Status>,
    pub workloads: Ask<Vec<WorkloadRow>>,
    pub services: Ask<Vec<ServiceRow>>,
    /// At most that many connections: `LiveConnections::snapshot`.
    pub connections: Arc<dyn Fn(usize) -> Snapshot + Send + Sync>,
    pub lanes: Ask<Vec<LaneRow>>,
    pub endpoints: Ask<Vec<EndpointRow>>,
    pub diagnostics: Ask<Vec<DiagnosticRow>>,
    pub certificates: Certificates,
    pub policy: PolicySources,
    /// The certificate authority, if one runs in this daemon.
    pub authority: Option<Hosted>,
}

/// What a process shows that is a certificate authority and nothing else.
#[derive(Clone)]
pub struct AuthoritySources {
    pub metrics: Arc<Metrics>,
    /// As in [`Sources`].
    pub not_ready: Ask<Vec<String>>,
    pub authority: Hosted,
}

/// What every process shows.
#[derive(Clone)]
struct Process {
    metrics: Arc<Metrics>,
    not_ready: Ask<Vec<String>>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
