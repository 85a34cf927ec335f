//! The tunnel's settings and bounds.

use super::congestion::Congestion;
use super::machine::Bounds;
use std::net::SocketAddr;
use std::time::Duration;

/// Settings of both ends. `Default` listens nowhere.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the server takes lanes (TCP) and QUIC (UDP).
    pub listen: Vec<SocketAddr>,
    /// How lanes choose their congestion control.
    pub congestion: Congestion,
    /// A lane without streams is closed after this; the server waits twice as long.
    pub idle_timeout: Duration,
    /// A lane older than this takes no new streams. It may take none sooner: see [`super::lanes`] on renewal.
    pub max_age: Duration,
    /// How long the streams of a QUIC connection, which cannot move, may outlive the certificates of its handshake.
    pub quic_grace: Duration,
    /// TCP connect and TLS handshake of a new lane, together.
    pub connect_timeout: Duration,
    /// From asking for a stream to the far node's answer, which includes its dialling of the application.
    pub open_timeout: Duration,
    /// Server: TLS handshake of an accepted connection.
    pub handshake_timeout: Duration,
    /// Server: from the handshake to the first stream, and from a frame's first byte to its last.
    pub header_timeout: Duration,
    /// A side that has written nothing for this long says that it lives.
    pub keepalive: Duration,
    /// A peer that has said nothing for this long is dead.
    pub dead_after: Duration,
    /// Streams on one shared lane.
    pub max_streams: usize,
    /// Flows of datagrams on one QUIC connection, beside its streams.
    pub max_flows: usize,
    /// Shared lanes to one peer.
    pub max_shared_lanes: usize,
    /// Exclusive lanes to one peer; further bulk streams stay where they are.
    pub max_exclusive_lanes: usize,
    /// Server: lanes and QUIC connections, handshakes included.
    pub max_server_lanes: usize,
    /// Client: handshakes at once; more wait.
    pub max_handshakes: usize,
    /// Server: handshakes at once; more are refused.
    pub max_pending_handshakes: usize,
    /// Server: streams offered and not yet taken by [`super::Server::accept`].
    pub max_pending: usize,
    /// Bytes in flight or unread per direction of a stream on a shared lane.
    pub window: u32,
    /// Bytes accepted from the application and not yet written, per stream.
    pub send_buffer: usize,
    /// Unread bytes at which an exclusive lane's socket is no longer read.
    pub max_unread: usize,
    /// A stream that carries this many bytes within [`Config::bulk_period`] moves to an exclusive lane.
    pub bulk_bytes: u64,
    pub bulk_period: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            congestion: Congestion::default(),
            idle_timeout: Duration::from_secs(60),
            max_age: Duration::from_secs(3600),
            quic_grace: Duration::from_secs(12 * 3600),
            connect_timeout: Duration::from_secs(5),
            open_timeout: Duration::from_secs(15),
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            dead_after: Duration::from_secs(15),
            max_streams: 256,
            max_flows: 8192,
            max_shared_lanes: 64,
            max_exclusive_lanes: 32,
            max_server_lanes: 8192,
            max_handshakes: 64,
            max_pending_handshakes: 1024,
            max_pending: 1024,
            window: 256 * 1024,
            send_buffer: 64 * 1024,
            max_unread: 512 * 1024,
            bulk_bytes: 1024 * 1024,
            bulk_period: Duration::from_secs(1),
        }
    }
}

impl Config {
    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            max_streams: self.max_streams,
            window: self.window,
            send_buffer: self.send_buffer,
            max_unread: self.max_unread,
        }
    }

    /// How often a lane looks at its deadlines.
    pub(super) fn tick(&self) -> Duration {
        let shortest =
            [self.keepalive, self.idle_timeout, self.header_timeout, self.dead_after, self.max_age].into_iter().min();
        (shortest.unwrap_or_default() / 4).clamp(Duration::from_millis(5), Duration::from_secs(2))
    }
}
