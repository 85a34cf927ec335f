//! What the kernel carries between two workloads of a node: the pod is one, the neighbour the other.

use crate::bed::{
    Bed, MARK, NEIGHBOUR4, NEIGHBOUR6, OUTBOUND, POD4, POD6, connect, counted, ip, next_event, socket_address,
    wait_until,
};
use crate::capture::{Listeners, accept};
use crate::run::Program;
use mesh_common::addr::Ip;
use mesh_common::event::FlowRecord;
use mesh_common::flow::OriginalDestination;
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::EVERYONE;
use mesh_common::policy::{Group, Matched, Mode, VerdictKey};
use mesh_common::service::{AppPort, AppPortKey, Backend, CidrAction, CidrKey, Frontend, FrontendKey, PROTO_TCP};
use mesh_userspace::datapath::{Datapath, Event, Events};
use mesh_userspace::engine::MapOp;
use socket2::{Domain, Protocol, SockAddr, Socket};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

const VIP4: &str = "10.96.0.1:80";
const VIP6: &str = "[fd96::1]:80";
const MAPPED_VIP: &str = "[::ffff:10.96.0.1]:80";
const SERVICE: u32 = 42;
const GROUP: u32 = 7;
/// The number of the bed's identity.
const IDENTITY: u32 = 2;
const PORT: u16 = 8080;

fn at(address: &str, port: u16) -> String {
    SocketAddr::new(address.parse().unwrap(), port).to_string()
}

fn slot(vip: &str, slot: u32) -> FrontendKey {
    let address = socket_address(vip);
    FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, slot)
}

/// A frontend whose backends here have these weights, and those elsewhere the rest of the total.
fn frontend(vip: &str, total: u32, here: &[(&str, u16, u32)]) -> Vec<MapOp> {
    let mut sum = 0;
    let mut ops: Vec<MapOp> = Vec::new();
    for ((address, port, weight), number) in here.iter().zip(1..) {
        sum += weight;
        ops.push(MapOp::SetBackend(slot(vip, number), Backend::new(ip(address), port.to_be(), 0, sum)));
    }
    let slots = u32::try_from(here.len()).unwrap();
    ops.push(MapOp::SetFrontend(slot(vip, 0), Frontend::new(SERVICE, 9, 0, 0, 0, total, sum, slots)));
    ops
}

fn guard(address: &str, port: u16, mode: Mode) -> MapOp {
    MapOp::SetAppPort(AppPortKey::new(ip(address), port.to_be()), AppPort::new(mode as u32, GROUP))
}

fn rule(source: u32, port: u16, matched: Matched) -> MapOp {
    MapOp::SetVerdict(VerdictKey::new(GROUP, source, port.to_be()), matched)
}

fn header(flags: u32) -> MapOp {
    rule(EVERYONE, 0, Matched::new(0, 0, 0, 0, 0, flags))
}

/// The bed with the neighbour as a strict workload behind the frontends and at its own addresses.
fn armed(bed: &Bed) -> Datapath {
    let mut datapath = bed.armed();
    datapath.attach_netns("default/neighbour.1", bed.neighbour.as_fd()).unwrap();
    let mut ops = vec![header(0)];
    for address in [NEIGHBOUR4, NEIGHBOUR6] {
        ops.push(guard(address, 0, Mode::Strict));
        ops.push(MapOp::SetCidr(128, CidrKey::new(ip(address)), CidrAction::carry(GROUP)));
    }
    ops.extend(frontend(VIP4, 1, &[(NEIGHBOUR4, PORT, 1)]));
    ops.extend(frontend(VIP6, 1, &[(NEIGHBOUR6, PORT, 1)]));
    datapath.apply(&ops).unwrap();
    datapath
}

fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

fn dial(bed: &Bed, to: &str) -> std::io::Result<Socket> {
    let client = bed.pod.socket(Domain::for_address(socket_address(to)), Protocol::TCP);
    connect(&client, to).map(|()| client)
}

/// A socket of the pod that the hooks leave alone, as those are that are made outside of its cgroup.
fn unhooked(bed: &Bed, from: SocketAddr) -> Socket {
    let socket = bed.pod.socket(Domain::for_address(from), Protocol::TCP);
    socket.set_mark(MARK).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SockAddr::from(from)).unwrap();
    socket
}

fn guard_program(datapath: &Datapath) -> Program {
    let links = datapath.links().unwrap();
    Program::open(links.iter().find(|link| link.name.contains("neighbour")).unwrap().program)
}

