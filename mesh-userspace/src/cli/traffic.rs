//! How services balance, for people.

use super::show::{Show, View};
use super::table::{Align::Left, Table};
use crate::admin::traffic::{EjectionRow, HealthCheckRow, RetryRow, TrafficRow, TrafficSettings};
use crate::control::format_duration;
use std::time::Duration;

const COLUMNS: [&str; 10] = [
    "NAMESPACE",
    "SERVICE",
    "POLICY",
    "STATE",
    "ALGORITHM",
    "PREFERENCE",
    "RETRIES",
    "EJECTION",
    "HEALTH-CHECK",
    "SAME-NODE",
];
const WIDE: [&str; 6] = ["AFFINITY", "SLOW-START", "FAILOVER", "CONNECT", "IDLE", "LIMITS"];

impl Show for TrafficRow {
    fn show(items: &[Self], view: &View) -> String {
        let wide = WIDE.iter().filter(|_| view.wide);
        let columns: Vec<_> = COLUMNS.iter().chain(wide).map(|name| (*name, Left)).collect();
        let mut table = Table::new(&columns);
        for row in items {
            let state = row.state.replace('_', " ");
            let who = [row.namespace.clone(), row.service.clone(), row.policy.clone().unwrap_or_default(), state];
            let what = row.settings.as_ref().map(cells).unwrap_or_default();
            table.row(who.into_iter().chain(what).take(columns.len()));
        }
        table.render(view.headers)
    }
}

/// Those of [`COLUMNS`] from the algorithm on, then those of [`WIDE`].
fn cells(settings: &TrafficSettings) -> [String; 12] {
    let open = settings.max_connections.map(|bound| format!("{bound} open"));
    let pending = settings.max_pending.map(|bound| format!("{bound} pending"));
    [
        settings.algorithm.clone(),
        settings.preference.clone(),
        retries(&settings.retry),
        ejection(&settings.ejection),
        settings.health_check.as_ref().map(health_check).unwrap_or_default(),
        settings.same_node.clone(),
        settings.affinity_seconds.map(span).unwrap_or_default(),
        span(settings.slow_start_seconds),
        format!("below {}%", settings.failover_percent),
        settings.connect_timeout_seconds.map(span).unwrap_or_default(),
        settings.idle_timeout_seconds.map(span).unwrap_or_default(),
        open.into_iter().chain(pending).collect::<Vec<_>>().join(", "),
    ]
}

fn retries(retry: &RetryRow) -> String {
    let RetryRow { attempts, budget_percent, budget_minimum } = retry;
    if *attempts == 0 { "none".to_owned() } else { format!("{attempts} ({budget_percent}%, {budget_minimum}/s)") }
}

fn ejection(ejection: &EjectionRow) -> String {
    let EjectionRow { consecutive_failures, base_seconds, max_seconds, max_percent } = ejection;
    if *consecutive_failures == 0 {
        return "none".to_owned();
    }
    format!("{consecutive_failures} in a row: {} to {}, {max_percent}%", span(*base_seconds), span(*max_seconds))
}

fn health_check(check: &HealthCheckRow) -> String {
    format!("{} every {}", check.probe, span(check.interval_seconds))
}

fn span(seconds: f64) -> String {
    format_duration(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::fake_daemon::FakeDaemon;
    use super::super::tests::{json, run};
    use super::*;
    use crate::cli::Exit;

    fn row(service: &str, state: &str, settings: Option<TrafficSettings>) -> TrafficRow {
        TrafficRow {
            namespace: "shop".to_owned(),
            service: service.to_owned(),
            policy: (state != "default").then(|| "fast".to_owned()),
            state: state.to_owned(),
            settings,
        }
    }

    fn settings() -> TrafficSettings {
        TrafficSettings {
            algorithm: "PeakEWMA".to_owned(),
            preference: "SameZone".to_owned(),
            failover_percent: 70,
            slow_start_seconds: 90.0,
            connect_timeout_seconds: Some(0.2),
            retry: RetryRow { attempts: 2, budget_percent: 20, budget_minimum: 10 },
            ejection: EjectionRow { consecutive_failures: 5, base_seconds: 10.0, max_seconds: 300.0, max_percent: 50 },
            health_check: Some(HealthCheckRow {
                probe: "http /healthz".to_owned(),
                interval_seconds: 5.0,
                ..HealthCheckRow::default()
            }),
            max_pending: Some(7),
            same_node: "Kernel".to_owned(),
            ..TrafficSettings::default()
        }
    }

    #[test]
    fn traffic_shows_what_holds_for_each_service() {
        let quiet = TrafficSettings {
            algorithm: "Random".to_owned(),
            preference: "None".to_owned(),
            same_node: "Tunnel".to_owned(),
            ..TrafficSettings::default()
        };
        let rows = vec![
            row("web", "default", Some(quiet)),
            row("gone", "no_service", None),
            row("cart", "in_force", Some(settings())),
        ];
        let daemon = FakeDaemon::answering("/v1/traffic", json(rows));
        let table = "\
NAMESPACE  SERVICE  POLICY  STATE       ALGORITHM  PREFERENCE  RETRIES        EJECTION                   HEALTH-CHECK            SAME-NODE
shop       cart     fast    in force    PeakEWMA   SameZone    2 (20%, 10/s)  5 in a row: 10s to 5m, 50%  http /healthz every 5s  Kernel
shop       gone     fast    no service  -          -           -              -                          -                       -
shop       web      -       default     Random     None        none           none                       -                       Tunnel
";
        let squeezed = |text: &str| -> Vec<Vec<String>> {
            text.lines()
                .map(|line| {
                    line.split("  ").map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).collect()
                })
                .collect()
        };
        let (exit, out, err) = run(&daemon.socket(), &["get", "traffic"]);
        assert_eq!((exit, squeezed(&out), err.as_str()), (Exit::Ok, squeezed(table), ""), "{out}");
        let (_, wide, _) = run(&daemon.socket(), &["get", "tp", "-o", "wide", "--no-headers"]);
        let first = wide.lines().next().unwrap();
        assert!(
            first
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .ends_with("Kernel - 1m30s below 70% 200ms - 7 pending"),
            "{wide}"
        );
    }
}
