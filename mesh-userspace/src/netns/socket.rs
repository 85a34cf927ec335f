//! Sockets made in the namespace that the calling thread is in.

use crate::runtime;
use rand::Rng;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// Connections that wait to be accepted; the kernel caps it at the namespace's `net.core.somaxconn` (4096 by default).
const BACKLOG: i32 = 4096;

/// Ports tried once the kernel says that it has no free one left.
const SHARED_PORT_ATTEMPTS: usize = 64;

/// The cookie of this thread's namespace, as BPF programs see it: unique until the machine restarts, unlike the inode.
pub(super) fn netns_cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).expect("8 fits");
    // SAFETY: `cookie` and `length` live through the call, and `length` says how large `cookie` is.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// How long the other end of a TCP connection took to answer, as the kernel has measured it so far: right after connect()
/// or accept() that is the handshake, in which no process has a part.
///
/// # Errors
/// If it is no TCP socket.
pub fn round_trip(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    // SAFETY: integers only, for which zeroes are a value.
    let mut known: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).expect("it is small");
    // SAFETY: `known` and `length` live through the call, and `length` says how large `known` is.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut known).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(Duration::from_micros(known.tcpi_rtt.into())) } else { Err(io::Error::last_os_error()) }
}

/// What a socket has whose connections do not leave the machine.
fn within_the_machine(socket: &Socket) -> io::Result<()> {
    runtime::unpace(&SockRef::from(socket))?;
    Ok(())
}

/// A listener for local clients, not blocking, of exactly the family of `address`.
///
/// Accepted sockets inherit `mark`: replies to a client outside the namespace would then follow the marked route to
/// `lo`. Mark only listeners that are reached from inside; 0 marks nothing.
pub(super) fn listen(address: SocketAddr, mark: u32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // The daemon's successor binds while connections of its predecessor still end.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    within_the_machine(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A socket that will connect from `source`, an address that need not be this machine's, and a port that is chosen now:
/// whoever connects must announce it first, so the choice cannot be left to connect(2) (`IP_BIND_ADDRESS_NO_PORT`).
pub(super) fn dial(source: SocketAddr, mark: u32) -> io::Result<Socket> {
    let source = SocketAddr::new(source.ip().to_canonical(), source.port());
    let socket = transparent(source, mark)?;
    match socket.bind(&source.into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && source.port() == 0 => {
            share_port(&socket, source.ip()).map_err(|_| error)?;
        }
        outcome => outcome?,
    }
    Ok(socket)
}

/// As [`dial`], with a port that may be shared: the one of the namespace's range that `choice` leads to.
pub(super) fn dial_shared(source: SocketAddr, mark: u32, choice: u16) -> io::Result<Socket> {
    let source = source.ip().to_canonical();
    let socket = transparent(SocketAddr::new(source, 0), mark)?;
    let (first, last) = port_range()?;
    let ports = u32::from(last - first) + 1;
    let port = u32::from(first) + u32::from(choice) % ports;
    socket.bind(&SocketAddr::new(source, u16::try_from(port).map_err(io::Error::other)?).into())?;
    Ok(socket)
}

fn transparent(source: SocketAddr, mark: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(source), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_mark(mark)?;
    within_the_machine(&socket)?;
    // Without it this socket, and its TIME_WAIT afterwards, would keep an application from listening on its port.
    socket.set_reuse_address(true)?;
    Ok(socket)
}

/// With port 0 the kernel gives out only ports that nobody holds for this source address, not even in TIME_WAIT: a busy
/// client runs out after some 28,000 connections a minute. Named, a port may be shared with sockets that lead elsewhere
/// or have ended; a true clash shows as EADDRNOTAVAIL at connect(2).
fn share_port(socket: &Socket, source: IpAddr) -> io::Result<()> {
    let (first, last) = port_range()?;
    let mut outcome = Err(io::ErrorKind::AddrInUse.into());
    for _ in 0..SHARED_PORT_ATTEMPTS {
        let port = rand::rng().random_range(first..=last);
        outcome = socket.bind(&SockAddr::from(SocketAddr::new(source, port)));
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

/// What this thread's namespace gives out.
fn port_range() -> io::Result<(u16, u16)> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    Ok(parse_port_range(&range).ok_or(io::ErrorKind::InvalidData)?)
}

fn parse_port_range(text: &str) -> Option<(u16, u16)> {
    let mut bounds = text.split_ascii_whitespace().map(str::parse);
    match (bounds.next()?, bounds.next()?) {
        (Ok(first), Ok(last)) if first <= last => Some((first, last)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_port_range("32768\t60999\n"), Some((32768, 60999)));
        for bad in ["", "1", "2 1", "a b", "1 70000"] {
            assert_eq!(parse_port_range(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_namespace_has_one_cookie() {
        assert_eq!(netns_cookie().unwrap(), netns_cookie().unwrap());
    }
}
