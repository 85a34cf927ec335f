//! What policy does to connects and plaintext, and what is told about it.

use crate::bed::{Bed, NEIGHBOUR4, POD4, connect, counted, ip, next_event, pod_entry, socket_address};
use crate::capture::{Listeners, accept};
use crate::run::Program;
use mesh_common::event::VerdictRecord;
use mesh_common::maps;
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::{AUTHENTICATED, EVERYONE};
use mesh_common::policy::{Group, Matched, Mode, VerdictKey};
use mesh_common::service::{AppPort, AppPortKey, CidrAction, CidrKey, Frontend, FrontendKey, PROTO_TCP, Pod, RangeKey};
use mesh_userspace::datapath::{Event, Events};
use mesh_userspace::engine::MapOp;
use socket2::{Domain, Protocol};
use std::time::Duration;

const SERVICE: u32 = 42;
const GROUP: u32 = 7;
/// The number of the bed's identity.
const IDENTITY: u32 = 2;
const VIP: &str = "10.96.0.1:80";

fn verdict(source: u32, port: u16, matched: Matched) -> MapOp {
    MapOp::SetVerdict(VerdictKey::new(GROUP, source, port.to_be()), matched)
}

fn header(flags: u32) -> MapOp {
    verdict(EVERYONE, 0, Matched::new(0, 0, 0, 0, 0, flags))
}

/// A frontend whose backends are in the group, on port 8080.
fn frontend() -> MapOp {
    let address = socket_address(VIP);
    let key = FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, 0);
    MapOp::SetFrontend(key, Frontend::new(SERVICE, 1, GROUP, 8080_u16.to_be(), 0, 0, 0, 0))
}

fn guard(mode: Mode) -> MapOp {
    MapOp::SetAppPort(AppPortKey::new(ip(POD4), 0), AppPort::new(mode as u32, GROUP))
}

async fn next_verdict(events: &mut Events) -> VerdictRecord {
    loop {
        let event = next_event(events).await;
        if let Event::Verdict(record) = event {
            return record;
        }
    }
}

#[tokio::test]
async fn a_denied_connect_fails_at_once_and_is_reported() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let mut events = datapath.events().unwrap();
    let _listeners = Listeners::bind(&bed);
    datapath.apply(&[verdict(IDENTITY, 8080, Matched::new(3, 0, 0, 0, 0, 0)), header(0), frontend()]).unwrap();
    for (setting, errno) in [(0, libc::EACCES), (13, libc::EACCES), (111, libc::ECONNREFUSED)] {
        datapath.apply(&[MapOp::SetDeniedErrno(setting)]).unwrap();
        let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
        assert_eq!(connect(&client, VIP).unwrap_err().raw_os_error(), Some(errno));
        let record = next_verdict(&mut events).await;
        assert_eq!(record.outcome(), Outcome::ConnectDenied as u32);
        assert_eq!((record.group(), record.identity(), record.rule()), (GROUP, IDENTITY, 3));
        assert_eq!((record.source(), record.source_port_be()), (ip(POD4), 0));
        assert_eq!((record.destination(), record.destination_port_be()), (ip("10.96.0.1"), 80_u16.to_be()));
        assert_eq!((record.netns_cookie(), record.service()), (bed.pod.cookie(), SERVICE));
        assert_eq!(record.pid(), std::process::id());
        assert!(record.decided_at_ns() > 0);
    }
    assert_eq!(counted(&datapath, Outcome::ConnectDenied), 3);
    // The rule is about another port of the workload's.
    datapath.apply(&[MapOp::RemoveVerdict(VerdictKey::new(GROUP, IDENTITY, 8080_u16.to_be()))]).unwrap();
    datapath.apply(&[verdict(IDENTITY, 80, Matched::new(3, 0, 0, 0, 0, 0))]).unwrap();
    connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), VIP).unwrap();
    datapath.unload().unwrap();
}

#[test]
fn a_workload_that_fails_open_is_held_to_policy_nevertheless() {
    let mut bed = Bed::new();
    bed.config.heartbeat_timeout = Duration::from_nanos(1);
    let mut datapath = bed.armed();
    datapath.arm_pod(bed.pod.cookie(), pod_entry(Pod::FAIL_OPEN)).unwrap();
    datapath.apply(&[header(Group::DENY_BY_DEFAULT), frontend()]).unwrap();
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    assert_eq!(connect(&client, VIP).unwrap_err().raw_os_error(), Some(libc::EACCES));
    datapath.unload().unwrap();
}

