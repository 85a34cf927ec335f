//! The endpoints of services as this node's connections have found them.

use super::documents::Item;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// One endpoint of a frontend that connections of this node have asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointRow {
    /// `namespace/name`.
    pub service: String,
    /// The service's address and port.
    pub frontend: String,
    /// `tcp` or `udp`.
    #[serde(default)]
    pub protocol: String,
    /// `namespace/name`.
    pub workload: String,
    /// Its address and port.
    pub address: String,
    pub node: String,
    /// `ready`, `ejected`, `unhealthy`, `trial` (back from an ejection: one attempt at a time) or `suspect` (it has not
    /// answered for unusually long).
    pub state: String,
    /// Connections of this node, the pending ones included.
    pub open: u32,
    /// Those that it has not accepted yet.
    pub pending: u32,
    /// Why it is ejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// For how long it still is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ejected_millis: Option<u64>,
    /// Moving peak of the time in which it accepts connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_micros: Option<u64>,
}

impl Item for EndpointRow {
    const KIND: &'static str = "EndpointList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}
