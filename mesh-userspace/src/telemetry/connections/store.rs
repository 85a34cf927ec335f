//! The bounded store of series behind [`super::ConnectionMetrics`].
//!
//! A series may leave only while no connection uses it. The check needs no lock on the connection's side: whoever
//! enters first announces itself (`users`) and then looks at `retired`; whoever expires first sets `retired` and then
//! looks at `users`. With sequentially consistent operations at least one of the two sees the other.

use super::{EdgeKey, Failure, Limits, Protocol, Reporter, Security, ServiceLabels, Totals};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Upper bounds of the duration histogram in seconds: connections live from a millisecond to days.
pub(super) const DURATION_BOUNDS: [f64; 10] = [0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0];
/// Every bucket, the one without a bound, sum and count.
const SERIES_PER_HISTOGRAM: usize = DURATION_BOUNDS.len() + 3;

/// The labels of a series: its own, or those of the series that take what exceeds the cap.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Labels<K> {
    Own(K),
    Overflow(Reporter),
}

/// An edge without workloads and principals: enough for a histogram, and far fewer of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct LiteKey {
    pub(super) reporter: Reporter,
    pub(super) source_namespace: Arc<str>,
    pub(super) source_canonical_service: Arc<str>,
    pub(super) destination_namespace: Arc<str>,
    pub(super) destination_canonical_service: Arc<str>,
    pub(super) service: ServiceLabels,
    pub(super) protocol: Protocol,
    pub(super) security: Security,
}

impl LiteKey {
    fn of(key: &EdgeKey) -> Self {
        Self {
            reporter: key.reporter,
            source_namespace: key.source.namespace.clone(),
            source_canonical_service: key.source.canonical_service.clone(),
            destination_namespace: key.destination.namespace.clone(),
            destination_canonical_service: key.destination.canonical_service.clone(),
            service: key.service.clone(),
            protocol: key.protocol,
            security: key.security,
        }
    }
}

/// One label set of the duration histogram.
#[derive(Debug)]
pub(super) struct Durations {
    pub(super) labels: Labels<LiteKey>,
    buckets: [AtomicU64; DURATION_BOUNDS.len() + 1],
    sum_micros: AtomicU64,
}

impl Durations {
    fn new(labels: Labels<LiteKey>) -> Self {
        Self { labels, buckets: Default::default(), sum_micros: AtomicU64::new(0) }
    }

    fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = DURATION_BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(DURATION_BOUNDS.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_micros.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Sum in seconds, and each bucket's bound and count (not cumulative).
    pub(super) fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let bounds = DURATION_BOUNDS.into_iter().chain([f64::INFINITY]);
        let buckets = bounds.zip(&self.buckets).map(|(bound, count)| (bound, count.load(Relaxed))).collect();
        (Duration::from_micros(self.sum_micros.load(Relaxed)).as_secs_f64(), buckets)
    }
}

/// The counters of one edge.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) labels: Labels<Arc<EdgeKey>>,
    pub(super) opened: AtomicU64,
    pub(super) closed: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    failed: Mutex<BTreeMap<Failure, u64>>,
    durations: Arc<Durations>,
    /// Connections that are open now.
    users: AtomicU64,
    retired: AtomicBool,
    /// Milliseconds since the store was made.
    last_used: AtomicU64,
}

impl Series {
    fn new(labels: Labels<Arc<EdgeKey>>, durations: Arc<Durations>, last_used: u64) -> Self {
        Self {
            labels,
            durations,
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            failed: Mutex::default(),
            users: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            last_used: AtomicU64::new(last_used),
        }
    }

    fn reporter(&self) -> Reporter {
        match &self.labels {
            Labels::Own(key) => key.reporter,
            Labels::Overflow(reporter) => *reporter,
        }
    }

    fn is_overflow(&self) -> bool {
        matches!(self.labels, Labels::Overflow(_))
    }

    /// It is in the store, and an edge's own.
    pub(super) fn is_current(&self) -> bool {
        !self.is_overflow() && !self.retired.load(Relaxed)
    }

    /// An overflow series appears once it has counted something.
    pub(super) fn is_shown(&self) -> bool {
        !self.is_overflow() || self.opened.load(Relaxed) > 0
    }

    pub(super) fn failures(&self) -> Vec<(Failure, u64)> {
        lock(&self.failed).iter().map(|(failure, count)| (*failure, *count)).collect()
    }
}

