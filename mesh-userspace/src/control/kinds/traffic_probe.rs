//! The health check of a traffic policy.

use super::super::diagnostic::Findings;
use super::super::fields::{self, Fields};
use super::super::{Code, format_duration, yaml};
use crate::model::{HealthCheck, Probe};
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(10);
const INTERVAL_BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_hours(1));
const TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUT_BOUNDS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_mins(1));
const UNHEALTHY_AFTER: u32 = 3;
const HEALTHY_AFTER: u32 = 1;
const THRESHOLD: (u32, u32) = (1, 100);

const MAX_PATH: usize = 1_024;
const MAX_NAME: usize = 253;

const PROBES: &[&str] = &["tcp", "http", "grpc"];

pub(super) fn health_check(spec: &mut Fields, findings: &mut Findings) -> Option<HealthCheck> {
    let mut fields = spec.part("healthCheck", findings)?;
    let interval = fields.duration("interval", INTERVAL_BOUNDS, findings).unwrap_or(INTERVAL);
    let stated = fields.duration("timeout", TIMEOUT_BOUNDS, findings);
    if let Some(timeout) = stated.filter(|timeout| *timeout > interval) {
        let message = "`spec.healthCheck.timeout` is longer than `interval`".to_owned();
        let help =
            format!("a probe ends before the next one begins: write `interval: {}` at least", format_duration(timeout));
        findings.report(Code::InvalidDuration, fields.at(), message, Some(help));
    }
    let unhealthy_after = fields.number("unhealthyAfter", THRESHOLD, findings).unwrap_or(UNHEALTHY_AFTER);
    let healthy_after = fields.number("healthyAfter", THRESHOLD, findings).unwrap_or(HEALTHY_AFTER);
    let probe = probe(&mut fields, findings);
    fields.finish(findings);
    let timeout = stated.unwrap_or(TIMEOUT.min(interval));
    Some(HealthCheck { probe: probe?, interval, timeout, unhealthy_after, healthy_after })
}

/// Exactly one of them.
fn probe(check: &mut Fields, findings: &mut Findings) -> Option<Probe> {
    let stated: Vec<_> = PROBES.iter().filter_map(|name| Some((*name, check.stated(name)?))).collect();
    let [(name, entry)] = stated[..] else {
        let (code, message, at) = match stated.get(1) {
            None => (Code::MissingField, "`spec.healthCheck` does not say what to probe", check.at()),
            Some((_, second)) => (Code::Exclusive, "`spec.healthCheck` has more than one probe", second.at),
        };
        let help = "write one of `tcp: {}`, `http: {path: /}`, `grpc: {}`".to_owned();
        findings.report(code, at, message.to_owned(), Some(help));
        return None;
    };
    let path = format!("spec.healthCheck.{name}");
    // Left empty it would be `tcp`'s and `grpc`'s right form, but a mapping says what is meant.
    let mut fields = Fields::of(&entry.value, &path, findings)?;
    let probe = match name {
        "http" => http(&mut fields, findings),
        "grpc" => grpc(&mut fields, findings),
        _ => Some(Probe::Tcp),
    };
    fields.finish(findings);
    probe
}

fn http(fields: &mut Fields, findings: &mut Findings) -> Option<Probe> {
    let is_path =
        |text: &str| text.starts_with('/') && text.len() <= MAX_PATH && is_visible(text) && !text.contains('#');
    let path = fields.require("path", findings);
    let path = path.and_then(|entry| {
        let help = "it begins with `/` and has no blanks, as in /healthz?full=1";
        sound(&entry.value, "spec.healthCheck.http.path", is_path, help, findings)
    });
    let is_host =
        |text: &str| !text.is_empty() && text.len() <= MAX_NAME && is_visible(text) && !text.contains(['/', '@']);
    let host = fields.get("host").map(|entry| {
        let help = "a name, perhaps with a port, as in web.example.org:8080";
        sound(&entry.value, "spec.healthCheck.http.host", is_host, help, findings)
    });
    Some(Probe::Http { path: path?, host: host.map_or(Some(None), |host| host.map(Some))? })
}

fn grpc(fields: &mut Fields, findings: &mut Findings) -> Option<Probe> {
    let is_service = |text: &str| text.len() <= MAX_NAME && is_visible(text);
    let Some(entry) = fields.get("service") else {
        // The health service's own word for the server as a whole.
        return Some(Probe::Grpc { service: String::new() });
    };
    let help = "the name that the server's health service knows, as in shop.Cart";
    sound(&entry.value, "spec.healthCheck.grpc.service", is_service, help, findings)
        .map(|service| Probe::Grpc { service })
}

/// What is sent in a request must not be able to end it.
fn is_visible(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn sound(
    node: &yaml::Node,
    path: &str,
    is_sound: impl Fn(&str) -> bool,
    help: &str,
    findings: &mut Findings,
) -> Option<String> {
    let text = fields::text(node, path, findings)?;
    if !is_sound(text) {
        findings.report(Code::InvalidValue, node.at, format!("`{path}` cannot be sent"), Some(help.to_owned()));
        return None;
    }
    Some(text.to_owned())
}
