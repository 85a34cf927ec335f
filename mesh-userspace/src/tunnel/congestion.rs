//! Which congestion control a lane has: the system's, unless that paces and the other node is near.

use crate::runtime;
use socket2::SockRef;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Nodes that answer sooner are of one site, where nothing is gained by pacing.
const NEAR: Duration = Duration::from_millis(1);

/// How lanes choose.
#[derive(Clone, Copy, Debug, Default)]
pub enum Congestion {
    /// The system's algorithm.
    #[default]
    System,
    /// Likewise, but without pacing where the other node is near: what tells how long it took to answer the connection.
    Auto(fn(BorrowedFd<'_>) -> io::Result<Duration>),
}

/// What remains to be chosen once a socket, or one that a listener has accepted, is connected: then it can begin to pace,
/// but no more stop.
#[derive(Clone, Debug)]
pub(super) struct Unsettled {
    congestion: Congestion,
    /// What the system would have chosen, if that is not what the socket has.
    system: Option<Arc<[u8]>>,
}

impl Congestion {
    /// Prepares a socket that is not connected yet, or listens.
    pub(super) fn prepare(self, socket: &impl AsFd) -> io::Result<Unsettled> {
        let system = match self {
            Self::System => None,
            Self::Auto(_) => runtime::unpace(&SockRef::from(socket))?,
        };
        Ok(Unsettled { congestion: self, system: system.map(Into::into) })
    }
}

impl Unsettled {
    /// Gives a socket that has just been connected what its path deserves.
    pub(super) fn settle(&self, socket: &impl AsFd) -> io::Result<()> {
        match (self.congestion, &self.system) {
            (Congestion::Auto(round_trip), Some(system)) if round_trip(socket.as_fd())? >= NEAR => {
                SockRef::from(socket).set_tcp_congestion(system)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    fn algorithm(socket: &impl AsFd) -> Vec<u8> {
        let mut name = SockRef::from(socket).tcp_congestion().unwrap();
        name.retain(|byte| *byte != 0);
        name
    }

    /// Both ends of a connection whose listener would have its connections pace.
    fn settled(congestion: Congestion) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener)
            .set_tcp_congestion(b"bbr")
            .expect("this kernel has BBR, or can load its module tcp_bbr");
        let unsettled = congestion.prepare(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        unsettled.settle(&accepted).unwrap();
        algorithm(&accepted)
    }

    #[test]
    fn lanes_pace_only_where_the_system_does_and_the_other_node_is_far() {
        assert_eq!(settled(Congestion::System), b"bbr");
        assert_eq!(settled(Congestion::Auto(|_| Ok(NEAR))), b"bbr");
        assert_ne!(settled(Congestion::Auto(|_| Ok(NEAR / 2))), b"bbr");
    }
}
