//! TCP packets with their IP header, made by hand.

use anyhow::{Result, bail};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
const SYN: u8 = 0x02;
const PUSH_ACK: u8 = 0x18;
const HOPS: u8 = 64;

/// What a packet says beside from whom and to whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    pub(crate) fn syn(sequence: u32) -> Self {
        Self { sequence, acknowledged: 0, flags: SYN, payload: &[] }
    }

    pub(crate) fn data(sequence: u32, acknowledged: u32, payload: &'a [u8]) -> Self {
        Self { sequence, acknowledged, flags: PUSH_ACK, payload }
    }
}

/// The packet. An IPv4 source for an IPv6 destination is written as IPv6 has it (`::ffff:a.b.c.d`).
pub(crate) fn encode(source: SocketAddr, destination: SocketAddr, segment: &Segment<'_>) -> Result<Vec<u8>> {
    let mut tcp = Vec::with_capacity(TCP_HEADER + segment.payload.len());
    tcp.extend(source.port().to_be_bytes());
    tcp.extend(destination.port().to_be_bytes());
    tcp.extend(segment.sequence.to_be_bytes());
    tcp.extend(segment.acknowledged.to_be_bytes());
    // Length of the header in words, flags, window, checksum (below), no urgent data.
    tcp.extend([u8::try_from(TCP_HEADER / 4 * 16)?, segment.flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(segment.payload);
    let length = u16::try_from(tcp.len())?;
    let (header, pseudo) = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let ends = [source.octets(), destination.octets()].concat();
            // Version and length, service, total length, id, fragment: the kernel fills in what is 0, and the checksum.
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, HOPS, TCP, 0, 0];
            header[2..4].copy_from_slice(&(20 + length).to_be_bytes());
            header.extend(&ends);
            (header, [ends, vec![0, TCP], length.to_be_bytes().to_vec()].concat())
        }
        (source, IpAddr::V6(destination)) => {
            let source: Ipv6Addr = match source {
                IpAddr::V4(source) => source.to_ipv6_mapped(),
                IpAddr::V6(source) => source,
            };
            let ends = [source.octets(), destination.octets()].concat();
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([TCP, HOPS]);
            header.extend(&ends);
            (header, [ends, u32::from(length).to_be_bytes().to_vec(), vec![0, 0, 0, TCP]].concat())
        }
        (source, destination) => bail!("no packet goes from {source} to {destination}"),
    };
    let checksum = checksum(&[pseudo.as_slice(), &tcp].concat());
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    Ok([header, tcp].concat())
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(u16::try_from(sum).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_that_includes_its_checksum_sums_up_to_nothing() {
        for (source, destination) in [("10.0.0.1:1", "10.0.0.2:80"), ("[fd00::1]:1", "[fd00::2]:80")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let packet = encode(source, destination, &Segment::data(7, 9, b"odd")).unwrap();
            let is_v4 = packet[0] == 0x45;
            let tcp = &packet[if is_v4 { 20 } else { 40 }..];
            assert_eq!((tcp.len(), &tcp[20..]), (23, &b"odd"[..]));
            let ends = if is_v4 { &packet[12..20] } else { &packet[8..40] };
            assert_eq!(checksum(&[ends, &[0, TCP, 0, 23], tcp].concat()), 0);
        }
        assert!(encode("[fd00::1]:1".parse().unwrap(), "10.0.0.2:80".parse().unwrap(), &Segment::syn(0)).is_err());
    }
}
