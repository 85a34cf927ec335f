//! TLS lanes: the client's pool. Small streams share lanes; a stream that turns bulk gets one for itself. Before the
//! certificates of a lane's handshake end, its streams move to a lane with fresh ones ([`moves`]).

mod moves;

pub(super) use moves::{BULK, RENEWAL};

use super::lane::{Closing, EXCLUSIVE, LANES, Lane, SHARED, connect};
use super::machine::{Side, Unavailable};
use super::route::{Leg, Mover, Route};
use super::stream::{RecvKind, SendKind};
use super::{Config, LaneStatus, OpenError, Peer, RecvHalf, SendHalf, Stream, StreamHeader, Transport};
use crate::identity::Identities;
use crate::model::{SpiffeId, WorkloadUid};
use crate::runtime::{Cores, Descriptors, Level, Room};
use crate::telemetry::tunnel::TunnelMetrics;
use bytes::Bytes;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// The transport; a cheap handle.
#[derive(Clone, Debug)]
pub struct Lanes(Arc<Pool>);

type Entries = HashMap<Peer, Arc<Entry>>;

#[derive(Debug)]
struct Pool {
    config: Arc<Config>,
    identities: Identities,
    metrics: Arc<TunnelMetrics>,
    /// For each core its own: a stream and its lane are served by one thread.
    entries: Box<[Mutex<Entries>]>,
    cores: Cores,
    handshakes: Room,
    descriptors: Descriptors,
    /// Streams that found no shared lane to their peer, and ones that got no lane of their own, for there were as many as may be.
    no_lane: [AtomicU64; 2],
    is_draining: AtomicBool,
    lane_ended: Notify,
}

/// The lanes of one core to one peer.
#[derive(Debug)]
struct Entry {
    peer: Peer,
    core: usize,
    lanes: Mutex<PeerLanes>,
    /// Held while a shared lane is dialled; keeps the last failure for those who waited.
    dialling: tokio::sync::Mutex<Option<OpenError>>,
    /// Dials that ended.
    dials: AtomicU64,
}

#[derive(Debug, Default)]
struct PeerLanes {
    shared: Vec<Arc<Lane>>,
    exclusive: Vec<Arc<Lane>>,
    /// Exclusive lanes being dialled.
    coming: usize,
    is_forgotten: bool,
}

impl Transport for Lanes {
    async fn open(&self, peer: &Peer, header: StreamHeader) -> Result<Stream, OpenError> {
        let pool = &self.0;
        let header = header.encode().map_err(|_| OpenError::Bound("stream header bytes"))?;
        let opened = timeout(pool.config.open_timeout, pool.open(peer, header.into())).await;
        let result = opened.unwrap_or(Err(OpenError::Timeout));
        match &result {
            Ok(_) => pool.metrics.stream_opened(LANES, "outbound"),
            Err(error) => pool.metrics.stream_refused(LANES, "outbound", error.reason()),
        }
        result
    }
}

impl Lanes {
    pub(super) fn new(
        config: Arc<Config>,
        identities: Identities,
        metrics: Arc<TunnelMetrics>,
        descriptors: Descriptors,
        cores: Cores,
    ) -> Self {
        let handshakes = Room::new("tunnel_outbound_handshakes_lanes", config.max_handshakes);
        Self(Arc::new(Pool {
            config,
            identities,
            metrics,
            entries: (0..cores.count()).map(|_| Mutex::default()).collect(),
            cores,
            handshakes,
            descriptors,
            no_lane: Default::default(),
            is_draining: AtomicBool::new(false),
            lane_ended: Notify::new(),
        }))
    }

    pub(super) fn forget(&self, workload: &WorkloadUid) {
        self.forget_where(|peer| peer.workload == *workload);
    }

    pub(super) fn forget_source(&self, source: &SpiffeId) {
        self.forget_where(|peer| peer.source == *source);
    }

    fn forget_where(&self, is_gone: impl Fn(&Peer) -> bool) {
        let mut forgotten = Vec::new();
        for core in 0..self.0.cores.count() {
            self.0.lock(core).retain(|peer, entry| {
                let is_kept = !is_gone(peer);
                if !is_kept {
                    forgotten.push(Arc::clone(entry));
                }
                is_kept
            });
        }
        for entry in forgotten {
            entry.lock().is_forgotten = true;
            entry.close_all();
        }
    }

    pub(super) fn status(&self) -> Vec<LaneStatus> {
        self.0.entries().iter().flat_map(|entry| entry.status()).collect()
    }

    /// Of the lanes of one core to one peer those of the core and the peer that have most.
    pub(super) fn levels(&self) -> Vec<Level> {
        let (mut shared, mut exclusive) = (0, 0);
        self.0.each_entry(|entry| {
            let lanes = entry.lock();
            shared = shared.max(lanes.shared.len());
            exclusive = exclusive.max(lanes.exclusive.len() + lanes.coming);
        });
        let config = &self.0.config;
        let per_peer = [
            ("tunnel_shared_lanes_per_peer", shared, self.0.share(config.max_shared_lanes)),
            ("tunnel_exclusive_lanes_per_peer", exclusive, self.0.share(config.max_exclusive_lanes)),
        ];
        let levels = per_peer.into_iter().zip(&self.0.no_lane).map(|((bound, used, capacity), hits)| Level {
            bound,
            used: used as u64,
            capacity: capacity as u64,
            hits: hits.load(Ordering::Relaxed),
        });
        levels.chain([self.0.handshakes.level()]).collect()
    }

