//! Authorization policies as a scenario states them.

use crate::catalog::NAMESPACE;
use serde_json::{Value, json};

/// An `AuthorizationPolicy` of [`NAMESPACE`]: ALLOW, for every workload there, and without rules until told otherwise.
#[derive(Clone, Debug)]
pub struct Policy {
    name: String,
    targets: Vec<Value>,
    action: String,
    dry_run: bool,
    rules: Vec<Value>,
}

impl Policy {
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.to_owned(), targets: Vec::new(), action: "ALLOW".into(), dry_run: false, rules: Vec::new() }
    }

    /// `ALLOW`, `DENY` or `AUDIT`.
    pub fn action(&mut self, action: &str) -> &mut Self {
        action.clone_into(&mut self.action);
        self
    }

    pub fn dry_run(&mut self, dry_run: bool) -> &mut Self {
        self.dry_run = dry_run;
        self
    }

    /// Targets the workloads whose label `app` is this, beside the targets it has.
    pub fn for_app(&mut self, app: &str) -> &mut Self {
        self.targets.push(json!({"kind": "Pod", "selector": {"matchLabels": {"app": app}}}));
        self
    }

    /// Targets what a service leads to, beside the targets it has.
    pub fn for_service(&mut self, service: &str) -> &mut Self {
        self.targets.push(json!({"kind": "Service", "name": service}));
        self
    }

    /// Adds a rule for these sources (see [`account`] and its like; none matches nobody) on these ports (none: all).
    pub fn rule(&mut self, name: &str, sources: &[Value], ports: &[u16]) -> &mut Self {
        self.add(json!({"name": name, "sources": sources}), ports)
    }

    /// Adds a rule for everyone, with or without an identity.
    pub fn rule_for_everyone(&mut self, name: &str, ports: &[u16]) -> &mut Self {
        self.add(json!({"name": name}), ports)
    }

    fn add(&mut self, mut rule: Value, ports: &[u16]) -> &mut Self {
        if !ports.is_empty() {
            rule["networkAttributes"] = json!({"ports": ports});
        }
        self.rules.push(rule);
        self
    }

    pub(crate) fn document(&self) -> Value {
        let mut spec = json!({"action": self.action, "dryRun": self.dry_run, "rules": self.rules});
        if !self.targets.is_empty() {
            spec["targetRefs"] = json!(self.targets);
        }
        json!({
            "apiVersion": "nodemesh.io/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": self.name, "namespace": NAMESPACE}, "spec": spec,
        })
    }
}

/// A service account of [`NAMESPACE`]; `*` is every one.
#[must_use]
pub fn account(name: &str) -> Value {
    json!({"type": "ServiceAccount", "serviceAccount": {"name": name}})
}

/// Every identity of a namespace.
#[must_use]
pub fn namespace(name: &str) -> Value {
    json!({"type": "Namespace", "namespace": name})
}

/// A SPIFFE ID or pattern.
#[must_use]
pub fn spiffe(pattern: &str) -> Value {
    json!({"type": "SPIFFE", "spiffe": pattern})
}

/// Addresses, with or without identity.
#[must_use]
pub fn range(cidr: &str) -> Value {
    json!({"type": "CIDR", "cidr": cidr})
}
