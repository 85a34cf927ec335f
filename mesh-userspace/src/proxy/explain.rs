//! What would happen to a connection, without making it: where it goes, how it arrives, and what policy says. Pure; the
//! verdict is the same function's that both sides of the proxy ask.

mod question;
#[cfg(test)]
mod tests;

pub use question::{Question, UnclearQuestion};

use self::question::Asked;
use super::verdict::{self, Caller, NamedVerdict};
use crate::engine::{Endpoint, FrontendView, Snapshot};
use crate::model::{ObjectName, Protocol, TransportChoice, Workload};
use crate::telemetry::policy::EnforcedBy;
use mesh_common::policy::Arrival;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Who calls, as far as the catalog knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    pub workload: Option<Arc<Workload>>,
    pub address: IpAddr,
}

/// How a connection arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Through the tunnel, both identities proven.
    MutualTls {
        transport: &'static str,
    },
    Plaintext,
    /// Without the mesh: policy has no say.
    Unguarded,
    /// Not at all.
    Nowhere,
}

impl How {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls { .. } => "mtls",
            Self::Plaintext => "plaintext",
            Self::Unguarded => "unguarded",
            Self::Nowhere => "nowhere",
        }
    }
}

/// One way that the connection can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// What the application connects, or sends, to.
    pub asked: SocketAddr,
    pub protocol: Protocol,
    pub service: Option<ObjectName>,
    /// The workload that it reaches.
    pub endpoint: Option<Arc<Workload>>,
    /// Where it reaches it.
    pub address: Option<SocketAddr>,
    pub how: How,
    /// Why it arrives like that.
    pub why: &'static str,
    /// `None` where nothing is asked.
    pub told: Option<NamedVerdict>,
    /// Who gives the verdict first.
    pub enforced_by: Option<EnforcedBy>,
}

impl Path {
    /// Whether the connection fails there.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.how == How::Nowhere || self.told.as_ref().is_some_and(NamedVerdict::is_denied)
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub source: Party,
    /// One for each endpoint of each address asked for.
    pub paths: Vec<Path>,
}

/// Explains a connection.
///
/// # Errors
/// If the catalog does not know a name, or the question leaves open what is meant.
pub fn explain(snapshot: &Snapshot, question: &Question) -> Result<Explanation, UnclearQuestion> {
    let source = question.source(snapshot)?;
    let asked = question.destinations(snapshot, &source)?;
    let paths = asked.into_iter().flat_map(|asked| paths(snapshot, &source, asked)).collect();
    Ok(Explanation { source, paths })
}

fn paths(snapshot: &Snapshot, source: &Party, asked: Asked) -> Vec<Path> {
    let left_alone = |why| vec![Path { how: How::Unguarded, why, ..nowhere(asked) }];
    let Asked { address, protocol } = asked;
    let captured = captured(snapshot, source, asked);
    if captured.is_ok() && snapshot.mesh.as_ref().is_some_and(|mesh| mesh.answers_dns_at(address)) {
        return left_alone("the mesh's own DNS answers there, whoever asks");
    }
    if let Some(frontend) = snapshot.frontend_of(protocol, address) {
        return through_service(snapshot, source, asked, frontend, captured);
    }
    let workload = match protocol {
        Protocol::Tcp => snapshot.workload_serving(address),
        Protocol::Udp => snapshot.workload_at(address.ip()),
    };
    let Some(workload) = workload else { return left_alone("the destination is not in the mesh") };
    if protocol == Protocol::Udp && !snapshot.takes_datagrams(address) {
        return left_alone("no service leads to this UDP port: its datagrams are left alone");
    }
    if source.workload.as_ref().is_some_and(|caller| caller.is_meshed() && caller.uid == workload.uid) {
        let why = "the workload calls its own address: its traffic with itself is left alone";
        let (endpoint, address) = (Some(workload.clone()), Some(address));
        return vec![Path { endpoint, address, how: How::Unguarded, why, ..nowhere(asked) }];
    }
    let endpoint = Endpoint::direct(workload, address);
    let early = kernel_decides(snapshot, std::slice::from_ref(&endpoint));
    vec![path(snapshot, source, asked, None, &endpoint, captured, early)]
}

