//! Why a connection failed, as metrics, logs and people call it.

use super::budget::Spent;
use super::registry::Cut;
use super::verdict::Ruling;
use crate::balance::{ConnectFailure, Exhausted};
use crate::identity::PeerRefusal;
use crate::telemetry::connections::ResponseFlag;
use crate::tunnel::{OpenError, Refusal, ResetCode, StreamError};
use std::io::ErrorKind;

/// How a stream ends that the other node has cut.
const CUT_BY_PEER_RESET: StreamError = StreamError::Reset(ResetCode::DENIED);
const CUT_BY_PEER_STOPPED: StreamError = StreamError::Stopped(ResetCode::DENIED);

/// How a stream ends on which the other node has seen nothing pass for too long.
const IDLE_RESET: StreamError = StreamError::Reset(ResetCode::IDLE);
const IDLE_STOPPED: StreamError = StreamError::Stopped(ResetCode::IDLE);

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
    /// A bound of the service's TrafficPolicy, by its label.
    #[error("the service's limit {0} is reached")]
    Limit(&'static str),
    /// A bound of this node.
    #[error("this node has no {} left for it", .0.what())]
    Spent(Spent),
    #[error("the catalog does not know the endpoint's node {0}")]
    UnknownNode(crate::model::NodeName),
    #[error("cannot open a stream to the endpoint's node: {0}")]
    Open(#[from] OpenError),
    #[error("cannot reach the application: {0}")]
    Application(std::io::Error),
    /// Each connection needs a port of the caller's address that no other one from there to the application has.
    #[error("the caller's address has no port left for another connection to the application")]
    PortsExhausted,
    #[error("the application did not accept the connection in time")]
    ApplicationTimeout,
    #[error("the application has closed the connection before any byte, and takes no others")]
    ApplicationGone,
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
    #[error("nothing has passed for the service's idle timeout")]
    IdleTimeout,
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
            Self::Limit(limit) => limit,
            Self::Spent(spent) => spent.reason(),
            Self::PortsExhausted => Refusal::PortsExhausted.reason(),
            Self::UnknownNode(_) => "unknown_node",
            Self::Open(error) => error.reason(),
            Self::Application(error) if error.kind() == ErrorKind::ConnectionRefused => "application_refused",
            Self::Application(_) => "application_unreachable",
            Self::ApplicationTimeout => "application_timeout",
            Self::ApplicationGone => "application_gone",
            Self::Local(error) if error.kind() == ErrorKind::ConnectionReset => "local_reset",
            Self::Local(_) => "local_error",
            Self::Cut(_) | Self::Remote(CUT_BY_PEER_RESET | CUT_BY_PEER_STOPPED) => "cut",
            Self::IdleTimeout | Self::Remote(IDLE_RESET | IDLE_STOPPED) => "idle_timeout",
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
            Self::Limit(_)
            | Self::Spent(_)
            | Self::PortsExhausted
            | Self::Open(OpenError::Bound(_) | OpenError::Refused(Refusal::Overloaded | Refusal::PortsExhausted)) => {
                ResponseFlag::Overflow
            }
            Self::WorkloadRemoved | Self::IdleTimeout | Self::Remote(IDLE_RESET | IDLE_STOPPED) => ResponseFlag::Other,
            _ => ResponseFlag::Connect,
        }
    }

    /// Whether the connection may go to another endpoint, as far as no byte of it has been anywhere yet. Not where another
    /// endpoint would say the same (the stream itself is at fault), nor where policy has spoken: that is the answer.
    pub(super) fn is_retriable(&self) -> bool {
        match self {
            Self::UnknownNode(_) => true,
            Self::Open(error) => match error {
                // This node has none for the caller, whomever it calls.
                OpenError::Handshake(PeerRefusal::NoCertificate) | OpenError::Bound(_) => false,
                OpenError::Dial(_) | OpenError::Handshake(_) | OpenError::Timeout | OpenError::Closed => true,
                OpenError::Refused(refusal) => !matches!(refusal, Refusal::Denied | Refusal::BadHeader),
            },
            Self::Remote(error) => !matches!(
                *error,
                CUT_BY_PEER_RESET | CUT_BY_PEER_STOPPED | IDLE_RESET | IDLE_STOPPED | StreamError::Ended
            ),
            _ => false,
        }
    }

    /// What the failure says against the endpoint. `None` where it may be the caller's own: whose certificate or address is
    /// wrong must not be able to take endpoints away from others.
    pub(super) fn blames_endpoint(&self) -> Option<ConnectFailure> {
        match self {
            Self::UnknownNode(_) => Some(ConnectFailure::Unreachable),
            Self::Open(error) => match error {
                OpenError::Dial(_) => Some(ConnectFailure::Unreachable),
                OpenError::Timeout | OpenError::Refused(Refusal::Timeout) => Some(ConnectFailure::Timeout),
                OpenError::Closed => Some(ConnectFailure::Reset),
                OpenError::Refused(refusal) => match refusal {
                    Refusal::Unreachable | Refusal::NotFound => Some(ConnectFailure::Unreachable),
                    Refusal::Refused | Refusal::Overloaded | Refusal::Draining => Some(ConnectFailure::Refused),
                    // An unhealthy one is watched by its node: nothing has to be inferred.
                    // One caller's ports must not take the endpoint from others.
                    Refusal::Unhealthy
                    | Refusal::PortsExhausted
                    | Refusal::Denied
                    | Refusal::BadHeader
                    | Refusal::IdentityMismatch
                    | Refusal::Timeout => None,
                },
                OpenError::Handshake(_) | OpenError::Bound(_) => None,
            },
            _ => None,
        }
    }

    /// What the peer's daemon is told when an application cannot be reached.
    pub(super) fn refusal(&self) -> Refusal {
        match self {
            Self::Application(error) if error.kind() == ErrorKind::ConnectionRefused => Refusal::Refused,
            Self::ApplicationTimeout => Refusal::Timeout,
            Self::Spent(_) => Refusal::Overloaded,
            Self::PortsExhausted => Refusal::PortsExhausted,
            Self::Refused(refusal) => *refusal,
            Self::Denied(_) | Self::Cut(_) => Refusal::Denied,
            _ => Refusal::Unreachable,
        }
    }
}

