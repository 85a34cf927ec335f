//! The demo's one table.

use crate::outcome::{Expectation, Flow, Outcome};
use crate::refused::Refused;
use std::fmt::Write;

/// Who spoke to whom, how, and what others saw of it.
pub(crate) fn render(outcome: &Outcome) -> String {
    let mut rows = vec![
        ["CLIENT -> SERVICE -> BACKEND", "CONNS", "REQUESTS", "SENT", "RECEIVED", "P50", "P99", "SERVER SAW"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(outcome.flows.iter().map(cells));
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::from("\n");
    for (number, row) in rows.iter().enumerate() {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                // Numbers to the right, names to the left.
                if column == 0 || column + 1 == row.len() {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        let _ = writeln!(text, "{}", line.join("  ").trim_end());
        if let Some(flow) = number.checked_sub(1).and_then(|index| outcome.flows.get(index)) {
            let _ = writeln!(text, "{}", details(flow));
        }
    }
    let _ = writeln!(text, "\nREFUSED");
    for refused in &outcome.refused {
        let _ = writeln!(text, "{}", refusal(refused));
    }
    let capture = &outcome.capture;
    let _ = writeln!(
        text,
        "\nON THE LINK  {} packets, {}: {}",
        capture.packets,
        bytes(capture.bytes),
        capture
            .by_port
            .iter()
            .map(|(port, traffic)| format!("{port} {}", bytes(traffic.bytes)))
            .collect::<Vec<_>>()
            .join(", ")
    );
    for (marker, count) in &capture.markers {
        let length = marker.len() as u64;
        let _ = writeln!(text, "  plaintext bytes of {marker:?}: {}", count * length);
    }
    let _ = writeln!(text, "\nIN THE KERNEL");
    for counter in &outcome.counters {
        let _ = writeln!(text, "  {}  {:<40} {:>8}", counter.node, counter.name, counter.count);
    }
    text
}

/// What was expected, and whether it was so.
pub(crate) fn render_expectations(expectations: &[Expectation]) -> String {
    let mut text = String::from("\nEXPECTED\n");
    for expectation in expectations {
        let verdict = if expectation.met { "yes" } else { "NO " };
        let _ = writeln!(text, "  {verdict}  {}", expectation.text);
    }
    text.push('\n');
    text
}

fn cells(flow: &Flow) -> Vec<String> {
    let traffic = &flow.traffic;
    let backend = flow.distinct(|access| Some(&access.backend)).join(", ");
    let mut seen: Vec<String> = traffic.seen.iter().map(ToString::to_string).collect();
    seen.sort();
    seen.dedup();
    vec![
        format!("{} -> {} {} -> {backend}", traffic.program, traffic.service, traffic.vip),
        flow.accesses.len().to_string(),
        traffic.requests.to_string(),
        bytes(flow.bytes_received()),
        bytes(flow.bytes_sent()),
        time(traffic.p50_micros),
        time(traffic.p99_micros),
        seen.join(", "),
    ]
}

fn refusal(refused: &Refused) -> String {
    let Refused { client, service, vip, errno, by, .. } = refused;
    let ground = match by {
        Some(ground) if ground.rule == "-" => {
            format!("{}: {}, no rule of policy {} matches", ground.enforced_by, ground.reason, ground.policy)
        }
        Some(ground) => {
            format!("{}: {} by rule {} of policy {}", ground.enforced_by, ground.reason, ground.rule, ground.policy)
        }
        None => "nobody says why".to_owned(),
    };
    format!("  {client} -> {service} {vip}  connect() {errno}\n    {ground}")
}

fn details(flow: &Flow) -> String {
    let joined = |field: fn(&mesh_tests::access::Access) -> Option<&str>| flow.distinct(field).join(", ");
    format!(
        "    {} -> {} by {}, {} {}\n    {} -> {}\n    {} by rule {} of policy {}",
        joined(|access| Some(&access.node)),
        joined(|access| access.destination_node.as_deref()),
        joined(|access| access.transport.as_deref()),
        joined(|access| access.group.as_deref()),
        joined(|access| access.suite.as_deref()),
        joined(|access| access.source_identity.as_deref()),
        joined(|access| access.destination_identity.as_deref()),
        joined(|access| access.verdict.as_deref()),
        joined(|access| access.rule.as_deref()),
        joined(|access| access.policy.as_deref()),
    )
}

fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        _ => format!("{:.1} MB", count as f64 / 1e6),
    }
}

fn time(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{micros} us"),
        _ => format!("{:.1} ms", micros as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_have_units() {
        assert_eq!([0, 9_999, 10_000, 12_345_678].map(bytes), ["0 B", "9999 B", "10.0 kB", "12.3 MB"]);
        assert_eq!([0, 9_999, 12_345].map(time), ["0 us", "9999 us", "12.3 ms"]);
    }

    #[test]
    fn an_expectation_that_was_not_met_stands_out() {
        let expectations = [Expectation { text: "a".into(), met: true }, Expectation { text: "b".into(), met: false }];
        assert_eq!(render_expectations(&expectations), "\nEXPECTED\n  yes  a\n  NO   b\n\n");
    }
}
