//! Documents about policy: the policies themselves, who calls in plaintext, and what would happen to a connection.

use super::documents::{Item, timestamp};
use crate::telemetry::plaintext::Caller;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// An authorization policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRow {
    pub namespace: String,
    pub name: String,
    /// `ALLOW`, `DENY` or `AUDIT`.
    pub action: String,
    pub dry_run: bool,
    /// Whom it is for, as people write it; empty: every workload of the namespace.
    pub targets: Vec<String>,
    pub rules: Vec<PolicyRuleRow>,
    pub workloads: PolicyWorkloads,
    /// Connections that one of its rules decided, was audited for or would decide, on this node since its start; with
    /// ALLOW also those that no rule allowed, where no other policy allows either.
    pub hits: u64,
}

impl Item for PolicyRow {
    const KIND: &'static str = "PolicyList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

/// One rule of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRuleRow {
    pub name: String,
    /// As people write them; `everyone` where the rule names none.
    pub sources: Vec<String>,
    /// Empty: every port.
    pub ports: Vec<u16>,
    pub hits: u64,
}

/// How many workloads a policy holds for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyWorkloads {
    pub total: u64,
    /// Those on this node.
    pub local: u64,
}

/// A caller in plaintext and a workload of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlaintextRow {
    /// `namespace/name`.
    pub destination: String,
    /// The caller's address.
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_workload: Option<String>,
    /// The first ports that it called, not more than 16.
    pub ports: Vec<u16>,
    pub admitted: u64,
    /// By STRICT or by policy.
    pub refused: u64,
    /// RFC 3339.
    pub first_seen: String,
    pub last_seen: String,
}

impl Item for PlaintextRow {
    const KIND: &'static str = "PlaintextList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

impl From<Caller> for PlaintextRow {
    fn from(caller: Caller) -> Self {
        Self {
            destination: caller.destination.to_string(),
            source: caller.source.to_string(),
            source_workload: caller.source_workload.map(|workload| workload.to_string()),
            ports: caller.ports.into_iter().collect(),
            admitted: caller.admitted,
            refused: caller.refused,
            first_seen: timestamp(caller.first_seen),
            last_seen: timestamp(caller.last_seen),
        }
    }
}

/// One way that a connection can take.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PathRow {
    pub source: EndRow,
    /// What the application connects, or sends, to.
    pub asked: String,
    /// `tcp` or `udp`.
    #[serde(default)]
    pub protocol: String,
    /// `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// How the service spreads its connections, in a line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancing: Option<String>,
    /// What it reaches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<EndRow>,
    /// `mtls`, `plaintext`, `unguarded` (the mesh leaves it alone) or `nowhere`.
    pub arrives: String,
    /// Why it arrives like that.
    pub why: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// `allow` or `deny`.
    pub verdict: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ruling: Option<RulingRow>,
    /// `namespace/policy` and rule of an AUDIT policy that matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<String>,
    /// What would be with the policies in dry-run in force, if that is another verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<RulingRow>,
    /// Who refuses first, or admits last: the values of the label of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforced_by: Option<String>,
}

impl Item for PathRow {
    const KIND: &'static str = "PathList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndRow {
    /// With the port, at the destination.
    pub address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `strict`, `permissive` or `disabled`; at the destination that of the port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// A verdict and whose word it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RulingRow {
    /// `allow` or `deny`.
    pub verdict: String,
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}
