//! One lane: a TLS connection, the machine on it, and the tasks that wait for it.
//!
//! One task per lane drives the socket. Halves of streams call into the machine under a mutex that is never held
//! across an await. What they queue is written by themselves at once while the lane is (almost) theirs, for latency;
//! on a busy shared lane by the driver one turn of the scheduler later, so that the small messages of many streams
//! leave in one record and one system call.

mod drive;
mod handshake;
mod streams;
mod tls;

pub(super) use drive::Offer;
pub(super) use handshake::{accept, client_config, connect};

use super::codec::LaneToken;
use super::lifetime::Lifetime;
use super::machine::{Event, Machine, Side};
use super::route::Route;
use super::{Config, OpenError, TlsSession};
use crate::identity::PeerRefusal;
use crate::telemetry::tunnel::{LaneGauge, TunnelBytes, TunnelMetrics};
use rustc_hash::FxHashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Waker};
use tls::Tls;
use tokio::time::Instant;

/// Up to this many streams a sender writes to the socket by itself.
const INLINE_STREAMS: usize = 2;

/// Why a lane ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// The peer closed the connection.
    Peer,
    /// The connection failed.
    Io,
    /// The peer broke TLS or refused us after the handshake.
    Tls(PeerRefusal),
    /// The peer broke the lane's protocol; says how.
    Protocol(&'static str),
    /// No first stream, or an unfinished frame, for too long.
    Slow,
    /// Nothing heard for too long.
    Silent,
    /// No streams for long.
    Idle,
    /// Drained: the last stream ended.
    Drained,
    /// A certificate of the handshake has ended, and there were streams that had not moved elsewhere.
    Expired,
    /// Closed by this node.
    Local,
}

impl Closing {
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Peer => "peer_closed",
            Self::Io => "io",
            Self::Tls(refusal) => refusal.reason(),
            Self::Protocol(reason) => reason,
            Self::Slow => "slow_header",
            Self::Silent => "silent",
            Self::Idle => "idle",
            Self::Drained => "drained",
            Self::Expired => EXPIRED,
            Self::Local => "local",
        }
    }
}

impl From<Closing> for OpenError {
    fn from(closing: Closing) -> Self {
        match closing {
            // With TLS 1.3 a client learns of the server's refusal after its own handshake.
            Closing::Tls(refusal) => Self::Handshake(refusal),
            Closing::Expired => Self::Handshake(PeerRefusal::Expired),
            _ => Self::Closed,
        }
    }
}

/// Who waits for what of one stream.
#[derive(Debug, Default)]
struct Slot {
    read: Option<Waker>,
    write: Option<Waker>,
    /// The stream's halves, for those that attach to it.
    route: Weak<Route>,
}

struct State {
    machine: Machine,
    tls: Tls,
    slots: FxHashMap<u32, Slot>,
    driver: Option<Waker>,
    closed: Option<Closing>,
    /// The socket takes nothing now; the driver waits for it.
    is_blocked: bool,
    /// A sender left something for the driver to write.
    is_asked: bool,
    /// Writing failed; what the peer said before it closed (a TLS alert, say) is still worth reading.
    is_broken: bool,
    last_write: Instant,
    gauge: Option<LaneGauge>,
}

/// What the handshake settled.
pub(super) struct Facts {
    pub(super) token: LaneToken,
    pub(super) session: TlsSession,
    pub(super) lifetime: Lifetime,
}

/// See the module.
pub(super) struct Lane {
    pub(super) facts: Facts,
    side: Side,
    metrics: Arc<TunnelMetrics>,
    bytes: TunnelBytes,
    state: Mutex<State>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("side", &self.side).field("session", &self.facts.session).finish_non_exhaustive()
    }
}

/// What a lane carries, in words of the metrics.
pub(super) const SHARED: &str = "shared";
pub(super) const EXCLUSIVE: &str = "exclusive";
/// Why a connection ended whose certificates did, in words of the metrics.
pub(super) const EXPIRED: &str = "expired";
/// The transport's name in metrics.
pub(super) const LANES: &str = "lanes";

