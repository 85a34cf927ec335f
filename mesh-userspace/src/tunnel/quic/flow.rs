//! Datagram flows: the UDP of one application socket to one endpoint.
//!
//! A flow is opened and ended as a stream is, and refused likewise. Its payloads travel as QUIC datagrams, each with the
//! stream's index before it; those that no packet holds go over the stream, each with its length before it. Nothing is
//! repeated for a flow's sake but what goes over the stream, and nothing is kept in order.

use super::QUIC;
use super::halves::{QuicRecv, QuicSend};
use crate::telemetry::tunnel::TunnelBytes;
use crate::tunnel::{ResetCode, StreamError};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use quinn::{Connection, SendStream};
use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Payloads that wait to be written to a flow's stream.
const LONG_QUEUE: usize = 32;
/// The longest variable-length integer of QUIC.
const MAX_INDEX: u64 = (1 << 62) - 1;

/// Takes what the other end sends; must not block.
pub type Sink = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// How a payload left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    Datagram,
    /// As a datagram, for which older ones that had not left yet have made room.
    DatagramInsteadOfOlder,
    /// It is too long for a packet.
    Stream,
}

/// Why a payload is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Too many long ones wait already.
    QueueFull,
    /// The flow has ended.
    Closed,
}

/// The flows of one connection.
#[derive(Default)]
pub(super) struct Flows(Mutex<HashMap<u64, Sink>>);

impl fmt::Debug for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flows").field("open", &self.lock().len()).finish()
    }
}

impl Flows {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Sink>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands datagrams to their flows until the connection ends. Those of a flow that has ended are nobody's.
    pub(super) async fn dispatch(self: Arc<Self>, connection: Connection, bytes: TunnelBytes) {
        while let Ok(mut datagram) = connection.read_datagram().await {
            let Some(index) = take_index(&mut datagram) else { continue };
            let sink = self.lock().get(&index).cloned();
            if let Some(sink) = sink {
                bytes.received.inc_by(datagram.len() as u64);
                sink(&datagram);
            }
        }
    }

    /// Takes the datagrams of a stream until the registration is dropped.
    pub(super) fn register(self: &Arc<Self>, stream: &SendStream, sink: Sink) -> Registration {
        let index = stream.id().index();
        self.lock().insert(index, sink);
        Registration { flows: Arc::clone(self), index }
    }
}

pub(super) struct Registration {
    flows: Arc<Flows>,
    index: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.flows.lock().remove(&self.index);
    }
}

/// An open flow. It ends when this is dropped.
pub struct DatagramFlow {
    sender: FlowSender,
    long: mpsc::Receiver<Bytes>,
    send: QuicSend,
    recv: QuicRecv,
    sink: Sink,
    _registration: Registration,
}

/// The sending end of a flow; cheap to clone.
#[derive(Clone, Debug)]
pub struct FlowSender {
    connection: Connection,
    index: u64,
    long: mpsc::Sender<Bytes>,
    bytes: TunnelBytes,
}

impl DatagramFlow {
    pub(super) fn new(
        connection: Connection,
        bytes: TunnelBytes,
        (send, recv): (QuicSend, QuicRecv),
        sink: Sink,
        registration: Registration,
    ) -> Self {
        let (queue, long) = mpsc::channel(LONG_QUEUE);
        let sender = FlowSender { connection, index: registration.index, long: queue, bytes };
        Self { sender, long, send, recv, sink, _registration: registration }
    }

    #[must_use]
    pub fn sender(&self) -> FlowSender {
        self.sender.clone()
    }

