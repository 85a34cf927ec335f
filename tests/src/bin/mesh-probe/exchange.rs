//! What clients do with a connection.

use crate::ConnectOptions;
use crate::connect::{Way, connect};
use crate::pattern::{Hash, Pattern};
use crate::server::{SEED, canonical, errno};
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use mesh_tests::report::{Call, Greeting};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// The longest single write of a transfer.
const LONGEST_WRITE: u64 = 200_000;
pub(crate) const READ_BUFFER: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    Echo,
    Sink,
    Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Runs a client; whatever it got to know is in the document, also if it failed.
pub(crate) fn report(client: impl FnOnce(&mut Call) -> Result<()>) -> (bool, String) {
    let started = Instant::now();
    let mut call = Call::default();
    match client(&mut call) {
        Ok(()) => call.ok = true,
        Err(error) => {
            call.errno = error.root_cause().downcast_ref::<io::Error>().map(errno);
            call.error = Some(format!("{error:#}"));
        }
    }
    call.micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    (call.ok, serde_json::to_string(&call).expect("a report is plain data"))
}

/// Connects, notes both ends' addresses, reads the greeting where one is expected.
pub(crate) fn open(way: Way, options: &ConnectOptions, call: &mut Call) -> Result<TcpStream> {
    let (mut stream, sent) = connect(way, options).with_context(|| format!("connect by {}", crate::spelled(&way)))?;
    stream.set_nodelay(true)?;
    // A connection that only its first write makes has no peer before.
    if way == Way::FastopenConnect {
        stream.write_all(options.message.as_bytes()).context("first write")?;
        call.bytes_sent = options.message.len() as u64;
    } else {
        call.bytes_sent = sent as u64;
    }
    call.getpeername =
        Some(canonical(stream.peer_addr().map_err(|error| cause(&stream, error)).context("getpeername")?));
    call.getsockname = Some(canonical(stream.local_addr().context("getsockname")?));
    if options.greet {
        call.greeting = Some(read_greeting(&mut stream).context("the greeting")?);
    }
    Ok(stream)
}

/// Why a connection is gone, where a call only says that it is: a reset may be quicker than the next call.
fn cause(stream: &TcpStream, error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::NotConnected {
        return error;
    }
    stream.take_error().ok().flatten().unwrap_or(error)
}

/// Byte by byte: nothing of what follows may be taken.
pub(crate) fn read_greeting(stream: &mut TcpStream) -> Result<Greeting> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        ensure!(line.len() < 4_096, "the greeting is too long");
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(serde_json::from_slice(&line)?)
}

/// One message, expected back.
pub(crate) fn call(way: Way, options: &ConnectOptions, call: &mut Call) -> Result<()> {
    let mut stream = open(way, options, call)?;
    let message = options.message.as_bytes();
    let sent = usize::try_from(call.bytes_sent)?;
    stream.write_all(&message[sent..]).context("write")?;
    call.bytes_sent = message.len() as u64;
    stream.shutdown(Shutdown::Write).map_err(|error| cause(&stream, error)).context("shutdown")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("read")?;
    call.bytes_received = answer.len() as u64;
    ensure!(answer == message, "the answer differs from the message: {:?}", String::from_utf8_lossy(&answer));
    Ok(())
}

/// Moves bytes; the two directions run at the same time.
pub(crate) fn transfer(
    options: &ConnectOptions,
    bytes: u64,
    direction: Direction,
    asleep: bool,
    call: &mut Call,
) -> Result<()> {
    let mut stream = open(Way::Blocking, options, call)?;
    if asleep {
        eprintln!("asleep");
        io::stdin().read_to_end(&mut Vec::new()).context("standard input")?;
    }
    if direction == Direction::Source {
        return receive_pattern(&mut stream, bytes, call);
    }
    let writer = stream.try_clone()?;
    let (sent, received) = std::thread::scope(|scope| {
        let sending = scope.spawn(move || send_random(writer, bytes));
        let received = receive(&mut stream);
        (sending.join().expect("the sender does not panic"), received)
    });
    (call.bytes_sent, call.sent_hash) = sent.context("send")?;
    let received = received.context("receive")?;
    call.bytes_received = received.count;
    call.received_hash = received.hash;
    if direction == Direction::Sink {
        call.received_hash = String::from_utf8(received.last).context("the server's hash")?;
    }
    ensure!(call.sent_hash == call.received_hash, "the hashes differ");
    Ok(())
}

