//! What can be wrong with identities on this side. What can be wrong with a peer is a [`super::PeerRefusal`].

use crate::model::{SpiffeId, TrustDomain};
use std::fmt::Display;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be used; says why and what to do about it.
    #[error("{}: {problem}; {fix}", path.display())]
    File { path: PathBuf, problem: String, fix: String },
    /// This node holds no certificate of the identity.
    #[error("this node has no certificate of {0}; issue one with `nodemeshd ca issue`")]
    Unknown(SpiffeId),
    /// The identity belongs to another trust domain than this mesh.
    #[error("{id} is not of this mesh's trust domain {trust_domain}")]
    Foreign { id: SpiffeId, trust_domain: TrustDomain },
    /// A certificate was asked for that must not be made.
    #[error("no certificate is made: {0}")]
    Refused(String),
    /// Signing failed.
    #[error("making a certificate: {0}")]
    Signing(#[from] rcgen::Error),
    /// The TLS library refused what was built.
    #[error("building a TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
}

impl IdentityError {
    pub(crate) fn file(path: &Path, problem: impl Display, fix: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.to_string(), fix: fix.into() }
    }
}
