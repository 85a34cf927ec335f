//! Deciding about a hundred connections to one workload: by its rules as the proxy does, and by the verdicts that they
//! are compiled into as the kernel does.

use super::Subject;
use super::catalog::{engine, identity, workload};
use mesh_common::policy::{self, Arrival, Verdict};
use mesh_userspace::model::SpiffeId;
use mesh_userspace::proxy::verdict::{self, Caller};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

const PORT: u16 = 8080;
const CONNECTIONS: usize = 100;

pub(super) fn subjects() -> Vec<Subject> {
    [("1_rule", 1, 1), ("1000_rules", 100, 10)]
        .into_iter()
        .flat_map(|(size, policies, rules)| [by_rules(size, policies, rules), by_verdicts(size, policies, rules)])
        .collect()
}

/// Callers that the first, the middle and the last rule allow, and one that none does.
fn callers(policies: u32, rules: u32) -> Vec<(SpiffeId, IpAddr)> {
    let places = [(0, 0), (policies / 2, rules / 2), (policies - 1, rules - 1), (policies, rules)];
    let caller = |(policy, rule): (u32, u32)| {
        (identity(&format!("caller-{policy}-{rule}")), IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)))
    };
    places.map(caller).into()
}

fn by_rules(size: &str, policies: u32, rules: u32) -> Subject {
    let snapshot = engine(1, policies, rules).desired().snapshot.clone();
    let (destination, callers) = (workload(0, 0), callers(policies, rules));
    Subject::new(format!("decide/by_rules/{size}"), move || {
        let mut allowed = 0;
        for (identity, address) in callers.iter().cycle().take(CONNECTIONS) {
            let caller = Caller { identity: Some(identity), address: *address };
            let told = verdict::decide(&snapshot, &destination, PORT, Arrival::Authenticated, black_box(caller));
            allowed += usize::from(!told.is_denied());
        }
        assert_eq!(allowed, CONNECTIONS / 4 * 3);
    })
}

fn by_verdicts(size: &str, policies: u32, rules: u32) -> Subject {
    let tables = engine(1, policies, rules).desired().clone();
    let destination = workload(0, 0);
    let group = tables.snapshot.policies_of(&destination.name).number;
    assert_ne!(group, 0, "the workload has policies");
    Subject::new(format!("decide/by_verdicts/{size}"), move || {
        let mut denied = 0;
        for source in 0..CONNECTIONS {
            let source = policy::source::FIRST_IDENTITY + u32::try_from(source).unwrap_or(0);
            let sources = [policy::source::AUTHENTICATED, black_box(source)];
            let matched = policy::join(group, sources, PORT.to_be(), |key| tables.verdicts.get(key).copied());
            let told = policy::decide(Some(destination.mode_of(PORT)), Arrival::Authenticated, &matched);
            denied += usize::from(told.verdict == Verdict::Drop);
        }
        // None of these numbers is one of the callers that the rules name: those are of other nodes.
        assert_eq!(denied, CONNECTIONS);
    })
}
