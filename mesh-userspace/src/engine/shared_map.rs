//! A map whose clones share what they have in common.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::Arc;

/// Enough that a change to one entry of a full frontend table (131,072) copies about 512 entries.
const SHARDS: usize = 256;

/// A map split into shards behind reference counts: cloning it is one increment, changing one entry of a clone copies
/// one shard, and comparing two relatives skips the shards they share. Publishing a snapshot a change stays cheap
/// however large the mesh is.
pub struct SharedMap<K, V> {
    /// Empty until the first insert, else `SHARDS` long.
    shards: Arc<Vec<Shard<K, V>>>,
    len: usize,
}

type Shard<K, V> = Arc<BTreeMap<K, V>>;

impl<K: Ord + Hash + Clone, V: Clone> SharedMap<K, V> {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Ord + Hash + ?Sized,
    {
        self.shards.get(shard_of(key))?.get(key)
    }

    #[must_use]
    pub fn contains_key<Q>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Ord + Hash + ?Sized,
    {
        self.get(key).is_some()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Every entry once, in an order that depends on the keys alone (and is not theirs).
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    /// Every entry in the order of its key.
    #[must_use]
    pub fn sorted(&self) -> BTreeMap<&K, &V> {
        self.iter().collect()
    }

    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let shards = Arc::make_mut(&mut self.shards);
        if shards.is_empty() {
            shards.resize_with(SHARDS, Shard::default);
        }
        let old = Arc::make_mut(&mut shards[shard_of(&key)]).insert(key, value);
        self.len += usize::from(old.is_none());
        old
    }

    pub fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Ord + Hash + ?Sized,
    {
        // Looked up first: a miss must not copy the shard.
        self.get(key)?;
        let shards = Arc::make_mut(&mut self.shards);
        let old = Arc::make_mut(&mut shards[shard_of(key)]).remove(key);
        self.len -= usize::from(old.is_some());
        old
    }

    /// What `self` has and `old` has not, or has with another value; then the keys that only `old` has.
    pub(super) fn changes_since<'a>(&'a self, old: &'a Self) -> (Vec<(&'a K, &'a V)>, Vec<&'a K>)
    where
        V: PartialEq,
    {
        let (mut set, mut removed) = (Vec::new(), Vec::new());
        if Arc::ptr_eq(&self.shards, &old.shards) {
            return (set, removed);
        }
        let none = Shard::default();
        for index in 0..SHARDS {
            let new_shard = self.shards.get(index).unwrap_or(&none);
            let old_shard = old.shards.get(index).unwrap_or(&none);
            if Arc::ptr_eq(new_shard, old_shard) {
                continue;
            }
            // Collected before `none` ends: the borrowed entries live in the maps' own shards.
            if let Some(shard) = self.shards.get(index) {
                set.extend(shard.iter().filter(|(key, value)| old_shard.get(*key) != Some(*value)));
            }
            if let Some(shard) = old.shards.get(index) {
                removed.extend(shard.keys().filter(|key| !new_shard.contains_key(*key)));
            }
        }
        (set, removed)
    }
}

fn shard_of<Q: Hash + ?Sized>(key: &Q) -> usize {
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(key);
    usize::try_from(hash % SHARDS as u64).unwrap_or(0)
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { shards: Arc::default(), len: 0 }
    }
}

impl<K, V> Clone for SharedMap<K, V> {
    fn clone(&self) -> Self {
        Self { shards: Arc::clone(&self.shards), len: self.len }
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len
            && (Arc::ptr_eq(&self.shards, &other.shards)
                || self.len == 0
                || self.shards.iter().zip(other.shards.iter()).all(|(a, b)| Arc::ptr_eq(a, b) || a == b))
    }
}

impl<K: Eq, V: Eq> Eq for SharedMap<K, V> {}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.shards.iter().flat_map(|shard| shard.iter())).finish()
    }
}

impl<K: Ord + Hash + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::new();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_clone_shares_all_but_the_changed_shard() {
        let old: SharedMap<u32, u32> = (0..10_000).map(|n| (n, n)).collect();
        let mut new = old.clone();
        assert_eq!(new.insert(7, 8), Some(7));
        let copied = old.shards.iter().zip(new.shards.iter()).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert_eq!(copied, 1);
        assert_eq!((old.get(&7), new.get(&7)), (Some(&7), Some(&8)));
    }

    #[test]
    fn removing_what_is_not_there_copies_nothing() {
        let old: SharedMap<u32, u32> = (0..10).map(|n| (n, n)).collect();
        let mut new = old.clone();
        assert_eq!(new.remove(&99), None);
        assert!(Arc::ptr_eq(&old.shards, &new.shards));
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_plain_map(steps in prop::collection::vec((any::<bool>(), 0u8..40, any::<u8>()), 0..200)) {
            let (mut shared, mut plain) = (SharedMap::new(), BTreeMap::new());
            let mut before = (shared.clone(), plain.clone());
            for (index, (insert, key, value)) in steps.into_iter().enumerate() {
                if index == 50 {
                    before = (shared.clone(), plain.clone());
                }
                if insert {
                    prop_assert_eq!(shared.insert(key, value), plain.insert(key, value));
                } else {
                    prop_assert_eq!(shared.remove(&key), plain.remove(&key));
                }
                prop_assert_eq!(shared.len(), plain.len());
            }
            prop_assert!(shared.sorted().into_iter().eq(plain.iter()));
            prop_assert_eq!(&shared, &plain.iter().map(|(k, v)| (*k, *v)).collect());
            // The clone of long ago is untouched, and the changes since lead from it to here.
            prop_assert!(before.0.sorted().into_iter().eq(before.1.iter()));
            let (set, removed) = shared.changes_since(&before.0);
            let mut replayed = before.0.clone();
            for (key, value) in set {
                prop_assert!(replayed.insert(*key, *value) != Some(*value));
            }
            for key in removed {
                prop_assert!(replayed.remove(key).is_some());
            }
            prop_assert_eq!(replayed, shared);
        }
    }
}
