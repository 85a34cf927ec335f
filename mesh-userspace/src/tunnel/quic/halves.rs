//! The two directions of a stream on QUIC.

use crate::telemetry::tunnel::TunnelBytes;
use crate::tunnel::{ResetCode, StreamError};
use bytes::{Bytes, BytesMut};
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

/// Packets' worth of bytes handed on at once.
const PIECES: usize = 48;

/// What keeps a connection from being idle, with its byte counters: each half holds one.
pub(in crate::tunnel) type Use = Arc<TunnelBytes>;

#[derive(Debug)]
pub(in crate::tunnel) struct QuicSend {
    stream: SendStream,
    is_over: bool,
    usage: Use,
}

impl QuicSend {
    pub(super) fn new(stream: SendStream, usage: Use) -> Self {
        Self { stream, is_over: false, usage }
    }

    /// Takes `bytes` from the front as far as there is room.
    pub(in crate::tunnel) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &mut Bytes,
    ) -> Poll<Result<(), StreamError>> {
        if self.is_over {
            return Poll::Ready(Err(StreamError::Ended));
        }
        while !bytes.is_empty() {
            let mut left = [std::mem::take(bytes)];
            // A new future each time: what waits for room is the stream, the future holds nothing.
            let written = pin!(self.stream.write_chunks(&mut left)).poll(cx);
            [*bytes] = left;
            let written = ready!(written).map_err(|error| match error {
                WriteError::Stopped(code) => StreamError::Stopped(reset_code(code)),
                WriteError::ClosedStream => StreamError::Ended,
                WriteError::ConnectionLost(_) | WriteError::ZeroRttRejected => StreamError::LaneClosed,
            })?;
            self.usage.sent.inc_by(written.bytes as u64);
        }
        Poll::Ready(Ok(()))
    }

    pub(in crate::tunnel) fn finish(&mut self) -> Result<(), StreamError> {
        self.is_over = true;
        self.stream.finish().map_err(|_| StreamError::Ended)
    }

    pub(in crate::tunnel) fn reset(&mut self, code: ResetCode) {
        if !std::mem::replace(&mut self.is_over, true) {
            // Fails only if the stream has ended.
            let _ = self.stream.reset(VarInt::from_u32(code.0));
        }
    }
}

impl Drop for QuicSend {
    fn drop(&mut self) {
        // quinn would finish the stream, which the application did not.
        self.reset(ResetCode::CANCELLED);
    }
}

#[derive(Debug)]
pub(in crate::tunnel) struct QuicRecv {
    stream: RecvStream,
    is_over: bool,
    usage: Use,
}

impl QuicRecv {
    pub(super) fn new(stream: RecvStream, usage: Use) -> Self {
        Self { stream, is_over: false, usage }
    }

    pub(in crate::tunnel) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        if self.is_over {
            return Poll::Ready(Ok(None));
        }
        let mut pieces: [Bytes; PIECES] = std::array::from_fn(|_| Bytes::new());
        // As in `poll_send`.
        let count = ready!(pin!(self.stream.read_chunks(&mut pieces)).poll(cx)).map_err(|error| match error {
            ReadError::Reset(code) => StreamError::Reset(reset_code(code)),
            ReadError::ClosedStream => StreamError::Ended,
            ReadError::ConnectionLost(_) | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                StreamError::LaneClosed
            }
        })?;
        let Some(count) = count else {
            self.is_over = true;
            return Poll::Ready(Ok(None));
        };
        let bytes = join(&mut pieces[..count]);
        self.usage.received.inc_by(bytes.len() as u64);
        Poll::Ready(Ok(Some(bytes)))
    }

    pub(in crate::tunnel) fn stop(&mut self, code: ResetCode) {
        if !std::mem::replace(&mut self.is_over, true) {
            // Fails only if the stream has ended.
            let _ = self.stream.stop(VarInt::from_u32(code.0));
        }
    }
}

/// Packets are small: one longer piece saves the reader many writes.
fn join(pieces: &mut [Bytes]) -> Bytes {
    if let [only] = pieces {
        return std::mem::take(only);
    }
    let mut joined = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    pieces.iter().for_each(|piece| joined.extend_from_slice(piece));
    joined.freeze()
}

/// Codes on the wire are 62 bits; those that nodemesh sends fit.
fn reset_code(code: VarInt) -> ResetCode {
    u32::try_from(code.into_inner()).map_or(ResetCode::CANCELLED, ResetCode)
}
