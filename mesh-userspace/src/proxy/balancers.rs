//! The balancing state of every frontend that is used, and what its connections tell it.
//!
//! A group follows the catalog under its own lock and always reads the latest snapshot there, so that a connection that
//! began with an older one cannot take it back.

use super::Failure;
use crate::balance::{CALLERS_MAX, Counts, EndpointId, EndpointStatus, Exhausted, Group, Levels};
use crate::engine::{Endpoint, FrontendView, Snapshot};
use crate::model::{ObjectName, Protocol, Service, Traffic};
use crate::runtime::Level;
use crate::tunnel::{OpenError, Refusal};
use arc_swap::ArcSwap;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a group is of: a service's virtual address and port. TCP and UDP share neither endpoints' state nor limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    pub address: SocketAddr,
    pub protocol: Protocol,
}

impl Frontend {
    fn view(self, snapshot: &Snapshot) -> Option<&FrontendView> {
        snapshot.frontend_of(self.protocol, self.address)
    }
}

/// The groups, one a frontend. Cheap to clone.
#[derive(Clone, Default)]
pub struct Balancers(Arc<Table>);

#[derive(Default)]
struct Table {
    /// Never more than the catalog has frontends; see [`Balancers::follow`].
    groups: Mutex<HashMap<Frontend, Arc<Balancer>>>,
    /// What groups have counted whose frontends are gone.
    retired: Mutex<Counts>,
}

/// The group of one frontend.
struct Balancer {
    frontend: Frontend,
    service: ObjectName,
    state: Mutex<State>,
}

struct State {
    group: Group,
    /// What the group was last told; `None` at first.
    view: Option<(Arc<[Endpoint]>, Arc<Traffic>)>,
    /// Endpoints whose nodes have said that they do not pass their health check, and until when that is believed.
    told_unhealthy: Vec<(EndpointId, Instant)>,
}

/// Which endpoints there is a choice of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Among<'a> {
    /// All but those at which the connection has failed.
    Untried(&'a [EndpointId]),
    /// Those of other nodes: the kernel has chosen against this one.
    Elsewhere,
}

/// An endpoint for one connection.
pub(super) struct Picked {
    pub(super) service: Arc<Service>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) endpoint: Endpoint,
    pub(super) attempt: Attempt,
}

/// One frontend's group, for people.
#[derive(Clone, Debug)]
pub struct BalancerStatus {
    pub frontend: Frontend,
    pub service: ObjectName,
    pub endpoints: Vec<EndpointStatus>,
    /// When the statuses were taken: their moments are relative to this one.
    pub now: Instant,
}

impl Balancers {
    /// Picks an endpoint for a connection, or a flow of datagrams, to a frontend; `None` if the destination is none.
    pub(super) fn pick(
        &self,
        snapshots: &ArcSwap<Snapshot>,
        destination: Frontend,
        caller: IpAddr,
        among: Among<'_>,
    ) -> Option<Result<Picked, Exhausted>> {
        let balancer = self.balancer(snapshots, destination)?;
        let now = Instant::now();
        let mut state = balancer.lock();
        let snapshot = snapshots.load();
        let frontend = destination.view(&snapshot)?;
        state.refresh(frontend, now);
        let picked = match among {
            Among::Untried(tried) => state.group.pick(caller, tried, rand::random(), now),
            Among::Elsewhere => state.group.pick_elsewhere(caller, rand::random(), now),
        };
        drop(state);
        Some(picked.map(|pick| Picked {
            service: frontend.service.clone(),
            traffic: frontend.traffic.clone(),
            endpoint: pick.endpoint,
            attempt: Attempt {
                balancer,
                id: pick.id,
                began: now,
                stage: Stage::Pending,
                has_answered: AtomicBool::new(false),
            },
        }))
    }

