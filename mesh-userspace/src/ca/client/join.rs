//! Joining: once, with a token, or without one where the authority's own keys are at hand.

use super::node_files::NodeFiles;
use super::transport::{Dial, Failure};
use crate::ca::tls::{joining_config, server_name};
use crate::ca::wire::{Bytes, JoinAnswer, JoinRequest};
use crate::ca::{Authority, CaError, Token, csr};
use crate::identity::certificate::{claimed_trust_domain, uris_of, validity};
use crate::model::{NodeId, NodeName, TrustDomain};
use hyper::Method;
use rustls_pki_types::CertificateDer;
use std::path::{Path, PathBuf};
use std::time::Duration;
use time::OffsetDateTime;

/// Why a node has not joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The server is not the authority that made the token; the token was not sent.
    #[error("{message}; the token was not sent: check the address, and that the token is of this authority")]
    WrongAuthority { message: String },
    /// No answer. Trying again may help.
    #[error("{message}")]
    Unavailable { message: String },
    /// The authority said no; `reason` is a stable label.
    #[error("the certificate authority refused: {message} ({reason})")]
    Refused { reason: String, message: String },
    /// The authority's answer cannot be used.
    #[error("the certificate authority's answer cannot be used: {message}")]
    Invalid { message: String },
    /// The files cannot be written.
    #[error(transparent)]
    Files(#[from] CaError),
}

/// What a node has after joining.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    pub id: NodeId,
    /// The node's certificate, on disk.
    pub certificate: PathBuf,
    pub not_after: OffsetDateTime,
}

/// Lets this node join: proves to the authority at `address` that it has the token, after the authority has proved that
/// it is the token's, and stores the node's certificate and key and the mesh's roots in the identity directory.
///
/// # Errors
/// Says what went wrong, and whether the token was sent.
pub async fn join(
    address: &str,
    token: &Token,
    node: &NodeName,
    directory: &Path,
    timeout: Duration,
) -> Result<Membership, JoinError> {
    let files = NodeFiles::new(directory);
    let key = files.prepare()?;
    let config = joining_config(token.root()).map_err(CaError::from)?;
    let dial = Dial { config, name: server_name(token.root()), timeout };
    let mut id = None;
    let asking = dial.ask(address, Method::POST, "/v1/join", |authority| {
        // The name to be signed holds the trust domain, which only the authority's certificate tells.
        let own = NodeId::new(trust_domain_of(authority)?, node.clone());
        let csr = csr::make(&key, &own.to_string()).map_err(|error| error.to_string())?;
        id = Some(own);
        let request = JoinRequest { token: token.reveal().to_string(), node: node.to_string(), csr: Bytes(csr) };
        serde_json::to_vec(&request).map_err(|error| error.to_string())
    });
    let answer: JoinAnswer = asking.await?;
    let id = id.ok_or_else(|| invalid("it came before the question"))?;
    store(&files, id, &certificates(answer.chain), &certificates(answer.bundle.roots))
}

/// The trust domain of an authority whose certificate has been verified.
fn trust_domain_of(authority: &CertificateDer<'_>) -> Result<TrustDomain, String> {
    let uris = uris_of(authority).unwrap_or_default();
    let domain = uris.first().and_then(|uri| uri.strip_prefix("spiffe://")?.strip_suffix("/ca"));
    TrustDomain::parse(domain.unwrap_or_default()).map_err(|error| error.to_string())
}

/// Whether the identity directory holds a certificate of the node that this authority accepts now.
#[must_use]
pub fn is_member(authority: &Authority, node: &NodeName, directory: &Path) -> bool {
    let stored = NodeFiles::new(directory).read();
    let leaf = stored.as_ref().ok().and_then(|stored| stored.chain.first());
    leaf.is_some_and(|leaf| authority.authenticate(leaf, OffsetDateTime::now_utc()).is_ok_and(|name| name == *node))
}

/// Lets the node join on which the authority itself runs.
///
/// # Errors
/// If the node is revoked, or the files cannot be written.
pub fn enrol(authority: &Authority, node: &NodeName, directory: &Path) -> Result<Membership, JoinError> {
    let files = NodeFiles::new(directory);
    let key = files.prepare()?;
    let joined = authority.enrol(node, &key, OffsetDateTime::now_utc())?;
    let id = NodeId::new(authority.trust_domain().clone(), node.clone());
    store(&files, id, &joined.chain.0, &joined.bundle.roots)
}

fn store(
    files: &NodeFiles,
    id: NodeId,
    chain: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
) -> Result<Membership, JoinError> {
    let leaf = chain.first().ok_or_else(|| invalid("it holds no certificate"))?;
    if uris_of(leaf).is_none_or(|uris| uris != [id.to_string()]) {
        return Err(invalid(format!("its certificate is not that of {id}")));
    }
    check_roots(roots, id.trust_domain()).map_err(invalid)?;
    let (_, not_after) = validity(leaf).map_err(invalid)?;
    files.write_bundle(roots)?;
    files.complete(chain)?;
    Ok(Membership { id, certificate: files.certificate().to_owned(), not_after })
}

/// Roots that an authority has sent must be some, and of its trust domain.
pub(super) fn check_roots(roots: &[CertificateDer<'static>], trust_domain: &TrustDomain) -> Result<(), String> {
    if roots.is_empty() {
        return Err("its bundle holds no root".to_owned());
    }
    let own = |root: &CertificateDer<'_>| {
        claimed_trust_domain(root).is_ok_and(|claimed| claimed.as_deref() == Some(trust_domain.as_str()))
    };
    if roots.iter().all(own) { Ok(()) } else { Err(format!("its bundle holds a root that is not of {trust_domain}")) }
}

pub(super) fn certificates(sent: Vec<Bytes>) -> Vec<CertificateDer<'static>> {
    sent.into_iter().map(|bytes| CertificateDer::from(bytes.0)).collect()
}

fn invalid(message: impl std::fmt::Display) -> JoinError {
    JoinError::Invalid { message: message.to_string() }
}

impl From<Failure> for JoinError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::WrongAuthority { .. } => Self::WrongAuthority { message },
            Failure::Refused(refusal) => Self::Refused { reason: refusal.reason, message: refusal.message },
            Failure::Invalid { .. } => Self::Invalid { message },
            Failure::Unreachable { .. }
            | Failure::Handshake { .. }
            | Failure::Timeout { .. }
            | Failure::BrokeOff { .. } => Self::Unavailable { message },
        }
    }
}