impl From<Exhausted> for Failure {
    fn from(exhausted: Exhausted) -> Self {
        match exhausted {
            Exhausted::MaxConnections | Exhausted::MaxPending => Self::Limit(exhausted.reason()),
            Exhausted::NoEndpoints | Exhausted::AllTried | Exhausted::RetryBudget => Self::NoEndpoints,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policys_word_and_a_bad_stream_are_final() {
        for refusal in Refusal::ALL {
            let is_final = matches!(refusal, Refusal::Denied | Refusal::BadHeader);
            assert_eq!(Failure::Open(OpenError::Refused(refusal)).is_retriable(), !is_final, "{refusal}");
        }
        assert!(!Failure::Spent(Spent::Descriptors).is_retriable(), "whomever it calls");
        assert!(!Failure::Remote(CUT_BY_PEER_RESET).is_retriable());
        assert!(!Failure::Open(OpenError::Bound("shared lanes")).is_retriable());
        assert!(!Failure::Open(OpenError::Handshake(PeerRefusal::NoCertificate)).is_retriable());
        assert!(Failure::Open(OpenError::Handshake(PeerRefusal::Expired)).is_retriable());
        assert!(Failure::Remote(StreamError::LaneClosed).is_retriable());
    }

    #[test]
    fn a_bound_here_is_told_to_the_caller_as_one_that_another_node_may_not_have() {
        for spent in [Spent::Descriptors, Spent::Connections] {
            assert_eq!(Failure::Spent(spent).refusal(), Refusal::Overloaded);
        }
        assert_eq!(Failure::PortsExhausted.refusal(), Refusal::PortsExhausted);
    }

    #[test]
    fn what_may_be_the_callers_fault_blames_no_endpoint() {
        let open = |error| Failure::Open(error).blames_endpoint();
        assert_eq!(open(OpenError::Handshake(PeerRefusal::NoCertificate)), None);
        assert_eq!(open(OpenError::Refused(Refusal::IdentityMismatch)), None);
        assert_eq!(open(OpenError::Refused(Refusal::Denied)), None);
        assert_eq!(open(OpenError::Refused(Refusal::PortsExhausted)), None);
        assert_eq!(open(OpenError::Refused(Refusal::Timeout)), Some(ConnectFailure::Timeout));
        assert_eq!(open(OpenError::Closed), Some(ConnectFailure::Reset));
    }
}
