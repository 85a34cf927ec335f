//! The documents of a certificate authority: tokens, nodes, and the authority itself.

use super::documents::{Item, timestamp};
use crate::ca::{NodeStatus, RotationStatus, Status, TokenStatus};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// `POST /v1/tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenRequest {
    /// How long it may be used, in seconds; an hour if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// The only node that may use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// `POST /v1/ca/rotate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RotateRequest {
    /// `root` or `intermediate`.
    pub what: String,
    /// Take the next step without waiting for nodes.
    #[serde(default)]
    pub now: bool,
}

/// A join token.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenRow {
    /// RFC 3339.
    pub created: String,
    pub id: String,
    /// `open`, `used`, `revoked` or `expired`.
    pub state: String,
    /// The only node that may use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The node that has used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<String>,
    /// RFC 3339.
    pub expires: String,
    /// The token itself: only in the answer to its making.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Where the authority listens: only in the answer to its making.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
}

impl Item for TokenRow {
    const KIND: &'static str = "TokenList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

impl From<TokenStatus> for TokenRow {
    fn from(status: TokenStatus) -> Self {
        Self {
            created: timestamp(status.created.into()),
            id: status.id,
            state: status.state.to_owned(),
            node: status.node,
            used_by: status.used_by,
            expires: timestamp(status.expires.into()),
            ..Self::default()
        }
    }
}

/// A node that has joined.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRow {
    pub name: String,
    /// `joined` or `revoked`.
    pub state: String,
    /// RFC 3339, like the times that follow.
    pub joined: String,
    /// To the minute.
    pub last_seen: String,
    /// The version of the bundle that it uses; 0 while it has not said.
    pub bundle_version: u64,
    /// When its newest certificate ends.
    pub not_after: String,
}

impl Item for NodeRow {
    const KIND: &'static str = "NodeList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

impl From<NodeStatus> for NodeRow {
    fn from(status: NodeStatus) -> Self {
        Self {
            name: status.name,
            state: if status.revoked.is_some() { "revoked" } else { "joined" }.to_owned(),
            joined: timestamp(status.joined.into()),
            last_seen: timestamp(status.seen.into()),
            bundle_version: status.bundle,
            not_after: timestamp(status.not_after.into()),
        }
    }
}

/// A certificate authority.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CaRow {
    pub trust_domain: String,
    pub bundle_version: u64,
    pub epoch: u64,
    /// Joined and not revoked.
    pub nodes: u64,
    /// Tokens that could be used now.
    pub open_tokens: u64,
    pub rotation: RotationRow,
    pub issuers: Vec<IssuerRow>,
}

/// How far a change of the root is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RotationRow {
    /// `steady`, `announced` or `retiring`.
    pub phase: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// When the next step is taken at the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// Nodes that do not use the new bundle yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<String>,
}

/// A root or an intermediate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IssuerRow {
    /// `root` or `intermediate`.
    pub kind: String,
    pub serial: String,
    /// Whether leaves are signed with it, or below it, now.
    pub active: bool,
    pub not_after: String,
}

impl Item for CaRow {
    const KIND: &'static str = "CertificateAuthorityList";

    fn order(&self, other: &Self) -> Ordering {
        self.trust_domain.cmp(&other.trust_domain)
    }
}

impl From<Status> for CaRow {
    fn from(status: Status) -> Self {
        let at = |time: time::OffsetDateTime| Some(timestamp(time.into()));
        let rotation = match status.rotation {
            RotationStatus::Steady => RotationRow { phase: "steady".to_owned(), ..RotationRow::default() },
            RotationStatus::Announced { since, deadline, waits_for } => {
                RotationRow { phase: "announced".to_owned(), since: at(since), until: at(deadline), waits_for }
            }
            RotationStatus::Retiring { since, until } => {
                RotationRow { phase: "retiring".to_owned(), since: at(since), until: at(until), waits_for: Vec::new() }
            }
        };
        let issuers = status.issuers.into_iter().map(|issuer| IssuerRow {
            kind: if issuer.is_root { "root" } else { "intermediate" }.to_owned(),
            serial: issuer.serial,
            active: issuer.is_active,
            not_after: timestamp(issuer.not_after.into()),
        });
        Self {
            trust_domain: status.trust_domain,
            bundle_version: status.version,
            epoch: status.epoch,
            nodes: status.nodes as u64,
            open_tokens: status.tokens as u64,
            rotation,
            issuers: issuers.collect(),
        }
    }
}
