//! Services as a scenario states them.

use crate::catalog::NAMESPACE;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// A `Service` with an IPv4 and an IPv6 address.
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    pub vips: Vec<IpAddr>,
    pub selector: BTreeMap<String, String>,
    /// TCP ports and where they lead.
    pub ports: Vec<(u16, Value)>,
    /// UDP ports and where they lead.
    pub udp_ports: Vec<(u16, Value)>,
    /// Further fields of its `spec`, as in `trafficDistribution`.
    pub spec: Map<String, Value>,
}

impl Service {
    pub(crate) fn new(name: &str, vips: Vec<IpAddr>, selector: BTreeMap<String, String>, port: (u16, Value)) -> Self {
        let (ports, udp_ports) = (vec![port], Vec::new());
        Self { name: name.to_owned(), vips, selector, ports, udp_ports, spec: Map::new() }
    }

    /// Adds a UDP port.
    pub fn udp(&mut self, port: u16, target: impl Into<Value>) -> &mut Self {
        self.udp_ports.push((port, target.into()));
        self
    }

    /// Sets a field of its `spec`: `trafficDistribution`, `sessionAffinity`, and so on.
    pub fn set(&mut self, field: &str, value: impl Into<Value>) -> &mut Self {
        self.spec.insert(field.to_owned(), value.into());
        self
    }

    pub(crate) fn document(&self) -> Value {
        let tcp = self.ports.iter().map(|(port, target)| service_port("port", *port, target, "TCP"));
        let udp = self.udp_ports.iter().map(|(port, target)| service_port("udp", *port, target, "UDP"));
        let mut spec = self.spec.clone();
        spec.insert("clusterIP".into(), json!(self.vips[0]));
        spec.insert("clusterIPs".into(), json!(self.vips));
        spec.insert("selector".into(), json!(self.selector));
        spec.insert("ports".into(), tcp.chain(udp).collect());
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": self.name, "namespace": NAMESPACE}, "spec": spec,
        })
    }
}

fn service_port(kind: &str, port: u16, target: &Value, protocol: &str) -> Value {
    json!({"name": format!("{kind}-{port}"), "port": port, "targetPort": target, "protocol": protocol})
}
