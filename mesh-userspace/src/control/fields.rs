//! Typed values out of trees, each refusal with its place and a way out.

use super::diagnostic::{Findings, Position};
use super::duration::duration;
use super::yaml::{Entry, Node, Value};
use super::{Code, suggest};
use crate::model::{DefaultAction, Mode};
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// A mapping that must account for each of its fields: those asked for, those listed as ignored, and nothing else.
pub(super) struct Fields<'n> {
    entries: &'n [Entry],
    at: Position,
    path: String,
    known: Vec<&'static str>,
    refused: Vec<&'static str>,
}

impl<'n> Fields<'n> {
    /// Reports and gives `None` if the node is no mapping.
    pub(super) fn of(node: &'n Node, path: &str, findings: &mut Findings) -> Option<Self> {
        let Value::Mapping(entries) = &node.value else {
            wrong_type(node, path, "a mapping", findings);
            return None;
        };
        Some(Self { entries, at: node.at, path: path.to_owned(), known: Vec::new(), refused: Vec::new() })
    }

    pub(super) fn at(&self) -> Position {
        self.at
    }

    /// A field's full path, as in `spec.ports`.
    pub(super) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// An optional field; one that is there without a value counts as absent, as in Kubernetes.
    pub(super) fn get(&mut self, name: &'static str) -> Option<&'n Entry> {
        self.known.push(name);
        self.entries.iter().find(|entry| entry.key == name && !matches!(entry.value.value, Value::Null))
    }

    /// An optional field where leaving out the value would say something else than leaving out the field.
    pub(super) fn stated(&mut self, name: &'static str) -> Option<&'n Entry> {
        self.known.push(name);
        self.entries.iter().find(|entry| entry.key == name)
    }

    /// Reports those of these fields that are there: known, and not to be overlooked.
    pub(super) fn refuse(
        &mut self,
        names: &[&'static str],
        code: Code,
        why: &str,
        help: &str,
        findings: &mut Findings,
    ) {
        for entry in self.entries.iter().filter(|entry| names.contains(&entry.key.as_str())) {
            let message = format!("`{}` {why}", self.path(&entry.key));
            findings.report(code, entry.at, message, Some(help.to_owned()));
        }
        // Not by `ignore`: what is refused is no suggestion for a misspelt field.
        self.refused.extend(names);
    }

    /// A field that must be there.
    pub(super) fn require(&mut self, name: &'static str, findings: &mut Findings) -> Option<&'n Entry> {
        let found = self.get(name);
        if found.is_none() {
            let empty = self.entries.iter().find(|entry| entry.key == name);
            let at = empty.map_or(self.at, |entry| entry.at);
            let near = self.misspelt(name);
            let help = near.map(|wrong| format!("`{wrong}` looks like it, but is not it"));
            findings.report(Code::MissingField, at, format!("`{}` is missing", self.path(name)), help);
        }
        found
    }

    fn misspelt(&self, name: &str) -> Option<&'n str> {
        let others = self.entries.iter().map(|entry| entry.key.as_str()).filter(|key| !self.known.contains(key));
        suggest::nearest(name, others)
    }

    /// An optional field that is a mapping itself.
    pub(super) fn part(&mut self, name: &'static str, findings: &mut Findings) -> Option<Self> {
        let path = self.path(name);
        Self::of(&self.get(name)?.value, &path, findings)
    }

    /// An optional duration; see [`duration`].
    pub(super) fn duration(
        &mut self,
        name: &'static str,
        bounds: (Duration, Duration),
        findings: &mut Findings,
    ) -> Option<Duration> {
        let path = self.path(name);
        duration(&self.get(name)?.value, &path, bounds, findings)
    }

    /// An optional number; see [`integer`].
    pub(super) fn number(&mut self, name: &'static str, bounds: (u32, u32), findings: &mut Findings) -> Option<u32> {
        let path = self.path(name);
        integer(&self.get(name)?.value, &path, bounds, findings)
    }

    /// An optional word; see [`choice`].
    pub(super) fn choice<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&'static str, T)],
        findings: &mut Findings,
    ) -> Option<T> {
        let path = self.path(name);
        choice(&self.get(name)?.value, &path, choices, findings)
    }

    /// Fields that may be there and are not read.
    pub(super) fn ignore(&mut self, names: &[&'static str]) {
        self.known.extend(names);
    }

    /// Reports every field that nobody asked for.
    pub(super) fn finish(self, findings: &mut Findings) {
        let accounted = |key: &str| self.known.contains(&key) || self.refused.contains(&key);
        for entry in self.entries.iter().filter(|entry| !accounted(&entry.key)) {
            let place = if self.path.is_empty() { "the object".to_owned() } else { format!("`{}`", self.path) };
            let key: String = entry.key.chars().take(80).collect();
            let message = format!("unknown field `{key}` in {place}");
            let help = suggest::help(&entry.key, self.known.iter().copied());
            findings.report(Code::UnknownField, entry.at, message, help);
        }
    }
}

fn wrong_type(node: &Node, path: &str, expected: &str, findings: &mut Findings) {
    let help = match (&node.value, expected) {
        (Value::Bool(text) | Value::Number(text), "a string") if text.len() < 64 => {
            Some(format!("quote it: \"{text}\""))
        }
        (Value::Text(text), "a whole number") if text.parse::<u64>().is_ok() => {
            Some(format!("write it without quotes: {text}"))
        }
        _ => None,
    };
    let place = if path.is_empty() { "the document".to_owned() } else { format!("`{path}`") };
    let message = format!("{place} must be {expected}, found {}", node.value.describe());
    findings.report(Code::WrongType, node.at, message, help);
}

pub(super) fn text<'n>(node: &'n Node, path: &str, findings: &mut Findings) -> Option<&'n str> {
    if let Value::Text(text) = &node.value {
        return Some(text);
    }
    wrong_type(node, path, "a string", findings);
    None
}

pub(super) fn list<'n>(node: &'n Node, path: &str, findings: &mut Findings) -> Option<&'n [Node]> {
    if let Value::Sequence(items) = &node.value {
        return Some(items);
    }
    wrong_type(node, path, "a list", findings);
    None
}