#[test]
fn a_connect_is_carried_to_an_endpoint_here_and_admitted_there() {
    let bed = Bed::new();
    let datapath = armed(&bed);
    let (v4, v6) = (bed.neighbour.listen(&at(NEIGHBOUR4, PORT)), bed.neighbour.listen(&at(NEIGHBOUR6, PORT)));
    let (own4, own6) = (at(NEIGHBOUR4, PORT), at(NEIGHBOUR6, PORT));
    let cases = [
        (VIP4, &v4, POD4),
        (VIP6, &v6, POD6),
        (MAPPED_VIP, &v4, POD4),
        // By its own address.
        (&own4, &v4, POD4),
        (&own6, &v6, POD6),
    ];
    for (number, (called, server, own)) in (1..).zip(cases) {
        let client = dial(&bed, called).unwrap();
        let (mut accepted, from) = server.accept().unwrap();
        assert_eq!(peer(&client), socket_address(called), "getpeername() shows what was called");
        assert_eq!(from.ip().to_string(), own, "the application sees who calls");
        assert_eq!(from.port(), local(&client).port());
        client.send(b"hello").unwrap();
        let mut data = [0; 5];
        accepted.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"hello");
        let outcomes = [Outcome::ConnectCarried, Outcome::FlowAdmitted, Outcome::LookupCarried];
        assert_eq!(outcomes.map(|outcome| counted(&datapath, outcome)), [number; 3], "{called}");
    }
    assert_eq!(counted(&datapath, Outcome::ConnectCaptured), 0);
    wait_until("admissions to be taken back", || datapath.admissions().list().unwrap().is_empty());
    assert_eq!(counted(&datapath, Outcome::AdmissionEvicted), 0);
    datapath.unload().unwrap();
}

#[test]
fn unusual_clients_are_carried_too() {
    let bed = Bed::new();
    let datapath = armed(&bed);
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT));

    // TCP Fast Open.
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    client.send_to_with_flags(b"early", &SockAddr::from(socket_address(VIP4)), libc::MSG_FASTOPEN).unwrap();
    let mut data = [0; 5];
    server.accept().unwrap().0.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"early");
    assert_eq!(peer(&client), socket_address(VIP4));

    // Bound to a device and to the workload's own address.
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    client.bind_device(Some(b"eth0")).unwrap();
    client.bind(&SockAddr::from(socket_address(&at(POD4, 0)))).unwrap();
    connect(&client, VIP4).unwrap();
    drop(server.accept().unwrap());

    if bed.pod.has_mptcp() {
        let client = bed.pod.socket(Domain::IPV4, Protocol::MPTCP);
        connect(&client, VIP4).unwrap();
        drop(server.accept().unwrap());
    }

    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    client.set_nonblocking(true).unwrap();
    assert_eq!(connect(&client, VIP4).unwrap_err().raw_os_error(), Some(libc::EINPROGRESS));
    drop(server.accept().unwrap());

    // Once more with the same socket, and then to somewhere that the mesh does not know.
    let client = dial(&bed, VIP4).unwrap();
    drop(server.accept().unwrap());
    rustix::net::connect_unspec(&client).unwrap();
    connect(&client, VIP4).unwrap();
    drop(server.accept().unwrap());
    let carried = if bed.pod.has_mptcp() { 6 } else { 5 };
    assert_eq!(counted(&datapath, Outcome::LookupCarried), carried);
    assert_eq!(counted(&datapath, Outcome::ConnectCaptured), 0);
    datapath.unload().unwrap();
}

#[test]
fn a_socket_bound_to_another_address_than_the_workloads_is_left_to_the_daemon() {
    let bed = Bed::new();
    let datapath = armed(&bed);
    let listeners = Listeners::bind(&bed);
    bed.pod.ip("address add 10.77.0.22/24 dev eth0");
    for bound in ["127.0.0.1:0", "10.77.0.22:0"] {
        let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
        client.bind(&SockAddr::from(socket_address(bound))).unwrap();
        connect(&client, VIP4).unwrap();
        let (_, record) = accept(&bed, &datapath, &listeners.v4);
        assert_eq!(record.flags() & OriginalDestination::ELSEWHERE, 0, "any endpoint may be picked");
    }
    assert_eq!(counted(&datapath, Outcome::ConnectCarried), 0);
    datapath.unload().unwrap();
}

