//! The lane's protocol machine: many streams on one ordered connection.
//!
//! Pure: bytes and calls go in, bytes and events come out. No socket, no clock, no task.
//!
//! - A stream is opened by the client's OPEN and exists once the server answers OPENED.
//! - On a *shared* lane the receiver grants credit per stream, so a reader asleep on one stops neither the others nor
//!   the lane, and its sender is held back after [`Bounds::window`] + [`Bounds::send_buffer`] bytes.
//! - Each direction ends on its own: FIN, or RESET by the sender, or STOP by the receiver (which a RESET answers).
//! - A direction may *move*, any number of times: MOVE says how many bytes came this way, the rest follows on another
//!   lane. ATTACH continues the stream on a lane of its own, where the connection's flow control replaces credit
//!   ([`Machine::wants_read`]); JOIN continues it among others, without credit until its reader has come that far, so
//!   that a stream never has more unread bytes than one window, however often it moves.

mod input;
mod output;
mod queue;
#[cfg(test)]
mod simulation;
mod stream;
#[cfg(test)]
mod tests;
mod transmit;

pub use input::MachineError;
pub use transmit::Transmit;

use super::ResetCode;
use super::codec::{Decoder, Frame, LaneToken};
use bytes::Bytes;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use stream::{Phase, Receiving, RecvSide, SendSide, Sending, StreamState};

/// What one lane may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Streams at once.
    pub max_streams: usize,
    /// Bytes in flight or unread per direction of a credited stream.
    pub window: u32,
    /// Bytes accepted from the local side and not yet written, per stream; exceeded by one chunk at most.
    pub send_buffer: usize,
    /// Unread bytes of a stream without credit above which the lane's connection is not read.
    pub max_unread: usize,
}

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Opens streams.
    Client,
    /// Answers.
    Server,
}

/// Something the driver has to tell someone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer opens a stream: answer with [`Machine::accept`] or [`Machine::refuse`].
    Offered { id: u32, header: Bytes },
    /// The peer continues stream `origin` of lane `token` here, alone or among others: answer likewise.
    Attaching { id: u32, token: LaneToken, origin: u32, is_alone: bool },
    /// [`Machine::answer`] has the peer's answer.
    Answered { id: u32 },
    /// [`Machine::recv`] has news.
    Readable { id: u32 },
    /// [`Machine::has_room`] has news.
    Writable { id: u32 },
    /// The stream is gone; its number is never used again.
    Closed { id: u32 },
    /// The peer takes no new streams.
    GoAway,
}

/// Why a stream cannot be opened here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// As many streams as the lane may carry.
    Full,
    /// One side drains, or the numbers are used up.
    Draining,
}

/// Why bytes cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendStop {
    /// The peer wants no more.
    Stopped(ResetCode),
    /// The direction was ended locally.
    Ended,
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Bytes(Bytes),
    /// The peer has said everything.
    Finished,
    Reset(ResetCode),
    /// Read on at the lane that the stream was attached to.
    Moved,
    /// Nothing yet; a [`Event::Readable`] follows.
    Pending,
}

/// What a moved direction takes along to its new lane.
#[derive(Debug, PartialEq, Eq)]
pub struct Remainder {
    /// Accepted but unsent bytes.
    pub unsent: VecDeque<Bytes>,
    /// The direction ends after them.
    pub is_finished: bool,
}

/// One end of one lane.
#[derive(Debug)]
pub struct Machine {
    side: Side,
    bounds: Bounds,
    decoder: Decoder,
    /// Looked up for each message. By a hash that is quick, not secret: a peer that picks its numbers for it slows its own lane
    /// down, which carries no more than [`Bounds::max_streams`].
    streams: FxHashMap<u32, StreamState>,
    /// The highest stream number in use or used.
    last: u32,
    control: VecDeque<Frame<'static>>,
    ready: VecDeque<u32>,
    events: VecDeque<Event>,
    is_draining: bool,
    is_peer_draining: bool,
    /// The stream without credit that is being received, if any.
    uncredited: Option<u32>,
    is_paused: bool,
}

impl Machine {
    #[must_use]
    pub fn new(side: Side, bounds: Bounds) -> Self {
        Self {
            side,
            bounds,
            decoder: Decoder::default(),
            streams: FxHashMap::default(),
            last: 0,
            control: VecDeque::new(),
            ready: VecDeque::new(),
            events: VecDeque::new(),
            is_draining: false,
            is_peer_draining: false,
            uncredited: None,
            is_paused: false,
        }
    }