    /// The label of the transport that carries it.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        QUIC
    }

    /// Carries the flow until either end gives it up: this one when `until` is ready, with its code.
    ///
    /// # Errors
    /// The other end's reason, or that the connection between the nodes ended.
    pub async fn carry(mut self, until: impl Future<Output = ResetCode>) -> Result<(), StreamError> {
        let write = async {
            while let Some(payload) = self.long.recv().await {
                let mut framed = BytesMut::with_capacity(2 + payload.len());
                framed.put_u16(u16::try_from(payload.len()).unwrap_or(u16::MAX));
                framed.put(payload);
                let mut framed = framed.freeze();
                poll_fn(|cx| self.send.poll_send(cx, &mut framed)).await?;
            }
            // The sender that this holds keeps the queue open.
            std::future::pending().await
        };
        let read = async {
            let mut pending = BytesMut::new();
            while poll_fn(|cx| {
                self.recv.poll_pieces(cx, |pieces| pieces.iter().for_each(|piece| pending.extend_from_slice(piece)))
            })
            .await?
            .is_some()
            {
                while let Some(payload) = take_framed(&mut pending) {
                    (self.sink)(&payload);
                }
            }
            Err(StreamError::Ended)
        };
        let code = tokio::select! {
            ended = write => return ended,
            ended = read => return ended,
            code = until => code,
        };
        self.send.reset(code);
        self.recv.stop(code);
        Ok(())
    }
}

impl FlowSender {
    /// Sends a payload, or does not: UDP does not wait.
    ///
    /// # Errors
    /// Why it is lost.
    pub fn send(&self, payload: &[u8]) -> Result<Carried, Lost> {
        let length = payload.len() + index_length(self.index);
        if self.connection.max_datagram_size().is_some_and(|most| length <= most) {
            let mut datagram = BytesMut::with_capacity(length);
            put_index(&mut datagram, self.index);
            datagram.put(payload);
            let is_full = self.connection.datagram_send_buffer_space() < length;
            if self.connection.send_datagram(datagram.freeze()).is_ok() {
                self.bytes.sent.inc_by(payload.len() as u64);
                return Ok(if is_full { Carried::DatagramInsteadOfOlder } else { Carried::Datagram });
            }
            // The path has become narrower in between, or the connection has ended; the stream knows.
        }
        match self.long.try_send(Bytes::copy_from_slice(payload)) {
            Ok(()) => Ok(Carried::Stream),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Lost::QueueFull),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Lost::Closed),
        }
    }
}

/// Takes a payload that is there as a whole.
fn take_framed(pending: &mut BytesMut) -> Option<Bytes> {
    let length = usize::from(u16::from_be_bytes(pending.get(..2)?.try_into().ok()?));
    if pending.len() < 2 + length {
        return None;
    }
    pending.advance(2);
    Some(pending.split_to(length).freeze())
}

/// Bytes of a variable-length integer (RFC 9000, 16).
const fn index_length(index: u64) -> usize {
    match index {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

fn put_index(to: &mut BytesMut, index: u64) {
    match index_length(index) {
        1 => to.put_uint(index, 1),
        2 => to.put_uint(index | 0x4000, 2),
        4 => to.put_uint(index | 0x8000_0000, 4),
        _ => to.put_u64(index.min(MAX_INDEX) | 0xc000_0000_0000_0000),
    }
}

fn take_index(from: &mut Bytes) -> Option<u64> {
    let length = 1_usize << (from.first()? >> 6);
    let mask = u64::MAX >> (64 - 8 * length + 2);
    (from.len() >= length).then(|| from.get_uint(length) & mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_flows_index_survives_the_wire(index in 0..=MAX_INDEX, shift in 0_u32..62, payload: Vec<u8>) {
            let index = index >> shift;
            let mut datagram = BytesMut::new();
            put_index(&mut datagram, index);
            prop_assert_eq!(datagram.len(), index_length(index));
            datagram.put(payload.as_slice());
            let mut datagram = datagram.freeze();
            prop_assert_eq!(take_index(&mut datagram), Some(index));
            prop_assert_eq!(&datagram[..], &payload[..]);
        }

        #[test]
        fn arbitrary_datagrams_never_panic(bytes: Vec<u8>) {
            let _ = take_index(&mut Bytes::from(bytes));
        }

        #[test]
        fn framed_payloads_come_out_as_they_went_in(payloads: Vec<Vec<u8>>, cut in 1_usize..7) {
            let mut wire = Vec::new();
            for payload in &payloads {
                wire.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
                wire.extend(payload);
            }
            let (mut pending, mut found) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(cut) {
                pending.extend_from_slice(piece);
                while let Some(payload) = take_framed(&mut pending) {
                    found.push(payload.to_vec());
                }
            }
            prop_assert_eq!(found, payloads);
            prop_assert!(pending.is_empty());
        }
    }
}
