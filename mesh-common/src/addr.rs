//! Addresses as the kernel and the daemon exchange them: one 16-byte shape for IPv4 and IPv6.

use crate::abi::pod;

/// An IP address in network byte order; IPv4 is stored v4-mapped (`::ffff:a.b.c.d`), so that one key shape serves both
/// families and an AF_INET6 socket that speaks to a mapped address finds the same entries.
///
/// Four words, because that is how the kernel's program contexts hold addresses: loads, stores and comparisons are a
/// handful of instructions instead of sixteen.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
pub struct Ip([u32; 4]);

/// The third word of a v4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Ip {
    /// `::`; in a record: no address.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// An IPv4 address from its octets.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        Self([0, 0, MAPPED, u32::from_ne_bytes(octets)])
    }

    /// An IPv6 (or v4-mapped) address from its octets.
    #[inline(always)]
    #[must_use]
    pub const fn from_v6(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ])
    }

    /// From the words of a program context's `*_ip6` field: each as it lies in memory, in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The words as a program context's `*_ip6` field takes them; the last one is what an `*_ip4` field takes.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// The 16 octets in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let [w, x, y, z] = self.0;
        let ([a, b, c, d], [e, f, g, h]) = (w.to_ne_bytes(), x.to_ne_bytes());
        let ([i, j, k, l], [m, n, o, p]) = (y.to_ne_bytes(), z.to_ne_bytes());
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// Whether this is an IPv4 address (stored v4-mapped).
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The IPv4 octets of a v4-mapped address.
    #[inline(always)]
    #[must_use]
    pub const fn v4_octets(&self) -> Option<[u8; 4]> {
        if self.is_v4() { Some(self.0[3].to_ne_bytes()) } else { None }
    }

    /// 127.0.0.0/8 (mapped or not) or `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        let [w, x, y, z] = self.0;
        let v4 = self.is_v4() && z & 0xff00_0000_u32.to_be() == 0x7f00_0000_u32.to_be();
        let v6 = w == 0 && x == 0 && y == 0 && z == 1_u32.to_be();
        v4 || v6
    }

    /// `::` or `0.0.0.0` (mapped).
    #[inline(always)]
    #[must_use]
    pub const fn is_unspecified(&self) -> bool {
        let [w, x, y, z] = self.0;
        w == 0 && x == 0 && (y == 0 || y == MAPPED) && z == 0
    }
}

// Word by word: the derived comparison is a call to `bcmp`, which the BPF target does not have.
impl PartialEq for Ip {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.0, other.0);
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }
}

impl Eq for Ip {}

impl core::hash::Hash for Ip {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.octets().hash(state);
    }
}

impl Ord for Ip {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.octets().cmp(&other.octets())
    }
}

impl PartialOrd for Ip {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl core::fmt::Debug for Ip {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.v4_octets() {
            Some(v4) => core::fmt::Display::fmt(&core::net::Ipv4Addr::from(v4), f),
            None => core::fmt::Display::fmt(&core::net::Ipv6Addr::from(self.octets()), f),
        }
    }
}

#[cfg(feature = "user")]
// SAFETY: repr(transparent) over an array of integers: no padding, every bit pattern is valid.
unsafe impl aya::Pod for Ip {}

impl From<core::net::IpAddr> for Ip {
    fn from(addr: core::net::IpAddr) -> Self {
        match addr {
            core::net::IpAddr::V4(v4) => Self::from_v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self::from_v6(v6.octets()),
        }
    }
}

impl From<Ip> for core::net::IpAddr {
    fn from(ip: Ip) -> Self {
        match ip.v4_octets() {
            Some(v4) => Self::V4(v4.into()),
            None => Self::V6(ip.octets().into()),
        }
    }
}

pod! {
    /// An address and a TCP or UDP port. The port is kept in network byte order inside, as the kernel has it.
    pub struct Endpoint [20] {
        ip: Ip,
        /// Network byte order. Use [`Endpoint::port`] for the number.
        port_be: u16,
        ; reserved pad: [u8; 2]
    }
}

impl Endpoint {
    #[inline(always)]
    #[must_use]
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port_be)
    }
}

impl From<core::net::SocketAddr> for Endpoint {
    fn from(addr: core::net::SocketAddr) -> Self {
        Self::new(addr.ip().into(), addr.port().to_be())
    }
}

impl From<Endpoint> for core::net::SocketAddr {
    fn from(endpoint: Endpoint) -> Self {
        Self::new(endpoint.ip.into(), endpoint.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{IpAddr, SocketAddr};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_address_survives_the_border(addr: IpAddr, port: u16) {
            let canonical = SocketAddr::new(addr.to_canonical(), port);
            prop_assert_eq!(SocketAddr::from(Endpoint::from(SocketAddr::new(addr, port))), canonical);
        }

        #[test]
        fn loopback_agrees_with_std(addr: IpAddr) {
            prop_assert_eq!(Ip::from(addr).is_loopback(), addr.to_canonical().is_loopback());
        }

        #[test]
        fn order_and_equality_are_those_of_the_octets(a: [u8; 16], b: [u8; 16]) {
            let (x, y) = (Ip::from_v6(a), Ip::from_v6(b));
            prop_assert_eq!(x.cmp(&y), a.cmp(&b));
            prop_assert_eq!(x == y, a == b);
            prop_assert_eq!(Ip::from_words(x.words()).octets(), a);
        }
    }

    #[test]
    fn a_mapped_and_a_plain_v4_address_are_one_key() {
        let plain: IpAddr = "10.1.2.3".parse().unwrap();
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        assert_eq!(Ip::from(plain), Ip::from(mapped));
        assert!(Ip::from("127.9.9.9".parse::<IpAddr>().unwrap()).is_loopback());
        assert!(Ip::from("::1".parse::<IpAddr>().unwrap()).is_loopback());
        assert!(!Ip::from("::2".parse::<IpAddr>().unwrap()).is_loopback());
        assert!(!Ip::from("126.0.0.1".parse::<IpAddr>().unwrap()).is_loopback());
        assert!(Ip::from("0.0.0.0".parse::<IpAddr>().unwrap()).is_unspecified());
        assert!(Ip::UNSPECIFIED.is_unspecified());
        assert!(!Ip::from("0.0.0.1".parse::<IpAddr>().unwrap()).is_unspecified());
    }
}
