//! Why a handshake with a peer failed, as a small stable set for counters and logs.

use rustls::{AlertDescription, CertificateError, Error};
use std::io;

/// rustls's words for a resolver that found no certificate; it has no variant of its own.
const NO_CERTIFICATE_RESOLVED: &str = "no server certificate chain resolved";

/// Why one side refused the other. The same label on both sides as far as TLS alerts tell: an alert cannot say
/// `not yet valid` (the other side reads `expired`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum PeerRefusal {
    #[error("no certificate was presented")]
    NoCertificate,
    #[error("the certificate does not come from a root that is trusted here")]
    UnknownCa,
    #[error("the certificate has expired")]
    Expired,
    #[error("the certificate is not valid yet")]
    NotYetValid,
    #[error("the peer is not, or does not have, the identity that was expected")]
    IdentityMismatch,
    #[error("the certificate is malformed, or not meant for this")]
    BadCertificate,
    #[error("the peers do not speak the same protocol")]
    Protocol,
}

impl PeerRefusal {
    /// Every variant, for counters that exist from the start.
    pub const ALL: [Self; 7] = [
        Self::NoCertificate,
        Self::UnknownCa,
        Self::Expired,
        Self::NotYetValid,
        Self::IdentityMismatch,
        Self::BadCertificate,
        Self::Protocol,
    ];

    /// A stable label.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::IdentityMismatch => "identity_mismatch",
            Self::BadCertificate => "bad_certificate",
            Self::Protocol => "protocol",
        }
    }

    /// The refusal inside an I/O error that a TLS stream returned, if TLS is what failed. With TLS 1.3 a client
    /// learns of the server's refusal on its first read, after its own handshake succeeded.
    #[must_use]
    pub fn from_io(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref::<Error>().map(Self::from)
    }
}

impl From<&Error> for PeerRefusal {
    fn from(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(error) => error.into(),
            Error::AlertReceived(alert) => (*alert).into(),
            Error::General(text) if text == NO_CERTIFICATE_RESOLVED => Self::IdentityMismatch,
            _ => Self::Protocol,
        }
    }
}

impl From<&CertificateError> for PeerRefusal {
    fn from(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UnknownCa,
            CertificateError::ApplicationVerificationFailure => Self::IdentityMismatch,
            _ => Self::BadCertificate,
        }
    }
}

/// What the other side meant by an alert (QUIC carries it as a transport error code: 0x100 + alert).
impl From<AlertDescription> for PeerRefusal {
    fn from(alert: AlertDescription) -> Self {
        match alert {
            AlertDescription::CertificateRequired | AlertDescription::NoCertificate => Self::NoCertificate,
            AlertDescription::UnknownCA => Self::UnknownCa,
            AlertDescription::CertificateExpired => Self::Expired,
            AlertDescription::AccessDenied | AlertDescription::UnrecognisedName => Self::IdentityMismatch,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown => Self::BadCertificate,
            _ => Self::Protocol,
        }
    }
}

/// The alert that tells a peer of the refusal.
impl From<PeerRefusal> for CertificateError {
    fn from(refusal: PeerRefusal) -> Self {
        match refusal {
            PeerRefusal::UnknownCa => Self::UnknownIssuer,
            PeerRefusal::Expired => Self::Expired,
            PeerRefusal::NotYetValid => Self::NotValidYet,
            PeerRefusal::IdentityMismatch => Self::ApplicationVerificationFailure,
            PeerRefusal::NoCertificate | PeerRefusal::BadCertificate | PeerRefusal::Protocol => Self::BadEncoding,
        }
    }
}
