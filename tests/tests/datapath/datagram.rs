//! UDP: connect(), sendmsg(), recvmsg() and the guard, with the daemon's socket at the workload's aliases.

use crate::bed::{
    ALIAS6, Bed, MARK, NEIGHBOUR4, NEIGHBOUR6, OUTBOUND, POD4, POD6, connect, counted, ip, pod_entry, socket_address,
};
use mesh_common::addr::Endpoint;
use mesh_common::datagram::{ALIAS4, DELIVERY, alias};
use mesh_common::outcome::Outcome;
use mesh_common::policy::source::EVERYONE;
use mesh_common::policy::{Group, Matched, Mode, VerdictKey};
use mesh_common::service::{AppPort, AppPortKey, BypassKey, DatagramFrontend, Pod};
use mesh_userspace::datapath::Datapath;
use mesh_userspace::engine::MapOp;
use mesh_userspace::netns::{AliasRange, CaptureSocket, Captured, Namespace, Namespaces};
use socket2::{Domain, Protocol, SockAddr, Socket};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

const VIP4: &str = "10.96.0.1:53";
const OTHER4: &str = "10.96.0.2:53";
const MAPPED_VIP: &str = "[::ffff:10.96.0.1]:53";
const VIP6: &str = "[fd96::1]:53";
const EMPTY: &str = "10.96.0.3:53";
const DENIED: &str = "10.96.0.4:53";
const GROUP: u32 = 9;

fn frontend(address: &str, number: u32, backends: u32, group: u32) -> MapOp {
    MapOp::SetDatagram(socket_address(address).into(), DatagramFrontend::new(7, backends, group, number, 0, 0))
}

fn services() -> Vec<MapOp> {
    let header = VerdictKey::new(GROUP, EVERYONE, 0);
    vec![
        MapOp::SetVerdict(header, Matched::new(0, 0, 0, 0, 0, Group::DENY_BY_DEFAULT)),
        frontend(VIP4, 2, 1, 0),
        frontend(OTHER4, 3, 1, 0),
        frontend(VIP6, 4, 1, 0),
        frontend(EMPTY, 5, 0, 0),
        frontend(DENIED, 6, 1, GROUP),
    ]
}

/// The daemon's side of a pod: its aliases and the sockets that listen at them.
struct Daemon {
    namespaces: Namespaces,
    namespace: Namespace,
    v4: CaptureSocket,
    v6: CaptureSocket,
}

impl Daemon {
    async fn start(bed: &Bed) -> Self {
        let namespaces = Namespaces::spawn().unwrap();
        let path = format!("/proc/self/task/{}/ns/net", bed.pod.thread_id());
        let namespace = namespaces.open(Path::new(&path)).await.unwrap();
        let range = |range: &str, own: &str| AliasRange { range: range.parse().unwrap(), own: own.parse().unwrap() };
        let ranges = vec![range("245.0.0.0/8", POD4), range(&format!("{ALIAS6}/104"), POD6)];
        // Twice: what is there already is no error, and not there twice.
        namespaces.alias(&namespace, ranges.clone()).await.unwrap();
        namespaces.alias(&namespace, ranges).await.unwrap();
        let v4 = namespaces.capture_datagrams(&namespace, true, OUTBOUND, MARK).await.unwrap();
        let v6 = namespaces.capture_datagrams(&namespace, false, OUTBOUND, MARK).await.unwrap();
        Self { namespaces, namespace, v4, v6 }
    }
}

