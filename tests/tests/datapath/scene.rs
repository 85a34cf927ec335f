//! A mesh that changes at random: workloads of two namespaces on two nodes, services in front of them, policies.

use mesh_userspace::engine::{Engine, MapOp, Snapshot, diff};
use mesh_userspace::model::{
    Affinity, AuthorizationPolicy, DefaultAction, Mode, Node, NodeName, Object, ObjectKey, ObjectName, PolicyAction,
    PolicyTarget, Prefer, Protocol, Rule, Service, ServicePort, Source, SpiffeId, SpiffePattern, TargetPort, Update,
    Workload, WorkloadUid,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

const NAMESPACES: [&str; 2] = ["shop", "bank"];
const ACCOUNTS: [&str; 3] = ["web", "cart", "admin"];
pub(crate) const PORTS: [u16; 4] = [80, 443, 8080, 9090];
/// The first six run on the node itself.
const WORKLOADS: u8 = 8;
const ON_THIS_NODE: u8 = 6;
const POLICIES: u8 = 5;

pub(crate) struct Scene {
    pub(crate) random: StdRng,
    pub(crate) workloads: BTreeMap<ObjectName, Workload>,
    pub(crate) services: BTreeMap<ObjectName, Service>,
    pub(crate) policies: BTreeMap<ObjectName, AuthorizationPolicy>,
    engine: Engine,
}

impl Scene {
    pub(crate) fn new(seed: u64) -> Self {
        let node = |name: &str| NodeName::parse(name).unwrap();
        let mut scene = Self {
            random: StdRng::seed_from_u64(seed),
            workloads: BTreeMap::new(),
            services: BTreeMap::new(),
            policies: BTreeMap::new(),
            engine: Engine::new(node("n1")),
        };
        for name in ["n1", "n2"] {
            let object = Node { name: node(name), addresses: vec!["192.0.2.1".parse().unwrap()], zone: None };
            scene.engine.handle_update(Update::Upsert(Object::Node(Arc::new(object))), Instant::now());
        }
        for index in 0..WORKLOADS {
            scene.change_workload(index);
        }
        for index in 0..4 {
            scene.change_service(index);
        }
        scene
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.engine.desired().snapshot
    }

    /// All that the kernel needs to begin with.
    pub(crate) fn start(&self) -> Vec<MapOp> {
        diff(&mesh_userspace::engine::Tables::default(), self.engine.desired())
    }

    /// Changes some of it, policies above all; what the kernel needs to follow.
    pub(crate) fn change(&mut self) -> Vec<MapOp> {
        let before = self.engine.desired().clone();
        for _ in 0..self.random.random_range(1..4) {
            self.change_policy();
        }
        if self.random.random_bool(0.4) {
            let index = self.random.random_range(0..WORKLOADS);
            self.change_workload(index);
        }
        if self.random.random_bool(0.2) {
            let index = self.random.random_range(0..4);
            self.change_service(index);
        }
        diff(&before, self.engine.desired())
    }

    fn tell(&mut self, update: Update) {
        self.engine.handle_update(update, Instant::now());
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from.choose(&mut self.random).unwrap().clone()
    }

    fn labels(&mut self) -> BTreeMap<String, String> {
        let (app, tier) = (self.pick(&["web", "db"]), self.pick(&["front", "back"]));
        let all = [("app", app), ("tier", tier)].map(|(key, value)| (key.to_owned(), value.to_owned()));
        all.into_iter().take(self.random.random_range(0..3)).collect()
    }

    fn change_workload(&mut self, index: u8) {
        let (app, tier) = (self.pick(&["web", "db"]), self.pick(&["front", "back"]));
        let name = name_of(index, &format!("w{index}"));
        let account = ACCOUNTS[usize::from(index / 2) % ACCOUNTS.len()];
        let identity = format!("spiffe://example.org/ns/{}/sa/{account}", name.namespace());
        let modes = [Mode::Permissive, Mode::Permissive, Mode::Permissive, Mode::Strict];
        let workload = Workload {
            uid: WorkloadUid::new(&format!("uid-{index}")),
            name: name.clone(),
            owner: "owner".into(),
            labels: [("app", app), ("tier", tier)].map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            identity: SpiffeId::parse(&identity).unwrap(),
            node: NodeName::parse(if index < ON_THIS_NODE { "n1" } else { "n2" }).unwrap(),
            addresses: own_addresses(index).into(),
            netns: Some("/run/netns/x".into()),
            cgroup: None,
            mode: self.pick(&modes),
            port_modes: if self.random.random_bool(0.3) { [(9090, self.pick(&modes))].into() } else { BTreeMap::new() },
            ports: if self.random.random_bool(0.8) {
                [("http".to_owned(), self.pick(&[80, 8080]))].into()
            } else {
                BTreeMap::new()
            },
            weight: 100,
            is_terminating: false,
            default_action: self.pick(&[DefaultAction::Allow, DefaultAction::Allow, DefaultAction::Deny]),
        };
        self.workloads.insert(name, workload.clone());
        self.tell(Update::Upsert(Object::Workload(Arc::new(workload))));
    }

    fn change_service(&mut self, index: u8) {
        let name = name_of(index, &format!("s{}", index / 2));
        let port = |name: &str, port, protocol, target| ServicePort { name: name.into(), port, protocol, target };
        let target = self.pick(&[TargetPort::Name("http".into()), TargetPort::Number(8080)]);
        let service = Service {
            name: name.clone(),
            vips: vec![
                format!("10.96.0.{}", index + 1).parse().unwrap(),
                format!("fd96::{}", index + 1).parse().unwrap(),
            ],
            ports: vec![
                port("http", 80, Protocol::Tcp, target),
                port("admin", 81, Protocol::Tcp, TargetPort::Number(9090)),
                port("dns", 53, Protocol::Udp, TargetPort::Number(443)),
            ],
            selector: self.labels(),
            prefer: self.pick(&[Prefer::Nobody, Prefer::Nobody, Prefer::SameNode]),
            affinity: Affinity::None,
        };
        self.services.insert(name, service.clone());
        self.tell(Update::Upsert(Object::Service(Arc::new(service))));
    }

    fn change_policy(&mut self) {
        let index = self.random.random_range(0..POLICIES * 2);
        let name = name_of(index, &format!("p{}", index / 2));
        if self.random.random_bool(0.25) {
            self.policies.remove(&name);
            return self.tell(Update::Remove(ObjectKey::Policy(name)));
        }
        let policy = AuthorizationPolicy {
            name: name.clone(),
            targets: (0..self.pick(&[0, 1, 1, 1, 2])).map(|_| self.target()).collect(),
            action: self.pick(&[PolicyAction::Allow, PolicyAction::Allow, PolicyAction::Deny, PolicyAction::Audit]),
            dry_run: self.random.random_bool(0.15),
            rules: (0..self.pick(&[0, 1, 1, 2, 3])).map(|_| self.rule()).collect(),
        };
        self.policies.insert(name, policy.clone());
        self.tell(Update::Upsert(Object::Policy(Arc::new(policy))));
    }

    fn target(&mut self) -> PolicyTarget {
        if self.random.random_bool(0.5) {
            PolicyTarget::Selector(self.labels())
        } else {
            PolicyTarget::Service(self.pick(&["s0", "s1", "nobody"]).into())
        }
    }

    fn rule(&mut self) -> Rule {
        let sources = self.random.random_bool(0.85).then(|| {
            let number = self.pick(&[0, 1, 1, 2, 2, 4]);
            (0..number).map(|_| self.source()).collect()
        });
        let ports = (0..self.pick(&[0, 0, 1, 2])).map(|_| self.pick(&PORTS)).collect();
        Rule { name: "rule".into(), sources, ports }
    }

    fn source(&mut self) -> Source {
        let namespace: Arc<str> = self.pick(&NAMESPACES).into();
        match self.random.random_range(0..8) {
            0 => Source::Namespace(namespace),
            1 => Source::ServiceAccount { namespace, name: None },
            2 => Source::ServiceAccount { namespace, name: Some(self.pick(&ACCOUNTS).into()) },
            3 | 4 => {
                let pattern = self.pick(&[
                    "*",
                    "spiffe://example.org/ns/shop/sa/web",
                    "spiffe://example.org/ns/*/sa/cart",
                    "spiffe://example.org/ns/sh*p/sa/*",
                    "spiffe://example.org/ns/bank/sa/*min",
                    "spiffe://example.com/ns/*/sa/*",
                ]);
                Source::Spiffe(SpiffePattern::parse(pattern).unwrap())
            }
            _ => Source::Range(self.range().parse().unwrap()),
        }
    }

    /// Of either family, also with host bits, and of mapped addresses.
    fn range(&mut self) -> String {
        let [a, b, c] = [3, 3, 5].map(|end| self.random.random_range(0..end));
        match self.random.random_range(0..5) {
            0 | 1 => format!("10.{a}.{b}.{c}/{}", self.pick(&[0, 6, 8, 15, 16, 23, 24, 30, 31, 32])),
            2 | 3 => format!("fd00:{a}:{b}::{c}/{}", self.pick(&[0, 7, 16, 31, 32, 47, 48, 64, 126, 127, 128])),
            _ => format!("::ffff:10.{a}.{b}.{c}/{}", self.pick(&[0, 80, 96, 104, 112, 120, 128])),
        }
    }

    /// An address that ranges may hold, or one that they do not.
    pub(crate) fn address(&mut self, is_v4: bool) -> IpAddr {
        let [a, b, c] = [4, 3, 6].map(|end| self.random.random_range(0..end));
        let stranger = self.random.random_bool(0.1);
        match (is_v4, stranger) {
            (true, false) => format!("10.{a}.{b}.{c}"),
            (true, true) => "203.0.113.7".to_owned(),
            (false, false) => format!("fd00:{a}:{b}::{c}"),
            (false, true) => "2001:db8::7".to_owned(),
        }
        .parse()
        .unwrap()
    }

    /// The workloads of this node, which call others.
    pub(crate) fn callers(&self) -> Vec<Workload> {
        self.workloads.values().filter(|workload| workload.node.as_str() == "n1").cloned().collect()
    }

    /// Some address and port of a workload or of a service.
    pub(crate) fn destination(&mut self) -> SocketAddr {
        let is_v4 = self.random.random_bool(0.5);
        let of_family = |addresses: &[IpAddr]| *addresses.iter().find(|address| address.is_ipv4() == is_v4).unwrap();
        if self.random.random_bool(0.3) {
            let vips: Vec<_> = self.services.values().map(|service| service.vips.clone()).collect();
            SocketAddr::new(of_family(&self.pick(&vips)), self.pick(&[80, 81]))
        } else {
            let index = self.random.random_range(0..WORKLOADS);
            SocketAddr::new(of_family(&own_addresses(index)), self.pick(&PORTS))
        }
    }
}

fn name_of(index: u8, name: &str) -> ObjectName {
    ObjectName::parse(NAMESPACES[usize::from(index) % 2], name).unwrap()
}

fn own_addresses(index: u8) -> [IpAddr; 2] {
    let (a, b, c) = (index % 3, index % 2, index % 5 + 1);
    [format!("10.{a}.{b}.{c}"), format!("fd00:{a}:{b}::{c}")].map(|address| address.parse().unwrap())
}
