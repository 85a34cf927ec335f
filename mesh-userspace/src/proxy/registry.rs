//! The connections that are carried now, so that a change of policy reaches them: each is looked at once after a
//! relevant change, and nothing wakes it up before it is to end.
//!
//! A connection enters first and is decided about with a snapshot that it reads afterwards; a change is stored first and
//! the table looked through afterwards. So whichever comes first, no connection slips through between the two.

use super::verdict::{self, Caller, Ruling};
use crate::engine::Snapshot;
use crate::model::Workload;
use mesh_common::policy::Arrival;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Which end of the connection is on this node. Where both are, both are in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

/// What a live connection's verdict depends on.
#[derive(Clone, Debug)]
pub struct Live {
    pub side: Side,
    /// The caller as it was admitted: its identity is proven.
    pub caller: Arc<Workload>,
    /// The address it speaks under.
    pub source: IpAddr,
    pub destination: Arc<Workload>,
    /// The workload's port.
    pub port: u16,
}

/// Why a live connection is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Policy or mode no longer allow it.
    Denied(Ruling),
    /// No workload has the caller's identity at its address any more.
    SourceGone,
    /// The destination has another identity now.
    DestinationChanged,
}

impl Cut {
    /// A stable label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Denied(ruling) => ruling.reason.as_str(),
            Self::SourceGone => "source_gone",
            Self::DestinationChanged => "destination_changed",
        }
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(ruling) => write!(f, "{ruling}"),
            Self::SourceGone => f.write_str("the caller's address no longer belongs to a workload of its identity"),
            Self::DestinationChanged => f.write_str("the destination has another identity now"),
        }
    }
}

impl Live {
    /// Why the connection may not go on in this picture of the mesh, if it may not. A destination that is gone ends its
    /// connections itself: it is disarmed, and its lanes are closed.
    fn judge(&self, snapshot: &Snapshot) -> Option<Cut> {
        if self.side == Side::Destination && snapshot.workload_speaking(self.source, &self.caller.identity).is_none() {
            return Some(Cut::SourceGone);
        }
        let current = snapshot.workload(&self.destination.name).filter(|known| known.uid == self.destination.uid)?;
        if current.identity != self.destination.identity {
            return Some(Cut::DestinationChanged);
        }
        let caller = Caller { identity: Some(&self.caller.identity), address: self.source };
        let told = verdict::decide(snapshot, current, self.port, Arrival::Authenticated, caller);
        told.is_denied().then_some(Cut::Denied(told.ruling))
    }
}

#[derive(Debug)]
struct Entry {
    live: Live,
    told: Mutex<Told>,
}

/// What a connection has been told: a channel would be an allocation for each of thousands.
#[derive(Debug)]
enum Told {
    /// Nothing yet; who is to be woken.
    Nothing(Option<Waker>),
    Cut(Box<Cut>),
    /// It knows, or has ended.
    Heard,
}

impl Entry {
    /// Says whether the connection was there to be told, and had not been.
    fn tell(&self, cut: Cut) -> bool {
        let mut told = lock(&self.told);
        let Told::Nothing(waker) = &mut *told else { return false };
        let waker = waker.take();
        *told = Told::Cut(Box::new(cut));
        drop(told);
        waker.into_iter().for_each(Waker::wake);
        true
    }
}

const SHARDS: usize = 16;

#[derive(Debug, Default)]
struct Table {
    shards: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
    next: AtomicU64,
    /// The daemon's own connections to applications: from, to.
    deliveries: Mutex<HashSet<(SocketAddr, SocketAddr)>>,
}

/// The table. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Registry(Arc<Table>);

impl Registry {
    /// Lists a connection until the ticket is dropped.
    #[must_use]
    pub fn enter(&self, live: Live) -> Ticket {
        let id = self.0.next.fetch_add(1, Relaxed);
        let entry = Arc::new(Entry { live, told: Mutex::new(Told::Nothing(None)) });
        lock(self.0.shard(id)).insert(id, entry.clone());
        Ticket { table: self.0.clone(), id, entry }
    }

    /// Cuts what may not go on in this picture of the mesh; returns each reason and how often. Costs a look at every
    /// live connection: call it after changes that concern verdicts ([`Snapshot::judges_like`]), where blocking is
    /// allowed.
    #[must_use]
    pub fn recheck(&self, snapshot: &Snapshot) -> HashMap<&'static str, u64> {
        let mut cut = HashMap::new();
        for shard in &self.0.shards {
            // Judged outside of the lock: connections come and go meanwhile.
            let entries: Vec<_> = lock(shard).values().cloned().collect();
            for entry in entries {
                let Some(why) = entry.live.judge(snapshot) else { continue };
                let reason = why.reason();
                *cut.entry(reason).or_default() += u64::from(entry.tell(why));
            }
        }
        cut.retain(|_, count| *count > 0);
        cut
    }

    /// Notes a connection that the daemon is about to make to an application, until the guard is dropped.
    pub(super) fn delivering(&self, from: SocketAddr, to: SocketAddr) -> Option<Delivery> {
        let ends = (canonical(from), canonical(to));
        let is_new = lock(&self.0.deliveries).insert(ends);
        is_new.then(|| Delivery { table: self.0.clone(), ends })
    }

    /// Whether a connection to an application is the daemon's own.
    pub(super) fn is_delivery(&self, from: SocketAddr, to: SocketAddr) -> bool {
        lock(&self.0.deliveries).contains(&(canonical(from), canonical(to)))
    }
}

impl Table {
    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Entry>>> {
        &self.shards[(id % SHARDS as u64) as usize]
    }
}

/// Keeps a connection in the table, and says when it is to be cut.
#[derive(Debug)]
pub struct Ticket {
    table: Arc<Table>,
    id: u64,
    entry: Arc<Entry>,
}

impl Ticket {
    /// Ends when the connection is to be cut. Not to be awaited again after that.
    pub async fn cut(&mut self) -> Cut {
        poll_fn(|cx| self.poll_cut(cx)).await
    }

    /// [`Self::cut`], once.
    pub fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<Cut> {
        let mut told = lock(&self.entry.told);
        match std::mem::replace(&mut *told, Told::Heard) {
            Told::Cut(cut) => Poll::Ready(*cut),
            Told::Heard => Poll::Pending,
            Told::Nothing(known) => {
                let known = known.filter(|known| known.will_wake(cx.waker()));
                *told = Told::Nothing(known.or_else(|| Some(cx.waker().clone())));
                Poll::Pending
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(self.table.shard(self.id)).remove(&self.id);
        *lock(&self.entry.told) = Told::Heard;
    }
}

/// A delivery that goes on.
#[derive(Debug)]
pub(super) struct Delivery {
    table: Arc<Table>,
    ends: (SocketAddr, SocketAddr),
}

impl Drop for Delivery {
    fn drop(&mut self) {
        lock(&self.table.deliveries).remove(&self.ends);
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Every critical section here leaves its table whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
