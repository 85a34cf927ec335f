//! Carries bytes between an application's socket and a tunnel stream, with half-close, reset and backpressure.

mod socket;

use super::Failure;
use super::registry::Ticket;
use crate::runtime::{Conversation, Direction, Turn, let_others};
use crate::tunnel::codec::MAX_PAYLOAD;
use crate::tunnel::{RecvHalf, ResetCode, SendHalf, Stream};
use bytes::Bytes;
use socket::{poll_read, poll_write_all, tell_end, write_pieces};
use socket2::SockRef;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// First read of a connection; reads grow while they fill the buffer.
const SMALLEST_READ: usize = 4 * 1024;
/// Large reads are what makes bulk cheap: fewer wake-ups, full TLS records. Whole frames: a rest would be a record and a
/// packet of its own.
const LARGEST_READ: usize = 4 * MAX_PAYLOAD;
/// A silent connection is looked at this many times within its idle timeout: it ends at most a quarter late, and no
/// timer is touched per packet.
const LOOKS_PER_TIMEOUT: u32 = 4;

/// What a relay tells of a connection as it goes, and asks about it.
pub trait Carried {
    fn passed_to_tunnel(&self, bytes: u64);
    fn passed_from_tunnel(&self, bytes: u64);

    /// The first bytes came out of the tunnel, so long after the first ones went in; where none did, since the start.
    fn answered(&self, _after: Duration) {}

    /// Asked when the application finishes before any byte went either way: whether it is not there any more, rather
    /// than had nothing to say.
    fn is_application_gone(&self) -> impl Future<Output = bool> + Send {
        std::future::ready(false)
    }
}

/// What has passed between an application and the tunnel.
#[derive(Debug, Default)]
pub struct Progress {
    /// Reads from and writes to the application, that of the end included.
    steps: u64,
    /// When the application's first bytes were read.
    asked: Option<Instant>,
}

impl Progress {
    /// Nothing was taken from the application and nothing was given to it: it cannot know where its connection ends.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.steps == 0
    }
}

/// Relays until both directions have ended in order, the connection is cut, or silent for too long. On a failure the
/// stream's unfinished halves are dropped, which resets them; the application's socket is the caller's.
///
/// # Errors
/// Why the connection did not end in order.
pub fn relay<'a, C: Carried>(
    app: &'a TcpStream,
    stream: Stream,
    carried: &'a C,
    ticket: &'a mut Ticket,
    progress: &'a mut Progress,
    idle_timeout: Option<Duration>,
) -> impl Future<Output = Result<(), Failure>> + use<'a, C> {
    let (send, recv) = stream.split();
    let mut relay = Relay {
        app,
        send,
        recv,
        up: Up::Reading,
        next_read: SMALLEST_READ,
        down: Down::Receiving,
        is_answered: false,
        broken: None,
        silence: idle_timeout.map(Silence::new),
        opened: Instant::now(),
        conversation: Conversation::default(),
        carried,
        ticket,
        progress,
    };
    poll_fn(move |cx| relay.poll(cx))
}

/// Makes the socket answer with RST instead of FIN when it is dropped.
pub(super) fn reset_on_close(app: &TcpStream) {
    // A socket that is already gone cannot be reset and need not be.
    let _ = SockRef::from(app).set_linger(Some(Duration::ZERO));
}

/// One connection. Written out as a state machine: thousands of them are idle at a time, and what a compiler makes of
/// futures that wait for each other is several times as large and is polled by many steps.
struct Relay<'a, C> {
    app: &'a TcpStream,
    send: SendHalf,
    recv: RecvHalf,
    up: Up<'a>,
    next_read: usize,
    down: Down,
    is_answered: bool,
    /// Waits for a failure of the socket once nothing else of it is waited for.
    broken: Option<Pin<Box<dyn Future<Output = Failure> + Send + 'a>>>,
    silence: Option<Silence>,
    opened: Instant,
    conversation: Conversation,
    carried: &'a C,
    ticket: &'a mut Ticket,
    progress: &'a mut Progress,
}

