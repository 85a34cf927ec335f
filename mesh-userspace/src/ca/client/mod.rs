//! A node's side of the authority: joining, and asking for certificates with what it got by joining.

mod join;
mod node_files;
mod transport;

pub use join::{JoinError, Membership, enrol, join};
#[cfg(test)]
pub(super) use node_files::node_chain;

use super::certificate::{BACK_DATED, Validity};
use super::routes::MAX_REQUESTS;
use super::tls::{node_config, server_name};
use super::wire::{
    BundleAnswer, Bytes, IdentityAnswer, IdentityRequest, RefusalAnswer, RenewAnswer, RenewRequest, SignAnswer,
    SignRequest,
};
use super::{CaError, Reason, Refusal, csr};
use crate::ca::authority::public_key_digest;
use crate::identity::certificate::uris_of;
use crate::identity::{Answer, CertificateSource, SignedChain, SigningRequest, SourceError, TrustBundle};
use crate::model::NodeId;
use arc_swap::ArcSwap;
use hyper::Method;
use join::{certificates, check_roots};
use node_files::{NodeFiles, Stored};
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::time::timeout;
use transport::{Dial, Failure};

/// How long one authority gets to answer; then the next one is asked.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts to renew the node's own certificate: the first pause, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));

/// The authority as this node sees it: a source of certificates that authenticates with the node's own certificate,
/// and keeps that one fresh.
pub struct CaClient {
    addresses: Vec<String>,
    /// The address that answered last.
    preferred: AtomicUsize,
    timeout: Duration,
    files: NodeFiles,
    credentials: ArcSwap<Credentials>,
    /// The version of the bundle that was handed on: what this node uses once it asks again.
    have: AtomicU64,
    /// The epoch under which the node's own certificate was asked for; `u64::MAX` while that is unknown.
    epoch: AtomicU64,
    /// The node's own certificate should be renewed now.
    renew: Notify,
    /// One renewal at a time: there is one place for the key to come.
    renewing: tokio::sync::Mutex<()>,
}

/// What this node proves itself with.
struct Credentials {
    id: NodeId,
    roots: Vec<CertificateDer<'static>>,
    validity: Validity,
    dial: Dial,
}

impl Credentials {
    fn new(stored: Stored, timeout: Duration) -> Result<Self, CaError> {
        let Stored { chain, key, roots } = stored;
        let unusable = |what| Refusal::new(Reason::CertificateStale, what);
        let id = chain.first().and_then(uris_of).and_then(|uris| NodeId::parse(uris.first()?));
        let id = id.ok_or_else(|| unusable("the node's certificate names no node: join with `nodemesh join`"))?;
        let validity = chain.first().and_then(Validity::of);
        let validity = validity.ok_or_else(|| unusable("the node's certificate cannot be read: join again"))?;
        let root = roots.first().and_then(public_key_digest);
        let root = root.ok_or_else(|| unusable("the bundle's first root cannot be read: join again"))?;
        let config = node_config(&roots, id.trust_domain(), chain, &key)?;
        Ok(Self { id, roots, validity, dial: Dial { config, name: server_name(root), timeout } })
    }

    /// Half-way through its life.
    fn renew_at(&self) -> OffsetDateTime {
        let start = self.validity.not_before + BACK_DATED;
        start + (self.validity.not_after - start) / 2
    }
}

impl CaClient {
    /// A client for the authorities at `addresses` (`host:port`), asked in turn until one answers, with what joining
    /// has left in the identity directory.
    ///
    /// # Errors
    /// If there is no address, or the node has not joined.
    pub fn open(directory: &Path, addresses: Vec<String>, timeout: Duration) -> Result<Arc<Self>, CaError> {
        if addresses.is_empty() {
            return Err(Refusal::new(Reason::RequestMalformed, "no address of a certificate authority is given").into());
        }
        let files = NodeFiles::new(directory);
        let credentials = ArcSwap::from_pointee(Credentials::new(files.read()?, timeout)?);
        Ok(Arc::new(Self {
            addresses,
            preferred: AtomicUsize::new(0),
            timeout,
            files,
            credentials,
            have: AtomicU64::new(0),
            epoch: AtomicU64::new(u64::MAX),
            renew: Notify::new(),
            renewing: tokio::sync::Mutex::default(),
        }))
    }