#[test]
fn the_kernel_draws_by_weight() {
    const DRAWS: u32 = 2_000;
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let (first, second) = (bed.neighbour.listen(&at(NEIGHBOUR4, 8081)), bed.neighbour.listen(&at(NEIGHBOUR4, 8082)));
    let daemon = Listeners::bind(&bed);
    datapath.apply(&frontend(VIP4, 10, &[(NEIGHBOUR4, 8081, 2), (NEIGHBOUR4, 8082, 3)])).unwrap();
    let servers = [&first, &second, &daemon.v4];
    servers.iter().for_each(|server| server.set_nonblocking(true).unwrap());
    let mut picked = [0_u32; 3];
    for _ in 0..DRAWS {
        let client = dial(&bed, VIP4).unwrap();
        let (at, accepted) = answered(&servers);
        picked[at] += 1;
        // The client first: its port is free again at once, and the server's not in TIME_WAIT.
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop((client, accepted));
    }
    for (picked, share) in picked.into_iter().zip([0.2, 0.3, 0.5]) {
        let (expected, deviation) = (f64::from(DRAWS) * share, (f64::from(DRAWS) * share * (1.0 - share)).sqrt());
        assert!((f64::from(picked) - expected).abs() < 5.0 * deviation, "{picked} where {expected} were due");
    }
    assert_eq!(counted(&datapath, Outcome::ConnectCarried), u64::from(picked[0] + picked[1]));

    // One endpoint less: its slot goes, and nobody is sent there any more.
    let ops = [&frontend(VIP4, 3, &[(NEIGHBOUR4, 8082, 3)])[..], &[MapOp::RemoveBackend(slot(VIP4, 2))]].concat();
    datapath.apply(&ops).unwrap();
    for _ in 0..50 {
        let _client = dial(&bed, VIP4).unwrap();
        assert_eq!(answered(&servers).0, 1);
    }
    datapath.unload().unwrap();
}

