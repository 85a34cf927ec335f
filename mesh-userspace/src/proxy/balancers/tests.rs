//! Groups of the small mesh's service, which has the same port for TCP and UDP.

use super::super::fixture::{catalog, name, snapshot, workload};
use super::*;
use crate::balance::EjectionCause;
use crate::model::{
    Affinity, Algorithm, Ejection, Limits, Service, ServicePort, TargetPort, TrafficPolicy, TrafficSpec,
};
use std::io::ErrorKind;
use std::net::Ipv4Addr;

const CALLER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

fn frontend(protocol: Protocol) -> Frontend {
    Frontend { address: "10.96.0.1:80".parse().unwrap(), protocol }
}

/// Two replicas behind the service, with these settings.
fn mesh(affinity: Affinity, spec: TrafficSpec) -> ArcSwap<Snapshot> {
    let mut catalog = catalog();
    let mut second = workload("server-2", "10.0.0.4");
    second.labels.insert("app".to_owned(), "server".to_owned());
    catalog.workloads.insert(second.name.clone(), second.into());
    let mut service = Service::clone(&catalog.services[&name("server")]);
    service.affinity = affinity;
    let target = TargetPort::Number(8080);
    service.ports.push(ServicePort { name: "udp".into(), port: 80, protocol: Protocol::Udp, target });
    catalog.services.insert(service.name.clone(), service.into());
    let policy = TrafficPolicy { name: name("server"), services: vec![name("server")], spec };
    catalog.traffic.insert(policy.name.clone(), policy.into());
    ArcSwap::new(snapshot(catalog))
}

fn pick(balancers: &Balancers, snapshots: &ArcSwap<Snapshot>, protocol: Protocol) -> Result<Picked, Exhausted> {
    balancers.pick(snapshots, frontend(protocol), CALLER, Among::Untried(&[])).expect("it is a frontend")
}

#[test]
fn tcp_and_udp_of_one_port_share_no_limit_and_no_state() {
    let limits = Limits { max_connections: Some(1), max_pending: None };
    let (balancers, snapshots) =
        (Balancers::default(), mesh(Affinity::None, TrafficSpec { limits: Some(limits), ..Default::default() }));
    let held = pick(&balancers, &snapshots, Protocol::Tcp).unwrap();
    assert!(matches!(pick(&balancers, &snapshots, Protocol::Tcp), Err(Exhausted::MaxConnections)));
    let flow = pick(&balancers, &snapshots, Protocol::Udp).unwrap();
    assert!(matches!(pick(&balancers, &snapshots, Protocol::Udp), Err(Exhausted::MaxConnections)));
    drop(held);
    assert!(pick(&balancers, &snapshots, Protocol::Tcp).is_ok());
    let protocols: Vec<_> = balancers.statuses().iter().map(|status| status.frontend.protocol).collect();
    assert_eq!(protocols, [Protocol::Tcp, Protocol::Udp]);
    drop(flow);
    assert!(pick(&balancers, &snapshots, Protocol::Udp).is_ok());
}

#[test]
fn a_caller_with_affinity_stays_over_all_of_its_sockets() {
    let affinity = Affinity::ClientIp(Duration::from_secs(60));
    let (balancers, snapshots) = (Balancers::default(), mesh(affinity, TrafficSpec::default()));
    let address = |picked: Picked| picked.endpoint.address;
    let first = address(pick(&balancers, &snapshots, Protocol::Udp).unwrap());
    for _ in 0..20 {
        assert_eq!(address(pick(&balancers, &snapshots, Protocol::Udp).unwrap()), first);
    }
}

#[test]
fn an_endpoint_with_nobody_at_its_port_is_ejected_and_one_that_has_answered_is_not() {
    let ejection = Ejection { consecutive_failures: 2, ..Ejection::default() };
    let spec = TrafficSpec { algorithm: Some(Algorithm::RoundRobin), ejection: Some(ejection), ..Default::default() };
    let (balancers, snapshots) = (Balancers::default(), mesh(Affinity::None, spec));
    let refused = Failure::Application(ErrorKind::ConnectionRefused.into());
    let bad: SocketAddr = "10.0.0.4:8080".parse().unwrap();
    for _ in 0..8 {
        let mut flow = pick(&balancers, &snapshots, Protocol::Udp).unwrap();
        flow.attempt.connected();
        if flow.endpoint.address != bad {
            flow.attempt.answered(Duration::from_millis(1));
        }
        flow.attempt.broke(&refused);
    }
    let status = &balancers.statuses()[0];
    let ejected: Vec<_> = status
        .endpoints
        .iter()
        .map(|endpoint| (endpoint.endpoint.address == bad, endpoint.ejected.map(|(_, cause)| cause)))
        .collect();
    assert_eq!(ejected, [(false, None), (true, Some(EjectionCause::Reset))]);
    assert!(status.endpoints.iter().all(|endpoint| endpoint.open == 0), "{status:?}");
}

#[test]
fn a_group_goes_with_its_frontend() {
    let (balancers, snapshots) = (Balancers::default(), mesh(Affinity::None, TrafficSpec::default()));
    drop(pick(&balancers, &snapshots, Protocol::Udp).unwrap());
    // The service has no UDP port any more.
    snapshots.store(snapshot(catalog()));
    balancers.follow(&snapshots);
    assert!(balancers.statuses().is_empty());
    assert!(balancers.pick(&snapshots, frontend(Protocol::Udp), CALLER, Among::Untried(&[])).is_none());
    assert!(balancers.sums().0.picks >= 1, "what it has counted is kept");
}
