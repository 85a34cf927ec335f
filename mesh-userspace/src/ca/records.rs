//! What the authority remembers, as it is stored. Times are seconds since 1970.

use super::rotation::Phase;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

/// Seconds since 1970.
pub(super) type Seconds = i64;

/// A time as people read it; one out of range is the epoch.
pub(super) fn at(seconds: Seconds) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// Which certificates sign, and how far a change of them is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Of the records' form; another one is refused rather than misread.
    pub(super) format: u32,
    pub(super) trust_domain: String,
    /// The number that the next root or intermediate gets.
    pub(super) next: u64,
    /// Of the bundle: grows with every change.
    pub(super) version: u64,
    /// Grows whenever nodes should renew what they have.
    pub(super) epoch: u64,
    /// The root below which leaves are signed.
    pub(super) root: u64,
    /// The longest life of a leaf below it, whatever the configuration was at the time.
    pub(super) longest_leaf: Seconds,
    pub(super) phase: Phase,
}

/// A root or an intermediate. Its key is kept in a table of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IssuerRecord {
    pub(super) number: u64,
    /// The root that signed it; its own number for a root.
    pub(super) root: u64,
    #[serde(with = "super::wire::base64")]
    pub(super) certificate: Vec<u8>,
    pub(super) since: Seconds,
    pub(super) until: Seconds,
    /// Whether it signs: one intermediate of each root does. Others wait for the end of what they have signed.
    pub(super) signs: bool,
}

impl IssuerRecord {
    pub(super) fn is_root(&self) -> bool {
        self.number == self.root
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub(super) enum TokenState {
    Open,
    Used { node: String, at: Seconds },
    Revoked { at: Seconds },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TokenRecord {
    pub(super) id: String,
    /// Of the secret.
    #[serde(with = "super::wire::base64")]
    pub(super) hash: Vec<u8>,
    /// The only node that may use it.
    pub(super) node: Option<String>,
    pub(super) created: Seconds,
    pub(super) expires: Seconds,
    pub(super) state: TokenState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeRecord {
    pub(super) name: String,
    pub(super) revoked: Option<Seconds>,
    /// Its last join. Certificates from before are refused: a node that joins anew has new keys, and whoever has its
    /// old ones has no business here.
    pub(super) joined: Seconds,
    pub(super) seen: Seconds,
    /// The version of the bundle that it has said to use.
    pub(super) bundle: u64,
    /// When its newest certificate ends.
    pub(super) until: Seconds,
}
