//! Which sockets are plaintext from outside.

use super::super::fixture::{catalog, snapshot, workload};
use super::*;

fn tcp(state: TcpState, local: &str, remote: &str, dialled: Option<bool>) -> Tcp {
    let mut tcp = Tcp::new(local.parse().unwrap(), remote.parse().unwrap());
    (tcp.state, tcp.dialled) = (state, dialled);
    tcp
}

fn open(local: &str, remote: &str, dialled: Option<bool>) -> Tcp {
    tcp(TcpState::Open, local, remote, dialled)
}

fn remotes(all: &[Tcp]) -> Vec<String> {
    let server = workload("server", "10.0.0.2");
    let is_delivery = |from: SocketAddr, _| from == "10.0.0.1:5000".parse().unwrap();
    from_outside(all, &server, |_| true, is_delivery).map(|tcp| tcp.remote.to_string()).collect()
}

#[test]
fn what_a_host_network_workload_does_not_serve_is_never_ended() {
    let mut catalog = catalog();
    let host = Workload {
        cgroup: Some("/sys/fs/cgroup/web".into()),
        ports: [("http".to_owned(), 8080)].into(),
        ..workload("web", "192.0.2.1")
    };
    catalog.workloads.insert(host.name.clone(), host.clone().into());
    let snapshot = snapshot(catalog);
    let serves = |local| snapshot.workload_serving(local).is_some_and(|serving| serving.uid == host.uid);
    let all = [
        open("192.0.2.1:8080", "198.51.100.1:1", Some(false)),
        // The operator, the daemon's peers, the mesh's own port.
        open("192.0.2.1:22", "198.51.100.1:2", Some(false)),
        open("192.0.2.1:15008", "198.51.100.1:3", Some(false)),
        open("192.0.2.1:15001", "198.51.100.1:4", Some(false)),
    ];
    let ended: Vec<_> = from_outside(&all, &host, serves, |_, _| false).map(|tcp| tcp.remote.port()).collect();
    assert_eq!(ended, [1]);
}

#[test]
fn only_connections_from_outside_count() {
    let all = [
        tcp(TcpState::Listening, "0.0.0.0:8080", "0.0.0.0:0", None),
        open("10.0.0.2:8080", "10.0.0.9:1", Some(false)),
        // What the workload dialled, from whatever port.
        open("10.0.0.2:40000", "10.0.0.9:80", Some(true)),
        open("10.0.0.2:8080", "10.0.0.9:2", Some(true)),
        // Itself, and loopback.
        open("10.0.0.2:8080", "10.0.0.2:3", Some(false)),
        open("127.0.0.1:8080", "127.0.0.1:4", Some(false)),
        // A delivery that the registry knows; one that it has let go of, both of whose ends are here.
        open("10.0.0.2:8080", "10.0.0.1:5000", Some(false)),
        open("10.0.0.2:8080", "10.0.0.1:6000", Some(false)),
        tcp(TcpState::Over, "10.0.0.1:6000", "10.0.0.2:8080", None),
        // Over.
        tcp(TcpState::Over, "10.0.0.2:8080", "10.0.0.9:7", None),
    ];
    assert_eq!(remotes(&all), ["10.0.0.9:1"]);
}

#[test]
fn who_dialled_is_guessed_by_listeners_only_where_the_kernel_does_not_tell() {
    let all = [
        tcp(TcpState::Listening, "0.0.0.0:8080", "0.0.0.0:0", None),
        open("10.0.0.2:8080", "10.0.0.9:1", None),
        open("10.0.0.2:40000", "10.0.0.9:80", None),
        // The server no longer listens and goes on with whom it has.
        open("10.0.0.2:9090", "10.0.0.9:2", Some(false)),
    ];
    assert_eq!(remotes(&all), ["10.0.0.9:1", "10.0.0.9:2"]);
}
