//! The machine against itself: random calls, random delivery, and what must hold whatever happens.

use super::{Bounds, Event, Machine, Received, Side, Transmit};
use crate::tunnel::codec::{Frame, LaneToken};
use crate::tunnel::{Refusal, ResetCode};
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::VecDeque;

pub(super) const BOUNDS: Bounds = Bounds { max_streams: 4, window: 64, send_buffer: 32, max_unread: 100 };
pub(super) const TOKEN: LaneToken = [7; 16];

/// One lane: two machines and the bytes between them.
pub(super) struct Pair {
    pub(super) ends: [Machine; 2],
    wires: [VecDeque<u8>; 2],
}

impl Pair {
    pub(super) fn new(bounds: Bounds) -> Self {
        let ends = [Machine::new(Side::Client, bounds), Machine::new(Side::Server, bounds)];
        Self { ends, wires: [VecDeque::new(), VecDeque::new()] }
    }

    /// Writes what end `from` has onto its wire.
    pub(super) fn write(&mut self, from: usize, limit: usize) {
        let mut transmit = Transmit::default();
        self.ends[from].poll_transmit(&mut transmit, limit);
        for slice in transmit.slices() {
            self.wires[from].extend(slice.iter());
        }
    }

    /// Delivers up to `count` bytes of end `from`, if the other one reads.
    pub(super) fn deliver(&mut self, from: usize, count: usize) -> usize {
        let to = &mut self.ends[1 - from];
        if !to.wants_read() {
            return 0;
        }
        let count = count.min(self.wires[from].len());
        let bytes: Vec<u8> = self.wires[from].drain(..count).collect();
        to.handle_input(&bytes).unwrap();
        count
    }

    pub(super) fn exchange(&mut self) {
        for _ in 0..4 {
            for from in [0, 1] {
                self.write(from, 1 << 20);
                self.deliver(from, usize::MAX);
            }
        }
    }

    pub(super) fn events(&mut self, end: usize) -> Vec<Event> {
        std::iter::from_fn(|| self.ends[end].poll_event()).collect()
    }

    pub(super) fn opened(bounds: Bounds) -> (Self, u32) {
        let mut pair = Self::new(bounds);
        let id = pair.ends[0].open(Bytes::from_static(b"header")).unwrap();
        pair.exchange();
        pair.ends[1].accept(id);
        pair.exchange();
        assert_eq!(pair.ends[0].answer(id), Some(Ok(())));
        (pair, id)
    }
}

fn release(machine: &mut Machine, id: u32) {
    machine.release_send(id);
    machine.stop(id, ResetCode::CANCELLED);
}

#[test]
fn a_stream_opens_carries_bytes_half_closes_and_leaves_nothing_behind() {
    let (mut pair, id) = Pair::opened(BOUNDS);
    pair.ends[0].send(id, Bytes::from_static(b"hello"));
    pair.ends[0].finish(id).unwrap();
    pair.exchange();
    assert_eq!(pair.ends[1].recv(id), Received::Bytes(Bytes::from_static(b"hello")));
    assert_eq!(pair.ends[1].recv(id), Received::Finished);
    pair.ends[1].send(id, Bytes::from_static(b"bye"));
    pair.exchange();
    assert_eq!(pair.ends[0].recv(id), Received::Bytes(Bytes::from_static(b"bye")));
    assert_eq!(pair.ends[0].recv(id), Received::Pending);
    pair.ends[1].finish(id).unwrap();
    pair.exchange();
    assert_eq!(pair.ends[0].recv(id), Received::Finished);
    for end in 0..2 {
        assert_eq!(pair.ends[end].streams(), 1);
        release(&mut pair.ends[end], id);
        assert_eq!(pair.ends[end].streams(), 0);
        assert!(pair.events(end).contains(&Event::Closed { id }));
    }
    pair.exchange();
    assert!(!pair.ends[0].has_transmit() && !pair.ends[1].has_transmit());
}

#[test]
fn a_refusal_ends_the_stream_on_both_ends() {
    let mut pair = Pair::new(BOUNDS);
    let id = pair.ends[0].open(Bytes::from_static(b"header")).unwrap();
    pair.exchange();
    assert_eq!(pair.events(1), [Event::Offered { id, header: Bytes::from_static(b"header") }]);
    pair.ends[1].refuse(id, 3);
    pair.exchange();
    assert_eq!(pair.ends[0].answer(id), Some(Err(3)));
    pair.ends[0].abandon(id, ResetCode::CANCELLED);
    assert_eq!((pair.ends[0].streams(), pair.ends[1].streams()), (0, 0));
}

#[test]
fn a_stream_abandoned_before_its_answer_leaves_nothing_behind() {
    for is_accepted in [true, false] {
        let mut pair = Pair::new(BOUNDS);
        let id = pair.ends[0].open(Bytes::from_static(b"header")).unwrap();
        pair.exchange();
        pair.ends[0].abandon(id, ResetCode::CANCELLED);
        pair.exchange();
        if is_accepted {
            pair.ends[1].accept(id);
            assert_eq!(pair.ends[1].recv(id), Received::Reset(ResetCode::CANCELLED));
            release(&mut pair.ends[1], id);
        } else {
            pair.ends[1].refuse(id, 1);
        }
        pair.exchange();
        assert_eq!((pair.ends[0].streams(), pair.ends[1].streams()), (0, 0), "accepted: {is_accepted}");
    }
}

