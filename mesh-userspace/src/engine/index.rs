//! Which services select which workloads, found without looking at all of either.

use crate::model::{AuthorizationPolicy, ObjectName, PolicyTarget, Service, Workload};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// A namespace and one label that must hold there.
type Label = (Arc<str>, Arc<str>, Arc<str>);

/// Both directions of label selection. A workload is filed under each of its labels, a service under the first pair
/// of its selector: whoever changes finds its possible partners under its own labels and checks only those.
#[derive(Debug, Default)]
pub(crate) struct SelectorIndex {
    workloads: HashMap<Label, BTreeSet<ObjectName>>,
    services: HashMap<Label, BTreeSet<ObjectName>>,
}

impl SelectorIndex {
    pub(crate) fn insert_workload(&mut self, workload: &Workload) {
        for label in labels(workload) {
            self.workloads.entry(label).or_default().insert(workload.name.clone());
        }
    }

    pub(crate) fn remove_workload(&mut self, workload: &Workload) {
        for label in labels(workload) {
            remove(&mut self.workloads, &label, &workload.name);
        }
    }

    pub(crate) fn insert_service(&mut self, service: &Service) {
        if let Some(label) = first_pair(service) {
            self.services.entry(label).or_default().insert(service.name.clone());
        }
    }

    pub(crate) fn remove_service(&mut self, service: &Service) {
        if let Some(label) = first_pair(service) {
            remove(&mut self.services, &label, &service.name);
        }
    }

    /// Services that may select this workload; each must still be checked with [`selects`].
    pub(crate) fn services_for(&self, workload: &Workload) -> impl Iterator<Item = &ObjectName> {
        labels(workload).filter_map(|label| self.services.get(&label)).flatten()
    }

    /// Workloads that this service may select, in the order of their names; each must still be checked with
    /// [`selects`].
    pub(crate) fn workloads_for(&self, service: &Service) -> impl Iterator<Item = &ObjectName> {
        self.workloads_with(service.name.namespace(), &service.selector)
    }

    /// Workloads of a namespace that may have all of these labels, of which there is at least one; each must still be
    /// checked.
    pub(crate) fn workloads_with(
        &self,
        namespace: &str,
        selector: &BTreeMap<String, String>,
    ) -> impl Iterator<Item = &ObjectName> {
        let candidates = pairs(namespace, selector).map(|label| self.workloads.get(&label));
        let fewest = candidates.min_by_key(|found| found.map_or(0, BTreeSet::len));
        fewest.flatten().into_iter().flatten()
    }
}

/// Whether a service's selector holds for a workload. An empty selector selects nothing.
pub(crate) fn selects(service: &Service, workload: &Workload) -> bool {
    !service.selector.is_empty()
        && service.name.namespace() == workload.name.namespace()
        && holds(&service.selector, workload)
}

/// Whether a workload has all of these labels.
pub(super) fn holds(selector: &BTreeMap<String, String>, workload: &Workload) -> bool {
    selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
}

fn labels(workload: &Workload) -> impl Iterator<Item = Label> {
    pairs(workload.name.namespace(), &workload.labels)
}

fn pairs(namespace: &str, labels: &BTreeMap<String, String>) -> impl Iterator<Item = Label> {
    let namespace: Arc<str> = namespace.into();
    labels.iter().map(move |(key, value)| (Arc::clone(&namespace), key.as_str().into(), value.as_str().into()))
}

fn first_pair(service: &Service) -> Option<Label> {
    pairs(service.name.namespace(), &service.selector).next()
}

fn remove<K: Hash + Eq>(index: &mut HashMap<K, BTreeSet<ObjectName>>, key: &K, name: &ObjectName) {
    if let Some(names) = index.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            index.remove(key);
        }
    }
}

/// Which policies may apply to whom: a policy is filed once under each of its targets.
#[derive(Debug, Default)]
pub(super) struct PolicyIndex {
    filed: HashMap<Place, BTreeSet<ObjectName>>,
}

/// What a policy's target names.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Place {
    Namespace(Arc<str>),
    /// The first pair of a selector.
    Label(Label),
    Service(Arc<str>, Arc<str>),
}

impl PolicyIndex {
    pub(super) fn insert(&mut self, policy: &AuthorizationPolicy) {
        for place in places(policy) {
            self.filed.entry(place).or_default().insert(policy.name.clone());
        }
    }

    pub(super) fn remove(&mut self, policy: &AuthorizationPolicy) {
        for place in places(policy) {
            remove(&mut self.filed, &place, &policy.name);
        }
    }

    /// Policies that may apply to a workload by its labels or namespace; each must still be checked.
    pub(super) fn for_workload(&self, workload: &Workload) -> impl Iterator<Item = &ObjectName> {
        let namespace = Place::Namespace(workload.name.namespace().into());
        let places = labels(workload).map(Place::Label).chain([namespace]);
        places.filter_map(|place| self.filed.get(&place)).flatten()
    }

    /// Policies that name a service as a target.
    pub(super) fn for_service(&self, service: &ObjectName) -> impl Iterator<Item = &ObjectName> {
        let place = Place::Service(service.namespace().into(), service.name().into());
        self.filed.get(&place).into_iter().flatten()
    }
}

fn places(policy: &AuthorizationPolicy) -> Vec<Place> {
    let namespace = policy.name.namespace();
    let everywhere = || Place::Namespace(namespace.into());
    let place = |target: &PolicyTarget| match target {
        PolicyTarget::Selector(selector) => pairs(namespace, selector).next().map_or_else(everywhere, Place::Label),
        PolicyTarget::Service(service) => Place::Service(namespace.into(), Arc::clone(service)),
    };
    if policy.targets.is_empty() { vec![everywhere()] } else { policy.targets.iter().map(place).collect() }
}

/// Several objects may claim one key (two services one virtual address, two workloads one address): the first by name
/// has it, whatever the order in which they came.
#[derive(Debug)]
pub(crate) struct Claims<K, V> {
    /// By name; hardly ever more than one.
    claims: BTreeMap<K, Vec<(ObjectName, V)>>,
}

impl<K, V> Default for Claims<K, V> {
    fn default() -> Self {
        Self { claims: BTreeMap::new() }
    }
}

impl<K: Ord, V> Claims<K, V> {
    pub(crate) fn insert(&mut self, key: K, owner: ObjectName, value: V) {
        let owners = self.claims.entry(key).or_default();
        match owners.binary_search_by(|(other, _)| other.cmp(&owner)) {
            Ok(index) => owners[index].1 = value,
            Err(index) => {
                owners.reserve_exact(1);
                owners.insert(index, (owner, value));
            }
        }
    }

    pub(crate) fn remove(&mut self, key: &K, owner: &ObjectName) {
        if let Some(owners) = self.claims.get_mut(key) {
            owners.retain(|(other, _)| other != owner);
            if owners.is_empty() {
                self.claims.remove(key);
            }
        }
    }

    pub(crate) fn winner(&self, key: &K) -> Option<&V> {
        self.claims.get(key)?.first().map(|(_, value)| value)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.claims.keys()
    }

    pub(crate) fn keys_within(&self, range: RangeInclusive<K>) -> impl Iterator<Item = &K> {
        self.claims.range(range).map(|(key, _)| key)
    }
}
