//! Workloads in the node's own namespace (here: the pod's): whose a connect is, and what their ports admit.

use crate::bed::{
    Bed, NEIGHBOUR4, NEIGHBOUR6, OUTBOUND, POD4, POD6, connect, counted, ip, program_exists, socket_address,
};
use crate::capture::{Listeners, accept, services};
use mesh_common::Ip;
use mesh_common::flow::OriginalDestination;
use mesh_common::outcome::Outcome;
use mesh_common::policy::Mode;
use mesh_common::service::{AppPort, AppPortKey, BypassKey, Pod};
use mesh_userspace::datapath::{Config, Datapath, WorkloadCgroup};
use mesh_userspace::engine::MapOp;
use socket2::{Domain, Protocol, Socket};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

const VIP4: &str = "10.96.0.1:80";
const VIP6: &str = "[fd96::1]:80";
const EACCES: i32 = 13;

fn entry(index: u32) -> Pod {
    Pod::new(ip(POD4), ip(POD6), index, OUTBOUND.to_be(), Pod::HOST_NETWORK, 2, Ip::UNSPECIFIED, Ip::UNSPECIFIED)
}

/// A datapath whose node is the bed's pod, with workloads in the cgroups `a` and `b`; the process stands in neither.
struct Node {
    datapath: Datapath,
    outside: PathBuf,
    a: WorkloadCgroup,
    b: WorkloadCgroup,
}

impl Node {
    fn armed(bed: &Bed) -> Self {
        let outside = bed.subgroup("outside");
        bed.stand_in(&outside);
        let mut datapath = Datapath::load(&bed.config).unwrap();
        datapath.heartbeat().beat().unwrap();
        datapath.attach_node(bed.pod.as_fd(), bed.pod.cookie()).unwrap();
        let [a, b] = ["a", "b"].map(|name| datapath.workload_cgroup(&bed.subgroup(name)).unwrap());
        datapath.arm_host(&a, entry(1)).unwrap();
        datapath.arm_host(&b, entry(2)).unwrap();
        datapath.apply(&services()).unwrap();
        Self { datapath, outside, a, b }
    }

    fn counted(&self, outcome: Outcome) -> u64 {
        counted(&self.datapath, outcome)
    }
}

fn socket(bed: &Bed) -> Socket {
    bed.pod.socket(Domain::IPV4, Protocol::TCP)
}

#[test]
fn a_connect_belongs_to_the_workload_that_made_the_socket_and_uses_it() {
    let bed = Bed::new();
    let node = Node::armed(&bed);
    let listeners = Listeners::bind(&bed);
    for (workload, place) in [(&node.a, "a"), (&node.b, "b"), (&node.b, "b/within/deeper")] {
        bed.stand_in(&bed.subgroup(place));
        for (domain, vip, listener) in [(Domain::IPV4, VIP4, &listeners.v4), (Domain::IPV6, VIP6, &listeners.v6)] {
            let client = bed.pod.socket(domain, Protocol::TCP);
            connect(&client, vip).unwrap();
            let (_accepted, record) = accept(&bed, &node.datapath, listener);
            assert_eq!(record.cgroup(), workload.id(), "{place}");
            assert_eq!(record.flags(), OriginalDestination::ANNOUNCED);
            assert_eq!(SocketAddr::from(record.endpoint()), socket_address(vip));
            assert_eq!(client.peer_addr().unwrap().as_socket().unwrap(), socket_address(vip));
        }
    }
    assert_eq!(node.counted(Outcome::ConnectCaptured), 6);
    bed.stand_in(&node.outside);
    node.datapath.unload().unwrap();
}

#[test]
fn the_innermost_workloads_cgroup_is_who_it_is() {
    let bed = Bed::new();
    let mut node = Node::armed(&bed);
    let inner = node.datapath.workload_cgroup(&bed.subgroup("a/inner")).unwrap();
    node.datapath.arm_host(&inner, entry(3)).unwrap();
    let listeners = Listeners::bind(&bed);
    for (place, workload) in [("a/inner", &inner), ("a/other", &node.a)] {
        bed.stand_in(&bed.subgroup(place));
        connect(&socket(&bed), VIP4).unwrap();
        let (_accepted, record) = accept(&bed, &node.datapath, &listeners.v4);
        assert_eq!(record.cgroup(), workload.id(), "{place}");
    }
    bed.stand_in(&node.outside);
    node.datapath.unload().unwrap();
}

