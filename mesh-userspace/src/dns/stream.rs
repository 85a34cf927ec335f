//! Queries over TCP: each message has its length in front (RFC 7766).

use super::{Server, Via};
use crate::model::Workload;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a connection may take to its next query, and to fetch an answer.
const IDLE: Duration = Duration::from_secs(10);

impl Server {
    /// Answers the queries of one captured connection, in their order, until the caller ends it or is silent.
    ///
    /// # Errors
    /// If the connection breaks.
    pub async fn serve(&self, caller: &Workload, stream: &TcpStream) -> io::Result<()> {
        while let Ok(query) = timeout(IDLE, read(stream)).await {
            let Some(query) = query? else { return Ok(()) };
            let reply = self.answer_via(Via::Tcp, caller, &query).await;
            // What is no query has no place in a stream of them.
            let Some(length) = u16::try_from(reply.len()).ok().filter(|length| *length > 0) else { return Ok(()) };
            let message = [&length.to_be_bytes()[..], &reply].concat();
            timeout(IDLE, write(stream, &message)).await??;
        }
        Ok(())
    }
}

/// The next message; `None` at the end of the stream.
async fn read(stream: &TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if fill(stream, &mut length).await? < length.len() {
        return Ok(None);
    }
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    let is_whole = fill(stream, &mut message).await? == message.len();
    Ok(is_whole.then_some(message))
}

/// How much could be read: less than there is room for at the end of the stream only.
async fn fill(stream: &TcpStream, room: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < room.len() {
        stream.readable().await?;
        match stream.try_read(&mut room[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

async fn write(stream: &TcpStream, mut message: &[u8]) -> io::Result<()> {
    while !message.is_empty() {
        stream.writable().await?;
        match stream.try_write(message) {
            Ok(count) => message = &message[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
