//! Why a stream was refused, not opened, or ended early. Each reason has one stable label.

use crate::identity::PeerRefusal;
use std::io;

/// Why a direction was given up, as told to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResetCode(pub u32);

impl ResetCode {
    /// The half was dropped before its end.
    pub const CANCELLED: Self = Self(0);
    /// The application's connection was reset.
    pub const CONNECTION_RESET: Self = Self(1);
    /// The application's connection failed in another way.
    pub const CONNECTION_FAILED: Self = Self(2);
    /// Policy no longer allows the connection.
    pub const DENIED: Self = Self(3);
    /// The node drains and the deadline has passed.
    pub const DRAINED: Self = Self(4);
    /// Nothing has passed for longer than the service allows.
    pub const IDLE: Self = Self(5);
}

/// The destination node's reason not to open a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Refusal {
    #[error("denied by policy")]
    Denied,
    #[error("the application refused the connection")]
    Refused,
    #[error("the application cannot be reached")]
    Unreachable,
    #[error("the application did not answer in time")]
    Timeout,
    #[error("no such workload on this node")]
    NotFound,
    #[error("the stream header is malformed")]
    BadHeader,
    #[error("the lane's identity is not the destination's")]
    IdentityMismatch,
    #[error("the node is overloaded")]
    Overloaded,
    #[error("the node takes no new streams")]
    Draining,
    /// Peers that do not know it read [`Self::Refused`].
    #[error("the application does not pass its service's health check")]
    Unhealthy,
    /// Peers that do not know it read [`Self::Refused`].
    #[error("the caller has no port left towards the application")]
    PortsExhausted,
}

impl Refusal {
    /// Every variant.
    pub const ALL: [Self; 11] = [
        Self::Denied,
        Self::Refused,
        Self::Unreachable,
        Self::Timeout,
        Self::NotFound,
        Self::BadHeader,
        Self::IdentityMismatch,
        Self::Overloaded,
        Self::Draining,
        Self::Unhealthy,
        Self::PortsExhausted,
    ];

    /// A stable label.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::NotFound => "not_found",
            Self::BadHeader => "bad_header",
            Self::IdentityMismatch => "identity_mismatch",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
            Self::Unhealthy => "unhealthy",
            Self::PortsExhausted => "ports_exhausted",
        }
    }

    /// The number on the wire, never 0.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8 + 1
    }

    /// A code of a newer peer that this version does not know counts as `Refused`.
    #[must_use]
    pub fn from_code(code: u8) -> Self {
        Self::ALL.into_iter().find(|refusal| refusal.code() == code).unwrap_or(Self::Refused)
    }
}

/// Why a stream could not be opened. No byte of the application was consumed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the node cannot be reached: {0}")]
    Dial(#[source] io::Error),
    #[error("the TLS handshake failed: {0}")]
    Handshake(PeerRefusal),
    #[error("the destination's node refused: {0}")]
    Refused(Refusal),
    #[error("the destination's node did not answer in time")]
    Timeout,
    #[error("the connection to the node was closed")]
    Closed,
    /// A bound of this node was hit; says which.
    #[error("this node's limit of {0} is reached")]
    Bound(&'static str),
}

impl OpenError {
    /// A stable label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Dial(_) => "dial",
            Self::Handshake(refusal) => refusal.reason(),
            Self::Refused(refusal) => refusal.reason(),
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Bound(_) => "bound",
        }
    }
}

/// Why an open stream's direction ended before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The peer gave up sending.
    #[error("the peer reset the stream (code {})", .0.0)]
    Reset(ResetCode),
    /// The peer wants no more bytes.
    #[error("the peer stopped the stream (code {})", .0.0)]
    Stopped(ResetCode),
    /// The connection between the nodes ended.
    #[error("the connection between the nodes was closed")]
    LaneClosed,
    /// The direction was ended locally before.
    #[error("the direction was ended before")]
    Ended,
}

impl StreamError {
    /// A stable label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Reset(_) => "reset",
            Self::Stopped(_) => "stopped",
            Self::LaneClosed => "lane_closed",
            Self::Ended => "ended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_survive_the_wire() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::from_code(refusal.code()), refusal);
        }
        assert_eq!(Refusal::from_code(0), Refusal::Refused);
        assert_eq!(Refusal::from_code(200), Refusal::Refused);
    }
}
