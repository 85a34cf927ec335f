//! What the kernel counted, and what the maps take.

use super::bpf;
use anyhow::{Context as _, anyhow};
use mesh_common::maps::{self, Kind, Spec};
use mesh_common::outcome::Outcome;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapUsage {
    pub name: &'static str,
    /// Entries now. Arrays are always full; 0 for `ORIG` (it lives in the sockets) and `EVENTS` (a stream).
    pub entries: u64,
    /// Entries at most; for `EVENTS` its size in bytes, for `ORIG` 0: as many as there are sockets.
    pub capacity: u64,
    /// Kernel memory that the map is charged with now.
    pub bytes: u64,
}

/// A map whose usage is reported.
pub(super) struct Measured {
    pub(super) spec: &'static Spec,
    pub(super) map: Arc<OwnedFd>,
}

/// Reads the kernel's counters; any thread may.
#[derive(Clone)]
pub struct Counters {
    maps: Arc<[Measured]>,
    outcomes: Arc<OwnedFd>,
    /// Sizes of the maps that this daemon alone writes, as it goes; the others are listed when asked.
    own: Arc<BTreeMap<&'static str, Arc<AtomicU64>>>,
    cpus: usize,
}

impl Counters {
    pub(super) fn new(measured: Vec<Measured>, own: BTreeMap<&'static str, Arc<AtomicU64>>) -> anyhow::Result<Self> {
        let cpus = aya::util::nr_cpus().map_err(|(file, error)| anyhow!(error).context(file))?;
        let outcomes = measured.iter().find(|map| map.spec.name == maps::OUTCOMES.name);
        let outcomes = Arc::clone(&outcomes.context("no OUTCOMES map")?.map);
        Ok(Self { maps: measured.into(), outcomes, own: Arc::new(own), cpus })
    }

    /// Every outcome's count since the maps were made, over all CPUs. What cannot be read is logged and left out; the
    /// kernel has no reason to refuse.
    #[must_use]
    pub fn outcomes(&self) -> Vec<(Outcome, u64)> {
        let counts = Outcome::ALL.iter().map(|outcome| {
            let per_cpu = bpf::map_lookup_per_cpu(self.outcomes.as_fd(), *outcome as u32, self.cpus);
            per_cpu.map(|counts| (*outcome, counts.iter().sum()))
        });
        counts.filter_map(|count| logged(count, maps::OUTCOMES.name)).collect()
    }

    /// How full every map is. What cannot be read is logged and left out. Lists the connection maps: milliseconds when
    /// they are full.
    #[must_use]
    pub fn map_usage(&self) -> Vec<MapUsage> {
        self.maps.iter().filter_map(|measured| logged(self.usage(measured), measured.spec.name)).collect()
    }

    fn usage(&self, measured: &Measured) -> io::Result<MapUsage> {
        Ok(MapUsage {
            name: measured.spec.name,
            entries: self.entries(measured)?,
            capacity: u64::from(measured.spec.max_entries),
            bytes: bpf::map_bytes(&measured.map)?,
        })
    }

    fn entries(&self, measured: &Measured) -> io::Result<u64> {
        if let Some(count) = self.own.get(measured.spec.name) {
            return Ok(count.load(Ordering::Relaxed));
        }
        match measured.spec.kind {
            Kind::Array | Kind::PerCpuArray => Ok(u64::from(measured.spec.max_entries)),
            Kind::SkStorage | Kind::RingBuf => Ok(0),
            Kind::Hash | Kind::LruHash | Kind::LpmTrie => {
                bpf::map_count(measured.map.as_fd(), measured.spec.key_size, measured.spec.value_size)
            }
        }
    }
}

fn logged<T>(result: io::Result<T>, map: &str) -> Option<T> {
    result.inspect_err(|error| tracing::warn!(%error, map, "cannot read a map")).ok()
}
