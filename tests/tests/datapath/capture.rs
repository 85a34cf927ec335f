//! connect(), getpeername() and the record that the daemon takes.

use crate::bed::{
    Bed, MARK, NEIGHBOUR4, NEIGHBOUR6, OUTBOUND, POD4, POD6, connect, counted, ip, next_event, pod_entry,
    socket_address,
};
use mesh_common::addr::Ip;
use mesh_common::flow::{OriginalDestination, TupleKey};
use mesh_common::outcome::Outcome;
use mesh_common::service::{CidrAction, CidrKey, Frontend, FrontendKey, PROTO_TCP, Pod};
use mesh_userspace::datapath::{Datapath, Event};
use mesh_userspace::engine::MapOp;
use socket2::{Domain, Protocol, SockAddr, Socket};
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener};

const VIP4: &str = "10.96.0.1:80";
const VIP6: &str = "[fd96::1]:80";
const MAPPED_VIP: &str = "[::ffff:10.96.0.1]:80";
const EMPTY: &str = "10.96.0.2:80";
const SERVICE: u32 = 42;

pub(crate) fn frontend(address: &str, backends: u32) -> MapOp {
    let address = socket_address(address);
    let key = FrontendKey::new(address.ip().into(), address.port().to_be(), PROTO_TCP, 0);
    MapOp::SetFrontend(key, Frontend::new(SERVICE, backends, 0, 0, 0, 0, 0, 0))
}

fn range(address: &str, length: u32, action: CidrAction) -> MapOp {
    MapOp::SetCidr(length, CidrKey::new(ip(address)), action)
}

/// Two frontends with backends, one without.
pub(crate) fn services() -> Vec<MapOp> {
    vec![frontend(VIP4, 1), frontend(VIP6, 1), frontend(EMPTY, 0)]
}

/// The daemon's listeners in the pod.
pub(crate) struct Listeners {
    pub(crate) v4: TcpListener,
    pub(crate) v6: TcpListener,
}

impl Listeners {
    pub(crate) fn bind(bed: &Bed) -> Self {
        Self { v4: bed.pod.listen(&format!("{POD4}:{OUTBOUND}")), v6: bed.pod.listen(&format!("[{POD6}]:{OUTBOUND}")) }
    }
}

/// Accepts what has connected and takes its record, as the daemon does.
pub(crate) fn accept(
    bed: &Bed,
    datapath: &Datapath,
    listener: &TcpListener,
) -> (std::net::TcpStream, OriginalDestination) {
    let (stream, peer) = listener.accept().unwrap();
    let key = TupleKey::new(bed.pod.cookie(), peer.ip().into(), peer.port().to_be());
    let record = datapath.tuples().take(&key).unwrap().expect("a record of the accepted connection");
    assert_eq!(datapath.tuples().take(&key).unwrap(), None, "a record is taken once");
    (stream, record)
}

fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

#[test]
fn a_connect_is_captured_with_its_original_destination() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let listeners = Listeners::bind(&bed);
    let cases = [
        (Domain::IPV4, VIP4, VIP4, POD4, &listeners.v4, libc::AF_INET),
        (Domain::IPV6, VIP6, VIP6, POD6, &listeners.v6, libc::AF_INET6),
        (Domain::IPV6, MAPPED_VIP, VIP4, "::ffff:10.77.0.2", &listeners.v4, libc::AF_INET6),
    ];
    for (domain, called, original, own, listener, family) in cases {
        let before = counted(&datapath, Outcome::ConnectCaptured);
        let client = bed.pod.socket(domain, Protocol::TCP);
        connect(&client, called).unwrap();
        let (accepted, record) = accept(&bed, &datapath, listener);
        assert_eq!(SocketAddr::from(record.endpoint()), socket_address(original), "{called}");
        assert_eq!(record.netns_cookie(), bed.pod.cookie());
        assert_eq!(record.service(), SERVICE);
        assert_eq!(i32::from(record.family()), family);
        assert_eq!(record.pid(), std::process::id());
        assert_eq!(record.listener_port_be(), OUTBOUND.to_be());
        assert_eq!(peer(&client), socket_address(called), "getpeername() shows the original destination");
        assert_eq!(local(&client).ip().to_string(), own, "getsockname() shows the pod's address");
        assert_eq!(accepted.peer_addr().unwrap().port(), local(&client).port());
        assert_eq!(counted(&datapath, Outcome::ConnectCaptured), before + 1);
    }
    assert_eq!(counted(&datapath, Outcome::TupleRecorded), 3);
    assert_eq!(counted(&datapath, Outcome::PeernameRewritten), 3);
    datapath.unload().unwrap();
}

