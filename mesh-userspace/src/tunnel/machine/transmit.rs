//! What a lane writes next: small pieces gathered in one buffer, large payloads by reference, in order.

use crate::tunnel::codec::{self, Frame};
use bytes::Bytes;
use std::io::IoSlice;

/// Payloads below this are copied next to their head: one more slice would cost more than the copy.
const COPY_BELOW: usize = 1024;

/// A batch of frames ready for one write.
#[derive(Debug, Default)]
pub struct Transmit {
    flat: Vec<u8>,
    /// A large payload that comes after this many bytes of `flat`.
    cuts: Vec<(usize, Bytes)>,
    length: usize,
}

impl Transmit {
    pub fn clear(&mut self) {
        self.flat.clear();
        self.cuts.clear();
        self.length = 0;
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The batch as slices in order.
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut slices = Vec::with_capacity(2 * self.cuts.len() + 1);
        let mut start = 0;
        for (end, payload) in &self.cuts {
            slices.push(IoSlice::new(&self.flat[start..*end]));
            slices.push(IoSlice::new(payload));
            start = *end;
        }
        if start < self.flat.len() {
            slices.push(IoSlice::new(&self.flat[start..]));
        }
        slices
    }

    pub(super) fn control(&mut self, frame: &Frame<'_>) {
        let before = self.flat.len();
        frame.encode(&mut self.flat);
        self.length += self.flat.len() - before;
    }

    pub(super) fn payload(&mut self, stream: u32, bytes: Bytes) {
        codec::put_data_head(&mut self.flat, stream, bytes.len());
        self.length += codec::HEAD + bytes.len();
        if bytes.len() < COPY_BELOW {
            self.flat.extend_from_slice(&bytes);
        } else {
            self.cuts.push((self.flat.len(), bytes));
        }
    }
}
