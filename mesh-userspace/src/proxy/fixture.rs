//! A small mesh for tests: `client` and `other` on n1, `server` on n2 behind a service of its name, all in namespace
//! `shop`.

use crate::engine::{Engine, Snapshot};
use crate::model::{
    Affinity, AuthorizationPolicy, Catalog, DefaultAction, DeniedError, Mesh, Mode, Node, NodeName, ObjectName,
    PolicyAction, PolicyTarget, Prefer, Protocol, Rule, SameNode, Service, ServicePort, Source, SpiffeId, TargetPort,
    TransportChoice, TrustDomain, Update, Workload, WorkloadUid,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

pub(super) fn name(name: &str) -> ObjectName {
    ObjectName::parse("shop", name).unwrap()
}

pub(super) fn id(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/ns/shop/sa/{account}")).unwrap()
}

pub(super) fn workload(called: &str, address: &str) -> Workload {
    let node = if called == "server" { "n2" } else { "n1" };
    Workload {
        uid: WorkloadUid::new(called),
        name: name(called),
        owner: called.into(),
        labels: BTreeMap::from([("app".to_owned(), called.to_owned())]),
        identity: id(called),
        node: NodeName::parse(node).unwrap(),
        addresses: vec![address.parse().unwrap()],
        netns: None,
        cgroup: None,
        mode: Mode::Strict,
        port_modes: BTreeMap::new(),
        ports: BTreeMap::new(),
        weight: 100,
        is_terminating: false,
        default_action: DefaultAction::Allow,
    }
}

/// A policy for `server` about one service account.
pub(super) fn policy(called: &str, action: PolicyAction, account: &str) -> AuthorizationPolicy {
    let source = Source::ServiceAccount { namespace: "shop".into(), name: Some(account.into()) };
    AuthorizationPolicy {
        name: name(called),
        targets: vec![PolicyTarget::Selector(BTreeMap::from([("app".to_owned(), "server".to_owned())]))],
        action,
        dry_run: false,
        rules: vec![Rule { name: "0".into(), sources: Some(vec![source]), ports: Vec::new() }],
    }
}

pub(super) fn catalog() -> Catalog {
    let mesh = Mesh {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        mode: Mode::Strict,
        transport: TransportChoice::Auto,
        exclude: Vec::new(),
        default_action: DefaultAction::Allow,
        denied_error: DeniedError::AccessDenied,
        same_node: SameNode::Kernel,
        dns: None,
    };
    let node = |called: &str| {
        let name = NodeName::parse(called).unwrap();
        (name.clone(), Arc::new(Node { name, addresses: vec!["192.0.2.1".parse().unwrap()], zone: None }))
    };
    let service = Service {
        name: name("server"),
        vips: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            target: TargetPort::Number(8080),
        }],
        selector: BTreeMap::from([("app".to_owned(), "server".to_owned())]),
        prefer: Prefer::Nobody,
        affinity: Affinity::None,
    };
    let workloads = [workload("client", "10.0.0.1"), workload("server", "10.0.0.2"), workload("other", "10.0.0.3")];
    Catalog {
        mesh: Some(mesh.into()),
        nodes: ["n1", "n2"].map(node).into(),
        services: [(service.name.clone(), service.into())].into(),
        workloads: workloads.map(|workload| (workload.name.clone(), workload.into())).into(),
        policies: BTreeMap::new(),
        traffic: BTreeMap::new(),
    }
}

/// As n2 sees it.
pub(super) fn snapshot(catalog: Catalog) -> Arc<Snapshot> {
    let mut engine = Engine::new(NodeName::parse("n2").unwrap());
    engine.handle_update(Update::Snapshot(catalog), Instant::now());
    engine.desired().snapshot.clone()
}
