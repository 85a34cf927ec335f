//! The engine against its meaning: a naive compile of the final catalog, whatever the way there.

use super::replay::Kernel;
use super::tests::{labels, mesh, name, node, service, workload};
use super::*;
use crate::model::{Mesh, Mode, Protocol, SameNode, ServicePort, TargetPort};
use ipnet::IpNet;
use mesh_common::Ip;
use mesh_common::service::{AppPort, AppPortKey, Backend, CidrAction, CidrKey, Frontend, FrontendKey, PROTO_TCP};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const OUTBOUND: u16 = 15001;
const TUNNEL: u16 = 15008;

fn new_engine(node: &NodeName) -> Engine {
    Engine::new(node.clone()).with_own_ports(OUTBOUND, &[TUNNEL])
}

/// What the tables mean, written from the rules without any index.
fn naive(node: &NodeName, catalog: &Catalog) -> Maps {
    let mut maps = Maps::default();
    let exclude: Vec<IpNet> = catalog.mesh.iter().flat_map(|mesh| mesh.exclude.clone()).collect();
    let excluded = |address: &IpAddr| exclude.iter().any(|range| range.contains(address));
    let mut owners: BTreeMap<IpAddr, &Arc<Workload>> = BTreeMap::new();
    let meshed = || catalog.workloads.values().filter(|w| w.mode != Mode::Disabled);
    for workload in meshed().filter(|w| w.cgroup.is_none()) {
        for address in &workload.addresses {
            owners.entry(*address).or_insert(workload);
        }
    }
    let hosts = naive_hosts(node, catalog, &owners, &mut maps);
    for (address, workload) in &owners {
        if !excluded(address) {
            let in_tunnel = catalog.mesh.as_ref().is_some_and(|mesh| mesh.same_node == SameNode::Tunnel);
            let carried = workload.node == *node && workload.netns.is_some() && !in_tunnel;
            let action = if carried { CidrAction::carry(0) } else { CidrAction::CAPTURE };
            maps.cidrs.insert((128, CidrKey::new((*address).into())), action);
        }
        if workload.node == *node && workload.netns.is_some() {
            maps.app_ports.insert(AppPortKey::new((*address).into(), 0), AppPort::new(workload.mode as u32, 0));
            for (port, mode) in &workload.port_modes {
                let key = AppPortKey::new((*address).into(), port.to_be());
                maps.app_ports.insert(key, AppPort::new(*mode as u32, 0));
            }
            for port in naive_datagram_ports(catalog, workload) {
                let mode = workload.port_modes.get(&port).copied().unwrap_or(workload.mode);
                let key = AppPortKey::datagram((*address).into(), port.to_be());
                maps.app_ports.insert(key, AppPort::new(mode as u32, 0));
            }
        }
    }
    for range in &exclude {
        let mapped = if range.addr().is_ipv4() { 96 } else { 0 };
        let key = (mapped + u32::from(range.prefix_len()), CidrKey::new(range.network().into()));
        maps.cidrs.insert(key, CidrAction::PASS);
    }
    for service in catalog.services.values().rev() {
        for (vip, port) in service.vips.iter().flat_map(|vip| service.ports.iter().map(move |port| (vip, port))) {
            if port.protocol == Protocol::Udp || excluded(vip) {
                continue;
            }
            let usable = catalog.workloads.values().filter(|w| {
                let selected = !service.selector.is_empty()
                    && w.name.namespace() == service.name.namespace()
                    && service.selector.iter().all(|(key, value)| w.labels.get(key) == Some(value));
                let has_port = match &port.target {
                    TargetPort::Number(_) => true,
                    TargetPort::Name(port) => w.ports.contains_key(port),
                };
                let owns = w.addresses.iter().find(|address| address.is_ipv4() == vip.is_ipv4());
                let target = match &port.target {
                    TargetPort::Number(number) => *number,
                    TargetPort::Name(port) => w.ports.get(port).copied().unwrap_or(0),
                };
                let owner_of = |address: &IpAddr| {
                    owners.get(address).copied().or_else(|| hosts.get(&SocketAddr::new(*address, target)).copied())
                };
                selected
                    && has_port
                    && w.weight > 0
                    && catalog.nodes.contains_key(&w.node)
                    && owns.is_some_and(|address| owner_of(address).is_some_and(|owner| owner.name == w.name))
            });
            let usable: Vec<_> = usable.collect();
            let in_tunnel = catalog.mesh.as_ref().is_some_and(|mesh| mesh.same_node == SameNode::Tunnel);
            let here = usable.iter().filter(|w| !in_tunnel && w.node == *node && w.netns.is_some());
            let here = here.map(|w| {
                let address = w.addresses.iter().find(|address| address.is_ipv4() == vip.is_ipv4()).unwrap();
                let target = match &port.target {
                    TargetPort::Number(number) => *number,
                    TargetPort::Name(port) => w.ports[port],
                };
                (SocketAddr::new(*address, target), w.weight)
            });
            let here: Vec<_> = here.collect();
            if here.is_empty() {
                // Another service may have had the address before this one.
                maps.backends.remove(&SocketAddr::new(*vip, port.port));
            } else {
                let total = usable.iter().map(|w| w.weight).sum();
                maps.backends.insert(SocketAddr::new(*vip, port.port), (total, here));
            }
            let endpoints: Vec<String> = usable.iter().map(|w| w.name.to_string()).collect();
            maps.frontends.insert(SocketAddr::new(*vip, port.port), (service.name.to_string(), endpoints));
        }
    }
    for (address, _) in hosts.iter().filter(|(address, _)| !excluded(&address.ip())) {
        if !maps.frontends.contains_key(address) {
            maps.hosts.insert(*address);
        }
    }
    for workload in meshed() {
        if workload.node == *node && (workload.netns.is_some() || workload.cgroup.is_some()) {
            maps.local.insert(workload.uid.clone(), workload.name.clone());
        }
    }
    maps
}

