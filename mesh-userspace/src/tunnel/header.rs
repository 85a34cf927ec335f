//! The stream header: what the source's daemon tells the destination's about one application connection.
//!
//! A protobuf message. Unknown fields are skipped, so that daemons of different versions understand each other.

use super::codec::MAX_HEADER;
use crate::model::Protocol;
use prost::Message as _;
use std::net::{IpAddr, SocketAddr};

/// Opens one application connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// TCP, or UDP: then it opens a flow of datagrams.
    pub protocol: Protocol,
    /// The workload's address and port to dial.
    pub destination: SocketAddr,
    /// `namespace/name` of the service that the application asked for, if it asked for one.
    pub service: Option<String>,
    /// The application's own address.
    pub source: SocketAddr,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

/// Why bytes are no stream header, or a header cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the stream header has {0} bytes, more than {MAX_HEADER}")]
    TooLong(usize),
    #[error("the stream header is no protobuf message: {0}")]
    Protobuf(String),
    #[error("the stream header has no valid {0}")]
    Field(&'static str),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(message, optional, tag = "1")]
    destination: Option<WireAddress>,
    #[prost(string, optional, tag = "2")]
    service: Option<String>,
    #[prost(message, optional, tag = "3")]
    source: Option<WireAddress>,
    #[prost(string, optional, tag = "4")]
    traceparent: Option<String>,
    /// In place of `destination` where the protocol is UDP, so that a daemon that knows of no datagrams refuses the
    /// stream and does not dial by TCP.
    #[prost(message, optional, tag = "5")]
    datagrams_to: Option<WireAddress>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireAddress {
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    ip: Vec<u8>,
    #[prost(uint32, tag = "2")]
    port: u32,
}

impl From<SocketAddr> for WireAddress {
    fn from(address: SocketAddr) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        Self { ip, port: u32::from(address.port()) }
    }
}

impl WireAddress {
    fn parse(&self) -> Option<SocketAddr> {
        let ip = match *self.ip.as_slice() {
            [a, b, c, d] => IpAddr::from([a, b, c, d]),
            ref ip => IpAddr::from(<[u8; 16]>::try_from(ip).ok()?),
        };
        Some(SocketAddr::new(ip, u16::try_from(self.port).ok()?))
    }
}

impl StreamHeader {
    /// # Errors
    /// If the header would be longer than 1 KiB.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        let wire = Wire {
            destination: (self.protocol == Protocol::Tcp).then(|| self.destination.into()),
            datagrams_to: (self.protocol == Protocol::Udp).then(|| self.destination.into()),
            service: self.service.clone(),
            source: Some(self.source.into()),
            traceparent: self.traceparent.clone(),
        };
        let bytes = wire.encode_to_vec();
        if bytes.len() > MAX_HEADER { Err(HeaderError::TooLong(bytes.len())) } else { Ok(bytes) }
    }

    /// # Errors
    /// If the bytes are too many, no protobuf message, or lack a valid source or destination.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.len() > MAX_HEADER {
            return Err(HeaderError::TooLong(bytes.len()));
        }
        let wire = Wire::decode(bytes).map_err(|error| HeaderError::Protobuf(error.to_string()))?;
        let address = |address: Option<WireAddress>| address.and_then(|address| address.parse());
        let (protocol, destination) = match (wire.destination, wire.datagrams_to) {
            (None, Some(destination)) => (Protocol::Udp, Some(destination)),
            (destination, _) => (Protocol::Tcp, destination),
        };
        let destination = address(destination)
            .filter(|destination| destination.port() != 0 && !destination.ip().is_unspecified())
            .ok_or(HeaderError::Field("destination"))?;
        let source = address(wire.source).ok_or(HeaderError::Field("source"))?;
        Ok(Self { protocol, destination, service: wire.service, source, traceparent: wire.traceparent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> StreamHeader {
        StreamHeader {
            protocol: Protocol::Tcp,
            destination: "10.0.0.1:80".parse().unwrap(),
            service: Some("shop/cart".into()),
            source: "[2001:db8::1]:40000".parse().unwrap(),
            traceparent: None,
        }
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let mut bytes = header().encode().unwrap();
        bytes.extend([0x7a, 3, b'n', b'e', b'w']);
        assert_eq!(StreamHeader::decode(&bytes), Ok(header()));
    }

    #[test]
    fn a_header_longer_than_its_bound_is_refused_on_both_sides() {
        let long = StreamHeader { service: Some("x".repeat(MAX_HEADER)), ..header() };
        assert!(matches!(long.encode(), Err(HeaderError::TooLong(_))));
        assert_eq!(StreamHeader::decode(&[0; MAX_HEADER + 1]), Err(HeaderError::TooLong(MAX_HEADER + 1)));
    }

    #[test]
    fn a_header_without_a_place_to_dial_is_refused() {
        assert_eq!(StreamHeader::decode(&[]), Err(HeaderError::Field("destination")));
        for nowhere in ["10.0.0.1:0", "0.0.0.0:80", "[::]:80"] {
            let bytes = StreamHeader { destination: nowhere.parse().unwrap(), ..header() }.encode().unwrap();
            assert_eq!(StreamHeader::decode(&bytes), Err(HeaderError::Field("destination")), "{nowhere}");
        }
        let wire = Wire {
            destination: Some(WireAddress { ip: vec![1, 2, 3], port: 80 }),
            source: Some(header().source.into()),
            ..Wire::default()
        };
        assert_eq!(StreamHeader::decode(&wire.encode_to_vec()), Err(HeaderError::Field("destination")));
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(
            destination in any::<[u8; 16]>().prop_filter("a place", |ip| *ip != [0; 16]),
            port in 1..=u16::MAX,
            source in any::<[u8; 4]>(),
            service in proptest::option::of("[a-z]{1,63}/[a-z]{1,63}"),
            traceparent in proptest::option::of("00-[0-9a-f]{32}-[0-9a-f]{16}-01"),
            is_datagram: bool,
        ) {
            let header = StreamHeader {
                protocol: if is_datagram { Protocol::Udp } else { Protocol::Tcp },
                destination: (destination, port).into(),
                service,
                source: (source, port).into(),
                traceparent,
            };
            prop_assert_eq!(StreamHeader::decode(&header.encode().unwrap()), Ok(header));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _ = StreamHeader::decode(&bytes);
        }
    }
}
