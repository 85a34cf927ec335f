//! Carries bytes between an application's socket and a tunnel stream, with half-close, reset and backpressure.

use super::Failure;
use super::registry::Ticket;
use crate::tunnel::{RecvHalf, ResetCode, SendHalf, Stream};
use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// First read of a connection; reads grow while they fill the buffer.
const SMALLEST_READ: usize = 4 * 1024;
/// Large reads are what makes bulk cheap: fewer wake-ups, full TLS records.
const LARGEST_READ: usize = 256 * 1024;

/// Counts bytes by direction as they pass.
pub(super) trait Count {
    fn passed_to_tunnel(&self, bytes: u64);
    fn passed_from_tunnel(&self, bytes: u64);
}

/// Relays until both directions have ended in order, or the connection is cut. On a failure the application's socket is
/// reset and the stream's unfinished halves are dropped, which resets them too.
pub(super) async fn relay(
    app: &TcpStream,
    stream: Stream,
    count: &impl Count,
    ticket: &mut Ticket,
) -> Result<(), Failure> {
    let (mut send, mut recv) = stream.split();
    let outcome = tokio::select! {
        outcome = async { tokio::try_join!(upload(app, &mut send, count), download(app, &mut recv, count)) } => {
            outcome.map(drop)
        }
        failure = socket_error(app) => Err(failure),
        cut = ticket.cut() => Err(Failure::Cut(cut)),
    };
    if matches!(outcome, Err(Failure::Cut(_))) {
        send.reset(ResetCode::DENIED);
        recv.stop(ResetCode::DENIED);
    }
    if outcome.is_err() {
        reset_on_close(app);
    }
    outcome
}

/// Makes the socket answer with RST instead of FIN when it is dropped.
pub(super) fn reset_on_close(app: &TcpStream) {
    // A socket that is already gone cannot be reset and need not be.
    let _ = SockRef::from(app).set_linger(Some(Duration::ZERO));
}

/// Application to tunnel. No buffer is held while the application is silent.
async fn upload(app: &TcpStream, send: &mut SendHalf, count: &impl Count) -> Result<(), Failure> {
    let mut size = SMALLEST_READ;
    loop {
        app.readable().await.map_err(Failure::Local)?;
        let mut buffer = BytesMut::with_capacity(size);
        match app.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(send.finish().await?),
            Ok(read) => {
                count.passed_to_tunnel(read as u64);
                size = next_read(size, read);
                send.send(buffer.freeze()).await?;
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
async fn download(app: &TcpStream, recv: &mut RecvHalf, count: &impl Count) -> Result<(), Failure> {
    while let Some(chunk) = recv.recv().await? {
        let length = chunk.len() as u64;
        write_all(app, chunk).await.map_err(Failure::Local)?;
        count.passed_from_tunnel(length);
    }
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
