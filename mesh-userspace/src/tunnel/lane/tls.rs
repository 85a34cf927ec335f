//! The lane's TLS session and socket, without waiting.
//!
//! rustls reads its source in steps of 4 KiB: the socket is read in long steps instead and rustls is fed from memory.

use crate::identity::PeerRefusal;
use crate::tunnel::lane::Closing;
use crate::tunnel::machine::{Machine, Transmit};
use rustls::Connection;
use std::io::{self, BufRead as _, IoSlice, Write};
use tokio::net::tcp::OwnedWriteHalf;

/// Plaintext per write: sixteen records, as much as a relay reads at once.
const BATCH: usize = 256 * 1024;
/// Batches written before others get the lane's lock; the driver goes on.
const BATCHES: usize = 2;

/// A TLS session and the socket's writing half.
pub(in crate::tunnel) struct Tls {
    connection: Connection,
    /// `None` once closed.
    socket: Option<OwnedWriteHalf>,
    transmit: Transmit,
}

/// What a call to [`Tls::write`] did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    /// Plaintext bytes taken from the machine.
    pub(super) bytes: usize,
    /// The socket takes no more for now.
    pub(super) is_blocked: bool,
}

impl Tls {
    pub(super) fn new(mut connection: Connection, socket: OwnedWriteHalf) -> Self {
        // What is buffered is bounded by `BATCH`: a batch is taken only when the one before has left.
        connection.set_buffer_limit(None);
        Self { connection, socket: Some(socket), transmit: Transmit::default() }
    }

    /// Encrypts and writes what the machine has.
    pub(super) fn write(&mut self, machine: &mut Machine) -> io::Result<Sent> {
        let Self { connection, socket, transmit } = self;
        let Some(socket) = socket else { return Ok(Sent::default()) };
        let mut sent = Sent::default();
        for _ in 0..BATCHES {
            if !push(connection, socket)? {
                sent.is_blocked = true;
                return Ok(sent);
            }
            transmit.clear();
            machine.poll_transmit(transmit, BATCH);
            if transmit.is_empty() {
                return Ok(sent);
            }
            sent.bytes += transmit.len();
            let written = connection.writer().write_vectored(&transmit.slices())?;
            debug_assert_eq!(written, transmit.len());
            transmit.clear();
        }
        sent.is_blocked = !push(connection, socket)?;
        Ok(sent)
    }

    /// Decrypts what came off the socket and hands it to the machine; the number of plaintext bytes.
    pub(super) fn feed(&mut self, mut input: &[u8], machine: &mut Machine) -> Result<usize, Closing> {
        let mut total = self.drain(machine)?;
        while !input.is_empty() {
            let taken = self.connection.read_tls(&mut input).map_err(|_| Closing::Io)?;
            if taken == 0 {
                return Err(Closing::Peer);
            }
            self.connection.process_new_packets().map_err(|error| {
                tracing::debug!(%error, "a lane's TLS session failed");
                Closing::Tls(PeerRefusal::from(&error))
            })?;
            total += self.drain(machine)?;
        }
        Ok(total)
    }

    fn drain(&mut self, machine: &mut Machine) -> Result<usize, Closing> {
        let mut total = 0;
        loop {
            let mut reader = self.connection.reader();
            let length = match reader.fill_buf() {
                Ok([]) => return Err(Closing::Peer),
                Ok(plaintext) => {
                    machine.handle_input(plaintext).map_err(|error| {
                        tracing::debug!(%error, "a peer broke the lane's protocol");
                        Closing::Protocol(error.reason())
                    })?;
                    plaintext.len()
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(total),
                Err(_) => return Err(Closing::Io),
            };
            reader.consume(length);
            total += length;
        }
    }

    /// Says that the session ends, as far as the socket takes it, and lets go of the socket.
    pub(super) fn say_goodbye(&mut self) {
        self.connection.send_close_notify();
        if let Some(socket) = self.socket.take() {
            // Best effort: the peer also understands a connection that just ends.
            let _ = push(&mut self.connection, &socket);
        }
    }
}

/// Moves ciphertext to the socket; `false` if it takes no more.
fn push(connection: &mut Connection, socket: &OwnedWriteHalf) -> io::Result<bool> {
    while connection.wants_write() {
        match connection.write_tls(&mut NonBlocking(socket)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

struct NonBlocking<'a>(&'a OwnedWriteHalf);

impl Write for NonBlocking<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
