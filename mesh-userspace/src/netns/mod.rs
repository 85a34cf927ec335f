//! Work inside pods' network namespaces: listeners that the daemon owns there, connections to applications that keep
//! the client's address, and the routing that makes these possible.
//!
//! Which namespace a socket belongs to is fixed when it is made, and `setns(2)` moves one thread. So one thread of its
//! own makes all of them (and those that carry traffic make the ones they dial with), and the sockets are used anywhere
//! afterwards. Namespaces are opened once by path and entered
//! by descriptor: a path that is replaced meanwhile does not matter, and no mount is touched.

mod alias;
mod datagram;
mod diag;
mod dump;
mod netlink;
mod routing;
mod socket;
mod thread;

pub use alias::AliasRange;
pub use datagram::{CaptureSocket, Captured, LONGEST, receive_from_application};
pub use diag::{Parting, SocketTable, Tcp, TcpState};
pub use routing::{MARK, TABLE};
pub use socket::round_trip;
pub use thread::{Namespace, Namespaces, enter_from_this_thread};
