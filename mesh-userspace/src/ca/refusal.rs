//! Why the authority says no: a small stable set, for counters, logs and the node that asked.

/// A stable reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The text is no join token.
    TokenMalformed,
    /// No token has this id and this secret. Which of the two is wrong is not told.
    TokenUnknown,
    TokenUsed,
    TokenExpired,
    TokenRevoked,
    /// The token is bound to another node's name.
    TokenOtherNode,
    /// A node of this name has joined, or is revoked: only a token bound to the name lets it join again.
    NodeExists,
    NodeRevoked,
    NodeUnknown,
    /// The caller presented no client certificate.
    NoCertificate,
    /// The caller's certificate is no node's certificate of this trust domain.
    NotANode,
    /// The caller's certificate has ended, or is older than the node's last join.
    CertificateStale,
    /// The catalog places no workload of this identity on the node.
    NotScheduled,
    /// What was asked for is no identity of this trust domain.
    ForeignIdentity,
    CsrMalformed,
    /// The request is not signed by the key that it carries.
    CsrSignature,
    /// The key is not of the curve P-256.
    CsrKey,
    /// The request names something else, or more, than the identity that is asked for.
    CsrNames,
    /// More than a node may ask for in this time.
    TooMany,
    RequestMalformed,
    /// Too many tokens or nodes are on record.
    Full,
    /// A rotation is under way, or there is none to go on with.
    RotationUnderWay,
    /// A life time outside of what is allowed.
    Lifetime,
    /// The authority cannot read or write its own state.
    Internal,
}

impl Reason {
    /// Every variant, for counters that exist from the start.
    pub const ALL: [Self; 24] = [
        Self::TokenMalformed,
        Self::TokenUnknown,
        Self::TokenUsed,
        Self::TokenExpired,
        Self::TokenRevoked,
        Self::TokenOtherNode,
        Self::NodeExists,
        Self::NodeRevoked,
        Self::NodeUnknown,
        Self::NoCertificate,
        Self::NotANode,
        Self::CertificateStale,
        Self::NotScheduled,
        Self::ForeignIdentity,
        Self::CsrMalformed,
        Self::CsrSignature,
        Self::CsrKey,
        Self::CsrNames,
        Self::TooMany,
        Self::RequestMalformed,
        Self::Full,
        Self::RotationUnderWay,
        Self::Lifetime,
        Self::Internal,
    ];

    /// A stable label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TokenMalformed => "token_malformed",
            Self::TokenUnknown => "token_unknown",
            Self::TokenUsed => "token_used",
            Self::TokenExpired => "token_expired",
            Self::TokenRevoked => "token_revoked",
            Self::TokenOtherNode => "token_other_node",
            Self::NodeExists => "node_exists",
            Self::NodeRevoked => "node_revoked",
            Self::NodeUnknown => "node_unknown",
            Self::NoCertificate => "no_certificate",
            Self::NotANode => "not_a_node",
            Self::CertificateStale => "certificate_stale",
            Self::NotScheduled => "not_scheduled",
            Self::ForeignIdentity => "foreign_identity",
            Self::CsrMalformed => "csr_malformed",
            Self::CsrSignature => "csr_signature",
            Self::CsrKey => "csr_key",
            Self::CsrNames => "csr_names",
            Self::TooMany => "too_many",
            Self::RequestMalformed => "request_malformed",
            Self::Full => "full",
            Self::RotationUnderWay => "rotation_under_way",
            Self::Lifetime => "lifetime",
            Self::Internal => "internal",
        }
    }
}

/// A refusal, told to whoever asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub reason: Reason,
    /// What is wrong, and where there is a remedy, which.
    pub message: String,
}

impl Refusal {
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}