/// Writes of random sizes, from one byte on; ends the direction.
fn send_random(mut stream: TcpStream, bytes: u64) -> Result<(u64, String)> {
    let mut pattern = Pattern::new(rand::random());
    let mut sizes = Pattern::new(rand::random());
    let (mut hash, mut sent) = (Hash::new(), 0);
    let mut buffer = vec![0; usize::try_from(LONGEST_WRITE)?];
    while sent < bytes {
        // Mostly small, sometimes large: the exponent is what is random.
        let exponent = sizes.number() % 18;
        let size = (1 + sizes.number() % (1 << exponent)).min(LONGEST_WRITE).min(bytes - sent);
        let part = &mut buffer[..usize::try_from(size)?];
        pattern.fill(part);
        hash.update(part);
        stream.write_all(part)?;
        sent += size;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok((sent, hash.hex()))
}

pub(crate) struct Received {
    count: u64,
    hash: String,
    /// The last 64 bytes.
    pub(crate) last: Vec<u8>,
}

pub(crate) fn receive(stream: &mut TcpStream) -> io::Result<Received> {
    let (mut count, mut hash, mut last) = (0, Hash::new(), Vec::new());
    let mut buffer = vec![0; READ_BUFFER];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(Received { count, hash: hash.hex(), last });
        }
        hash.update(&buffer[..read]);
        count += read as u64;
        last.extend_from_slice(&buffer[read.saturating_sub(64)..read]);
        last.drain(..last.len().saturating_sub(64));
    }
}

/// Reads what a server sends by itself, to its end, and compares it with what it must be.
fn receive_pattern(stream: &mut TcpStream, bytes: u64, call: &mut Call) -> Result<()> {
    let received = receive(stream).context("receive")?;
    (call.bytes_received, call.received_hash) = (received.count, received.hash);
    let (mut pattern, mut hash, mut left) = (Pattern::new(SEED), Hash::new(), bytes);
    let mut buffer = vec![0; READ_BUFFER];
    while left > 0 {
        let part = &mut buffer[..usize::try_from(left.min(READ_BUFFER as u64))?];
        pattern.fill(part);
        hash.update(part);
        left -= part.len() as u64;
    }
    ensure!(call.bytes_received == bytes, "{} of {bytes} bytes arrived", call.bytes_received);
    ensure!(call.received_hash == hash.hex(), "the bytes differ from those sent");
    Ok(())
}

/// One direction ends, then the other carries `bytes`. The client first: the server is `finish-last`; the server
/// first: it is `source`.
pub(crate) fn half_close(options: &ConnectOptions, first: Side, bytes: u64, call: &mut Call) -> Result<()> {
    let mut stream = open(Way::Blocking, options, call)?;
    match first {
        Side::Client => {
            stream.write_all(options.message.as_bytes()).context("write")?;
            call.bytes_sent = options.message.len() as u64;
            stream.shutdown(Shutdown::Write).context("shutdown")?;
            receive_pattern(&mut stream, bytes, call)
        }
        Side::Server => {
            receive_pattern(&mut stream, bytes, call)?;
            (call.bytes_sent, call.sent_hash) = send_random(stream, bytes).context("send after the server's end")?;
            Ok(())
        }
    }
}

/// A reset by the client after one echoed message, or one expected of the server (`reset`).
pub(crate) fn reset(options: &ConnectOptions, by: Side, call: &mut Call) -> Result<()> {
    let mut stream = open(Way::Blocking, options, call)?;
    stream.write_all(options.message.as_bytes()).context("write")?;
    call.bytes_sent = options.message.len() as u64;
    let mut answer = vec![0; options.message.len()];
    match by {
        Side::Client => {
            stream.read_exact(&mut answer).context("read")?;
            call.bytes_received = answer.len() as u64;
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            Ok(())
        }
        Side::Server => match stream.read_exact(&mut answer) {
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {
                call.errno = Some(errno(&error));
                Ok(())
            }
            Err(error) => Err(error).context("expected a reset"),
            Ok(()) => bail!("expected a reset, got an answer"),
        },
    }
}
