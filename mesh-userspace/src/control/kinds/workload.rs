//! `nodemesh.io/v1alpha1 WorkloadEntry`.

use super::super::diagnostic::{Findings, Position};
use super::super::document::{Entry, Spec};
use super::super::fields::{self, Fields, MODES, Use};
use super::super::{Code, yaml};
use super::{metadata, port_name, section};
use crate::model::{Mode, NodeName, ObjectKey, ObjectName};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

const DEFAULT_WEIGHT: u32 = 100;
const MAX_WEIGHT: u32 = 1_000_000;

pub(in crate::control) fn workload(
    mut top: Fields,
    key: &mut Option<(ObjectKey, Position)>,
    findings: &mut Findings,
) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    let name = metadata.as_ref().and_then(|metadata| {
        let name = metadata.object_name(findings)?;
        metadata.identify(ObjectKey::Workload(name.clone()), key, findings);
        Some(name)
    });
    let spec = section(&mut top, "spec", findings);
    top.finish(findings);
    let mut spec = spec?;
    let node = spec.require("node", findings).and_then(|entry| {
        let text = fields::text(&entry.value, "spec.node", findings)?;
        match NodeName::parse(text) {
            Ok(node) => Some((node, entry.value.at)),
            Err(error) => {
                findings.report(Code::InvalidName, entry.value.at, error.to_string(), None);
                None
            }
        }
    });
    let (addresses, addresses_at) = workload_addresses(&mut spec, findings);
    let namespace = name.as_ref().map_or("default", ObjectName::namespace);
    let service_account = match spec.get("serviceAccount") {
        None => ObjectName::parse(namespace, "default").ok(),
        Some(entry) => fields::text(&entry.value, "spec.serviceAccount", findings).and_then(|account| {
            ObjectName::parse(namespace, account)
                .map_err(|error| findings.report(Code::InvalidName, entry.value.at, error.to_string(), None))
                .ok()
        }),
    };
    let netns = spec.get("netns").map(|entry| netns(&entry.value, findings));
    let weight =
        spec.get("weight").map(|entry| fields::integer(&entry.value, "spec.weight", (0, MAX_WEIGHT), findings));
    let (ports, port_modes) = workload_ports(&mut spec, findings);
    spec.finish(findings);
    let (metadata, name, (node, node_at)) = (metadata?, name?, node?);
    let (uid, uid_at) = metadata.uid.unwrap_or_else(|| (name.to_string(), metadata.name_at));
    Some(Spec::Workload(Box::new(Entry {
        uid,
        uid_at,
        labels: metadata.labels,
        service_account: service_account?,
        node,
        node_at,
        addresses,
        addresses_at,
        netns: netns.unwrap_or(Some(None))?,
        mode: metadata.mode,
        port_modes,
        ports,
        weight: weight.unwrap_or(Some(DEFAULT_WEIGHT))?,
        name,
    })))
}

fn workload_addresses(spec: &mut Fields, findings: &mut Findings) -> (Vec<IpAddr>, Vec<Position>) {
    let (mut addresses, mut places): (Vec<IpAddr>, _) = (Vec::new(), Vec::new());
    let Some(entry) = spec.require("addresses", findings) else { return (addresses, places) };
    let items = fields::list(&entry.value, "spec.addresses", findings).unwrap_or_default();
    if items.is_empty() && matches!(entry.value.value, yaml::Value::Sequence(_)) {
        let message = "`spec.addresses` is empty".to_owned();
        findings.report(Code::AddressCount, entry.value.at, message, Some("list one IPv4 or IPv6 address".into()));
    }
    for (index, item) in items.iter().enumerate() {
        let path = format!("spec.addresses[{index}]");
        let Some(address) = fields::address(item, &path, Use::Workload, findings) else { continue };
        if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            let message = format!("`{path}`: a workload has at most one address of each family");
            findings.report(Code::AddressCount, item.at, message, None);
        }
        addresses.push(address);
        places.push(item.at);
    }
    (addresses, places)
}

/// The outer `None` is a refusal, the inner one a workload without a network namespace.
fn netns(node: &yaml::Node, findings: &mut Findings) -> Option<Option<PathBuf>> {
    let text = fields::text(node, "spec.netns", findings)?;
    if !text.starts_with('/') || text.contains('\0') || text.len() > 4096 {
        let message = "`spec.netns` must be an absolute path".to_owned();
        findings.report(Code::InvalidValue, node.at, message, Some("as in /run/netns/web-1".into()));
        return None;
    }
    Some(Some(PathBuf::from(text)))
}

fn workload_ports(spec: &mut Fields, findings: &mut Findings) -> (BTreeMap<String, u16>, BTreeMap<u16, Mode>) {
    let (mut ports, mut modes) = (BTreeMap::new(), BTreeMap::new());
    if let Some(entry) = spec.get("ports") {
        for port in fields::mapping(&entry.value, "spec.ports", findings).unwrap_or_default() {
            let path = format!("spec.ports[{}]", port.key);
            let number = fields::port(&port.value, &path, findings);
            if port_name(&port.key, port.at, &path, findings) {
                ports.extend(number.map(|number| (port.key.clone(), number)));
            }
        }
    }
    if let Some(entry) = spec.get("portModes") {
        let mut seen = BTreeSet::new();
        for mode in fields::mapping(&entry.value, "spec.portModes", findings).unwrap_or_default() {
            let path = format!("spec.portModes[{}]", mode.key);
            let port = fields::port_key(mode, &path, findings);
            let value = fields::choice(&mode.value, &path, MODES, findings);
            if let Some(port) = port.filter(|port| !seen.insert(*port)) {
                findings.report(Code::DuplicatePort, mode.at, format!("`{path}`: port {port} appears twice"), None);
            }
            modes.extend(port.zip(value));
        }
    }
    (ports, modes)
}
