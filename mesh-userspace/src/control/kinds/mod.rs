//! The kinds of documents: which fields they have, and what those may say.

mod mesh;
mod namespace;
mod policy;
mod policy_source;
mod service;
mod strictest;
mod traffic;
mod traffic_probe;
mod workload;

pub(super) use mesh::mesh;
pub(super) use namespace::namespace;
pub(super) use policy::policy;
pub(super) use service::service;
pub(super) use strictest::{strictest_namespace, strictest_policy};
pub(super) use traffic::traffic;
pub(super) use workload::workload;

use super::diagnostic::{Findings, Position};
use super::document::{Defaults, Spec};
use super::fields::{self, DEFAULT_ACTIONS, Fields, MODES, Use};
use super::key::Key;
use super::{Code, yaml};
use crate::model::{Node, NodeName, ObjectKey, ObjectName, SameNode};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Reads an object's fields other than apiVersion and kind. Gives the key as soon as it is known, so that a broken
/// object can still be told apart from others.
pub(super) type Read = fn(Fields, &mut Option<(Key, Position)>, &mut Findings) -> Option<Spec>;

/// What a broken object may have meant at its strictest, as far as it can be read.
pub(super) type StandIn = fn(&yaml::Node, &mut Findings) -> Option<(Key, Spec)>;

/// Labels that state the mode of a workload, or of a namespace's workloads.
const MODE_LABEL: &str = "nodemesh.io/mode";
/// The same for what happens to connections that no policy decides.
const DEFAULT_ACTION_LABEL: &str = "nodemesh.io/default-action";

/// Of a Node: what Kubernetes' own label says.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// How traffic within a node travels.
const SAME_NODE: &[(&str, SameNode)] =
    &[(SameNode::Kernel.as_str(), SameNode::Kernel), (SameNode::Tunnel.as_str(), SameNode::Tunnel)];

/// Fields of Kubernetes' ObjectMeta that the mesh does not read.
const IGNORED_METADATA: &[&str] = &[
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
];

struct Metadata {
    name: String,
    name_at: Position,
    /// The namespace as written, or `default`.
    namespace: String,
    uid: Option<(String, Position)>,
    labels: BTreeMap<String, String>,
    /// By our labels.
    defaults: Defaults,
}

fn metadata(top: &mut Fields, findings: &mut Findings) -> Option<Metadata> {
    let entry = top.require("metadata", findings)?;
    let mut fields = Fields::of(&entry.value, "metadata", findings)?;
    let name = fields.require("name", findings);
    let name = name.and_then(|name| Some((fields::text(&name.value, "metadata.name", findings)?, name.value.at)));
    let namespace = fields.get("namespace").map(|entry| fields::text(&entry.value, "metadata.namespace", findings));
    let uid = fields.get("uid").and_then(|uid| {
        let text = fields::text(&uid.value, "metadata.uid", findings)?;
        if text.is_empty() || text.len() > 253 || text.chars().any(char::is_control) {
            let message = "`metadata.uid` must have 1 to 253 printable characters".to_owned();
            findings.report(Code::InvalidValue, uid.value.at, message, None);
            return None;
        }
        Some((text.to_owned(), uid.value.at))
    });
    let (mut labels, mut defaults) = (BTreeMap::new(), Defaults::default());
    let written = fields.get("labels").and_then(|entry| fields::mapping(&entry.value, "metadata.labels", findings));
    for label in written.unwrap_or_default() {
        let path = format!("metadata.labels[{}]", label.key);
        let Some(value) = fields::text(&label.value, &path, findings) else { continue };
        match label.key.as_str() {
            MODE_LABEL => defaults.mode = fields::choice(&label.value, &path, MODES, findings),
            DEFAULT_ACTION_LABEL => defaults.action = fields::choice(&label.value, &path, DEFAULT_ACTIONS, findings),
            _ => {}
        }
        labels.insert(label.key.clone(), value.to_owned());
    }
    fields.ignore(IGNORED_METADATA);
    fields.finish(findings);
    let (name, name_at) = name?;
    let namespace = namespace.map_or(Some("default"), |written| written)?.to_owned();
    Some(Metadata { name: name.to_owned(), name_at, namespace, uid, labels, defaults })
}