#[test]
fn unusual_clients_are_captured_too() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let listeners = Listeners::bind(&bed);

    // TCP Fast Open: data before connect() returns, and no connect() call at all.
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    client.send_to_with_flags(b"early", &SockAddr::from(socket_address(VIP4)), libc::MSG_FASTOPEN).unwrap();
    let (mut accepted, record) = accept(&bed, &datapath, &listeners.v4);
    assert_eq!(SocketAddr::from(record.endpoint()), socket_address(VIP4));
    let mut data = [0; 5];
    accepted.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"early");
    assert_eq!(peer(&client), socket_address(VIP4));

    // Bound before it connects, and to a device.
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    client.bind_device(Some(b"eth0")).unwrap();
    client.bind(&SockAddr::from(socket_address(&format!("{POD4}:0")))).unwrap();
    connect(&client, VIP4).unwrap();
    let (_, record) = accept(&bed, &datapath, &listeners.v4);
    assert_eq!(SocketAddr::from(record.endpoint()), socket_address(VIP4));

    // Multipath TCP, where the kernel has it: its first subflow is captured.
    if bed.pod.has_mptcp() {
        let client = bed.pod.socket(Domain::IPV4, Protocol::MPTCP);
        connect(&client, VIP4).unwrap();
        let (_, record) = accept(&bed, &datapath, &listeners.v4);
        assert_eq!(SocketAddr::from(record.endpoint()), socket_address(VIP4));
    }

    // Non-blocking.
    let client = bed.pod.socket(Domain::IPV6, Protocol::TCP);
    client.set_nonblocking(true).unwrap();
    let error = connect(&client, VIP6).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    let (_, record) = accept(&bed, &datapath, &listeners.v6);
    assert_eq!(SocketAddr::from(record.endpoint()), socket_address(VIP6));
    datapath.unload().unwrap();
}

#[test]
fn a_socket_that_goes_elsewhere_forgets_where_it_went_before() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let mut services = services();
    services.push(frontend("10.96.0.3:81", 1));
    datapath.apply(&services).unwrap();
    let listeners = Listeners::bind(&bed);
    let outside = format!("{NEIGHBOUR4}:7000");
    let _server = bed.neighbour.listen(&outside);

    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    connect(&client, VIP4).unwrap();
    drop(accept(&bed, &datapath, &listeners.v4));
    rustix::net::connect_unspec(&client).unwrap();
    connect(&client, "10.96.0.3:81").unwrap();
    let (_, record) = accept(&bed, &datapath, &listeners.v4);
    assert_eq!(SocketAddr::from(record.endpoint()), socket_address("10.96.0.3:81"));
    assert_eq!(peer(&client), socket_address("10.96.0.3:81"));

    let recorded = counted(&datapath, Outcome::TupleRecorded);
    rustix::net::connect_unspec(&client).unwrap();
    connect(&client, &outside).unwrap();
    assert_eq!(peer(&client), socket_address(&outside));
    assert_eq!(counted(&datapath, Outcome::TupleRecorded), recorded, "nothing is recorded for an unmeshed destination");

    // A refused connect forgets as well.
    rustix::net::connect_unspec(&client).unwrap();
    assert_eq!(connect(&client, EMPTY).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    connect(&client, &outside).unwrap();
    assert_eq!(peer(&client), socket_address(&outside));
    datapath.unload().unwrap();
}

#[test]
fn a_service_without_endpoints_refuses_at_connect() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let _listeners = Listeners::bind(&bed);
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    let error = connect(&client, EMPTY).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    let client = bed.pod.socket(Domain::IPV6, Protocol::TCP);
    let error = connect(&client, "[::ffff:10.96.0.2]:80").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    assert_eq!(counted(&datapath, Outcome::ConnectNoEndpoints), 2);
    assert_eq!(counted(&datapath, Outcome::ConnectCaptured), 0);
    datapath.unload().unwrap();
}

