//! What the daemon does inside pods' network namespaces, on real ones.

use anyhow::{Context, Result, ensure};
use mesh_tests::namespace::Namespace as Pod;
use mesh_tests::wait;
use mesh_tests::world::World;
use mesh_userspace::netns::{MARK, Namespace, Namespaces, TABLE};
use socket2::Socket;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// An address that is nowhere in the world, as a client beyond other nodes has it.
const FOREIGN_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8));
const FOREIGN_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 8));

fn world() -> Result<World> {
    World::named("netns").node("n1").pods(&["a", "b"]).build()
}

async fn open(namespaces: &Namespaces, pod: &Pod) -> Result<Namespace> {
    Ok(namespaces.open(pod.path()).await?)
}

/// What `ip` says inside a pod.
fn ip(pod: &Pod, arguments: &str) -> Result<String> {
    let output = Command::new("ip").args(["-n", pod.name()]).args(arguments.split(' ')).output()?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn sysctl(pod: &Pod) -> Result<String> {
    Ok(pod.enter(|| fs::read_to_string("/proc/sys/net/ipv4/tcp_fwmark_accept"))??.trim().to_owned())
}

/// Everything that preparing may touch.
fn routing(pod: &Pod) -> Result<Vec<String>> {
    Ok(vec![
        ip(pod, "-4 rule show")?,
        ip(pod, "-6 rule show")?,
        ip(pod, "-4 route show table all")?,
        ip(pod, "-6 route show table all")?,
        sysctl(pod)?,
    ])
}

/// The cookie that the kernel gives a socket made in the pod, asked without the code under test.
fn cookie(pod: &Pod) -> Result<u64> {
    pod.enter(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        let mut cookie = 0_u64;
        let mut length: libc::socklen_t = 8;
        // SAFETY: both pointers are valid for the call, and the length is that of the value.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        ensure!(outcome == 0, "SO_NETNS_COOKIE: {}", std::io::Error::last_os_error());
        Ok(cookie)
    })?
}

#[tokio::test]
async fn a_namespace_is_known_by_its_cookie() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let (a, b) = (world.pod("a").namespace(), world.pod("b").namespace());
    let (open_a, open_b) = (open(&namespaces, a).await?, open(&namespaces, b).await?);
    assert_eq!(open_a.cookie(), cookie(a)?);
    assert_eq!(open_b.cookie(), cookie(b)?);
    assert_ne!(open_a.cookie(), open_b.cookie());
    assert_eq!(open(&namespaces, a).await?.cookie(), open_a.cookie());
    Ok(())
}

#[tokio::test]
async fn what_is_no_network_namespace_is_not_opened() -> Result<()> {
    let namespaces = Namespaces::spawn()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    fs::write(&file, "")?;
    for (path, expected) in [
        (folder.path().join("absent").as_path(), "No such file"),
        (&file, "no network namespace"),
        (Path::new("/proc/self/ns/mnt"), "no network namespace"),
        (Path::new("/dev/null"), "no network namespace"),
    ] {
        let error = namespaces.open(path).await.expect_err("refused").to_string();
        assert!(error.contains(expected), "{}: {error}", path.display());
    }
    // None of these attempts has moved or ended the thread.
    namespaces.open(Path::new("/proc/self/ns/net")).await?;
    Ok(())
}