/// What the daemon's socket gets next: from whom, through which alias, what.
async fn captured<const N: usize>(socket: &CaptureSocket) -> [(SocketAddr, IpAddr, Vec<u8>); N] {
    let mut taken = Vec::new();
    let waiting = async {
        while taken.len() < N {
            let take = |datagram: Captured<'_>| {
                taken.push((datagram.source, datagram.alias, datagram.payload.to_vec()));
            };
            socket.receive(take).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("captured datagrams");
    taken.try_into().expect("no other datagrams")
}

fn client(bed: &Bed, domain: Domain) -> UdpSocket {
    bounded(bed.pod.socket(domain, Protocol::UDP).into())
}

/// A socket whose reads end, so that a lost datagram fails the test and does not hang it.
fn bounded(socket: UdpSocket) -> UdpSocket {
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

fn bound(netns: &crate::bed::Netns, address: &str) -> UdpSocket {
    let address = socket_address(address);
    bounded(netns.run(move || UdpSocket::bind(address).unwrap()))
}

fn alias4(number: u32) -> IpAddr {
    alias(ALIAS4, number).into()
}

fn alias6(number: u32) -> IpAddr {
    alias(ip(ALIAS6), number).into()
}

#[tokio::test]
async fn connected_and_unconnected_sockets_speak_to_frontends_and_hear_from_them() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let daemon = Daemon::start(&bed).await;
    let cases = [
        (Domain::IPV4, VIP4, VIP4, alias4(2), POD4, &daemon.v4),
        (Domain::IPV6, MAPPED_VIP, VIP4, alias4(2), POD4, &daemon.v4),
        (Domain::IPV6, VIP6, VIP6, alias6(4), POD6, &daemon.v6),
    ];
    for (domain, called, real, at, own, socket) in cases {
        datapath
            .aliases()
            .show(Endpoint::from(SocketAddr::new(at, OUTBOUND)), Endpoint::from(socket_address(real)))
            .unwrap();
        let connected = client(&bed, domain);
        connected.connect(socket_address(called)).unwrap();
        assert_eq!(connected.peer_addr().unwrap(), socket_address(called), "getpeername() shows the frontend");
        connected.send(b"one").unwrap();
        let unconnected = client(&bed, domain);
        unconnected.send_to(b"two", socket_address(called)).unwrap();
        let mut buffer = [0; 16];
        let answers = [(&connected, b"one", b"uno"), (&unconnected, b"two", b"due")];
        for ((app, request, reply), (source, through, payload)) in answers.into_iter().zip(captured::<2>(socket).await)
        {
            assert_eq!((through, payload.as_slice()), (at, &request[..]), "{called}");
            assert_eq!(source, SocketAddr::new(own.parse().unwrap(), app.local_addr().unwrap().port()));
            socket.answer(through, source, reply).unwrap();
            let (length, from) = app.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&reply[..], socket_address(called)));
        }
    }
    let counts = [(Outcome::DatagramConnected, 3), (Outcome::DatagramSent, 3), (Outcome::AliasResolved, 6)];
    for (outcome, count) in counts {
        assert_eq!(counted(&datapath, outcome), count, "{outcome:?}");
    }
    datapath.unload().unwrap();
}

#[tokio::test]
async fn one_socket_keeps_several_frontends_apart() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let daemon = Daemon::start(&bed).await;
    for (number, real) in [(2, VIP4), (3, OTHER4)] {
        let at = SocketAddr::new(alias4(number), OUTBOUND);
        datapath.aliases().show(at.into(), socket_address(real).into()).unwrap();
    }
    let app = client(&bed, Domain::IPV4);
    app.send_to(b"a", socket_address(VIP4)).unwrap();
    app.send_to(b"b", socket_address(OTHER4)).unwrap();
    let [first, second] = captured(&daemon.v4).await;
    assert_eq!((first.1, second.1), (alias4(2), alias4(3)));
    assert_eq!(first.0, second.0, "it is one socket");
    let mut buffer = [0; 4];
    for (through, source, real) in [(second.1, second.0, OTHER4), (first.1, first.0, VIP4)] {
        daemon.v4.answer(through, source, b"r").unwrap();
        assert_eq!(app.recv_from(&mut buffer).unwrap().1, socket_address(real));
    }
    // The longest datagrams there are, both ways and in both families.
    let long = vec![7; 65_507];
    for (domain, called, socket) in [(Domain::IPV4, VIP4, &daemon.v4), (Domain::IPV6, VIP6, &daemon.v6)] {
        let app = client(&bed, domain);
        app.connect(socket_address(called)).unwrap();
        app.send(&long).unwrap();
        let [(source, through, payload)] = captured(socket).await;
        assert_eq!(payload.len(), long.len());
        socket.answer(through, source, &long).unwrap();
        let mut buffer = vec![0; 70_000];
        assert_eq!(app.recv(&mut buffer).unwrap(), long.len());
    }
    datapath.unload().unwrap();
}

