//! The lane's wire format: frames of an 8-byte head and a payload, inside TLS.
//!
//! ```text
//! 0        1        2                 4                                  8
//! +--------+--------+-----------------+----------------------------------+----------- - -
//! | type   | flags  | payload length  | stream (0 for the lane itself)   | payload
//! +--------+--------+-----------------+----------------------------------+----------- - -
//! ```
//! All numbers are in network order. Flags are reserved and zero. Payloads of DATA are handed on piece by piece as they
//! arrive; the small payloads of all other frames are gathered first. Nothing here allocates more than
//! [`MAX_CONTROL_PAYLOAD`], whatever the peer sends.

#[cfg(test)]
mod tests;

use super::ResetCode;
use bytes::Bytes;

/// Bytes of a frame's head.
pub const HEAD: usize = 8;
/// Longest stream header.
pub const MAX_HEADER: usize = 1024;
/// Longest payload of a frame that is not DATA.
pub const MAX_CONTROL_PAYLOAD: usize = MAX_HEADER;
/// Longest DATA payload written: with its head it fills four TLS records to the last byte.
pub const MAX_PAYLOAD: usize = 4 * 16_384 - HEAD;
/// Length of the name by which an ATTACH finds the lane that it continues.
pub const LANE_TOKEN: usize = 16;

/// Names a lane to its peer only: a secret both ends derive from the TLS session.
pub type LaneToken = [u8; LANE_TOKEN];

/// Why a peer's bytes are no frame. The lane cannot go on after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("unknown frame type {0}")]
    UnknownType(u8),
    #[error("reserved flags {0:#04x} are set")]
    Flags(u8),
    #[error("a payload of {length} bytes in a frame of type {kind}")]
    Length { kind: u8, length: u16 },
    #[error("a frame of type {0} on the wrong stream")]
    Stream(u8),
}

/// What a frame's head says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Open = 1,
    Opened = 2,
    Refused = 3,
    Data = 4,
    Credit = 5,
    Fin = 6,
    Reset = 7,
    Stop = 8,
    Move = 9,
    Attach = 10,
    Ping = 11,
    GoAway = 12,
    Join = 13,
}

impl Kind {
    fn parse(byte: u8) -> Result<Self, CodecError> {
        Ok(match byte {
            1 => Self::Open,
            2 => Self::Opened,
            3 => Self::Refused,
            4 => Self::Data,
            5 => Self::Credit,
            6 => Self::Fin,
            7 => Self::Reset,
            8 => Self::Stop,
            9 => Self::Move,
            10 => Self::Attach,
            11 => Self::Ping,
            12 => Self::GoAway,
            13 => Self::Join,
            unknown => return Err(CodecError::UnknownType(unknown)),
        })
    }

    fn accepts(self, length: usize) -> bool {
        match self {
            Self::Open => (1..=MAX_HEADER).contains(&length),
            Self::Opened | Self::Fin | Self::Ping | Self::GoAway => length == 0,
            Self::Refused => length == 1,
            Self::Data => length > 0,
            Self::Credit | Self::Reset | Self::Stop => length == 4,
            Self::Move => length == 8,
            Self::Attach | Self::Join => length == LANE_TOKEN + 4,
        }
    }

    fn is_for_lane(self) -> bool {
        matches!(self, Self::Ping | Self::GoAway)
    }
}

