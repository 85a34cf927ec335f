//! Congestion control that does not pace, for connections whose path is too short to be worth it.
//!
//! BBR spreads packets over time: unless the interface's queue does that for it (`fq`), the kernel arms a timer for every
//! few segments of each connection. Where a round trip takes microseconds, that costs more than all the rest of sending
//! ([ADR 0009](../../../docs/adr/0009-congestion-control.md)). All other algorithms only wait for acknowledgements.

use socket2::SockRef;
use std::io;

/// Linux's own default, and what every kernel has.
const UNPACED: [&[u8]; 2] = [b"cubic", b"reno"];

/// Has a socket do without pacing, or if it listens, what it will accept. To be called before it is connected: a socket
/// that has begun to pace goes on. Returns the algorithm that it would have had; `None` if it has it still.
///
/// # Errors
/// If it is no TCP socket, or the kernel has no other algorithm.
pub fn unpace(socket: &SockRef<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut name = socket.tcp_congestion()?;
    name.retain(|byte| *byte != 0);
    // All of its versions, and nothing else that Linux has.
    if !name.starts_with(b"bbr") {
        return Ok(None);
    }
    let [first, second] = UNPACED;
    socket.set_tcp_congestion(first).or_else(|_| socket.set_tcp_congestion(second))?;
    Ok(Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};

    fn algorithm(socket: &Socket) -> Vec<u8> {
        let mut name = socket.tcp_congestion().unwrap();
        name.retain(|byte| *byte != 0);
        name
    }

    #[test]
    fn what_does_not_pace_is_left_as_it_is() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_tcp_congestion(b"reno").unwrap();
        assert_eq!(unpace(&SockRef::from(&socket)).unwrap(), None);
        assert_eq!(algorithm(&socket), b"reno");
    }

    #[test]
    fn a_socket_that_would_pace_does_not() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_tcp_congestion(b"bbr").expect("this kernel has BBR, or its module tcp_bbr can be loaded");
        assert_eq!(unpace(&SockRef::from(&socket)).unwrap().unwrap(), b"bbr");
        assert!(UNPACED.contains(&algorithm(&socket).as_slice()));
    }
}
