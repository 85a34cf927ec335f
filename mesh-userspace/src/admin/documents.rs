//! The documents that the daemon answers with and the CLI prints: versioned JSON, one shape for every kind
//! (`apiVersion`, `kind`, `items`). Fields may be added; none changes its meaning within a version.

pub use super::identity_rows::{CertificateRow, RootRow, RotationRow};

use crate::telemetry::connections::Protocol;
use crate::telemetry::live::LiveConnection;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The version of every document here.
pub const API_VERSION: &str = "cli.nodemesh.io/v1";

/// Where the daemon listens for the CLI, unless its configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/nodemesh/admin.sock";

/// An item of a document.
pub trait Item {
    /// The document's `kind`.
    const KIND: &'static str;

    /// The order of rows: the same state gives the same answer.
    fn order(&self, other: &Self) -> Ordering;
}

/// An answer: items of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Document<T> {
    pub api_version: String,
    pub kind: String,
    pub items: Vec<T>,
    /// How many items there are, where `items` was cut at a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

impl<T: Item> Document<T> {
    /// Sorts the items.
    #[must_use]
    pub fn new(mut items: Vec<T>) -> Self {
        items.sort_by(T::order);
        Self { api_version: API_VERSION.to_owned(), kind: T::KIND.to_owned(), items, total: None }
    }

    /// Whether the document is of this version and kind.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.api_version == API_VERSION && self.kind == T::KIND
    }
}

/// One node's state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub node: String,
    /// Of the daemon.
    pub version: String,
    /// Of the kernel/user contract.
    pub abi: u32,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// Why it is not ready; empty when it is.
    #[serde(default)]
    pub not_ready: Vec<String>,
    pub config: ConfigStatus,
    pub workloads: WorkloadCounts,
    pub connections: ConnectionCounts,
    /// Open connections to and from other nodes.
    pub lanes: u64,
    pub certificates: Vec<CertificateRow>,
    pub outcomes: Vec<OutcomeRow>,
    pub maps: Vec<MapRow>,
}

impl Item for Status {
    const KIND: &'static str = "StatusList";

    fn order(&self, other: &Self) -> Ordering {
        self.node.cmp(&other.node)
    }
}

/// What of the catalog is applied.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigStatus {
    /// Rises with every applied change.
    pub generation: u64,
    /// Number of objects by kind.
    pub objects: BTreeMap<String, u64>,
    /// Findings of severity error in the catalog as it is now; the objects concerned keep their last good state.
    pub errors: u64,
}

/// This node's workloads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadCounts {
    pub local: u64,
    /// Captured and served.
    pub armed: u64,
    /// Could not be captured.
    pub failed: u64,
}

/// Connections since the daemon's start, both reporters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionCounts {
    pub active: u64,
    pub opened: u64,
    pub closed: u64,
    pub failed: u64,
    /// Bytes from destinations to sources.
    pub bytes_sent: u64,
    /// Bytes from sources to destinations.
    pub bytes_received: u64,
}

/// One kernel counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutcomeRow {
    pub hook: String,
    pub verdict: String,
    pub reason: String,
    pub count: u64,
}

/// One BPF map.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapRow {
    pub name: String,
    pub entries: u64,
    pub capacity: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadRow {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub addresses: Vec<String>,
    /// `own`: a network namespace of its own; `host`: its node's, with its node's addresses.
    #[serde(default)]
    pub network: String,
    /// `strict`, `permissive` or `disabled`.
    pub mode: String,
    /// The SPIFFE ID.
    pub identity: String,
    /// `armed`, `failed` or `pending` on its own node, `remote` on others.
    pub state: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Item for WorkloadRow {
    const KIND: &'static str = "WorkloadList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    pub namespace: String,
    pub name: String,
    pub vips: Vec<String>,
    /// `80/TCP`, with the port's name in front where it has one: `http:80/TCP`.
    pub ports: Vec<String>,
    pub endpoints: EndpointCounts,
}

impl Item for ServiceRow {
    const KIND: &'static str = "ServiceList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointCounts {
    pub total: u64,
    /// Those on this node.
    pub local: u64,
}

/// A connection that is open now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRow {
    pub id: u64,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// `tcp`, or `udp` of a flow of datagrams.
    #[serde(default)]
    pub protocol: String,
    /// The client's address.
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_workload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_identity: Option<String>,
    /// The address that the client asked for.
    pub destination: String,
    /// `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The endpoint's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_workload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_identity: Option<String>,
    /// The other node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// The TLS key exchange group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The TLS cipher suite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// From the destination to the source.
    pub bytes_sent: u64,
    /// From the source to the destination.
    pub bytes_received: u64,
    /// Datagrams from the destination to the source; UDP's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_sent: Option<u64>,
    /// Datagrams from the source to the destination; UDP's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_received: Option<u64>,
    pub age_seconds: f64,
}