impl Metadata {
    fn object_name(&self, findings: &mut Findings) -> Option<ObjectName> {
        match ObjectName::parse(&self.namespace, &self.name) {
            Ok(name) => Some(name),
            Err(error) => {
                findings.report(Code::InvalidName, self.name_at, error.to_string(), None);
                None
            }
        }
    }

    /// Makes the object known by its key: to findings from here on, and to whoever keeps its last good version.
    fn identify(&self, key: impl Into<Key>, known: &mut Option<(Key, Position)>, findings: &mut Findings) {
        let key = key.into();
        findings.object = Some(key.to_string());
        *known = Some((key, self.name_at));
    }
}

/// The `spec` (or `status`) of an object.
fn section<'n>(top: &mut Fields<'n>, name: &'static str, findings: &mut Findings) -> Option<Fields<'n>> {
    let entry = top.require(name, findings)?;
    Fields::of(&entry.value, name, findings)
}

pub(super) fn node(mut top: Fields, key: &mut Option<(Key, Position)>, findings: &mut Findings) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    let name = metadata.as_ref().and_then(|metadata| match NodeName::parse(&metadata.name) {
        Ok(name) => {
            metadata.identify(ObjectKey::Node(name.clone()), key, findings);
            Some(name)
        }
        Err(error) => {
            findings.report(Code::InvalidName, metadata.name_at, error.to_string(), None);
            None
        }
    });
    let status = section(&mut top, "status", findings);
    top.ignore(&["spec"]);
    top.finish(findings);
    let mut status = status?;
    let (mut addresses, mut addresses_at) = (Vec::new(), Vec::new());
    let entries = status.require("addresses", findings);
    let entries = entries.and_then(|entry| fields::list(&entry.value, "status.addresses", findings));
    for (index, item) in entries.unwrap_or_default().iter().enumerate() {
        let path = format!("status.addresses[{index}]");
        let Some(mut fields) = Fields::of(item, &path, findings) else { continue };
        let (kind, address) = (fields.require("type", findings), fields.require("address", findings));
        fields.finish(findings);
        let (Some(kind), Some(address)) = (kind, address) else { continue };
        let kinds = ["InternalIP", "ExternalIP", "Hostname", "InternalDNS", "ExternalDNS"].map(|kind| (kind, kind));
        let kind = fields::choice(&kind.value, &format!("{path}.type"), &kinds, findings);
        if kind == Some("InternalIP") {
            let parsed = fields::address(&address.value, &format!("{path}.address"), Use::Node, findings);
            addresses.extend(parsed);
            addresses_at.extend(parsed.map(|_| address.value.at));
        }
    }
    status.ignore(&[
        "allocatable",
        "capacity",
        "conditions",
        "config",
        "daemonEndpoints",
        "declaredFeatures",
        "features",
        "images",
        "nodeInfo",
        "phase",
        "runtimeHandlers",
        "volumesAttached",
        "volumesInUse",
    ]);
    status.finish(findings);
    let zone = metadata.and_then(|mut metadata| metadata.labels.remove(ZONE_LABEL)).filter(|zone| !zone.is_empty());
    Some(Spec::Node { node: Arc::new(Node { name: name?, addresses, zone: zone.map(Into::into) }), addresses_at })
}

/// Whether a port's name is one: 1 to 15 lower-case letters, digits and dashes with a letter among them.
fn port_name(name: &str, at: Position, path: &str, findings: &mut Findings) -> bool {
    let sound = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-');
    if !sound {
        let shown: String = name.chars().take(64).collect();
        let message = format!("`{path}`: `{shown}` is no port name");
        let help = if name.parse::<u16>().is_ok() {
            format!("write the number without quotes: {name}")
        } else {
            "a port name has 1 to 15 lower-case letters, digits and dashes, and at least one letter".to_owned()
        };
        findings.report(Code::InvalidName, at, message, Some(help));
    }
    sound
}
