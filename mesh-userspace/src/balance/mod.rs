//! Picking an endpoint for a new connection. Pure: randomness is an argument.

use crate::engine::Endpoint;

/// Picks an endpoint with a probability proportional to its weight. `random` is uniform over all of `u64`; `None` if
/// no endpoint has a weight.
#[must_use]
pub fn pick(endpoints: &[Endpoint], random: u64) -> Option<&Endpoint> {
    let total: u64 = endpoints.iter().map(|endpoint| u64::from(endpoint.weight)).sum();
    // Maps 0..2^64 onto 0..total by multiplication: the bias is below total / 2^64, and no modulo is needed.
    let mut position = u64::try_from((u128::from(random) * u128::from(total)) >> 64).ok()?;
    endpoints.iter().find(|endpoint| {
        let weight = u64::from(endpoint.weight);
        let hit = position < weight;
        position = position.saturating_sub(weight);
        hit
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Locality;
    use crate::model::{DefaultAction, Mode, NodeName, ObjectName, SpiffeId, Workload, WorkloadUid};
    use proptest::prelude::*;
    use std::sync::Arc;

    fn endpoints(weights: &[u32]) -> Vec<Endpoint> {
        let workload = Arc::new(Workload {
            uid: WorkloadUid::new("uid"),
            name: ObjectName::parse("shop", "cart").unwrap(),
            owner: "cart".into(),
            labels: [].into(),
            identity: SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap(),
            node: NodeName::parse("n1").unwrap(),
            addresses: vec!["10.0.1.2".parse().unwrap()],
            netns: None,
            cgroup: None,
            mode: Mode::Permissive,
            port_modes: [].into(),
            ports: [].into(),
            weight: 100,
            is_terminating: false,
            default_action: DefaultAction::Allow,
        });
        let endpoint = |(index, weight): (usize, &u32)| Endpoint {
            workload: Arc::clone(&workload),
            address: ([10, 0, 1, 2], u16::try_from(index).unwrap()).into(),
            weight: *weight,
            locality: Locality::Elsewhere,
        };
        weights.iter().enumerate().map(endpoint).collect()
    }

    #[test]
    fn nothing_is_picked_where_nothing_takes_connections() {
        assert_eq!(pick(&[], 7), None);
        assert_eq!(pick(&endpoints(&[0, 0]), u64::MAX), None);
    }

    #[test]
    fn the_extremes_of_randomness_stay_within_the_endpoints() {
        let endpoints = endpoints(&[0, u32::MAX, 0, u32::MAX, 0]);
        assert_eq!(pick(&endpoints, 0), Some(&endpoints[1]));
        assert_eq!(pick(&endpoints, u64::MAX / 2), Some(&endpoints[1]));
        assert_eq!(pick(&endpoints, u64::MAX / 2 + 1), Some(&endpoints[3]));
        assert_eq!(pick(&endpoints, u64::MAX), Some(&endpoints[3]));
    }

    proptest! {
        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(0u32..1_000, 1..12)) {
            const PICKS: u64 = 20_000;
            let endpoints = endpoints(&weights);
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            prop_assume!(total > 0);
            let mut picked = vec![0u64; weights.len()];
            for step in 0..PICKS {
                // Evenly spread over u64: each share is then exact to one pick at either end of its interval.
                let endpoint = pick(&endpoints, step * (u64::MAX / PICKS)).unwrap();
                picked[usize::from(endpoint.address.port())] += 1;
            }
            for (weight, picked) in weights.into_iter().zip(picked) {
                let expected = PICKS * u64::from(weight) / total;
                prop_assert!(picked.abs_diff(expected) <= 2, "weight {weight} of {total}: {picked}, not {expected}");
                prop_assert!(weight > 0 || picked == 0);
            }
        }
    }
}