    /// The identity that this node proves to the authority.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.credentials.load().id.clone()
    }

    /// When the node's own certificate ends.
    #[must_use]
    pub fn not_after(&self) -> OffsetDateTime {
        self.credentials.load().validity.not_after
    }

    /// Renews the node's own certificate at half of its life, and when the authority signs with another root, for
    /// ever. Run it as a task of the process.
    pub async fn keep_node_certificate(&self) {
        loop {
            let left = self.credentials.load().renew_at() - OffsetDateTime::now_utc();
            // Either way it is time to renew.
            let _ = timeout(Duration::try_from(left).unwrap_or_default(), self.renew.notified()).await;
            let mut pause = PAUSES.0;
            while let Err(error) = self.renew_node_certificate().await {
                tracing::warn!(%error, not_after = %self.not_after(), retry = ?pause,
                    "the node's own certificate cannot be renewed");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }

    /// Renews the node's own certificate now, and stores it.
    ///
    /// # Errors
    /// If no authority signs one, or it cannot be stored; the old one stays in use.
    pub async fn renew_node_certificate(&self) -> Result<(), SourceError> {
        let _one_at_a_time = self.renewing.lock().await;
        let id = self.node();
        let key = self.files.prepare().map_err(|error| local(&error))?;
        let csr = csr::make(&key, &id.to_string()).map_err(|error| local(&error))?;
        let request = RenewRequest { csr: Bytes(csr) };
        let answer: RenewAnswer = self.ask(Method::POST, "/v1/renew", Some(&request)).await?;
        let chain = certificates(answer.chain);
        if chain.first().and_then(uris_of).is_none_or(|uris| uris != [id.to_string()]) {
            return Err(SourceError::Invalid(format!("its certificate is not that of {id}")));
        }
        self.files.complete(&chain).map_err(|error| local(&error))?;
        self.reload()?;
        tracing::info!(%id, not_after = %self.not_after(), "the node's own certificate was renewed");
        Ok(())
    }

    fn reload(&self) -> Result<(), SourceError> {
        let stored = self.files.read().map_err(|error| local(&error))?;
        let credentials = Credentials::new(stored, self.timeout).map_err(|error| local(&error))?;
        self.credentials.store(Arc::new(credentials));
        Ok(())
    }

    async fn fetch_bundle(&self) -> Result<TrustBundle, SourceError> {
        let path = format!("/v1/bundle?have={}", self.have.load(Ordering::Acquire));
        let answer: BundleAnswer = self.ask(Method::GET, &path, None::<&()>).await?;
        let bundle = TrustBundle { roots: certificates(answer.roots), version: answer.version, epoch: answer.epoch };
        let credentials = self.credentials.load_full();
        check_roots(&bundle.roots, credentials.id.trust_domain()).map_err(SourceError::Invalid)?;
        if bundle.roots != credentials.roots {
            self.files.write_bundle(&bundle.roots).map_err(|error| local(&error))?;
            self.reload()?;
        }
        self.have.store(bundle.version, Ordering::Release);
        let before = self.epoch.swap(bundle.epoch, Ordering::AcqRel);
        // After a start nobody knows whether the certificate on disk is from before the last change.
        if before < bundle.epoch || before == u64::MAX && bundle.epoch > 0 {
            self.renew.notify_one();
        }
        Ok(bundle)
    }

    async fn fetch_chains(
        &self,
        requests: &[SigningRequest],
    ) -> Result<Vec<Result<SignedChain, SourceError>>, SourceError> {
        let mut signed = Vec::with_capacity(requests.len());
        for some in requests.chunks(MAX_REQUESTS) {
            let wanted = some
                .iter()
                .map(|request| IdentityRequest { id: request.id.to_string(), csr: Bytes(request.csr.clone()) });
            let body = SignRequest { requests: wanted.collect() };
            let answer: SignAnswer = self.ask(Method::POST, "/v1/sign", Some(&body)).await?;
            if answer.answers.len() != some.len() {
                let text = format!("{} requests, {} answers", some.len(), answer.answers.len());
                return Err(SourceError::Invalid(text));
            }
            signed.extend(answer.answers.into_iter().map(|answer| match answer {
                IdentityAnswer::Chain(chain) => Ok(SignedChain(certificates(chain))),
                IdentityAnswer::Refused(RefusalAnswer { reason, message }) => {
                    Err(SourceError::Refused { reason, message })
                }
            }));
        }
        Ok(signed)
    }

    /// Asks the authorities in turn, beginning with the one that answered last. A refusal is an answer.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, SourceError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| local(&error))?.unwrap_or_default();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = SourceError::Unavailable("no address is known".to_owned());
        for offset in 0..self.addresses.len() {
            let index = (first + offset) % self.addresses.len();
            let dial = self.credentials.load().dial.clone();
            let asked = dial.ask(&self.addresses[index], method.clone(), path, |_| Ok(body.clone())).await;
            let asked = asked.map_err(SourceError::from);
            match asked {
                Ok(answer) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error @ SourceError::Refused { .. }) => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl CertificateSource for CaClient {
    fn bundle(&self) -> Answer<'_, TrustBundle> {
        Box::pin(self.fetch_bundle())
    }

    fn sign(&self, requests: Vec<SigningRequest>) -> Answer<'_, Vec<Result<SignedChain, SourceError>>> {
        Box::pin(async move { self.fetch_chains(&requests).await })
    }
}

impl fmt::Debug for CaClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaClient").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// A failure on this side: trying again may help.
fn local(error: &dyn fmt::Display) -> SourceError {
    SourceError::Unavailable(error.to_string())
}

impl From<Failure> for SourceError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(RefusalAnswer { reason, message }) => Self::Refused { reason, message },
            Failure::Invalid { .. } => Self::Invalid(failure.to_string()),
            Failure::WrongAuthority { .. }
            | Failure::Unreachable { .. }
            | Failure::Handshake { .. }
            | Failure::Timeout { .. }
            | Failure::BrokeOff { .. } => Self::Unavailable(failure.to_string()),
        }
    }
}
