//! How the client opens a stream: a header, and the answer to it.

use super::OPENED;
use super::ending::lost;
use super::flow::{Registration, Sink};
use super::pooled::Pooled;
use crate::tunnel::{OpenError, Refusal};
use quinn::{ConnectionError, RecvStream, SendStream, VarInt};
use std::sync::Arc;

/// A stream that the other end has opened.
pub(super) struct Opened {
    pub(super) pooled: Pooled,
    pub(super) send: SendStream,
    pub(super) recv: RecvStream,
    pub(super) registration: Option<Registration>,
}

/// Sends the header and waits for the answer.
pub(super) async fn exchange(pooled: Pooled, header: &[u8], sink: Option<&Sink>) -> Result<Opened, OpenError> {
    let gone = |error: &ConnectionError| lost(error).unwrap_or(OpenError::Closed);
    let (send, mut recv) = pooled.connection.open_bi().await.map_err(|error| gone(&error))?;
    let registration = sink.map(|sink| pooled.flows.register(&send, Arc::clone(sink)));
    let mut send = Unfinished(Some(send));
    let length = u16::try_from(header.len()).map_err(|_| OpenError::Bound("stream header bytes"))?;
    let message = [&length.to_be_bytes()[..], header].concat();
    let closed = || pooled.connection.close_reason().map_or(OpenError::Closed, |error| gone(&error));
    let stream = send.0.as_mut().ok_or(OpenError::Closed)?;
    stream.write_all(&message).await.map_err(|_| closed())?;
    let mut answer = [0];
    recv.read_exact(&mut answer).await.map_err(|_| closed())?;
    match answer[0] {
        OPENED => {
            let send = send.0.take().ok_or(OpenError::Closed)?;
            Ok(Opened { pooled, send, recv, registration })
        }
        code => Err(OpenError::Refused(Refusal::from_code(code))),
    }
}

/// A stream without an answer: reset, not finished, when given up.
struct Unfinished(Option<SendStream>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            // Fails only if the stream has ended.
            let _ = stream.reset(VarInt::from_u32(0));
        }
    }
}