#[test]
fn what_is_not_in_the_mesh_is_left_alone() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let mut ops = services();
    // Workloads of a range, one of them excluded.
    ops.push(range("10.77.0.0", 96 + 24, CidrAction::CAPTURE));
    ops.push(range(NEIGHBOUR4, 128, CidrAction::PASS));
    datapath.apply(&ops).unwrap();
    let listeners = Listeners::bind(&bed);
    let (v4, v6) = (format!("{NEIGHBOUR4}:7000"), format!("[{NEIGHBOUR6}]:7000"));
    let servers = [bed.neighbour.listen(&v4), bed.neighbour.listen(&v6)];

    for (domain, address, outcome) in
        [(Domain::IPV4, &v4, Outcome::ConnectExcluded), (Domain::IPV6, &v6, Outcome::ConnectUnmeshed)]
    {
        let client = bed.pod.socket(domain, Protocol::TCP);
        connect(&client, address).unwrap();
        assert_eq!(peer(&client), socket_address(address));
        assert_eq!(counted(&datapath, outcome), 1, "{address}");
    }
    servers.iter().for_each(|server| drop(server.accept().unwrap()));

    // The daemon's own mark, loopback, the pod's own address, UDP.
    let app = bed.pod.listen("0.0.0.0:7001");
    let own = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    own.set_mark(MARK).unwrap();
    connect(&own, &v4).unwrap();
    for address in ["127.0.0.1:7001", "10.77.0.2:7001"] {
        connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), address).unwrap();
        drop(app.accept().unwrap());
    }
    let datagrams = bed.pod.socket(Domain::IPV4, Protocol::UDP);
    connect(&datagrams, "10.77.0.9:53").unwrap();
    assert_eq!(peer(&datagrams), socket_address("10.77.0.9:53"));
    let outcomes = [Outcome::ConnectOwn, Outcome::ConnectLoopback, Outcome::ConnectSelf, Outcome::DatagramUnmeshed];
    for outcome in outcomes {
        assert_eq!(counted(&datapath, outcome), 1, "{outcome:?}");
    }

    // A workload's address in the range is captured.
    assert_eq!(counted(&datapath, Outcome::ConnectCaptured), 0);
    connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), "10.77.0.9:8080").unwrap();
    let (_, record) = accept(&bed, &datapath, &listeners.v4);
    assert_eq!(SocketAddr::from(record.endpoint()), socket_address("10.77.0.9:8080"));
    assert_eq!(record.service(), 0);

    // A disarmed pod, and a namespace that never was one.
    datapath.disarm_pod(bed.pod.cookie()).unwrap();
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    connect(&client, &v4).unwrap();
    assert_eq!(counted(&datapath, Outcome::ConnectNotWorkload), 1);
    datapath.unload().unwrap();
}

#[test]
fn a_silent_daemon_closes_or_opens_as_the_workload_says() {
    let mut bed = Bed::new();
    bed.config.heartbeat_timeout = std::time::Duration::from_nanos(1);
    let mut datapath = bed.armed();
    let address = format!("{NEIGHBOUR4}:7000");
    let server = bed.neighbour.listen(&address);
    datapath.apply(&[frontend(&address, 1)]).unwrap();
    let _listeners = Listeners::bind(&bed);

    let error = connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), &address).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
    assert_eq!(counted(&datapath, Outcome::ConnectDaemonDown), 1);

    datapath.arm_pod(bed.pod.cookie(), pod_entry(Pod::FAIL_OPEN)).unwrap();
    connect(&bed.pod.socket(Domain::IPV4, Protocol::TCP), &address).unwrap();
    drop(server.accept().unwrap());
    assert_eq!(counted(&datapath, Outcome::ConnectFailOpen), 1);
    datapath.unload().unwrap();
}

#[test]
fn a_pod_without_an_address_of_the_family_refuses() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let v4_only = Pod::new(ip(POD4), Ip::UNSPECIFIED, 1, OUTBOUND.to_be(), 0, 2, Ip::UNSPECIFIED, Ip::UNSPECIFIED);
    datapath.arm_pod(bed.pod.cookie(), v4_only).unwrap();
    let error = connect(&bed.pod.socket(Domain::IPV6, Protocol::TCP), VIP6).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL));
    assert_eq!(counted(&datapath, Outcome::ConnectNoAddress), 1);
    datapath.unload().unwrap();
}

#[test]
fn a_refused_listener_leaves_no_record() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    let source = socket_address(&format!("{POD4}:41234"));
    client.bind(&SockAddr::from(source)).unwrap();
    assert_eq!(connect(&client, VIP4).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(counted(&datapath, Outcome::TupleRecorded), 1);
    let key = TupleKey::new(bed.pod.cookie(), source.ip().into(), source.port().to_be());
    assert_eq!(datapath.tuples().take(&key).unwrap(), None);
    datapath.unload().unwrap();
}

#[tokio::test]
async fn the_end_of_a_captured_connection_is_reported() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let mut events = datapath.events().unwrap();
    assert!(datapath.events().is_err(), "the events have one reader");
    let listeners = Listeners::bind(&bed);
    let client = bed.pod.socket(Domain::IPV4, Protocol::TCP);
    connect(&client, VIP4).unwrap();
    let source = local(&client);
    let (mut accepted, record) = accept(&bed, &datapath, &listeners.v4);
    client.send(b"twelve bytes").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut data = Vec::new();
    accepted.read_to_end(&mut data).unwrap();
    drop((accepted, client));
    let event = next_event(&mut events).await;
    let Event::Closed(closed) = event else { panic!("{event:?}") };
    assert_eq!(closed.source(), source.ip().into());
    assert_eq!(closed.source_port_be(), source.port().to_be());
    assert_eq!(closed.destination(), record.addr());
    assert_eq!(closed.destination_port_be(), 80_u16.to_be());
    assert_eq!(closed.connected_at_ns(), record.connected_at_ns());
    assert!(closed.closed_at_ns() > closed.connected_at_ns());
    assert_eq!(closed.service(), SERVICE);
    // The kernel counts SYN and FIN as a byte each.
    assert_eq!(closed.bytes_acked(), data.len() as u64 + 2);
    assert_eq!(counted(&datapath, Outcome::EventEmitted), 1);
    datapath.unload().unwrap();
}
