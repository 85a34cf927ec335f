//! Bytes that both ends can compute, and their hash.

use aws_lc_rs::digest::{Context, SHA256};
use std::fmt::Write;

/// An endless stream of bytes that depends on a seed only (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    state: u64,
    rest: Vec<u8>,
}

impl Pattern {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed, rest: Vec::new() }
    }

    /// The next number of the stream.
    pub(crate) fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills a buffer with the stream's next bytes; how they are cut into buffers makes no difference.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        let mut filled = 0;
        while filled < buffer.len() {
            if self.rest.is_empty() {
                self.rest = self.number().to_le_bytes().to_vec();
            }
            let count = self.rest.len().min(buffer.len() - filled);
            buffer[filled..filled + count].copy_from_slice(&self.rest[..count]);
            self.rest.drain(..count);
            filled += count;
            // Whole words need no rest.
            while buffer.len() - filled >= 8 && self.rest.is_empty() {
                buffer[filled..filled + 8].copy_from_slice(&self.number().to_le_bytes());
                filled += 8;
            }
        }
    }
}

/// SHA-256 of a stream.
pub(crate) struct Hash(Context);

impl Hash {
    pub(crate) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn hex(self) -> String {
        self.0.finish().as_ref().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_does_not_depend_on_how_it_is_cut() {
        let mut whole = vec![0; 1_000];
        Pattern::new(7).fill(&mut whole);
        let mut pattern = Pattern::new(7);
        let mut cut = Vec::new();
        for size in [1, 7, 8, 9, 100, 3, 872] {
            let mut part = vec![0; size];
            pattern.fill(&mut part);
            cut.extend(part);
        }
        assert_eq!(cut, whole);
        let mut other = vec![0; 1_000];
        Pattern::new(8).fill(&mut other);
        assert_ne!(other, whole);
    }

    #[test]
    fn the_hash_is_sha_256() {
        let mut hash = Hash::new();
        hash.update(b"a");
        hash.update(b"bc");
        assert_eq!(hash.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
