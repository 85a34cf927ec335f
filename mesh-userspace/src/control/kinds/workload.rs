//! `nodemesh.io/v1alpha1 WorkloadEntry`.

use super::super::diagnostic::{Findings, Position};
use super::super::document::{Entry, HostPlaces, Spec};
use super::super::fields::{self, Fields, MODES, Use};
use super::super::key::Key;
use super::super::{Code, yaml};
use super::{metadata, port_name, section};
use crate::model::{Mode, NodeName, ObjectKey, ObjectName};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

const DEFAULT_WEIGHT: u32 = 100;
const MAX_WEIGHT: u32 = 1_000_000;

pub(in crate::control) fn workload(
    mut top: Fields,
    key: &mut Option<(Key, Position)>,
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
        let name = NodeName::parse(fields::text(&entry.value, "spec.node", findings)?);
        let node = name.map_err(|error| findings.report(Code::InvalidName, entry.value.at, error.to_string(), None));
        Some((node.ok()?, entry.value.at))
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
    let netns = spec.get("netns").map(|entry| path(entry, "spec.netns", "/run/netns/web-1", findings));
    let cgroup_entry = spec.get("cgroup");
    let cgroup = cgroup_entry.map(|entry| cgroup(entry, netns.is_some(), findings));
    let weight =
        spec.get("weight").map(|entry| fields::integer(&entry.value, "spec.weight", (0, MAX_WEIGHT), findings));
    let is_terminating =
        spec.get("terminating").map(|entry| fields::boolean(&entry.value, "spec.terminating", findings));
    let Ports { ports, modes: port_modes, places } = workload_ports(&mut spec, findings);
    if let Some(entry) = cgroup_entry.filter(|_| places.is_empty()) {
        let message = "a workload with `spec.cgroup` must declare the ports that it listens on".to_owned();
        let help = "list them in `spec.ports`, as in `ports: {http: 8080}`, or in `spec.portModes`".to_owned();
        findings.report(Code::NoDeclaredPort, entry.at, message, Some(help));
    }
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
        netns: netns.map_or(Some(None), |path| path.map(Some))?,
        cgroup: cgroup.map_or(Some(None), |path| path.map(Some))?,
        host_at: cgroup_entry.map(|entry| HostPlaces { cgroup: entry.value.at, ports: places }),
        defaults: metadata.defaults,
        port_modes,
        ports,
        weight: weight.unwrap_or(Some(DEFAULT_WEIGHT))?,
        is_terminating: is_terminating.unwrap_or(Some(false))?,
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

fn path(entry: &yaml::Entry, field: &str, example: &str, findings: &mut Findings) -> Option<PathBuf> {
    let text = fields::text(&entry.value, field, findings)?;
    if !text.starts_with('/') || text.contains('\0') || text.len() > 4096 {
        let message = format!("`{field}` must be an absolute path");
        findings.report(Code::InvalidValue, entry.value.at, message, Some(format!("as in {example}")));
        return None;
    }
    Some(PathBuf::from(text))
}

/// The cgroup of a host-network workload. The root has everything in it, also the daemon.
fn cgroup(entry: &yaml::Entry, has_netns: bool, findings: &mut Findings) -> Option<PathBuf> {
    if has_netns {
        let message = "`spec.cgroup` does not go with `spec.netns`".to_owned();
        let help = "a workload runs in its own network namespace (`netns`), or in its node's (`cgroup`)".to_owned();
        findings.report(Code::Exclusive, entry.at, message, Some(help));
    }
    let example = "/sys/fs/cgroup/system.slice/web.service";
    let path = path(entry, "spec.cgroup", example, findings)?;
    let plain: PathBuf = path.components().collect();
    let is_root = ["/", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().any(|root| plain == Path::new(root));
    if is_root || path.components().any(|part| part == Component::ParentDir) {
        let message = "`spec.cgroup` must be the path of one workload's cgroup, not of the root".to_owned();
        findings.report(Code::InvalidValue, entry.value.at, message, Some(format!("as in {example}")));
        return None;
    }
    Some(plain)
}

/// The ports that a workload declares, by name and with modes of their own, and where each is first mentioned.
#[derive(Default)]
struct Ports {
    ports: BTreeMap<String, u16>,
    modes: BTreeMap<u16, Mode>,
    places: BTreeMap<u16, Position>,
}

fn workload_ports(spec: &mut Fields, findings: &mut Findings) -> Ports {
    let mut all = Ports::default();
    if let Some(entry) = spec.get("ports") {
        for port in fields::mapping(&entry.value, "spec.ports", findings).unwrap_or_default() {
            let path = format!("spec.ports[{}]", port.key);
            let number = fields::port(&port.value, &path, findings);
            if port_name(&port.key, port.at, &path, findings) {
                all.ports.extend(number.map(|number| (port.key.clone(), number)));
            }
            if let Some(number) = number {
                all.places.entry(number).or_insert(port.value.at);
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
            all.modes.extend(port.zip(value));
            if let Some(port) = port {
                all.places.entry(port).or_insert(mode.at);
            }
        }
    }
    all
}