    // ---- opening -----------------------------------------------------------------------------------------------

    /// Opens a stream with an encoded header. Client only.
    ///
    /// # Errors
    /// If the lane takes no more streams.
    pub fn open(&mut self, header: Bytes) -> Result<u32, Unavailable> {
        let credit = Some(u64::from(self.bounds.window));
        let stream = self.begin(credit)?;
        self.control.push_back(Frame::Open { stream, header });
        Ok(stream)
    }

    /// Opens the continuation of another lane's stream, among others. Client only.
    ///
    /// # Errors
    /// If the lane takes no more streams.
    pub fn join(&mut self, token: LaneToken, origin: u32) -> Result<u32, Unavailable> {
        let stream = self.begin(Some(0))?;
        self.control.push_back(Frame::Join { stream, token, origin });
        Ok(stream)
    }

    /// Opens the continuation of another lane's stream, alone. Client only, on a lane without streams.
    ///
    /// # Errors
    /// If the lane takes no more streams.
    pub fn attach(&mut self, token: LaneToken, origin: u32) -> Result<u32, Unavailable> {
        if self.uncredited.is_some() {
            return Err(Unavailable::Full);
        }
        let stream = self.begin(None)?;
        self.uncredited = Some(stream);
        self.control.push_back(Frame::Attach { stream, token, origin });
        Ok(stream)
    }

    fn begin(&mut self, credit: Option<u64>) -> Result<u32, Unavailable> {
        debug_assert_eq!(self.side, Side::Client);
        if self.is_draining || self.is_peer_draining || self.last == u32::MAX {
            return Err(Unavailable::Draining);
        }
        if self.streams.len() >= self.bounds.max_streams {
            return Err(Unavailable::Full);
        }
        self.last += 1;
        self.insert(self.last, Phase::Opening, credit);
        Ok(self.last)
    }

    fn insert(&mut self, id: u32, phase: Phase, credit: Option<u64>) {
        let (send, recv) = (SendSide::new(credit), RecvSide::new(credit));
        let stream = StreamState { phase, is_superseded: false, send, recv };
        self.streams.insert(id, stream);
    }

    /// The peer's answer: `None` while there is none, the code of a refusal otherwise. A refused stream is to be
    /// released by [`Machine::abandon`].
    #[must_use]
    pub fn answer(&self, id: u32) -> Option<Result<(), u8>> {
        match self.streams.get(&id)?.phase {
            Phase::Opening | Phase::Offered => None,
            Phase::Open => Some(Ok(())),
            Phase::Refused(code) => Some(Err(code)),
        }
    }

