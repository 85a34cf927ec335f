//! The task that drives a lane's socket and watches its deadlines.

use super::{Closing, INLINE_STREAMS, Lane};
use crate::runtime::{Turn, let_others};
use crate::tunnel::Config;
use crate::tunnel::codec::LaneToken;
use crate::tunnel::machine::{Event, Side};
use bytes::Bytes;
use std::cell::RefCell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead as _, AsyncReadExt as _, ReadBuf};
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::{Instant, Interval, MissedTickBehavior};

/// A lane with certificates that end within moments is not looked at more often than this.
const SHORTEST_TICK: Duration = Duration::from_millis(5);
/// Ciphertext read at once.
const READ: usize = 128 * 1024;

thread_local! {
    /// Read into by every lane of the thread, so that a lane at rest holds no buffer.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into_boxed_slice());
}

/// A stream that the peer opens.
#[derive(Debug)]
pub(in crate::tunnel) enum Offer {
    Open {
        id: u32,
        header: Bytes,
    },
    /// Continues another lane's stream, alone or among others.
    Attach {
        id: u32,
        token: LaneToken,
        origin: u32,
        is_alone: bool,
    },
}

/// How far writing came.
enum Written {
    Done,
    /// The socket takes no more; it wakes the driver.
    Blocked,
    /// Not tried: the driver wakes itself after the others.
    Yielded,
    /// The socket will never take anything again.
    Broken,
}

struct Driver<'a, F> {
    lane: &'a Arc<Lane>,
    socket: OwnedReadHalf,
    config: &'a Config,
    on_offer: F,
    ticker: Interval,
    /// The turn that lets senders queue up before their messages leave together has been given.
    has_yielded: bool,
    has_read: bool,
    started: Instant,
    last_read: Instant,
    idle_since: Instant,
    /// An unfinished frame and since when it is known.
    unfinished: Option<(u64, Instant)>,
}

impl Lane {
    /// Carries the lane until it is closed. `on_offer` gets the streams that the peer opens. What is returned is to be
    /// given to [`Lane::linger`].
    pub(in crate::tunnel) async fn drive(
        self: &Arc<Self>,
        socket: OwnedReadHalf,
        config: &Config,
        on_offer: impl Fn(&Arc<Self>, Offer),
    ) -> OwnedReadHalf {
        let now = Instant::now();
        let tick = config.tick().min(self.facts.lifetime.tick()).max(SHORTEST_TICK);
        let mut ticker = tokio::time::interval_at(now + tick, tick);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut driver = Driver {
            lane: self,
            socket,
            config,
            on_offer,
            ticker,
            has_yielded: false,
            has_read: false,
            started: now,
            last_read: now,
            idle_since: now,
            unfinished: None,
        };
        // If the task is dropped (the runtime ends), the streams must not wait for ever.
        let guard = CloseOnDrop(self);
        let closing = std::future::poll_fn(|cx| driver.poll(cx)).await;
        self.close(closing);
        drop(guard);
        driver.socket
    }

    /// Keeps the socket until the peer has read everything: a socket that is closed while the peer still speaks is
    /// answered by the kernel with a reset, which destroys what is on its way.
    pub(in crate::tunnel) async fn linger(&self, mut socket: OwnedReadHalf, config: &Config) {
        if !matches!(self.lock().closed, Some(Closing::Drained | Closing::Idle)) {
            return;
        }
        let mut rest = [0; 256];
        while let Ok(Ok(1..)) = tokio::time::timeout(config.dead_after, socket.read(&mut rest)).await {}
    }
}

struct CloseOnDrop<'a>(&'a Arc<Lane>);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close(Closing::Local);
    }
}