    fn balancer(&self, snapshots: &ArcSwap<Snapshot>, destination: Frontend) -> Option<Arc<Balancer>> {
        let mut groups = lock(&self.0.groups);
        // Read under the lock: a group cannot be added again after `follow` has dropped it.
        let snapshot = snapshots.load();
        let frontend = destination.view(&snapshot)?;
        let service = &frontend.service.name;
        if let Some(known) = groups.get(&destination).filter(|known| known.service == *service) {
            return Some(known.clone());
        }
        let state = State { group: Group::new(rand::random()), view: None, told_unhealthy: Vec::new() };
        let balancer = Arc::new(Balancer { frontend: destination, service: service.clone(), state: Mutex::new(state) });
        if let Some(left) = groups.insert(destination, balancer.clone()) {
            self.retire(&left);
        }
        Some(balancer)
    }

    /// Brings the groups in line with the latest snapshot; those of frontends that are gone are dropped.
    pub fn follow(&self, snapshots: &ArcSwap<Snapshot>) {
        let now = Instant::now();
        let mut kept = Vec::new();
        lock(&self.0.groups).retain(|frontend, balancer| {
            let snapshot = snapshots.load();
            let stays = frontend.view(&snapshot).is_some_and(|view| view.service.name == balancer.service);
            if stays {
                kept.push(balancer.clone());
            } else {
                self.retire(balancer);
            }
            stays
        });
        for balancer in kept {
            let mut state = balancer.lock();
            if let Some(view) = balancer.frontend.view(&snapshots.load()) {
                state.refresh(view, now);
            }
        }
    }

    fn retire(&self, balancer: &Balancer) {
        let counts = balancer.lock().group.counts();
        add(&mut lock(&self.0.retired), &counts);
    }

    /// What all groups have counted, those that are gone included, and how full those are that exist.
    #[must_use]
    pub fn sums(&self) -> (Counts, Vec<Levels>) {
        let now = Instant::now();
        // Before the groups: one that retires meanwhile must not be counted twice.
        let mut counts = *lock(&self.0.retired);
        let balancers: Vec<_> = lock(&self.0.groups).values().cloned().collect();
        let levels = balancers.iter().map(|balancer| {
            let state = balancer.lock();
            add(&mut counts, &state.group.counts());
            state.group.levels(now)
        });
        let levels = levels.collect();
        (counts, levels)
    }

    /// How full the fullest group's memory of callers is.
    #[must_use]
    pub fn level(&self) -> Level {
        let (counts, levels) = self.sums();
        let used = levels.iter().map(|level| u64::from(level.callers)).max().unwrap_or(0);
        let (capacity, hits) = (CALLERS_MAX as u64, counts.callers_forgotten);
        Level { bound: "affinity_callers_per_frontend", used, capacity, hits }
    }

    /// Every group that is in use, in the order of services and frontends.
    #[must_use]
    pub fn statuses(&self) -> Vec<BalancerStatus> {
        let mut balancers: Vec<_> = lock(&self.0.groups).values().cloned().collect();
        balancers.sort_by(|a, b| (&a.service, a.frontend).cmp(&(&b.service, b.frontend)));
        let now = Instant::now();
        let status = |balancer: Arc<Balancer>| BalancerStatus {
            frontend: balancer.frontend,
            service: balancer.service.clone(),
            endpoints: balancer.lock().group.statuses(now).collect(),
            now,
        };
        balancers.into_iter().map(status).collect()
    }
}

impl Balancer {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    fn refresh(&mut self, frontend: &FrontendView, now: Instant) {
        let (endpoints, traffic) = (&frontend.endpoints, &frontend.traffic);
        let is_known = self.view.as_ref().is_some_and(|(known_endpoints, known_traffic)| {
            Arc::ptr_eq(known_endpoints, endpoints) && Arc::ptr_eq(known_traffic, traffic)
        });
        if !is_known {
            self.group.handle_view(endpoints, traffic, now);
            self.view = Some((endpoints.clone(), traffic.clone()));
        }
        self.doubt_what_was_told(now);
    }