/// One frame, or one piece of a DATA frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Opens a stream; the payload is a stream header.
    Open {
        stream: u32,
        header: Bytes,
    },
    Opened {
        stream: u32,
    },
    Refused {
        stream: u32,
        code: u8,
    },
    /// Some bytes of the stream, never empty.
    Data {
        stream: u32,
        bytes: &'a [u8],
    },
    /// The receiver takes this many bytes more.
    Credit {
        stream: u32,
        bytes: u32,
    },
    /// The sender has said everything.
    Fin {
        stream: u32,
    },
    /// The sender gives up.
    Reset {
        stream: u32,
        code: ResetCode,
    },
    /// The receiver wants no more.
    Stop {
        stream: u32,
        code: ResetCode,
    },
    /// The sender goes on elsewhere; it sent exactly `offset` bytes here.
    Move {
        stream: u32,
        offset: u64,
    },
    /// Opens a stream that continues stream `origin` of the lane `token`, alone and without credit.
    Attach {
        stream: u32,
        token: LaneToken,
        origin: u32,
    },
    /// Opens a stream that continues stream `origin` of the lane `token`, among others and without any credit at first.
    Join {
        stream: u32,
        token: LaneToken,
        origin: u32,
    },
    /// A sign of life.
    Ping,
    /// The sender takes no new streams.
    GoAway,
}

impl Frame<'_> {
    /// Appends the frame. For DATA, of at most [`MAX_PAYLOAD`] bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Open { stream, header } => put(out, Kind::Open, *stream, header),
            Self::Opened { stream } => put(out, Kind::Opened, *stream, &[]),
            Self::Refused { stream, code } => put(out, Kind::Refused, *stream, &[*code]),
            Self::Data { stream, bytes } => put(out, Kind::Data, *stream, bytes),
            Self::Credit { stream, bytes } => put(out, Kind::Credit, *stream, &bytes.to_be_bytes()),
            Self::Fin { stream } => put(out, Kind::Fin, *stream, &[]),
            Self::Reset { stream, code } => put(out, Kind::Reset, *stream, &code.0.to_be_bytes()),
            Self::Stop { stream, code } => put(out, Kind::Stop, *stream, &code.0.to_be_bytes()),
            Self::Move { stream, offset } => put(out, Kind::Move, *stream, &offset.to_be_bytes()),
            Self::Attach { stream, token, origin } => put(out, Kind::Attach, *stream, &origin_payload(token, *origin)),
            Self::Join { stream, token, origin } => put(out, Kind::Join, *stream, &origin_payload(token, *origin)),
            Self::Ping => put(out, Kind::Ping, 0, &[]),
            Self::GoAway => put(out, Kind::GoAway, 0, &[]),
        }
    }
}

fn origin_payload(token: &LaneToken, origin: u32) -> [u8; LANE_TOKEN + 4] {
    let mut payload = [0; LANE_TOKEN + 4];
    payload[..LANE_TOKEN].copy_from_slice(token);
    payload[LANE_TOKEN..].copy_from_slice(&origin.to_be_bytes());
    payload
}

/// Appends the head of a DATA frame whose payload follows by other means.
pub fn put_data_head(out: &mut Vec<u8>, stream: u32, length: usize) {
    put_head(out, Kind::Data, stream, length);
}

fn put(out: &mut Vec<u8>, kind: Kind, stream: u32, payload: &[u8]) {
    put_head(out, kind, stream, payload.len());
    out.extend_from_slice(payload);
}

fn put_head(out: &mut Vec<u8>, kind: Kind, stream: u32, length: usize) {
    let length = u16::try_from(length).expect("senders keep payloads within MAX_PAYLOAD and MAX_CONTROL_PAYLOAD");
    let mut head = [0; HEAD];
    head[0] = kind as u8;
    head[2..4].copy_from_slice(&length.to_be_bytes());
    head[4..].copy_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&head);
}

#[derive(Debug)]
enum Progress {
    Head,
    Control { kind: Kind, stream: u32, length: usize },
    Data { stream: u32, left: usize },
}

/// Cuts a byte stream into frames, however it is chopped up.
#[derive(Debug)]
pub struct Decoder {
    progress: Progress,
    /// The begun head or control payload.
    gathered: Vec<u8>,
    heads: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { progress: Progress::Head, gathered: Vec::new(), heads: 0 }
    }
}

impl Decoder {
    /// Whether a head or a frame other than DATA has begun and not ended.
    #[must_use]
    pub fn is_inside_frame(&self) -> bool {
        match self.progress {
            Progress::Head => !self.gathered.is_empty(),
            Progress::Control { .. } => true,
            Progress::Data { .. } => false,
        }
    }

