//! What a name is in the mesh. Names come as labels in lower case, the outermost last.

use crate::engine::Snapshot;
use crate::model::{Dns, ObjectName, Protocol, Service, ServicePort};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// What is found under a name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'s> {
    /// A service: its addresses.
    Service(&'s Arc<Service>),
    /// A named port of a service.
    Port(&'s Arc<Service>, &'s ServicePort),
    /// The service that has the address which the name spells.
    Address(&'s Arc<Service>),
    /// The mesh's own server.
    Server,
    /// A name above others: it is there, and has nothing of its own.
    Above,
    /// A name of the mesh that is not there.
    Missing,
    /// Not the mesh's.
    Elsewhere,
}

/// Looks a name up for a caller of this namespace.
pub(super) fn find<'s>(snapshot: &'s Snapshot, dns: &Dns, namespace: &str, labels: &[String]) -> Found<'s> {
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let domain: Vec<&str> = dns.domain.split('.').collect();
    if let Some(inner) = labels.strip_suffix(&domain[..]) {
        return match inner {
            [] | ["svc"] => Found::Above,
            ["dns"] => Found::Server,
            [inner @ .., "svc"] => of_services(snapshot, inner),
            _ => Found::Missing,
        };
    }
    match labels[..] {
        [name] => service(snapshot, namespace, name).map_or(Found::Elsewhere, Found::Service),
        [name, namespace] => service(snapshot, namespace, name).map_or(Found::Elsewhere, Found::Service),
        // No top-level domain has this name.
        [ref inner @ .., _, "svc"] => {
            let whole = &labels[..inner.len() + 1];
            of_services(snapshot, whole)
        }
        [ref octets @ .., "in-addr", "arpa"] => by_address(snapshot, v4(octets)),
        [ref nibbles @ .., "ip6", "arpa"] => by_address(snapshot, v6(nibbles)),
        _ => Found::Elsewhere,
    }
}

/// Under `svc`: what stands in front of it.
fn of_services<'s>(snapshot: &'s Snapshot, labels: &[&str]) -> Found<'s> {
    let found = match *labels {
        [namespace] => {
            let is_there = snapshot.services().values().any(|service| service.name.namespace() == namespace);
            is_there.then_some(Found::Above)
        }
        [protocol, name, namespace] => service(snapshot, namespace, name).and_then(|service| {
            let mut ports = service.ports.iter().filter(|port| !port.name.is_empty());
            ports.any(|port| word(port.protocol) == protocol).then_some(Found::Above)
        }),
        [name, namespace] => service(snapshot, namespace, name).map(Found::Service),
        [port, protocol, name, namespace] => service(snapshot, namespace, name).and_then(|service| {
            let wanted = port.strip_prefix('_').filter(|wanted| !wanted.is_empty())?;
            let mut ports = service.ports.iter();
            let found = ports.find(|port| *port.name == *wanted && word(port.protocol) == protocol)?;
            Some(Found::Port(service, found))
        }),
        _ => None,
    };
    found.unwrap_or(Found::Missing)
}

fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "_tcp",
        Protocol::Udp => "_udp",
    }
}

fn service<'s>(snapshot: &'s Snapshot, namespace: &str, name: &str) -> Option<&'s Arc<Service>> {
    snapshot.service(&ObjectName::parse(namespace, name).ok()?)
}

/// An address that is no service's may be someone else's.
fn by_address(snapshot: &Snapshot, address: Option<IpAddr>) -> Found<'_> {
    let has = |service: &&Arc<Service>| service.vips.iter().any(|vip| Some(vip.to_canonical()) == address);
    let mut services: Vec<_> = snapshot.services().values().filter(has).collect();
    // Two may have one address, on different ports; the same one each time.
    services.sort_by(|a, b| a.name.cmp(&b.name));
    services.first().copied().map_or(Found::Elsewhere, Found::Address)
}

fn v4(octets: &[&str]) -> Option<IpAddr> {
    let octets: [&str; 4] = octets.try_into().ok()?;
    let mut address = [0; 4];
    for (place, octet) in address.iter_mut().rev().zip(octets) {
        let number: u8 = octet.parse().ok()?;
        // `007` and `+7` are other names.
        *place = Some(number).filter(|number| number.to_string() == octet)?;
    }
    Some(Ipv4Addr::from(address).into())
}

fn v6(nibbles: &[&str]) -> Option<IpAddr> {
    let nibbles: [&str; 32] = nibbles.try_into().ok()?;
    let mut address = 0_u128;
    for nibble in nibbles.iter().rev() {
        let [digit] = nibble.as_bytes() else { return None };
        address = address << 4 | u128::from(char::from(*digit).to_digit(16)?);
    }
    Some(IpAddr::from(Ipv6Addr::from(address)).to_canonical())
}
