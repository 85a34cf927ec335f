//! The sources of a policy's rule: whom it recognises.

use super::super::diagnostic::Findings;
use super::super::document::RulePlaces;
use super::super::fields::{self, Fields};
use super::super::{Code, yaml};
use crate::model::{ObjectName, Source, SpiffePattern};
use std::sync::Arc;

/// A type of source, with the field that belongs to it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    ServiceAccount,
    Spiffe,
    Namespace,
    Cidr,
}

const TYPES: &[(&str, (Type, &str))] = &[
    ("ServiceAccount", (Type::ServiceAccount, "serviceAccount")),
    ("SPIFFE", (Type::Spiffe, "spiffe")),
    ("Namespace", (Type::Namespace, "namespace")),
    ("CIDR", (Type::Cidr, "cidr")),
];

pub(super) fn sources(
    entry: &yaml::Entry,
    rule: &str,
    namespace: &str,
    place: &mut RulePlaces,
    findings: &mut Findings,
) -> Vec<Source> {
    let path = format!("{rule}.sources");
    let Some(items) = fields::list(&entry.value, &path, findings) else { return Vec::new() };
    if items.is_empty() {
        let message = format!("`{path}` is empty, so the rule matches nobody");
        findings.report(Code::NoSources, entry.value.at, message, Some("leave it out to match everyone".into()));
    }
    let mut sources = Vec::new();
    for (index, item) in items.iter().enumerate() {
        if let Some(source) = source(item, &format!("{path}[{index}]"), namespace, findings) {
            sources.push(source);
            place.sources.push(item.at);
        }
    }
    sources
}

fn source(item: &yaml::Node, path: &str, namespace: &str, findings: &mut Findings) -> Option<Source> {
    let mut fields = Fields::of(item, path, findings)?;
    let kind = fields.require("type", findings);
    let kind = kind.and_then(|entry| fields::choice(&entry.value, &format!("{path}.type"), TYPES, findings));
    let Some((kind, own)) = kind else {
        fields.ignore(&["serviceAccount", "spiffe", "namespace", "cidr"]);
        fields.finish(findings);
        return None;
    };
    let others: Vec<_> = TYPES.iter().map(|(_, (_, field))| *field).filter(|field| *field != own).collect();
    let help = format!("one source has one type; write another source for it, or `{own}` here");
    fields.refuse(&others, Code::Exclusive, "does not go with this `type`", &help, findings);
    let value = fields.require(own, findings);
    fields.finish(findings);
    let value = &value?.value;
    let path = format!("{path}.{own}");
    match kind {
        Type::ServiceAccount => service_account(value, &path, namespace, findings),
        Type::Namespace => name(value, &path, findings).map(Source::Namespace),
        Type::Cidr => fields::range(value, &path, findings).map(Source::Range),
        Type::Spiffe => {
            let text = fields::text(value, &path, findings)?;
            match SpiffePattern::parse(text) {
                Ok(pattern) => Some(Source::Spiffe(pattern)),
                Err(error) => {
                    findings.report(Code::InvalidPattern, value.at, format!("`{path}`: {error}"), None);
                    None
                }
            }
        }
    }
}

fn service_account(node: &yaml::Node, path: &str, namespace: &str, findings: &mut Findings) -> Option<Source> {
    let mut fields = Fields::of(node, path, findings)?;
    let stated = fields.get("namespace").map(|entry| name(&entry.value, &format!("{path}.namespace"), findings));
    let account = fields.require("name", findings).and_then(|entry| match entry.value.text() {
        Some("*") => Some(None),
        _ => name(&entry.value, &format!("{path}.name"), findings).map(Some),
    });
    fields.finish(findings);
    Some(Source::ServiceAccount { namespace: stated.unwrap_or_else(|| Some(namespace.into()))?, name: account? })
}

/// The name of a namespace or a service account.
fn name(node: &yaml::Node, path: &str, findings: &mut Findings) -> Option<Arc<str>> {
    let text = fields::text(node, path, findings)?;
    if let Err(error) = ObjectName::parse("default", text) {
        let help = text.contains('*').then(|| {
            "for patterns write `{type: SPIFFE, spiffe: 'spiffe://<trust domain>/ns/<namespace>/sa/*'}`".to_owned()
        });
        findings.report(Code::InvalidName, node.at, format!("`{path}`: {error}"), help);
        return None;
    }
    Some(text.into())
}
