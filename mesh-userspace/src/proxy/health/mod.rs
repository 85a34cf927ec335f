//! Active health checks. A daemon probes the endpoints of its own node, from inside their namespaces, for services whose
//! TrafficPolicy asks for it; streams to what does not pass are refused, so that their sources go elsewhere. Nobody
//! probes across nodes: a probe needs no identity, and its cost does not grow with the number of nodes.

mod probe;

use super::{Context, Dialler, LocalWorkload};
use crate::balance::Probes;
use crate::engine::Snapshot;
use crate::model::{HealthCheck, ObjectName, Protocol};
use crate::runtime::Descriptor;
use arc_swap::ArcSwap;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

/// The first probes of a node's endpoints are spread over at most this.
const SPREAD: Duration = Duration::from_secs(1);

/// An endpoint of a service on this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    service: ObjectName,
    endpoint: SocketAddr,
}

#[derive(Debug, Default)]
struct State {
    /// Seldom changed, asked for every stream.
    unhealthy: ArcSwap<HashSet<Place>>,
    probed: AtomicUsize,
}

/// What the probes of this node's endpoints say. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct EndpointHealth(Arc<State>);

impl EndpointHealth {
    pub(super) fn is_unhealthy(&self, service: &ObjectName, endpoint: SocketAddr) -> bool {
        let unhealthy = self.0.unhealthy.load();
        !unhealthy.is_empty() && unhealthy.contains(&Place { service: service.clone(), endpoint })
    }

    /// Endpoints that are probed, and how many of them do not pass.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.0.probed.load(Relaxed), self.0.unhealthy.load().len())
    }

    fn set(&self, place: &Place, is_healthy: bool) {
        if is_healthy != self.0.unhealthy.load().contains(place) {
            return;
        }
        self.0.unhealthy.rcu(|unhealthy| {
            let mut next = HashSet::clone(unhealthy);
            if is_healthy {
                next.remove(place);
            } else {
                next.insert(place.clone());
            }
            next
        });
    }
}

/// One endpoint's check, running.
struct Running {
    check: HealthCheck,
    local: Weak<LocalWorkload>,
    _task: AbortOnDropHandle<()>,
    /// For its probes, one at a time.
    _descriptor: Descriptor,
}

/// The checks of this node: as many as the services that ask for them have endpoints here.
pub struct HealthChecks {
    context: Arc<Context>,
    dialler: Dialler,
    running: HashMap<Place, Running>,
    /// What `running` follows from.
    seen: (Arc<Snapshot>, Vec<Weak<LocalWorkload>>),
}

impl HealthChecks {
    #[must_use]
    pub fn new(dialler: Dialler) -> Self {
        Self { context: dialler.context.clone(), dialler, running: HashMap::new(), seen: Default::default() }
    }

    /// Starts and stops checks as the snapshot and the armed workloads say. Costs next to nothing if neither changed.
    pub fn follow(&mut self, snapshot: &Arc<Snapshot>) {
        let armed = self.context.locals.all();
        let (known, known_armed) = &self.seen;
        let same = armed.len() == known_armed.len()
            && armed.iter().zip(known_armed).all(|(local, known)| Arc::as_ptr(local) == known.as_ptr());
        if same && Arc::ptr_eq(snapshot, known) {
            return;
        }
        let wanted = wanted(snapshot, &armed);
        let health = &self.context.health;
        self.running.retain(|place, running| {
            let stays = wanted
                .get(place)
                .is_some_and(|(check, local)| **check == running.check && Arc::as_ptr(local) == running.local.as_ptr());
            if !stays {
                health.set(place, true);
            }
            stays
        });
        for (place, (check, local)) in wanted {
            self.running.entry(place).or_insert_with_key(|place| {
                let watch = Watch {
                    place: place.clone(),
                    check: check.clone(),
                    dialler: self.dialler.clone(),
                    local: local.clone(),
                };
                let task = AbortOnDropHandle::new(tokio::spawn(watch.run()));
                Running {
                    check: check.clone(),
                    local: Arc::downgrade(local),
                    _task: task,
                    _descriptor: self.context.budget.for_daemon(1),
                }
            });
        }
        health.0.probed.store(self.running.len(), Relaxed);
        self.seen = (snapshot.clone(), armed.iter().map(Arc::downgrade).collect());
    }
}

fn wanted<'a>(
    snapshot: &'a Snapshot,
    armed: &'a [Arc<LocalWorkload>],
) -> HashMap<Place, (&'a HealthCheck, &'a Arc<LocalWorkload>)> {
    let armed: HashMap<_, _> = armed.iter().map(|local| (&local.workload.uid, local)).collect();
    let mut wanted = HashMap::new();
    for frontend in snapshot.frontends().values() {
        let Some(check) = &frontend.traffic.health_check else { continue };
        if frontend.port.protocol != Protocol::Tcp {
            continue;
        }
        for endpoint in frontend.endpoints.iter() {
            if let Some(local) = armed.get(&endpoint.workload.uid) {
                let place = Place { service: frontend.service.name.clone(), endpoint: endpoint.address };
                wanted.insert(place, (check, *local));
            }
        }
    }
    wanted
}

/// Probes one endpoint until its workload is removed.
struct Watch {
    place: Place,
    check: HealthCheck,
    dialler: Dialler,
    local: Arc<LocalWorkload>,
}

impl Watch {
    async fn run(self) {
        let removed = self.local.removed.token().clone();
        tokio::select! {
            () = self.probe_for_ever() => {}
            () = removed.cancelled() => {}
        }
    }

    async fn probe_for_ever(&self) {
        tokio::time::sleep(SPREAD.min(self.check.interval).mul_f64(rand::random())).await;
        let mut interval = tokio::time::interval(self.check.interval);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probes = Probes::default();
        loop {
            interval.tick().await;
            let outcome = probe::probe(&self.dialler, &self.local, self.place.endpoint, &self.check).await;
            let result = outcome.map_or_else(probe::Unhealthy::reason, |()| "healthy");
            self.dialler.context.balance.probed(result);
            if !probes.handle(outcome.is_ok(), &self.check) {
                continue;
            }
            self.dialler.context.health.set(&self.place, outcome.is_ok());
            let (service, endpoint) = (&self.place.service, self.place.endpoint);
            tracing::info!(%service, %endpoint, result, "an endpoint's health has changed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_unhealthy_for_the_service_that_says_so_alone() {
        let health = EndpointHealth::default();
        let name = |name| ObjectName::parse("shop", name).unwrap();
        let place = Place { service: name("web"), endpoint: "10.0.0.2:80".parse().unwrap() };
        health.set(&place, true);
        assert_eq!(health.counts(), (0, 0));
        health.set(&place, false);
        assert!(health.is_unhealthy(&name("web"), place.endpoint));
        assert!(!health.is_unhealthy(&name("api"), place.endpoint));
        assert!(!health.is_unhealthy(&name("web"), "10.0.0.2:81".parse().unwrap()));
        assert_eq!(health.counts(), (0, 1));
        health.set(&place, true);
        assert!(!health.is_unhealthy(&name("web"), place.endpoint));
    }
}