    /// Heads seen: tells one unfinished frame from the next.
    #[must_use]
    pub fn heads(&self) -> u64 {
        self.heads
    }

    /// Takes the next frame off the front of `input`; `None` when all of it is used up.
    ///
    /// # Errors
    /// If the bytes are no frame; the decoder must not be used any more.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Frame<'a>>, CodecError> {
        loop {
            match self.progress {
                Progress::Head => {
                    let Some(head) = self.gather(input, HEAD) else { return Ok(None) };
                    let head: [u8; HEAD] = head.try_into().expect("gather returns as many bytes as asked for");
                    self.gathered.clear();
                    self.heads += 1;
                    self.progress = begin(head)?;
                }
                Progress::Data { stream, left } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let (bytes, rest) = input.split_at(left.min(input.len()));
                    *input = rest;
                    self.progress = match left - bytes.len() {
                        0 => Progress::Head,
                        left => Progress::Data { stream, left },
                    };
                    return Ok(Some(Frame::Data { stream, bytes }));
                }
                Progress::Control { kind, stream, length } => {
                    let Some(payload) = self.gather(input, length) else { return Ok(None) };
                    let frame = control(kind, stream, payload);
                    self.gathered.clear();
                    self.progress = Progress::Head;
                    return Ok(Some(frame));
                }
            }
        }
    }

    /// Moves bytes over until `wanted` are there; `None` if `input` ends before.
    fn gather(&mut self, input: &mut &[u8], wanted: usize) -> Option<&[u8]> {
        let (taken, rest) = input.split_at((wanted - self.gathered.len()).min(input.len()));
        self.gathered.extend_from_slice(taken);
        *input = rest;
        (self.gathered.len() == wanted).then_some(&self.gathered)
    }
}

fn begin(head: [u8; HEAD]) -> Result<Progress, CodecError> {
    let kind = Kind::parse(head[0])?;
    if head[1] != 0 {
        return Err(CodecError::Flags(head[1]));
    }
    let length = u16::from_be_bytes([head[2], head[3]]);
    let stream = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    if !kind.accepts(usize::from(length)) {
        return Err(CodecError::Length { kind: head[0], length });
    }
    if kind.is_for_lane() != (stream == 0) {
        return Err(CodecError::Stream(head[0]));
    }
    let length = usize::from(length);
    Ok(if kind == Kind::Data {
        Progress::Data { stream, left: length }
    } else {
        Progress::Control { kind, stream, length }
    })
}

/// `payload` has the length that `Kind::accepts` demands.
fn control(kind: Kind, stream: u32, payload: &[u8]) -> Frame<'static> {
    let word = |at: usize| payload[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte));
    match kind {
        Kind::Open => Frame::Open { stream, header: Bytes::copy_from_slice(payload) },
        Kind::Opened => Frame::Opened { stream },
        Kind::Refused => Frame::Refused { stream, code: payload[0] },
        Kind::Credit => Frame::Credit { stream, bytes: word(0) },
        Kind::Fin => Frame::Fin { stream },
        Kind::Reset => Frame::Reset { stream, code: ResetCode(word(0)) },
        Kind::Stop => Frame::Stop { stream, code: ResetCode(word(0)) },
        Kind::Move => Frame::Move { stream, offset: u64::from(word(0)) << 32 | u64::from(word(4)) },
        Kind::Attach | Kind::Join => {
            let mut token = [0; LANE_TOKEN];
            token.copy_from_slice(&payload[..LANE_TOKEN]);
            let origin = word(LANE_TOKEN);
            if kind == Kind::Attach {
                Frame::Attach { stream, token, origin }
            } else {
                Frame::Join { stream, token, origin }
            }
        }
        Kind::Ping => Frame::Ping,
        Kind::GoAway => Frame::GoAway,
        Kind::Data => unreachable!("DATA is handed on piece by piece"),
    }
}