/// Which server has got the connection.
fn answered(servers: &[&TcpListener]) -> (usize, TcpStream) {
    let mut found = None;
    wait_until("a connection", || {
        found = servers.iter().enumerate().find_map(|(at, server)| Some((at, server.accept().ok()?.0)));
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn the_daemon_is_told_that_the_draw_fell_elsewhere() {
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let listeners = Listeners::bind(&bed);
    // Next to nothing here.
    datapath.apply(&frontend(VIP4, u32::MAX, &[(NEIGHBOUR4, PORT, 1)])).unwrap();
    let _client = dial(&bed, VIP4).unwrap();
    let (_, record) = accept(&bed, &datapath, &listeners.v4);
    assert_eq!(record.flags(), OriginalDestination::ELSEWHERE);
    // Without any slot there is no draw; nor where a slot is missing, because all are being rewritten.
    datapath.apply(&frontend(VIP4, 1, &[])).unwrap();
    let _client = dial(&bed, VIP4).unwrap();
    assert_eq!(accept(&bed, &datapath, &listeners.v4).1.flags(), 0);
    datapath.apply(&frontend(VIP4, 2, &[(NEIGHBOUR4, PORT, 1), (NEIGHBOUR4, PORT, 1)])).unwrap();
    datapath.apply(&[MapOp::RemoveBackend(slot(VIP4, 1))]).unwrap();
    let _client = dial(&bed, VIP4).unwrap();
    assert_eq!(accept(&bed, &datapath, &listeners.v4).1.flags(), 0);
    datapath.unload().unwrap();
}

#[test]
fn policy_refuses_at_connect_and_at_the_destination_at_once() {
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT));
    let program = guard_program(&datapath);
    let client = dial(&bed, VIP4).unwrap();
    drop(server.accept().unwrap());
    let (from, to) = (local(&client), socket_address(&at(NEIGHBOUR4, PORT)));
    // As long as the client's socket lives, its SYN would be admitted: it may be a SYN cookie's answer.
    assert!(program.admits(from, to));

    datapath.apply(&[rule(IDENTITY, PORT, Matched::new(3, 0, 0, 0, 0, 0))]).unwrap();
    for called in [VIP4, &at(NEIGHBOUR4, PORT)] {
        assert_eq!(dial(&bed, called).unwrap_err().raw_os_error(), Some(libc::EACCES), "{called}");
    }
    assert_eq!(counted(&datapath, Outcome::ConnectDenied), 2);
    assert!(!program.admits(from, to), "what has been admitted is decided about again");
    assert_eq!(counted(&datapath, Outcome::LookupCarriedDenied), 1);

    datapath.apply(&[MapOp::RemoveVerdict(VerdictKey::new(GROUP, IDENTITY, PORT.to_be()))]).unwrap();
    drop(dial(&bed, VIP4).unwrap());
    drop(server.accept().unwrap());
    datapath.apply(&[header(Group::HAS_ALLOW), rule(IDENTITY, PORT, Matched::new(0, 1, 0, 0, 0, 0))]).unwrap();
    drop(dial(&bed, VIP4).unwrap());
    drop(server.accept().unwrap());
    datapath.apply(&[MapOp::RemoveVerdict(VerdictKey::new(GROUP, IDENTITY, PORT.to_be()))]).unwrap();
    assert_eq!(dial(&bed, VIP4).unwrap_err().raw_os_error(), Some(libc::EACCES));
    // A port without the mesh is not held to its rules.
    datapath.apply(&[guard(NEIGHBOUR4, PORT, Mode::Disabled)]).unwrap();
    drop(dial(&bed, VIP4).unwrap());
    datapath.unload().unwrap();
}

#[test]
fn nobody_else_is_admitted_on_the_strength_of_a_carried_connection() {
    let bed = Bed::new();
    let datapath = armed(&bed);
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT));
    let program = guard_program(&datapath);
    let to = at(NEIGHBOUR4, PORT);
    let client = dial(&bed, VIP4).unwrap();
    let accepted = server.accept().unwrap().0;
    let from = local(&client);
    let elsewhere = socket_address(&at(NEIGHBOUR4, PORT + 1));
    assert!(!program.admits(SocketAddr::new(from.ip(), from.port() ^ 1), socket_address(&to)), "another port");
    assert!(!program.admits(SocketAddr::new("10.77.0.9".parse().unwrap(), from.port()), socket_address(&to)));
    assert!(!program.admits(from, elsewhere), "another destination");

    // The port is used again, past the hooks, once the connection is over.
    client.set_linger(Some(Duration::ZERO)).unwrap();
    drop((client, accepted));
    assert!(!program.admits(from, socket_address(&to)));
    assert_eq!(connect(&unhooked(&bed, from), &to).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(datapath.admissions().list().unwrap().is_empty());

    // A connection that was refused leaves nothing either.
    drop(server);
    assert_eq!(dial(&bed, VIP4).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(datapath.admissions().list().unwrap().is_empty());
    datapath.unload().unwrap();
}

#[test]
fn what_arrives_in_plaintext_is_judged_as_before() {
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT));
    let from = socket_address(&at(POD4, 0));
    let to = at(NEIGHBOUR4, PORT);
    assert_eq!(connect(&unhooked(&bed, from), &to).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(counted(&datapath, Outcome::LookupStrict), 1);
    datapath.apply(&[guard(NEIGHBOUR4, 0, Mode::Permissive)]).unwrap();
    connect(&unhooked(&bed, from), &to).unwrap();
    drop(server.accept().unwrap());
    assert_eq!(counted(&datapath, Outcome::LookupPlaintext), 1);
    datapath.unload().unwrap();
}

#[test]
fn a_backend_that_refuses_is_left_to_the_daemon_for_a_while() {
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let listeners = Listeners::bind(&bed);
    assert_eq!(dial(&bed, VIP4).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let _client = dial(&bed, VIP4).unwrap();
    let (_, record) = accept(&bed, &datapath, &listeners.v4);
    assert_eq!(record.flags(), 0, "the daemon may try that one, too");
    // Others are not concerned.
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT + 1));
    datapath.apply(&frontend(VIP4, 1, &[(NEIGHBOUR4, PORT + 1, 1)])).unwrap();
    let _client = dial(&bed, VIP4).unwrap();
    drop(server.accept().unwrap());
    datapath.unload().unwrap();
}

#[test]
fn without_a_guard_nothing_is_carried_and_a_silent_daemon_is_not_asked() {
    let mut bed = Bed::new();
    bed.config.heartbeat_timeout = Duration::from_nanos(1);
    let mut datapath = armed(&bed);
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT));
    let _client = dial(&bed, VIP4).unwrap();
    drop(server.accept().unwrap());
    datapath.apply(&[MapOp::RemoveAppPort(AppPortKey::new(ip(NEIGHBOUR4), 0))]).unwrap();
    assert_eq!(dial(&bed, VIP4).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(counted(&datapath, Outcome::ConnectDaemonDown), 1);
    datapath.unload().unwrap();
}

