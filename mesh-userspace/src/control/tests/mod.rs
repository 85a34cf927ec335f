mod fuzz;
mod golden;
mod golden_policy;
mod golden_traffic;
mod policies;
mod retention;
mod traffic;
mod watching;

use super::directory::Directory;
use super::{Diagnostic, Severity};
use std::path::Path;

/// A sound catalog that the tests change.
pub(super) const MESH: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: example.org}
";

pub(super) const NODE: &str = "\
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
";

pub(super) fn service(name: &str, vip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  clusterIP: {vip}\n  \
         selector: {{app: web}}\n  ports:\n  - {{port: 80, targetPort: http}}\n"
    )
}

pub(super) fn workload(name: &str, address: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: shop, labels: \
         {{app: web}}}}\nspec:\n  node: n1\n  addresses: [{address}]\n  ports: {{http: 8080}}\n"
    )
}

pub(super) fn write(directory: &Path, file: &str, text: &str) {
    std::fs::write(directory.join(file), text).unwrap();
}

/// Code, file, line, column of each finding.
pub(super) fn places(found: &[Diagnostic]) -> Vec<(&str, &str, u32, u32)> {
    found.iter().map(|d| (d.code.as_str(), d.file.as_str(), d.line, d.column)).collect()
}

pub(super) fn errors(directory: &Directory) -> Vec<(&str, &str, u32, u32)> {
    let errors = directory.diagnostics().iter().filter(|found| found.severity == Severity::Error);
    errors.map(|d| (d.code.as_str(), d.file.as_str(), d.line, d.column)).collect()
}

/// A policy of namespace shop; `spec` in flow style, on line 4.
pub(super) fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

/// A traffic policy of namespace shop; `spec` in flow style, on line 4.
pub(super) fn traffic(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}
