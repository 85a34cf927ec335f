//! Frames on the wire and back, and what is refused.

use super::*;
use proptest::prelude::*;

/// Frames as they come out of the decoder, with DATA pieces joined again.
fn decode(chunks: &[&[u8]]) -> Result<Vec<Frame<'static>>, CodecError> {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for chunk in chunks {
        let mut input = *chunk;
        while let Some(frame) = decoder.next(&mut input)? {
            if let Frame::Data { stream, bytes } = frame {
                frames.push(Frame::Data { stream, bytes: bytes.to_vec().leak() });
            } else {
                frames.push(own(frame));
            }
        }
        assert!(input.is_empty());
    }
    Ok(frames)
}

fn own(frame: Frame<'_>) -> Frame<'static> {
    match frame {
        Frame::Open { stream, header } => Frame::Open { stream, header },
        Frame::Opened { stream } => Frame::Opened { stream },
        Frame::Refused { stream, code } => Frame::Refused { stream, code },
        Frame::Data { .. } => unreachable!(),
        Frame::Credit { stream, bytes } => Frame::Credit { stream, bytes },
        Frame::Fin { stream } => Frame::Fin { stream },
        Frame::Reset { stream, code } => Frame::Reset { stream, code },
        Frame::Stop { stream, code } => Frame::Stop { stream, code },
        Frame::Move { stream, offset } => Frame::Move { stream, offset },
        Frame::Attach { stream, token, origin } => Frame::Attach { stream, token, origin },
        Frame::Join { stream, token, origin } => Frame::Join { stream, token, origin },
        Frame::Ping => Frame::Ping,
        Frame::GoAway => Frame::GoAway,
    }
}

fn frame() -> impl Strategy<Value = Frame<'static>> {
    let stream = 1..=u32::MAX;
    prop_oneof![
        (stream.clone(), proptest::collection::vec(any::<u8>(), 1..=MAX_HEADER))
            .prop_map(|(stream, header)| Frame::Open { stream, header: header.into() }),
        stream.clone().prop_map(|stream| Frame::Opened { stream }),
        (stream.clone(), any::<u8>()).prop_map(|(stream, code)| Frame::Refused { stream, code }),
        (stream.clone(), proptest::collection::vec(any::<u8>(), 1..2000))
            .prop_map(|(stream, bytes)| Frame::Data { stream, bytes: bytes.leak() }),
        (stream.clone(), any::<u32>()).prop_map(|(stream, bytes)| Frame::Credit { stream, bytes }),
        stream.clone().prop_map(|stream| Frame::Fin { stream }),
        (stream.clone(), any::<u32>()).prop_map(|(stream, code)| Frame::Reset { stream, code: ResetCode(code) }),
        (stream.clone(), any::<u32>()).prop_map(|(stream, code)| Frame::Stop { stream, code: ResetCode(code) }),
        (stream.clone(), any::<u64>()).prop_map(|(stream, offset)| Frame::Move { stream, offset }),
        (stream, any::<LaneToken>(), any::<u32>(), any::<bool>()).prop_map(|(stream, token, origin, is_alone)| {
            if is_alone { Frame::Attach { stream, token, origin } } else { Frame::Join { stream, token, origin } }
        }),
        Just(Frame::Ping),
        Just(Frame::GoAway),
    ]
}

/// Joins neighbouring DATA pieces of one stream.
fn joined(frames: Vec<Frame<'static>>) -> Vec<Frame<'static>> {
    let mut out: Vec<Frame<'static>> = Vec::new();
    for frame in frames {
        if let (Some(Frame::Data { stream: a, bytes: head }), Frame::Data { stream: b, bytes: tail }) =
            (out.last_mut(), &frame)
            && *a == *b
        {
            *head = [*head, *tail].concat().leak();
        } else {
            out.push(frame);
        }
    }
    out
}

proptest! {
    #[test]
    fn frames_survive_any_chopping(
        frames in proptest::collection::vec(frame(), 1..12),
        cuts in proptest::collection::vec(1_usize..300, 1..40),
    ) {
        let mut wire = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut wire));
        let mut chunks = Vec::new();
        let mut rest = wire.as_slice();
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (chunk, tail) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            chunks.push(chunk);
            rest = tail;
        }
        prop_assert_eq!(joined(decode(&chunks).unwrap()), joined(frames));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = decode(&[&bytes]);
    }
}

fn head(kind: u8, flags: u8, length: u16, stream: u32) -> Vec<u8> {
    let mut out = vec![kind, flags];
    out.extend(length.to_be_bytes());
    out.extend(stream.to_be_bytes());
    out
}

#[test]
fn malformed_heads_are_refused_before_their_payload_arrives() {
    let refused = |bytes: Vec<u8>| decode(&[&bytes]).unwrap_err();
    assert_eq!(refused(head(0, 0, 0, 1)), CodecError::UnknownType(0));
    assert_eq!(refused(head(99, 0, 0, 1)), CodecError::UnknownType(99));
    assert_eq!(refused(head(4, 1, 5, 1)), CodecError::Flags(1));
    assert_eq!(refused(head(1, 0, 1025, 1)), CodecError::Length { kind: 1, length: 1025 });
    assert_eq!(refused(head(1, 0, 0, 1)), CodecError::Length { kind: 1, length: 0 });
    assert_eq!(refused(head(4, 0, 0, 1)), CodecError::Length { kind: 4, length: 0 });
    assert_eq!(refused(head(5, 0, 3, 1)), CodecError::Length { kind: 5, length: 3 });
    assert_eq!(refused(head(9, 0, 65535, 1)), CodecError::Length { kind: 9, length: 65535 });
    assert_eq!(refused(head(4, 0, 5, 0)), CodecError::Stream(4));
    assert_eq!(refused(head(11, 0, 0, 7)), CodecError::Stream(11));
}