impl Lane {
    fn new(
        tls: Tls,
        facts: Facts,
        side: Side,
        kind: &'static str,
        config: &Config,
        metrics: Arc<TunnelMetrics>,
    ) -> Self {
        let direction = direction(side);
        let state = State {
            machine: Machine::new(side, config.bounds()),
            tls,
            slots: FxHashMap::default(),
            driver: None,
            closed: None,
            is_blocked: false,
            is_asked: false,
            is_broken: false,
            last_write: Instant::now(),
            gauge: Some(metrics.lane_opened(LANES, kind, direction)),
        };
        Self { facts, side, bytes: metrics.bytes(LANES, direction), metrics, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere must not take the other streams along: the state is consistent between calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn direction(&self) -> &'static str {
        direction(self.side)
    }

    // ---- the lane ----------------------------------------------------------------------------------------------

    /// Closes the lane now; its streams end with an error.
    pub(super) fn close(&self, closing: Closing) {
        let mut state = self.lock();
        if state.closed.is_some() {
            return;
        }
        state.closed = Some(closing);
        state.tls.say_goodbye();
        state.gauge = None;
        let mut wakers: Vec<Waker> = state.driver.take().into_iter().collect();
        for slot in state.slots.values_mut() {
            wakers.extend(slot.read.take());
            wakers.extend(slot.write.take());
        }
        drop(state);
        self.metrics.lane_closed(LANES, self.direction(), closing.reason());
        match closing {
            Closing::Slow | Closing::Protocol(_) if self.side == Side::Server => {
                self.metrics.malformed_header(LANES, closing.reason());
            }
            Closing::Tls(refusal) if self.side == Side::Client => {
                self.metrics.handshake_failed(LANES, "client", refusal.reason());
            }
            _ => {}
        }
        tracing::debug!(reason = closing.reason(), direction = self.direction(), "lane closed");
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Takes no new streams; closes after the last one.
    pub(super) fn go_away(&self) {
        self.with(Machine::go_away);
    }

    /// Streams, and whether new ones are taken.
    pub(super) fn load(&self) -> (usize, bool) {
        let state = self.lock();
        (state.machine.streams(), state.closed.is_none() && !state.machine.is_draining())
    }

    /// Whether it was closed because a certificate of its handshake had ended.
    pub(super) fn is_expired(&self) -> bool {
        self.lock().closed == Some(Closing::Expired)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed.is_some()
    }

    /// The streams that have halves here.
    pub(super) fn routes(&self) -> Vec<Arc<Route>> {
        self.lock().slots.values().filter_map(|slot| slot.route.upgrade()).collect()
    }

    pub(super) fn set_exclusive(&self) {
        let gauge = self.metrics.lane_is(LANES, EXCLUSIVE, self.direction());
        let mut state = self.lock();
        if state.closed.is_none() {
            state.gauge = Some(gauge);
        }
    }

    /// Writes what is queued, here or in the driver, and tells those whom it concerns.
    fn flush(&self, mut state: MutexGuard<'_, State>) {
        let mut driver = None;
        if state.machine.has_transmit() && state.closed.is_none() && !state.is_broken {
            let is_inline = state.machine.is_exclusive() || state.machine.streams() <= INLINE_STREAMS;
            if is_inline && !state.is_blocked {
                self.write(&mut state);
                if state.is_blocked || state.is_broken || state.machine.has_transmit() {
                    driver = state.driver.take();
                }
            } else if !state.is_blocked {
                state.is_asked = true;
                driver = state.driver.take();
            }
        }
        let wakers = state.drain_events();
        drop(state);
        wakers.into_iter().chain(driver).for_each(Waker::wake);
    }

    /// Writes until nothing is left, the socket takes no more (`is_blocked`) or never will again (`is_broken`).
    fn write(&self, state: &mut State) {
        let State { machine, tls, is_blocked, is_asked, is_broken, last_write, .. } = state;
        *is_asked = false;
        match tls.write(machine) {
            Ok(sent) => {
                *is_blocked = sent.is_blocked;
                if sent.bytes > 0 {
                    *last_write = Instant::now();
                    self.bytes.sent.inc_by(sent.bytes as u64);
                }
            }
            Err(error) => {
                tracing::debug!(%error, "cannot write to a lane");
                *is_broken = true;
            }
        }
    }
}

impl State {
    fn wait_read(&mut self, cx: &mut Context<'_>, id: u32) {
        let slot = self.slots.entry(id).or_default();
        set_waker(&mut slot.read, cx);
    }

    /// Wakers of those whom the machine's events concern; offers stay for the driver.
    fn drain_events(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        self.drain_events_into(&mut wakers, |_| debug_assert!(false, "only input offers streams"));
        wakers
    }

    fn drain_events_into(&mut self, wakers: &mut Vec<Waker>, mut offer: impl FnMut(Event)) {
        while let Some(event) = self.machine.poll_event() {
            match event {
                Event::Answered { id } | Event::Readable { id } => {
                    wakers.extend(self.slots.get_mut(&id).and_then(|slot| slot.read.take()));
                }
                Event::Writable { id } => {
                    wakers.extend(self.slots.get_mut(&id).and_then(|slot| slot.write.take()));
                }
                Event::Closed { id } => {
                    self.slots.remove(&id);
                }
                Event::GoAway => {}
                Event::Offered { .. } | Event::Attaching { .. } => offer(event),
            }
        }
    }
}

fn set_waker(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

fn direction(side: Side) -> &'static str {
    match side {
        Side::Client => "outbound",
        Side::Server => "inbound",
    }
}
