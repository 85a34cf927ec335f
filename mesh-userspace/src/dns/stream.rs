//! Queries over TCP: each message has its length in front (RFC 7766).

use super::{Server, Via};
use crate::model::Workload;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// How long a connection may be silent, and how long its caller may take to fetch an answer.
const IDLE: Duration = Duration::from_secs(10);

impl Server {
    /// Answers the queries of one captured connection, in their order, until the caller ends it or is silent.
    ///
    /// # Errors
    /// If the connection breaks.
    pub async fn serve(&self, caller: &Workload, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
        while let Ok(read) = timeout(IDLE, read(&mut stream)).await {
            let Some(query) = read? else { return Ok(()) };
            let reply = self.answer_via(Via::Tcp, caller, &query).await;
            let Ok(length) = u16::try_from(reply.len()) else { return Ok(()) };
            if length == 0 {
                // What is no query has no place in a stream of them.
                return Ok(());
            }
            let message = [&length.to_be_bytes()[..], &reply].concat();
            timeout(IDLE, stream.write_all(&message)).await??;
        }
        Ok(())
    }
}

/// The next message; `None` at the end of the stream.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}
