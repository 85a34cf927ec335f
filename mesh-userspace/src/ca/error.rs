//! What can go wrong on the authority's own side. What a caller is refused for is a [`Refusal`].

use super::Refusal;
use crate::identity::IdentityError;
use std::fmt::Display;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The authority's directory cannot be used; says why and what to do about it.
    #[error("{}: {problem}; {fix}", path.display())]
    Store { path: PathBuf, problem: String, fix: String },
    /// The request is not granted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Signing failed.
    #[error("making a certificate: {0}")]
    Signing(#[from] rcgen::Error),
    /// The TLS library refused what was built.
    #[error("building a TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
}

impl CaError {
    pub(super) fn store(path: &Path, problem: impl Display, fix: impl Into<String>) -> Self {
        Self::Store { path: path.to_owned(), problem: problem.to_string(), fix: fix.into() }
    }
}
