//! What strangers send, mutated: the token's text and the signing request. The same seeds serve the coverage-guided
//! targets in `tests/fuzz`.

use crate::ca::{Token, csr};
use std::fs;
use std::path::Path;

const MUTATIONS: u64 = 20_000;
const URI: &str = "spiffe://example.org/ns/shop/sa/cart";

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
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len() + 1);
            let to = (at + self.below(16)).min(bytes.len());
            match self.below(6) {
                0 => drop(bytes.drain(at..to)),
                1 => {
                    let piece = bytes[at..to].to_vec();
                    bytes.splice(at..at, piece);
                }
                2 => bytes.truncate(at),
                3 => {
                    let other = &seeds[self.below(seeds.len())];
                    let from = self.below(other.len() + 1);
                    bytes.splice(at..to, other[from..].iter().copied());
                }
                _ if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                _ => bytes.push(self.next() as u8),
            }
        }
        bytes
    }
}

#[test]
fn mutated_tokens_never_panic_and_what_is_read_is_written_the_same() {
    let seeds = seeds("token");
    let mut random = Random(0x746f_6b65_6e73);
    let mut accepted = 0;
    for _ in 0..MUTATIONS {
        let bytes = random.mutate(&seeds);
        let Ok(text) = std::str::from_utf8(&bytes) else { continue };
        if let Ok(token) = text.parse::<Token>() {
            assert_eq!(token.reveal().as_str(), text, "one token, one spelling");
            accepted += 1;
        }
    }
    assert!(accepted > MUTATIONS / 200, "{accepted} accepted: the mutations are one-sided");
}

#[test]
fn mutated_signing_requests_never_panic_and_none_but_the_sound_is_accepted() {
    let seeds = seeds("csr");
    let sound: Vec<_> = seeds.iter().filter(|seed| csr::check(seed, URI).is_ok()).collect();
    assert!(!sound.is_empty() && sound.len() < seeds.len(), "seeds of both kinds");
    let mut random = Random(0x6373_7273);
    for _ in 0..MUTATIONS / 4 {
        let bytes = random.mutate(&seeds);
        // Every byte of a request is signed, or is the signature.
        assert!(csr::check(&bytes, URI).is_err() || sound.contains(&&bytes), "{bytes:02x?}");
    }
}