/// What exists now, and how often a cap was hit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    pub(super) edges: usize,
    pub(super) failures: usize,
    pub(super) durations: usize,
    pub(super) edges_dropped: u64,
    pub(super) failures_dropped: u64,
    pub(super) durations_dropped: u64,
}

#[derive(Debug, Default)]
struct State {
    edges: HashMap<Arc<EdgeKey>, Arc<Series>>,
    /// With the number of edges that use each.
    durations: HashMap<LiteKey, (Arc<Durations>, usize)>,
    /// What expired series had counted.
    expired: Totals,
}

#[derive(Debug)]
pub(super) struct Store {
    limits: Limits,
    started: Instant,
    state: Mutex<State>,
    /// Series of the failure family, those of overflow not counted.
    failures: AtomicUsize,
    overflow: [Arc<Series>; 2],
    active: [AtomicU64; 2],
    edges_dropped: AtomicU64,
    failures_dropped: AtomicU64,
    durations_dropped: AtomicU64,
}

impl Store {
    pub(super) fn new(limits: Limits) -> Self {
        let overflow = Reporter::ALL.map(|reporter| {
            let durations = Arc::new(Durations::new(Labels::Overflow(reporter)));
            Arc::new(Series::new(Labels::Overflow(reporter), durations, 0))
        });
        Self {
            limits,
            started: Instant::now(),
            state: Mutex::default(),
            failures: AtomicUsize::new(0),
            overflow,
            active: Default::default(),
            edges_dropped: AtomicU64::new(0),
            failures_dropped: AtomicU64::new(0),
            durations_dropped: AtomicU64::new(0),
        }
    }

    /// The series of `key`, made if there is room, else the overflow series.
    pub(super) fn intern(&self, key: &Arc<EdgeKey>) -> Arc<Series> {
        self.intern_locked(&mut lock(&self.state), key, self.millis(Instant::now()))
    }

    fn intern_locked(&self, state: &mut State, key: &Arc<EdgeKey>, now: u64) -> Arc<Series> {
        if let Some(series) = state.edges.get(key) {
            return series.clone();
        }
        if state.edges.len() >= self.limits.series {
            return self.overflow[key.reporter as usize].clone();
        }
        let durations = self.durations_locked(state, key);
        let series = Arc::new(Series::new(Labels::Own(key.clone()), durations, now));
        state.edges.insert(key.clone(), series.clone());
        series
    }

    fn durations_locked(&self, state: &mut State, key: &EdgeKey) -> Arc<Durations> {
        let lite = LiteKey::of(key);
        if let Some((durations, edges)) = state.durations.get_mut(&lite) {
            *edges += 1;
            return durations.clone();
        }
        if state.durations.len() >= self.limits.series / SERIES_PER_HISTOGRAM {
            self.durations_dropped.fetch_add(1, Relaxed);
            return self.overflow[key.reporter as usize].durations.clone();
        }
        let durations = Arc::new(Durations::new(Labels::Own(lite.clone())));
        state.durations.insert(lite, (durations.clone(), 1));
        durations
    }

    /// Counts an opened connection on the handle's series, or on its successor if it has expired meanwhile.
    pub(super) fn enter(&self, key: &Arc<EdgeKey>, cached: &Arc<Series>, now: Instant) -> Arc<Series> {
        let now = self.millis(now);
        let series = Self::announce(cached).unwrap_or_else(|| {
            let mut state = lock(&self.state);
            let series = self.intern_locked(&mut state, key, now);
            series.users.fetch_add(1, SeqCst);
            series
        });
        if series.is_overflow() {
            self.edges_dropped.fetch_add(1, Relaxed);
        }
        series.last_used.fetch_max(now, Relaxed);
        series.opened.fetch_add(1, Relaxed);
        self.active[series.reporter() as usize].fetch_add(1, Relaxed);
        series
    }

    /// Uses the cached series if it is still in the store. An overflow series is looked up anew: there may be room.
    fn announce(cached: &Arc<Series>) -> Option<Arc<Series>> {
        if cached.is_overflow() {
            return None;
        }
        cached.users.fetch_add(1, SeqCst);
        if cached.retired.load(SeqCst) {
            cached.users.fetch_sub(1, SeqCst);
            return None;
        }
        Some(cached.clone())
    }

    pub(super) fn leave(&self, series: &Series, duration: Duration, now: Instant) {
        series.durations.observe(duration);
        series.closed.fetch_add(1, Relaxed);
        self.active[series.reporter() as usize].fetch_sub(1, Relaxed);
        series.last_used.fetch_max(self.millis(now), Relaxed);
        series.users.fetch_sub(1, SeqCst);
    }

