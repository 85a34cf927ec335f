//! The little of the wire format that must hold for messages that nothing else can read: headers, refusals, sizes.

use super::Via;

/// Bytes of a header.
const HEADER: usize = 12;
/// A message without EDNS.
const PLAIN: u16 = 512;
/// What a datagram of ours has at most: it stays on this machine.
const DATAGRAM: u16 = 4_096;

pub(super) const FORMAT_ERROR: u8 = 1;
pub(super) const SERVER_FAILURE: u8 = 2;
pub(super) const NOT_IMPLEMENTED: u8 = 4;
pub(super) const REFUSED: u8 = 5;

/// In the third byte.
const RESPONSE: u8 = 0x80;
const OPCODE: u8 = 0x78;
const TRUNCATED: u8 = 0x02;
const RECURSION_DESIRED: u8 = 0x01;
/// In the fourth.
const RECURSION_AVAILABLE: u8 = 0x80;

/// What every message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    bytes: [u8; HEADER],
}

impl Head {
    pub(super) fn of(message: &[u8]) -> Option<Self> {
        Some(Self { bytes: *message.first_chunk()? })
    }

    pub(super) fn is_response(self) -> bool {
        self.bytes[2] & RESPONSE != 0
    }

    pub(super) fn is_truncated(self) -> bool {
        self.bytes[2] & TRUNCATED != 0
    }

    /// 0 is a query.
    pub(super) fn opcode(self) -> u8 {
        (self.bytes[2] & OPCODE) >> 3
    }

    pub(super) fn response_code(self) -> u8 {
        self.bytes[3] & 0x0f
    }

    pub(super) fn id(self) -> u16 {
        u16::from_be_bytes([self.bytes[0], self.bytes[1]])
    }

    pub(super) fn questions(self) -> u16 {
        u16::from_be_bytes([self.bytes[4], self.bytes[5]])
    }

    /// The header of an answer without any record: its response code, and what it repeats of the query.
    pub(super) fn refusal(self, code: u8) -> Vec<u8> {
        let mut bytes = [0; HEADER];
        bytes[..2].copy_from_slice(&self.bytes[..2]);
        bytes[2] = RESPONSE | self.bytes[2] & (OPCODE | RECURSION_DESIRED);
        bytes[3] = code & 0x0f;
        bytes.to_vec()
    }
}

/// The question section, which has one question; `None` if it has not, or its name is not written out.
pub(super) fn question(message: &[u8]) -> Option<&[u8]> {
    let mut at = HEADER;
    // Names have 255 bytes at most.
    while at <= HEADER + 255 {
        match *message.get(at)? {
            0 => return message.get(HEADER..at + 5),
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    None
}

/// A query whose answer comes from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    head: Head,
    /// As it was asked.
    section: Vec<u8>,
    /// Bytes that the answer may have.
    limit: usize,
}

impl Question {
    pub(super) fn new(head: Head, section: &[u8], limit: usize) -> Self {
        Self { head, section: section.to_vec(), limit }
    }

    pub(super) fn id(&self) -> u16 {
        self.head.id()
    }

    /// An answer of nothing but a response code. Who refuses does not ask on; others would.
    pub(super) fn refusal(&self, code: u8) -> Vec<u8> {
        let mut reply = self.head.refusal(code);
        if code != REFUSED {
            reply[3] |= RECURSION_AVAILABLE;
        }
        reply[5] = 1;
        reply.extend(&self.section);
        reply
    }

    /// Whether a message answers this question, asked under the id `id`. A server that understood nothing may leave
    /// the question out.
    pub(super) fn is_answered_by(&self, message: &[u8], id: u16) -> bool {
        let Some(head) = Head::of(message) else { return false };
        let repeats = || question(message).is_some_and(|section| section.eq_ignore_ascii_case(&self.section));
        let is_about_it = match head.questions() {
            0 => head.response_code() != 0,
            count => count == 1 && repeats(),
        };
        head.is_response() && head.id() == id && head.opcode() == self.head.opcode() && is_about_it
    }
}

/// Bytes that an answer may have, when the query offers `offered` with EDNS.
pub(super) fn limit(via: Via, offered: Option<u16>) -> usize {
    match via {
        Via::Tcp => usize::from(u16::MAX),
        Via::Udp => offered.unwrap_or(PLAIN).clamp(PLAIN, DATAGRAM).into(),
    }
}

/// An upstream's answer as the caller may have it: one that is too long says only that it is.
pub(super) fn fit(reply: Vec<u8>, question: &Question) -> Vec<u8> {
    if reply.len() <= question.limit {
        return reply;
    }
    let mut short = question.refusal(0);
    short[2] |= TRUNCATED;
    short
}

/// Gives a message another id.
pub(super) fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(start) = message.first_chunk_mut() {
        *start = id.to_be_bytes();
    }
    message
}