/// The entries of a mapping whose keys are the user's own.
pub(super) fn mapping<'n>(node: &'n Node, path: &str, findings: &mut Findings) -> Option<&'n [Entry]> {
    if let Value::Mapping(entries) = &node.value {
        return Some(entries);
    }
    wrong_type(node, path, "a mapping", findings);
    None
}

pub(super) fn boolean(node: &Node, path: &str, findings: &mut Findings) -> Option<bool> {
    match &node.value {
        Value::Bool(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::Bool(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => {
            wrong_type(node, path, "`true` or `false`", findings);
            None
        }
    }
}

/// A whole number from `min` to `max`, both included.
pub(super) fn integer(node: &Node, path: &str, (min, max): (u32, u32), findings: &mut Findings) -> Option<u32> {
    let Value::Number(text) = &node.value else {
        wrong_type(node, path, "a whole number", findings);
        return None;
    };
    whole(text, node.at, path, (min, max), findings)
}

/// A port number.
pub(super) fn port(node: &Node, path: &str, findings: &mut Findings) -> Option<u16> {
    integer(node, path, PORTS, findings).and_then(|port| u16::try_from(port).ok())
}

/// A port number that is a mapping's key, where quotes make no difference.
pub(super) fn port_key(entry: &Entry, path: &str, findings: &mut Findings) -> Option<u16> {
    whole(&entry.key, entry.at, path, PORTS, findings).and_then(|port| u16::try_from(port).ok())
}

const PORTS: (u32, u32) = (1, 65_535);

fn whole(text: &str, at: Position, path: &str, (min, max): (u32, u32), findings: &mut Findings) -> Option<u32> {
    let number = text.parse::<u32>().ok().filter(|number| (min..=max).contains(number));
    if number.is_none() {
        let text: String = text.chars().take(40).collect();
        let message = format!("`{path}` must be a whole number from {min} to {max}, found `{text}`");
        findings.report(Code::OutOfRange, at, message, None);
    }
    number
}

/// What an address is for, and so which ones make no sense.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Workload,
    VirtualAddress,
    /// May be a loopback address: a mesh of daemons on one machine.
    Node,
}

pub(super) fn address(node: &Node, path: &str, purpose: Use, findings: &mut Findings) -> Option<IpAddr> {
    let written = text(node, path, findings)?;
    let refuse = |findings: &mut Findings, reason: String, help: Option<String>| {
        findings.report(Code::InvalidAddress, node.at, format!("`{path}`: {reason}"), help);
    };
    let Ok(address) = written.parse::<IpAddr>() else {
        let help = written.parse::<IpNet>().is_ok().then(|| "leave out the prefix length".to_owned());
        let shown: String = written.chars().take(64).collect();
        refuse(findings, format!("`{shown}` is not an IP address"), help);
        return None;
    };
    if address != address.to_canonical() {
        refuse(findings, format!("`{address}` is an IPv4 address"), Some(format!("write {}", address.to_canonical())));
        return None;
    }
    let useless = match address {
        _ if address.is_unspecified() => Some("stands for any address"),
        _ if address.is_multicast() => Some("is a multicast address"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("is the broadcast address"),
        _ if address.is_loopback() && purpose != Use::Node => Some("is a loopback address, which is never captured"),
        _ => None,
    };
    if let Some(reason) = useless {
        refuse(findings, format!("`{address}` {reason}"), None);
        return None;
    }
    Some(address)
}

pub(super) fn range(node: &Node, path: &str, findings: &mut Findings) -> Option<IpNet> {
    let written = text(node, path, findings)?;
    let shown: String = written.chars().take(64).collect();
    let Ok(range) = written.parse::<IpNet>() else {
        let help = written.parse::<IpAddr>().ok().map(|address| format!("write {}", IpNet::from(address)));
        findings.report(Code::InvalidRange, node.at, format!("`{path}`: `{shown}` is not an address range"), help);
        return None;
    };
    if range.addr() != range.addr().to_canonical() {
        let message = format!("`{path}`: `{shown}` is a range of IPv4 addresses written as IPv6");
        findings.report(Code::InvalidRange, node.at, message, Some("write it as IPv4, as in 10.0.0.0/8".into()));
        return None;
    }
    if range != range.trunc() {
        let message = format!("`{path}`: `{shown}` has bits set beyond its prefix");
        findings.report(Code::InvalidRange, node.at, message, Some(format!("write {}", range.trunc())));
        return None;
    }
    Some(range)
}

/// One of a few words.
pub(super) fn choice<T: Copy>(
    node: &Node,
    path: &str,
    choices: &[(&'static str, T)],
    findings: &mut Findings,
) -> Option<T> {
    let written = text(node, path, findings)?;
    let found = choices.iter().find(|(word, _)| *word == written);
    if found.is_none() {
        let shown: String = written.chars().take(64).collect();
        let help = suggest::help(written, choices.iter().map(|(word, _)| *word));
        findings.report(Code::InvalidValue, node.at, format!("`{path}`: `{shown}` is not allowed"), help);
    }
    found.map(|(_, value)| *value)
}

pub(super) const MODES: &[(&str, Mode)] =
    &[("strict", Mode::Strict), ("permissive", Mode::Permissive), ("disabled", Mode::Disabled)];

pub(super) const DEFAULT_ACTIONS: &[(&str, DefaultAction)] =
    &[("allow", DefaultAction::Allow), ("deny", DefaultAction::Deny)];
