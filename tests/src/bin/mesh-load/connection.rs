//! One HTTP/1.1 connection, and the epoll instance that many of them share.

use anyhow::{Context, Result, bail, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

/// A request that keeps its connection.
pub(crate) const KEEP: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
/// A request that ends its connection.
pub(crate) const CLOSE: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";

const BUFFER: usize = 16 * 1024;
const EVENTS: usize = 256;

/// What is ready, by the number that it was added under.
pub(crate) struct Poll {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poll {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, events: Vec::with_capacity(EVENTS) })
    }

    pub(crate) fn add(&self, source: impl AsFd, number: u64, interest: EventFlags) -> Result<()> {
        Ok(epoll::add(&self.epoll, source, EventData::new_u64(number), interest)?)
    }

    pub(crate) fn modify(&self, source: impl AsFd, number: u64, interest: EventFlags) -> Result<()> {
        Ok(epoll::modify(&self.epoll, source, EventData::new_u64(number), interest)?)
    }

    /// Waits for readiness, and tells the numbers of what is ready.
    pub(crate) fn wait(&mut self) -> Result<impl Iterator<Item = u64> + use<'_>> {
        self.events.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(self.events.iter().map(|event| event.data.u64())),
            Err(error) => Err(error).context("epoll_wait"),
        }
    }
}

/// A connection with at most one request on its way.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes of the response so far.
    received: usize,
    /// Bytes of a whole response, once one has been seen: the server's answers all have the same length.
    length: Option<usize>,
}

impl Connection {
    /// Connects and waits for it.
    pub(crate) fn open(destination: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(destination).with_context(|| format!("cannot connect to {destination}"))?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self::of(stream))
    }

    /// Begins to connect; the socket is writable when it is.
    pub(crate) fn begin(destination: SocketAddr) -> Result<Self> {
        let socket = Socket::new(Domain::for_address(destination), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&destination.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                Err(error).with_context(|| format!("cannot connect to {destination}"))
            }
            _ => Ok(Self::of(socket.into())),
        }
    }

    fn of(stream: TcpStream) -> Self {
        Self { stream, buffer: vec![0; BUFFER], received: 0, length: None }
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(crate) fn send(&mut self, request: &[u8]) -> Result<()> {
        self.received = 0;
        // A request is far smaller than a socket's buffer.
        let sent = self.stream.write(request).context("cannot send")?;
        ensure!(sent == request.len(), "only {sent} bytes of a request were taken");
        Ok(())
    }

    /// Sends a request and waits for its response.
    pub(crate) fn exchange(&mut self) -> Result<()> {
        self.stream.set_nonblocking(false)?;
        self.send(KEEP)?;
        while !self.receive()? {}
        Ok(self.stream.set_nonblocking(true)?)
    }

    /// Reads what there is; whether the response is complete.
    pub(crate) fn receive(&mut self) -> Result<bool> {
        loop {
            match self.stream.read(&mut self.buffer[self.received..]) {
                Ok(0) => bail!("the connection ended after {} bytes of a response", self.received),
                Ok(read) => self.received += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).context("cannot receive"),
            }
            if self.is_complete()? {
                return Ok(true);
            }
        }
    }

    /// Reads what there is; whether the server has ended the connection, after a whole response.
    pub(crate) fn receive_to_end(&mut self) -> Result<bool> {
        loop {
            match self.stream.read(&mut self.buffer[self.received..]) {
                Ok(0) => {
                    ensure!(self.is_complete()?, "the connection ended after {} bytes of a response", self.received);
                    return Ok(true);
                }
                Ok(read) => self.received += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).context("cannot receive"),
            }
        }
    }

    fn is_complete(&mut self) -> Result<bool> {
        if self.length.is_none() {
            self.length = length(&self.buffer[..self.received])?;
        }
        let Some(length) = self.length else { return Ok(false) };
        ensure!(self.received <= length, "{} bytes came, a response has {length}", self.received);
        if self.received < length {
            return Ok(false);
        }
        ensure!(is_success(&self.buffer), "the server does not answer with 200");
        Ok(true)
    }
}

fn is_success(response: &[u8]) -> bool {
    response.starts_with(b"HTTP/1.1 200 ")
}

/// The length of a response with its header, if the header is there.
fn length(response: &[u8]) -> Result<Option<usize>> {
    let Some(end) = memchr::memmem::find(response, b"\r\n\r\n") else { return Ok(None) };
    let header = std::str::from_utf8(&response[..end]).context("the response's header is no text")?;
    let mut fields = header.lines().filter_map(|line| line.split_once(':'));
    let length = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let (_, length) = length.context("the response does not say how long it is")?;
    let length: usize = length.trim().parse()?;
    Ok(Some(end + 4 + length))
}

/// Opens connections, each of which has been answered once.
pub(crate) fn open_all(destination: SocketAddr, count: usize) -> Result<Vec<Connection>> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = Connection::open(destination)?;
        connection.exchange()?;
        connections.push(connection);
    }
    Ok(connections)
}

#[cfg(test)]
mod tests {
    use super::length;

    #[test]
    fn a_response_is_as_long_as_its_header_says() {
        let response = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX: y\r\n\r\nok";
        assert_eq!(length(response).unwrap(), Some(response.len()));
        assert_eq!(length(&response[..20]).unwrap(), None);
        assert!(length(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
