//! Active health: what probes say about an endpoint.

use crate::model::HealthCheck;

/// The last probes of one endpoint. It is healthy until they say otherwise: a daemon that has just started must not refuse
/// what it has not looked at yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probes {
    is_unhealthy: bool,
    /// Probes in a row that say the opposite of what holds.
    opposing: u32,
}

impl Probes {
    /// Whether the verdict changed.
    pub fn handle(&mut self, healthy: bool, policy: &HealthCheck) -> bool {
        if healthy != self.is_unhealthy {
            self.opposing = 0;
            return false;
        }
        self.opposing += 1;
        let needed = if healthy { policy.healthy_after } else { policy.unhealthy_after };
        let turned = self.opposing >= needed;
        if turned {
            *self = Self { is_unhealthy: !healthy, opposing: 0 };
        }
        turned
    }

    pub fn is_unhealthy(&self) -> bool {
        self.is_unhealthy
    }

    pub(super) fn is_unremarkable(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Probe;
    use std::time::Duration;

    #[test]
    fn the_verdict_turns_after_as_many_probes_in_a_row_as_the_policy_says() {
        let policy = HealthCheck {
            probe: Probe::Tcp,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            unhealthy_after: 3,
            healthy_after: 2,
        };
        let mut probes = Probes::default();
        let mut history = String::new();
        for probe in "--+---++-+++---".chars() {
            probes.handle(probe == '+', &policy);
            history.push(if probes.is_unhealthy() { 'u' } else { 'h' });
        }
        assert_eq!(history, "hhhhhuuhhhhhhhu");
    }
}
