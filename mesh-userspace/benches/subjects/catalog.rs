//! Objects of a catalog, as many as asked for.

use ipnet::IpNet;
use mesh_userspace::engine::Engine;
use mesh_userspace::model::{
    Affinity, AuthorizationPolicy, Catalog, DefaultAction, Mode, Node, NodeName, ObjectName, PolicyAction,
    PolicyTarget, Prefer, Protocol, Rule, Service, ServicePort, Source, SpiffeId, TargetPort, Update, Workload,
    WorkloadUid,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

/// The node whose tables are computed.
const NODE: &str = "n1";

fn name(name: &str) -> ObjectName {
    ObjectName::parse("shop", name).expect("it is a name")
}

pub(super) fn node_name(name: &str) -> NodeName {
    NodeName::parse(name).expect("it is a name")
}

pub(super) fn identity(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/ns/shop/sa/{account}")).expect("it is an id")
}

/// A workload on this node or another, with an address of its own, that the service of the same number selects.
pub(super) fn workload(service: u32, index: u32) -> Workload {
    let called = format!("w{service}-{index}");
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 1)) + (service << 8) + index);
    Workload {
        uid: WorkloadUid::new(&called),
        name: name(&called),
        owner: called.as_str().into(),
        labels: BTreeMap::from([("app".to_owned(), format!("s{service}"))]),
        identity: identity(&format!("s{service}")),
        node: node_name(if index == 0 { NODE } else { "n2" }),
        addresses: vec![IpAddr::V4(address)],
        netns: Some("/run/netns/x".into()),
        cgroup: None,
        mode: Mode::Strict,
        port_modes: BTreeMap::new(),
        ports: BTreeMap::new(),
        weight: 100,
        is_terminating: false,
        default_action: DefaultAction::Deny,
    }
}

fn service(number: u32) -> Service {
    let vip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 1)) + number);
    let port = ServicePort { name: "http".into(), port: 80, protocol: Protocol::Tcp, target: TargetPort::Number(8080) };
    Service {
        name: name(&format!("s{number}")),
        vips: vec![IpAddr::V4(vip)],
        ports: vec![port],
        selector: BTreeMap::from([("app".to_owned(), format!("s{number}"))]),
        prefer: Prefer::Nobody,
        affinity: Affinity::None,
    }
}

/// A policy for the workloads of service 0 with some rules; each allows one account and one range of addresses.
fn policy(number: u32, rules: u32) -> AuthorizationPolicy {
    let rule = |index: u32| {
        let account = format!("caller-{number}-{index}");
        let range = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + (number << 12) + (index << 4));
        let range = IpNet::new(IpAddr::V4(range), 28).expect("28 is a prefix length");
        let account = Source::ServiceAccount { namespace: "shop".into(), name: Some(account.into()) };
        Rule { name: index.to_string().into(), sources: Some(vec![account, Source::Range(range)]), ports: vec![8080] }
    };
    AuthorizationPolicy {
        name: name(&format!("p{number:03}")),
        targets: vec![PolicyTarget::Service("s0".into())],
        action: PolicyAction::Allow,
        dry_run: false,
        rules: (0..rules).map(rule).collect(),
    }
}

/// An engine that knows services of two workloads each, and policies for the first of them.
pub(super) fn engine(services: u32, policies: u32, rules: u32) -> Engine {
    let node = |called: &str| {
        let name = node_name(called);
        let node = Node { name: name.clone(), addresses: vec![IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))], zone: None };
        (name, Arc::new(node))
    };
    let workloads = (0..services).flat_map(|service| [0, 1].map(|index| workload(service, index)));
    let catalog = Catalog {
        mesh: None,
        nodes: [NODE, "n2"].map(node).into(),
        services: (0..services).map(service).map(|it| (it.name.clone(), Arc::new(it))).collect(),
        workloads: workloads.map(|it| (it.name.clone(), Arc::new(it))).collect(),
        policies: (0..policies).map(|number| policy(number, rules)).map(|it| (it.name.clone(), Arc::new(it))).collect(),
        traffic: BTreeMap::new(),
    };
    let mut engine = Engine::new(node_name(NODE));
    engine.handle_update(Update::Snapshot(catalog), Instant::now());
    engine
}