    /// An endpoint's node says that it does not pass its health check: believed for one interval, then a connection asks
    /// again, and is moved if the answer is the same.
    fn handle_unhealthy(&mut self, id: EndpointId, now: Instant) {
        let check = self.view.as_ref().and_then(|(_, traffic)| traffic.health_check.clone());
        let Some(check) = check else { return };
        for _ in 0..check.unhealthy_after {
            self.group.handle_probe(id, false, now);
        }
        self.told_unhealthy.retain(|(known, _)| *known != id);
        self.told_unhealthy.push((id, now + check.interval));
    }

    fn doubt_what_was_told(&mut self, now: Instant) {
        if self.told_unhealthy.is_empty() {
            return;
        }
        let healthy_after = self.view.as_ref().and_then(|(_, traffic)| traffic.health_check.as_ref());
        let healthy_after = healthy_after.map_or(1, |check| check.healthy_after);
        let group = &mut self.group;
        self.told_unhealthy.retain(|(id, until)| {
            let is_over = *until <= now;
            for _ in 0..if is_over { healthy_after } else { 0 } {
                group.handle_probe(*id, true, now);
            }
            !is_over
        });
    }
}

/// How far an attempt has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Pending,
    Connected,
    Failed,
}

/// One connection at one endpoint: the group hears what becomes of it, also if it is dropped.
pub(super) struct Attempt {
    balancer: Arc<Balancer>,
    id: EndpointId,
    began: Instant,
    stage: Stage,
    has_answered: AtomicBool,
}

impl Attempt {
    pub(super) fn id(&self) -> EndpointId {
        self.id
    }

    /// The endpoint took the connection.
    pub(super) fn connected(&mut self) {
        let now = Instant::now();
        self.stage = Stage::Connected;
        self.balancer.lock().group.handle_connected(self.id, now.duration_since(self.began), now);
    }

    /// The endpoint's first bytes came, so long after it was asked.
    pub(super) fn answered(&self, after: Duration) {
        self.has_answered.store(true, Relaxed);
        self.balancer.lock().group.handle_first_byte(self.id, after, Instant::now());
    }

    /// The connection failed; what does not speak against the endpoint is only its end.
    pub(super) fn broke(&mut self, failure: &Failure) {
        let now = Instant::now();
        let mut state = self.balancer.lock();
        match self.stage {
            Stage::Pending => {
                if let Some(blamed) = failure.blames_endpoint() {
                    self.stage = Stage::Failed;
                    state.group.handle_failed(self.id, blamed, now);
                } else if matches!(failure, Failure::Open(OpenError::Refused(Refusal::Unhealthy))) {
                    state.handle_unhealthy(self.id, now);
                }
            }
            Stage::Connected => {
                // Of a flow of datagrams: nobody has the port.
                let is_refused = matches!(failure, Failure::Application(_));
                let is_reset = is_refused || matches!(failure, Failure::Remote(_)) && failure.is_retriable();
                if is_reset && !self.has_answered.load(Relaxed) {
                    state.group.handle_reset(self.id, now);
                }
            }
            Stage::Failed => {}
        }
    }

    /// Takes another attempt at another endpoint from the service's budget.
    pub(super) fn may_retry(&self) -> Result<(), Exhausted> {
        self.balancer.lock().group.handle_retry(Instant::now())
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let now = Instant::now();
        match self.stage {
            Stage::Pending => self.balancer.lock().group.handle_cancelled(self.id, now),
            Stage::Connected => self.balancer.lock().group.handle_closed(self.id, now),
            Stage::Failed => {}
        }
    }
}

fn add(sum: &mut Counts, more: &Counts) {
    let Counts {
        picks,
        ejections,
        ejections_withheld,
        panics,
        failovers,
        passed_over,
        retries,
        exhausted,
        callers_forgotten,
    } = more;
    sum.picks += picks;
    sum.ejections_withheld += ejections_withheld;
    sum.panics += panics;
    sum.failovers += failovers;
    sum.passed_over += passed_over;
    sum.retries += retries;
    sum.callers_forgotten += callers_forgotten;
    sum.ejections.iter_mut().zip(ejections).for_each(|(sum, more)| *sum += more);
    sum.exhausted.iter_mut().zip(exhausted).for_each(|(sum, more)| *sum += more);
}

/// Every critical section here leaves its table whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