#[tokio::test]
async fn a_listener_made_outside_is_reached_from_inside_only() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let (pod, other) = (world.pod("a"), world.pod("b"));
    let namespace = open(&namespaces, pod.namespace()).await?;
    for address in pod.addresses() {
        // Both families on one port: IPv6 listeners are for IPv6 only.
        let address = SocketAddr::new(address, 15001);
        let listener = namespaces.listen(&namespace, address, MARK).await?;
        assert_eq!(listener.accept().expect_err("nobody has connected").kind(), ErrorKind::WouldBlock);
        let client = pod.namespace().enter(|| TcpStream::connect(address))??;
        let (_, peer) = wait::until("the connection", wait::BOUND, || listener.accept().ok())?;
        assert_eq!(peer, client.local_addr()?);
        drop(listener);
        // Another test's child may hold a copy of the descriptor between its fork and its exec.
        wait::until("the listener closes with its descriptor", wait::BOUND, || {
            pod.namespace().enter(|| TcpStream::connect(address)).ok()?.err()
        })?;
        assert!(namespaces.listen(&namespace, address, MARK).await.is_ok(), "bound again at once");
    }
    let elsewhere = SocketAddr::new(other.v4().into(), 15001);
    let refused = namespaces.listen(&namespace, elsewhere, MARK).await.expect_err("not this pod's address");
    assert_eq!(refused.kind(), ErrorKind::AddrNotAvailable);
    Ok(())
}

#[tokio::test]
async fn routing_is_prepared_once_and_undone_without_a_trace() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a").namespace();
    let before = routing(pod)?;
    let namespace = open(&namespaces, pod).await?;
    namespaces.prepare(&namespace).await?;
    let prepared = routing(pod)?;
    for rules in &prepared[..2] {
        assert!(rules.contains(&format!("fwmark {MARK:#x} lookup {TABLE}")), "{rules}");
    }
    for routes in &prepared[2..4] {
        let ours = routes.lines().find(|line| line.contains(&format!("table {TABLE}"))).context("a route")?;
        assert!(ours.starts_with("local default dev lo"), "{ours}");
    }
    assert_eq!(prepared[4], "1");
    namespaces.prepare(&namespace).await?;
    assert_eq!(routing(pod)?, prepared, "preparing twice is preparing once");
    namespaces.restore(&namespace).await?;
    assert_eq!(routing(pod)?, before);
    namespaces.restore(&namespace).await?;
    assert_eq!(routing(pod)?, before);
    Ok(())
}

#[tokio::test]
async fn what_a_killed_daemon_left_is_taken_over_and_removed() -> Result<()> {
    let world = world()?;
    let pod = world.pod("a").namespace();
    let before = routing(pod)?;
    let killed = Namespaces::spawn()?;
    killed.prepare(&open(&killed, pod).await?).await?;
    drop(killed);
    let successor = Namespaces::spawn()?;
    let namespace = open(&successor, pod).await?;
    successor.prepare(&namespace).await?;
    successor.restore(&namespace).await?;
    assert_eq!(routing(pod)?, before);
    Ok(())
}

#[tokio::test]
async fn what_others_have_set_up_stays() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a").namespace();
    pod.set_sysctls(&[("ipv4/tcp_fwmark_accept", "1")])?;
    pod.ip(&[
        format!("rule add fwmark {MARK:#x} lookup 99 priority 100"),
        format!("rule add fwmark 0x1 lookup {TABLE} priority 101"),
        format!("route add 203.0.113.0/24 dev eth0 table {TABLE}"),
        format!("route add 2001:db8:1::/64 dev eth0 table {TABLE}"),
    ])?;
    let before = routing(pod)?;
    let namespace = open(&namespaces, pod).await?;
    namespaces.prepare(&namespace).await?;
    namespaces.prepare(&namespace).await?;
    assert_ne!(routing(pod)?, before);
    namespaces.restore(&namespace).await?;
    assert_eq!(routing(pod)?, before);
    Ok(())
}

#[tokio::test]
async fn the_same_rules_by_another_hand_are_used_and_stay() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a").namespace();
    pod.ip(&[
        format!("rule add fwmark {MARK:#x} lookup {TABLE} priority 100"),
        format!("route add local default dev lo table {TABLE}"),
    ])?;
    let before = routing(pod)?;
    let namespace = open(&namespaces, pod).await?;
    namespaces.prepare(&namespace).await?;
    assert_eq!(routing(pod)?[2], before[2], "one route is enough");
    assert_eq!(sysctl(pod)?, "1");
    namespaces.prepare(&namespace).await?;
    namespaces.restore(&namespace).await?;
    assert_eq!(routing(pod)?, before);
    Ok(())
}