#[test]
fn a_workload_may_be_its_own_endpoint() {
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let server = bed.pod.listen(&at(POD4, PORT));
    datapath.apply(&[&frontend(VIP4, 1, &[(POD4, PORT, 1)])[..], &[guard(POD4, 0, Mode::Strict)]].concat()).unwrap();
    let client = dial(&bed, VIP4).unwrap();
    let (_, from) = server.accept().unwrap();
    assert_eq!((peer(&client), from.ip().to_string()), (socket_address(VIP4), POD4.to_owned()));
    assert_eq!(counted(&datapath, Outcome::LookupSelf), 1);
    datapath.apply(&[rule(IDENTITY, PORT, Matched::new(3, 0, 0, 0, 0, 0))]).unwrap();
    assert_eq!(dial(&bed, VIP4).unwrap_err().raw_os_error(), Some(libc::EACCES));
    datapath.unload().unwrap();
}

async fn next_flow(events: &mut Events) -> FlowRecord {
    let event = next_event(events).await;
    let Event::Flow(record) = event else { panic!("{event:?}") };
    record
}

#[tokio::test]
async fn both_ends_report_the_bytes_that_arrived_whoever_ends_it() {
    let bed = Bed::new();
    let mut datapath = armed(&bed);
    let mut events = datapath.events().unwrap();
    let server = bed.neighbour.listen(&at(NEIGHBOUR4, PORT));
    for is_client_first in [true, false] {
        let mut client: TcpStream = dial(&bed, VIP4).unwrap().into();
        let (mut accepted, from) = server.accept().unwrap();
        let opened = next_flow(&mut events).await;
        assert_eq!(opened.flags(), FlowRecord::OPENED);
        assert_eq!((opened.source(), opened.source_port_be()), (ip(POD4), from.port().to_be()));
        assert_eq!((opened.backend(), opened.backend_port_be()), (ip(NEIGHBOUR4), PORT.to_be()));
        assert_eq!((opened.destination(), opened.destination_port_be()), (ip("10.96.0.1"), 80_u16.to_be()));
        assert_eq!((opened.netns_cookie(), opened.service()), (bed.pod.cookie(), SERVICE));
        assert_eq!((opened.identity(), opened.pid()), (IDENTITY, std::process::id()));

        client.write_all(&[1; 10_000]).unwrap();
        accepted.read_exact(&mut [0; 10_000]).unwrap();
        accepted.write_all(&[2; 777]).unwrap();
        client.read_exact(&mut [0; 777]).unwrap();
        let (first, mut last) = if is_client_first { (client, accepted) } else { (accepted, client) };
        first.shutdown(Shutdown::Write).unwrap();
        last.read_to_end(&mut Vec::new()).unwrap();
        drop((last, first));
        let records = [next_flow(&mut events).await, next_flow(&mut events).await];
        let by_destination = |record: &&FlowRecord| record.has(FlowRecord::BY_DESTINATION);
        let there = records.iter().find(by_destination).unwrap();
        let here = records.iter().find(|record| !by_destination(record)).unwrap();
        assert_eq!((here.bytes_sent(), there.bytes_sent()), (10_000, 777), "client first: {is_client_first}");
        assert!(here.has(FlowRecord::SERVED), "the destination's record may be waited for");
        for record in [here, there] {
            assert_eq!(record.connected_at_ns(), opened.connected_at_ns());
            assert_eq!((record.source(), record.source_port_be()), (opened.source(), opened.source_port_be()));
            assert_eq!((record.backend(), record.backend_port_be()), (opened.backend(), opened.backend_port_be()));
        }
        assert_eq!((here.identity(), there.destination()), (IDENTITY, Ip::UNSPECIFIED));
    }
    drop(server);
    dial(&bed, VIP4).unwrap_err();
    // What never began tells its end alone.
    let failed = next_flow(&mut events).await;
    assert!(!failed.has(FlowRecord::OPENED) && failed.has(FlowRecord::UNANSWERED) && failed.segments_in() > 0);
    assert_eq!(failed.bytes_sent(), 0);
    assert_ne!(failed.backend_port_be(), OUTBOUND.to_be());
    datapath.unload().unwrap();
}
