//! `v1 Namespace`: the defaults of its workloads.

use super::super::Code;
use super::super::diagnostic::{Findings, Position};
use super::super::document::Spec;
use super::super::fields::Fields;
use super::super::key::Key;
use super::metadata;
use crate::model::ObjectName;

pub(in crate::control) fn namespace(
    mut top: Fields,
    key: &mut Option<(Key, Position)>,
    findings: &mut Findings,
) -> Option<Spec> {
    let metadata = metadata(&mut top, findings);
    top.ignore(&["spec", "status"]);
    top.finish(findings);
    let metadata = metadata?;
    // As the namespace of some object: the rules are the same.
    if let Err(error) = ObjectName::parse(&metadata.name, "default") {
        findings.report(Code::InvalidName, metadata.name_at, error.to_string(), None);
        return None;
    }
    metadata.identify(Key::Namespace(metadata.name.as_str().into()), key, findings);
    Some(Spec::Namespace(metadata.defaults))
}