/// The UDP ports of a workload that services lead to.
fn naive_datagram_ports(catalog: &Catalog, workload: &Workload) -> BTreeSet<u16> {
    let selects = |service: &&Arc<Service>| {
        !service.selector.is_empty()
            && service.name.namespace() == workload.name.namespace()
            && service.selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
    };
    let udp = catalog.services.values().filter(selects).flat_map(|service| &service.ports);
    udp.filter(|port| port.protocol == Protocol::Udp)
        .map(|port| match &port.target {
            TargetPort::Number(number) => *number,
            TargetPort::Name(name) => workload.ports.get(name).copied().unwrap_or(0),
        })
        .filter(|port| *port != 0)
        .collect()
}

/// Who has which declared port of which node's address, and what guards them on this node.
fn naive_hosts<'a>(
    node: &NodeName,
    catalog: &'a Catalog,
    owners: &BTreeMap<IpAddr, &Arc<Workload>>,
    maps: &mut Maps,
) -> BTreeMap<SocketAddr, &'a Arc<Workload>> {
    let hosts: Vec<_> = catalog.workloads.values().filter(|w| w.cgroup.is_some() && w.is_meshed()).collect();
    let mut by_address = BTreeMap::new();
    for host in &hosts {
        let is_local = host.node == *node;
        if is_local {
            let key = AppPortKey::new(Ip::UNSPECIFIED, OUTBOUND.to_be());
            maps.app_ports.insert(key, AppPort::new(Mode::Strict as u32, 0));
        }
        for port in host.ports.values().chain(host.port_modes.keys()) {
            let mode = host.port_modes.get(port).copied().unwrap_or(host.mode);
            if [OUTBOUND, TUNNEL].contains(port) || mode == Mode::Disabled {
                continue;
            }
            let guard = AppPort::new(mode as u32, 0);
            if is_local {
                maps.app_ports.entry(AppPortKey::new(Ip::UNSPECIFIED, port.to_be())).or_insert(guard);
            }
            for address in host.addresses.iter().filter(|address| !owners.contains_key(address)) {
                let place = SocketAddr::new(*address, *port);
                if by_address.contains_key(&place) && by_address[&place] != *host {
                    continue;
                }
                by_address.insert(place, *host);
                if is_local {
                    maps.app_ports.insert(AppPortKey::new((*address).into(), port.to_be()), guard);
                }
            }
        }
    }
    by_address
}

