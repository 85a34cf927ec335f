//! Why a connection failed, as metrics, logs and people call it.

use super::registry::Cut;
use super::verdict::Ruling;
use crate::telemetry::connections::ResponseFlag;
use crate::tunnel::{OpenError, Refusal, ResetCode, StreamError};

/// How a stream ends that the other node has cut.
const CUT_BY_PEER_RESET: StreamError = StreamError::Reset(ResetCode::DENIED);
const CUT_BY_PEER_STOPPED: StreamError = StreamError::Stopped(ResetCode::DENIED);

/// The cause of a failed connection. Each has a stable `reason` label and the field's `response_flags`.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("no original destination is recorded for this connection: it did not come through the connect hook")]
    NoOriginalDestination,
    #[error("the workload that made this connection is not armed any more")]
    UnknownCaller,
    #[error("{0} is neither a frontend nor a workload of the catalog any more")]
    UnknownDestination(std::net::SocketAddr),
    #[error("the service has no endpoint")]
    NoEndpoints,
    #[error("the catalog does not know the endpoint's node {0}")]
    UnknownNode(crate::model::NodeName),
    #[error("cannot open a stream to the endpoint's node: {0}")]
    Open(#[from] OpenError),
    #[error("cannot reach the application: {0}")]
    Application(std::io::Error),
    #[error("the application did not accept the connection in time")]
    ApplicationTimeout,
    #[error("the local socket failed: {0}")]
    Local(std::io::Error),
    #[error("the peer's side failed: {0}")]
    Remote(#[from] StreamError),
    #[error("refused the peer's stream: {0}")]
    Refused(Refusal),
    #[error("{0}")]
    Denied(Ruling),
    #[error("cut: {0}")]
    Cut(Cut),
    #[error("the workload was removed")]
    WorkloadRemoved,
}

impl Failure {
    /// The stable cause code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoOriginalDestination => "no_original_destination",
            Self::UnknownCaller => "unknown_caller",
            Self::UnknownDestination(_) => "unknown_destination",
            Self::NoEndpoints => "no_endpoints",
            Self::UnknownNode(_) => "unknown_node",
            Self::Open(error) => error.reason(),
            Self::Application(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => "application_refused",
            Self::Application(_) => "application_unreachable",
            Self::ApplicationTimeout => "application_timeout",
            Self::Local(error) if error.kind() == std::io::ErrorKind::ConnectionReset => "local_reset",
            Self::Local(_) => "local_error",
            Self::Cut(_) | Self::Remote(CUT_BY_PEER_RESET | CUT_BY_PEER_STOPPED) => "cut",
            Self::Remote(error) => error.reason(),
            Self::Denied(_) => Refusal::Denied.reason(),
            Self::Refused(refusal) => refusal.reason(),
            Self::WorkloadRemoved => "workload_removed",
        }
    }

    /// The `response_flags` label, with the values that dashboards of this field know.
    #[must_use]
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Open(OpenError::Handshake(_)) => ResponseFlag::TlsFailure,
            Self::Denied(_)
            | Self::Cut(_)
            | Self::Remote(CUT_BY_PEER_RESET | CUT_BY_PEER_STOPPED)
            | Self::Open(OpenError::Refused(Refusal::Denied))
            | Self::Refused(Refusal::Denied) => ResponseFlag::Deny,
            Self::Open(OpenError::Refused(Refusal::IdentityMismatch)) | Self::Refused(Refusal::IdentityMismatch) => {
                ResponseFlag::IdentityError
            }
            Self::Open(OpenError::Bound(_)) => ResponseFlag::Overflow,
            Self::WorkloadRemoved => ResponseFlag::Other,
            _ => ResponseFlag::Connect,
        }
    }

    /// What the peer's daemon is told when an application cannot be reached.
    pub(super) fn refusal(&self) -> Refusal {
        match self {
            Self::Application(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Refusal::Refused,
            Self::ApplicationTimeout => Refusal::Timeout,
            Self::Refused(refusal) => *refusal,
            Self::Denied(_) | Self::Cut(_) => Refusal::Denied,
            _ => Refusal::Unreachable,
        }
    }
}