#[test]
fn without_its_header_a_group_lets_nothing_pass() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let listeners = Listeners::bind(&bed);
    let app = bed.pod.listen(&format!("{POD4}:8080"));
    let everything = Matched::new(0, 1, 0, 0, 0, 0);
    let capture = MapOp::SetCidr(128, CidrKey::new(ip("10.77.0.9")), CidrAction::capture(GROUP));
    let range = MapOp::SetRange(32 + 96, RangeKey::new(GROUP, ip("0.0.0.0")), 1 << 31);
    let rules = [AUTHENTICATED, IDENTITY, 1 << 31].map(|source| verdict(source, 0, everything));
    datapath.apply(&[&rules[..], &[range, guard(Mode::Permissive), capture, frontend()]].concat()).unwrap();
    for destination in [VIP, "10.77.0.9:1"] {
        let error = connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), destination).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{destination}");
    }
    let to = format!("{POD4}:8080");
    connect(&bed.neighbour.socket(Domain::IPV4, Protocol::TCP), &to).unwrap_err();
    assert_eq!(counted(&datapath, Outcome::LookupDenied), 1);

    datapath.apply(&[header(Group::HAS_ALLOW)]).unwrap();
    for destination in [VIP, "10.77.0.9:1"] {
        connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), destination).unwrap();
        drop(accept(&bed, &datapath, &listeners.v4));
    }
    connect(&bed.neighbour.socket(Domain::IPV4, Protocol::TCP), &to).unwrap();
    drop(app.accept().unwrap());
    datapath.unload().unwrap();
}

#[tokio::test]
async fn what_the_guard_refuses_and_admitted_plaintext_are_reported() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let mut events = datapath.events().unwrap();
    let _app = bed.pod.listen(&format!("{POD4}:8080"));
    datapath.apply(&[verdict(EVERYONE, 9090, Matched::new(5, 0, 0, 0, 0, 0)), header(0)]).unwrap();
    let cases = [
        (Mode::Permissive, 8080, Outcome::LookupPlaintext, 0),
        (Mode::Permissive, 9090, Outcome::LookupDenied, 5),
        (Mode::Permissive, crate::bed::OUTBOUND, Outcome::LookupMeshPort, 0),
        (Mode::Strict, 8080, Outcome::LookupStrict, 0),
    ];
    for (mode, port, outcome, rule) in cases {
        datapath.apply(&[guard(mode)]).unwrap();
        let client = bed.neighbour.socket(Domain::IPV4, Protocol::TCP);
        let admitted = connect(&client, &format!("{POD4}:{port}")).is_ok();
        assert_eq!(admitted, outcome == Outcome::LookupPlaintext);
        let record = next_verdict(&mut events).await;
        assert_eq!(record.outcome(), outcome as u32, "{port} {mode:?}");
        assert_eq!((record.group(), record.identity(), record.rule()), (GROUP, 0, rule));
        assert_eq!((record.destination(), record.destination_port_be()), (ip(POD4), port.to_be()));
        assert_eq!((record.source(), record.netns_cookie()), (ip(NEIGHBOUR4), 0));
        assert_ne!(record.source_port_be(), 0);
    }
    datapath.unload().unwrap();
}

#[test]
fn a_flood_of_refusals_leaves_room_for_close_records() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let listeners = Listeners::bind(&bed);
    datapath.apply(&[guard(Mode::Strict), crate::capture::frontend(VIP, 1)]).unwrap();
    let links = datapath.links().unwrap();
    let program = Program::open(links.iter().find(|link| link.name.contains("pod")).unwrap().program);
    let (from, to) = (socket_address(&format!("{NEIGHBOUR4}:40000")), socket_address(&format!("{POD4}:8080")));
    // As many as would fill the ring buffer whole, and more.
    let flood = u64::from(maps::EVENTS_BYTES) / size_of::<VerdictRecord>() as u64 + 1;
    for _ in 0..flood {
        assert!(!program.admits(from, to));
    }
    let lost = counted(&datapath, Outcome::VerdictLost);
    assert!(lost > flood / 3 && lost < flood, "{lost} of {flood}");
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    connect(&client, VIP).unwrap();
    drop((accept(&bed, &datapath, &listeners.v4), client));
    crate::bed::wait_until("the close record", || counted(&datapath, Outcome::EventEmitted) == 1);
    assert_eq!(counted(&datapath, Outcome::EventLost), 0);
    datapath.unload().unwrap();
}
