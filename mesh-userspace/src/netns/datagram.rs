//! UDP sockets in workloads' namespaces: the one that captured datagrams arrive at, and those of deliveries.

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};
use std::cell::RefCell;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use tokio::io::Interest;

/// What the longest datagram needs.
pub const LONGEST: usize = 65_535;
/// Datagrams taken at once.
const BATCH: usize = if BATCH_SIZE < 8 { BATCH_SIZE } else { 8 };
/// What the kernel may hold of datagrams that nobody has read yet, per socket of [`capture`]: many clients share it.
const CAPTURE_BUFFER: usize = 8 << 20;
/// Likewise, per socket of [`deliver`].
const DELIVERY_BUFFER: usize = 1 << 20;

thread_local! {
    /// One buffer per thread, and not per workload: reading is never interrupted.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A socket that captured datagrams arrive at, whatever alias they were redirected to.
pub(super) fn capture(is_ipv4: bool, port: u16, mark: u32) -> io::Result<UdpSocket> {
    let any = if is_ipv4 { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = transparent(SocketAddr::new(any, port), mark, CAPTURE_BUFFER)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    Ok(socket.into())
}

/// A socket that speaks from an alias to an application.
pub(super) fn deliver(alias: IpAddr, application: SocketAddr, mark: u32) -> io::Result<UdpSocket> {
    let socket = transparent(application, mark, DELIVERY_BUFFER)?;
    socket.bind(&SocketAddr::new(alias, 0).into())?;
    socket.connect(&application.into())?;
    Ok(socket.into())
}

/// Aliases are local by a route and not by an address: a socket must be transparent to speak from them.
fn transparent(family_of: SocketAddr, mark: u32, buffer: usize) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(family_of), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if family_of.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)?;
    }
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, buffer)?;
    set_option(
        &socket,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        libc::c_int::try_from(buffer).unwrap_or(libc::c_int::MAX),
    )?;
    Ok(socket)
}

fn set_option(socket: &impl AsRawFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("4 fits");
    // SAFETY: `value` lives through the call, and `length` says how large it is.
    let outcome = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One captured datagram.
#[derive(Clone, Copy, Debug)]
pub struct Captured<'a> {
    /// The application's socket.
    pub source: SocketAddr,
    /// Where it was redirected to.
    pub alias: IpAddr,
    pub payload: &'a [u8],
}

/// A socket of [`super::Namespaces::capture_datagrams`].
#[derive(Debug)]
pub struct CaptureSocket {
    socket: tokio::net::UdpSocket,
    state: UdpSocketState,
}

impl CaptureSocket {
    /// Must be called inside a tokio runtime.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // It was made for packets that must not be fragmented; these must, where they are longer than `lo` allows.
        if socket.local_addr()?.is_ipv4() {
            set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        } else {
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)?;
        }
        Ok(Self { socket: tokio::net::UdpSocket::from_std(socket)?, state })
    }

    /// Waits for datagrams and shows each that has come; some, not all, if there are many.
    ///
    /// # Errors
    /// The kernel's. One that concerns an earlier answer (nobody listens there any more) is among them.
    pub async fn receive(&self, mut visit: impl FnMut(Captured<'_>)) -> io::Result<()> {
        self.socket.readable().await?;
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(BATCH * LONGEST, 0);
            let mut metas = [RecvMeta::default(); BATCH];
            let count = {
                let mut chunks = scratch.chunks_mut(LONGEST).map(IoSliceMut::new);
                let mut buffers: [IoSliceMut<'_>; BATCH] =
                    std::array::from_fn(|_| chunks.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
                let received = self.socket.try_io(Interest::READABLE, || {
                    self.state.recv(UdpSockRef::from(&self.socket), &mut buffers, &mut metas)
                });
                match received {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    received => received?,
                }
            };
            for (meta, bytes) in metas.iter().zip(scratch.chunks(LONGEST)).take(count) {
                let Some(alias) = meta.dst_ip else { continue };
                let (source, bytes) = (meta.addr, &bytes[..meta.len]);
                if bytes.is_empty() {
                    visit(Captured { source, alias, payload: bytes });
                }
                // Datagrams of one length that were sent at once may come as one piece.
                for payload in bytes.chunks(meta.stride.max(1)) {
                    visit(Captured { source, alias, payload });
                }
            }
            Ok(())
        })
    }

    /// Answers an application from an alias; does not wait.
    ///
    /// # Errors
    /// `WouldBlock` while the application leaves too much unread; else the kernel's.
    pub fn answer(&self, alias: IpAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let transmit =
            Transmit { destination: to, ecn: None, contents: payload, segment_size: None, src_ip: Some(alias) };
        self.socket.try_io(Interest::WRITABLE, || self.state.try_send(UdpSockRef::from(&self.socket), &transmit))
    }
}

/// Waits for a datagram of the application that a socket is connected to, and shows it and those behind it.
///
/// # Errors
/// `ConnectionRefused` once nobody listens there; else the kernel's.
pub async fn receive_from_application(socket: &tokio::net::UdpSocket, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
    // An ICMP error makes a socket neither readable nor writable.
    let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
    if ready.is_error() {
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        // Whoever sends has taken it: without this, there would be one to look for, forever.
        let _ = socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(BATCH * LONGEST, 0);
        for _ in 0..BATCH {
            match socket.try_recv(&mut scratch[..LONGEST]) {
                Ok(length) => visit(&scratch[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;
    use tokio::time::timeout;

    /// A socket that is connected to a port which nobody has.
    async fn deserted() -> tokio::net::UdpSocket {
        let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        socket.connect(nobody.local_addr().unwrap()).await.unwrap();
        socket.writable().await.unwrap();
        drop(nobody);
        socket
    }

    #[tokio::test]
    async fn that_nobody_listens_is_heard_without_sending_again() {
        let socket = deserted().await;
        socket.try_send(b"anybody?").unwrap();
        let heard = timeout(Duration::from_secs(10), receive_from_application(&socket, |_| {})).await;
        assert_eq!(heard.expect("it is told").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn an_error_that_was_taken_elsewhere_is_not_looked_for_forever() {
        let socket = deserted().await;
        socket.try_send(b"anybody?").unwrap();
        socket.ready(Interest::ERROR).await.unwrap();
        assert!(socket.take_error().unwrap().is_some());
        receive_from_application(&socket, |_| panic!("nothing has come")).await.unwrap();
        // Nothing is left to look at: it waits.
        let waiting = timeout(Duration::from_millis(50), receive_from_application(&socket, |_| {}));
        assert!(waiting.await.is_err());
    }
}
