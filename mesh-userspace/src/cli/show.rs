//! Documents as tables for people.

use super::table::{
    Align::{Left, Right},
    Table, printable,
};
use crate::admin::documents::{
    ConnectionRow, DiagnosticRow, LaneRow, ServiceRow, Status, VersionRow, WorkloadRow, parse_timestamp,
};
use std::time::{Duration, SystemTime};

/// How to show.
pub(super) struct View {
    pub(super) wide: bool,
    pub(super) headers: bool,
    pub(super) now: SystemTime,
}

/// What can be shown as text.
pub(super) trait Show: Sized {
    fn show(items: &[Self], view: &View) -> String;
}

impl Show for Status {
    fn show(items: &[Self], view: &View) -> String {
        let nodes: Vec<String> = items.iter().map(|status| node(status, view)).collect();
        nodes.join("\n")
    }
}

fn node(status: &Status, view: &View) -> String {
    let mut text = facts(status);
    let mut certificates = Table::new(&[("IDENTITY", Left), ("SERIAL", Left), ("EXPIRES", Left)]);
    for row in &status.certificates {
        certificates.row([row.id.clone(), row.serial.clone(), expiry(&row.not_after, view.now)]);
    }
    let mut outcomes = Table::new(&[("HOOK", Left), ("VERDICT", Left), ("REASON", Left), ("COUNT", Right)]);
    for row in status.outcomes.iter().filter(|row| row.count > 0 || view.wide) {
        outcomes.row([row.hook.clone(), row.verdict.clone(), row.reason.clone(), row.count.to_string()]);
    }
    let mut maps =
        Table::new(&[("MAP", Left), ("ENTRIES", Right), ("CAPACITY", Right), ("USED", Right), ("MEMORY", Right)]);
    for row in &status.maps {
        let used = (row.entries * 100).checked_div(row.capacity).map_or(String::new(), |percent| format!("{percent}%"));
        maps.row([row.name.clone(), row.entries.to_string(), row.capacity.to_string(), used, bytes(row.bytes)]);
    }
    for table in [certificates, outcomes, maps] {
        if !table.is_empty() {
            text.push('\n');
            text.push_str(&table.render(view.headers));
        }
    }
    text
}

fn facts(status: &Status) -> String {
    let ready = match (status.ready, status.not_ready.is_empty()) {
        (true, _) => "yes".to_owned(),
        (false, true) => "no".to_owned(),
        (false, false) => format!("no: {}", status.not_ready.join("; ")),
    };
    let objects: Vec<String> = status.config.objects.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let objects = if objects.is_empty() { "no objects".to_owned() } else { objects.join(", ") };
    let connections = &status.connections;
    let errors = match status.config.errors {
        0 => "no errors".to_owned(),
        1 => "1 error (nodemesh get diagnostics)".to_owned(),
        errors => format!("{errors} errors (nodemesh get diagnostics)"),
    };
    let mut table = Table::new(&[("", Left), ("", Left)]);
    let workloads = &status.workloads;
    for (name, value) in [
        ("Node", status.node.clone()),
        ("Version", format!("{} (ABI {})", status.version, status.abi)),
        ("Ready", ready),
        ("Uptime", span(Duration::from_secs(status.uptime_seconds))),
        ("Config", format!("generation {}: {objects}; {errors}", status.config.generation)),
        (
            "Workloads",
            format!("{} on this node, {} captured, {} failed", workloads.local, workloads.armed, workloads.failed),
        ),
        (
            "Connections",
            format!(
                "{} open; {} opened, {} closed, {} failed since the start",
                connections.active, connections.opened, connections.closed, connections.failed
            ),
        ),
        ("Traffic", format!("{} sent, {} received", bytes(connections.bytes_sent), bytes(connections.bytes_received))),
        ("Lanes", format!("{} open", status.lanes)),
    ] {
        table.row([format!("{name}:"), value]);
    }
    table.render(false)
}

impl Show for WorkloadRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut columns = vec![("NAMESPACE", Left), ("NAME", Left), ("NODE", Left), ("ADDRESSES", Left)];
        columns.extend([("MODE", Left), ("STATE", Left)]);
        if view.wide {
            columns.extend([("NETWORK", Left), ("IDENTITY", Left)]);
        }
        let mut table = Table::new(&columns);
        for row in items {
            let state = row.reason.as_ref().map_or_else(|| row.state.clone(), |why| format!("{}: {why}", row.state));
            let cells = [row.namespace.clone(), row.name.clone(), row.node.clone(), row.addresses.join(",")];
            let cells = cells.into_iter().chain([row.mode.clone(), state]);
            let more = view.wide.then(|| [row.network.clone(), row.identity.clone()]);
            table.row(cells.chain(more.into_iter().flatten()));
        }
        table.render(view.headers)
    }
}

impl Show for ServiceRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("NAMESPACE", Left),
            ("NAME", Left),
            ("VIPS", Left),
            ("PORTS", Left),
            ("ENDPOINTS", Right),
            ("LOCAL", Right),
        ]);
        for row in items {
            table.row([
                row.namespace.clone(),
                row.name.clone(),
                row.vips.join(","),
                row.ports.join(","),
                row.endpoints.total.to_string(),
                row.endpoints.local.to_string(),
            ]);
        }
        table.render(view.headers)
    }
}

