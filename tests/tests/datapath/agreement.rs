//! Three answers to one question, for many policies and connections: what the loaded programs do, what
//! `mesh_common::policy::decide` says about a compiled group, and what an oracle says that knows policies only by
//! their meaning.

use crate::bed::{Bed, NEIGHBOUR4, NEIGHBOUR6, OUTBOUND, counted};
use crate::oracle::{Caller, World, selects, target};
use crate::run::Program;
use crate::scene::{PORTS, Scene};
use mesh_common::Ip;
use mesh_common::outcome::Outcome;
use mesh_common::policy::{Arrival, Mode, Verdict, decide};
use mesh_common::service::Pod;
use mesh_userspace::datapath::Datapath;
use mesh_userspace::engine::Snapshot;
use mesh_userspace::model::{Prefer, Workload};
use rand::Rng;
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

const SEED: u64 = 0x006e_6f64_656d_6573;
const SETS: usize = 600;
/// Connections per set of policies: in plaintext from outside, and by each of the node's six workloads.
const PLAINTEXT: usize = 100;
const CONNECTS: usize = 26;
const COUNTED: [Outcome; 5] = [
    Outcome::ConnectDenied,
    Outcome::ConnectNoEndpoints,
    Outcome::LookupDenied,
    Outcome::LookupPlaintext,
    Outcome::LookupStrict,
];

/// A datapath whose hooks see connects of the bed's pod; the guard is asked by test runs.
struct Kernel<'a> {
    bed: &'a Bed,
    datapath: Datapath,
    guard: Program,
}

impl<'a> Kernel<'a> {
    fn load(bed: &'a Bed) -> Self {
        let mut datapath = Datapath::load(&bed.config).unwrap();
        datapath.heartbeat().beat().unwrap();
        datapath.attach_netns("guarded", bed.neighbour.as_fd()).unwrap();
        let guard = datapath.links().unwrap().into_iter().find(|link| link.name == "guarded").unwrap();
        // Whatever a connect is sent to does not answer while its socket lives: nobody is there.
        bed.pod.ip(&format!("route add 10.0.0.0/8 via {NEIGHBOUR4}"));
        bed.pod.ip(&format!("-6 route add fd00::/16 via {NEIGHBOUR6}"));
        Self { bed, datapath, guard: Program::open(guard.program) }
    }

    /// What connect() said at once to each: 0 for "in progress".
    fn connect(&mut self, caller: &Workload, snapshot: &Snapshot, to: &[SocketAddr]) -> Vec<i32> {
        let identity = snapshot.identity_number(&caller.identity);
        let [v4, v6] = [caller.addresses[0], caller.addresses[1]].map(Into::into);
        let pod = Pod::new(v4, v6, 1, OUTBOUND.to_be(), 0, identity, Ip::UNSPECIFIED, Ip::UNSPECIFIED);
        self.datapath.arm_pod(self.bed.pod.cookie(), pod).unwrap();
        let to = to.to_vec();
        self.bed.pod.run(move || {
            let dial = |to: &SocketAddr| {
                let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None).unwrap();
                socket.set_nonblocking(true).unwrap();
                socket.connect(&SockAddr::from(*to)).map_or_else(|error| error.raw_os_error().unwrap(), |()| 0)
            };
            to.iter().map(dial).map(|errno| if errno == libc::EINPROGRESS { 0 } else { errno }).collect()
        })
    }
}

/// What was asked so far, and what the kernel must have counted.
#[derive(Default)]
struct Tally {
    expected: BTreeMap<Outcome, u64>,
    plaintext: u64,
    connects: u64,
    passed: u64,
    connects_to_services_denied: u64,
}

impl Tally {
    fn expect(&mut self, outcome: Outcome) {
        *self.expected.entry(outcome).or_default() += 1;
    }

    fn share(&self, some: Outcome, of: u64) -> f64 {
        self.expected.get(&some).copied().unwrap_or(0) as f64 / of as f64
    }
}

