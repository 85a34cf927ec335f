//! Mutated seeds for everything that parses a peer's bytes: bounded, and the same on every run. The same seeds serve
//! the coverage-guided targets in `tests/fuzz`.

use crate::tunnel::codec::Decoder;
use crate::tunnel::machine::{Bounds, Event, Machine, Side, Transmit};
use crate::tunnel::{Refusal, StreamHeader};
use std::fs;
use std::path::Path;

const MUTATIONS: u64 = 20_000;

fn seeds(kind: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(kind);
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 5, "{} seeds in {}", paths.len(), folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// xorshift64*: enough to mutate with, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(6) {
                _ if bytes.is_empty() => bytes.push(self.next() as u8),
                0 => bytes[at] = self.next() as u8,
                1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next() as u8),
                4 => bytes.extend_from_slice(&seeds[self.below(seeds.len())]),
                _ => {
                    let copied = bytes[at..].to_vec();
                    bytes.extend(copied);
                }
            }
        }
        bytes
    }
}

fn frames(bytes: &[u8], random: &mut Random) {
    let mut decoder = Decoder::default();
    let mut rest = bytes;
    while let Ok(Some(_)) = decoder.next(&mut rest) {}
    let bounds = Bounds { max_streams: 8, window: 1024, send_buffer: 256, max_unread: 2048 };
    for side in [Side::Client, Side::Server] {
        let mut machine = Machine::new(side, bounds);
        if side == Side::Client {
            machine.open(bytes::Bytes::from_static(b"header")).unwrap();
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let (chunk, tail) = rest.split_at(1 + random.below(rest.len()));
            rest = tail;
            if machine.handle_input(chunk).is_err() {
                break;
            }
            while let Some(event) = machine.poll_event() {
                match event {
                    Event::Offered { id, .. } | Event::Attaching { id, .. } if random.below(4) > 0 => {
                        machine.accept(id);
                    }
                    Event::Offered { id, .. } | Event::Attaching { id, .. } => {
                        machine.refuse(id, Refusal::Denied.code());
                    }
                    Event::Readable { id } => drop(machine.recv(id)),
                    _ => {}
                }
            }
            assert!(machine.streams() <= bounds.max_streams);
            machine.poll_transmit(&mut Transmit::default(), 1 << 16);
        }
    }
}

#[test]
fn mutated_frames_never_panic() {
    let seeds = seeds("frame");
    let mut random = Random(0x6E6F_6465_6D65_7368);
    seeds.iter().for_each(|seed| frames(seed, &mut random));
    for _ in 0..MUTATIONS {
        let bytes = random.mutate(&seeds);
        frames(&bytes, &mut random);
    }
}

#[test]
fn mutated_headers_never_panic_and_what_is_accepted_survives_the_wire() {
    let seeds = seeds("header");
    let accepted = |bytes: &[u8]| {
        let Ok(header) = StreamHeader::decode(bytes) else { return 0 };
        if let Ok(again) = header.encode() {
            assert_eq!(StreamHeader::decode(&again), Ok(header));
        }
        1
    };
    assert!(seeds.iter().map(|seed| accepted(seed)).sum::<usize>() >= 3, "the seeds are headers");
    let mut random = Random(0x6865_6164_6572_7321);
    let survivors: usize = (0..MUTATIONS).map(|_| accepted(&random.mutate(&seeds))).sum();
    assert!(survivors > 100, "mutations reach past the first check: {survivors}");
}
