//! The two directions of one stream on one lane.

use super::queue::Queue;
use crate::tunnel::ResetCode;
use bytes::{Bytes, BytesMut};

/// How the local side's direction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sending {
    Open,
    /// FIN follows the queue.
    Finishing,
    /// FIN is on the wire.
    Finished,
    /// RESET is on the wire, by our own wish.
    Reset,
    /// RESET is on the wire because the peer wants no more.
    Stopped(ResetCode),
    /// MOVE is on the wire: the direction goes on elsewhere.
    Moved,
}

#[derive(Debug)]
pub(super) struct SendSide {
    pub(super) state: Sending,
    pub(super) queue: Queue<Bytes>,
    pub(super) queued: usize,
    /// Bytes the peer still takes; `None` where the connection itself holds the sender back.
    pub(super) credit: Option<u64>,
    pub(super) sent: u64,
    /// In the machine's list of streams with something to write.
    pub(super) is_listed: bool,
    /// Someone waits for room in the queue.
    pub(super) is_wanted: bool,
    /// The local side will not touch this direction again.
    pub(super) is_released: bool,
}

impl SendSide {
    pub(super) fn new(credit: Option<u64>) -> Self {
        Self {
            state: Sending::Open,
            queue: Queue::default(),
            queued: 0,
            credit,
            sent: 0,
            is_listed: false,
            is_wanted: false,
            is_released: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        !matches!(self.state, Sending::Open | Sending::Finishing)
    }

    /// Whether something can be written now.
    pub(super) fn is_ready(&self) -> bool {
        match self.state {
            Sending::Open => self.queued > 0 && self.credit != Some(0),
            Sending::Finishing => self.queued == 0 || self.credit != Some(0),
            _ => false,
        }
    }

    /// Takes the next piece of at most `limit` bytes within the credit.
    pub(super) fn take(&mut self, limit: usize) -> Option<Bytes> {
        let allowed = self.credit.map_or(limit, |credit| limit.min(usize::try_from(credit).unwrap_or(limit)));
        let front = self.queue.first_mut().filter(|_| allowed > 0)?;
        let piece = if front.len() <= allowed { self.queue.pop()? } else { front.split_to(allowed) };
        self.queued -= piece.len();
        self.sent += piece.len() as u64;
        if let Some(credit) = &mut self.credit {
            *credit -= piece.len() as u64;
        }
        Some(piece)
    }

    pub(super) fn drop_queue(&mut self) {
        self.queue = Queue::default();
        self.queued = 0;
    }
}

/// How the peer's direction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receiving {
    Open,
    Finished,
    Reset(ResetCode),
    /// The direction goes on elsewhere.
    Moved,
}

#[derive(Debug)]
pub(super) struct RecvSide {
    pub(super) state: Receiving,
    chunks: Queue<BytesMut>,
    pub(super) buffered: usize,
    pub(super) received: u64,
    /// Bytes the peer may still send; `None` where the connection itself holds it back.
    pub(super) window: Option<u64>,
    /// Bytes read by the local side and not yet granted anew.
    pub(super) consumed: u64,
    /// The local side will not touch this direction again; what still arrives is dropped.
    pub(super) is_released: bool,
}

/// Room made for bulk at once, so that a reader gets long pieces: each is a system call to the application's socket.
const CHUNK: usize = 64 * 1024;
/// Likewise once as much is unread.
const LONG_CHUNK: usize = 4 * CHUNK;
/// Pieces of at least this size count as bulk.
const BULK: usize = 4 * 1024;

impl RecvSide {
    pub(super) fn new(window: Option<u64>) -> Self {
        Self {
            state: Receiving::Open,
            chunks: Queue::default(),
            buffered: 0,
            received: 0,
            window,
            consumed: 0,
            is_released: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.state != Receiving::Open
    }

    /// Keeps bytes for the reader. Memory stays within a small multiple of `buffered`: small pieces share a chunk.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffered += bytes.len();
        let fits = |chunk: &&mut BytesMut| chunk.capacity() - chunk.len() >= bytes.len();
        if let Some(chunk) = self.chunks.last_mut().filter(fits) {
            chunk.extend_from_slice(bytes);
            return;
        }
        let room = match self.buffered {
            CHUNK.. => LONG_CHUNK,
            BULK.. => CHUNK,
            _ => 0,
        };
        let mut chunk = BytesMut::with_capacity(room.max(bytes.len()));
        chunk.extend_from_slice(bytes);
        self.chunks.push(chunk);
    }

    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let chunk = self.chunks.pop()?;
        self.buffered -= chunk.len();
        Some(chunk.freeze())
    }

    pub(super) fn drop_buffer(&mut self) {
        self.chunks = Queue::default();
        self.buffered = 0;
    }
}

/// Whether the stream exists on both ends yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Our OPEN or ATTACH has no answer yet.
    Opening,
    /// The peer's OPEN or ATTACH has no answer yet.
    Offered,
    Open,
    Refused(u8),
}

#[derive(Debug)]
pub(super) struct StreamState {
    pub(super) phase: Phase,
    /// The stream goes on elsewhere: what is left here was said before.
    pub(super) is_superseded: bool,
    pub(super) send: SendSide,
    pub(super) recv: RecvSide,
}

impl StreamState {
    /// Whether nobody needs it any more.
    pub(super) fn is_over(&self) -> bool {
        let is_released = self.send.is_released && self.recv.is_released;
        match self.phase {
            Phase::Refused(_) => is_released,
            Phase::Opening => false,
            Phase::Offered | Phase::Open => is_released && self.send.is_over() && self.recv.is_over(),
        }
    }
}
