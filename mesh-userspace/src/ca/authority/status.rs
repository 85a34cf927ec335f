//! What the authority tells about itself.

use super::{Authority, turn};
use crate::ca::CaError;
use crate::ca::records::{IssuerRecord, TokenState, at};
use crate::ca::rotation::Phase;
use crate::identity::certificate::serial_of;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

/// Everything but nodes and tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub trust_domain: String,
    /// The bundle's version.
    pub version: u64,
    pub epoch: u64,
    /// Roots and intermediates, the oldest first.
    pub issuers: Vec<IssuerStatus>,
    pub rotation: RotationStatus,
    /// Joined and not revoked.
    pub nodes: usize,
    /// Tokens that could be used now.
    pub tokens: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuerStatus {
    pub is_root: bool,
    pub serial: String,
    /// Whether leaves are signed with it, or below it, now.
    pub is_active: bool,
    pub not_after: OffsetDateTime,
}

/// How far a rotation of the root is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RotationStatus {
    Steady,
    /// The new root is in the bundle, and signs once these nodes use it, at the deadline at the latest.
    Announced {
        since: OffsetDateTime,
        deadline: OffsetDateTime,
        waits_for: Vec<String>,
    },
    /// The new root signs; the old one leaves the bundle then.
    Retiring {
        since: OffsetDateTime,
        until: OffsetDateTime,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenStatus {
    pub id: String,
    /// The only node that may use it.
    pub node: Option<String>,
    pub created: OffsetDateTime,
    pub expires: OffsetDateTime,
    /// `open`, `used`, `revoked` or `expired`.
    pub state: &'static str,
    /// The node that has used it.
    pub used_by: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    pub name: String,
    pub revoked: Option<OffsetDateTime>,
    pub joined: OffsetDateTime,
    pub seen: OffsetDateTime,
    /// The version of the bundle that it uses.
    pub bundle: u64,
    /// When its newest certificate ends.
    pub not_after: OffsetDateTime,
}

impl Authority {
    /// # Errors
    /// If the store cannot be read.
    pub fn status(&self, now: OffsetDateTime) -> Result<Status, CaError> {
        let (state, issuers, nodes, tokens) =
            self.store.read(|view| Ok((view.state()?, view.issuers()?, view.nodes()?, view.tokens()?)))?;
        let seconds = now.unix_timestamp();
        let rotation = match state.phase {
            Phase::Steady => RotationStatus::Steady,
            Phase::Announced { since, deadline, .. } => RotationStatus::Announced {
                since: at(since),
                deadline: at(deadline),
                waits_for: state
                    .phase
                    .waits_for(seconds, self.lives, nodes.iter().map(turn::reported))
                    .into_iter()
                    .map(str::to_owned)
                    .collect(),
            },
            Phase::Retiring { since, until, .. } => RotationStatus::Retiring { since: at(since), until: at(until) },
        };
        Ok(Status {
            trust_domain: state.trust_domain,
            version: state.version,
            epoch: state.epoch,
            issuers: issuers.iter().map(|issuer| shown(issuer, state.root)).collect(),
            rotation,
            nodes: nodes.iter().filter(|node| node.revoked.is_none()).count(),
            tokens: tokens.iter().filter(|token| token.state == TokenState::Open && seconds < token.expires).count(),
        })
    }

    /// Every token on record.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn tokens(&self, now: OffsetDateTime) -> Result<Vec<TokenStatus>, CaError> {
        #[expect(clippy::redundant_closure_for_method_calls, reason = "the method alone has one lifetime of views")]
        let tokens = self.store.read(|view| view.tokens())?;
        let shown = tokens.into_iter().map(|token| {
            let (state, used_by) = match token.state {
                TokenState::Used { node, .. } => ("used", Some(node)),
                TokenState::Revoked { .. } => ("revoked", None),
                TokenState::Open if now.unix_timestamp() >= token.expires => ("expired", None),
                TokenState::Open => ("open", None),
            };
            let (created, expires) = (at(token.created), at(token.expires));
            TokenStatus { id: token.id, node: token.node, created, expires, state, used_by }
        });
        Ok(shown.collect())
    }

    /// Every node that has ever joined.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn nodes(&self) -> Result<Vec<NodeStatus>, CaError> {
        #[expect(clippy::redundant_closure_for_method_calls, reason = "the method alone has one lifetime of views")]
        let nodes = self.store.read(|view| view.nodes())?;
        let shown = nodes.into_iter().map(|node| NodeStatus {
            name: node.name,
            revoked: node.revoked.map(at),
            joined: at(node.joined),
            seen: at(node.seen),
            bundle: node.bundle,
            not_after: at(node.until),
        });
        Ok(shown.collect())
    }
}

fn shown(issuer: &IssuerRecord, active: u64) -> IssuerStatus {
    let certificate = CertificateDer::from(issuer.certificate.clone());
    IssuerStatus {
        is_root: issuer.is_root(),
        serial: serial_of(&certificate).unwrap_or_default(),
        is_active: issuer.root == active && issuer.signs,
        not_after: at(issuer.until),
    }
}
