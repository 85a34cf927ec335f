//! The TCP sockets of a network namespace: listed, and ended where policy wants it (`SOCK_DESTROY`). sock_diag(7).

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The kernel answers at once; a bound all the same.
const ANSWER_BOUND: Duration = Duration::from_secs(5);
/// The kernel fills at most 32 KiB at a time, what larger buffers are offered (`netlink_dump`).
const ANSWER: usize = 32 * 1024;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct inet_diag_sockid`.
const ID: usize = 48;
/// Where it is in `struct inet_diag_msg`, and that structure's length.
const ID_OFFSET: usize = 4;
const MESSAGE: usize = ID_OFFSET + ID + 20;
const INET_DIAG_INFO: u16 = 2;
/// Where `idiag_wqueue` is: after the id, `idiag_expires` and `idiag_rqueue`.
const WRITE_QUEUE: usize = ID_OFFSET + ID + 8;
/// Where `idiag_inode` is, after `idiag_uid`: 0 of a socket that no process holds any more.
const INODE: usize = WRITE_QUEUE + 8;
/// Where `struct tcp_info` has what [`dialled`] reads.
const BYTES_ACKED: usize = 120;
const NOTSENT_BYTES: usize = 144;
const BYTES_SENT: usize = 200;
const BYTES_RETRANS: usize = 208;

/// States, by the kernel's numbers (`enum` in tcp_states.h).
const SYN_SENT: u8 = 2;
const SYN_RECV: u8 = 3;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;
const ALL_STATES: u32 = u32::MAX;

/// What a socket is doing, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    Listening,
    /// Bytes may still pass.
    Open,
    /// Both ends have finished (TIME_WAIT, CLOSE).
    Over,
}

impl TcpState {
    fn from_number(number: u8) -> Self {
        match number {
            LISTEN => Self::Listening,
            TIME_WAIT | CLOSE => Self::Over,
            _ => Self::Open,
        }
    }
}

/// What has become of an application's end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// A process still has it: it may have finished one direction only.
    Held,
    /// Nobody has it any more, and the application takes other connections.
    Closed,
    /// Nobody has it any more, and nothing listens there.
    Deserted,
}

/// One TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    pub state: TcpState,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// Whether this end called connect(); `None` where the kernel does not tell (before 4.19, or while data is on its
    /// way at the very moment).
    pub dialled: Option<bool>,
    /// No process holds it: it was closed, not only finished.
    pub is_orphaned: bool,
    /// `struct inet_diag_sockid`, by which the kernel finds it again: addresses, interface, cookie.
    id: [u8; ID],
    family: u8,
}

impl Tcp {
    /// A connection of which nothing else is known.
    #[must_use]
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let family = u8::try_from(family).expect("address families are small");
        let mut id = [0; ID];
        id[..2].copy_from_slice(&local.port().to_be_bytes());
        id[2..4].copy_from_slice(&remote.port().to_be_bytes());
        for (at, address) in [(4, local.ip()), (20, remote.ip())] {
            match address {
                IpAddr::V4(v4) => id[at..at + 4].copy_from_slice(&v4.octets()),
                IpAddr::V6(v6) => id[at..at + 16].copy_from_slice(&v6.octets()),
            }
        }
        // INET_DIAG_NOCOOKIE.
        id[40..].fill(0xff);
        Self { state: TcpState::Open, local, remote, dialled: None, is_orphaned: false, id, family }
    }
}

/// The TCP sockets of one namespace. Calls block for as long as the kernel works on them.
#[derive(Debug)]
pub struct SocketTable(OwnedFd);

impl SocketTable {
    /// Opens the table of the namespace that the calling thread is in.
    pub(super) fn open() -> io::Result<Self> {
        let kind = (AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC);
        let socket = socket_with(kind.0, kind.1, kind.2, Some(netlink::SOCK_DIAG))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_BOUND))?;
        Ok(Self(socket))
    }

    /// Every TCP socket of both families, but those that are in no connection and do not listen.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn list(&self) -> io::Result<Vec<Tcp>> {
        self.list_in(ALL_STATES)
    }

    /// What an application that has finished a connection has done with it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn parting(&self, application: SocketAddr, peer: SocketAddr) -> io::Result<Parting> {
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let (application, peer) = (canonical(application), canonical(peer));
        if self.is_held(application, peer)? {
            return Ok(Parting::Held);
        }
        let takes_others = |tcp: &Tcp| {
            let ip = tcp.local.ip();
            tcp.local.port() == application.port() && (ip.is_unspecified() || ip == application.ip())
        };
        let listeners = self.list_in(1 << LISTEN)?;
        Ok(if listeners.iter().any(takes_others) { Parting::Closed } else { Parting::Deserted })
    }

    /// Whether a process holds the end of a connection that is `local`.
    fn is_held(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        let wanted = Tcp::new(local, remote);
        self.send(&request(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, wanted.family, ALL_STATES, &wanted.id))?;
        let mut answer = vec![0; ANSWER];
        let mut held = Ok(false);
        self.receive(&mut answer, |kind, body| {
            held = match kind {
                NLMSG_ERROR => acknowledged(body).map(|()| false),
                // Where there is no such connection, the kernel answers with what listens there.
                _ => Ok(parse(body).is_some_and(|tcp| (tcp.local, tcp.remote) == (local, remote) && !tcp.is_orphaned)),
            };
            Ok(false)
        })?;
        match held {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            held => held,
        }
    }

    fn list_in(&self, states: u32) -> io::Result<Vec<Tcp>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = u8::try_from(family).expect("address families are small");
            self.send(&request(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, states, &[0; ID]))?;
            let mut answer = vec![0; ANSWER];
            while self.receive(&mut answer, |kind, body| match kind {
                NLMSG_DONE => Ok(false),
                NLMSG_ERROR => acknowledged(body).map(|()| false),
                _ => {
                    found.extend(parse(body));
                    Ok(true)
                }
            })? {}
        }
        Ok(found)
    }

    /// Ends a connection: both ends get an error at once. Returns whether it still existed.
    ///
    /// # Errors
    /// `Unsupported` if the kernel was built without `CONFIG_INET_DIAG_DESTROY`.
    pub fn destroy(&self, socket: &Tcp) -> io::Result<bool> {
        self.send(&request(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, socket.family, ALL_STATES, &socket.id))?;
        let mut answer = vec![0; 1024];
        let mut outcome = Ok(());
        self.receive(&mut answer, |_, body| {
            outcome = acknowledged(body);
            Ok(false)
        })?;
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        sendto(&self.0, message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        Ok(())
    }

    /// Hands each message of one answer on, with its type; returns whether more is to come, as the last one said.
    fn receive(&self, buffer: &mut [u8], mut each: impl FnMut(u16, &[u8]) -> io::Result<bool>) -> io::Result<bool> {
        let (_, length) = loop {
            match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                received => break received?,
            }
        };
        let mut rest = buffer.get(..length).ok_or_else(malformed)?;
        let mut more = true;
        while rest.len() >= HEADER {
            let size = usize::try_from(u32_at(rest, 0).ok_or_else(malformed)?).map_err(|_| malformed())?;
            let kind = u16_at(rest, 4).ok_or_else(malformed)?;
            let body = rest.get(HEADER..size).ok_or_else(malformed)?;
            more = each(kind, body)?;
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(more)
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`: one bit a state, and `tcp_info` with the answers.
fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let protocol = u8::try_from(libc::IPPROTO_TCP).expect("6 fits");
    let mut message = Vec::with_capacity(HEADER + 8 + ID);
    let length = u32::try_from(HEADER + 8 + ID).expect("requests are short");
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and sender: one request at a time needs neither.
    message.extend([0; 8]);
    message.extend([family, protocol, 1 << (INET_DIAG_INFO - 1), 0]);
    message.extend(states.to_ne_bytes());
    message.extend(id);
    message
}

