//! `v1 Service`.

use super::super::diagnostic::{Findings, Position};
use super::super::document::Spec;
use super::super::fields::{self, Fields, Use};
use super::super::key::Key;
use super::super::{Code, yaml};
use super::{metadata, port_name, section};
use crate::model::{Affinity, ObjectKey, Prefer, Protocol, Service, ServicePort, TargetPort};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Fields of a Service that the mesh does not read.
const IGNORED_SERVICE: &[&str] = &[
    "allocateLoadBalancerNodePorts",
    "externalIPs",
    "externalName",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "internalTrafficPolicy",
    "ipFamilies",
    "ipFamilyPolicy",
    "loadBalancerClass",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "publishNotReadyAddresses",
    "sessionAffinity",
    "sessionAffinityConfig",
    "trafficDistribution",
    "type",
];

pub(in crate::control) fn service(
    mut top: Fields,
    key: &mut Option<(Key, Position)>,
    findings: &mut Findings,
) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    let name = metadata.as_ref().and_then(|metadata| {
        let name = metadata.object_name(findings)?;
        metadata.identify(ObjectKey::Service(name.clone()), key, findings);
        Some(name)
    });
    let spec = section(&mut top, "spec", findings);
    top.ignore(&["status"]);
    top.finish(findings);
    let mut spec = spec?;
    let (vips, vips_at) = virtual_addresses(&mut spec, findings);
    let (mut selector, mut selector_at) = (BTreeMap::new(), spec.at());
    if let Some(entry) = spec.get("selector") {
        selector_at = entry.at;
        for pair in fields::mapping(&entry.value, "spec.selector", findings).unwrap_or_default() {
            let value = fields::text(&pair.value, &format!("spec.selector[{}]", pair.key), findings);
            selector.extend(value.map(|value| (pair.key.clone(), value.to_owned())));
        }
    }
    let (mut ports, mut targets_at) = (Vec::new(), Vec::new());
    let items = spec.get("ports").and_then(|entry| fields::list(&entry.value, "spec.ports", findings));
    let items = items.unwrap_or_default();
    for (index, item) in items.iter().enumerate() {
        if let Some((port, target_at)) = service_port(item, index, items.len(), &ports, findings) {
            ports.push(port);
            targets_at.push(target_at);
        }
    }
    spec.ignore(IGNORED_SERVICE);
    spec.finish(findings);
    let service =
        Service { name: name?, vips, ports, selector, prefer: Prefer::default(), affinity: Affinity::default() };
    Some(Spec::Service { service: Arc::new(service), selector_at, vips_at, targets_at })
}

/// `clusterIPs`, or `clusterIP` where that is all there is; `None` and an empty string are a service without one.
fn virtual_addresses(spec: &mut Fields, findings: &mut Findings) -> (Vec<IpAddr>, Vec<Position>) {
    let mut written: Vec<(&yaml::Node, String)> = Vec::new();
    let single = spec.get("clusterIP");
    if let Some(entry) = spec.get("clusterIPs") {
        let items = fields::list(&entry.value, "spec.clusterIPs", findings).unwrap_or_default();
        written.extend(items.iter().enumerate().map(|(index, item)| (item, format!("spec.clusterIPs[{index}]"))));
    }
    if let Some(entry) = single {
        // Kubernetes writes both, and then this one is the first of the others: then it adds nothing.
        let stated = |node: &yaml::Node| match (&node.value, &entry.value.value) {
            (yaml::Value::Text(a), yaml::Value::Text(b)) => a == b,
            _ => false,
        };
        if !written.iter().any(|(node, _)| stated(node)) {
            written.insert(0, (&entry.value, "spec.clusterIP".to_owned()));
        }
    }
    let (mut vips, mut places): (Vec<IpAddr>, _) = (Vec::new(), Vec::new());
    for (node, path) in written {
        if matches!(&node.value, yaml::Value::Text(text) if text == "None" || text.is_empty()) {
            continue;
        }
        let Some(vip) = fields::address(node, &path, Use::VirtualAddress, findings) else { continue };
        if vips.iter().any(|other| other.is_ipv4() == vip.is_ipv4()) {
            let message = format!("`{path}`: a service has at most one virtual address of each family");
            findings.report(Code::AddressCount, node.at, message, None);
        }
        vips.push(vip);
        places.push(node.at);
    }
    (vips, places)
}

fn service_port(
    item: &yaml::Node,
    index: usize,
    count: usize,
    others: &[ServicePort],
    findings: &mut Findings,
) -> Option<(ServicePort, Position)> {
    let path = format!("spec.ports[{index}]");
    let mut fields = Fields::of(item, &path, findings)?;
    let number = fields.require("port", findings);
    let number_at = number.map_or(item.at, |entry| entry.value.at);
    let port = number.and_then(|entry| fields::port(&entry.value, &format!("{path}.port"), findings));
    let name = fields.get("name");
    let name_at = name.map_or(item.at, |entry| entry.value.at);
    let name = name.and_then(|entry| fields::text(&entry.value, &format!("{path}.name"), findings)).unwrap_or_default();
    let protocols = [("TCP", Some(Protocol::Tcp)), ("UDP", Some(Protocol::Udp)), ("SCTP", None)];
    let protocol = match fields.get("protocol") {
        Some(entry) => {
            let found = fields::choice(&entry.value, &format!("{path}.protocol"), &protocols, findings)?;
            if found.is_none() {
                let message = format!("`{path}`: only TCP and UDP ports are captured in this version");
                findings.report(Code::NotCaptured, entry.value.at, message, None);
            }
            found
        }
        None => Some(Protocol::Tcp),
    };
    let target_entry = fields.get("targetPort");
    let target_at = target_entry.map_or(number_at, |entry| entry.value.at);
    let target = match target_entry.map(|entry| &entry.value) {
        None => port.map(TargetPort::Number),
        Some(yaml::Node { value: yaml::Value::Text(name), .. }) => {
            port_name(name, target_at, &format!("{path}.targetPort"), findings).then(|| TargetPort::Name(name.clone()))
        }
        Some(node) => fields::port(node, &format!("{path}.targetPort"), findings).map(TargetPort::Number),
    };
    fields.ignore(&["nodePort", "appProtocol"]);
    fields.finish(findings);
    if count > 1 && name.is_empty() {
        let message = format!("`{path}.name` is missing: each port of a service with several has one");
        findings.report(Code::MissingField, item.at, message, None);
    }
    if let Some(port) = port
        && others.iter().any(|other| other.port == port && Some(other.protocol) == protocol)
    {
        let message = format!("`{path}.port`: port {port} appears twice");
        findings.report(Code::DuplicatePort, number_at, message, None);
    }
    if !name.is_empty() && others.iter().any(|other| *other.name == *name) {
        let message = format!("`{path}.name`: the name `{name}` appears twice");
        findings.report(Code::DuplicatePort, name_at, message, None);
    }
    Some((ServicePort { name: name.into(), port: port?, protocol: protocol?, target: target? }, target_at))
}