#[test]
fn the_kernel_the_engine_and_the_meaning_of_policies_agree() {
    let bed = Bed::new();
    let mut kernel = Kernel::load(&bed);
    let (mut scene, mut tally) = (Scene::new(SEED), Tally::default());
    kernel.datapath.apply(&scene.start()).unwrap();
    for set in 0..SETS {
        let place = format!("seed {SEED:#x}, set {set}");
        kernel.datapath.apply(&scene.change()).unwrap();
        ask_about_plaintext(&kernel, &mut scene, &mut tally, &place);
        ask_about_connects(&mut kernel, &mut scene, &mut tally, &place);
        for outcome in COUNTED {
            let expected = tally.expected.get(&outcome).copied().unwrap_or(0);
            assert_eq!(counted(&kernel.datapath, outcome), expected, "{outcome:?} after {place}");
        }
        // Which of the two it was depends on the kernel's draw.
        let passed =
            [Outcome::ConnectCaptured, Outcome::ConnectCarried].map(|outcome| counted(&kernel.datapath, outcome));
        assert_eq!(passed.iter().sum::<u64>(), tally.passed, "after {place}");
    }
    println!("{} in plaintext, {} connects, {:?}", tally.plaintext, tally.connects, tally.expected);
    assert!(tally.plaintext >= 50_000 && tally.connects >= 50_000);
    // The sets are worth asking about.
    assert!(tally.share(Outcome::LookupDenied, tally.plaintext) > 0.1);
    assert!(tally.share(Outcome::LookupPlaintext, tally.plaintext) > 0.1);
    assert!(tally.share(Outcome::ConnectDenied, tally.connects) > 0.1);
    for outcome in [Outcome::ConnectCaptured, Outcome::ConnectCarried] {
        assert!(counted(&kernel.datapath, outcome) > tally.connects / 10, "{outcome:?}");
    }
    assert!(tally.connects_to_services_denied > 500);
    kernel.datapath.unload().unwrap();
}

fn ask_about_plaintext(kernel: &Kernel<'_>, scene: &mut Scene, tally: &mut Tally, place: &str) {
    let guarded = scene.callers();
    for asked in 0..PLAINTEXT {
        let workload = &guarded[asked % guarded.len()];
        let to = workload.addresses[scene.random.random_range(0..2)];
        let from = SocketAddr::new(scene.address(to.is_ipv4()), scene.random.random_range(1024..=u16::MAX));
        let port = PORTS[scene.random.random_range(0..PORTS.len())];
        if from.ip() == to {
            continue;
        }
        let mode = workload.port_modes.get(&port).copied().unwrap_or(workload.mode);
        let meaning = mode == Mode::Permissive && world(scene).admits(workload, anonymous(from.ip()), port);
        let matched = scene.snapshot().policies_of(&workload.name).matched(None, from.ip(), port);
        let engine = decide(Some(mode), Arrival::Plaintext, &matched).verdict == Verdict::Pass;
        let guard = kernel.guard.admits(from, SocketAddr::new(to, port));
        let what = || format!("{place}: plaintext {from} -> {} {to}:{port}\n{:#?}", workload.name, scene.policies);
        assert_eq!((guard, engine), (meaning, meaning), "kernel, engine != meaning, {}", what());
        tally.plaintext += 1;
        tally.expect(match (mode, meaning) {
            (Mode::Strict, _) => Outcome::LookupStrict,
            (_, true) => Outcome::LookupPlaintext,
            (_, false) => Outcome::LookupDenied,
        });
    }
}

fn anonymous(address: IpAddr) -> Caller<'static> {
    Caller { identity: None, address }
}

fn world(scene: &Scene) -> World<'_> {
    World { policies: scene.policies.values().collect(), services: scene.services.values().collect() }
}

