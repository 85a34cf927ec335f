//! A stream on lanes: where each direction runs now, and how it moves from one lane to another.
//!
//! The client asks for a move, one at a time: ATTACH or JOIN on the new lane names the stream's place on its present
//! one. The server answers and moves its sending direction; with the answer the client moves its own. Each reader reads
//! the old lane up to its MOVE, then the next. A move that is refused changes nothing.
//!
//! Lock order: a route's, then a lane's.

use super::lane::Lane;
use super::machine::Received;
use super::{Config, ResetCode, StreamError};
use bytes::Bytes;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::time::Instant;

/// Lanes that a stream may be ahead of its reader. Those that its sender left without a byte do not count.
const MAX_AHEAD: usize = 8;

/// A stream's place on one lane.
#[derive(Clone, Debug)]
pub(super) struct Leg {
    pub(super) lane: Arc<Lane>,
    pub(super) id: u32,
}

impl Leg {
    fn is(&self, lane: &Arc<Lane>, id: u32) -> bool {
        self.id == id && Arc::ptr_eq(&self.lane, lane)
    }
}

/// Asks for an exclusive lane; called when a stream turns bulk, by the client's side only.
pub(super) type Mover = Box<dyn Fn(Arc<Route>) + Send>;

/// Both directions of one stream.
pub(super) struct Route {
    state: Mutex<RouteState>,
}

struct RouteState {
    /// Where the sending direction runs, and the next move starts.
    current: Leg,
    /// Where the reader goes on, in order; the last one is `current`. Empty while it reads there.
    ahead: VecDeque<Leg>,
    /// A move was asked for and not answered.
    is_moving: bool,
    is_send_over: bool,
    is_recv_over: bool,
    /// A reader that has reached the MOVE before the lane is known here.
    reader: Option<Waker>,
    bulk: Option<Bulk>,
}

/// Recognises bulk: many bytes within a short time.
struct Bulk {
    /// Off on an exclusive lane, and after a move that failed.
    is_armed: bool,
    bytes: u64,
    since: Instant,
    threshold: u64,
    period: Duration,
    mover: Mover,
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("current", &self.lock().current).finish_non_exhaustive()
    }
}

/// The one move of a stream that is under way.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) route: Arc<Route>,
    pub(super) from: Leg,
}

impl Drop for Moving {
    fn drop(&mut self) {
        let mut state = self.route.lock();
        state.is_moving = false;
        let reader = state.reader.take();
        drop(state);
        reader.into_iter().for_each(Waker::wake);
    }
}

impl Route {
    /// The halves of a stream that exists on `base`. With a `mover` it may move when it turns bulk.
    pub(super) fn halves(base: Leg, config: &Config, mover: Option<Mover>) -> (RouteSend, RouteRecv) {
        let bulk = mover.map(|mover| Bulk {
            is_armed: true,
            bytes: 0,
            since: Instant::now(),
            threshold: config.bulk_bytes,
            period: config.bulk_period,
            mover,
        });
        let state = RouteState {
            current: base.clone(),
            ahead: VecDeque::new(),
            is_moving: false,
            is_send_over: false,
            is_recv_over: false,
            reader: None,
            bulk,
        };
        let route = Arc::new(Self { state: Mutex::new(state) });
        base.lane.set_route(base.id, &route);
        (RouteSend { route: Arc::clone(&route) }, RouteRecv { route, reading: base, is_over: false })
    }

    fn lock(&self) -> MutexGuard<'_, RouteState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the stream has not moved away from `lane`.
    pub(super) fn is_on(&self, lane: &Arc<Lane>) -> bool {
        let state = self.lock();
        Arc::ptr_eq(&state.current.lane, lane) && !state.is_over()
    }

    /// Starts a move, if none is under way and one makes sense. See [`RouteState::may_move`].
    pub(super) fn begin_move(self: &Arc<Self>, is_alone: bool) -> Option<Moving> {
        let mut state = self.lock();
        if state.is_moving || !state.may_move(is_alone) {
            return None;
        }
        state.is_moving = true;
        Some(Moving { route: Arc::clone(self), from: state.current.clone() })
    }

    /// The server's side of [`Self::attach`]: only the stream's present place is a place to go on from.
    pub(super) fn attach_from(
        self: &Arc<Self>,
        from: (&Arc<Lane>, u32),
        next: Leg,
        is_alone: bool,
        accept: impl FnOnce(&Leg),
    ) -> bool {
        let is_current = self.lock().current.is(from.0, from.1);
        is_current && self.attach(next, is_alone, accept)
    }

    /// Continues the stream on `next`, calling `accept` first: the sending direction from its next unsent byte, the
    /// receiving one when the peer's MOVE has been reached. `false` if that makes no sense any more.
    pub(super) fn attach(self: &Arc<Self>, next: Leg, is_alone: bool, accept: impl FnOnce(&Leg)) -> bool {
        let mut state = self.lock();
        if !state.may_move(is_alone) || state.current.lane.is_closed() {
            return false;
        }
        accept(&next);
        next.lane.set_route(next.id, self);
        let old = std::mem::replace(&mut state.current, next.clone());
        // A direction that ended on the old lane ends on the new one at once, so that the new one comes free.
        let (unsent, is_finished) = match old.lane.move_away(old.id) {
            Some(remainder) => (remainder.unsent, remainder.is_finished),
            None => (VecDeque::new(), true),
        };
        next.lane.take_over(next.id, unsent, is_finished);
        // The old lane has the stream's place again as soon as the peer's direction has moved too.
        old.lane.with(|machine| {
            machine.supersede(old.id);
            machine.release_send(old.id);
        });
        if state.is_send_over {
            next.lane.with(|machine| machine.release_send(next.id));
        }
        if state.is_recv_over {
            next.lane.with(|machine| machine.stop(next.id, ResetCode::CANCELLED));
        } else {
            state.ahead.push_back(next);
        }
        if let Some(bulk) = &mut state.bulk {
            bulk.is_armed = !is_alone;
            bulk.bytes = 0;
            bulk.since = Instant::now();
        }
        let reader = state.reader.take();
        drop(state);
        reader.into_iter().for_each(Waker::wake);
        true
    }

