//! From a file's bytes to objects: pure, bounded, and without a way to panic, whatever the bytes.

use super::diagnostic::{Diagnostic, Findings, Position, Source};
use super::fields::{self, Fields};
use super::key::Key;
use super::{Code, kinds, suggest, yaml};
use crate::model::{
    AuthorizationPolicy, DefaultAction, Mesh, Mode, Node, NodeName, ObjectName, Service, TrafficPolicy,
};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes in one file.
pub(super) const MAX_FILE_BYTES: u64 = 4 << 20;

/// One object as it is written, sound in itself; what it refers to is not checked yet.
#[derive(Clone, Debug)]
pub(super) struct Document {
    pub(super) source: Source,
    pub(super) key: Key,
    /// Where its name stands.
    pub(super) at: Position,
    pub(super) spec: Spec,
    /// Not as written, because that is broken: the strictest that it may have meant.
    pub(super) stands_in: bool,
}

/// What a document says, with the places that later findings point to.
#[derive(Clone, Debug)]
pub(super) enum Spec {
    Mesh(Arc<Mesh>),
    Node { node: Arc<Node>, addresses_at: Vec<Position> },
    Service { service: Arc<Service>, selector_at: Position, vips_at: Vec<Position>, targets_at: Vec<Position> },
    Workload(Box<Entry>),
    Policy(Arc<Policy>),
    Traffic(TrafficEntry),
    Namespace(Defaults),
}

/// A traffic policy, and where it names each of its services.
#[derive(Clone, Debug)]
pub(super) struct TrafficEntry {
    pub(super) policy: Arc<TrafficPolicy>,
    pub(super) services_at: Vec<Position>,
}

/// A policy, and where it says what.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) policy: Arc<AuthorizationPolicy>,
    pub(super) targets: Vec<Position>,
    pub(super) rules: Vec<RulePlaces>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct RulePlaces {
    pub(super) sources: Vec<Position>,
    pub(super) ports: Vec<Position>,
}

/// What holds unless something nearer to the workload says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Defaults {
    pub(super) mode: Option<Mode>,
    pub(super) action: Option<DefaultAction>,
}

/// A `WorkloadEntry` before the `MeshConfig` gives it a trust domain and a default mode.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: ObjectName,
    pub(super) uid: String,
    pub(super) uid_at: Position,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) service_account: ObjectName,
    pub(super) node: NodeName,
    pub(super) node_at: Position,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) addresses_at: Vec<Position>,
    pub(super) netns: Option<PathBuf>,
    pub(super) cgroup: Option<PathBuf>,
    /// Where its cgroup stands, and each port that it declares; only of a host-network workload.
    pub(super) host_at: Option<HostPlaces>,
    pub(super) defaults: Defaults,
    pub(super) port_modes: BTreeMap<u16, Mode>,
    pub(super) ports: BTreeMap<String, u16>,
    pub(super) weight: u32,
    pub(super) is_terminating: bool,
}

/// Where a host-network workload says what others must not have.
#[derive(Clone, Debug, Default)]
pub(super) struct HostPlaces {
    pub(super) cgroup: Position,
    pub(super) ports: BTreeMap<u16, Position>,
}

impl Document {
    pub(super) fn diagnostic(&self, code: Code, at: Position, message: String, help: Option<String>) -> Diagnostic {
        self.source.diagnostic(code, at, Some(self.key.to_string()), message, help)
    }
}

/// What a file holds.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    pub(super) documents: Vec<Arc<Document>>,
    /// Documents that give no object.
    pub(super) broken: Vec<Broken>,
    pub(super) diagnostics: Vec<Diagnostic>,
}

/// A document that gives no object.
#[derive(Clone, Debug, Default)]
pub(super) struct Broken {
    /// `None` if it may be any of the file's objects.
    pub(super) key: Option<Key>,
    /// What is in force if there is no good version.
    pub(super) stand_in: Option<Arc<Document>>,
    /// Whether what stands in has a name that is made up.
    pub(super) nameless: bool,
}

impl Contents {
    /// A file of which nothing can be told.
    pub(super) fn unknown(diagnostic: Diagnostic) -> Self {
        Self { documents: Vec::new(), broken: vec![Broken::default()], diagnostics: vec![diagnostic] }
    }

    /// Number of sound objects.
    #[must_use]
    pub fn len(&self) -> usize {
        self.documents.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// Whether any document gives no object; each such is reported.
    #[must_use]
    pub fn has_broken(&self) -> bool {
        !self.broken.is_empty()
    }

    #[must_use]
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }
}

