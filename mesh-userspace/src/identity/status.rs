//! How each identity of this node is doing, for people.

use super::Certificate;
use crate::model::SpiffeId;
use time::OffsetDateTime;

/// One identity that this node has or should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateStatus {
    pub id: SpiffeId,
    pub certificate: Option<Certificate>,
    /// `files` or `ca`.
    pub source: &'static str,
    pub issuance: Issuance,
}

/// Where an identity is between the wish for a certificate and its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Issuance {
    pub state: State,
    /// When a new certificate is asked for.
    pub next_renewal: Option<OffsetDateTime>,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// No certificate has come yet.
    #[default]
    Pending,
    /// A certificate is in use.
    Valid,
    /// A certificate is in use, and could not be renewed so far.
    Late,
    /// Its certificate has ended.
    Expired,
}

impl State {
    /// A stable label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Valid => "valid",
            Self::Late => "late",
            Self::Expired => "expired",
        }
    }
}

impl CertificateStatus {
    pub(super) fn of_file(certificate: Certificate, now: OffsetDateTime) -> Self {
        let state = if certificate.not_after < now { State::Expired } else { State::Valid };
        let issuance = Issuance { state, ..Issuance::default() };
        Self { id: certificate.id.clone(), certificate: Some(certificate), source: "files", issuance }
    }
}