#[tokio::test]
async fn what_may_not_be_sent_fails_with_its_errno() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    datapath.apply(&services()).unwrap();
    let bare =
        |flags| Pod::new(ip(POD4), ip(POD6), 1, OUTBOUND.to_be(), flags, 2, ALIAS4, mesh_common::Ip::UNSPECIFIED);
    datapath.arm_pod(bed.pod.cookie(), bare(0)).unwrap();
    let cases = [
        (Domain::IPV4, EMPTY, libc::ECONNREFUSED, Outcome::DatagramNoEndpoints),
        (Domain::IPV4, DENIED, libc::EACCES, Outcome::DatagramDenied),
        (Domain::IPV6, VIP6, libc::EADDRNOTAVAIL, Outcome::DatagramNoAddress),
    ];
    for (domain, called, errno, outcome) in cases {
        let app = client(&bed, domain);
        let sent = app.send_to(b"x", socket_address(called)).unwrap_err();
        let connected = app.connect(socket_address(called)).unwrap_err();
        assert_eq!((sent.raw_os_error(), connected.raw_os_error()), (Some(errno), Some(errno)), "{called}");
        assert_eq!(counted(&datapath, outcome), 2);
    }
    datapath.unload().unwrap();
}

#[tokio::test]
async fn a_silent_daemon_closes_or_opens_as_the_workload_says() {
    let mut bed = Bed::new();
    bed.config.heartbeat_timeout = Duration::from_nanos(1);
    let mut datapath = bed.armed();
    let address = format!("{NEIGHBOUR4}:7053");
    datapath.apply(&[frontend(&address, 2, 1, 0)]).unwrap();
    let server = bound(&bed.neighbour, &address);
    let app = client(&bed, Domain::IPV4);
    let error = app.send_to(b"x", socket_address(&address)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(counted(&datapath, Outcome::DatagramDaemonDown), 1);
    datapath.arm_pod(bed.pod.cookie(), pod_entry(Pod::FAIL_OPEN)).unwrap();
    app.send_to(b"open", socket_address(&address)).unwrap();
    let mut buffer = [0; 8];
    assert_eq!(server.recv(&mut buffer).unwrap(), 4);
    assert_eq!(counted(&datapath, Outcome::DatagramFailOpen), 1);
    datapath.unload().unwrap();
}

#[tokio::test]
async fn what_is_not_in_the_mesh_is_left_alone() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let outside = format!("{NEIGHBOUR4}:7000");
    datapath.apply(&services()).unwrap();
    let server = bound(&bed.neighbour, &outside);
    let app = bound(&bed.pod, "0.0.0.0:7001");
    let mut buffer = [0; 8];
    app.send_to(b"out", socket_address(&outside)).unwrap();
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"back", from).unwrap();
    assert_eq!(app.recv_from(&mut buffer).unwrap().1, socket_address(&outside));
    for own in ["127.0.0.1:7001", "10.77.0.2:7001"] {
        client(&bed, Domain::IPV4).send_to(b"self", socket_address(own)).unwrap();
        app.recv(&mut buffer).unwrap();
    }
    let marked = bed.pod.socket(Domain::IPV4, Protocol::UDP);
    marked.set_mark(MARK).unwrap();
    connect(&marked, VIP4).unwrap_err();
    let outcomes = [Outcome::DatagramUnmeshed, Outcome::DatagramLoopback, Outcome::DatagramSelf, Outcome::DatagramOwn];
    for outcome in outcomes {
        assert_eq!(counted(&datapath, outcome), 1, "{outcome:?}");
    }
    datapath.disarm_pod(bed.pod.cookie()).unwrap();
    // The neighbour, whose socket is in the same cgroup, has sent one before.
    let others = counted(&datapath, Outcome::DatagramNotWorkload);
    app.send_to(b"out", socket_address(&outside)).unwrap();
    assert_eq!(counted(&datapath, Outcome::DatagramNotWorkload), others + 1);
    datapath.unload().unwrap();
}

fn guard(address: &str, port: u16, mode: Mode) -> MapOp {
    MapOp::SetAppPort(AppPortKey::datagram(ip(address), port.to_be()), AppPort::new(mode as u32, 0))
}