#[derive(Debug, Default, PartialEq)]
struct Maps {
    /// Captured as declared ports.
    hosts: BTreeSet<SocketAddr>,
    frontends: BTreeMap<SocketAddr, (String, Vec<String>)>,
    /// What the kernel draws from: the total weight, and each endpoint's here.
    backends: BTreeMap<SocketAddr, (u32, Vec<(SocketAddr, u32)>)>,
    cidrs: BTreeMap<(u32, CidrKey), CidrAction>,
    app_ports: BTreeMap<AppPortKey, AppPort>,
    local: BTreeMap<WorkloadUid, ObjectName>,
}

impl From<&Tables> for Maps {
    fn from(tables: &Tables) -> Self {
        let view = |view: &Arc<FrontendView>| {
            let endpoints = view.endpoints.iter().map(|e| e.workload.name.to_string()).collect();
            (view.service.name.to_string(), endpoints)
        };
        let hosts = tables.frontends.iter().filter(|(_, frontend)| frontend.service() == 0);
        Self {
            hosts: hosts.map(|(key, _)| SocketAddr::new(key.addr().into(), u16::from_be(key.port_be()))).collect(),
            frontends: tables.snapshot.frontends.iter().map(|(address, v)| (*address, view(v))).collect(),
            backends: drawn_from(tables),
            cidrs: tables.cidrs.iter().map(|(key, value)| (*key, *value)).collect(),
            app_ports: tables.app_ports.iter().map(|(key, value)| (*key, *value)).collect(),
            local: tables.local.iter().map(|(uid, workload)| (uid.clone(), workload.name.clone())).collect(),
        }
    }
}

fn drawn_from(tables: &Tables) -> BTreeMap<SocketAddr, (u32, Vec<(SocketAddr, u32)>)> {
    let mut drawn = BTreeMap::new();
    for (key, header) in tables.frontends.iter().filter(|(_, header)| header.local_slots() > 0) {
        let mut before = 0;
        let slots = (1..=header.local_slots()).map(|slot| {
            let key = FrontendKey::new(key.addr(), key.port_be(), PROTO_TCP, slot);
            let backend = tables.backends.get(&key).expect("a slot that its header counts");
            let weight = backend.cumulative() - std::mem::replace(&mut before, backend.cumulative());
            (SocketAddr::from(backend.endpoint()), weight)
        });
        let slots: Vec<_> = slots.collect();
        assert_eq!(before, header.local_weight());
        drawn.insert(SocketAddr::new(key.addr().into(), u16::from_be(key.port_be())), (header.total_weight(), slots));
    }
    let slots: usize = drawn.values().map(|(_, slots)| slots.len()).sum();
    assert_eq!(tables.backends.iter().count(), slots, "no slot is left that no header counts");
    drawn
}

fn any_workload() -> impl Strategy<Value = Workload> {
    let address = prop::sample::subsequence(vec!["10.0.1.1", "10.0.1.2", "fd01::1", "fd01::2"], 1..3);
    let mode = prop::sample::select(vec![Mode::Disabled, Mode::Permissive, Mode::Strict]);
    (0..5u8, 0..3u8, address, mode, any::<(bool, bool, bool, bool)>(), 0..3u32, any_host_ports()).prop_map(
        |(index, node, addresses, mode, (front, netns, port, host), weight, host_ports)| {
            let mut workload = workload(&format!("w{index}"), &format!("n{node}"), &addresses);
            workload.addresses.dedup_by_key(|address| address.is_ipv4());
            workload.labels = labels(if front { &[("app", "web"), ("tier", "front")] } else { &[("app", "web")] });
            workload.mode = mode;
            workload.weight = weight;
            if !netns {
                workload.netns = None;
            }
            if port {
                workload.port_modes = [(8080, Mode::Strict)].into();
            } else {
                workload.ports.clear();
            }
            if host {
                (workload.netns, workload.cgroup) = (None, Some("/sys/fs/cgroup/host".into()));
                workload.port_modes.extend(host_ports);
            }
            workload
        },
    )
}

fn any_host_ports() -> impl Strategy<Value = BTreeMap<u16, Mode>> {
    let mode = prop::sample::select(vec![Mode::Disabled, Mode::Permissive, Mode::Strict]);
    prop::collection::btree_map(prop::sample::select(vec![80, 8080, 9090, OUTBOUND, TUNNEL]), mode, 0..4)
}

