//! How services' connections are spread, as the admin interface shows it.

use crate::admin::traffic::{EjectionRow, HealthCheckRow, RetryRow, TrafficRow, TrafficSettings};
use crate::control::format_duration;
use crate::engine::Snapshot;
use crate::model::{Affinity, HealthCheck, ObjectName, Prefer, Probe, SameNode, Traffic, TrafficPolicy};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A row for each service, and for each target of a policy that is not in force there.
pub(super) fn rows(snapshot: &Snapshot) -> Vec<TrafficRow> {
    let mut policies: BTreeMap<&ObjectName, Vec<&Arc<TrafficPolicy>>> = BTreeMap::new();
    let mut in_order: Vec<_> = snapshot.traffic_policies().values().collect();
    in_order.sort_by(|a, b| a.name.cmp(&b.name));
    for policy in in_order {
        for service in &policy.services {
            policies.entry(service).or_default().push(policy);
        }
    }
    let mut rows = Vec::new();
    for service in snapshot.services().values() {
        // Of several the first is in force, as in the engine.
        let named = policies.remove(&service.name).unwrap_or_default();
        let winner = named.first().map(|policy| &***policy);
        let settings = settings(&Traffic::of(snapshot.mesh.as_deref(), service, winner));
        let state = if winner.is_some() { "in_force" } else { "default" };
        rows.push(row(&service.name, winner, state, Some(settings)));
        rows.extend(named.iter().skip(1).map(|policy| row(&service.name, Some(policy), "overruled", None)));
    }
    for (service, named) in policies {
        rows.extend(named.iter().map(|policy| row(service, Some(policy), "no_service", None)));
    }
    rows
}

fn row(
    service: &ObjectName,
    policy: Option<&TrafficPolicy>,
    state: &str,
    settings: Option<TrafficSettings>,
) -> TrafficRow {
    TrafficRow {
        namespace: service.namespace().to_owned(),
        service: service.name().to_owned(),
        policy: policy.map(|policy| policy.name.name().to_owned()),
        state: state.to_owned(),
        settings,
    }
}

fn settings(traffic: &Traffic) -> TrafficSettings {
    let Traffic { retry, ejection, limits, .. } = traffic;
    TrafficSettings {
        algorithm: traffic.algorithm.as_str().to_owned(),
        preference: traffic.prefer.as_str().to_owned(),
        failover_percent: traffic.failover_percent,
        slow_start_seconds: traffic.slow_start.as_secs_f64(),
        affinity_seconds: match traffic.affinity {
            Affinity::None => None,
            Affinity::ClientIp(timeout) => Some(timeout.as_secs_f64()),
        },
        connect_timeout_seconds: traffic.connect_timeout.as_ref().map(Duration::as_secs_f64),
        idle_timeout_seconds: traffic.idle_timeout.as_ref().map(Duration::as_secs_f64),
        retry: RetryRow {
            attempts: retry.attempts,
            budget_percent: retry.budget_percent,
            budget_minimum: retry.budget_minimum,
        },
        ejection: EjectionRow {
            consecutive_failures: ejection.consecutive_failures,
            base_seconds: ejection.base_time.as_secs_f64(),
            max_seconds: ejection.max_time.as_secs_f64(),
            max_percent: ejection.max_percent,
        },
        health_check: traffic.health_check.as_ref().map(health_check),
        max_connections: limits.max_connections,
        max_pending: limits.max_pending,
        same_node: traffic.same_node.as_str().to_owned(),
    }
}

fn health_check(check: &HealthCheck) -> HealthCheckRow {
    HealthCheckRow {
        probe: match &check.probe {
            Probe::Tcp => "tcp".to_owned(),
            Probe::Http { path, .. } => format!("http {path}"),
            Probe::Grpc { service } => format!("grpc {service}").trim_end().to_owned(),
        },
        interval_seconds: check.interval.as_secs_f64(),
        timeout_seconds: check.timeout.as_secs_f64(),
        unhealthy_after: check.unhealthy_after,
        healthy_after: check.healthy_after,
    }
}

