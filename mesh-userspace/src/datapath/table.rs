//! Typed handles of pinned maps: cheap to clone, usable from any thread.

use super::bpf::{self, Update};
use anyhow::{Context as _, ensure};
use mesh_common::maps::Spec;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A pinned map with keys `K` and values `V`.
pub(super) struct Table<K, V> {
    map: Arc<OwnedFd>,
    name: &'static str,
    entries: PhantomData<fn(K) -> V>,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self { map: Arc::clone(&self.map), name: self.name, entries: PhantomData }
    }
}

impl<K: aya::Pod, V: aya::Pod> Table<K, V> {
    /// A handle of `map`; the sizes of `K` and `V` must be the map's.
    pub(super) fn new(map: Arc<OwnedFd>, spec: &Spec) -> anyhow::Result<Self> {
        let info = bpf::map_shape(map.as_fd()).with_context(|| format!("cannot inspect map {}", spec.name))?;
        let fits = info.key_size as usize == size_of::<K>() && info.value_size as usize == size_of::<V>();
        ensure!(fits, "map {} has keys of {} and values of {} bytes", spec.name, info.key_size, info.value_size);
        Ok(Self { map, name: spec.name, entries: PhantomData })
    }

    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        bpf::map_lookup(self.map.as_fd(), key)
    }

    pub(super) fn set(&self, key: &K, value: &V) -> io::Result<()> {
        bpf::map_update(self.map.as_fd(), key, value, Update::Any)
    }

    /// Writes an entry unless there is one; whether it did.
    pub(super) fn add(&self, key: &K, value: &V) -> io::Result<bool> {
        match bpf::map_update(self.map.as_fd(), key, value, Update::New) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn take(&self, key: &K) -> io::Result<Option<V>> {
        bpf::map_take(self.map.as_fd(), key)
    }

    pub(super) fn delete(&self, key: &K) -> io::Result<bool> {
        bpf::map_delete(self.map.as_fd(), key)
    }

    pub(super) fn entries(&self) -> io::Result<Vec<(K, V)>> {
        bpf::map_entries(self.map.as_fd())
    }

    /// Deletes every entry that is there now.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        for (key, _) in self.entries().with_context(|| format!("cannot list map {}", self.name))? {
            self.delete(&key).with_context(|| format!("cannot clear map {}", self.name))?;
        }
        Ok(())
    }
}

/// A table that only this process writes, and therefore can count without listing it.
pub(super) struct OwnTable<K, V> {
    table: Table<K, V>,
    count: Arc<AtomicU64>,
}

impl<K: aya::Pod + PartialEq, V: aya::Pod> OwnTable<K, V> {
    pub(super) fn new(map: Arc<OwnedFd>, spec: &Spec) -> anyhow::Result<Self> {
        let table = Table::<K, V>::new(map, spec)?;
        let present = table.entries().with_context(|| format!("cannot list map {}", spec.name))?.len() as u64;
        Ok(Self { table, count: Arc::new(AtomicU64::new(present)) })
    }

    /// The number of entries, as it changes.
    pub(super) fn count(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.count)
    }

    pub(super) fn get(&self, key: &K) -> anyhow::Result<Option<V>> {
        self.table.get(key).with_context(|| format!("cannot read map {}", self.table.name))
    }

    pub(super) fn keys(&self) -> anyhow::Result<Vec<K>> {
        let entries = self.table.entries().with_context(|| format!("cannot list map {}", self.table.name))?;
        Ok(entries.into_iter().map(|(key, _)| key).collect())
    }

    /// Inserts or replaces.
    pub(super) fn set(&self, key: &K, value: &V) -> anyhow::Result<()> {
        let map = self.table.map.as_fd();
        match bpf::map_update(map, key, value, Update::New) {
            Ok(()) => {
                self.count.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                bpf::map_update(map, key, value, Update::Existing)
            }
            // E2BIG: the map is full.
            Err(error) => Err(error),
        }
        .with_context(|| format!("cannot write map {}", self.table.name))
    }

    /// Removes; an absent key is no error.
    pub(super) fn remove(&self, key: &K) -> anyhow::Result<()> {
        let removed = self.table.delete(key).with_context(|| format!("cannot write map {}", self.table.name))?;
        if removed {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Removes every key that `wanted` refuses.
    pub(super) fn retain(&self, wanted: impl Fn(&K) -> bool) -> anyhow::Result<()> {
        self.keys()?.iter().filter(|key| !wanted(key)).try_for_each(|key| self.remove(key))
    }
}
