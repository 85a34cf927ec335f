//! An open stream of any transport, and its two halves.

use super::lane::LANES;
use super::quic::{QUIC, QuicRecv, QuicSend};
use super::route::{RouteRecv, RouteSend};
use super::{ResetCode, StreamError, TlsSession};
use bytes::Bytes;

/// One application connection between two nodes.
#[derive(Debug)]
pub struct Stream {
    send: SendHalf,
    recv: RecvHalf,
    tls: TlsSession,
}

impl Stream {
    pub(super) fn new(send: SendHalf, recv: RecvHalf, tls: TlsSession) -> Self {
        Self { send, recv, tls }
    }

    #[must_use]
    pub fn split(self) -> (SendHalf, RecvHalf) {
        (self.send, self.recv)
    }

    /// The label of the transport that carries it: `lanes` or `quic`.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        match &self.send.0 {
            SendKind::Lane(_) => LANES,
            SendKind::Quic(_) => QUIC,
        }
    }

    /// The connection's TLS session.
    #[must_use]
    pub fn tls(&self) -> TlsSession {
        self.tls.clone()
    }
}

/// The sending direction. Dropping it before [`SendHalf::finish`] resets it.
#[derive(Debug)]
pub struct SendHalf(pub(super) SendKind);

#[derive(Debug)]
pub(super) enum SendKind {
    Lane(RouteSend),
    Quic(QuicSend),
}

impl SendHalf {
    /// Sends bytes; waits while the peer's application lags behind. If the future is dropped before it is ready, some
    /// of the bytes may have been taken: the direction can then only be reset.
    ///
    /// # Errors
    /// If the peer wants no more, the connection between the nodes ended, or the direction was ended before.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        match &mut self.0 {
            SendKind::Lane(half) => half.send(bytes).await,
            SendKind::Quic(half) => half.send(bytes).await,
        }
    }

    /// Says that nothing follows; what was sent before is still delivered.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    #[expect(clippy::unused_async, reason = "a transport may have to wait before it can say so")]
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        match &mut self.0 {
            SendKind::Lane(half) => half.finish(),
            SendKind::Quic(half) => half.finish(),
        }
    }

    /// Gives the direction up: the peer's reader gets an error after what has arrived.
    pub fn reset(&mut self, code: ResetCode) {
        match &mut self.0 {
            SendKind::Lane(half) => half.reset(code),
            SendKind::Quic(half) => half.reset(code),
        }
    }
}

/// The receiving direction. Dropping it before the end stops the peer.
#[derive(Debug)]
pub struct RecvHalf(pub(super) RecvKind);

#[derive(Debug)]
pub(super) enum RecvKind {
    Lane(RouteRecv),
    Quic(QuicRecv),
}

impl RecvHalf {
    /// The next bytes, in pieces as long as have arrived; `None` once the peer has finished.
    ///
    /// # Errors
    /// If the peer gave up or the connection between the nodes ended.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, StreamError> {
        match &mut self.0 {
            RecvKind::Lane(half) => half.recv().await,
            // On the heap: it is large, and every byte of this future is in all connections, of which few are over QUIC.
            RecvKind::Quic(half) => Box::pin(half.recv()).await,
        }
    }

    /// Wants no more: the peer's sender gets an error.
    pub fn stop(&mut self, code: ResetCode) {
        match &mut self.0 {
            RecvKind::Lane(half) => half.stop(code),
            RecvKind::Quic(half) => half.stop(code),
        }
    }
}
