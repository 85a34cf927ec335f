//! The machine's receiving end: what each frame of the peer does.

use super::{Event, Machine, Phase, Receiving, Sending, Side};
use crate::tunnel::codec::{CodecError, Frame};
use crate::tunnel::{Refusal, ResetCode};

/// How the peer broke the protocol. The lane cannot go on after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("stream {0} does not exist")]
    UnknownStream(u32),
    #[error("a frame that stream {0} may not get in its state")]
    Order(u32),
    #[error("stream {0} got more bytes than it was granted")]
    CreditExceeded(u32),
    #[error("stream {0} was granted more credit than can be counted")]
    CreditOverflow(u32),
    #[error("stream {stream} moved at byte {claimed}, but {received} came this way")]
    MoveOffset { stream: u32, claimed: u64, received: u64 },
    #[error("too many answers are owed to a peer that reads none")]
    Flood,
}

impl MachineError {
    /// A stable label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Codec(CodecError::Length { .. }) => "frame_length",
            Self::Codec(_) => "bad_frame",
            Self::UnknownStream(_) => "unknown_stream",
            Self::Order(_) => "frame_order",
            Self::CreditExceeded(_) | Self::CreditOverflow(_) => "credit",
            Self::MoveOffset { .. } => "move_offset",
            Self::Flood => "flood",
        }
    }
}

