//! Carries bytes between an application's socket and a tunnel stream, with half-close, reset and backpressure.

use super::Failure;
use super::registry::Ticket;
use crate::tunnel::codec::MAX_PAYLOAD;
use crate::tunnel::{RecvHalf, ResetCode, SendHalf, Stream};
use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// First read of a connection; reads grow while they fill the buffer.
const SMALLEST_READ: usize = 4 * 1024;
/// Large reads are what makes bulk cheap: fewer wake-ups, full TLS records. Whole frames: a rest would be a record and a
/// packet of its own.
const LARGEST_READ: usize = 4 * MAX_PAYLOAD;
/// A direction lets others have the thread after this much: tokio counts operations, of which 128 large ones take
/// milliseconds.
const TURN: usize = 512 * 1024;
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
    steps: AtomicU64,
    /// When the application's first bytes were read.
    asked: OnceLock<Instant>,
}

impl Progress {
    /// Nothing was taken from the application and nothing was given to it: it cannot know where its connection ends.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.steps.load(Relaxed) == 0
    }

    fn step(&self) {
        self.steps.fetch_add(1, Relaxed);
    }

    /// Ends when nothing has passed for the timeout; never without one.
    async fn silence(&self, timeout: Option<Duration>) {
        let Some(timeout) = timeout else { return std::future::pending().await };
        let period = timeout / LOOKS_PER_TIMEOUT;
        // On the heap: most connections have no timeout, and every byte of this future is in all of them.
        let mut pause = Box::pin(tokio::time::sleep(period));
        let (mut seen, mut looks) = (self.steps.load(Relaxed), 0);
        while looks < LOOKS_PER_TIMEOUT {
            pause.as_mut().await;
            let steps = self.steps.load(Relaxed);
            looks = if steps == seen { looks + 1 } else { 0 };
            seen = steps;
            let next = pause.deadline() + period;
            pause.as_mut().reset(next);
        }
    }
}

/// Relays until both directions have ended in order, the connection is cut, or silent for too long. On a failure the
/// stream's unfinished halves are dropped, which resets them; the application's socket is the caller's.
///
/// # Errors
/// Why the connection did not end in order.
pub async fn relay(
    app: &TcpStream,
    stream: Stream,
    carried: &impl Carried,
    ticket: &mut Ticket,
    progress: &Progress,
    idle_timeout: Option<Duration>,
) -> Result<(), Failure> {
    let (mut send, mut recv) = stream.split();
    let outcome = tokio::select! {
        // Made in its place: a future that is moved there takes its room twice.
        outcome = async {
            tokio::try_join!(upload(app, &mut send, carried, progress), download(app, &mut recv, carried, progress))
        } => outcome.map(drop),
        failure = socket_error(app) => Err(failure),
        cut = ticket.cut() => Err(Failure::Cut(cut)),
        () = progress.silence(idle_timeout) => Err(Failure::IdleTimeout),
    };
    let told = match outcome {
        Err(Failure::Cut(_)) => Some(ResetCode::DENIED),
        Err(Failure::IdleTimeout) => Some(ResetCode::IDLE),
        _ => None,
    };
    if let Some(code) = told {
        send.reset(code);
        recv.stop(code);
    }
    outcome
}

/// Makes the socket answer with RST instead of FIN when it is dropped.
pub(super) fn reset_on_close(app: &TcpStream) {
    // A socket that is already gone cannot be reset and need not be.
    let _ = SockRef::from(app).set_linger(Some(Duration::ZERO));
}

/// What a direction has carried since others last had the thread.
#[derive(Default)]
struct Turn(usize);

impl Turn {
    async fn carried(&mut self, bytes: usize) {
        self.0 += bytes;
        if self.0 >= TURN {
            self.0 = 0;
            tokio::task::yield_now().await;
        }
    }
}

/// Application to tunnel. No buffer is held while the application is silent.
async fn upload(
    app: &TcpStream,
    send: &mut SendHalf,
    carried: &impl Carried,
    progress: &Progress,
) -> Result<(), Failure> {
    let mut size = SMALLEST_READ;
    let mut turn = Turn::default();
    loop {
        app.readable().await.map_err(Failure::Local)?;
        let mut buffer = BytesMut::with_capacity(size);
        match app.try_read_buf(&mut buffer) {
            Ok(0) if progress.is_untouched() && Box::pin(carried.is_application_gone()).await => {
                return Err(Failure::ApplicationGone);
            }
            Ok(0) => return Ok(send.finish().await?),
            Ok(read) => {
                progress.step();
                progress.asked.get_or_init(Instant::now);
                carried.passed_to_tunnel(read as u64);
                size = next_read(size, read);
                send.send(buffer.freeze()).await?;
                turn.carried(read).await;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(Failure::Local(error)),
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

/// Tunnel to application.
async fn download(
    app: &TcpStream,
    recv: &mut RecvHalf,
    carried: &impl Carried,
    progress: &Progress,
) -> Result<(), Failure> {
    let opened = Instant::now();
    let mut is_first = true;
    let mut turn = Turn::default();
    while let Some(chunk) = recv.recv().await? {
        let length = chunk.len();
        progress.step();
        if std::mem::take(&mut is_first) {
            carried.answered(progress.asked.get().unwrap_or(&opened).elapsed());
        }
        write_all(app, chunk).await.map_err(Failure::Local)?;
        carried.passed_from_tunnel(length as u64);
        turn.carried(length).await;
    }
    progress.step();
    match SockRef::from(app).shutdown(Shutdown::Write) {
        // The application has already closed: there is nobody left to tell.
        Err(error) if error.kind() == ErrorKind::NotConnected => Ok(()),
        other => other.map_err(Failure::Local),
    }
}

async fn write_all(app: &TcpStream, mut chunk: Bytes) -> io::Result<()> {
    while !chunk.is_empty() {
        match app.try_write(&chunk) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes::Buf::advance(&mut chunk, written),
            Err(error) if error.kind() == ErrorKind::WouldBlock => app.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Ends when the socket fails, so that a reset is passed on at once even while neither direction touches the socket
/// (one half-closed, the other waiting for the peer).
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

    #[tokio::test(start_paused = true)]
    async fn silence_is_noticed_once_nothing_has_passed_for_the_timeout() {
        let timeout = Duration::from_secs(8);
        let progress = Progress::default();
        let start = tokio::time::Instant::now();
        let chatter = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(3)).await;
                progress.step();
            }
        };
        let silent = async {
            progress.silence(Some(timeout)).await;
            start.elapsed()
        };
        let ((), silent) = tokio::join!(chatter, silent);
        let spoken = Duration::from_secs(15);
        assert!(silent >= spoken + timeout && silent <= spoken + timeout * 5 / 4, "{silent:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_timeout_silence_lasts() {
        let waiting = tokio::time::timeout(Duration::from_hours(24), async {
            Progress::default().silence(None).await;
        });
        assert!(waiting.await.is_err());
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
