//! The two directions of a stream on QUIC.

use super::order::{Foremost, Share};
use crate::telemetry::tunnel::TunnelBytes;
use crate::tunnel::{ResetCode, StreamError};
use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use std::cell::RefCell;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

/// Packets' worth of bytes handed on at once.
const PIECES: usize = 48;

thread_local! {
    /// Empty but while pieces are handed on.
    static SCRATCH: RefCell<[Bytes; PIECES]> = const { RefCell::new([const { Bytes::new() }; PIECES]) };
}

/// What keeps a connection from being idle: each half holds one.
pub(in crate::tunnel) type Use = Arc<Usage>;

/// What the streams of a connection share.
#[derive(Debug)]
pub(in crate::tunnel) struct Usage {
    pub(super) bytes: TunnelBytes,
    foremost: Foremost,
}

impl Usage {
    pub(super) fn new(bytes: TunnelBytes) -> Self {
        Self { bytes, foremost: Foremost::default() }
    }
}

#[derive(Debug)]
pub(in crate::tunnel) struct QuicSend {
    stream: SendStream,
    is_over: bool,
    share: Share,
    usage: Use,
}

impl QuicSend {
    pub(super) fn new(stream: SendStream, usage: Use) -> Self {
        Self { stream, is_over: false, share: Share::default(), usage }
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
            if let Some(priority) = self.share.next(&self.usage.foremost) {
                // Fails only if the stream has ended, which writing says.
                let _ = self.stream.set_priority(priority);
            }
            let mut left = [std::mem::take(bytes)];
            // A new future each time: what waits for room is the stream, the future holds nothing.
            let written = pin!(self.stream.write_chunks(&mut left)).poll(cx);
            [*bytes] = left;
            let written = ready!(written).map_err(|error| match error {
                WriteError::Stopped(code) => StreamError::Stopped(reset_code(code)),
                WriteError::ClosedStream => StreamError::Ended,
                WriteError::ConnectionLost(_) | WriteError::ZeroRttRejected => StreamError::LaneClosed,
            })?;
            self.share.add(written.bytes as u64, &self.usage.foremost);
            self.usage.bytes.sent.inc_by(written.bytes as u64);
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

    /// Hands what has arrived to `take`, packet by packet as far as it came so; `None` at the end.
    pub(in crate::tunnel) fn poll_pieces<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut [Bytes]) -> T,
    ) -> Poll<Result<Option<T>, StreamError>> {
        if self.is_over {
            return Poll::Ready(Ok(None));
        }
        SCRATCH.with_borrow_mut(|pieces| {
            // As in `poll_send`.
            let count = ready!(pin!(self.stream.read_chunks(pieces)).poll(cx)).map_err(|error| match error {
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
            let pieces = &mut pieces[..count];
            self.usage.bytes.received.inc_by(pieces.iter().map(|piece| piece.len() as u64).sum());
            let taken = take(pieces);
            pieces.fill(Bytes::new());
            Poll::Ready(Ok(Some(taken)))
        })
    }

    pub(in crate::tunnel) fn stop(&mut self, code: ResetCode) {
        if !std::mem::replace(&mut self.is_over, true) {
            // Fails only if the stream has ended.
            let _ = self.stream.stop(VarInt::from_u32(code.0));
        }
    }
}

/// Codes on the wire are 62 bits; those that nodemesh sends fit.
fn reset_code(code: VarInt) -> ResetCode {
    u32::try_from(code.into_inner()).map_or(ResetCode::CANCELLED, ResetCode)
}