    pub(super) fn fail(&self, series: &Series, failure: Failure) {
        let mut own = lock(&series.failed);
        if let Some(count) = own.get_mut(&failure) {
            *count += 1;
        } else if series.is_overflow() || self.take_failure_series() {
            own.insert(failure, 1);
        } else {
            drop(own);
            self.failures_dropped.fetch_add(1, Relaxed);
            *lock(&self.overflow[series.reporter() as usize].failed).entry(failure).or_default() += 1;
        }
    }

    fn take_failure_series(&self) -> bool {
        self.failures.try_update(Relaxed, Relaxed, |used| (used < self.limits.series).then_some(used + 1)).is_ok()
    }

    pub(super) fn expire(&self, now: Instant) -> usize {
        let now = self.millis(now);
        let idle = u64::try_from(self.limits.idle.as_millis()).unwrap_or(u64::MAX);
        let mut state = lock(&self.state);
        let State { edges, durations, expired } = &mut *state;
        let before = edges.len();
        edges.retain(|_, series| {
            if now.saturating_sub(series.last_used.load(Relaxed)) < idle || !retire(series) {
                return true;
            }
            let failures = series.failures();
            self.failures.fetch_sub(failures.len(), Relaxed);
            add(expired, series, &failures);
            release(durations, &series.durations);
            false
        });
        before - edges.len()
    }

    /// The series that exist, then those of overflow, in the order of their labels.
    pub(super) fn edges(&self) -> Vec<Arc<Series>> {
        let mut all: Vec<_> = lock(&self.state).edges.values().cloned().collect();
        all.extend(self.overflow.iter().cloned());
        all.sort_unstable_by(|a, b| a.labels.cmp(&b.labels));
        all
    }

    pub(super) fn durations(&self) -> Vec<Arc<Durations>> {
        let mut all: Vec<_> = lock(&self.state).durations.values().map(|(durations, _)| durations.clone()).collect();
        let used = |durations: &Durations| durations.buckets.iter().any(|bucket| bucket.load(Relaxed) > 0);
        all.extend(self.overflow.iter().map(|series| series.durations.clone()).filter(|durations| used(durations)));
        all.sort_unstable_by(|a, b| a.labels.cmp(&b.labels));
        all
    }

    pub(super) fn active(&self, reporter: Reporter) -> u64 {
        self.active[reporter as usize].load(Relaxed)
    }

    pub(super) fn sizes(&self) -> Sizes {
        let state = lock(&self.state);
        Sizes {
            edges: state.edges.len(),
            failures: self.failures.load(Relaxed),
            durations: state.durations.len() * SERIES_PER_HISTOGRAM,
            edges_dropped: self.edges_dropped.load(Relaxed),
            failures_dropped: self.failures_dropped.load(Relaxed),
            durations_dropped: self.durations_dropped.load(Relaxed),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        let state = lock(&self.state);
        let mut totals = state.expired;
        for series in state.edges.values().chain(&self.overflow) {
            add(&mut totals, series, &series.failures());
        }
        totals.active = Reporter::ALL.into_iter().map(|reporter| self.active(reporter)).sum();
        totals
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }
}

/// Takes a series out of use, unless a connection uses it.
fn retire(series: &Series) -> bool {
    series.retired.store(true, SeqCst);
    let unused = series.users.load(SeqCst) == 0;
    if !unused {
        series.retired.store(false, SeqCst);
    }
    unused
}

/// Removes the histogram with the last edge that feeds it.
fn release(durations: &mut HashMap<LiteKey, (Arc<Durations>, usize)>, used: &Durations) {
    let Labels::Own(lite) = &used.labels else { return };
    if let Some((_, edges)) = durations.get_mut(lite) {
        *edges -= 1;
        if *edges == 0 {
            durations.remove(lite);
        }
    }
}

fn add(totals: &mut Totals, series: &Series, failures: &[(Failure, u64)]) {
    totals.opened += series.opened.load(Relaxed);
    totals.closed += series.closed.load(Relaxed);
    totals.failed += failures.iter().map(|(_, count)| count).sum::<u64>();
    totals.sent += series.sent.load(Relaxed);
    totals.received += series.received.load(Relaxed);
}

/// A panic elsewhere must not stop the counting: every critical section here leaves the maps consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
