//! From the documents of all files to one catalog: who defines what, which last good version stays, who collides.

use super::Code;
use super::claims::Claims;
use super::diagnostic::{Diagnostic, Position, Source};
use super::document::{Defaults, Document, Entry, Spec};
use super::key::Key;
use super::references;
use crate::model::{Catalog, Mesh, Object, ObjectKey, SpiffeId, Update, Workload, WorkloadUid};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Labels that name a workload's owner, the first that is there.
const OWNER_LABELS: [&str; 2] = ["app.kubernetes.io/name", "app"];

/// What was accepted so far. An object that is defined twice, or that claims what another has, does not displace it:
/// whoever was there first stays, and of those that come together the first by file and place.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    accepted: BTreeMap<Key, Arc<Document>>,
    catalog: Catalog,
}

const MESH: Key = Key::Object(ObjectKey::Mesh);

impl Resolver {
    pub(super) fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Number of namespaces whose defaults are in force.
    pub(super) fn namespaces(&self) -> usize {
        self.accepted.keys().filter(|key| matches!(key, Key::Namespace(_))).count()
    }

    /// Takes the documents of all files, in the order of files and places, as the whole truth.
    pub(super) fn resolve<'d>(&mut self, documents: impl IntoIterator<Item = &'d Arc<Document>>) -> Vec<Diagnostic> {
        let mut found = Vec::new();
        let mut chosen = self.choose(documents, &mut found);
        if !chosen.contains_key(&MESH) {
            found.push(self.no_mesh());
            // Without it no workload has an identity: taking it away must not take the mesh down.
            chosen.extend(self.accepted.get_key_value(&MESH).map(|(key, mesh)| (key.clone(), mesh.clone())));
        }
        self.accept(&chosen, &mut found);
        references::check(&self.accepted, &self.catalog, &mut found);
        found
    }

    /// One document a key; the others are reported. What stands in for a broken document yields to any good version,
    /// also to the last one.
    fn choose<'d>(
        &self,
        documents: impl IntoIterator<Item = &'d Arc<Document>>,
        found: &mut Vec<Diagnostic>,
    ) -> BTreeMap<Key, Arc<Document>> {
        let mut candidates: BTreeMap<&Key, Vec<&Arc<Document>>> = BTreeMap::new();
        for document in documents {
            candidates.entry(&document.key).or_default().push(document);
        }
        let choice = |(key, mut documents): (&Key, Vec<&Arc<Document>>)| {
            if documents.iter().all(|document| document.stands_in) {
                let last = self.accepted.get(key).filter(|accepted| !accepted.stands_in);
                return (key.clone(), Arc::clone(last.unwrap_or(documents[0])));
            }
            documents.retain(|document| !document.stands_in);
            let home = self.accepted.get(key).map(|accepted| &accepted.source.file);
            let first = documents.iter().position(|document| Some(&document.source.file) == home).unwrap_or(0);
            let winner = documents[first];
            for other in documents.iter().enumerate().filter(|(index, _)| *index != first).map(|(_, other)| other) {
                let place = format!("it is defined in {}:{}", winner.source.file, winner.at.line);
                let (code, message) = match key {
                    &MESH => (Code::TwoMeshConfigs, "there is already a MeshConfig".to_owned()),
                    _ => (Code::DuplicateObject, "the object is defined twice".to_owned()),
                };
                found.push(other.diagnostic(code, other.at, message, Some(place)));
            }
            (key.clone(), Arc::clone(winner))
        };
        candidates.into_iter().map(choice).collect()
    }

    fn no_mesh(&self) -> Diagnostic {
        let help = match self.accepted.get(&MESH) {
            Some(_) => "the last one stays in force until there is another".to_owned(),
            None => "add a document of `apiVersion: nodemesh.io/v1alpha1`, `kind: MeshConfig`".to_owned(),
        };
        let message = "there is no MeshConfig, so the trust domain is unknown".to_owned();
        Source::new(".", "").diagnostic(Code::NoMeshConfig, Position::FILE, None, message, Some(help))
    }

    /// Builds every object, those first that are as they were: an incumbent's claim comes before a newcomer's.
    fn accept(&mut self, chosen: &BTreeMap<Key, Arc<Document>>, found: &mut Vec<Diagnostic>) {
        let around = Around::of(chosen);
        let mut order: Vec<_> = chosen
            .iter()
            .filter_map(|(key, document)| Some((key, document, around.build(document)?)))
            .map(|(key, document, object)| {
                match get(&self.catalog, key) {
                    // The same object, not its like: whoever holds it compares and keeps it without a copy.
                    Some(old) if old == object => (0, key, document, old),
                    Some(_) => (1, key, document, object),
                    None => (2, key, document, object),
                }
            })
            .collect();
        order.sort_by(|(rank_a, _, a, _), (rank_b, _, b, _)| {
            (rank_a, &a.source.file, a.at).cmp(&(rank_b, &b.source.file, b.at))
        });
        let mut claims = Claims::default();
        // What the mesh has for itself, no other object takes from it.
        if let Some(mesh) = around.mesh {
            claims.add(&Object::Mesh(Arc::clone(mesh)), &MESH);
        }
        let mut catalog = Catalog::default();
        let is_namespace = |(key, _): &(&Key, &Arc<Document>)| matches!(key, Key::Namespace(_));
        let namespaces = chosen.iter().filter(is_namespace);
        let mut accepted: BTreeMap<_, _> = namespaces.map(|(key, document)| (key.clone(), document.clone())).collect();
        for (_, key, document, object) in order {
            let (document, object) = match claims.check(document, &object, key) {
                None => (Arc::clone(document), object),
                Some(diagnostic) => {
                    found.push(diagnostic);
                    // The version before this one, unless that collides as well by now.
                    let fallback = self.accepted.get(key).and_then(|old| Some((old, around.build(old)?)));
                    match fallback.filter(|(old, object)| claims.check(old, object, key).is_none()) {
                        Some((old, object)) => (Arc::clone(old), object),
                        None => continue,
                    }
                }
            };
            claims.add(&object, key);
            insert(&mut catalog, object);
            accepted.insert(key.clone(), document);
        }
        (self.accepted, self.catalog) = (accepted, catalog);
    }
}