/// The caller, if what it sends there is the mesh's; else why not.
fn captured<'a>(snapshot: &Snapshot, source: &'a Party, asked: Asked) -> Result<&'a Workload, &'static str> {
    let is_excluded = || {
        snapshot.mesh.as_ref().is_some_and(|mesh| mesh.exclude.iter().any(|range| range.contains(&asked.address.ip())))
    };
    match source.workload.as_deref() {
        None => Err("the caller is no workload of the mesh"),
        Some(caller) if !caller.is_meshed() => Err("the caller's mode is DISABLED"),
        Some(caller) if asked.protocol == Protocol::Udp && caller.is_host_network() => {
            Err("the caller is in its node's own network namespace, whose datagrams are left alone")
        }
        Some(_) if is_excluded() => Err("MeshConfig excludes the address: the connection is left alone"),
        Some(caller) => Ok(caller),
    }
}

fn through_service(
    snapshot: &Snapshot,
    source: &Party,
    asked: Asked,
    frontend: &FrontendView,
    captured: Result<&Workload, &'static str>,
) -> Vec<Path> {
    let service = Some(frontend.service.name.clone());
    if frontend.endpoints.is_empty() {
        return vec![Path { service, why: "the service has no endpoint", ..nowhere(asked) }];
    }
    let early = kernel_decides(snapshot, &frontend.endpoints);
    let to = |endpoint| path(snapshot, source, asked, service.clone(), endpoint, captured, early);
    frontend.endpoints.iter().map(to).collect()
}

fn path(
    snapshot: &Snapshot,
    source: &Party,
    asked: Asked,
    service: Option<ObjectName>,
    endpoint: &Endpoint,
    captured: Result<&Workload, &'static str>,
    early: bool,
) -> Path {
    let (workload, port) = (&endpoint.workload, endpoint.address.port());
    let reached = Path { service, endpoint: Some(workload.clone()), address: Some(endpoint.address), ..nowhere(asked) };
    let (how, why, told, by) = match captured {
        Ok(caller) => {
            let address = caller.address_like(source.address).unwrap_or(source.address);
            let identity = Some(&caller.identity);
            let told = verdict::decide(snapshot, workload, port, Arrival::Authenticated, Caller { identity, address });
            let by = if early { EnforcedBy::KernelConnect } else { EnforcedBy::Source };
            let how = How::MutualTls { transport: transport(snapshot, asked.protocol) };
            (how, "both workloads are in the mesh", told, by)
        }
        Err(_) if asked.protocol == Protocol::Udp && workload.is_host_network() => {
            let why = "the workload is in its node's own network namespace, whose UDP ports are not guarded";
            return Path { how: How::Unguarded, why, ..reached };
        }
        Err(why) => {
            let caller = Caller { identity: None, address: source.address };
            let told = verdict::decide(snapshot, workload, port, Arrival::Plaintext, caller);
            (How::Plaintext, why, told, EnforcedBy::KernelSkLookup)
        }
    };
    Path { how, why, told: Some(told), enforced_by: Some(by), ..reached }
}

fn nowhere(asked: Asked) -> Path {
    Path {
        asked: asked.address,
        protocol: asked.protocol,
        service: None,
        endpoint: None,
        address: None,
        how: How::Nowhere,
        why: "",
        told: None,
        enforced_by: None,
    }
}

/// Whether the source's kernel can decide for all of them at connect(): they have the same policies and the same port.
fn kernel_decides(snapshot: &Snapshot, endpoints: &[Endpoint]) -> bool {
    let key = |endpoint: &Endpoint| (snapshot.policies_of(&endpoint.workload.name).number, endpoint.address.port());
    let mut keys = endpoints.iter().map(key);
    keys.next().is_some_and(|first| first.0 != 0 && keys.all(|other| other == first))
}

fn transport(snapshot: &Snapshot, protocol: Protocol) -> &'static str {
    match (protocol, snapshot.mesh.as_ref().map(|mesh| mesh.transport)) {
        // Only QUIC carries datagrams.
        (Protocol::Udp, _) | (Protocol::Tcp, Some(TransportChoice::Quic)) => "quic",
        (Protocol::Tcp, Some(TransportChoice::Auto | TransportChoice::Lanes) | None) => "lanes",
    }
}
