//! Picking an endpoint, and telling what became of it: a hundred connections, one after the other.

use super::Subject;
use super::catalog::workload;
use mesh_userspace::balance::Group;
use mesh_userspace::engine::{Endpoint, Locality};
use mesh_userspace::model::{Algorithm, Traffic};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CONNECTIONS: u32 = 100;
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConnections, Algorithm::PeakEwma, Algorithm::Maglev];

pub(super) fn subjects() -> Vec<Subject> {
    let sized = ALGORITHMS.into_iter().flat_map(|algorithm| [10, 1_000].map(|endpoints| (algorithm, endpoints)));
    sized.map(|(algorithm, endpoints)| subject(algorithm, endpoints)).collect()
}

fn subject(algorithm: Algorithm, count: u32) -> Subject {
    let workload = Arc::new(workload(0, 1));
    let endpoint = |number: u32| {
        let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 1)) + number);
        let address = SocketAddr::new(IpAddr::V4(address), 8080);
        Endpoint { workload: Arc::clone(&workload), address, weight: 100, locality: Locality::Elsewhere }
    };
    let endpoints: Arc<[Endpoint]> = (0..count).map(endpoint).collect();
    let traffic = Arc::new(Traffic { algorithm, ..Traffic::default() });
    let (mut group, mut now, mut draws) = (Group::new(7), Instant::now(), Draws(11));
    group.handle_view(&endpoints, &traffic, now);
    Subject::new(format!("pick/{}/{count}_endpoints", algorithm.as_str()), move || {
        for caller in 0..CONNECTIONS {
            // The group is asked about its list with each connection, as the proxy does.
            group.handle_view(&endpoints, &traffic, now);
            let caller = IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 9, 0)) + caller));
            let pick = group.pick(caller, &[], draws.next(), now).expect("an endpoint takes connections");
            let latency = Duration::from_micros(200 + draws.next() % 100);
            now += latency;
            group.handle_connected(pick.id, latency, now);
            group.handle_first_byte(pick.id, latency, now);
            group.handle_closed(black_box(pick.id), now);
        }
    })
}

/// Evenly spread numbers, the same in each run: a counter through `SplitMix64`'s finish.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}