    pub(super) async fn drain(&self, deadline: Instant) {
        self.0.is_draining.store(true, Ordering::Release);
        self.0.each_entry(|entry| entry.each_lane(Lane::go_away));
        loop {
            let ended = self.0.lane_ended.notified();
            if self.0.entries().is_empty() {
                return;
            }
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                break;
            }
        }
        self.0.each_entry(Entry::close_all);
    }
}

impl Pool {
    fn lock(&self, core: usize) -> MutexGuard<'_, Entries> {
        self.entries[core].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        (0..self.cores.count()).flat_map(|core| self.lock(core).values().cloned().collect::<Vec<_>>()).collect()
    }

    fn each_entry(&self, act: impl FnMut(&Entry)) {
        self.entries().iter().map(AsRef::as_ref).for_each(act);
    }

    /// A core's share of what there may be to one peer.
    fn share(&self, bound: usize) -> usize {
        bound.div_ceil(self.cores.count())
    }

    fn entry(&self, peer: &Peer) -> Arc<Entry> {
        let core = self.cores.here();
        let mut entries = self.lock(core);
        if let Some(entry) = entries.get(peer) {
            return Arc::clone(entry);
        }
        let entry = Arc::new(Entry {
            peer: peer.clone(),
            core,
            lanes: Mutex::default(),
            dialling: tokio::sync::Mutex::new(None),
            dials: AtomicU64::new(0),
        });
        entries.insert(peer.clone(), Arc::clone(&entry));
        entry
    }

    /// Opens a stream, anew once if a pooled lane turned out to be dead.
    async fn open(self: &Arc<Self>, peer: &Peer, header: Bytes) -> Result<Stream, OpenError> {
        let mut is_second = false;
        loop {
            if self.is_draining.load(Ordering::Acquire) {
                return Err(OpenError::Closed);
            }
            let entry = self.entry(peer);
            let result = self.begin(&entry, header.clone()).await;
            let (leg, is_reused) = match result {
                Ok(begun) => begun,
                Err(error) => {
                    self.remove_if_unused(&entry);
                    return Err(error);
                }
            };
            match leg.lane.answered(leg.id).await {
                Ok(()) => return Ok(self.stream(&entry, leg)),
                Err(OpenError::Closed | OpenError::Handshake(_)) if is_reused && !is_second => is_second = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends OPEN on a lane with room, dialling one if there is none. Also says whether the lane was there before.
    async fn begin(self: &Arc<Self>, entry: &Arc<Entry>, header: Bytes) -> Result<(Leg, bool), OpenError> {
        if let Some(leg) = entry.open_on_pooled(&header) {
            return Ok((leg, true));
        }
        let dials = entry.dials.load(Ordering::Acquire);
        let mut last_failure = entry.dialling.lock().await;
        if let Some(leg) = entry.open_on_pooled(&header) {
            return Ok((leg, true));
        }
        if entry.dials.load(Ordering::Acquire) != dials
            && let Some(error) = &*last_failure
        {
            // Someone dialled while this one waited; dialling again would only multiply the wait.
            return Err(copy(error));
        }
        if entry.lock().shared.len() >= self.share(self.config.max_shared_lanes) {
            self.no_lane[0].fetch_add(1, Ordering::Relaxed);
            return Err(OpenError::Bound("shared lanes"));
        }
        let dialled = self.dial(entry, SHARED).await;
        entry.dials.fetch_add(1, Ordering::AcqRel);
        *last_failure = dialled.as_ref().err().map(copy);
        let lane = dialled?;
        let id = lane.open(header).map_err(|_| lane.failure())?;
        Ok((Leg { lane, id }, false))
    }

    async fn dial(self: &Arc<Self>, entry: &Arc<Entry>, kind: &'static str) -> Result<Arc<Lane>, OpenError> {
        // Bulk goes on without a lane of its own, streams do not without any: the last ones are theirs.
        let paid = if kind == SHARED { self.descriptors.for_lane() } else { self.descriptors.for_application() };
        let dial = async {
            let descriptor = paid.ok_or(OpenError::Bound("descriptors"))?;
            let _place = self.handshakes.enter().await;
            let connecting = connect(&self.identities, &entry.peer, self.config.congestion);
            let established =
                timeout(self.config.connect_timeout, connecting).await.unwrap_or(Err(OpenError::Timeout))?;
            Ok((established, descriptor))
        };
        let (established, descriptor) = dial.await.inspect_err(|error: &OpenError| {
            self.metrics.handshake_failed(LANES, "client", error.reason());
        })?;
        let (lane, socket) = established.into_lane(Side::Client, kind, &self.config, Arc::clone(&self.metrics));
        let (pool, task_entry, task_lane) = (Arc::clone(self), Arc::clone(entry), Arc::clone(&lane));
        {
            let mut lanes = entry.lock();
            if lanes.is_forgotten {
                lane.close(Closing::Local);
                return Err(OpenError::Closed);
            }
            if kind == SHARED { &mut lanes.shared } else { &mut lanes.exclusive }.push(Arc::clone(&lane));
        }
        tokio::spawn(async move {
            let renewal = tokio::spawn(Arc::clone(&pool).renewal(Arc::clone(&task_entry), Arc::clone(&task_lane)));
            // A server opens no streams: the machine refuses the attempt as a broken protocol.
            let socket = task_lane.drive(socket, &pool.config, |_, _| {}).await;
            renewal.abort();
            // Waited for, because it holds the entry; that it was aborted is no news.
            let _ = renewal.await;
            task_entry.remove(&task_lane);
            pool.remove_if_unused(&task_entry);
            pool.lane_ended.notify_waiters();
            task_lane.linger(socket, &pool.config).await;
            drop(descriptor);
        });
        if self.is_draining.load(Ordering::Acquire) {
            lane.go_away();
        }
        Ok(lane)
    }

    fn stream(self: &Arc<Self>, entry: &Arc<Entry>, leg: Leg) -> Stream {
        let tls = leg.lane.facts.session.clone();
        let (pool, entry) = (Arc::downgrade(self), Arc::downgrade(entry));
        let mover: Mover = Box::new(move |route| {
            if let (Some(pool), Some(entry)) = (pool.upgrade(), entry.upgrade()) {
                tokio::spawn(pool.move_to_own_lane(entry, route));
            }
        });
        let (send, recv) = Route::halves(leg, &self.config, Some(mover));
        Stream::new(SendHalf(SendKind::Lane(send)), RecvHalf(RecvKind::Lane(recv)), tls)
    }

    fn remove_if_unused(&self, entry: &Arc<Entry>) {
        let mut entries = self.lock(entry.core);
        let is_empty = {
            let lanes = entry.lock();
            lanes.shared.is_empty() && lanes.exclusive.is_empty() && lanes.coming == 0
        };
        // Whoever is about to dial for this entry holds it: the map and the caller do, and nobody else may.
        if is_empty
            && Arc::strong_count(entry) <= 2
            && entries.get(&entry.peer).is_some_and(|known| Arc::ptr_eq(known, entry))
        {
            entries.remove(&entry.peer);
        }
    }
}

impl Entry {
    fn lock(&self) -> MutexGuard<'_, PeerLanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first lane with room: few well-filled lanes share more records than many half-empty ones.
    fn open_on_pooled(&self, header: &Bytes) -> Option<Leg> {
        let lanes = self.lock();
        lanes.shared.iter().find_map(|lane| match lane.open(header.clone()) {
            Ok(id) => Some(Leg { lane: Arc::clone(lane), id }),
            Err(Unavailable::Full | Unavailable::Draining) => None,
        })
    }

    fn each_lane(&self, act: impl FnMut(&Lane)) {
        let lanes: Vec<_> = {
            let lanes = self.lock();
            lanes.shared.iter().chain(&lanes.exclusive).cloned().collect()
        };
        lanes.iter().map(AsRef::as_ref).for_each(act);
    }

    fn close_all(&self) {
        self.each_lane(|lane| lane.close(Closing::Local));
    }

    fn remove(&self, lane: &Arc<Lane>) {
        let mut lanes = self.lock();
        lanes.shared.retain(|known| !Arc::ptr_eq(known, lane));
        lanes.exclusive.retain(|known| !Arc::ptr_eq(known, lane));
    }

    fn status(&self) -> Vec<LaneStatus> {
        let lanes = self.lock();
        let shared = lanes.shared.iter().map(|lane| (lane, SHARED));
        let exclusive = lanes.exclusive.iter().map(|lane| (lane, EXCLUSIVE));
        let status = |(lane, kind): (&Arc<Lane>, &'static str)| {
            let (streams, takes_streams) = lane.load();
            LaneStatus {
                peer: self.peer.clone(),
                transport: LANES,
                kind,
                streams,
                age: lane.facts.lifetime.opened.elapsed(),
                expires: lane.facts.lifetime.not_after,
                is_draining: !takes_streams,
                tls: lane.facts.session.clone(),
                packet: None,
            }
        };
        shared.chain(exclusive).map(status).collect()
    }
}

/// The same failure for someone else who waited for it.
pub(super) fn copy(error: &OpenError) -> OpenError {
    match error {
        OpenError::Dial(error) => OpenError::Dial(io::Error::new(error.kind(), error.to_string())),
        OpenError::Handshake(refusal) => OpenError::Handshake(*refusal),
        OpenError::Refused(refusal) => OpenError::Refused(*refusal),
        OpenError::Timeout => OpenError::Timeout,
        OpenError::Closed => OpenError::Closed,
        OpenError::Bound(bound) => OpenError::Bound(bound),
    }
}
