//! sk_lookup: what may reach a workload.

use crate::bed::{Bed, NEIGHBOUR4, NEIGHBOUR6, OUTBOUND, POD4, POD6, connect, counted, ip, socket_address};
use mesh_common::outcome::Outcome;
use mesh_common::policy::Mode;
use mesh_common::service::{AppPort, AppPortKey, BypassKey};
use mesh_userspace::engine::MapOp;
use socket2::{Domain, Protocol, SockAddr};
use std::io::ErrorKind;

fn mode(address: &str, port: u16, mode: Mode) -> MapOp {
    MapOp::SetAppPort(AppPortKey::new(ip(address), port.to_be()), AppPort::new(mode as u32, 0))
}

const FAMILIES: [(Domain, &str, &str); 2] = [(Domain::IPV4, POD4, NEIGHBOUR4), (Domain::IPV6, POD6, NEIGHBOUR6)];

fn at(address: &str, port: u16) -> String {
    std::net::SocketAddr::new(address.parse().unwrap(), port).to_string()
}

#[test]
fn plaintext_from_outside_is_dropped_or_passed_by_mode() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    for (domain, pod, _) in FAMILIES {
        let (app, other) = (bed.pod.listen(&at(pod, 8080)), bed.pod.listen(&at(pod, 9090)));
        let before = [Outcome::LookupUnknown, Outcome::LookupPlaintext, Outcome::LookupStrict]
            .map(|outcome| counted(&datapath, outcome));

        connect(&bed.neighbour.socket(domain, Protocol::TCP), &at(pod, 8080)).unwrap();
        drop(app.accept().unwrap());
        assert_eq!(counted(&datapath, Outcome::LookupUnknown), before[0] + 1);

        datapath.apply(&[mode(pod, 0, Mode::Permissive)]).unwrap();
        connect(&bed.neighbour.socket(domain, Protocol::TCP), &at(pod, 8080)).unwrap();
        drop(app.accept().unwrap());
        assert_eq!(counted(&datapath, Outcome::LookupPlaintext), before[1] + 1);

        // A port's own mode outranks the address's.
        datapath.apply(&[mode(pod, 8080, Mode::Strict)]).unwrap();
        let error = connect(&bed.neighbour.socket(domain, Protocol::TCP), &at(pod, 8080)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{pod}");
        assert_eq!(counted(&datapath, Outcome::LookupStrict), before[2] + 1);
        connect(&bed.neighbour.socket(domain, Protocol::TCP), &at(pod, 9090)).unwrap();
        drop(other.accept().unwrap());

        // The pod calls itself.
        connect(&bed.pod.socket(domain, Protocol::TCP), &at(pod, 8080)).unwrap();
        drop(app.accept().unwrap());
    }
    assert_eq!(counted(&datapath, Outcome::LookupSelf), 2);
    datapath.unload().unwrap();
}

#[test]
fn the_daemons_deliveries_pass_a_strict_guard() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    for (domain, pod, neighbour) in FAMILIES {
        datapath.apply(&[mode(pod, 0, Mode::Strict)]).unwrap();
        let app = bed.pod.listen(&at(pod, 8080));
        let passed = counted(&datapath, Outcome::LookupBypass);
        let key = BypassKey::new(ip(neighbour), ip(pod), 40_001_u16.to_be(), 8080_u16.to_be());
        let dial = || {
            let socket = bed.neighbour.socket(domain, Protocol::TCP);
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SockAddr::from(socket_address(&at(neighbour, 40_001)))).unwrap();
            connect(&socket, &at(pod, 8080))
        };
        assert_eq!(dial().unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let admission = datapath.bypass().admit(key).unwrap();
        dial().unwrap();
        drop(app.accept().unwrap());
        assert_eq!(counted(&datapath, Outcome::LookupBypass), passed + 1);
        drop(admission);
        let strict = counted(&datapath, Outcome::LookupStrict);
        let other = bed.neighbour.socket(domain, Protocol::TCP);
        other.bind(&SockAddr::from(socket_address(&at(neighbour, 40_002)))).unwrap();
        assert_eq!(connect(&other, &at(pod, 8080)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(counted(&datapath, Outcome::LookupStrict), strict + 1);
    }
    datapath.unload().unwrap();
}

#[test]
fn the_daemons_listener_is_out_of_reach_from_outside() {
    let bed = Bed::new();
    let mut datapath = bed.armed();
    let listener = bed.pod.listen(&at(POD4, OUTBOUND));
    datapath.apply(&[mode(POD4, 0, Mode::Permissive)]).unwrap();
    let error = connect(&bed.neighbour.socket(Domain::IPV4, Protocol::TCP), &at(POD4, OUTBOUND)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(counted(&datapath, Outcome::LookupMeshPort), 1);

    // Without its guard the namespace is as it was.
    datapath.detach_netns("default/pod.1").unwrap();
    connect(&bed.neighbour.socket(Domain::IPV4, Protocol::TCP), &at(POD4, OUTBOUND)).unwrap();
    drop(listener.accept().unwrap());
    datapath.detach_netns("default/pod.1").unwrap();
    datapath.unload().unwrap();
}
