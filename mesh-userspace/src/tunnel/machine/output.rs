//! The machine's sending end: what the local side says on its streams, and how it is written.

use super::{Event, Machine, Remainder, SendStop, Sending, Transmit};
use crate::tunnel::ResetCode;
use crate::tunnel::codec::{Frame, HEAD, MAX_PAYLOAD};
use bytes::Bytes;

/// One stream's share of a batch while others wait: one TLS record.
const QUANTUM: usize = 16_384 - HEAD;

impl Machine {
    /// Whether the stream takes another chunk; when it does not, an [`Event::Writable`] follows.
    ///
    /// # Errors
    /// If the direction is over.
    pub fn has_room(&mut self, id: u32) -> Result<bool, SendStop> {
        let send_buffer = self.bounds.send_buffer;
        let Some(stream) = self.streams.get_mut(&id) else { return Err(SendStop::Ended) };
        match stream.send.state {
            Sending::Open => {
                stream.send.is_wanted = stream.send.queued >= send_buffer;
                Ok(!stream.send.is_wanted)
            }
            Sending::Stopped(code) => Err(SendStop::Stopped(code)),
            _ => Err(SendStop::Ended),
        }
    }

    /// Queues bytes. To be called when there is room.
    pub fn send(&mut self, id: u32, bytes: Bytes) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.send.state == Sending::Open) else {
            return;
        };
        if bytes.is_empty() {
            return;
        }
        stream.send.queued += bytes.len();
        stream.send.queue.push(bytes);
        self.list(id);
    }

    /// Ends the direction after what is queued.
    ///
    /// # Errors
    /// If the direction is over already.
    pub fn finish(&mut self, id: u32) -> Result<(), SendStop> {
        let Some(stream) = self.streams.get_mut(&id) else { return Err(SendStop::Ended) };
        match stream.send.state {
            Sending::Open => stream.send.state = Sending::Finishing,
            Sending::Finishing | Sending::Finished => {}
            Sending::Stopped(code) => return Err(SendStop::Stopped(code)),
            Sending::Reset | Sending::Moved => return Err(SendStop::Ended),
        }
        self.list(id);
        Ok(())
    }

    /// Gives the direction up; what is queued is dropped.
    pub fn reset(&mut self, id: u32, code: ResetCode) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.send.is_over()) else { return };
        stream.send.state = Sending::Reset;
        stream.send.drop_queue();
        self.control.push_back(Frame::Reset { stream: id, code });
        self.settle(id);
    }

    /// The local side will not touch the sending direction again. One that was not ended is reset.
    pub fn release_send(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.send.is_released = true;
        if stream.send.state == Sending::Open {
            self.reset(id, ResetCode::CANCELLED);
        }
        self.settle(id);
    }

    /// Moves the sending direction away: nothing more of it is written here. `None` if it had ended already.
    pub fn move_away(&mut self, id: u32) -> Option<Remainder> {
        let stream = self.streams.get_mut(&id).filter(|stream| !stream.send.is_over())?;
        let is_finished = stream.send.state == Sending::Finishing;
        stream.send.state = Sending::Moved;
        let unsent = std::mem::take(&mut stream.send.queue).into();
        stream.send.queued = 0;
        let offset = stream.send.sent;
        self.control.push_back(Frame::Move { stream: id, offset });
        self.settle(id);
        Some(Remainder { unsent, is_finished })
    }

    /// Whether [`Machine::poll_transmit`] has something.
    #[must_use]
    pub fn has_transmit(&self) -> bool {
        !self.control.is_empty() || !self.ready.is_empty()
    }

    /// Adds frames to `transmit` until it holds about `limit` bytes: control first, then streams in turn.
    pub fn poll_transmit(&mut self, transmit: &mut Transmit, limit: usize) {
        while let Some(frame) = self.control.pop_front() {
            transmit.control(&frame);
        }
        while transmit.len() < limit {
            let Some(id) = self.ready.pop_front() else { return };
            let share = if self.ready.is_empty() { MAX_PAYLOAD } else { QUANTUM };
            self.transmit_stream(id, transmit, share);
        }
    }

    fn transmit_stream(&mut self, id: u32, transmit: &mut Transmit, share: usize) {
        let send_buffer = self.bounds.send_buffer;
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let send = &mut stream.send;
        send.is_listed = false;
        if send.is_over() {
            return;
        }
        let mut left = share;
        while let Some(piece) = send.take(left) {
            left -= piece.len();
            transmit.payload(id, piece);
            if left == 0 {
                break;
            }
        }
        if send.is_wanted && send.queued < send_buffer {
            send.is_wanted = false;
            self.events.push_back(Event::Writable { id });
        }
        if send.queued == 0 && send.state == Sending::Finishing {
            send.state = Sending::Finished;
            transmit.control(&Frame::Fin { stream: id });
            self.settle(id);
        } else {
            self.list(id);
        }
    }

    /// Puts the stream at the end of the writers' line if it has something to write.
    pub(super) fn list(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.send.is_listed
            && stream.send.is_ready()
        {
            stream.send.is_listed = true;
            self.ready.push_back(id);
        }
    }
}
