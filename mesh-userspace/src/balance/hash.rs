//! Numbers from numbers: hashes that every node and every release agree on, and more randomness from some.

use std::net::{IpAddr, SocketAddr};

/// Mixes a number so that each bit of the result hangs on each bit of it (SplitMix64's finalizer).
pub(super) fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Hashes two numbers, in their order.
pub(super) fn pair(left: u64, right: u64) -> u64 {
    mix(mix(left.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ right)
}

/// Hashes an address; an IPv4 address and its IPv4-mapped form are the same.
pub(super) fn ip(address: IpAddr) -> u64 {
    let bits = match address.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    };
    // Both halves, truncated on purpose.
    pair((bits >> 64) as u64, bits as u64)
}

/// Hashes an address and its port.
pub(super) fn socket(address: SocketAddr) -> u64 {
    pair(ip(address.ip()), u64::from(address.port()))
}

/// Maps 0..2^64 onto 0..`total` evenly, and in order: the bias is below `total` / 2^64, and no modulo is needed.
pub(super) fn scale(random: u64, total: u64) -> u64 {
    // The product's upper half is below `total`.
    ((u128::from(random) * u128::from(total)) >> 64) as u64
}

/// As much randomness as a pick needs, from the one number that it is given (SplitMix64). The first number is the given
/// one itself.
pub(super) struct Draws {
    next: u64,
    state: u64,
}

impl Draws {
    pub(super) fn new(random: u64) -> Self {
        Self { next: random, state: random }
    }

    pub(super) fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        std::mem::replace(&mut self.next, mix(self.state))
    }
}