fn ask_about_connects(kernel: &mut Kernel<'_>, scene: &mut Scene, tally: &mut Tally, place: &str) {
    for caller in scene.callers() {
        let mut to: Vec<SocketAddr> = (0..CONNECTS).map(|_| scene.destination()).collect();
        to.retain(|to| !caller.addresses.contains(&to.ip()));
        let answers = kernel.connect(&caller, scene.snapshot(), &to);
        for (to, answer) in to.into_iter().zip(answers) {
            let what = || format!("{place}: {} -> {to}\n{:#?}", caller.name, scene.policies);
            let possible = meanings(scene, &caller, to, &what);
            assert!(possible.contains(&answer), "errno {answer} of the kernel, which means {possible:?}, {}", what());
            let refused = answer == libc::ECONNREFUSED;
            tally.connects += u64::from(!refused);
            let is_vip = scene.services.values().any(|service| service.vips.contains(&to.ip()));
            tally.connects_to_services_denied += u64::from(is_vip && answer == libc::EACCES);
            match answer {
                0 => tally.passed += 1,
                libc::EACCES => tally.expect(Outcome::ConnectDenied),
                _ => tally.expect(Outcome::ConnectNoEndpoints),
            }
        }
    }
}

/// What connect() may say, by the oracle, which must be what the engine says of whoever may answer: one answer, unless
/// the kernel draws between endpoints that policy tells apart.
fn meanings(scene: &Scene, caller: &Workload, to: SocketAddr, what: &dyn Fn() -> String) -> BTreeSet<i32> {
    let answering = answering(scene, to);
    let address = *caller.addresses.iter().find(|address| address.is_ipv4() == to.is_ipv4()).unwrap();
    let (world, identity) = (world(scene), caller.identity.as_str());
    let prefers_here =
        scene.services.values().any(|service| service.vips.contains(&to.ip()) && service.prefer == Prefer::SameNode);
    let is_here = |workload: &Workload| workload.node.as_str() == "n1";
    let some_here = answering.iter().any(|(workload, _)| is_here(workload));
    let some_elsewhere = answering.iter().any(|(workload, _)| !is_here(workload));
    let (mut groups, mut verdicts, mut possible) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (workload, port) in answering {
        let admitted = world.admits(workload, Caller { identity: Some(identity), address }, port);
        let group = scene.snapshot().policies_of(&workload.name);
        let matched = group.matched(Some(&caller.identity), address, port);
        let engine = decide(Some(Mode::Strict), Arrival::Authenticated, &matched).verdict == Verdict::Pass;
        assert_eq!(engine, admitted, "engine != meaning for {}, {}", workload.name, what());
        verdicts.push(admitted);
        groups.push((group.number, port));
        if is_here(workload) {
            possible.insert(if admitted { 0 } else { libc::EACCES });
        }
    }
    groups.dedup();
    if verdicts.is_empty() {
        return BTreeSet::from([libc::ECONNREFUSED]);
    }
    // The daemon picks.
    if !some_here || some_elsewhere && !prefers_here {
        // All who may answer are one to the rules, so the kernel can tell before it is known who will.
        let is_denied = !verdicts[0] && groups.len() == 1;
        possible.insert(if is_denied { libc::EACCES } else { 0 });
    }
    possible
}

/// Who may answer there, and on which port of its own.
fn answering(scene: &Scene, to: SocketAddr) -> Vec<(&Workload, u16)> {
    if let Some(workload) = scene.workloads.values().find(|workload| workload.addresses.contains(&to.ip())) {
        return vec![(workload, to.port())];
    }
    let service = scene.services.values().find(|service| service.vips.contains(&to.ip())).unwrap();
    let port = service.ports.iter().find(|port| port.port == to.port()).unwrap();
    let selected = scene.workloads.values().filter(|workload| selects(service, workload));
    selected.filter_map(|workload| Some((workload, target(&port.target, workload)?))).collect()
}