fn any_service() -> impl Strategy<Value = Service> {
    let vips = prop::sample::subsequence(vec!["10.96.0.1", "10.96.0.2", "fd00::1", "10.0.1.1"], 0..3);
    let selector = prop::sample::select(vec![
        labels(&[]),
        labels(&[("app", "web")]),
        labels(&[("tier", "front"), ("app", "web")]),
        labels(&[("app", "db")]),
    ]);
    (0..4u8, vips, selector, any::<(bool, bool)>()).prop_map(|(index, vips, selector, (named, udp))| {
        let target = if named { TargetPort::Name("http".into()) } else { TargetPort::Number(8080) };
        let mut service = service(&format!("s{index}"), &vips, target.clone());
        service.selector = selector;
        let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
        service.ports.push(ServicePort { name: "more".into(), port: 81, protocol, target });
        service
    })
}

pub(super) fn any_update() -> impl Strategy<Value = Update> {
    let exclude = prop::sample::subsequence(vec!["10.96.0.0/31", "10.0.1.1/32", "fd00::/16", "10.0.0.0/8"], 0..3);
    prop_oneof![
        8 => any_workload().prop_map(|w| Update::Upsert(Object::Workload(Arc::new(w)))),
        4 => any_service().prop_map(|s| Update::Upsert(Object::Service(Arc::new(s)))),
        2 => (0..3u8).prop_map(|n| Update::Upsert(Object::Node(Arc::new(node(&format!("n{n}")))))),
        1 => (exclude, prop::sample::select(vec![SameNode::Kernel, SameNode::Tunnel])).prop_map(|(ranges, same_node)| {
            Update::Upsert(Object::Mesh(Arc::new(Mesh { same_node, ..mesh(&ranges) })))
        }),
        3 => (0..5u8).prop_map(|n| Update::Remove(ObjectKey::Workload(name(&format!("w{n}"))))),
        2 => (0..4u8).prop_map(|n| Update::Remove(ObjectKey::Service(name(&format!("s{n}"))))),
        1 => (0..3u8).prop_map(|n| Update::Remove(ObjectKey::Node(NodeName::parse(&format!("n{n}")).unwrap()))),
        1 => Just(Update::Remove(ObjectKey::Mesh)),
    ]
}

