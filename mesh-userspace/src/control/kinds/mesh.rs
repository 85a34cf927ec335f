//! `nodemesh.io/v1alpha1 MeshConfig`.

use super::super::Code;
use super::super::diagnostic::{Findings, Position};
use super::super::document::Spec;
use super::super::fields::{self, DEFAULT_ACTIONS, Fields, MODES, Use};
use super::super::key::Key;
use super::super::yaml::{Node, Value};
use super::{SAME_NODE, metadata, section};
use crate::model::{
    DNS_PORT, DefaultAction, DeniedError, Dns, Mesh, Mode, ObjectKey, ObjectName, TransportChoice, TrustDomain,
};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Of Kubernetes, where nobody has changed it.
const DEFAULT_DOMAIN: &str = "cluster.local";
/// Names have 253 characters, and services' and namespaces' 63 each.
const MAX_DOMAIN: usize = 100;

pub(in crate::control) fn mesh(
    mut top: Fields,
    key: &mut Option<(Key, Position)>,
    findings: &mut Findings,
) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    if let Some(metadata) = &metadata {
        metadata.identify(ObjectKey::Mesh, key, findings);
        metadata.object_name(findings);
    }
    let spec = section(&mut top, "spec", findings);
    top.finish(findings);
    let mut spec = spec?;
    let trust_domain = spec.require("trustDomain", findings).and_then(|entry| {
        let text = fields::text(&entry.value, "spec.trustDomain", findings)?;
        match TrustDomain::parse(text) {
            Ok(domain) => Some(domain),
            Err(_) => {
                let message = "`spec.trustDomain` has 1 to 255 lower-case letters, digits, '-', '_' or '.'".to_owned();
                findings.report(Code::InvalidName, entry.value.at, message, None);
                None
            }
        }
    });
    let mode = spec.get("mode").map(|entry| fields::choice(&entry.value, "spec.mode", MODES, findings));
    let transports =
        [("auto", TransportChoice::Auto), ("lanes", TransportChoice::Lanes), ("quic", TransportChoice::Quic)];
    let transport =
        spec.get("transport").map(|entry| fields::choice(&entry.value, "spec.transport", &transports, findings));
    let mut exclude = Vec::new();
    let ranges = spec.get("excludeCIDRs").and_then(|entry| fields::list(&entry.value, "spec.excludeCIDRs", findings));
    for (index, range) in ranges.unwrap_or_default().iter().enumerate() {
        exclude.extend(fields::range(range, &format!("spec.excludeCIDRs[{index}]"), findings));
    }
    let same_node = spec.choice("sameNode", SAME_NODE, findings);
    let dns = spec.part("dns", findings).map(|fields| dns(fields, findings));
    let authorization = authorization(&mut spec, findings);
    spec.finish(findings);
    metadata?;
    let (default_action, denied_error) = authorization?;
    Some(Spec::Mesh(Arc::new(Mesh {
        trust_domain: trust_domain?,
        mode: mode.unwrap_or(Some(Mode::Permissive))?,
        transport: transport.unwrap_or(Some(TransportChoice::Auto))?,
        exclude,
        default_action,
        denied_error,
        same_node: same_node.unwrap_or_default(),
        dns: dns.map_or(Some(None), |dns| dns.map(Some))?,
    })))
}

/// The mesh's own DNS; `None` is a refusal.
fn dns(mut fields: Fields, findings: &mut Findings) -> Option<Arc<Dns>> {
    let domain = match fields.get("domain") {
        None => Some(DEFAULT_DOMAIN),
        Some(entry) => fields::text(&entry.value, "spec.dns.domain", findings).filter(|domain| {
            // As the name of an object: the rules are those of DNS, with room for what stands in front.
            let sound = ObjectName::parse("default", domain).is_ok() && domain.len() <= MAX_DOMAIN;
            if !sound {
                let message = format!("`spec.dns.domain` is a DNS name in lower case, {MAX_DOMAIN} characters at most");
                findings.report(Code::InvalidName, entry.value.at, message, Some("as in cluster.local".to_owned()));
            }
            sound
        }),
    };
    let mut addresses: Vec<IpAddr> = Vec::new();
    let stated = fields.require("addresses", findings);
    let items = stated.and_then(|entry| fields::list(&entry.value, "spec.dns.addresses", findings)).unwrap_or_default();
    if let Some(entry) = stated.filter(|entry| matches!(&entry.value.value, Value::Sequence(items) if items.is_empty()))
    {
        let help = "list one IPv4 or IPv6 address that nothing else has".to_owned();
        findings.report(Code::AddressCount, entry.value.at, "`spec.dns.addresses` is empty".to_owned(), Some(help));
    }
    for (index, item) in items.iter().enumerate() {
        let path = format!("spec.dns.addresses[{index}]");
        let Some(address) = fields::address(item, &path, Use::VirtualAddress, findings) else { continue };
        if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            let message = format!("`{path}`: the mesh's DNS has at most one address of each family");
            findings.report(Code::AddressCount, item.at, message, None);
        }
        addresses.push(address);
    }
    let mut upstream = Vec::new();
    let servers = fields.get("upstream").and_then(|entry| fields::list(&entry.value, "spec.dns.upstream", findings));
    for (index, item) in servers.unwrap_or_default().iter().enumerate() {
        let server = server(item, &format!("spec.dns.upstream[{index}]"), findings);
        if server.is_some_and(|server| server.port() == DNS_PORT && addresses.contains(&server.ip())) {
            let message = "the mesh's DNS cannot ask itself".to_owned();
            findings.report(Code::InvalidAddress, item.at, message, None);
        }
        upstream.extend(server);
    }
    fields.finish(findings);
    Some(Arc::new(Dns { domain: domain?.into(), addresses, upstream }))
}

fn server(node: &Node, path: &str, findings: &mut Findings) -> Option<SocketAddr> {
    let text = fields::text(node, path, findings)?;
    let parsed = text.parse::<SocketAddr>().ok();
    let server = parsed.filter(|at| at.port() != 0 && !at.ip().is_unspecified() && !at.ip().is_multicast());
    if server.is_none() {
        let shown: String = text.chars().take(64).collect();
        let help = match text.parse::<IpAddr>() {
            Ok(address) => format!("write {}", SocketAddr::new(address, DNS_PORT)),
            Err(_) => "write address and port, as in 192.0.2.53:53 or [2001:db8::53]:53".to_owned(),
        };
        findings.report(Code::InvalidAddress, node.at, format!("`{path}`: `{shown}` is no server"), Some(help));
    }
    server
}

/// What happens to connections that no policy decides, and what a denied connect() fails with; `None` is a refusal.
fn authorization(spec: &mut Fields, findings: &mut Findings) -> Option<(DefaultAction, DeniedError)> {
    let Some(entry) = spec.get("authorization") else {
        return Some((DefaultAction::default(), DeniedError::default()));
    };
    let mut fields = Fields::of(&entry.value, "spec.authorization", findings)?;
    let action = fields
        .get("defaultAction")
        .map(|entry| fields::choice(&entry.value, "spec.authorization.defaultAction", DEFAULT_ACTIONS, findings));
    let errors = [("EACCES", DeniedError::AccessDenied), ("ECONNREFUSED", DeniedError::ConnectionRefused)];
    let error = fields
        .get("deniedError")
        .map(|entry| fields::choice(&entry.value, "spec.authorization.deniedError", &errors, findings));
    fields.finish(findings);
    Some((action.unwrap_or(Some(DefaultAction::default()))?, error.unwrap_or(Some(DeniedError::default()))?))
}
