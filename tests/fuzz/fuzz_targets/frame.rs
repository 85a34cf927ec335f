//! A peer's bytes inside a lane: the first byte picks the side and how the rest is chopped up.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mesh_userspace::tunnel::machine::{Bounds, Event, Machine, Side, Transmit};

const BOUNDS: Bounds = Bounds { max_streams: 8, window: 1024, send_buffer: 256, max_unread: 2048 };

fuzz_target!(|input: &[u8]| {
    let Some((&choice, bytes)) = input.split_first() else { return };
    let side = if choice & 1 == 0 { Side::Server } else { Side::Client };
    let mut machine = Machine::new(side, BOUNDS);
    if side == Side::Client {
        machine.open(Bytes::from_static(b"header")).expect("a new lane has room");
    }
    for chunk in bytes.chunks(1 + usize::from(choice >> 1)) {
        if machine.handle_input(chunk).is_err() {
            return;
        }
        while let Some(event) = machine.poll_event() {
            match event {
                Event::Offered { id, .. } | Event::Attaching { id, .. } => machine.accept(id),
                Event::Readable { id } => drop(machine.recv(id)),
                _ => {}
            }
        }
        assert!(machine.streams() <= BOUNDS.max_streams);
        machine.poll_transmit(&mut Transmit::default(), 1 << 16);
    }
});
