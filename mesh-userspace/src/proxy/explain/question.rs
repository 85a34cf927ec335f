//! What a person asks, and what it means in the catalog.

use super::Party;
use crate::engine::Snapshot;
use crate::model::{ObjectName, Protocol, Service, SpiffeId, Workload};
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
    #[error("service {service} has no TCP port {port}; it has {known}")]
    ServicePort { service: ObjectName, port: u16, known: String },
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

    /// The addresses that an application would connect to. A name that is both is the service, if the port is one of
    /// the service's.
    pub(super) fn destinations(&self, snapshot: &Snapshot, source: &Party) -> Result<Vec<SocketAddr>, UnclearQuestion> {
        if let Ok(address) = self.destination.parse::<IpAddr>() {
            return self.of_address(snapshot, address.to_canonical());
        }
        let name = object(&self.destination).ok_or_else(|| UnclearQuestion::Destination(self.destination.clone()))?;
        let workload = snapshot.workload(&name);
        match snapshot.service(&name) {
            Some(service) => match (of_service(service, self.port, source), workload) {
                (Err(_), Some(workload)) => self.of_workload(workload, source),
                (outcome, _) => outcome,
            },
            None => match workload {
                Some(workload) => self.of_workload(workload, source),
                None => Err(UnclearQuestion::Unknown(self.destination.clone())),
            },
        }
    }

    fn of_address(&self, snapshot: &Snapshot, address: IpAddr) -> Result<Vec<SocketAddr>, UnclearQuestion> {
        if let Some(port) = self.port {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let mut ports: Vec<_> =
            snapshot.frontends().iter().map(|(at, _)| *at).filter(|at| at.ip() == address).collect();
        ports.sort_unstable();
        if ports.is_empty() { Err(UnclearQuestion::Port(self.destination.clone())) } else { Ok(ports) }
    }

    fn of_workload(&self, workload: &Workload, source: &Party) -> Result<Vec<SocketAddr>, UnclearQuestion> {
        let port = self.port.ok_or_else(|| UnclearQuestion::Port(self.destination.clone()))?;
        let address = workload.address_like(source.address).or_else(|| workload.addresses.first().copied());
        let address = address.ok_or_else(|| UnclearQuestion::UnknownWorkload(self.destination.clone()))?;
        Ok(vec![SocketAddr::new(address.to_canonical(), port)])
    }
}

fn of_service(service: &Service, port: Option<u16>, source: &Party) -> Result<Vec<SocketAddr>, UnclearQuestion> {
    let mut ports: Vec<u16> =
        service.ports.iter().filter(|port| port.protocol == Protocol::Tcp).map(|port| port.port).collect();
    if let Some(port) = port {
        if !ports.contains(&port) {
            let known = ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(UnclearQuestion::ServicePort { service: service.name.clone(), port, known });
        }
        ports = vec![port];
    }
    let like = |vip: &&IpAddr| vip.to_canonical().is_ipv4() == source.address.is_ipv4();
    let vip = service.vips.iter().find(like).or_else(|| service.vips.first());
    let vip = vip.ok_or_else(|| UnclearQuestion::Unknown(service.name.to_string()))?.to_canonical();
    Ok(ports.into_iter().map(|port| SocketAddr::new(vip, port)).collect())
}

fn object(text: &str) -> Option<ObjectName> {
    let (namespace, name) = text.split_once('/')?;
    ObjectName::parse(namespace, name).ok()
}