/// How a service balances, in a line.
pub(super) fn phrase(traffic: &Traffic) -> String {
    let mut parts = vec![traffic.algorithm.as_str().to_owned()];
    match traffic.prefer {
        Prefer::Nobody => {}
        Prefer::SameZone => parts.push("same zone first".to_owned()),
        Prefer::SameNode => parts.push("same node first, then same zone".to_owned()),
    }
    if let Affinity::ClientIp(timeout) = traffic.affinity {
        parts.push(format!("by client address for {}", format_duration(timeout)));
    }
    parts.push(match traffic.retry.attempts {
        0 => "no retries".to_owned(),
        1 => "1 retry".to_owned(),
        attempts => format!("{attempts} retries"),
    });
    parts.push(match traffic.ejection.consecutive_failures {
        0 => "no ejection".to_owned(),
        failures => format!("out for {} after {failures} failures", format_duration(traffic.ejection.base_time)),
    });
    if let Some(check) = &traffic.health_check {
        parts.push(format!("{} every {}", health_check(check).probe, format_duration(check.interval)));
    }
    parts.extend(traffic.limits.max_connections.map(|bound| format!("{bound} connections at most")));
    parts.extend(traffic.limits.max_pending.map(|bound| format!("{bound} pending at most")));
    if traffic.same_node == SameNode::Tunnel {
        parts.push("tunnel within a node".to_owned());
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Engine;
    use crate::model::{Algorithm, Catalog, NodeName, Service, TrafficSpec, Update};
    use std::time::Instant;

    fn name(name: &str) -> ObjectName {
        ObjectName::parse("shop", name).unwrap()
    }

    fn snapshot() -> Arc<Snapshot> {
        let mut catalog = Catalog::default();
        for service in ["cart", "web"] {
            let service = Service {
                name: name(service),
                vips: Vec::new(),
                ports: Vec::new(),
                selector: BTreeMap::new(),
                prefer: Prefer::SameZone,
                affinity: Affinity::default(),
            };
            catalog.services.insert(service.name.clone(), Arc::new(service));
        }
        for (policy, services) in [("a", vec!["web", "gone"]), ("b", vec!["web"])] {
            let spec = TrafficSpec { algorithm: Some(Algorithm::Maglev), ..TrafficSpec::default() };
            let services = services.into_iter().map(name).collect();
            let policy = TrafficPolicy { name: name(policy), services, spec };
            catalog.traffic.insert(policy.name.clone(), Arc::new(policy));
        }
        let mut engine = Engine::new(NodeName::parse("n1").unwrap());
        engine.handle_update(Update::Snapshot(catalog), Instant::now());
        Arc::clone(&engine.desired().snapshot)
    }

    #[test]
    fn every_service_and_every_target_has_a_row_with_what_holds() {
        let mut rows = rows(&snapshot());
        rows.sort_by(crate::admin::documents::Item::order);
        let shown: Vec<_> = rows
            .iter()
            .map(|row| {
                let held = row.settings.as_ref().map(|settings| settings.algorithm.as_str());
                (row.service.as_str(), row.policy.as_deref(), row.state.as_str(), held)
            })
            .collect();
        let expected = [
            ("cart", None, "default", Some("Random")),
            ("gone", Some("a"), "no_service", None),
            ("web", Some("a"), "in_force", Some("Maglev")),
            ("web", Some("b"), "overruled", None),
        ];
        assert_eq!(shown, expected);
        assert_eq!(rows[2].settings.as_ref().unwrap().preference, "SameZone");
    }

    #[test]
    fn a_line_says_how_a_service_balances() {
        let mut traffic = Traffic::default();
        assert_eq!(phrase(&traffic), "Random, 3 retries, out for 10s after 5 failures");
        traffic.algorithm = Algorithm::PeakEwma;
        traffic.prefer = Prefer::SameNode;
        traffic.affinity = Affinity::ClientIp(Duration::from_mins(90));
        traffic.retry.attempts = 0;
        traffic.ejection.consecutive_failures = 0;
        traffic.limits.max_pending = Some(7);
        traffic.same_node = SameNode::Tunnel;
        let probe = Probe::Grpc { service: String::new() };
        let second = Duration::from_secs(1);
        traffic.health_check =
            Some(HealthCheck { probe, interval: second, timeout: second, unhealthy_after: 1, healthy_after: 1 });
        let expected = "PeakEWMA, same node first, then same zone, by client address for 1h30m, no retries, no \
                        ejection, grpc every 1s, 7 pending at most, tunnel within a node";
        assert_eq!(phrase(&traffic), expected);
    }
}
