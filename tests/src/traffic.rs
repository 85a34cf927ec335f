//! Traffic policies as a scenario states them.

use crate::catalog::NAMESPACE;
use serde_json::{Map, Value, json};

/// A `TrafficPolicy` of [`NAMESPACE`] for one service, which has its name until told otherwise.
#[derive(Clone, Debug)]
pub struct Traffic {
    name: String,
    services: Vec<String>,
    spec: Map<String, Value>,
}

impl Traffic {
    pub(crate) fn of(service: &str) -> Self {
        Self { name: service.to_owned(), services: vec![service.to_owned()], spec: Map::new() }
    }

    /// Targets another service, beside those that it targets.
    pub fn for_service(&mut self, service: &str) -> &mut Self {
        self.services.push(service.to_owned());
        self
    }

    /// `loadBalancing.algorithm`: `Random`, `RoundRobin`, `LeastConnections`, `PeakEWMA` or `Maglev`.
    pub fn algorithm(&mut self, algorithm: &str) -> &mut Self {
        self.set("loadBalancing", json!({"algorithm": algorithm}))
    }

    /// `sameNode`: `Kernel` or `Tunnel`.
    pub fn same_node(&mut self, way: &str) -> &mut Self {
        self.set("sameNode", way)
    }

    /// Sets fields of a section of `spec` (`loadBalancing`, `retry`, `ejection`, `limits`, ...) beside those that are
    /// set, or a field that is no section.
    pub fn set(&mut self, field: &str, value: impl Into<Value>) -> &mut Self {
        match (self.spec.get_mut(field), value.into()) {
            (Some(Value::Object(present)), Value::Object(more)) => present.extend(more),
            (_, value) => drop(self.spec.insert(field.to_owned(), value)),
        }
        self
    }

    pub(crate) fn document(&self) -> Value {
        let mut spec = self.spec.clone();
        let targets = self.services.iter().map(|service| json!({"kind": "Service", "name": service}));
        spec.insert("targetRefs".into(), targets.collect());
        json!({
            "apiVersion": "nodemesh.io/v1alpha1", "kind": "TrafficPolicy",
            "metadata": {"name": self.name, "namespace": NAMESPACE}, "spec": spec,
        })
    }
}
