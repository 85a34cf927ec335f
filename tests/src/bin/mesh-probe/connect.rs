//! The ways in which programs connect.

use crate::{ConnectOptions, uring};
use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// One way; each connects, and `MsgFastopen` also sends the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// `connect()` on a blocking socket; IPv6 where the destination is.
    Blocking,
    /// `connect()` on a non-blocking socket, then poll.
    Nonblocking,
    /// `bind()` to `--source`, or to any address, before.
    Bind,
    /// Connect, dissolve the association with `AF_UNSPEC`, connect again.
    Reconnect,
    /// `TCP_FASTOPEN_CONNECT`: the connection is made by the first write.
    FastopenConnect,
    /// `sendto()` with `MSG_FASTOPEN`, no `connect()` at all.
    MsgFastopen,
    /// An `AF_INET6` socket to `::ffff:a.b.c.d`.
    V4Mapped,
    /// `SO_BINDTODEVICE` before.
    BindDevice,
    /// `IORING_OP_CONNECT`.
    IoUring,
}

/// Connects; the second value is how many bytes of the message have been sent along.
pub(crate) fn connect(way: Way, options: &ConnectOptions) -> io::Result<(TcpStream, usize)> {
    let destination = match (way, options.destination) {
        (Way::V4Mapped, SocketAddr::V4(v4)) => {
            SocketAddr::from((Ipv6Addr::from(v4.ip().to_ipv6_mapped().octets()), v4.port()))
        }
        (_, destination) => destination,
    };
    let socket = Socket::new(Domain::for_address(destination), Type::STREAM, Some(Protocol::TCP))?;
    // A dead peer must not hang a blocking connect for minutes.
    socket.set_tcp_user_timeout(Some(options.timeout()))?;
    socket.set_write_timeout(Some(options.timeout()))?;
    let address = SockAddr::from(destination);
    let mut sent = 0;
    match way {
        Way::Blocking | Way::V4Mapped => socket.connect(&address)?,
        Way::Nonblocking => connect_nonblocking(&socket, &address, options.timeout())?,
        Way::Bind => {
            socket.set_reuse_address(true)?;
            socket.bind(&options.source_or_any().into())?;
            socket.connect(&address)?;
        }
        Way::Reconnect => {
            socket.connect(&address)?;
            rustix::net::connect_unspec(&socket)?;
            socket.connect(&address)?;
        }
        Way::FastopenConnect => {
            set_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
            socket.connect(&address)?;
        }
        Way::MsgFastopen => {
            sent = socket.send_to_with_flags(options.message.as_bytes(), &address, libc::MSG_FASTOPEN)?;
        }
        Way::BindDevice => {
            socket.bind_device(Some(options.device.as_bytes()))?;
            socket.connect(&address)?;
        }
        Way::IoUring => uring::connect(socket.as_fd(), &address)?,
    }
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(options.timeout()))?;
    Ok((stream, sent))
}

fn connect_nonblocking(socket: &Socket, address: &SockAddr, timeout: Duration) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    match socket.connect(address) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
            let mut descriptors = [PollFd::new(socket, PollFlags::OUT)];
            if poll(&mut descriptors, Some(&timeout))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
        }
        done => done?,
    }
    socket.set_nonblocking(false)
}

/// Sets an option that is an integer.
pub(crate) fn set_option(socket: &Socket, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel reads `size` bytes of `value`.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(&value).cast(), size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
