//! The authority as it is served: what nodes may ask, who may ask it, and what is counted of it.

use super::certificate::Profile;
use super::limit::{FULL_AGAIN, Limits};
use super::tls::Serving;
use super::{Authority, CaError, Joined, Reason, Refusal, Rotate, Token};
use crate::identity::{SignedChain, TrustBundle};
use crate::model::{NodeName, SpiffeId};
use crate::telemetry::ca::CaMetrics;
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::time::timeout;

/// Whether the catalog places a workload with this identity on the node.
pub type Placement = Arc<dyn Fn(&NodeName, &SpiffeId) -> bool + Send + Sync>;

/// How often the authority looks for what is due, while a rotation is under way and otherwise.
const TICK: Duration = Duration::from_secs(1);
const QUIET_TICK: Duration = Duration::from_secs(30);

/// What is shared by every connection, and by the admin interface. Its methods may wait for the disk.
pub struct Service {
    authority: Authority,
    placement: Placement,
    metrics: CaMetrics,
    limits: Mutex<Limits>,
    serving: ArcSwap<Serving>,
    /// Something has changed that the next tick should see.
    changed: Notify,
}

impl Service {
    /// # Errors
    /// If the authority cannot make a certificate for its own server.
    pub fn new(authority: Authority, placement: Placement, metrics: CaMetrics) -> Result<Arc<Self>, CaError> {
        metrics.prepare(
            &[Profile::Workload, Profile::Node, Profile::Server].map(Profile::as_str),
            &Reason::ALL.map(Reason::as_str),
        );
        authority.remember_lives()?;
        let serving = ArcSwap::from_pointee(Serving::new(&authority, OffsetDateTime::now_utc())?);
        metrics.issued(Profile::Server.as_str());
        let service = Self { authority, placement, metrics, limits: Mutex::default(), serving, changed: Notify::new() };
        service.show();
        Ok(Arc::new(service))
    }

    /// For reading, and for tokens. Rotations go through [`Self::rotate`].
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Begins a rotation, or takes its next step; see [`Authority::rotate`].
    ///
    /// # Errors
    /// Likewise.
    pub fn rotate(&self, what: Rotate, force: bool, now: OffsetDateTime) -> Result<(), CaError> {
        self.authority.rotate(what, force, now)?;
        self.changed.notify_one();
        Ok(())
    }

    /// Does what is due, for ever. An error is logged, and tried again.
    pub async fn keep(self: Arc<Self>) {
        loop {
            let service = self.clone();
            let ticked = tokio::task::spawn_blocking(move || {
                let now = OffsetDateTime::now_utc();
                let ticked = service.authority.tick(now);
                service.show();
                ticked.and_then(|()| Ok(service.authority.status(now)?.rotation == super::RotationStatus::Steady))
            });
            let pause = match ticked.await {
                Ok(Ok(true)) => QUIET_TICK,
                Ok(Ok(false)) => TICK,
                Ok(Err(error)) => {
                    tracing::error!(%error, "the certificate authority cannot do what is due");
                    QUIET_TICK
                }
                Err(panic) => {
                    tracing::error!(%panic, "looking for what is due failed");
                    QUIET_TICK
                }
            };
            // Either way it is time to look.
            let _ = timeout(pause, self.changed.notified()).await;
        }
    }

    /// What to serve the next connection with.
    pub(super) fn server_config(&self) -> Arc<ServerConfig> {
        let now = OffsetDateTime::now_utc();
        let serving = self.serving.load();
        if serving.is_current(&self.authority, now) {
            return serving.config.clone();
        }
        match Serving::new(&self.authority, now) {
            Ok(fresh) => {
                self.metrics.issued(Profile::Server.as_str());
                let config = fresh.config.clone();
                self.serving.store(Arc::new(fresh));
                config
            }
            Err(error) => {
                tracing::error!(%error, "the authority cannot renew its own certificate");
                serving.config.clone()
            }
        }
    }

    pub(super) fn join(&self, token: &str, node: &str, csr: &[u8]) -> Result<Joined, CaError> {
        let token: Token = token.parse().map_err(|error| malformed(Reason::TokenMalformed, &error))?;
        let node = NodeName::parse(node).map_err(|error| malformed(Reason::RequestMalformed, &error))?;
        let joined = self.authority.join(&token, &node, csr, OffsetDateTime::now_utc())?;
        self.metrics.issued(Profile::Node.as_str());
        Ok(joined)
    }

    /// Who a connection belongs to, from the client's verified certificate; and whether it may ask for so much now.
    pub(super) fn caller(&self, leaf: Option<&CertificateDer<'_>>, cost: usize) -> Result<NodeName, CaError> {
        let leaf = leaf.ok_or_else(|| {
            Refusal::new(Reason::NoCertificate, "this needs a node's certificate: join first (`nodemesh join`)")
        })?;
        let node = self.authority.authenticate(leaf, OffsetDateTime::now_utc())?;
        // Each step leaves the buckets sound: after a panic they still are.
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if limits.take(&node, cost, Instant::now()) {
            Ok(node)
        } else {
            let message = format!("node {node} asks for too much: wait up to {} s", FULL_AGAIN.as_secs());
            Err(Refusal::new(Reason::TooMany, message).into())
        }
    }

    pub(super) fn renew(&self, node: &NodeName, csr: &[u8]) -> Result<SignedChain, CaError> {
        let chain = self.authority.renew(node, csr, OffsetDateTime::now_utc())?;
        self.metrics.issued(Profile::Node.as_str());
        Ok(chain)
    }

    pub(super) fn bundle(&self, node: &NodeName, have: u64) -> Result<TrustBundle, CaError> {
        if self.authority.saw(node, have, OffsetDateTime::now_utc())? {
            self.changed.notify_one();
        }
        Ok(self.authority.bundle())
    }

    /// A workload's certificate for the node on which the catalog places it.
    pub(super) fn sign(&self, node: &NodeName, id: &str, csr: &[u8]) -> Result<SignedChain, CaError> {
        let id = SpiffeId::parse(id).map_err(|error| malformed(Reason::ForeignIdentity, &error))?;
        if !(self.placement)(node, &id) {
            let message = format!("the catalog places no workload with the identity {id} on node {node}");
            return Err(Refusal::new(Reason::NotScheduled, message).into());
        }
        let chain = self.authority.sign_request(&id, csr, OffsetDateTime::now_utc())?;
        self.metrics.issued(Profile::Workload.as_str());
        Ok(chain)
    }

    /// Counts and logs a refusal; what went wrong inside is for the log only.
    pub(super) fn refused(&self, error: CaError, by: &str) -> Refusal {
        let refusal = match error {
            CaError::Refused(refusal) if refusal.reason != Reason::Internal => {
                tracing::warn!(reason = refusal.reason.as_str(), by, "refused: {}", refusal.message);
                refusal
            }
            error => {
                tracing::error!(by, "a request failed: {error}");
                Refusal::new(Reason::Internal, "the certificate authority failed; its log says why")
            }
        };
        self.metrics.refused(refusal.reason.as_str());
        refusal
    }

    fn show(&self) {
        if let Ok(status) = self.authority.status(OffsetDateTime::now_utc()) {
            for issuer in status.issuers.iter().filter(|issuer| issuer.is_active) {
                let kind = if issuer.is_root { "root" } else { "intermediate" };
                self.metrics.expires(kind, issuer.not_after.into());
            }
            self.metrics.nodes(status.nodes);
        }
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("authority", &self.authority).finish_non_exhaustive()
    }
}

fn malformed(reason: Reason, error: &impl fmt::Display) -> CaError {
    Refusal::new(reason, error.to_string()).into()
}
