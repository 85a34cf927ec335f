//! A stream on lanes: where each direction runs now, and the move to a lane of its own.
//!
//! Lock order: a route's, then a lane's.

use super::lane::Lane;
use super::machine::Received;
use super::{Config, ResetCode, StreamError};
use bytes::Bytes;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::Instant;

/// A stream's place on one lane.
#[derive(Clone, Debug)]
pub(super) struct Leg {
    pub(super) lane: Arc<Lane>,
    pub(super) id: u32,
}

/// Asks for an exclusive lane; called once per stream, by the client's side only.
pub(super) type Mover = Box<dyn FnOnce(Arc<Route>) + Send>;

/// Both directions of one stream.
pub(super) struct Route {
    pub(super) base: Leg,
    state: Mutex<RouteState>,
}

struct RouteState {
    /// The exclusive lane, once attached.
    own: Option<Leg>,
    /// No exclusive lane will come.
    is_settled: bool,
    is_send_over: bool,
    is_recv_over: bool,
    /// A reader that has reached the MOVE before the lane is known here.
    reader: Option<Waker>,
    bulk: Option<Bulk>,
}

/// Recognises bulk: many bytes within a short time.
struct Bulk {
    bytes: u64,
    since: Instant,
    threshold: u64,
    period: Duration,
    mover: Mover,
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Route {
    /// The halves of a stream that exists on `base`. With a `mover` it may move when it turns bulk.
    pub(super) fn halves(base: Leg, config: &Config, mover: Option<Mover>) -> (RouteSend, RouteRecv) {
        let bulk = mover.map(|mover| Bulk {
            bytes: 0,
            since: Instant::now(),
            threshold: config.bulk_bytes,
            period: config.bulk_period,
            mover,
        });
        let state =
            RouteState { own: None, is_settled: false, is_send_over: false, is_recv_over: false, reader: None, bulk };
        let route = Arc::new(Self { base, state: Mutex::new(state) });
        route.base.lane.set_route(route.base.id, &route);
        let reading = route.base.clone();
        (RouteSend { route: Arc::clone(&route) }, RouteRecv { route, reading, is_over: false })
    }

    fn lock(&self) -> MutexGuard<'_, RouteState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether moving still makes sense.
    pub(super) fn is_movable(&self) -> bool {
        let state = self.lock();
        state.own.is_none() && !(state.is_send_over && state.is_recv_over)
    }

    /// Continues the stream on `own`, calling `accept` first: the sending direction from its next unsent byte, the
    /// receiving one when the peer's MOVE has been reached. `false` if it was moved before or is over.
    pub(super) fn attach(&self, own: Leg, accept: impl FnOnce(&Leg)) -> bool {
        let mut state = self.lock();
        if state.own.is_some() || state.is_settled || (state.is_send_over && state.is_recv_over) {
            return false;
        }
        accept(&own);
        // A direction that ended on the old lane ends on the new one at once, so that the new one comes free.
        let (unsent, is_finished) = match self.base.lane.move_away(self.base.id) {
            Some(remainder) => (remainder.unsent, remainder.is_finished),
            None => (std::collections::VecDeque::new(), true),
        };
        own.lane.take_over(own.id, unsent, is_finished);
        // The shared lane has the stream's place again as soon as the peer's direction has moved too.
        self.base.lane.with(|machine| machine.release_send(self.base.id));
        if state.is_send_over {
            own.lane.with(|machine| machine.release_send(own.id));
        }
        if state.is_recv_over {
            own.lane.with(|machine| machine.stop(own.id, ResetCode::CANCELLED));
        }
        state.own = Some(own);
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        true
    }

    /// No exclusive lane will come: a reader that has seen the peer move cannot go on.
    pub(super) fn settle(&self) {
        let mut state = self.lock();
        state.is_settled = true;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// Counts bytes of either direction; asks for an exclusive lane when they turn out to be bulk.
    fn count(self: &Arc<Self>, bytes: usize) {
        let mut state = self.lock();
        let Some(bulk) = &mut state.bulk else { return };
        bulk.bytes += bytes as u64;
        if bulk.bytes < bulk.threshold {
            return;
        }
        let now = Instant::now();
        if now.duration_since(bulk.since) > bulk.period {
            bulk.bytes = 0;
            bulk.since = now;
            return;
        }
        let bulk = state.bulk.take();
        drop(state);
        if let Some(bulk) = bulk {
            (bulk.mover)(Arc::clone(self));
        }
    }
}

/// The sending direction.
#[derive(Debug)]
pub(super) struct RouteSend {
    route: Arc<Route>,
}

impl RouteSend {
    pub(super) async fn send(&mut self, mut bytes: Bytes) -> Result<(), StreamError> {
        let length = bytes.len();
        poll_fn(|cx| {
            // The lock is held until the lane has taken the bytes: a move cannot come between.
            let state = self.route.lock();
            let leg = state.own.as_ref().unwrap_or(&self.route.base);
            leg.lane.poll_send(cx, leg.id, &mut bytes)
        })
        .await?;
        self.route.count(length);
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), StreamError> {
        let state = self.route.lock();
        let leg = state.own.as_ref().unwrap_or(&self.route.base);
        leg.lane.finish(leg.id)
    }

    pub(super) fn reset(&mut self, code: ResetCode) {
        let state = self.route.lock();
        let leg = state.own.as_ref().unwrap_or(&self.route.base);
        leg.lane.with(|machine| machine.reset(leg.id, code));
    }
}

impl Drop for RouteSend {
    fn drop(&mut self) {
        let mut state = self.route.lock();
        state.is_send_over = true;
        let base = &self.route.base;
        base.lane.with(|machine| machine.release_send(base.id));
        if let Some(own) = &state.own {
            own.lane.with(|machine| machine.release_send(own.id));
        }
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
    pub(super) async fn recv(&mut self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        loop {
            if self.is_over {
                return Poll::Ready(Ok(None));
            }
            let Poll::Ready(received) = self.reading.lane.poll_recv(cx, self.reading.id)? else {
                return Poll::Pending;
            };
            match received {
                Received::Bytes(bytes) => {
                    self.route.count(bytes.len());
                    return Poll::Ready(Ok(Some(bytes)));
                }
                Received::Finished => self.is_over = true,
                Received::Reset(code) => return Poll::Ready(Err(StreamError::Reset(code))),
                Received::Moved => {
                    let mut state = self.route.lock();
                    let Some(own) = &state.own else {
                        if state.is_settled {
                            return Poll::Ready(Err(StreamError::LaneClosed));
                        }
                        state.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    };
                    let own = own.clone();
                    drop(state);
                    let base = std::mem::replace(&mut self.reading, own);
                    base.lane.with(|machine| machine.release_recv(base.id));
                }
                Received::Pending => return Poll::Pending,
            }
        }
    }

    pub(super) fn stop(&mut self, code: ResetCode) {
        let mut state = self.route.lock();
        state.is_recv_over = true;
        // The peer may have moved already without this side knowing: both lanes are told, one of them in vain.
        for leg in std::iter::once(&self.route.base).chain(&state.own) {
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
        for leg in std::iter::once(&self.route.base).chain(&state.own) {
            leg.lane.with(|machine| machine.release_recv(leg.id));
        }
    }
}
