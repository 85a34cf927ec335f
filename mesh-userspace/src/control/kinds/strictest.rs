//! What a broken object may have meant at its strictest. It is in force only where there is no good version: what was
//! to be protected is then closed rather than open.

use super::super::Code;
use super::super::diagnostic::{Findings, Source};
use super::super::document::{Defaults, Policy, Spec};
use super::super::fields::{DEFAULT_ACTIONS, MODES};
use super::super::key::Key;
use super::super::yaml::{Node, Value};
use super::policy::{ACTIONS, targets};
use super::{DEFAULT_ACTION_LABEL, MODE_LABEL};
use crate::model::{AuthorizationPolicy, DefaultAction, Mode, ObjectKey, ObjectName, PolicyAction, PolicyTarget};
use std::sync::Arc;

/// An ALLOW policy without rules for what it targets, as far as that can be read: the whole namespace otherwise. One
/// that says plainly that it enforces nothing is not made to.
pub(in crate::control) fn strictest_policy(tree: &Node, findings: &mut Findings) -> Option<(Key, Spec)> {
    let Some(name) = policy_name(tree, &findings.source) else {
        let message =
            "its namespace cannot be told, so it protects nothing unless an earlier version is in force".to_owned();
        let help = "mend what is wrong with `metadata`".to_owned();
        findings.report(Code::PolicyOfNowhere, tree.at, message, Some(help));
        return None;
    };
    let spec = tree.field("spec");
    let action = spec.and_then(|spec| word(spec.field("action")?, ACTIONS));
    let dry_run = spec.and_then(|spec| spec.field("dryRun")).is_some_and(is_true);
    let policy = AuthorizationPolicy {
        name: name.clone(),
        targets: spec.and_then(|spec| spec.field("targetRefs")).map(readable_targets).unwrap_or_default(),
        action: action.filter(|action| *action == PolicyAction::Audit).unwrap_or(PolicyAction::Allow),
        dry_run,
        rules: Vec::new(),
    };
    let policy = Policy { policy: Arc::new(policy), targets: Vec::new(), rules: Vec::new() };
    Some((ObjectKey::Policy(name).into(), Spec::Policy(Arc::new(policy))))
}

/// Its name, or one made up from its place if only the namespace can be read.
fn policy_name(tree: &Node, source: &Source) -> Option<ObjectName> {
    let metadata = tree.field("metadata")?;
    let namespace = match (metadata.field("namespace"), &metadata.value) {
        (Some(Node { value: Value::Text(namespace), .. }), _) => namespace,
        // As everywhere: not stated is `default`. Of a torn mapping it may have come after.
        (None | Some(Node { value: Value::Null, .. }), Value::Mapping(_)) => "default",
        _ => return None,
    };
    let written = metadata.field("name").and_then(Node::text).and_then(|name| ObjectName::parse(namespace, name).ok());
    written.or_else(|| {
        let file: String = source.file.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let file = file.to_ascii_lowercase();
        let file = file.trim_matches('-').get(..file.len().min(40)).unwrap_or_default();
        ObjectName::parse(namespace, &format!("unnamed.{file}.{}", tree.at.line))
            .or_else(|_| ObjectName::parse(namespace, &format!("unnamed.{}", tree.at.line)))
            .ok()
    })
}

/// The targets if every one of them can be read; else none, which is all of the namespace.
fn readable_targets(node: &Node) -> Vec<PolicyTarget> {
    let mut unread = Findings::new(Source::new("", ""));
    let (targets, _) = targets(node, &mut unread);
    if unread.errors() == 0 { targets } else { Vec::new() }
}

/// Of each of our labels what it says, or the strictest it could: also if the labels cannot be read at all.
pub(in crate::control) fn strictest_namespace(tree: &Node, _: &mut Findings) -> Option<(Key, Spec)> {
    let metadata = tree.field("metadata")?;
    let name = metadata.field("name").and_then(Node::text)?;
    ObjectName::parse(name, "default").ok()?;
    let labels = metadata.field("labels").filter(|labels| !matches!(labels.value, Value::Null));
    let torn = matches!(metadata.value, Value::Torn(_));
    let defaults = Defaults {
        mode: strictest_label(labels, MODE_LABEL, MODES, Mode::Strict, torn),
        action: strictest_label(labels, DEFAULT_ACTION_LABEL, DEFAULT_ACTIONS, DefaultAction::Deny, torn),
    };
    Some((Key::Namespace(name.into()), Spec::Namespace(defaults)))
}

fn strictest_label<T: Copy>(
    labels: Option<&Node>,
    label: &str,
    choices: &[(&'static str, T)],
    strictest: T,
    torn: bool,
) -> Option<T> {
    let Some(labels) = labels else { return torn.then_some(strictest) };
    match (labels.field(label), &labels.value) {
        (Some(value), _) => Some(word(value, choices).unwrap_or(strictest)),
        (None, Value::Mapping(_)) => None,
        (None, _) => Some(strictest),
    }
}

fn word<T: Copy>(node: &Node, choices: &[(&'static str, T)]) -> Option<T> {
    let text = node.text()?;
    choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value)
}

fn is_true(node: &Node) -> bool {
    matches!(&node.value, Value::Bool(text) if text.eq_ignore_ascii_case("true"))
}
