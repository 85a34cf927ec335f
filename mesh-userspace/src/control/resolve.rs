//! From the documents of all files to one catalog: who defines what, which last good version stays, who collides.

use super::Code;
use super::diagnostic::{Diagnostic, Position, Source};
use super::document::{Document, Entry, Spec, title};
use super::references;
use crate::model::{Catalog, Mesh, Object, ObjectKey, Protocol, Service, SpiffeId, Update, Workload, WorkloadUid};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Labels that name a workload's owner, the first that is there.
const OWNER_LABELS: [&str; 2] = ["app.kubernetes.io/name", "app"];

/// What was accepted so far. An object that is defined twice, or that claims what another has, does not displace it:
/// whoever was there first stays, and of those that come together the first by file and place.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    accepted: BTreeMap<ObjectKey, Arc<Document>>,
    catalog: Catalog,
}

impl Resolver {
    pub(super) fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Takes the documents of all files, in the order of files and places, as the whole truth.
    pub(super) fn resolve<'d>(&mut self, documents: impl IntoIterator<Item = &'d Arc<Document>>) -> Vec<Diagnostic> {
        let mut found = Vec::new();
        let mut chosen = self.choose(documents, &mut found);
        if !chosen.contains_key(&ObjectKey::Mesh) {
            found.push(self.no_mesh());
            // Without it no workload has an identity: taking it away must not take the mesh down.
            chosen.extend(self.accepted.get_key_value(&ObjectKey::Mesh).map(|(key, mesh)| (key.clone(), mesh.clone())));
        }
        let mesh = chosen.get(&ObjectKey::Mesh).and_then(|document| match &document.spec {
            Spec::Mesh(mesh) => Some(Arc::clone(mesh)),
            _ => None,
        });
        self.accept(&chosen, mesh.as_ref(), &mut found);
        references::check(&self.accepted, &self.catalog, &mut found);
        found
    }

    /// One document a key; the others are reported.
    fn choose<'d>(
        &self,
        documents: impl IntoIterator<Item = &'d Arc<Document>>,
        found: &mut Vec<Diagnostic>,
    ) -> BTreeMap<ObjectKey, Arc<Document>> {
        let mut candidates: BTreeMap<&ObjectKey, Vec<&Arc<Document>>> = BTreeMap::new();
        for document in documents {
            candidates.entry(&document.key).or_default().push(document);
        }
        let choice = |(key, documents): (&ObjectKey, Vec<&Arc<Document>>)| {
            let home = self.accepted.get(key).map(|accepted| &accepted.source.file);
            let first = documents.iter().position(|document| Some(&document.source.file) == home).unwrap_or(0);
            let winner = documents[first];
            for other in documents.iter().enumerate().filter(|(index, _)| *index != first).map(|(_, other)| other) {
                let place = format!("it is defined in {}:{}", winner.source.file, winner.at.line);
                let (code, message) = match key {
                    ObjectKey::Mesh => (Code::TwoMeshConfigs, "there is already a MeshConfig".to_owned()),
                    _ => (Code::DuplicateObject, "the object is defined twice".to_owned()),
                };
                found.push(other.diagnostic(code, other.at, message, Some(place)));
            }
            (key.clone(), Arc::clone(winner))
        };
        candidates.into_iter().map(choice).collect()
    }

    fn no_mesh(&self) -> Diagnostic {
        let help = match self.accepted.get(&ObjectKey::Mesh) {
            Some(_) => "the last one stays in force until there is another".to_owned(),
            None => "add a document of `apiVersion: nodemesh.io/v1alpha1`, `kind: MeshConfig`".to_owned(),
        };
        let message = "there is no MeshConfig, so the trust domain is unknown".to_owned();
        Source::new(".", "").diagnostic(Code::NoMeshConfig, Position::FILE, None, message, Some(help))
    }

    /// Builds every object, those first that are as they were: an incumbent's claim comes before a newcomer's.
    fn accept(
        &mut self,
        chosen: &BTreeMap<ObjectKey, Arc<Document>>,
        mesh: Option<&Arc<Mesh>>,
        found: &mut Vec<Diagnostic>,
    ) {
        let mut order: Vec<_> = chosen
            .iter()
            .filter_map(|(key, document)| Some((key, document, build(document, mesh)?)))
            .map(|(key, document, object)| {
                let rank = match get(&self.catalog, key) {
                    Some(old) if old == object => 0,
                    Some(_) => 1,
                    None => 2,
                };
                (rank, key, document, object)
            })
            .collect();
        order.sort_by(|(rank_a, _, a, _), (rank_b, _, b, _)| {
            (rank_a, &a.source.file, a.at).cmp(&(rank_b, &b.source.file, b.at))
        });
        let mut claims = Claims::default();
        let (mut accepted, mut catalog) = (BTreeMap::new(), Catalog::default());
        for (_, key, document, object) in order {
            let (document, object) = match claims.check(document, &object, key) {
                None => (Arc::clone(document), object),
                Some(diagnostic) => {
                    found.push(diagnostic);
                    // The version before this one, unless that collides as well by now.
                    let fallback = self.accepted.get(key).and_then(|old| Some((old, build(old, mesh)?)));
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

fn build(document: &Document, mesh: Option<&Arc<Mesh>>) -> Option<Object> {
    Some(match &document.spec {
        Spec::Mesh(mesh) => Object::Mesh(Arc::clone(mesh)),
        Spec::Node { node, .. } => Object::Node(Arc::clone(node)),
        Spec::Service { service, .. } => Object::Service(Arc::clone(service)),
        Spec::Workload(entry) => Object::Workload(Arc::new(workload(entry, mesh?)?)),
    })
}

fn workload(entry: &Entry, mesh: &Mesh) -> Option<Workload> {
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
        cgroup: None,
        mode: entry.mode.unwrap_or(mesh.mode),
        port_modes: entry.port_modes.clone(),
        ports: entry.ports.clone(),
        weight: entry.weight,
        default_action: mesh.default_action,
    })
}

/// What only one object may have.
#[derive(Debug, Default)]
struct Claims {
    addresses: HashMap<IpAddr, ObjectKey>,
    uids: HashMap<WorkloadUid, ObjectKey>,
    vips: HashMap<IpAddr, ObjectKey>,
    frontends: HashMap<(SocketAddr, Protocol), ObjectKey>,
    nodes: HashMap<IpAddr, ObjectKey>,
}

impl Claims {
    /// The first claim of this object that another has already.
    fn check(&self, document: &Document, object: &Object, key: &ObjectKey) -> Option<Diagnostic> {
        let (code, at, what, owner) = match (object, &document.spec) {
            (Object::Workload(workload), Spec::Workload(entry)) => self.check_workload(workload, entry, key)?,
            (Object::Service(service), Spec::Service { vips_at, .. }) => self.check_service(service, vips_at, key)?,
            (Object::Node(node), Spec::Node { addresses_at, .. }) => {
                let (at, address, owner) = other(&self.nodes, &node.addresses, addresses_at, key)?;
                (Code::DuplicateNodeAddress, at, format!("the address {address}"), owner)
            }
            _ => return None,
        };
        let message = format!("{what} belongs to {}", title(owner));
        Some(document.diagnostic(code, at, message, None))
    }

    fn check_workload(&self, workload: &Workload, entry: &Entry, key: &ObjectKey) -> Option<Collision<'_>> {
        if let Some((at, address, owner)) = other(&self.addresses, &workload.addresses, &entry.addresses_at, key) {
            return Some((Code::DuplicateAddress, at, format!("the address {address}"), owner));
        }
        if let Some((at, address, owner)) = other(&self.vips, &workload.addresses, &entry.addresses_at, key) {
            return Some((Code::FrontendIsWorkload, at, format!("the address {address}"), owner));
        }
        let owner = self.uids.get(&workload.uid).filter(|owner| *owner != key)?;
        Some((Code::DuplicateUid, entry.uid_at, format!("the uid `{}`", workload.uid), owner))
    }

    fn check_service(&self, service: &Service, vips_at: &[Position], key: &ObjectKey) -> Option<Collision<'_>> {
        if let Some((at, vip, owner)) = other(&self.addresses, &service.vips, vips_at, key) {
            return Some((Code::FrontendIsWorkload, at, format!("the address {vip}"), owner));
        }
        frontends(service).zip(places(service, vips_at)).find_map(|(frontend, at)| {
            let owner = self.frontends.get(&frontend).filter(|owner| *owner != key)?;
            Some((Code::DuplicateFrontend, at, format!("the virtual address {}", frontend.0), owner))
        })
    }

    fn add(&mut self, object: &Object, key: &ObjectKey) {
        match object {
            Object::Mesh(_) | Object::Policy(_) => {}
            Object::Node(node) => self.nodes.extend(node.addresses.iter().map(|address| (*address, key.clone()))),
            Object::Service(service) => {
                self.vips.extend(service.vips.iter().map(|vip| (*vip, key.clone())));
                self.frontends.extend(frontends(service).map(|frontend| (frontend, key.clone())));
            }
            Object::Workload(workload) => {
                self.addresses.extend(workload.addresses.iter().map(|address| (*address, key.clone())));
                self.uids.insert(workload.uid.clone(), key.clone());
            }
        }
    }
}

