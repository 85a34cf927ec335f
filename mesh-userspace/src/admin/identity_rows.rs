//! Rows about certificates and roots.

use super::documents::{Item, timestamp};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::time::SystemTime;

/// A certificate that the daemon presents for a workload, or waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateRow {
    /// The SPIFFE ID.
    pub id: String,
    /// Empty where there is no certificate yet, like the times.
    pub serial: String,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub not_before: String,
    /// RFC 3339.
    pub not_after: String,
    /// `files` or `ca`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// `pending`, `valid`, `late` (it could not be renewed so far) or `expired`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub state: String,
    /// When a new one is asked for; RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_renewal: Option<String>,
    /// Why the last attempt to get one failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The chain, leaf first; only where one certificate was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pem: Option<String>,
}

impl CertificateRow {
    /// Sets what the certificate itself says.
    #[must_use]
    pub fn presenting(self, serial: String, not_before: SystemTime, not_after: SystemTime) -> Self {
        Self { serial, not_before: timestamp(not_before), not_after: timestamp(not_after), ..self }
    }
}

impl Item for CertificateRow {
    const KIND: &'static str = "CertificateList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

/// A root that this node trusts.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RootRow {
    pub subject: String,
    pub serial: String,
    /// RFC 3339.
    pub not_after: String,
    /// SHA-256 of its public key, hexadecimal.
    pub spki_sha256: String,
    /// Of the bundle: grows with every change; 0 where the bundle is a file.
    pub version: u64,
    pub pem: String,
}

impl Item for RootRow {
    const KIND: &'static str = "BundleList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}

/// Certificates that are being renewed by request.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RotationRow {
    /// The one that was asked for; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How many.
    pub identities: u64,
}

impl Item for RotationRow {
    const KIND: &'static str = "RotationList";

    fn order(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }
}