#[test]
fn streams_beyond_the_bound_and_on_a_draining_lane_are_refused() {
    let mut pair = Pair::new(BOUNDS);
    // The server's bound is smaller than the client's.
    pair.ends[1] = Machine::new(Side::Server, Bounds { max_streams: 1, ..BOUNDS });
    let first = pair.ends[0].open(Bytes::from_static(b"1")).unwrap();
    let second = pair.ends[0].open(Bytes::from_static(b"2")).unwrap();
    pair.exchange();
    assert_eq!(pair.ends[0].answer(first), None);
    assert_eq!(pair.ends[0].answer(second), Some(Err(Refusal::Overloaded.code())));
    pair.ends[1].go_away();
    let late = pair.ends[0].open(Bytes::from_static(b"3")).unwrap();
    pair.write(0, 1 << 20);
    pair.exchange();
    assert_eq!(pair.ends[0].answer(late), Some(Err(Refusal::Draining.code())));
    assert!(pair.ends[0].is_draining() && pair.ends[0].open(Bytes::from_static(b"4")).is_err());
    pair.ends[1].accept(first);
    pair.exchange();
    assert_eq!(pair.ends[0].answer(first), Some(Ok(())), "what was open goes on");
}

#[test]
fn a_sender_stops_after_the_window_and_its_own_buffer() {
    let (mut pair, id) = Pair::opened(BOUNDS);
    let mut taken = 0;
    while pair.ends[0].has_room(id).unwrap() {
        pair.ends[0].send(id, Bytes::from_static(&[1; 10]));
        taken += 10;
        pair.exchange();
    }
    assert!((64 + 32..64 + 32 + 10).contains(&taken), "{taken}");
    pair.events(0);
    // Once the reader wakes, the sender is told.
    let mut read = 0;
    while let Received::Bytes(bytes) = pair.ends[1].recv(id) {
        read += bytes.len();
        pair.exchange();
    }
    assert_eq!(read, taken);
    assert!(pair.events(0).contains(&Event::Writable { id }));
}

#[test]
fn a_peer_that_overruns_its_credit_is_caught() {
    let mut server = Machine::new(Side::Server, BOUNDS);
    let mut bytes = Vec::new();
    Frame::Open { stream: 1, header: Bytes::from_static(b"header") }.encode(&mut bytes);
    Frame::Data { stream: 1, bytes: &[0; 65] }.encode(&mut bytes);
    let error = server.handle_input(&bytes).unwrap_err();
    assert_eq!((error, error.reason()), (super::MachineError::CreditExceeded(1), "credit"));
}

#[test]
fn a_peer_that_is_owed_too_many_answers_is_caught() {
    let mut server = Machine::new(Side::Server, Bounds { max_streams: 0, ..BOUNDS });
    let mut bytes = Vec::new();
    for stream in 1..2000 {
        Frame::Open { stream, header: Bytes::from_static(b"header") }.encode(&mut bytes);
    }
    assert_eq!(server.handle_input(&bytes), Err(super::MachineError::Flood));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_and_memory_stays_bounded(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        is_client in any::<bool>(),
    ) {
        let mut machine = Machine::new(if is_client { Side::Client } else { Side::Server }, BOUNDS);
        let _ = machine.handle_input(&bytes);
        prop_assert!(machine.streams() <= BOUNDS.max_streams);
    }

    #[test]
    fn any_sequence_of_frames_never_panics(
        frames in proptest::collection::vec((0_u8..12, 0_u32..6, 0_u32..100), 0..200),
    ) {
        let mut machine = Machine::new(Side::Server, BOUNDS);
        for (kind, stream, number) in frames {
            let mut bytes = Vec::new();
            hostile(kind, stream, number).encode(&mut bytes);
            if machine.handle_input(&bytes).is_err() {
                break;
            }
            match number % 5 {
                0 => machine.accept(stream),
                1 => machine.refuse(stream, 1),
                2 => drop(machine.recv(stream)),
                3 => machine.send(stream, Bytes::from_static(b"answer")),
                _ => machine.poll_transmit(&mut Transmit::default(), 100),
            }
            prop_assert!(machine.streams() <= BOUNDS.max_streams);
        }
    }
}

fn hostile(kind: u8, stream: u32, number: u32) -> Frame<'static> {
    let code = ResetCode(number);
    match kind {
        0 | 1 => Frame::Open { stream, header: Bytes::from_static(b"header") },
        2 => Frame::Opened { stream },
        3 => Frame::Refused { stream, code: 1 },
        4 => Frame::Data { stream, bytes: &[0; 100][..1 + number as usize % 99] },
        5 => Frame::Credit { stream, bytes: number },
        6 => Frame::Fin { stream },
        7 => Frame::Reset { stream, code },
        8 => Frame::Stop { stream, code },
        9 => Frame::Move { stream, offset: u64::from(number) },
        10 => Frame::Attach { stream, token: TOKEN, origin: number },
        _ => Frame::GoAway,
    }
}