impl<F: Fn(&Arc<Lane>, Offer)> Driver<'_, F> {
    /// Ready when the lane is to be closed.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Closing> {
        let mut turn = Turn::default();
        loop {
            let wants_read = {
                let mut state = self.lane.lock();
                if let Some(closing) = state.closed {
                    return Poll::Ready(closing);
                }
                super::set_waker(&mut state.driver, cx);
                state.machine.wants_read()
            };
            let mut has_progress = false;
            if wants_read {
                match self.poll_read(cx) {
                    Poll::Ready(Ok(bytes)) => {
                        has_progress = true;
                        turn.add(bytes);
                    }
                    Poll::Ready(Err(Closing::Peer)) => return Poll::Ready(self.end_of_peer()),
                    Poll::Ready(Err(closing)) => return Poll::Ready(closing),
                    Poll::Pending => {}
                }
            }
            let written = self.write(cx);
            if has_progress && !matches!(written, Written::Yielded) {
                if !turn.is_over() {
                    continue;
                }
                return let_others(cx);
            }
            match written {
                Written::Yielded => return Poll::Pending,
                Written::Broken => return Poll::Ready(Closing::Io),
                Written::Done | Written::Blocked => {}
            }
            // Only now, so that what has arrived meanwhile counts.
            if self.ticker.poll_tick(cx).is_pending() {
                return Poll::Pending;
            }
            if let Err(closing) = self.look_at_deadlines(Instant::now()) {
                return Poll::Ready(closing);
            }
        }
    }

    /// The bytes that were read.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Closing>> {
        if !self.has_read {
            // The handshake may have read ahead.
            self.has_read = true;
            return Poll::Ready(self.feed(&[]).map(|()| 0));
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(&mut scratch[..Turn::piece(READ)]);
            let result = ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buffer));
            if let Err(error) = result {
                tracing::debug!(%error, "cannot read from a lane");
                return Poll::Ready(Err(Closing::Io));
            }
            if buffer.filled().is_empty() {
                return Poll::Ready(Err(Closing::Peer));
            }
            self.last_read = Instant::now();
            Poll::Ready(self.feed(buffer.filled()).map(|()| buffer.filled().len()))
        })
    }

    /// A peer that ends in the middle of a frame broke off.
    fn end_of_peer(&self) -> Closing {
        let is_truncated = self.lane.lock().machine.unfinished_frame().is_some();
        if is_truncated { Closing::Protocol("truncated") } else { Closing::Peer }
    }

    fn feed(&self, input: &[u8]) -> Result<(), Closing> {
        let mut wakers = Vec::new();
        let mut offers = Vec::new();
        let result = {
            let mut state = self.lane.lock();
            let state = &mut *state;
            let result = state.tls.feed(input, &mut state.machine);
            state.drain_events_into(&mut wakers, |event| match event {
                Event::Offered { id, header } => offers.push(Offer::Open { id, header }),
                Event::Attaching { id, token, origin, is_alone } => {
                    offers.push(Offer::Attach { id, token, origin, is_alone });
                }
                _ => {}
            });
            result
        };
        wakers.into_iter().for_each(Waker::wake);
        offers.into_iter().for_each(|offer| (self.on_offer)(self.lane, offer));
        self.lane.bytes.received.inc_by(result? as u64);
        Ok(())
    }

    /// Writes what is queued, as far as the socket takes it.
    fn write(&mut self, cx: &mut Context<'_>) -> Written {
        loop {
            let mut state = self.lane.lock();
            if state.is_asked && !self.has_yielded && state.machine.streams() > INLINE_STREAMS {
                // Others that are ready to run may have something for the same record.
                self.has_yielded = true;
                cx.waker().wake_by_ref();
                return Written::Yielded;
            }
            self.has_yielded = false;
            if !state.is_broken {
                self.lane.write(&mut state);
            }
            if state.is_broken {
                return Written::Broken;
            }
            let is_blocked = state.is_blocked;
            if !is_blocked && state.machine.has_transmit() {
                // A long writer: others get the lane's lock in between.
                let _pending: Poll<()> = let_others(cx);
            }
            let wakers = state.drain_events();
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
            if !is_blocked {
                return Written::Done;
            }
            match self.socket.as_ref().poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Pending => return Written::Blocked,
                Poll::Ready(Err(error)) => {
                    tracing::debug!(%error, "cannot write to a lane");
                    self.lane.lock().is_broken = true;
                    return Written::Broken;
                }
            }
        }
    }

    fn look_at_deadlines(&mut self, now: Instant) -> Result<(), Closing> {
        let config = self.config;
        let mut state = self.lane.lock();
        let (streams, is_server) = (state.machine.streams(), self.lane.side == Side::Server);
        if now.duration_since(state.last_write) >= config.keepalive
            && !state.machine.has_transmit()
            && !state.is_blocked
        {
            state.machine.ping();
        }
        let lifetime = &self.lane.facts.lifetime;
        let is_old = now.duration_since(self.started) >= config.max_age || now >= lifetime.renew;
        if now >= lifetime.end || (!is_server && is_old) {
            state.machine.go_away();
        }
        if now >= lifetime.end && state.machine.has_current() {
            return Err(Closing::Expired);
        }
        let has_unsent = state.machine.has_transmit() || state.is_blocked;
        if !state.machine.wants_read() {
            // Nothing is expected from a peer that is not listened to.
            self.last_read = now;
            self.unfinished = None;
        }
        if streams > 0 {
            self.idle_since = now;
        }
        let idle_timeout = if is_server { 2 * config.idle_timeout } else { config.idle_timeout };
        self.unfinished = state.machine.unfinished_frame().map(|frame| match self.unfinished {
            Some((known, since)) if known == frame => (frame, since),
            _ => (frame, now),
        });
        let is_stuck = self.unfinished.is_some_and(|(_, since)| now.duration_since(since) >= config.header_timeout);
        let is_mute =
            is_server && !state.machine.was_used() && now.duration_since(self.started) >= config.header_timeout;
        if is_stuck || is_mute {
            Err(Closing::Slow)
        } else if now.duration_since(self.last_read) >= config.dead_after {
            Err(Closing::Silent)
        } else if streams == 0 && state.machine.is_draining() && !has_unsent {
            Err(Closing::Drained)
        } else if now.duration_since(self.idle_since) >= idle_timeout && !has_unsent {
            Err(Closing::Idle)
        } else {
            Ok(())
        }
    }
}
