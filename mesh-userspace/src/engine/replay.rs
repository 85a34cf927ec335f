//! The kernel's tables as plain maps: operations are replayed on them, and asked as the programs ask them.

use super::{MapOp, Tables};
use mesh_common::policy::source::{AUTHENTICATED, EVERYONE};
use mesh_common::policy::{self, Arrival, Decision, Matched, Mode, VerdictKey};
use mesh_common::service::{
    AppPort, AppPortKey, Backend, CidrAction, CidrKey, DatagramFrontend, Frontend, FrontendKey, PROTO_TCP, RangeKey,
};
use mesh_common::{Endpoint, Ip};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kernel {
    pub(super) frontends: BTreeMap<FrontendKey, Frontend>,
    pub(super) backends: BTreeMap<FrontendKey, Backend>,
    pub(super) cidrs: BTreeMap<(u32, CidrKey), CidrAction>,
    pub(super) app_ports: BTreeMap<AppPortKey, AppPort>,
    pub(super) datagrams: BTreeMap<Endpoint, DatagramFrontend>,
    pub(super) verdicts: BTreeMap<VerdictKey, Matched>,
    pub(super) ranges: BTreeMap<(u32, RangeKey), u32>,
    denied_errno: u32,
}

impl Kernel {
    pub(super) fn of(tables: &Tables) -> Self {
        Self {
            frontends: tables.frontends.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: tables.backends.iter().map(|(key, value)| (*key, *value)).collect(),
            cidrs: tables.cidrs.iter().map(|(key, value)| (*key, *value)).collect(),
            app_ports: tables.app_ports.iter().map(|(key, value)| (*key, *value)).collect(),
            datagrams: tables.datagrams.iter().map(|(key, value)| (*key, *value)).collect(),
            verdicts: tables.verdicts.iter().map(|(key, value)| (*key, *value)).collect(),
            ranges: tables.ranges.iter().map(|(key, value)| (*key, *value)).collect(),
            denied_errno: tables.denied_errno,
        }
    }

    /// Every operation must change something: `diff` is minimal.
    pub(super) fn apply(&mut self, op: MapOp) {
        match op {
            MapOp::SetAppPort(key, value) => assert_ne!(self.app_ports.insert(key, value), Some(value)),
            MapOp::SetCidr(length, key, value) => assert_ne!(self.cidrs.insert((length, key), value), Some(value)),
            MapOp::SetFrontend(key, value) => assert_ne!(self.frontends.insert(key, value), Some(value)),
            MapOp::SetBackend(key, value) => assert_ne!(self.backends.insert(key, value), Some(value)),
            MapOp::RemoveBackend(key) => assert!(self.backends.remove(&key).is_some()),
            MapOp::SetVerdict(key, value) => assert_ne!(self.verdicts.insert(key, value), Some(value)),
            MapOp::SetRange(length, key, class) => assert_ne!(self.ranges.insert((length, key), class), Some(class)),
            MapOp::SetDeniedErrno(errno) => assert_ne!(std::mem::replace(&mut self.denied_errno, errno), errno),
            MapOp::SetDatagram(key, value) => assert_ne!(self.datagrams.insert(key, value), Some(value)),
            MapOp::RemoveDatagram(key) => assert!(self.datagrams.remove(&key).is_some()),
            MapOp::RemoveFrontend(key) => assert!(self.frontends.remove(&key).is_some()),
            MapOp::RemoveCidr(length, key) => assert!(self.cidrs.remove(&(length, key)).is_some()),
            MapOp::RemoveAppPort(key) => assert!(self.app_ports.remove(&key).is_some()),
            MapOp::RemoveVerdict(key) => assert!(self.verdicts.remove(&key).is_some()),
            MapOp::RemoveRange(length, key) => assert!(self.ranges.remove(&(length, key)).is_some()),
        }
    }

    /// What a group's rules say about an authenticated caller with the identity of this number.
    pub(super) fn authenticated(&self, group: u32, identity: u32, address: IpAddr, port: u16) -> Matched {
        let sources = [AUTHENTICATED, identity, self.class(group, address)];
        policy::join(group, sources, port.to_be(), |key| self.verdicts.get(key).copied())
    }

    /// What a group's rules say about a caller in plaintext.
    pub(super) fn plaintext(&self, group: u32, address: IpAddr, port: u16) -> Matched {
        policy::join(group, [self.class(group, address)], port.to_be(), |key| self.verdicts.get(key).copied())
    }

    fn class(&self, group: u32, address: IpAddr) -> u32 {
        let bits = |address: Ip| u128::from_be_bytes(address.octets());
        let address = bits(address.into());
        let holding = self.ranges.iter().filter(|((length, key), _)| {
            let ignored = 160 - length;
            let differing = bits(key.addr()) ^ address;
            key.group() == group && (ignored == 128 || differing >> ignored == 0)
        });
        holding.max_by_key(|((length, _), _)| *length).map_or(EVERYONE, |(_, class)| *class)
    }

    /// What sk_lookup decides about plaintext.
    pub(super) fn arriving(&self, from: IpAddr, to: SocketAddr) -> Decision {
        let key = |port: u16| AppPortKey::new(to.ip().into(), port.to_be());
        let app_port = self.app_ports.get(&key(to.port())).or_else(|| self.app_ports.get(&key(0)));
        let mode = app_port.map(|app_port| Mode::from_number(app_port.mode()));
        let matched = self.plaintext(app_port.map_or(0, AppPort::group), from, to.port());
        policy::decide(mode, Arrival::Plaintext, &matched)
    }

    /// What the connect hook decides for the rules' sake; `None` if it does not capture.
    pub(super) fn connecting(&self, identity: u32, from: IpAddr, to: SocketAddr) -> Option<Decision> {
        let frontend = self.frontends.get(&FrontendKey::new(to.ip().into(), to.port().to_be(), PROTO_TCP, 0));
        let (group, port) = match frontend {
            Some(frontend) => (frontend.group(), u16::from_be(frontend.target_port_be())),
            None => {
                let action = self.cidrs.get(&(128, CidrKey::new(to.ip().into())))?;
                action.is_meshed().then_some((action.group(), to.port()))?
            }
        };
        let matched = self.authenticated(group, identity, from, port);
        Some(policy::decide(Some(Mode::Strict), Arrival::Authenticated, &matched))
    }
}
