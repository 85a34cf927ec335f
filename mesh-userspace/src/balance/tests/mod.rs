//! Groups as the proxy uses them: shares, failures, localities, and simulations in which time is a number.

mod failures;
mod localities;
mod maglev;
mod membership;
mod shares;
mod simulated_failures;
mod simulated_load;
mod simulation;

use super::hash::Draws;
use super::{EndpointId, EndpointStatus, Group, Pick};
use crate::engine::{Endpoint, Locality};
use crate::model::{DefaultAction, Mode, NodeName, ObjectName, SpiffeId, Traffic, Workload, WorkloadUid};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

pub(super) const CALLER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 9, 9));

fn workload() -> Arc<Workload> {
    Arc::new(Workload {
        uid: WorkloadUid::new("uid"),
        name: ObjectName::parse("shop", "cart").unwrap(),
        owner: "cart".into(),
        labels: [].into(),
        identity: SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap(),
        node: NodeName::parse("n1").unwrap(),
        addresses: vec!["10.0.1.2".parse().unwrap()],
        netns: None,
        cgroup: None,
        mode: Mode::Permissive,
        port_modes: [].into(),
        ports: [].into(),
        weight: 100,
        is_terminating: false,
        default_action: DefaultAction::Allow,
    })
}

/// Endpoints with these numbers (as ports), weights and localities.
pub(super) fn endpoints_of(of: impl IntoIterator<Item = (usize, u32, Locality)>) -> Arc<[Endpoint]> {
    let workload = workload();
    let endpoint = |(number, weight, locality)| {
        let (high, low) = (u8::try_from(number >> 16).unwrap(), u16::try_from(number & 0xffff).unwrap());
        Endpoint { workload: Arc::clone(&workload), address: ([10, 1, high, 2], low).into(), weight, locality }
    };
    of.into_iter().map(endpoint).collect()
}

/// Endpoints 0, 1, 2... with these weights.
pub(super) fn weighted(weights: &[u32]) -> Arc<[Endpoint]> {
    endpoints_of(weights.iter().enumerate().map(|(number, weight)| (number, *weight, Locality::Elsewhere)))
}

/// As many endpoints of the usual weight.
pub(super) fn equal(count: usize) -> Arc<[Endpoint]> {
    endpoints_of((0..count).map(|number| (number, 100, Locality::Elsewhere)))
}

pub(super) fn number(endpoint: &Endpoint) -> usize {
    let IpAddr::V4(address) = endpoint.address.ip() else { panic!("a test's endpoint has an IPv4 address") };
    (usize::from(address.octets()[2]) << 16) + usize::from(endpoint.address.port())
}

/// A group, the time in it, and randomness that is the same in each run.
pub(super) struct World {
    pub(super) group: Group,
    pub(super) traffic: Arc<Traffic>,
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) draws: Draws,
}

impl World {
    pub(super) fn new(endpoints: &Arc<[Endpoint]>, traffic: Traffic) -> Self {
        Self::seeded(7, endpoints, traffic)
    }

    pub(super) fn seeded(seed: u64, endpoints: &Arc<[Endpoint]>, traffic: Traffic) -> Self {
        let (now, traffic) = (Instant::now(), Arc::new(traffic));
        let mut group = Group::new(seed);
        group.handle_view(endpoints, &traffic, now);
        Self { group, traffic, start: now, now, draws: Draws::new(11) }
    }

    /// The catalog's next list.
    pub(super) fn follow(&mut self, endpoints: &Arc<[Endpoint]>) {
        self.group.handle_view(endpoints, &self.traffic, self.now);
    }

    pub(super) fn pick(&mut self, tried: &[EndpointId]) -> Pick {
        self.pick_for(CALLER, tried)
    }

    pub(super) fn pick_for(&mut self, caller: IpAddr, tried: &[EndpointId]) -> Pick {
        self.group.pick(caller, tried, self.draws.draw(), self.now).expect("an endpoint takes connections")
    }

    /// A connection that comes and goes at once.
    pub(super) fn visit(&mut self, caller: IpAddr) -> usize {
        let pick = self.pick_for(caller, &[]);
        self.group.handle_connected(pick.id, std::time::Duration::from_millis(1), self.now);
        self.group.handle_closed(pick.id, self.now);
        number(&pick.endpoint)
    }

    /// How often each of the first `count` endpoints was visited in so many visits.
    pub(super) fn visits(&mut self, visits: usize, count: usize) -> Vec<usize> {
        let mut seen = vec![0; count];
        for _ in 0..visits {
            seen[self.visit(CALLER)] += 1;
        }
        seen
    }

    pub(super) fn status(&self, number_wanted: usize) -> EndpointStatus {
        self.group.statuses(self.now).find(|status| number(&status.endpoint) == number_wanted).expect("it is listed")
    }

    /// A connection to this endpoint, however many picks by different callers that takes; the others end at once.
    pub(super) fn pick_at(&mut self, wanted: usize) -> Pick {
        for index in 0..10_000 {
            let pick = self.pick_for(caller(index), &[]);
            if number(&pick.endpoint) == wanted {
                return pick;
            }
            self.group.handle_connected(pick.id, std::time::Duration::from_millis(1), self.now);
            self.group.handle_closed(pick.id, self.now);
        }
        panic!("endpoint {wanted} is never picked");
    }
}

/// An address of its own for each number.
pub(super) fn caller(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(0x0a20_0000 + number))
}
