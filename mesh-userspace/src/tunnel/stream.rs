//! An open stream of any transport, and its two halves.

use super::lane::LANES;
use super::quic::{QUIC, QuicRecv, QuicSend};
use super::route::{RouteRecv, RouteSend};
use super::{ResetCode, StreamError, TlsSession};
use bytes::{Bytes, BytesMut};
use std::future::poll_fn;
use std::task::{Context, Poll};

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
    pub async fn send(&mut self, mut bytes: Bytes) -> Result<(), StreamError> {
        poll_fn(|cx| self.poll_send(cx, &mut bytes)).await
    }

    /// [`SendHalf::send`], once: what is not taken yet stays in `bytes`, and must be what the next call begins with.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<Result<(), StreamError>> {
        match &mut self.0 {
            SendKind::Lane(half) => half.poll_send(cx, bytes),
            SendKind::Quic(half) => half.poll_send(cx, bytes),
        }
    }

    /// Says that nothing follows; what was sent before is still delivered.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub fn finish(&mut self) -> Result<(), StreamError> {
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
    /// The next bytes, as many as have arrived; `None` once the peer has finished.
    ///
    /// # Errors
    /// If the peer gave up or the connection between the nodes ended.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.poll_recv(cx, join)).await
    }

    /// Hands the next bytes to `take`, in pieces as they have arrived, none of which is empty; what it leaves of them is
    /// lost. `None` once the peer has finished.
    ///
    /// # Errors
    /// As [`RecvHalf::recv`].
    pub fn poll_recv<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut [Bytes]) -> T,
    ) -> Poll<Result<Option<T>, StreamError>> {
        match &mut self.0 {
            RecvKind::Lane(half) => half.poll_recv(cx).map_ok(|bytes| bytes.map(|bytes| take(&mut [bytes]))),
            RecvKind::Quic(half) => half.poll_pieces(cx, take),
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

/// One piece of several.
pub fn join(pieces: &mut [Bytes]) -> Bytes {
    match pieces {
        [only] => std::mem::take(only),
        _ => pieces
            .iter()
            .fold(BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum()), |mut joined, piece| {
                joined.extend_from_slice(piece);
                joined
            })
            .freeze(),
    }
}
