//! What a group tells about itself: why it refused, how its endpoints fare, what it has counted.

use super::EndpointId;
use crate::engine::Endpoint;
use std::time::{Duration, Instant};

/// An endpoint for one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pick {
    pub id: EndpointId,
    pub endpoint: Endpoint,
}

/// Why there is no endpoint for a connection, or no further attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Exhausted {
    #[error("the service has no endpoint")]
    NoEndpoints,
    #[error("every endpoint of the service was tried for this connection")]
    AllTried,
    #[error("the service has as many connections as its traffic policy allows")]
    MaxConnections,
    #[error("as many connections wait for the service's endpoints as its traffic policy allows")]
    MaxPending,
    #[error("the service's retry budget is spent")]
    RetryBudget,
}

impl Exhausted {
    pub const ALL: [Self; 5] =
        [Self::NoEndpoints, Self::AllTried, Self::MaxConnections, Self::MaxPending, Self::RetryBudget];

    /// The stable cause code.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::AllTried => "all_endpoints_tried",
            Self::MaxConnections => "max_connections",
            Self::MaxPending => "max_pending",
            Self::RetryBudget => "retry_budget",
        }
    }
}

/// How an attempt to connect to an endpoint failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConnectFailure {
    /// Nothing listens: it answered, with a refusal.
    Refused,
    /// It did not answer in time.
    Timeout,
    /// It was reset before it was open.
    Reset,
    /// There is no way to the endpoint, or to its node.
    Unreachable,
}

/// Why an endpoint was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EjectionCause {
    Refused,
    Timeout,
    Reset,
    Unreachable,
    /// Attempts are pending at it and it has answered none for long, while others answered.
    Silent,
}

impl EjectionCause {
    pub const ALL: [Self; 5] = [Self::Refused, Self::Timeout, Self::Reset, Self::Unreachable, Self::Silent];

    /// The stable cause code.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Unreachable => "unreachable",
            Self::Silent => "silent",
        }
    }
}

impl From<ConnectFailure> for EjectionCause {
    fn from(failure: ConnectFailure) -> Self {
        match failure {
            ConnectFailure::Refused => Self::Refused,
            ConnectFailure::Timeout => Self::Timeout,
            ConnectFailure::Reset => Self::Reset,
            ConnectFailure::Unreachable => Self::Unreachable,
        }
    }
}

/// How one endpoint fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStatus {
    pub id: EndpointId,
    pub endpoint: Endpoint,
    /// Connections that were picked and have not ended, the pending ones included.
    pub open: u32,
    /// Attempts that it has not answered yet.
    pub pending: u32,
    /// What active probes say; `true` where there are none.
    pub is_healthy: bool,
    /// Until when it is out, and why.
    pub ejected: Option<(Instant, EjectionCause)>,
    /// It gets one attempt at a time, until one succeeds.
    pub is_on_trial: bool,
    /// It has not answered for unusually long: others are preferred.
    pub is_suspect: bool,
    /// Share of its weight that counts, in percent: less than 100 in slow start.
    pub warmth_percent: u32,
    /// Moving peak of the time to connect; `None` before the first one.
    pub connect_latency: Option<Duration>,
    /// Moving peak of the time to the first byte; `None` before the first one.
    pub first_byte_latency: Option<Duration>,
}

/// What a group has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Endpoints given, first attempts and retries.
    pub picks: u64,
    /// In the order of [`EjectionCause::ALL`].
    pub ejections: [u64; EjectionCause::ALL.len()],
    /// Ejections that were due and not made, since too many endpoints were out.
    pub ejections_withheld: u64,
    /// Picks among endpoints that were out: no other was left.
    pub panics: u64,
    /// Picks that were not of the nearest endpoints that the service has, though it prefers those.
    pub failovers: u64,
    /// Draws of an endpoint that was passed over, since it was silent or on trial.
    pub passed_over: u64,
    pub retries: u64,
    /// In the order of [`Exhausted::ALL`].
    pub exhausted: [u64; Exhausted::ALL.len()],
    /// Callers that were not remembered, since too many were.
    pub callers_forgotten: u64,
}

impl Counts {
    #[must_use]
    pub fn ejections_by(&self, cause: EjectionCause) -> u64 {
        self.ejections[cause as usize]
    }

    #[must_use]
    pub fn exhausted_by(&self, why: Exhausted) -> u64 {
        self.exhausted[why as usize]
    }
}

/// How full a group is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Endpoints of the catalog.
    pub endpoints: u32,
    pub ejected: u32,
    pub unhealthy: u32,
    /// Connections, those to endpoints that have left the catalog included.
    pub open: u32,
    pub pending: u32,
    /// Retries that the budget has room for.
    pub retries_left: u32,
    /// Callers that are remembered for affinity.
    pub callers: u32,
}
