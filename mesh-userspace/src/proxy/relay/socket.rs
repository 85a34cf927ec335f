//! What a relay does with the application's socket.

use super::SMALLEST_READ;
use crate::tunnel::join;
use bytes::{Buf as _, Bytes};
use rustix::buffer::spare_capacity;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use socket2::SockRef;
use std::cell::RefCell;
use std::io::{self, ErrorKind, IoSlice};
use std::net::Shutdown;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::net::TcpStream;

thread_local! {
    static SCRATCH: RefCell<[u8; SMALLEST_READ]> = const { RefCell::new([0; SMALLEST_READ]) };
}

/// What a socket has to read, at most `size` bytes; nothing at its end.
pub(super) fn poll_read(app: &TcpStream, cx: &mut Context<'_>, size: usize) -> Poll<io::Result<Bytes>> {
    loop {
        ready!(app.poll_read_ready(cx))?;
        let read = if size <= SMALLEST_READ { read_little(app, size) } else { read_much(app, size) }?;
        if let Some(bytes) = read {
            return Poll::Ready(Ok(bytes));
        }
    }
}

/// By way of the thread's buffer: what is kept, and maybe waits for others to leave with, is as long as what was said.
fn read_little(app: &TcpStream, size: usize) -> io::Result<Option<Bytes>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let read = attempt(app, Interest::READABLE, size, || Ok(rustix::io::read(app, &mut scratch[..size])?))?;
        Ok(read.map(|read| Bytes::copy_from_slice(&scratch[..read])))
    })
}

/// Without a copy.
fn read_much(app: &TcpStream, size: usize) -> io::Result<Option<Bytes>> {
    let mut buffer = Vec::with_capacity(size);
    let read = attempt(app, Interest::READABLE, size, || Ok(rustix::io::read(app, spare_capacity(&mut buffer))?))?;
    Ok(read.map(|_| buffer.into()))
}

/// Writes several pieces as far as the socket takes them: how much that is, and the rest. A single piece is left to
/// [`poll_write_all`].
pub(super) fn write_pieces(app: &TcpStream, pieces: &mut [Bytes]) -> io::Result<(usize, Bytes)> {
    if pieces.len() == 1 {
        return Ok((0, join(pieces)));
    }
    let slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    let length = pieces.iter().map(Bytes::len).sum();
    let write = || Ok(rustix::net::sendmsg(app, &slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?);
    let written = attempt(app, Interest::WRITABLE, length, write)?.unwrap_or_default();
    let mut past = written;
    for piece in &mut *pieces {
        let here = past.min(piece.len());
        piece.advance(here);
        past -= here;
    }
    Ok((written, join(pieces)))
}

/// Writes `bytes`, of which what is not written yet remains.
pub(super) fn poll_write_all(app: &TcpStream, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<()>> {
    while !bytes.is_empty() {
        ready!(app.poll_write_ready(cx))?;
        let write = || Ok(rustix::net::send(app, bytes, SendFlags::NOSIGNAL)?);
        match attempt(app, Interest::WRITABLE, bytes.len(), write)? {
            Some(0) => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
            Some(written) => bytes.advance(written),
            None => {}
        }
    }
    Poll::Ready(Ok(()))
}

/// Does something with a socket that is ready; `None` if it was not. One that does less than it was asked to is known not
/// to be ready any more, which saves asking the kernel again.
fn attempt(
    app: &TcpStream,
    interest: Interest,
    asked: usize,
    act: impl FnOnce() -> io::Result<usize>,
) -> io::Result<Option<usize>> {
    let mut done = None;
    let outcome = app.try_io(interest, || {
        let count = act()?;
        done = Some(count);
        if (1..asked).contains(&count) { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match outcome {
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Ok(done),
    }
}

/// Tells the application that nothing follows.
pub(super) fn tell_end(app: &TcpStream) -> io::Result<()> {
    match SockRef::from(app).shutdown(Shutdown::Write) {
        // It has already closed: there is nobody left to tell.
        Err(error) if error.kind() == ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn pieces_are_written_as_far_as_the_socket_takes_them_and_the_rest_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        app.writable().await.unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        let pieces = || sent.chunks(1_453).map(Bytes::copy_from_slice);
        // One by one they are left alone; many are more than fits.
        assert_eq!(write_pieces(&app, &mut [pieces().next().unwrap()]).unwrap(), (0, pieces().next().unwrap()));
        let (mut written, mut rest) = (0, Bytes::new());
        for mut some in pieces().collect::<Vec<_>>().chunks(48).map(<[Bytes]>::to_vec) {
            let length: usize = some.iter().map(Bytes::len).sum();
            let (here, left) = write_pieces(&app, &mut some).unwrap();
            assert_eq!(here + left.len(), length);
            written += here;
            rest = left;
            if !rest.is_empty() {
                break;
            }
        }
        assert!(written > 0 && !rest.is_empty(), "{written} bytes fit");
        assert_eq!(rest, sent[written..written + rest.len()]);
        let mut received = vec![0; written];
        far.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent[..written]);
    }
}