    /// Answers an offered stream: it exists.
    pub fn accept(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.phase == Phase::Offered) else { return };
        stream.phase = Phase::Open;
        self.control.push_back(Frame::Opened { stream: id });
        if let Sending::Stopped(code) = stream.send.state {
            self.control.push_back(Frame::Reset { stream: id, code });
        }
    }

    /// Answers an offered stream: it does not exist.
    pub fn refuse(&mut self, id: u32, code: u8) {
        if self.streams.get(&id).is_some_and(|stream| stream.phase == Phase::Offered) {
            self.control.push_back(Frame::Refused { stream: id, code });
            self.remove(id);
        }
    }

    /// Gives up both directions of a stream, answered or not.
    pub fn abandon(&mut self, id: u32, code: ResetCode) {
        self.reset(id, code);
        self.release_send(id);
        self.stop(id, code);
    }

    // ---- receiving ---------------------------------------------------------------------------------------------

    /// Takes the next bytes, or says how the direction stands. What arrived before a reset is still delivered.
    pub fn recv(&mut self, id: u32) -> Received {
        let Some(stream) = self.streams.get_mut(&id) else { return Received::Finished };
        let recv = &mut stream.recv;
        let Some(bytes) = recv.pop() else {
            return match recv.state {
                Receiving::Open => Received::Pending,
                Receiving::Finished => Received::Finished,
                Receiving::Reset(code) => Received::Reset(code),
                Receiving::Moved => Received::Moved,
            };
        };
        if let Some(window) = recv.window
            && recv.state == Receiving::Open
        {
            recv.consumed += bytes.len() as u64;
            if recv.consumed >= u64::from(self.bounds.window) / 2 {
                recv.window = Some(window + recv.consumed);
                let granted = u32::try_from(recv.consumed).expect("no more than the window is ever unread");
                recv.consumed = 0;
                self.control.push_back(Frame::Credit { stream: id, bytes: granted });
            }
        }
        self.update_pause();
        Received::Bytes(bytes)
    }

    /// The reader has come as far as this lane: a stream that joined it may now be sent a window's worth.
    pub fn admit(&mut self, id: u32) {
        let window = self.bounds.window;
        let Some(recv) = self.streams.get_mut(&id).map(|stream| &mut stream.recv) else { return };
        // Nothing was granted before, so nothing can have come.
        if recv.window == Some(0) && recv.received == 0 && !recv.is_over() && !recv.is_released {
            recv.window = Some(u64::from(window));
            self.control.push_back(Frame::Credit { stream: id, bytes: window });
        }
    }

    /// Whether the peer has said on this lane all that it will, and all of it was read.
    #[must_use]
    pub fn is_read_out(&self, id: u32) -> bool {
        let recv = self.streams.get(&id).map(|stream| &stream.recv);
        recv.is_none_or(|recv| recv.state == Receiving::Moved && recv.buffered == 0)
    }

    /// Notes that the stream goes on elsewhere.
    pub fn supersede(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.is_superseded = true;
        }
    }

    /// Whether any stream has not gone on elsewhere.
    #[must_use]
    pub fn has_current(&self) -> bool {
        self.streams.values().any(|stream| !stream.is_superseded)
    }

    /// The local side wants no more of this direction and will not touch it again. The peer is told so unless it had
    /// ended the direction.
    pub fn stop(&mut self, id: u32, code: ResetCode) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.recv.is_released && !stream.recv.is_over() && !matches!(stream.phase, Phase::Refused(_)) {
            self.control.push_back(Frame::Stop { stream: id, code });
        }
        self.release_recv(id);
    }

    /// The local side will not touch the receiving direction again; the peer ends it by itself.
    pub fn release_recv(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.recv.is_released = true;
        stream.recv.drop_buffer();
        self.update_pause();
        self.settle(id);
    }

    /// Whether the connection should be read: not while the reader of a stream without credit lags behind.
    #[must_use]
    pub fn wants_read(&self) -> bool {
        !self.is_paused
    }

    fn update_pause(&mut self) {
        let unread = self.uncredited.and_then(|id| self.streams.get(&id)).map_or(0, |stream| stream.recv.buffered);
        let threshold = if self.is_paused { self.bounds.max_unread / 2 } else { self.bounds.max_unread };
        self.is_paused = unread >= threshold.max(1);
    }

    // ---- the lane ----------------------------------------------------------------------------------------------

    /// Announces that no new streams are taken; those that exist go on.
    pub fn go_away(&mut self) {
        if !self.is_draining {
            self.is_draining = true;
            self.control.push_back(Frame::GoAway);
        }
    }

    /// Queues a sign of life.
    pub fn ping(&mut self) {
        self.control.push_back(Frame::Ping);
    }

    /// Whether either side has announced that it takes no new streams.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.is_draining || self.is_peer_draining
    }

    /// Streams that exist, are being opened, or have not ended on both sides.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Whether a stream without credit has the lane for itself.
    #[must_use]
    pub fn is_exclusive(&self) -> bool {
        self.uncredited.is_some()
    }

    /// The number of the frame, other than DATA, that the peer has begun and not ended.
    #[must_use]
    pub fn unfinished_frame(&self) -> Option<u64> {
        self.decoder.is_inside_frame().then(|| self.decoder.heads())
    }

    /// Whether any stream was ever opened here.
    #[must_use]
    pub fn was_used(&self) -> bool {
        self.last > 0
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn settle(&mut self, id: u32) {
        if let Some(stream) = self.streams.get(&id) {
            if stream.recv.is_over() && self.uncredited == Some(id) {
                // What the ended stream left unread is bounded and must not hold up the lane's next one.
                self.uncredited = None;
                self.is_paused = false;
            }
            if stream.is_over() {
                self.remove(id);
            }
        }
    }

    fn remove(&mut self, id: u32) {
        if self.uncredited == Some(id) {
            self.uncredited = None;
            self.is_paused = false;
        }
        self.streams.remove(&id);
        self.events.push_back(Event::Closed { id });
    }
}