/// `struct inet_diag_msg` and its attributes.
fn parse(body: &[u8]) -> Option<Tcp> {
    let id: [u8; ID] = body.get(ID_OFFSET..ID_OFFSET + ID)?.try_into().ok()?;
    let (family, state) = (body[0], body[1]);
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let address = |at: usize| {
        let octets: [u8; 16] = id[at..at + 16].try_into().expect("16 bytes");
        if i32::from(family) == libc::AF_INET {
            IpAddr::from([octets[0], octets[1], octets[2], octets[3]])
        } else {
            // An IPv6 socket may speak IPv4.
            Ipv6Addr::from(octets).to_canonical()
        }
    };
    Some(Tcp {
        state: TcpState::from_number(state),
        local: SocketAddr::new(address(4), port(0)),
        remote: SocketAddr::new(address(20), port(2)),
        dialled: match state {
            // A connection that only knocks.
            SYN_RECV => Some(false),
            SYN_SENT => Some(true),
            _ => attribute(body.get(MESSAGE..)?, INET_DIAG_INFO).and_then(|info| dialled(body, info)),
        },
        is_orphaned: u32_at(body, INODE)? == 0,
        id,
        family,
    })
}

/// Who dialled: the SYN of connect() takes a sequence number that the peer acknowledges, and the kernel counts it in
/// `tcpi_bytes_acked` of the end that sent it, but in no end's `tcpi_bytes_sent` (measured on 6.18; the SYN of the
/// accepting end is acknowledged before counting begins).
fn dialled(message: &[u8], info: &[u8]) -> Option<bool> {
    let queued = u64::from(u32_at(message, WRITE_QUEUE)?);
    let unsent = u64::from(u32_at(info, NOTSENT_BYTES)?);
    let sent = u64_at(info, BYTES_SENT)?.checked_sub(u64_at(info, BYTES_RETRANS)?)?;
    let numbered = (u64_at(info, BYTES_ACKED)? + queued).checked_sub(unsent)?;
    match numbered.checked_sub(sent)? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// The value of a `struct rtattr` of this kind.
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while rest.len() >= 4 {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(4..length)?;
        if u16_at(rest, 2)? == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

/// A negative errno or 0.
fn acknowledged(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).ok_or_else(malformed)?.cast_signed() {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about sockets is malformed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_its_length_and_asks_for_every_state() {
        let message = request(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, 2, ALL_STATES, &[7; ID]);
        assert_eq!(u32_at(&message, 0), Some(72));
        assert_eq!(message.len(), 72);
        assert_eq!((message[HEADER], message[HEADER + 1]), (2, 6));
        assert_eq!(u32_at(&message, HEADER + 4), Some(u32::MAX));
        assert_eq!(message[HEADER + 8..], [7; ID]);
    }

    /// A message as the kernel lays it out, with these counters in `tcp_info`.
    fn message(queued: u32, acked: u64, unsent: u32, sent: u64, again: u64) -> Vec<u8> {
        let mut body = vec![0; MESSAGE];
        (body[0], body[1]) = (2, 1);
        body[WRITE_QUEUE..WRITE_QUEUE + 4].copy_from_slice(&queued.to_ne_bytes());
        let mut info = vec![0; 232];
        info[BYTES_ACKED..BYTES_ACKED + 8].copy_from_slice(&acked.to_ne_bytes());
        info[NOTSENT_BYTES..NOTSENT_BYTES + 4].copy_from_slice(&unsent.to_ne_bytes());
        info[BYTES_SENT..BYTES_SENT + 8].copy_from_slice(&sent.to_ne_bytes());
        info[BYTES_RETRANS..BYTES_RETRANS + 8].copy_from_slice(&again.to_ne_bytes());
        // An attribute before it, of an odd length: padded.
        body.extend([5, 0, 9, 0, 1, 0, 0, 0]);
        body.extend(u16::try_from(4 + info.len()).unwrap().to_ne_bytes());
        body.extend(INET_DIAG_INFO.to_ne_bytes());
        body.extend(info);
        body
    }

    #[test]
    fn the_end_that_dialled_has_one_byte_more_acknowledged_than_sent() {
        let dialled = |body: &[u8]| parse(body).unwrap().dialled;
        assert_eq!(dialled(&message(0, 100, 0, 100, 0)), Some(false));
        assert_eq!(dialled(&message(0, 101, 0, 100, 0)), Some(true));
        // 40 of 100 bytes are acknowledged, 30 on their way, sent twice, and 30 not sent yet.
        assert_eq!(dialled(&message(60, 40, 30, 100, 30)), Some(false));
        assert_eq!(dialled(&message(60, 41, 30, 100, 30)), Some(true));
        assert_eq!(dialled(&message(0, 105, 0, 100, 0)), None);
        assert_eq!(dialled(&message(0, 99, 0, 100, 0)), None);
        assert_eq!(dialled(&message(0, 100, 0, 100, 0)[..MESSAGE]), None);
        assert_eq!(parse(&message(0, 0, 0, 0, 0)[..ID]), None);
    }
}