#[tokio::test]
async fn a_pod_without_ipv6_is_prepared_for_ipv4() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a").namespace();
    pod.set_sysctls(&[("ipv6/conf/all/disable_ipv6", "1"), ("ipv6/conf/lo/disable_ipv6", "1")])?;
    let before = routing(pod)?;
    let namespace = open(&namespaces, pod).await?;
    namespaces.prepare(&namespace).await?;
    assert!(routing(pod)?[0].contains(&format!("lookup {TABLE}")));
    namespaces.restore(&namespace).await?;
    assert_eq!(routing(pod)?, before);
    Ok(())
}

#[tokio::test]
async fn the_daemons_own_namespace_is_never_changed() -> Result<()> {
    let namespaces = Namespaces::spawn()?;
    let rules = || fs::read_to_string("/proc/net/route").map(|routes| (routes, fs::read_to_string(SYSCTL).ok()));
    const SYSCTL: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
    let before = rules()?;
    let own = namespaces.open(Path::new("/proc/self/ns/net")).await?;
    for outcome in [namespaces.prepare(&own).await, namespaces.restore(&own).await] {
        let error = outcome.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("own network namespace"), "{error}");
    }
    assert_eq!(rules()?, before);
    Ok(())
}

/// Connects a socket that is not blocking, within a bound.
async fn connect(socket: Socket, to: SocketAddr) -> Result<TcpStream> {
    let bound = socket.local_addr()?.as_socket().context("an IP socket")?;
    ensure!(bound.port() != 0, "the port must be known before connecting");
    ensure!(socket.nonblocking()?, "a daemon's socket must not block");
    let stream = tokio::net::TcpSocket::from_std_stream(socket.into()).connect(to);
    let stream = tokio::time::timeout(Duration::from_secs(10), stream).await.context("no answer came back")??;
    ensure!(stream.local_addr()? == bound, "the port has changed");
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// An application in the pod, on all addresses of `family`.
fn application(pod: &Pod, like: IpAddr) -> Result<TcpListener> {
    let any: IpAddr = if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    Ok(pod.enter(|| TcpListener::bind((any, 0)))??)
}

#[tokio::test]
async fn an_application_sees_the_clients_address() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a");
    let namespace = open(&namespaces, pod.namespace()).await?;
    namespaces.prepare(&namespace).await?;
    // A client nowhere in this world, and one on the same link.
    for (own, client) in [
        (IpAddr::from(pod.v4()), FOREIGN_V4),
        (IpAddr::from(pod.v6()), FOREIGN_V6),
        (IpAddr::from(pod.v4()), IpAddr::from(world.pod("b").v4())),
        (IpAddr::from(pod.v6()), IpAddr::from(world.pod("b").v6())),
    ] {
        let listener = application(pod.namespace(), own)?;
        let socket = namespaces.dial_socket(&namespace, SocketAddr::new(client, 0), MARK).await?;
        let mut stream = connect(socket, SocketAddr::new(own, listener.local_addr()?.port())).await?;
        let (mut served, seen) = listener.accept()?;
        assert_eq!(seen, stream.local_addr()?);
        assert_eq!(seen.ip(), client);
        stream.write_all(b"ping")?;
        let mut text = [0; 4];
        served.read_exact(&mut text)?;
        served.write_all(&text)?;
        stream.read_exact(&mut text)?;
        assert_eq!(&text, b"ping");
    }
    Ok(())
}

#[tokio::test]
async fn an_ipv4_mapped_client_is_an_ipv4_client() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let namespace = open(&namespaces, world.pod("a").namespace()).await?;
    let mapped: SocketAddr = "[::ffff:8.8.8.8]:0".parse()?;
    let socket = namespaces.dial_socket(&namespace, mapped, MARK).await?;
    assert_eq!(socket.local_addr()?.as_socket().map(|address| address.ip()), Some(FOREIGN_V4));
    Ok(())
}