/// What the documents say that objects take from elsewhere.
struct Around<'d> {
    mesh: Option<&'d Arc<Mesh>>,
    namespaces: BTreeMap<&'d str, Defaults>,
}

impl<'d> Around<'d> {
    fn of(documents: &'d BTreeMap<Key, Arc<Document>>) -> Self {
        let mesh = documents.get(&MESH).and_then(|document| match &document.spec {
            Spec::Mesh(mesh) => Some(mesh),
            _ => None,
        });
        let namespace = |(key, document): (&'d Key, &'d Arc<Document>)| match (key, &document.spec) {
            (Key::Namespace(name), Spec::Namespace(defaults)) => Some((&**name, *defaults)),
            _ => None,
        };
        Self { mesh, namespaces: documents.iter().filter_map(namespace).collect() }
    }

    fn build(&self, document: &Document) -> Option<Object> {
        Some(match &document.spec {
            Spec::Mesh(mesh) => Object::Mesh(Arc::clone(mesh)),
            Spec::Node { node, .. } => Object::Node(Arc::clone(node)),
            Spec::Service { service, .. } => Object::Service(Arc::clone(service)),
            Spec::Workload(entry) => Object::Workload(Arc::new(self.workload(entry)?)),
            Spec::Policy(policy) => Object::Policy(Arc::clone(&policy.policy)),
            Spec::Traffic(entry) => Object::Traffic(Arc::clone(&entry.policy)),
            Spec::Namespace(_) => return None,
        })
    }

