//! Where certificates come from: the seam between the node's identities and certificate authorities.

use crate::model::SpiffeId;
use rustls_pki_types::CertificateDer;
use std::future::Future;
use std::pin::Pin;

/// A boxed future: the trait is used as an object, since the configuration says which source there is.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, SourceError>> + Send + 'a>>;

/// An identity's certificate is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigningRequest {
    pub id: SpiffeId,
    /// PKCS #10, DER: proves that the node has the key, and asks for exactly `id`.
    pub csr: Vec<u8>,
}

/// A certificate, leaf first, with the intermediates that lead to a root of the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedChain(pub Vec<CertificateDer<'static>>);

/// The roots that the mesh trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    pub roots: Vec<CertificateDer<'static>>,
    /// Grows with every change.
    pub version: u64,
    /// Certificates that were asked for under a smaller number should be renewed now: another authority signs.
    pub epoch: u64,
}

/// Why a source gave nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Trying again may help.
    #[error("the certificate authority cannot be reached: {0}")]
    Unavailable(String),
    /// It answered, and said no. `reason` is a stable label.
    #[error("the certificate authority refused: {message}")]
    Refused { reason: String, message: String },
    /// It answered with something that cannot be used.
    #[error("the certificate authority's answer cannot be used: {0}")]
    Invalid(String),
}

impl SourceError {
    /// A stable label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Refused { .. } => "refused",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// A certificate authority as a node sees it. Built in: the client of `ca`. Sources of other meshes and issuers
/// (SPIRE, cert-manager, Istio's CA) come in here.
pub trait CertificateSource: Send + Sync + 'static {
    /// The roots, and whether to renew.
    fn bundle(&self) -> Answer<'_, TrustBundle>;

    /// Asks for certificates; one answer for each request, in their order.
    fn sign(&self, requests: Vec<SigningRequest>) -> Answer<'_, Vec<Result<SignedChain, SourceError>>>;
}