impl Show for ConnectionRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut columns = vec![
            ("DIRECTION", Left),
            ("PROTOCOL", Left),
            ("SOURCE", Left),
            ("DESTINATION", Left),
            ("SERVICE", Left),
            ("BACKEND", Left),
            ("NODE", Left),
            ("TRANSPORT", Left),
            ("KX", Left),
            ("SENT", Right),
            ("RECEIVED", Right),
            ("AGE", Right),
        ];
        if view.wide {
            columns.extend([("SUITE", Left), ("SOURCE-IDENTITY", Left), ("DESTINATION-IDENTITY", Left)]);
        }
        let mut table = Table::new(&columns);
        for row in items {
            let known = |text: &Option<String>| text.clone().unwrap_or_default();
            let cells = [
                row.direction.clone(),
                row.protocol.clone(),
                named(&row.source, row.source_workload.as_ref()),
                row.destination.clone(),
                known(&row.service),
                row.backend.as_ref().map_or_else(String::new, |at| named(at, row.destination_workload.as_ref())),
                known(&row.node),
                known(&row.transport),
                known(&row.group),
                bytes(row.bytes_sent),
                bytes(row.bytes_received),
                seconds(row.age_seconds),
            ];
            let more = [known(&row.suite), known(&row.source_identity), known(&row.destination_identity)];
            table.row(cells.into_iter().chain(more.into_iter().filter(|_| view.wide)));
        }
        table.render(view.headers)
    }
}

/// `namespace/name (address)`, as far as it is known.
fn named(address: &str, workload: Option<&String>) -> String {
    workload.map_or_else(|| address.to_owned(), |workload| format!("{workload} ({address})"))
}

impl Show for LaneRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[
            ("NODE", Left),
            ("ADDRESS", Left),
            ("TRANSPORT", Left),
            ("CLASS", Left),
            ("SOURCE-IDENTITY", Left),
            ("DESTINATION-IDENTITY", Left),
            ("STREAMS", Right),
            ("AGE", Right),
            ("DRAINING", Left),
        ]);
        for row in items {
            table.row([
                row.node.clone(),
                row.address.clone(),
                row.transport.clone(),
                row.class.clone(),
                row.source_identity.clone(),
                row.destination_identity.clone(),
                row.streams.to_string(),
                seconds(row.age_seconds),
                row.draining.to_string(),
            ]);
        }
        table.render(view.headers)
    }
}

impl Show for DiagnosticRow {
    fn show(items: &[Self], _view: &View) -> String {
        let mut text = String::new();
        for row in items {
            let object = row.object.as_ref().map_or_else(String::new, |object| format!("{object}: "));
            let place = if row.line == 0 { String::new() } else { format!(":{}:{}", row.line, row.column) };
            let lines = [
                format!("{}[{}]: {object}{}", row.severity, row.code, row.message),
                format!(" --> {}{place}", row.file),
            ];
            let help = row.help.as_ref().map(|help| format!(" = help: {help}"));
            for line in lines.into_iter().chain(help) {
                text.push_str(&printable(&line));
                text.push('\n');
            }
        }
        text
    }
}

impl Show for VersionRow {
    fn show(items: &[Self], view: &View) -> String {
        let mut table = Table::new(&[("COMPONENT", Left), ("VERSION", Left), ("ABI", Right)]);
        for row in items {
            table.row([row.component.clone(), row.version.clone(), row.abi.to_string()]);
        }
        table.render(view.headers)
    }
}

/// Binary units with one decimal: `3.4MiB`.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count}B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be rounded up to 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1}{}", UNITS[unit])
}

pub(super) fn seconds(count: f64) -> String {
    span(Duration::try_from_secs_f64(count).unwrap_or_default())
}

/// The two largest units of a span: `3h12m`.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes}m"),
        (days, hours, _) => format!("{days}d{hours}h"),
    }
}

/// When a certificate ends, and how far away that is.
pub(super) fn expiry(not_after: &str, now: SystemTime) -> String {
    match parse_timestamp(not_after).map(|end| (end.duration_since(now), now.duration_since(end))) {
        Some((Ok(left), _)) => format!("{not_after} (in {})", span(left)),
        Some((_, Ok(ago))) => format!("{not_after} (expired {} ago)", span(ago)),
        _ => not_after.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let shown: Vec<_> =
            [0, 1023, 1024, 1536, 1024 * 1024 - 1, 1 << 20, 5 << 30, u64::MAX].into_iter().map(bytes).collect();
        assert_eq!(shown, ["0B", "1023B", "1.0KiB", "1.5KiB", "1.0MiB", "1.0MiB", "5.0GiB", "16.0EiB"]);
        let shown: Vec<_> = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 90_000 * 86_400]
            .into_iter()
            .map(|count| span(Duration::from_secs(count)))
            .collect();
        assert_eq!(shown, ["0s", "59s", "1m0s", "59m59s", "1h0m", "23h59m", "1d0h", "90000d0h"]);
        assert_eq!((seconds(f64::NAN), seconds(-1.0)), ("0s".to_owned(), "0s".to_owned()));
    }
}
