//! QUIC: one connection per peer and core, one bidirectional stream per application connection.
//!
//! On a stream the client sends the length of the header (2 bytes), the header, and then the application's bytes. The
//! server answers with one byte, 0 or the code of a refusal, and goes on with the application's bytes. FIN, RESET and
//! STOP are QUIC's own, as are flow control and multiplexing.

mod ending;
mod flow;
mod halves;
mod opening;
mod order;
mod pool;
mod pooled;
mod server;
mod socket;

pub use flow::{Carried, DatagramFlow, FlowSender, Lost, Sink};
pub(super) use halves::{QuicRecv, QuicSend};
pub use pool::Quic;
pub(super) use server::{QuicOffer, serve};

use super::{Config, Refusal};
use quinn::{AckFrequencyConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use socket::Together;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The transport's name in metrics.
pub(super) const QUIC: &str = "quic";
/// Bytes in flight or unread per direction of a stream. Larger than a lane's window: QUIC is chosen for long links.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// Largest packet looked for on a path: jumbo frames of 9,000 bytes less the heads of IPv6 and UDP. Where they do not pass,
/// the search ends below what an ordinary Ethernet carries: at 1,470 bytes with IPv4, at 1,441 with IPv6.
const LARGEST_PACKET: u16 = 9_000 - 48;
/// Packets that the other side acknowledges at once, at most [`ACK_DELAY`] later: without this, every second one.
const ACKED_AT_ONCE: u32 = 10;
const ACK_DELAY: Duration = Duration::from_millis(5);
/// The server's answer to a header that opens the stream.
const OPENED: u8 = 0;
/// The code of a connection that is closed because it has no streams, or its workload is gone.
const CLOSED: VarInt = VarInt::from_u32(0);

/// What the kernel may hold of packets that have not been read yet: one socket serves all peers of a family, and nobody
/// sends datagrams again that found no room.
const RECEIVE_BUFFER: usize = 8 << 20;

/// QUIC on a socket, driven by the runtime that the caller is in.
fn endpoint(socket: std::net::UdpSocket) -> io::Result<Endpoint> {
    enlarge(&socket);
    let mut config = EndpointConfig::default();
    // Told to the other side, which looks for no larger ones.
    config.max_udp_payload_size(LARGEST_PACKET).map_err(io::Error::other)?;
    Endpoint::new(config, None, socket, Arc::new(Together))
}

/// Gives a socket room. Without the privilege it takes what the machine allows everyone.
fn enlarge(socket: &std::net::UdpSocket) {
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER).is_err()
        && let Err(error) = rustix::net::sockopt::set_socket_recv_buffer_size(socket, RECEIVE_BUFFER)
    {
        tracing::debug!(%error, "cannot enlarge the receive buffer of QUIC");
    }
}

/// QUIC's share of [`Config`]. The connection's window is unbounded and the streams' bounded, so that readers asleep
/// on some streams never hold up the others.
fn transport(config: &Config) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(LARGEST_PACKET);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACKED_AT_ONCE)).max_ack_delay(Some(ACK_DELAY));
    let streams = u32::try_from(config.max_streams.saturating_add(config.max_flows)).unwrap_or(u32::MAX);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::MAX)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .send_fairness(false)
        .keep_alive_interval(Some(config.keepalive))
        .max_idle_timeout(IdleTimeout::try_from(config.dead_after).ok());
    Arc::new(transport)
}

fn code(refusal: Refusal) -> [u8; 1] {
    [refusal.code()]
}
