//! What a person asks, and what it means in the catalog.

use super::Party;
use crate::engine::Snapshot;
use crate::model::{ObjectName, Protocol, Service, ServicePort, SpiffeId, Workload};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Who wants to reach what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// `namespace/workload`, an IP address or a SPIFFE ID.
    pub source: String,
    /// `namespace/service`, `namespace/workload` or an IP address.
    pub destination: String,
    pub port: Option<u16>,
    /// `None`: TCP, where the port is not of UDP alone.
    pub protocol: Option<Protocol>,
}

/// What an application would connect, or send, to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asked {
    pub(super) address: SocketAddr,
    pub(super) protocol: Protocol,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnclearQuestion {
    #[error("{0:?} is no source: write namespace/workload, an IP address or a SPIFFE ID")]
    Source(String),
    #[error("{0:?} is no destination: write namespace/service, namespace/workload or an IP address")]
    Destination(String),
    #[error("the catalog has no workload {0}; `nodemesh get workloads` lists them")]
    UnknownWorkload(String),
    #[error("no workload of the catalog has the identity {0}; `nodemesh get workloads -o wide` lists them")]
    UnknownIdentity(SpiffeId),
    #[error("the catalog has neither a service nor a workload {0}")]
    Unknown(String),
    #[error("{0} is a workload, and a workload has many ports: name one, as in {0}:80")]
    Port(String),
    #[error("service {service} has no {protocol} port {port}; it has {known}")]
    ServicePort { service: ObjectName, protocol: String, port: u16, known: String },
}

impl Question {
    pub(super) fn source(&self, snapshot: &Snapshot) -> Result<Party, UnclearQuestion> {
        if let Ok(address) = self.source.parse::<IpAddr>() {
            let address = address.to_canonical();
            let has = |workload: &&Arc<Workload>| workload.addresses.iter().any(|own| own.to_canonical() == address);
            let found = snapshot.workload_at(address).or_else(|| snapshot.workloads().values().find(has));
            return Ok(Party { workload: found.cloned(), address });
        }
        let workload = if self.source.starts_with("spiffe://") {
            let id = SpiffeId::parse(&self.source).map_err(|_| UnclearQuestion::Source(self.source.clone()))?;
            let holders = snapshot.workloads().values().filter(|workload| workload.identity == id);
            // The same one for the same catalog.
            let first = holders.min_by(|a, b| a.name.cmp(&b.name));
            first.ok_or(UnclearQuestion::UnknownIdentity(id))?
        } else {
            let name = object(&self.source).ok_or_else(|| UnclearQuestion::Source(self.source.clone()))?;
            snapshot.workload(&name).ok_or_else(|| UnclearQuestion::UnknownWorkload(self.source.clone()))?
        };
        let address = workload.addresses.first().map(IpAddr::to_canonical);
        let address = address.ok_or_else(|| UnclearQuestion::UnknownWorkload(self.source.clone()))?;
        Ok(Party { workload: Some(workload.clone()), address })
    }

    /// The addresses that an application would speak to. A name that is both is the service, if the port is one of
    /// the service's.
    pub(super) fn destinations(&self, snapshot: &Snapshot, source: &Party) -> Result<Vec<Asked>, UnclearQuestion> {
        if let Ok(address) = self.destination.parse::<IpAddr>() {
            return self.of_address(snapshot, address.to_canonical());
        }
        let name = object(&self.destination).ok_or_else(|| UnclearQuestion::Destination(self.destination.clone()))?;
        let workload = snapshot.workload(&name);
        match snapshot.service(&name) {
            Some(service) => match (self.of_service(service, source), workload) {
                (Err(_), Some(workload)) => self.of_workload(workload, source),
                (outcome, _) => outcome,
            },
            None => match workload {
                Some(workload) => self.of_workload(workload, source),
                None => Err(UnclearQuestion::Unknown(self.destination.clone())),
            },
        }
    }