impl Item for ConnectionRow {
    const KIND: &'static str = "ConnectionList";

    fn order(&self, other: &Self) -> Ordering {
        self.id.cmp(&other.id)
    }
}

impl From<&LiveConnection> for ConnectionRow {
    fn from(live: &LiveConnection) -> Self {
        let flow = &live.flow;
        let owned = |text: &Option<std::sync::Arc<str>>| text.as_deref().map(str::to_owned);
        Self {
            id: live.id,
            direction: flow.direction.as_str().to_owned(),
            protocol: flow.protocol.as_str().to_owned(),
            source: flow.source.to_string(),
            source_workload: owned(&flow.source_workload),
            source_identity: owned(&flow.source_identity),
            destination: flow.destination.to_string(),
            service: owned(&flow.service),
            backend: flow.backend.map(|backend| backend.to_string()),
            destination_workload: owned(&flow.destination_workload),
            destination_identity: owned(&flow.destination_identity),
            node: owned(&flow.node),
            transport: flow.transport.map(str::to_owned),
            group: owned(&flow.group),
            suite: owned(&flow.suite),
            bytes_sent: live.sent,
            bytes_received: live.received,
            datagrams_sent: (flow.protocol == Protocol::Udp).then_some(live.datagrams_sent),
            datagrams_received: (flow.protocol == Protocol::Udp).then_some(live.datagrams_received),
            age_seconds: live.age.as_secs_f64(),
        }
    }
}

/// An open connection that this node made to another (or to itself, for workloads that share the node).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LaneRow {
    /// `lanes` or `quic`.
    pub transport: String,
    /// `shared` or `exclusive`.
    pub class: String,
    /// The other node.
    pub node: String,
    /// Its address.
    pub address: String,
    pub source_identity: String,
    pub destination_identity: String,
    /// Streams open on it now.
    pub streams: u64,
    pub age_seconds: f64,
    /// It takes no new streams.
    pub draining: bool,
    /// The TLS key exchange group; empty where the transport does not tell.
    pub group: String,
    /// The TLS cipher suite; likewise.
    pub suite: String,
    /// The largest payload of UDP that its path has been found to carry; of QUIC only.
    pub packet_bytes: Option<u16>,
}

impl Item for LaneRow {
    const KIND: &'static str = "LaneList";

    fn order(&self, other: &Self) -> Ordering {
        let key = |row: &Self| (row.node.clone(), row.source_identity.clone(), row.destination_identity.clone());
        key(self).cmp(&key(other)).then_with(|| other.age_seconds.total_cmp(&self.age_seconds))
    }
}

/// A finding about the catalog.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiagnosticRow {
    pub file: String,
    /// Counts from 1; 0 for the file as a whole.
    pub line: u32,
    pub column: u32,
    pub code: String,
    /// `error` or `warning`.
    pub severity: String,
    /// Kind and name of the object, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Item for DiagnosticRow {
    const KIND: &'static str = "DiagnosticList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

/// The daemon's and the CLI's build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionRow {
    /// `nodemesh` or `nodemeshd`.
    pub component: String,
    pub version: String,
    /// Of the kernel/user contract.
    pub abi: u32,
}

impl Item for VersionRow {
    const KIND: &'static str = "VersionList";

    fn order(&self, other: &Self) -> Ordering {
        self.component.cmp(&other.component)
    }
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorDocument {
    pub api_version: String,
    pub kind: String,
    pub message: String,
}

impl ErrorDocument {
    #[must_use]
    pub fn new(message: String) -> Self {
        Self { api_version: API_VERSION.to_owned(), kind: "Error".to_owned(), message }
    }
}

/// RFC 3339 with seconds, in UTC; a time out of range is shown as the epoch.
#[must_use]
pub fn timestamp(at: SystemTime) -> String {
    let whole = OffsetDateTime::from(at).replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    whole.format(&Rfc3339).unwrap_or_else(|_| "1970-01-01T00:00:00Z".to_owned())
}

/// Reads [`timestamp`]'s form back.
#[must_use]
pub fn parse_timestamp(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}
