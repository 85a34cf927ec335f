//! What the halves of streams ask of their lane.

use super::{Lane, Slot, set_waker};
use crate::tunnel::codec::LaneToken;
use crate::tunnel::machine::{Machine, Received, Remainder, SendStop, Unavailable};
use crate::tunnel::route::Route;
use crate::tunnel::{OpenError, Refusal, ResetCode, StreamError};
use bytes::Bytes;
use std::sync::Arc;
use std::task::{Context, Poll};

impl Lane {
    /// Sends OPEN with an encoded header.
    pub(in crate::tunnel) fn open(&self, header: Bytes) -> Result<u32, Unavailable> {
        self.begin(|machine| machine.open(header))
    }

    /// Why nothing can be opened on a lane that was just made.
    pub(in crate::tunnel) fn failure(&self) -> OpenError {
        self.lock().closed.map_or(OpenError::Closed, OpenError::from)
    }

    /// Sends ATTACH, if the lane carries nothing.
    pub(in crate::tunnel) fn attach(&self, token: LaneToken, origin: u32) -> Result<u32, Unavailable> {
        self.begin(|machine| if machine.streams() > 0 { Err(Unavailable::Full) } else { machine.attach(token, origin) })
    }

    /// Sends JOIN.
    pub(in crate::tunnel) fn join(&self, token: LaneToken, origin: u32) -> Result<u32, Unavailable> {
        self.begin(|machine| machine.join(token, origin))
    }

    fn begin(&self, open: impl FnOnce(&mut Machine) -> Result<u32, Unavailable>) -> Result<u32, Unavailable> {
        let mut state = self.lock();
        if state.closed.is_some() {
            return Err(Unavailable::Draining);
        }
        let id = open(&mut state.machine)?;
        state.slots.insert(id, Slot::default());
        self.flush(state);
        Ok(id)
    }

    /// Waits for the answer to OPEN, ATTACH or JOIN. The stream is given up if the caller goes away or gets an error.
    pub(in crate::tunnel) async fn answered(&self, id: u32) -> Result<(), OpenError> {
        let guard = Abandon { lane: self, id };
        std::future::poll_fn(|cx| self.poll_answered(cx, id)).await?;
        std::mem::forget(guard);
        Ok(())
    }

    fn poll_answered(&self, cx: &mut Context<'_>, id: u32) -> Poll<Result<(), OpenError>> {
        let mut state = self.lock();
        match (state.machine.answer(id), state.closed) {
            (Some(Ok(())), _) => Poll::Ready(Ok(())),
            (Some(Err(code)), _) => Poll::Ready(Err(OpenError::Refused(Refusal::from_code(code)))),
            (None, Some(closing)) => Poll::Ready(Err(closing.into())),
            (None, None) => {
                state.wait_read(cx, id);
                Poll::Pending
            }
        }
    }

    pub(in crate::tunnel) fn accept(&self, id: u32) {
        self.with(|machine| machine.accept(id));
    }

    pub(in crate::tunnel) fn refuse(&self, id: u32, refusal: Refusal) {
        self.with(|machine| machine.refuse(id, refusal.code()));
    }

    /// Remembers the halves of a stream, so that an ATTACH finds them.
    pub(in crate::tunnel) fn set_route(&self, id: u32, route: &Arc<Route>) {
        self.lock().slots.entry(id).or_default().route = Arc::downgrade(route);
    }

    pub(in crate::tunnel) fn route(&self, id: u32) -> Option<Arc<Route>> {
        self.lock().slots.get(&id)?.route.upgrade()
    }

    /// Takes `bytes` once there is room.
    pub(in crate::tunnel) fn poll_send(
        &self,
        cx: &mut Context<'_>,
        id: u32,
        bytes: &mut Bytes,
    ) -> Poll<Result<(), StreamError>> {
        let mut state = self.lock();
        if state.closed.is_some() {
            return Poll::Ready(Err(StreamError::LaneClosed));
        }
        match state.machine.has_room(id) {
            Ok(true) => {
                state.machine.send(id, std::mem::take(bytes));
                self.flush(state);
                Poll::Ready(Ok(()))
            }
            Ok(false) => {
                let slot = state.slots.entry(id).or_default();
                set_waker(&mut slot.write, cx);
                Poll::Pending
            }
            Err(stop) => Poll::Ready(Err(stop.into())),
        }
    }

    /// Takes what a stream brings along from another lane, whatever room there is, and its end if it had one.
    pub(in crate::tunnel) fn take_over(&self, id: u32, unsent: impl IntoIterator<Item = Bytes>, is_finished: bool) {
        self.with(|machine| {
            for bytes in unsent {
                machine.send(id, bytes);
            }
            if is_finished {
                // Cannot fail usefully: a stream stopped meanwhile has ended as well.
                let _ = machine.finish(id);
            }
        });
    }

    pub(in crate::tunnel) fn finish(&self, id: u32) -> Result<(), StreamError> {
        let mut state = self.lock();
        if state.closed.is_some() {
            return Err(StreamError::LaneClosed);
        }
        state.machine.finish(id)?;
        self.flush(state);
        Ok(())
    }

    /// Moves the sending direction away; a waiting sender asks again.
    pub(in crate::tunnel) fn move_away(&self, id: u32) -> Option<Remainder> {
        let mut state = self.lock();
        let remainder = state.machine.move_away(id);
        let waker = state.slots.get_mut(&id).and_then(|slot| slot.write.take());
        self.flush(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        remainder
    }

    pub(in crate::tunnel) fn poll_recv(&self, cx: &mut Context<'_>, id: u32) -> Poll<Result<Received, StreamError>> {
        let mut state = self.lock();
        let wanted_read = state.machine.wants_read();
        let received = state.machine.recv(id);
        if received == Received::Pending {
            if state.closed.is_some() {
                return Poll::Ready(Err(StreamError::LaneClosed));
            }
            state.wait_read(cx, id);
            return Poll::Pending;
        }
        // New credit, or a lane to be read again: for the driver, there is no hurry.
        let waker = (state.machine.has_transmit() || wanted_read != state.machine.wants_read())
            .then(|| state.driver.take())
            .flatten();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Poll::Ready(Ok(received))
    }

    /// See [`Machine::is_read_out`].
    pub(in crate::tunnel) fn is_read_out(&self, id: u32) -> bool {
        self.lock().machine.is_read_out(id)
    }

    /// Changes streams and writes what comes of it.
    pub(in crate::tunnel) fn with(&self, change: impl FnOnce(&mut Machine)) {
        let mut state = self.lock();
        let wanted_read = state.machine.wants_read();
        change(&mut state.machine);
        let waker = if wanted_read == state.machine.wants_read() { None } else { state.driver.take() };
        self.flush(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Gives the stream up when dropped.
struct Abandon<'a> {
    lane: &'a Lane,
    id: u32,
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.lane.with(|machine| machine.abandon(self.id, ResetCode::CANCELLED));
    }
}

impl From<SendStop> for StreamError {
    fn from(stop: SendStop) -> Self {
        match stop {
            SendStop::Stopped(code) => Self::Stopped(code),
            SendStop::Ended => Self::Ended,
        }
    }
}