#[tokio::test]
async fn a_strict_port_hears_the_daemons_deliveries_only() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let daemon = Daemon::start(&bed).await;
    let cases = [(POD4, NEIGHBOUR4, "0.0.0.0", alias4(DELIVERY)), (POD6, NEIGHBOUR6, "::", alias6(DELIVERY))];
    for (pod, neighbour, any, delivery) in cases {
        let at = |ip: &str, port: u16| SocketAddr::new(ip.parse().unwrap(), port);
        datapath.apply(&[guard(pod, 1053, Mode::Strict)]).unwrap();
        let app = bound(&bed.pod, &at(any, 1053).to_string());
        let stranger = bound(&bed.neighbour, &at(neighbour, 0).to_string());
        stranger.connect(at(pod, 1053)).unwrap();
        let dropped = counted(&datapath, Outcome::DatagramStrict);
        stranger.send(b"plain").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(stranger.recv(&mut buffer).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{pod}");
        assert_eq!(counted(&datapath, Outcome::DatagramStrict), dropped + 1);

        // A caller elsewhere, whose datagrams the daemon delivers.
        let caller = at(if pod == POD4 { "10.88.0.7" } else { "fd88::7" }, 5353);
        let socket =
            daemon.namespaces.deliver_datagrams(&daemon.namespace, delivery, at(pod, 1053), MARK).await.unwrap();
        socket.set_nonblocking(false).unwrap();
        let socket = bounded(socket);
        let alias = Endpoint::from(socket.local_addr().unwrap());
        let call = BypassKey::new(caller.ip().into(), ip(pod), caller.port().to_be(), 1053_u16.to_be());
        let introduction = datapath.aliases().introduce(call, alias).unwrap().expect("a new caller");
        assert!(datapath.aliases().introduce(call, alias).unwrap().is_none(), "it is known already");
        socket.send(b"ask").unwrap();
        let (length, from) = app.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"ask"[..], caller));
        app.send_to(b"answer", from).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), 6);
        // A server that keeps a socket per client.
        let accepted = bed.pod.socket(Domain::for_address(caller), Protocol::UDP);
        accepted.set_reuse_port(true).unwrap();
        drop(app);
        accepted.bind(&SockAddr::from(at(pod, 1053))).unwrap();
        accepted.connect(&SockAddr::from(caller)).unwrap();
        assert_eq!(peer(&accepted), caller);
        accepted.send(b"own").unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), 3);
        drop(introduction);
        let after = bed.pod.socket(Domain::for_address(caller), Protocol::UDP);
        after.set_reuse_port(true).unwrap();
        after.bind(&SockAddr::from(at(pod, 1053))).unwrap();
        // The real caller is elsewhere: without a route there, nothing is sent.
        assert!(after.send_to(b"lost", &SockAddr::from(caller)).is_err());
    }
    assert_eq!(counted(&datapath, Outcome::DatagramReplied), 4);
    datapath.unload().unwrap();
}

fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

#[tokio::test]
async fn the_daemons_port_and_aliases_are_out_of_reach_from_outside() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let daemon = Daemon::start(&bed).await;
    datapath.apply(&services()).unwrap();
    let default = |address: &str| MapOp::SetAppPort(AppPortKey::new(ip(address), 0), AppPort::new(1, 0));
    datapath.apply(&[default(POD4), default(POD6)]).unwrap();
    for (pod, neighbour) in [(POD4, NEIGHBOUR4), (POD6, NEIGHBOUR6)] {
        let stranger = bound(&bed.neighbour, &SocketAddr::new(neighbour.parse().unwrap(), 0).to_string());
        stranger.connect(SocketAddr::new(pod.parse().unwrap(), OUTBOUND)).unwrap();
        stranger.send(b"x").unwrap();
        assert_eq!(stranger.recv(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(counted(&datapath, Outcome::DatagramMeshPort), 2);
    // A forged answer: the kernel takes no packet from a wire whose source is an address of its own.
    datapath.aliases().show(SocketAddr::new(alias4(2), OUTBOUND).into(), socket_address(VIP4).into()).unwrap();
    let victim = bound(&bed.pod, &format!("{POD4}:7777"));
    bed.neighbour.ip("address add 245.0.0.2/32 dev eth0");
    let forger = bound(&bed.neighbour, &format!("245.0.0.2:{OUTBOUND}"));
    forger.send_to(b"forged", socket_address(&format!("{POD4}:7777"))).unwrap();
    // What is sent after it arrives after it.
    bound(&bed.neighbour, &format!("{NEIGHBOUR4}:7000"))
        .send_to(b"plain", socket_address(&format!("{POD4}:7777")))
        .unwrap();
    let mut buffer = [0; 8];
    let (length, from) = victim.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"plain"[..], socket_address(&format!("{NEIGHBOUR4}:7000"))));
    drop(daemon);
    let _: &Datapath = &datapath;
    datapath.unload().unwrap();
}
