//! `nodemesh.io/v1alpha1 MeshConfig`.

use super::super::Code;
use super::super::diagnostic::{Findings, Position};
use super::super::document::Spec;
use super::super::fields::{self, DEFAULT_ACTIONS, Fields, MODES};
use super::super::key::Key;
use super::{SAME_NODE, metadata, section};
use crate::model::{DefaultAction, DeniedError, Mesh, Mode, ObjectKey, TransportChoice, TrustDomain};
use std::sync::Arc;

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
    })))
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