    fn workload(&self, entry: &Entry) -> Option<Workload> {
        let mesh = self.mesh?;
        let namespace = self.namespaces.get(entry.name.namespace()).copied().unwrap_or_default();
        let owner = OWNER_LABELS.iter().find_map(|label| entry.labels.get(*label)).filter(|owner| !owner.is_empty());
        Some(Workload {
            uid: WorkloadUid::new(&entry.uid),
            owner: owner.map_or(entry.name.name(), String::as_str).into(),
            name: entry.name.clone(),
            labels: entry.labels.clone(),
            // Names of 253 bytes at most and a trust domain of 255 stay far below what a SPIFFE ID may have.
            identity: SpiffeId::for_service_account(&mesh.trust_domain, &entry.service_account).ok()?,
            node: entry.node.clone(),
            addresses: entry.addresses.clone(),
            netns: entry.netns.clone(),
            cgroup: entry.cgroup.clone(),
            mode: entry.defaults.mode.or(namespace.mode).unwrap_or(mesh.mode),
            port_modes: entry.port_modes.clone(),
            ports: entry.ports.clone(),
            weight: entry.weight,
            is_terminating: entry.is_terminating,
            default_action: entry.defaults.action.or(namespace.action).unwrap_or(mesh.default_action),
        })
    }
}

fn get(catalog: &Catalog, key: &Key) -> Option<Object> {
    let Key::Object(key) = key else { return None };
    match key {
        ObjectKey::Mesh => catalog.mesh.clone().map(Object::Mesh),
        ObjectKey::Node(name) => catalog.nodes.get(name).cloned().map(Object::Node),
        ObjectKey::Service(name) => catalog.services.get(name).cloned().map(Object::Service),
        ObjectKey::Workload(name) => catalog.workloads.get(name).cloned().map(Object::Workload),
        ObjectKey::Policy(name) => catalog.policies.get(name).cloned().map(Object::Policy),
        ObjectKey::Traffic(name) => catalog.traffic.get(name).cloned().map(Object::Traffic),
    }
}

fn insert(catalog: &mut Catalog, object: Object) {
    match object {
        Object::Mesh(mesh) => catalog.mesh = Some(mesh),
        Object::Node(node) => drop(catalog.nodes.insert(node.name.clone(), node)),
        Object::Service(service) => drop(catalog.services.insert(service.name.clone(), service)),
        Object::Workload(workload) => drop(catalog.workloads.insert(workload.name.clone(), workload)),
        Object::Policy(policy) => drop(catalog.policies.insert(policy.name.clone(), policy)),
        Object::Traffic(policy) => drop(catalog.traffic.insert(policy.name.clone(), policy)),
    }
}

/// The updates that lead from one catalog to another: settings and nodes before what lives on them, additions before
/// removals, so that what moves is never missing in between.
pub(super) fn deltas(old: &Catalog, new: &Catalog) -> Vec<Update> {
    let mut updates = Vec::new();
    let mut removals = Vec::new();
    match (&old.mesh, &new.mesh) {
        (old, Some(mesh)) if old.as_ref() != Some(mesh) => updates.push(Update::Upsert(Object::Mesh(mesh.clone()))),
        (Some(_), None) => removals.push(Update::Remove(ObjectKey::Mesh)),
        _ => {}
    }
    changes(&old.nodes, &new.nodes, Object::Node, ObjectKey::Node, &mut updates, &mut removals);
    // Policies before the workloads that they protect.
    changes(&old.policies, &new.policies, Object::Policy, ObjectKey::Policy, &mut updates, &mut removals);
    changes(&old.traffic, &new.traffic, Object::Traffic, ObjectKey::Traffic, &mut updates, &mut removals);
    changes(&old.workloads, &new.workloads, Object::Workload, ObjectKey::Workload, &mut updates, &mut removals);
    changes(&old.services, &new.services, Object::Service, ObjectKey::Service, &mut updates, &mut removals);
    updates.append(&mut removals);
    updates
}

fn changes<K: Ord + Clone, V: PartialEq + Clone>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    object: impl Fn(V) -> Object,
    key: impl Fn(K) -> ObjectKey,
    updates: &mut Vec<Update>,
    removals: &mut Vec<Update>,
) {
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(*value));
    updates.extend(changed.map(|(_, value)| Update::Upsert(object(value.clone()))));
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    removals.extend(gone.map(|gone| Update::Remove(key(gone.clone()))));
}