#[test]
fn a_socket_in_other_hands_may_not_connect_to_the_mesh() {
    let bed = Bed::new();
    let node = Node::armed(&bed);
    let listeners = Listeners::bind(&bed);
    let (a, b) = (node.a.path().to_owned(), node.b.path().to_owned());
    for (makes, uses) in [(&a, &b), (&a, &node.outside), (&node.outside, &a)] {
        bed.stand_in(makes);
        let client = socket(&bed);
        bed.stand_in(uses);
        let refused = node.counted(Outcome::ConnectHanded);
        let error = connect(&client, VIP4).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(EACCES), "made in {} used in {}", makes.display(), uses.display());
        assert_eq!(node.counted(Outcome::ConnectHanded), refused + 1);
        // Where it belongs it works, and what is not meshed is nobody's business.
        let elsewhere = bed.neighbour.listen(&format!("{NEIGHBOUR4}:0"));
        connect(&client, &elsewhere.local_addr().unwrap().to_string()).unwrap();
    }
    bed.stand_in(&node.outside);
    connect(&socket(&bed), VIP4).unwrap_err();
    assert_eq!(node.counted(Outcome::ConnectCaptured), 0);
    listeners.v4.set_nonblocking(true).unwrap();
    assert_eq!(listeners.v4.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    node.datapath.unload().unwrap();
}

#[test]
fn a_socket_from_before_the_arming_is_nobodys() {
    let bed = Bed::new();
    let mut node = Node::armed(&bed);
    let late = node.datapath.workload_cgroup(&bed.subgroup("late")).unwrap();
    bed.stand_in(late.path());
    let (early, listeners) = (socket(&bed), Listeners::bind(&bed));
    node.datapath.arm_host(&late, entry(3)).unwrap();
    assert_eq!(connect(&early, VIP4).unwrap_err().raw_os_error(), Some(EACCES));
    connect(&socket(&bed), VIP4).unwrap();
    drop(accept(&bed, &node.datapath, &listeners.v4));
    // Out of the mesh, its sockets are like any other, those of the time before included.
    node.datapath.disarm_host(&late).unwrap();
    let passed = node.counted(Outcome::ConnectNotWorkload);
    connect(&early, &format!("{POD4}:{OUTBOUND}")).unwrap();
    assert_eq!(node.counted(Outcome::ConnectNotWorkload), passed + 1);
    bed.stand_in(&node.outside);
    node.datapath.unload().unwrap();
}

#[test]
fn a_subflow_that_the_kernel_makes_is_nobodys() {
    let bed = Bed::new();
    let node = Node::armed(&bed);
    if bed.pod.has_mptcp() {
        bed.stand_in(node.a.path());
        let client = bed.pod.socket(Domain::IPV4, Protocol::MPTCP);
        assert_eq!(connect(&client, VIP4).unwrap_err().raw_os_error(), Some(EACCES));
        assert_eq!(node.counted(Outcome::ConnectHanded), 1);
        bed.stand_in(&node.outside);
    }
    node.datapath.unload().unwrap();
}

fn guard(address: Ip, port: u16, mode: Mode) -> MapOp {
    MapOp::SetAppPort(AppPortKey::new(address, port.to_be()), AppPort::new(mode as u32, 0))
}

fn at(address: &str, port: u16) -> String {
    SocketAddr::new(address.parse().unwrap(), port).to_string()
}