/// How the direction to the tunnel stands.
enum Up<'a> {
    Reading,
    /// The tunnel takes no more for now.
    Sending(Bytes),
    /// The application has finished before anything has passed: is it there at all?
    Asking(Pin<Box<dyn Future<Output = bool> + Send + 'a>>),
    Finished,
}

/// How the direction to the application stands.
enum Down {
    Receiving,
    /// The application takes no more for now.
    Writing(Bytes),
    Finished,
}

impl<C: Carried> Relay<'_, C> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if let Poll::Ready(cut) = self.ticket.poll_cut(cx) {
            self.tell(ResetCode::DENIED);
            return Poll::Ready(Err(Failure::Cut(cut)));
        }
        let (up, down) = (self.poll_up(cx)?, self.poll_down(cx)?);
        if up.is_ready() && down.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if self.silence.as_mut().is_some_and(|silence| silence.poll(cx, self.progress.steps).is_ready()) {
            self.tell(ResetCode::IDLE);
            return Poll::Ready(Err(Failure::IdleTimeout));
        }
        self.poll_broken(cx).map(Err)
    }

    /// Tells the peer why.
    fn tell(&mut self, code: ResetCode) {
        self.send.reset(code);
        self.recv.stop(code);
    }

    /// Application to tunnel. No buffer is held while the application is silent.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        let mut turn = Turn::default();
        loop {
            match &mut self.up {
                Up::Reading => {
                    let bytes = ready!(poll_read(self.app, cx, Turn::piece(self.next_read))).map_err(Failure::Local)?;
                    if bytes.is_empty() {
                        self.application_finished()?;
                        continue;
                    }
                    self.next_read = next_read(self.next_read, bytes.len());
                    self.progress.steps += 1;
                    self.progress.asked.get_or_insert_with(Instant::now);
                    self.carried.passed_to_tunnel(bytes.len() as u64);
                    turn.add(bytes.len());
                    self.up = Up::Sending(bytes);
                }
                Up::Sending(bytes) => {
                    ready!(self.send.poll_send(cx, bytes))?;
                    self.conversation.passed(Direction::ToTunnel);
                    self.up = Up::Reading;
                    if turn.is_over() {
                        return let_others(cx);
                    }
                }
                Up::Asking(asking) => {
                    if ready!(asking.as_mut().poll(cx)) {
                        return Poll::Ready(Err(Failure::ApplicationGone));
                    }
                    self.finish()?;
                }
                Up::Finished => return Poll::Ready(Ok(())),
            }
        }
    }

    fn application_finished(&mut self) -> Result<(), Failure> {
        if !self.progress.is_untouched() {
            return self.finish();
        }
        self.up = Up::Asking(Box::pin(self.carried.is_application_gone()));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Failure> {
        self.up = Up::Finished;
        Ok(self.send.finish()?)
    }

    /// Tunnel to application.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        let mut turn = Turn::default();
        loop {
            match &mut self.down {
                Down::Receiving => {
                    let app = self.app;
                    let received = ready!(self.recv.poll_recv(cx, |pieces| write_pieces(app, pieces)))?;
                    self.progress.steps += 1;
                    let Some(written) = received else {
                        self.down = Down::Finished;
                        tell_end(self.app).map_err(Failure::Local)?;
                        continue;
                    };
                    let (written, rest) = written.map_err(Failure::Local)?;
                    if written > 0 {
                        self.carried.passed_from_tunnel(written as u64);
                    }
                    if !std::mem::replace(&mut self.is_answered, true) {
                        self.carried.answered(self.progress.asked.unwrap_or(self.opened).elapsed());
                    }
                    turn.add(written + rest.len());
                    self.down = Down::Writing(rest);
                }
                Down::Writing(bytes) => {
                    let before = bytes.len();
                    let written = poll_write_all(self.app, cx, bytes);
                    self.carried.passed_from_tunnel((before - bytes.len()) as u64);
                    ready!(written).map_err(Failure::Local)?;
                    self.conversation.passed(Direction::FromTunnel);
                    self.down = Down::Receiving;
                    if turn.is_over() {
                        return let_others(cx);
                    }
                }
                Down::Finished => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Ready when the socket has failed, so that a reset is passed on at once even while neither direction touches the
    /// socket: one half-closed or held up by the tunnel, the other waiting for the peer.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Failure> {
        if matches!(self.up, Up::Reading) {
            // Reading tells.
            return Poll::Pending;
        }
        let app = self.app;
        self.broken.get_or_insert_with(|| Box::pin(socket_error(app))).as_mut().poll(cx)
    }
}

/// Looks at a connection from time to time, and ends when nothing has passed for its timeout.
struct Silence {
    pause: Pin<Box<Sleep>>,
    period: Duration,
    seen: u64,
    looks: u32,
}

impl Silence {
    fn new(timeout: Duration) -> Self {
        let period = timeout / LOOKS_PER_TIMEOUT;
        Self { pause: Box::pin(sleep(period)), period, seen: 0, looks: 0 }
    }

    /// `steps`: what has passed so far.
    fn poll(&mut self, cx: &mut Context<'_>, steps: u64) -> Poll<()> {
        loop {
            ready!(self.pause.as_mut().poll(cx));
            self.looks = if steps == self.seen { self.looks + 1 } else { 0 };
            self.seen = steps;
            if self.looks == LOOKS_PER_TIMEOUT {
                return Poll::Ready(());
            }
            let next = self.pause.deadline() + self.period;
            self.pause.as_mut().reset(next);
        }
    }
}

/// Doubles while reads fill the buffer, halves when they leave most of it empty.
fn next_read(size: usize, read: usize) -> usize {
    if read == size {
        (size * 2).min(LARGEST_READ)
    } else if read < size / 4 {
        (size / 2).max(SMALLEST_READ)
    } else {
        size
    }
}

/// Ends when the socket fails.
async fn socket_error(app: &TcpStream) -> Failure {
    if let Err(error) = app.ready(Interest::ERROR).await {
        return Failure::Local(error);
    }
    match SockRef::from(app).take_error() {
        Ok(Some(error)) | Err(error) => Failure::Local(error),
        // Another direction took the error just before: it was a reset.
        Ok(None) => Failure::Local(ErrorKind::ConnectionReset.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When silence ends, while something passes at the given moments.
    async fn silent_after(timeout: Duration, steps: &[Duration]) -> Duration {
        let start = tokio::time::Instant::now();
        let mut silence = Silence::new(timeout);
        poll_fn(|cx| silence.poll(cx, steps.iter().filter(|step| start.elapsed() >= **step).count() as u64)).await;
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_noticed_once_nothing_has_passed_for_the_timeout() {
        let timeout = Duration::from_secs(8);
        let steps: Vec<_> = (1..=5).map(|step| step * Duration::from_secs(3)).collect();
        let silent = silent_after(timeout, &steps).await;
        let spoken = Duration::from_secs(15);
        assert!(silent >= spoken + timeout && silent <= spoken + timeout * 5 / 4, "{silent:?}");
        let silent = silent_after(timeout, &[]).await;
        assert!(silent >= timeout && silent <= timeout * 5 / 4, "{silent:?}");
    }

    #[test]
    fn reads_grow_with_bulk_and_shrink_with_chatter() {
        let mut size = SMALLEST_READ;
        for _ in 0..10 {
            size = next_read(size, size);
        }
        assert_eq!(size, LARGEST_READ);
        for _ in 0..10 {
            size = next_read(size, 100);
        }
        assert_eq!(size, SMALLEST_READ);
        assert_eq!(next_read(64 * 1024, 40 * 1024), 64 * 1024);
    }
}