type Collision<'c> = (Code, Position, String, &'c ObjectKey);

/// The first of these addresses that someone else has.
fn other<'c>(
    claims: &'c HashMap<IpAddr, ObjectKey>,
    addresses: &[IpAddr],
    places: &[Position],
    key: &ObjectKey,
) -> Option<(Position, IpAddr, &'c ObjectKey)> {
    addresses.iter().zip(places).find_map(|(address, at)| {
        let owner = claims.get(address).filter(|owner| *owner != key)?;
        Some((*at, *address, owner))
    })
}

fn frontends(service: &Service) -> impl Iterator<Item = (SocketAddr, Protocol)> {
    let ports = &service.ports;
    service
        .vips
        .iter()
        .flat_map(move |vip| ports.iter().map(move |port| (SocketAddr::new(*vip, port.port), port.protocol)))
}

/// The place of each of [`frontends`]: that of its virtual address.
fn places(service: &Service, vips_at: &[Position]) -> impl Iterator<Item = Position> {
    let ports = service.ports.len();
    vips_at.iter().flat_map(move |at| std::iter::repeat_n(*at, ports))
}

fn get(catalog: &Catalog, key: &ObjectKey) -> Option<Object> {
    match key {
        ObjectKey::Mesh => catalog.mesh.clone().map(Object::Mesh),
        ObjectKey::Node(name) => catalog.nodes.get(name).cloned().map(Object::Node),
        ObjectKey::Service(name) => catalog.services.get(name).cloned().map(Object::Service),
        ObjectKey::Workload(name) => catalog.workloads.get(name).cloned().map(Object::Workload),
        ObjectKey::Policy(name) => catalog.policies.get(name).cloned().map(Object::Policy),
    }
}

fn insert(catalog: &mut Catalog, object: Object) {
    match object {
        Object::Mesh(mesh) => catalog.mesh = Some(mesh),
        Object::Node(node) => drop(catalog.nodes.insert(node.name.clone(), node)),
        Object::Service(service) => drop(catalog.services.insert(service.name.clone(), service)),
        Object::Workload(workload) => drop(catalog.workloads.insert(workload.name.clone(), workload)),
        Object::Policy(policy) => drop(catalog.policies.insert(policy.name.clone(), policy)),
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