#[test]
fn only_declared_ports_of_the_node_are_guarded_and_those_at_every_address() {
    let bed = Bed::new();
    let mut node = Node::armed(&bed);
    node.datapath.apply(&[guard(ip(POD4), 8080, Mode::Strict), guard(Ip::UNSPECIFIED, 8080, Mode::Strict)]).unwrap();
    let (_declared, other) = (bed.pod.listen("[::]:8080"), bed.pod.listen("[::]:9090"));
    for (domain, pod, neighbour) in [(Domain::IPV4, POD4, NEIGHBOUR4), (Domain::IPV6, POD6, NEIGHBOUR6)] {
        // From outside and from the node itself; its address is nobody's proof of anything.
        for (place, refused) in [(&bed.neighbour, 1), (&bed.pod, 2)] {
            let before = node.counted(Outcome::LookupStrict);
            let error = connect(&place.socket(domain, Protocol::TCP), &at(pod, 8080)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{pod} {refused}");
            assert_eq!(node.counted(Outcome::LookupStrict), before + 1);
            connect(&place.socket(domain, Protocol::TCP), &at(pod, 9090)).unwrap();
            drop(other.accept().unwrap());
        }
        // The daemon's delivery.
        let source = bed.neighbour.socket(domain, Protocol::TCP);
        source.bind(&socket_address(&at(neighbour, 40_001)).into()).unwrap();
        let key = BypassKey::new(ip(neighbour), ip(pod), 40_001_u16.to_be(), 8080_u16.to_be());
        let _admission = node.datapath.bypass().admit(key).unwrap();
        connect(&source, &at(pod, 8080)).unwrap();
    }
    for (domain, loopback) in [(Domain::IPV4, "127.0.0.1:8080"), (Domain::IPV6, "[::1]:8080")] {
        connect(&bed.pod.socket(domain, Protocol::TCP), loopback).unwrap();
    }
    assert_eq!(node.counted(Outcome::LookupSelf), 2);
    node.datapath.unload().unwrap();
}

#[test]
fn the_nodes_listener_takes_captured_connections_only() {
    let bed = Bed::new();
    let mut node = Node::armed(&bed);
    node.datapath.apply(&[guard(Ip::UNSPECIFIED, OUTBOUND, Mode::Strict)]).unwrap();
    node.datapath.apply(&services()).unwrap();
    let listeners = Listeners::bind(&bed);
    for place in [&bed.neighbour, &bed.pod] {
        let error = connect(&place.socket(Domain::IPV4, Protocol::TCP), &at(POD4, OUTBOUND)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(node.counted(Outcome::LookupMeshPort), 2);
    bed.stand_in(node.a.path());
    for source in [None, Some("127.0.0.1:0")] {
        let client = socket(&bed);
        if let Some(source) = source {
            client.bind(&socket_address(source).into()).unwrap();
        }
        connect(&client, VIP4).unwrap();
        drop(accept(&bed, &node.datapath, &listeners.v4));
    }
    bed.stand_in(&node.outside);
    node.datapath.unload().unwrap();
}

#[test]
fn a_successor_takes_over_and_settles() {
    let bed = Bed::new();
    let Node { datapath, outside, a, b } = Node::armed(&bed);
    drop(datapath);
    let mut datapath = Datapath::load(&bed.config).unwrap();
    datapath.apply(&services()).unwrap();
    let listeners = Listeners::bind(&bed);
    // Captured by what the predecessor armed.
    bed.stand_in(a.path());
    connect(&socket(&bed), VIP4).unwrap();
    drop(accept(&bed, &datapath, &listeners.v4));
    datapath.attach_node(bed.pod.as_fd(), bed.pod.cookie()).unwrap();
    datapath.arm_host(&b, entry(2)).unwrap();
    connect(&socket(&bed), VIP4).unwrap();
    drop(accept(&bed, &datapath, &listeners.v4));
    datapath.settle().unwrap();
    let passed = counted(&datapath, Outcome::ConnectNotWorkload);
    connect(&socket(&bed), &at(NEIGHBOUR4, 1)).unwrap_err();
    assert_eq!(counted(&datapath, Outcome::ConnectNotWorkload), passed + 1);
    let links = datapath.links().unwrap();
    datapath.disarm_host(&b).unwrap();
    datapath.detach_node().unwrap();
    assert_eq!(datapath.links().unwrap().len() + 1, links.len());
    datapath.settle().unwrap();
    bed.stand_in(&outside);
    datapath.unload().unwrap();
    assert!(links.iter().all(|link| !program_exists(link.program)));
}

#[test]
fn cgroups_that_cannot_be_told_are_refused() {
    let bed = Bed::new();
    let node = Node::armed(&bed);
    let refusal = |path: &std::path::Path| format!("{:#}", node.datapath.workload_cgroup(path).unwrap_err());
    let elsewhere = bed.config.cgroups[0].parent().unwrap();
    assert!(refusal(elsewhere).contains("root of the cgroup hierarchy"), "{}", refusal(elsewhere));
    assert!(refusal(&node.outside).contains("nodemeshd itself runs in"), "{}", refusal(&node.outside));
    let nested = Config {
        cgroups: vec![bed.config.cgroups[0].clone(), bed.subgroup("a")],
        pin: "nested".into(),
        ..bed.config.clone()
    };
    let error = format!("{:#}", Datapath::load(&nested).err().expect("a refusal"));
    assert!(error.contains("name only the outer one"), "{error}");
    let inner =
        Config { cgroups: vec![bed.subgroup("a"), bed.subgroup("b")], pin: "inner".into(), ..bed.config.clone() };
    let datapath = Datapath::load(&inner).unwrap();
    let error = format!("{:#}", datapath.workload_cgroup(&bed.subgroup("c")).unwrap_err());
    assert!(error.contains("add it, or a cgroup around it"), "{error}");
    assert_eq!(datapath.links().unwrap().len(), 20);
    datapath.unload().unwrap();
    node.datapath.unload().unwrap();
}