#[tokio::test]
async fn a_client_that_holds_all_ports_still_reaches_another_application() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a");
    pod.namespace().set_sysctls(&[("ipv4/ip_local_port_range", "40000 40003")])?;
    let namespace = open(&namespaces, pod.namespace()).await?;
    namespaces.prepare(&namespace).await?;
    let own = IpAddr::from(pod.v4());
    let listen = || pod.namespace().enter(|| TcpListener::bind((own, 0)));
    let (one, other) = (listen()??, listen()??);
    // The applications' own ports are of the same range: two remain, one of them in use, one in TIME_WAIT.
    let mut in_use = Vec::new();
    for _ in 0..2 {
        let socket = namespaces.dial_socket(&namespace, SocketAddr::new(FOREIGN_V4, 0), MARK).await?;
        in_use.push((connect(socket, one.local_addr()?).await?, one.accept()?.0));
    }
    let (stream, mut served) = in_use.pop().context("two connections")?;
    drop(stream);
    assert_eq!(served.read(&mut [0; 1])?, 0);
    drop(served);
    for _ in 0..2 {
        let socket = namespaces.dial_socket(&namespace, SocketAddr::new(FOREIGN_V4, 0), MARK).await?;
        match connect(socket, other.local_addr()?).await {
            Ok(stream) => in_use.push((stream, other.accept()?.0)),
            // Both attempts may draw the same port, which then is the same connection.
            Err(error) => {
                let clash = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                assert_eq!(clash, Some(ErrorKind::AddrNotAvailable), "{error:#}");
            }
        }
    }
    assert!(in_use.len() >= 2, "the other application was reached");
    Ok(())
}

#[tokio::test]
async fn an_application_can_listen_where_the_daemon_has_dialled_from() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a").namespace();
    let namespace = open(&namespaces, pod).await?;
    let socket = namespaces.dial_socket(&namespace, SocketAddr::new(FOREIGN_V4, 0), MARK).await?;
    let port = socket.local_addr()?.as_socket().context("an IP socket")?.port();
    pod.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))??;
    Ok(())
}

#[tokio::test]
async fn a_namespace_goes_once_nothing_holds_it() -> Result<()> {
    let mut world = world()?;
    let namespaces = Namespaces::spawn()?;
    let pod = world.pod("a");
    let address = SocketAddr::new(pod.v4().into(), 15001);
    let namespace = open(&namespaces, pod.namespace()).await?;
    let listener = namespaces.listen(&namespace, address, MARK).await?;
    namespaces.prepare(&namespace).await?;
    assert!(namespace.is_still_at_its_path());
    let link = world.remove_pod("a")?;
    assert!(!namespace.is_still_at_its_path());
    let node = world.node("n1");
    assert!(node.has_link(&link)?, "a listener holds it");
    // What is open can still be cleaned.
    namespaces.restore(&namespace).await?;
    drop(listener);
    assert!(node.has_link(&link)?, "an open namespace holds it");
    drop(namespace);
    wait::until("the pod's link to go", wait::BOUND, || (!node.has_link(&link).ok()?).then_some(()))
}

#[tokio::test]
async fn calls_from_everywhere_stay_in_their_own_namespace() -> Result<()> {
    let world = world()?;
    let namespaces = Namespaces::spawn()?;
    let mut calls = tokio::task::JoinSet::new();
    for name in ["a", "b"] {
        let (pod, namespaces) = (world.pod(name), namespaces.clone());
        let (path, expected) = (pod.namespace().path().to_owned(), cookie(pod.namespace())?);
        let source = SocketAddr::new(FOREIGN_V4, 0);
        calls.spawn(async move {
            for _ in 0..200 {
                let namespace = namespaces.open(&path).await?;
                ensure!(namespace.cookie() == expected);
                namespaces.dial_socket(&namespace, source, MARK).await?;
            }
            Ok(())
        });
    }
    while let Some(outcome) = calls.join_next().await {
        outcome??;
    }
    Ok(())
}
