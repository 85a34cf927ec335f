//! Sources of [`Update`](crate::model::Update)s. Here: a directory of YAML documents, watched for changes; see
//! docs/CATALOG.md.
//!
//! A line: bytes -> trees ([`yaml`]) -> objects, each sound in itself ([`kinds`]) -> one catalog ([`resolve`]) ->
//! updates. Everything but [`directory`] and [`file`] is pure.

mod claims;
mod code;
mod diagnostic;
mod directory;
mod document;
mod duration;
mod fields;
pub mod file;
mod key;
mod kinds;
mod references;
mod resolve;
mod suggest;
mod yaml;

#[cfg(test)]
mod tests;

pub use code::{Code, Severity};
pub use diagnostic::{Diagnostic, Position};
pub use directory::{has_errors, validate};
pub use document::{Contents, parse_documents};
pub use duration::format_duration;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

/// How a source is doing.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Everything wrong with the catalog as it is now, errors first; what they name keeps its last good state.
    pub diagnostics: Arc<[Diagnostic]>,
    /// Number of objects in force, by kind; kinds without objects are there with 0.
    pub objects: BTreeMap<&'static str, usize>,
    /// Number of times that a change was handed on; 0 before the first snapshot.
    pub generation: u64,
    /// When that was last.
    pub applied_at: Option<SystemTime>,
}

/// Number of objects in force, by kind.
fn count(resolver: &resolve::Resolver) -> BTreeMap<&'static str, usize> {
    let catalog = resolver.catalog();
    BTreeMap::from([
        ("AuthorizationPolicy", catalog.policies.len()),
        ("MeshConfig", usize::from(catalog.mesh.is_some())),
        ("Namespace", resolver.namespaces()),
        ("Node", catalog.nodes.len()),
        ("Service", catalog.services.len()),
        ("TrafficPolicy", catalog.traffic.len()),
        ("WorkloadEntry", catalog.workloads.len()),
    ])
}