/// Reads every document in `bytes`. `file` is the name that findings give.
#[must_use]
pub fn parse_documents(file: &str, bytes: &[u8]) -> Contents {
    let refuse = |code, text: &str, message: String, help: Option<String>| {
        Contents::unknown(Source::new(file, text).diagnostic(code, Position::FILE, None, message, help))
    };
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let message = format!("the file has more than {} MiB", MAX_FILE_BYTES >> 20);
        return refuse(Code::TooLarge, "", message, Some("split the file".into()));
    }
    if bytes.is_empty() {
        // Also what a reader sees while another program is about to write the file anew.
        let help = "delete the file to remove its objects".to_owned();
        return refuse(Code::Empty, "", "the file is empty".into(), Some(help));
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let sound = String::from_utf8_lossy(bytes.get(..error.valid_up_to()).unwrap_or_default());
            let line = sound.lines().count().max(1);
            return refuse(Code::NotText, "", format!("the file is not UTF-8 text (line {line})"), None);
        }
    };
    let mut findings = Findings::new(Source::new(file, text));
    let mut contents = Contents::default();
    for tree in yaml::read(text, &mut findings) {
        match tree {
            Ok(tree) => match object(&tree, &mut findings) {
                Ok(document) => contents.documents.push(Arc::new(document)),
                Err(key) => {
                    let stand_in = stand_in(&tree, &mut findings);
                    let nameless = key.is_none();
                    contents.broken.push(Broken { key, stand_in, nameless });
                }
            },
            // What broke it off may have swallowed more than this document: it may be any of the file's objects.
            Err(yaml::Broken(rest)) => {
                let stand_in = rest.as_ref().and_then(|rest| stand_in(rest, &mut findings));
                contents.broken.push(Broken { key: None, stand_in, nameless: false });
            }
        }
    }
    contents.diagnostics = findings.into_diagnostics();
    contents
}

/// One of the kinds that a catalog has.
struct Kind {
    version: &'static str,
    name: &'static str,
    read: kinds::Read,
    /// Of kinds that protect: what stands in for a broken object of which there is no good version.
    stand_in: Option<kinds::StandIn>,
}

const OURS: &str = "nodemesh.io/v1alpha1";

const KINDS: [Kind; 7] = [
    Kind { version: "v1", name: "Service", read: kinds::service, stand_in: None },
    Kind { version: "v1", name: "Node", read: kinds::node, stand_in: None },
    Kind { version: "v1", name: "Namespace", read: kinds::namespace, stand_in: Some(kinds::strictest_namespace) },
    Kind { version: OURS, name: "WorkloadEntry", read: kinds::workload, stand_in: None },
    Kind { version: OURS, name: "MeshConfig", read: kinds::mesh, stand_in: None },
    Kind { version: OURS, name: "TrafficPolicy", read: kinds::traffic, stand_in: None },
    Kind { version: OURS, name: POLICY, read: kinds::policy, stand_in: Some(kinds::strictest_policy) },
];

/// The kind that must not be lost to a slip of the pen in its own name.
const POLICY: &str = "AuthorizationPolicy";

/// Reads one object; on failure gives its key if that much could be told.
fn object(tree: &yaml::Node, findings: &mut Findings) -> Result<Document, Option<Key>> {
    findings.object = None;
    let before = findings.errors();
    let mut key = None;
    let read = read_object(tree, &mut key, findings);
    findings.object = None;
    match read {
        Some(document) if findings.errors() == before => Ok(document),
        _ => Err(key.map(|(key, _)| key)),
    }
}

/// What is in force instead of a document that is broken, if its kind has such.
fn stand_in(tree: &yaml::Node, findings: &mut Findings) -> Option<Arc<Document>> {
    let name = tree.field("kind")?.text()?;
    // Also of another or without apiVersion, and with a letter amiss: who writes that means to protect something.
    let kind = KINDS.iter().find(|kind| kind.name == name);
    let kind = kind.or_else(|| KINDS.iter().find(|kind| kind.name == POLICY && suggest::is_slip(name, kind.name)));
    let strictest = kind?.stand_in?;
    let (key, spec) = strictest(tree, findings)?;
    let at = tree.field("metadata").and_then(|metadata| metadata.field("name")).unwrap_or(tree).at;
    Some(Arc::new(Document { source: findings.source.clone(), key, at, spec, stands_in: true }))
}

fn read_object(tree: &yaml::Node, key: &mut Option<(Key, Position)>, findings: &mut Findings) -> Option<Document> {
    if !matches!(tree.value, yaml::Value::Mapping(_)) {
        let message = format!("an object must be a mapping, found {}", tree.value.describe());
        findings.report(Code::NotAnObject, tree.at, message, None);
        return None;
    }
    let mut top = Fields::of(tree, "", findings)?;
    let (version, kind) = (top.require("apiVersion", findings), top.require("kind", findings));
    let (version, kind) = (version?, kind?);
    let version_text = fields::text(&version.value, "apiVersion", findings)?;
    let kind_text = fields::text(&kind.value, "kind", findings)?;
    let Some(known) = KINDS.iter().find(|known| known.version == version_text && known.name == kind_text) else {
        unknown_kind(version, version_text, kind, kind_text, findings);
        return None;
    };
    (known.read)(top, key, findings).and_then(|spec| {
        let (key, at) = key.clone()?;
        Some(Document { source: findings.source.clone(), key, at, spec, stands_in: false })
    })
}

fn unknown_kind(version: &yaml::Entry, v: &str, kind: &yaml::Entry, k: &str, findings: &mut Findings) {
    let shown: String = k.chars().take(64).collect();
    if let Some(Kind { version: right, .. }) = KINDS.iter().find(|known| known.name == k) {
        let message = format!("{k} has another apiVersion");
        findings.report(Code::UnknownKind, version.value.at, message, Some(format!("write `apiVersion: {right}`")));
        return;
    }
    let of_version: Vec<_> = KINDS.iter().filter(|known| known.version == v).map(|known| known.name).collect();
    let candidates = if of_version.is_empty() { KINDS.iter().map(|known| known.name).collect() } else { of_version };
    let help = suggest::help(k, candidates.iter().copied());
    findings.report(Code::UnknownKind, kind.value.at, format!("`{shown}` is no kind of a catalog"), help);
}