    /// The protocol of a port at an address, if the question leaves it open.
    fn protocol_at(&self, snapshot: &Snapshot, address: SocketAddr) -> Protocol {
        let is_udp = || snapshot.frontend(address).is_none() && snapshot.datagram_frontend(address).is_some();
        self.protocol.unwrap_or_else(|| if is_udp() { Protocol::Udp } else { Protocol::Tcp })
    }

    fn is_of(&self, protocol: Protocol) -> bool {
        self.protocol.is_none_or(|wanted| wanted == protocol)
    }

    fn of_address(&self, snapshot: &Snapshot, ip: IpAddr) -> Result<Vec<Asked>, UnclearQuestion> {
        if let Some(port) = self.port {
            let address = SocketAddr::new(ip, port);
            return Ok(vec![Asked { address, protocol: self.protocol_at(snapshot, address) }]);
        }
        let of = |protocol| move |address: SocketAddr| Asked { address, protocol };
        let tcp = snapshot.frontends().iter().map(|(address, _)| *address).map(of(Protocol::Tcp));
        let udp = snapshot.datagram_frontends().iter().map(|(address, _)| *address).map(of(Protocol::Udp));
        let all = tcp.chain(udp).filter(|asked| asked.address.ip() == ip && self.is_of(asked.protocol));
        let mut ports: Vec<_> = all.collect();
        ports.sort_unstable();
        if ports.is_empty() { Err(UnclearQuestion::Port(self.destination.clone())) } else { Ok(ports) }
    }

    fn of_workload(&self, workload: &Workload, source: &Party) -> Result<Vec<Asked>, UnclearQuestion> {
        let port = self.port.ok_or_else(|| UnclearQuestion::Port(self.destination.clone()))?;
        let ip = workload.address_like(source.address).or_else(|| workload.addresses.first().copied());
        let ip = ip.ok_or_else(|| UnclearQuestion::UnknownWorkload(self.destination.clone()))?;
        let address = SocketAddr::new(ip.to_canonical(), port);
        Ok(vec![Asked { address, protocol: self.protocol.unwrap_or(Protocol::Tcp) }])
    }

    fn of_service(&self, service: &Service, source: &Party) -> Result<Vec<Asked>, UnclearQuestion> {
        let mut ports: Vec<_> = service.ports.iter().filter(|port| self.is_of(port.protocol)).collect();
        if let Some(wanted) = self.port {
            ports.retain(|port| port.port == wanted);
            if self.protocol.is_none() && ports.iter().any(|port| port.protocol == Protocol::Tcp) {
                ports.retain(|port| port.protocol == Protocol::Tcp);
            }
            if ports.is_empty() {
                return Err(self.no_such_port(service, wanted));
            }
        }
        let like = |vip: &&IpAddr| vip.to_canonical().is_ipv4() == source.address.is_ipv4();
        let vip = service.vips.iter().find(like).or_else(|| service.vips.first());
        let vip = vip.ok_or_else(|| UnclearQuestion::Unknown(service.name.to_string()))?.to_canonical();
        let asked = |port: &ServicePort| Asked { address: SocketAddr::new(vip, port.port), protocol: port.protocol };
        Ok(ports.into_iter().map(asked).collect())
    }

    fn no_such_port(&self, service: &Service, port: u16) -> UnclearQuestion {
        let known = service.ports.iter().map(|port| match port.protocol {
            Protocol::Tcp => port.port.to_string(),
            Protocol::Udp => format!("{}/udp", port.port),
        });
        UnclearQuestion::ServicePort {
            service: service.name.clone(),
            protocol: self.protocol.unwrap_or(Protocol::Tcp).as_str().to_uppercase(),
            port,
            known: known.collect::<Vec<_>>().join(", "),
        }
    }
}

fn object(text: &str) -> Option<ObjectName> {
    let (namespace, name) = text.split_once('/')?;
    ObjectName::parse(namespace, name).ok()
}
