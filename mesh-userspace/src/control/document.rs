//! From a file's bytes to objects: pure, bounded, and without a way to panic, whatever the bytes.

use super::diagnostic::{Diagnostic, Findings, Position, Source};
use super::fields::{self, Fields};
use super::{Code, kinds, suggest, yaml};
use crate::model::{Mesh, Mode, Node, NodeName, ObjectKey, ObjectName, Service};
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
    pub(super) key: ObjectKey,
    /// Where its name stands.
    pub(super) at: Position,
    pub(super) spec: Spec,
}

/// What a document says, with the places that later findings point to.
#[derive(Clone, Debug)]
pub(super) enum Spec {
    Mesh(Arc<Mesh>),
    Node { node: Arc<Node>, addresses_at: Vec<Position> },
    Service { service: Arc<Service>, selector_at: Position, vips_at: Vec<Position>, targets_at: Vec<Position> },
    Workload(Box<Entry>),
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
    pub(super) mode: Option<Mode>,
    pub(super) port_modes: BTreeMap<u16, Mode>,
    pub(super) ports: BTreeMap<String, u16>,
    pub(super) weight: u32,
}

impl Document {
    /// Kind and name, as in `Service shop/cart`.
    pub(super) fn title(&self) -> String {
        title(&self.key)
    }

    pub(super) fn diagnostic(&self, code: Code, at: Position, message: String, help: Option<String>) -> Diagnostic {
        self.source.diagnostic(code, at, Some(self.title()), message, help)
    }
}

/// Kind and name, as in `Service shop/cart`.
pub(super) fn title(key: &ObjectKey) -> String {
    match key {
        ObjectKey::Mesh => "MeshConfig".to_owned(),
        ObjectKey::Node(name) => format!("Node {name}"),
        ObjectKey::Service(name) => format!("Service {name}"),
        ObjectKey::Workload(name) => format!("WorkloadEntry {name}"),
        ObjectKey::Policy(name) => format!("AuthorizationPolicy {name}"),
    }
}

/// What a file holds.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    pub(super) documents: Vec<Arc<Document>>,
    /// Documents that give no object: the object's key, or `None` if not even that can be told.
    pub(super) broken: Vec<Option<ObjectKey>>,
    pub(super) diagnostics: Vec<Diagnostic>,
}

impl Contents {
    /// A file of which nothing can be told.
    pub(super) fn unknown(diagnostic: Diagnostic) -> Self {
        Self { documents: Vec::new(), broken: vec![None], diagnostics: vec![diagnostic] }
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
        match tree.map(|tree| object(&tree, &mut findings)) {
            Some(Ok(document)) => contents.documents.push(Arc::new(document)),
            Some(Err(key)) => contents.broken.push(key),
            None => contents.broken.push(None),
        }
    }
    contents.diagnostics = findings.into_diagnostics();
    contents
}

/// Kinds by their apiVersion and kind.
const KINDS: [(&str, &str, kinds::Read); 4] = [
    ("v1", "Service", kinds::service),
    ("v1", "Node", kinds::node),
    ("nodemesh.io/v1alpha1", "WorkloadEntry", kinds::workload),
    ("nodemesh.io/v1alpha1", "MeshConfig", kinds::mesh),
];

/// Reads one object; on failure gives its key if that much could be told.
fn object(tree: &yaml::Node, findings: &mut Findings) -> Result<Document, Option<ObjectKey>> {
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

fn read_object(
    tree: &yaml::Node,
    key: &mut Option<(ObjectKey, Position)>,
    findings: &mut Findings,
) -> Option<Document> {
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
    let Some((_, _, read)) = KINDS.iter().find(|(v, k, _)| *v == version_text && *k == kind_text) else {
        unknown_kind(version, version_text, kind, kind_text, findings);
        return None;
    };
    read(top, key, findings).and_then(|spec| {
        let (key, at) = key.clone()?;
        Some(Document { source: findings.source.clone(), key, at, spec })
    })
}

fn unknown_kind(version: &yaml::Entry, v: &str, kind: &yaml::Entry, k: &str, findings: &mut Findings) {
    let shown: String = k.chars().take(64).collect();
    if let Some((right, _, _)) = KINDS.iter().find(|(_, known, _)| *known == k) {
        let message = format!("{k} has another apiVersion");
        findings.report(Code::UnknownKind, version.value.at, message, Some(format!("write `apiVersion: {right}`")));
        return;
    }
    let of_version: Vec<_> = KINDS.iter().filter(|(known, _, _)| *known == v).map(|(_, kind, _)| *kind).collect();
    let candidates = if of_version.is_empty() { KINDS.map(|(_, kind, _)| kind).to_vec() } else { of_version };
    let help = suggest::help(k, candidates.iter().copied());
    findings.report(Code::UnknownKind, kind.value.at, format!("`{shown}` is no kind of a catalog"), help);
}
