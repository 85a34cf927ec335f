//! Who called in plaintext lately: what still keeps a workload from STRICT, for `nodemesh get plaintext`. Bounded: when
//! it is full, callers that were not seen for the longest time make room.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Pairs of caller and destination.
const CAPACITY: usize = 2_048;
/// How many go at once when there is no room: finding them costs a look at all.
const EVICTED: usize = CAPACITY / 8;
/// Ports told for each pair.
const PORTS: usize = 16;

/// One connection.
#[derive(Clone, Debug)]
pub struct Plaintext {
    pub source: IpAddr,
    /// `namespace/name` of the caller, if the catalog knows its address.
    pub source_workload: Option<Arc<str>>,
    /// `namespace/name` of the destination, or its address if the catalog no longer knows it.
    pub destination: Arc<str>,
    pub port: u16,
    pub admitted: bool,
}

/// What is known about a caller and a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub source: IpAddr,
    pub source_workload: Option<Arc<str>>,
    pub destination: Arc<str>,
    /// The first ports that it called.
    pub ports: BTreeSet<u16>,
    pub admitted: u64,
    pub refused: u64,
    pub first_seen: SystemTime,
    pub last_seen: SystemTime,
}

#[derive(Debug, Default)]
struct Table {
    callers: HashMap<(IpAddr, Arc<str>), Caller>,
    evicted: u64,
}

/// The table. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct PlaintextCallers(Arc<Mutex<Table>>);

impl PlaintextCallers {
    pub fn saw(&self, seen: Plaintext, now: SystemTime) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (seen.source, seen.destination.clone());
        if table.callers.len() >= CAPACITY && !table.callers.contains_key(&key) {
            table.make_room();
        }
        let caller = table.callers.entry(key).or_insert_with(|| Caller {
            source: seen.source,
            source_workload: None,
            destination: seen.destination,
            ports: BTreeSet::new(),
            admitted: 0,
            refused: 0,
            first_seen: now,
            last_seen: now,
        });
        caller.source_workload = seen.source_workload;
        caller.last_seen = now;
        if caller.ports.len() < PORTS {
            caller.ports.insert(seen.port);
        }
        *(if seen.admitted { &mut caller.admitted } else { &mut caller.refused }) += 1;
    }

    /// How many pairs there are, there is room for, and have made room for others.
    #[must_use]
    pub fn level(&self) -> [u64; 3] {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        [table.callers.len() as u64, CAPACITY as u64, table.evicted]
    }

    /// Every pair, in no useful order, and how many have made room for others.
    #[must_use]
    pub fn snapshot(&self) -> (Vec<Caller>, u64) {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (table.callers.values().cloned().collect(), table.evicted)
    }
}

impl Table {
    fn make_room(&mut self) {
        let mut by_age: Vec<_> = self.callers.iter().map(|(key, caller)| (caller.last_seen, key.clone())).collect();
        by_age.sort_unstable();
        for (_, key) in by_age.into_iter().take(EVICTED) {
            self.callers.remove(&key);
            self.evicted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    fn seen(source: u32, port: u16, admitted: bool) -> Plaintext {
        let source = IpAddr::V4(Ipv4Addr::from_bits(source));
        Plaintext { source, source_workload: None, destination: "shop/cart".into(), port, admitted }
    }

    #[test]
    fn a_caller_is_one_row_for_each_destination() {
        let table = PlaintextCallers::default();
        let start = SystemTime::UNIX_EPOCH;
        table.saw(seen(1, 80, true), start);
        table.saw(seen(1, 81, false), start + Duration::from_secs(5));
        table.saw(Plaintext { destination: "shop/web".into(), ..seen(1, 80, true) }, start);
        let (mut rows, evicted) = table.snapshot();
        rows.sort_by(|a, b| a.destination.cmp(&b.destination));
        assert_eq!((rows.len(), evicted), (2, 0));
        assert_eq!((rows[0].admitted, rows[0].refused, &rows[0].ports), (1, 1, &BTreeSet::from([80, 81])));
        assert_eq!((rows[0].first_seen, rows[0].last_seen), (start, start + Duration::from_secs(5)));
    }

    #[test]
    fn the_table_is_bounded_and_keeps_who_called_last() {
        let table = PlaintextCallers::default();
        for (second, source) in (0..).zip(0..u32::try_from(CAPACITY).unwrap() + 1) {
            table.saw(seen(source, 80, true), SystemTime::UNIX_EPOCH + Duration::from_secs(second));
        }
        let (rows, evicted) = table.snapshot();
        assert_eq!((rows.len(), evicted), (CAPACITY - EVICTED + 1, EVICTED as u64));
        assert_eq!(table.level(), [CAPACITY - EVICTED + 1, CAPACITY, EVICTED].map(|count| count as u64));
        let oldest = rows.iter().map(|row| row.source).min().unwrap();
        assert_eq!(oldest, IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(EVICTED).unwrap())));
        for port in 0..100 {
            table.saw(seen(5_000, port, true), SystemTime::UNIX_EPOCH);
        }
        assert!(table.snapshot().0.iter().all(|row| row.ports.len() <= PORTS));
    }
}
