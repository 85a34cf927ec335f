//! Policies, plaintext callers and explanations for people.

use super::fetch::encode;
use super::show::{Show, View};
use super::table::{
    Align::{Left, Right},
    Table, printable,
};
use super::{Done, Exit, Problem, Session};
use crate::admin::policies::{EndRow, PathRow, PlaintextRow, PolicyRow, RulingRow};
use std::io::Write;

const UDP: &str = "udp";

impl<W: Write> Session<'_, W> {
    /// `nodemesh explain SRC DST[:PORT[/udp]]`: exit code 3 if a connection could be refused.
    pub(super) fn explain(&mut self, source: &str, destination: &str) -> Result<Done, Problem> {
        let (destination, protocol) = protocol(destination);
        let (destination, port) = split(destination).map_err(Problem::Input)?;
        let port = port.map_or_else(String::new, |port| format!("&port={port}"));
        let protocol = protocol.map_or_else(String::new, |protocol| format!("&protocol={protocol}"));
        let path = format!("/v1/explain?source={}&destination={}{port}{protocol}", encode(source), encode(destination));
        let document = self.fetch::<PathRow>(&path)?;
        self.print(&document)?;
        let refused = document.items.iter().any(|path| path.verdict == "deny");
        Ok(if refused { Exit::Findings } else { Exit::Ok }.into())
    }
}

/// What follows a port or an IPv6 address; `shop/udp` is a name.
fn protocol(destination: &str) -> (&str, Option<&str>) {
    match destination.rsplit_once('/') {
        Some((rest, protocol @ ("tcp" | "udp"))) if rest.contains(':') => (rest, Some(protocol)),
        _ => (destination, None),
    }
}

/// `DST`, `DST:PORT`; an IPv6 address with a port is `[ADDRESS]:PORT`.
fn split(destination: &str) -> Result<(&str, Option<u16>), String> {
    if let Some((address, rest)) = destination.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        return match rest.strip_prefix(':') {
            Some(port) => number(port).map(|port| (address, Some(port))),
            None if rest.is_empty() => Ok((address, None)),
            None => Err(format!("{destination:?} is no destination: write [ADDRESS]:PORT")),
        };
    }
    match destination.split_once(':') {
        // More than one colon: an IPv6 address.
        Some((_, rest)) if rest.contains(':') => Ok((destination, None)),
        Some((name, port)) => number(port).map(|port| (name, Some(port))),
        None => Ok((destination, None)),
    }
}

fn number(port: &str) -> Result<u16, String> {
    match port.parse() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{port:?} is no port: write a number from 1 to 65535")),
    }
}

impl Show for PolicyRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut columns = vec![("NAMESPACE", Left), ("NAME", Left), ("ACTION", Left), ("DRY-RUN", Left)];
        columns.extend([("TARGETS", Left), ("WORKLOADS", Right), ("LOCAL", Right), ("HITS", Right)]);
        if view.wide {
            columns.extend([("RULE", Left), ("SOURCES", Left), ("PORTS", Left), ("RULE-HITS", Right)]);
        }
        let mut table = Table::new(&columns);
        for row in items {
            let targets = if row.targets.is_empty() { "all".to_owned() } else { row.targets.join("; ") };
            let cells = [
                row.namespace.clone(),
                row.name.clone(),
                row.action.clone(),
                if row.dry_run { "yes" } else { "no" }.to_owned(),
                targets,
                row.workloads.total.to_string(),
                row.workloads.local.to_string(),
                row.hits.to_string(),
            ];
            if !view.wide {
                table.row(cells);
                continue;
            }
            for rule in &row.rules {
                let sources = if rule.sources.is_empty() { "nobody".to_owned() } else { rule.sources.join(", ") };
                let more = [rule.name.clone(), sources, ports(&rule.ports), rule.hits.to_string()];
                table.row(cells.iter().cloned().chain(more));
            }
            if row.rules.is_empty() {
                table.row(cells.into_iter().chain(["none".to_owned(), String::new(), String::new(), String::new()]));
            }
        }
        table.render(view.headers)
    }
}

fn ports(ports: &[u16]) -> String {
    if ports.is_empty() { "all".to_owned() } else { list(ports) }
}

fn list(ports: &[u16]) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl Show for PlaintextRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("DESTINATION", Left),
            ("SOURCE", Left),
            ("WORKLOAD", Left),
            ("PORTS", Left),
            ("ADMITTED", Right),
            ("REFUSED", Right),
            ("FIRST-SEEN", Left),
            ("LAST-SEEN", Left),
        ]);
        for row in items {
            table.row([
                row.destination.clone(),
                row.source.clone(),
                row.source_workload.clone().unwrap_or_default(),
                list(&row.ports),
                row.admitted.to_string(),
                row.refused.to_string(),
                row.first_seen.clone(),
                row.last_seen.clone(),
            ]);
        }
        table.render(view.headers)
    }
}

impl Show for PathRow {
    fn show(items: &[Self], _view: &View) -> String {
        let mut text = String::new();
        for row in items {
            let service = row.service.as_ref().map_or_else(String::new, |service| format!("{service} at "));
            let protocol = if row.protocol == UDP { "/udp" } else { "" };
            let head = format!("{} to {service}{}{protocol}", end(&row.source), row.asked);
            let mut lines = vec![head];
            lines.extend(row.balancing.as_ref().map(|how| format!("  balances  {how}")));
            if let Some(destination) = &row.destination {
                lines.push(format!("  reaches   {}", end(destination)));
            }
            let transport = row.transport.as_ref().map_or_else(String::new, |transport| format!(" over {transport}"));
            lines.push(format!("  arrives   {}{transport}: {}", row.arrives, row.why));
            lines.push(format!("  verdict   {}", verdict(row)));
            lines.extend(row.audit.as_ref().map(|rule| format!("  audit     {rule}")));
            lines.extend(
                row.dry_run
                    .as_ref()
                    .map(|would_be| format!("  dry-run   {} with the policies in dry-run in force", ruling(would_be))),
            );
            for line in lines {
                text.push_str(&printable(&line));
                text.push('\n');
            }
        }
        text
    }
}

fn verdict(row: &PathRow) -> String {
    let said = row.ruling.as_ref().map_or_else(|| row.verdict.clone(), ruling);
    match row.enforced_by.as_deref().filter(|_| row.verdict == "deny") {
        Some("kernel_connect") if row.protocol == UDP => format!("{said}; connect() or sendto() fails at the source"),
        Some("kernel_connect") => format!("{said}; connect() fails at the source"),
        Some("kernel_sk_lookup") => format!("{said}; the destination's kernel drops it"),
        Some(_) if row.protocol == UDP => format!("{said}; the source's proxy drops it"),
        Some(_) => format!("{said}; the source's proxy resets it"),
        None => said,
    }
}

fn ruling(row: &RulingRow) -> String {
    let by = match (&row.policy, &row.rule) {
        (Some(policy), Some(rule)) => format!(" by rule {rule} of policy {policy}"),
        (Some(policy), None) => format!(": no rule of policy {policy} matches"),
        _ => String::new(),
    };
    format!("{} ({}){by}", row.verdict, row.reason)
}

fn end(row: &EndRow) -> String {
    let facts = [&row.identity, &row.node.as_ref().map(|node| format!("node {node}")), &row.mode];
    let facts: Vec<&str> = facts.into_iter().flatten().map(String::as_str).collect();
    let name = row.workload.as_ref().map_or_else(|| row.address.clone(), |name| format!("{name} ({})", row.address));
    if facts.is_empty() { name } else { format!("{name}, {}", facts.join(", ")) }
}

#[cfg(test)]
mod tests;
