//! What traffic policies say about services.

use super::super::Code;
use super::super::document::TrafficEntry;
use super::Check;
use crate::model::{Catalog, ObjectName};
use std::collections::HashMap;

/// Each service's policy: of several the one whose name comes first, as in the engine.
pub(super) fn winners(catalog: &Catalog) -> HashMap<&ObjectName, &ObjectName> {
    let mut winners = HashMap::new();
    for policy in catalog.traffic.values() {
        for service in &policy.services {
            winners.entry(service).or_insert(&policy.name);
        }
    }
    winners
}

pub(super) fn check(entry: &TrafficEntry, winners: &HashMap<&ObjectName, &ObjectName>, check: &mut Check) {
    let own = &entry.policy.name;
    for (service, at) in entry.policy.services.iter().zip(&entry.services_at) {
        check.target_service(service.namespace(), service.name(), *at);
        if let Some(winner) = winners.get(service).filter(|winner| **winner != own) {
            let message = format!("there is already a traffic policy for service `{service}`: {winner} is in force");
            let help = "of several the one whose name comes first is in force: put them together".to_owned();
            check.report(Code::DuplicateTraffic, *at, message, Some(help));
        }
    }
}