    /// Counts bytes of either direction; asks for an exclusive lane when they turn out to be bulk.
    fn count(self: &Arc<Self>, bytes: usize) -> Result<(), StreamError> {
        let mut state = self.lock();
        if !state.ahead.is_empty() && state.current.lane.is_expired() {
            // What is read on an older lane is believed because of the newer one. That one's certificates ended.
            return Err(StreamError::LaneClosed);
        }
        let Some(bulk) = state.bulk.as_mut().filter(|bulk| bulk.is_armed) else { return Ok(()) };
        bulk.bytes += bytes as u64;
        if bulk.bytes < bulk.threshold {
            return Ok(());
        }
        let now = Instant::now();
        if now.duration_since(bulk.since) > bulk.period {
            bulk.bytes = 0;
            bulk.since = now;
        } else {
            bulk.is_armed = false;
            (bulk.mover)(Arc::clone(self));
        }
        Ok(())
    }
}

impl RouteState {
    fn is_over(&self) -> bool {
        self.is_send_over && self.is_recv_over
    }

    /// Whether the stream still needs a lane, and its reader is not too far behind: where nothing but the connection
    /// holds the sender back (`is_alone`), it must not be behind at all, or each move would let in more unread bytes.
    fn may_move(&mut self, is_alone: bool) -> bool {
        let current = self.current.clone();
        self.ahead.retain(|leg| {
            let is_needed = leg.is(&current.lane, current.id) || !leg.lane.is_read_out(leg.id);
            if !is_needed {
                leg.lane.with(|machine| machine.release_recv(leg.id));
            }
            is_needed
        });
        let max_ahead = if is_alone { 1 } else { MAX_AHEAD };
        !self.is_over() && self.ahead.len() < max_ahead
    }
}

/// The sending direction.
#[derive(Debug)]
pub(super) struct RouteSend {
    route: Arc<Route>,
}

impl RouteSend {
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<Result<(), StreamError>> {
        let length = bytes.len();
        {
            // The lock is held until the lane has taken the bytes: a move cannot come between.
            let state = self.route.lock();
            let Leg { lane, id } = &state.current;
            ready!(lane.poll_send(cx, *id, bytes))?;
        }
        Poll::Ready(self.route.count(length))
    }

    pub(super) fn finish(&mut self) -> Result<(), StreamError> {
        let state = self.route.lock();
        state.current.lane.finish(state.current.id)
    }

    pub(super) fn reset(&mut self, code: ResetCode) {
        let state = self.route.lock();
        state.current.lane.with(|machine| machine.reset(state.current.id, code));
    }
}

impl Drop for RouteSend {
    fn drop(&mut self) {
        let mut state = self.route.lock();
        state.is_send_over = true;
        state.current.lane.with(|machine| machine.release_send(state.current.id));
    }
}

/// The receiving direction.
#[derive(Debug)]
pub(super) struct RouteRecv {
    route: Arc<Route>,
    /// Where the next bytes come from.
    reading: Leg,
    is_over: bool,
}

impl RouteRecv {
    pub(super) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        loop {
            if self.is_over {
                return Poll::Ready(Ok(None));
            }
            let Poll::Ready(received) = self.reading.lane.poll_recv(cx, self.reading.id)? else {
                return Poll::Pending;
            };
            match received {
                Received::Bytes(bytes) => {
                    self.route.count(bytes.len())?;
                    return Poll::Ready(Ok(Some(bytes)));
                }
                Received::Finished => self.is_over = true,
                Received::Reset(code) => return Poll::Ready(Err(StreamError::Reset(code))),
                Received::Moved => {
                    let mut state = self.route.lock();
                    let Some(next) = state.ahead.pop_front() else {
                        if !state.is_moving {
                            // The lane on which it goes on was lost before it was known here.
                            return Poll::Ready(Err(StreamError::LaneClosed));
                        }
                        state.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    };
                    drop(state);
                    next.lane.with(|machine| machine.admit(next.id));
                    let old = std::mem::replace(&mut self.reading, next);
                    old.lane.with(|machine| machine.release_recv(old.id));
                }
                Received::Pending => return Poll::Pending,
            }
        }
    }

    pub(super) fn stop(&mut self, code: ResetCode) {
        let mut state = self.route.lock();
        state.is_recv_over = true;
        // The peer may have moved already without this side knowing: all lanes are told, all but one in vain.
        for leg in std::iter::once(&self.reading).chain(&state.ahead) {
            leg.lane.with(|machine| machine.stop(leg.id, code));
        }
    }
}

impl Drop for RouteRecv {
    fn drop(&mut self) {
        if !self.is_over {
            return self.stop(ResetCode::CANCELLED);
        }
        let mut state = self.route.lock();
        state.is_recv_over = true;
        for leg in std::iter::once(&self.reading).chain(&state.ahead) {
            leg.lane.with(|machine| machine.release_recv(leg.id));
        }
    }
}
