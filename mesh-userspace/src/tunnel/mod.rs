//! How streams travel between nodes, and the pools of connections that carry them.
//!
//! A [`Transport`] opens one stream per application connection to a [`Peer`]; [`Server`] hands out what other nodes
//! open. Two implementations: TLS lanes over TCP ([`lanes`]) and QUIC ([`quic`]). Both prove the identity of each end
//! exactly, carry FIN, reset and backpressure of each direction by itself, and pool their connections per peer.
//!
//! Bounds: a sender is held back after [`Config::window`] + [`Config::send_buffer`] bytes that the far application
//! has not read (on an exclusive lane: [`Config::max_unread`] + `send_buffer` + one read + the two socket buffers);
//! streams, lanes, handshakes and pending streams have limits in [`Config`], each refused by name when hit.

pub mod codec;
mod config;
mod congestion;
mod error;
pub mod header;
mod lane;
pub mod lanes;
mod lifetime;
pub mod machine;
mod peer;
pub mod quic;
mod route;
mod server;
mod stream;
#[cfg(test)]
mod tests;

pub use config::Config;
pub use congestion::Congestion;
pub use error::{OpenError, Refusal, ResetCode, StreamError};
pub use header::{HeaderError, StreamHeader};
pub use peer::{LaneStatus, Peer, TlsSession, Transport, Tunnel};
pub use quic::{Carried, DatagramFlow, FlowSender, Lost, Sink};
pub use server::{Incoming, Server};
pub use stream::{RecvHalf, SendHalf, Stream, join};