pub(super) fn apply(catalog: &mut Catalog, update: Update) {
    match update {
        Update::Snapshot(new) => *catalog = new,
        Update::Upsert(Object::Mesh(mesh)) => catalog.mesh = Some(mesh),
        Update::Upsert(Object::Node(node)) => drop(catalog.nodes.insert(node.name.clone(), node)),
        Update::Upsert(Object::Service(service)) => drop(catalog.services.insert(service.name.clone(), service)),
        Update::Upsert(Object::Workload(workload)) => {
            drop(catalog.workloads.insert(workload.name.clone(), workload));
        }
        Update::Upsert(Object::Policy(policy)) => drop(catalog.policies.insert(policy.name.clone(), policy)),
        Update::Remove(ObjectKey::Policy(name)) => drop(catalog.policies.remove(&name)),
        Update::Upsert(Object::Traffic(policy)) => drop(catalog.traffic.insert(policy.name.clone(), policy)),
        Update::Remove(ObjectKey::Traffic(name)) => drop(catalog.traffic.remove(&name)),
        Update::Remove(ObjectKey::Mesh) => catalog.mesh = None,
        Update::Remove(ObjectKey::Node(name)) => drop(catalog.nodes.remove(&name)),
        Update::Remove(ObjectKey::Service(name)) => drop(catalog.services.remove(&name)),
        Update::Remove(ObjectKey::Workload(name)) => drop(catalog.workloads.remove(&name)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_way_to_a_catalog_compiles_to_what_the_catalog_means(
        before in prop::collection::vec(any_update(), 0..30),
        after in prop::collection::vec(any_update(), 0..30),
    ) {
        let this = NodeName::parse("n1").unwrap();
        let (mut catalog, mut engine) = (Catalog::default(), new_engine(&this));
        for update in before {
            apply(&mut catalog, update.clone());
            engine.handle_update(update, Instant::now());
        }
        let old = engine.desired().clone();
        let mut kernel = Kernel::of(&old);
        for update in after {
            apply(&mut catalog, update.clone());
            let previous = engine.desired().clone();
            engine.handle_update(update, Instant::now());
            for op in diff(&previous, engine.desired()) {
                kernel.apply(op);
            }
        }
        let tables = engine.desired();
        prop_assert_eq!(Maps::from(tables), naive(&this, &catalog));
        prop_assert_eq!(&kernel, &Kernel::of(tables));

        // All at once: a fresh engine given the final snapshot, and one diff over the whole way.
        let mut fresh = new_engine(&this);
        fresh.handle_update(Update::Snapshot(catalog.clone()), Instant::now());
        prop_assert_eq!(fresh.desired(), tables);
        let mut jumped = Kernel::of(&old);
        diff(&old, tables).into_iter().for_each(|op| jumped.apply(op));
        prop_assert_eq!(&jumped, &kernel);
        prop_assert_eq!(diff(tables, tables), vec![]);

        // And a snapshot over an older state replaces it whole.
        let mut stale = new_engine(&NodeName::parse("n1").unwrap());
        stale.handle_update(Update::Upsert(Object::Service(Arc::new(service("gone", &["10.96.0.1"], TargetPort::Number(1))))), Instant::now());
        stale.handle_update(Update::Snapshot(catalog), Instant::now());
        prop_assert_eq!(stale.desired(), tables);
    }

    #[test]
    fn a_diff_is_safe_to_stop_anywhere(
        before in prop::collection::vec(any_update(), 0..20),
        after in prop::collection::vec(any_update(), 0..20),
    ) {
        let mut engine = new_engine(&NodeName::parse("n1").unwrap());
        before.into_iter().for_each(|update| engine.handle_update(update, Instant::now()));
        let old = engine.desired().clone();
        after.into_iter().for_each(|update| engine.handle_update(update, Instant::now()));
        let new = engine.desired();
        let mut kernel = Kernel::of(&old);
        for op in diff(&old, new) {
            kernel.apply(op);
            // Whatever is kept all the way, guarded or captured, is so at every step in between.
            for (key, _) in old.app_ports.iter().filter(|(key, _)| new.app_ports.contains_key(*key)) {
                prop_assert!(kernel.app_ports.contains_key(key));
            }
            for (key, _) in old.frontends.iter().filter(|(key, _)| new.frontends.contains_key(*key)) {
                prop_assert!(kernel.frontends.contains_key(key));
            }
            // A local workload's address is never captured without its guard.
            for (key, _) in new.app_ports.iter().filter(|(key, _)| key.port_be() == 0) {
                let captured = kernel.cidrs.get(&(128, CidrKey::new(key.addr()))).is_some_and(CidrAction::is_meshed);
                let was_captured = old.cidrs.contains_key(&(128, CidrKey::new(key.addr())));
                prop_assert!(!captured || was_captured || kernel.app_ports.contains_key(key));
            }
        }
    }
}

#[test]
fn a_frontends_header_never_counts_slots_that_are_not_there() {
    let with_slots = |backends: u32| {
        let mut tables = Tables::default();
        let key = |slot| FrontendKey::new(Ip::from_v4([10, 96, 0, 1]), 80u16.to_be(), PROTO_TCP, slot);
        tables.frontends.insert(key(0), Frontend::new(1, backends, 0, 0, 0, backends, backends, backends));
        for slot in 1..=backends {
            tables.backends.insert(key(slot), Backend::new(Ip::UNSPECIFIED, 0, 0, slot));
        }
        tables
    };
    let (empty, small, large) = (Tables::default(), with_slots(2), with_slots(9));
    for (old, new) in [(&small, &large), (&large, &small), (&empty, &large), (&large, &empty)] {
        let mut kernel = Kernel::of(old);
        for op in diff(old, new) {
            kernel.apply(op);
            let header = kernel.frontends.iter().find(|(key, _)| key.slot() == 0);
            let slots = kernel.backends.len();
            assert!(header.is_none_or(|(_, header)| header.local_slots() as usize <= slots));
        }
        assert_eq!(kernel, Kernel::of(new));
    }
}