impl Machine {
    /// Takes bytes off the connection.
    ///
    /// # Errors
    /// If the peer broke the protocol; the lane must be closed.
    pub fn handle_input(&mut self, mut input: &[u8]) -> Result<(), MachineError> {
        // The decoder is taken out so that a piece of DATA may borrow from the input while the streams change.
        let mut decoder = std::mem::take(&mut self.decoder);
        let max_owed = 8 * self.bounds.max_streams + 1024;
        let result = loop {
            match decoder.next(&mut input) {
                Ok(Some(frame)) => {
                    if let Err(error) = self.handle_frame(frame) {
                        break Err(error);
                    }
                    if self.control.len() > max_owed {
                        break Err(MachineError::Flood);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        self.decoder = decoder;
        self.update_pause();
        result
    }

    fn handle_frame(&mut self, frame: Frame<'_>) -> Result<(), MachineError> {
        match frame {
            Frame::Ping => Ok(()),
            Frame::GoAway => {
                self.is_peer_draining = true;
                self.events.push_back(Event::GoAway);
                Ok(())
            }
            Frame::Open { stream: id, header } => {
                if self.offer(id, Some(u64::from(self.bounds.window)))? {
                    self.events.push_back(Event::Offered { id, header });
                }
                Ok(())
            }
            Frame::Attach { stream: id, token, origin } => {
                if self.offer(id, None)? {
                    self.uncredited = Some(id);
                    self.events.push_back(Event::Attaching { id, token, origin, is_alone: true });
                }
                Ok(())
            }
            Frame::Join { stream: id, token, origin } => {
                if self.offer(id, Some(0))? {
                    self.events.push_back(Event::Attaching { id, token, origin, is_alone: false });
                }
                Ok(())
            }
            Frame::Opened { stream } => self.handle_answer(stream, Phase::Open),
            Frame::Refused { stream, code } => self.handle_answer(stream, Phase::Refused(code)),
            Frame::Data { stream, bytes } => self.handle_data(stream, bytes),
            Frame::Credit { stream, bytes } => self.handle_credit(stream, bytes),
            Frame::Fin { stream } => self.handle_end(stream, Receiving::Finished),
            Frame::Reset { stream, code } => self.handle_end(stream, Receiving::Reset(code)),
            Frame::Move { stream, offset } => self.handle_move(stream, offset),
            Frame::Stop { stream, code } => self.handle_stop(stream, code),
        }
    }

    /// Takes note of a stream that the peer opens; `false` if it was refused at once.
    fn offer(&mut self, id: u32, credit: Option<u64>) -> Result<bool, MachineError> {
        if self.side == Side::Client || id <= self.last || self.uncredited.is_some() {
            return Err(MachineError::Order(id));
        }
        self.last = id;
        let refusal = if self.is_draining {
            Refusal::Draining
        } else if self.streams.len() >= self.bounds.max_streams {
            Refusal::Overloaded
        } else {
            self.insert(id, Phase::Offered, credit);
            return Ok(true);
        };
        self.control.push_back(Frame::Refused { stream: id, code: refusal.code() });
        Ok(false)
    }

    fn handle_answer(&mut self, id: u32, phase: Phase) -> Result<(), MachineError> {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.phase == Phase::Opening) else {
            return Err(MachineError::Order(id));
        };
        stream.phase = phase;
        if let Phase::Refused(_) = phase {
            stream.send.state = Sending::Reset;
            stream.recv.state = Receiving::Finished;
        }
        self.events.push_back(Event::Answered { id });
        self.settle(id);
        Ok(())
    }

    /// Whether the stream exists and the peer may speak on it. A late frame for a stream that is gone is no error.
    fn is_live(&self, id: u32) -> Result<bool, MachineError> {
        match self.streams.get(&id) {
            Some(stream) if matches!(stream.phase, Phase::Open | Phase::Offered) => Ok(true),
            Some(_) => Err(MachineError::Order(id)),
            None if id <= self.last => Ok(false),
            None => Err(MachineError::UnknownStream(id)),
        }
    }

    fn handle_data(&mut self, id: u32, bytes: &[u8]) -> Result<(), MachineError> {
        if !self.is_live(id)? {
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let recv = &mut stream.recv;
        if recv.is_over() {
            return Err(MachineError::Order(id));
        }
        if let Some(window) = &mut recv.window {
            *window = window.checked_sub(bytes.len() as u64).ok_or(MachineError::CreditExceeded(id))?;
        }
        recv.received += bytes.len() as u64;
        if !recv.is_released {
            recv.push(bytes);
            self.readable(id);
        }
        Ok(())
    }

    fn handle_credit(&mut self, id: u32, bytes: u32) -> Result<(), MachineError> {
        if !self.is_live(id)? {
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let credit = stream.send.credit.as_mut().ok_or(MachineError::Order(id))?;
        *credit = credit.checked_add(u64::from(bytes)).ok_or(MachineError::CreditOverflow(id))?;
        self.list(id);
        Ok(())
    }

    fn handle_end(&mut self, id: u32, end: Receiving) -> Result<(), MachineError> {
        if !self.is_live(id)? {
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if stream.recv.is_over() {
            return Err(MachineError::Order(id));
        }
        stream.recv.state = end;
        self.readable(id);
        self.settle(id);
        Ok(())
    }

    fn handle_move(&mut self, id: u32, claimed: u64) -> Result<(), MachineError> {
        if !self.is_live(id)? {
            return Ok(());
        }
        let Some(stream) = self.streams.get(&id) else { return Ok(()) };
        let received = stream.recv.received;
        if received != claimed {
            return Err(MachineError::MoveOffset { stream: id, claimed, received });
        }
        self.handle_end(id, Receiving::Moved)
    }

    fn handle_stop(&mut self, id: u32, code: ResetCode) -> Result<(), MachineError> {
        if !self.is_live(id)? {
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if stream.send.is_over() {
            return Ok(());
        }
        stream.send.state = Sending::Stopped(code);
        stream.send.drop_queue();
        // Before the answer to OPEN nothing else may be said on the stream: `accept` says it then.
        if stream.phase == Phase::Open {
            self.control.push_back(Frame::Reset { stream: id, code });
        }
        self.events.push_back(Event::Writable { id });
        self.settle(id);
        Ok(())
    }

    /// Tells the reader, once for a run of frames.
    fn readable(&mut self, id: u32) {
        if self.events.back() != Some(&Event::Readable { id }) {
            self.events.push_back(Event::Readable { id });
        }
    }
}
