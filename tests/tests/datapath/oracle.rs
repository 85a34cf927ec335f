//! What policies mean, written from the meaning alone: no index, no group, no compiled rule, no code of the engine.

use mesh_userspace::model::{
    AuthorizationPolicy, DefaultAction, PolicyAction, PolicyTarget, Rule, Service, Source, TargetPort, Workload,
};
use std::net::IpAddr;

/// Everything that a verdict depends on.
pub(crate) struct World<'a> {
    pub(crate) policies: Vec<&'a AuthorizationPolicy>,
    pub(crate) services: Vec<&'a Service>,
}

/// Who calls: the proven identity, if there is one, and the address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'a> {
    pub(crate) identity: Option<&'a str>,
    pub(crate) address: IpAddr,
}

impl World<'_> {
    /// DENY before ALLOW before "an ALLOW policy is there" before the default; AUDIT and dry runs change nothing.
    pub(crate) fn admits(&self, workload: &Workload, caller: Caller<'_>, port: u16) -> bool {
        let (mut denied, mut allowed, mut has_allow) = (false, false, false);
        for policy in self.policies.iter().filter(|policy| !policy.dry_run && self.applies(policy, workload)) {
            let matches = policy.rules.iter().any(|rule| self.matches(policy, rule, workload, caller, port));
            match policy.action {
                PolicyAction::Deny => denied |= matches,
                PolicyAction::Allow => {
                    has_allow = true;
                    allowed |= matches;
                }
                PolicyAction::Audit => {}
            }
        }
        if denied {
            false
        } else if allowed {
            true
        } else {
            !has_allow && workload.default_action == DefaultAction::Allow
        }
    }

    fn applies(&self, policy: &AuthorizationPolicy, workload: &Workload) -> bool {
        policy.name.namespace() == workload.name.namespace()
            && (policy.targets.is_empty() || policy.targets.iter().any(|target| self.names(policy, target, workload)))
    }

    fn names(&self, policy: &AuthorizationPolicy, target: &PolicyTarget, workload: &Workload) -> bool {
        match target {
            PolicyTarget::Selector(labels) => labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value)),
            PolicyTarget::Service(name) => self.service(policy, name).is_some_and(|service| selects(service, workload)),
        }
    }

    fn service(&self, policy: &AuthorizationPolicy, name: &str) -> Option<&Service> {
        let mut services = self.services.iter();
        let found =
            services.find(|service| service.name.namespace() == policy.name.namespace() && service.name.name() == name);
        found.copied()
    }

    fn matches(
        &self,
        policy: &AuthorizationPolicy,
        rule: &Rule,
        workload: &Workload,
        caller: Caller<'_>,
        port: u16,
    ) -> bool {
        let from = match &rule.sources {
            None => true,
            Some(sources) => sources.iter().any(|source| recognises(source, caller)),
        };
        let on = rule.ports.is_empty() || rule.ports.contains(&port);
        from && on && self.holds_on(policy, workload, port)
    }

    /// Through a service a policy holds only where the service leads.
    fn holds_on(&self, policy: &AuthorizationPolicy, workload: &Workload, port: u16) -> bool {
        policy.targets.is_empty()
            || policy.targets.iter().filter(|target| self.names(policy, target, workload)).any(|target| match target {
                PolicyTarget::Selector(_) => true,
                PolicyTarget::Service(name) => {
                    self.service(policy, name).is_some_and(|service| targets(service, workload).contains(&port))
                }
            })
    }
}

pub(crate) fn selects(service: &Service, workload: &Workload) -> bool {
    service.name.namespace() == workload.name.namespace()
        && !service.selector.is_empty()
        && service.selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
}

fn targets(service: &Service, workload: &Workload) -> Vec<u16> {
    let ports = service.ports.iter();
    ports.filter_map(|port| target(&port.target, workload)).collect()
}

pub(crate) fn target(target: &TargetPort, workload: &Workload) -> Option<u16> {
    match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => workload.ports.get(name).copied(),
    }
}

fn recognises(source: &Source, caller: Caller<'_>) -> bool {
    let identity: Option<Vec<&str>> = caller.identity.map(|id| id.split('/').collect());
    // spiffe: "" trust-domain ns <namespace> sa <account>
    match (source, identity) {
        (Source::Range(range), _) => is_within(caller.address, &range.to_string()),
        (_, None) => false,
        (Source::Namespace(namespace), Some(id)) => id[4] == &**namespace,
        (Source::ServiceAccount { namespace, name }, Some(id)) => {
            id[4] == &**namespace && name.as_ref().is_none_or(|name| id[6] == &**name)
        }
        (Source::Spiffe(pattern), Some(id)) => {
            let pattern = pattern.to_string();
            let parts: Vec<&str> = pattern.split('/').collect();
            pattern == "*" || (parts.len() == id.len() && parts.iter().zip(&id).all(|(glob, part)| fits(glob, part)))
        }
    }
}

fn fits(glob: &str, text: &str) -> bool {
    match glob.strip_prefix('*') {
        Some(rest) => (0..=text.len()).any(|skipped| text.get(skipped..).is_some_and(|text| fits(rest, text))),
        None => match (glob.chars().next(), text.chars().next()) {
            (None, None) => true,
            (Some(a), Some(b)) => a == b && fits(&glob[a.len_utf8()..], &text[b.len_utf8()..]),
            _ => false,
        },
    }
}

/// Bit by bit. A mapped IPv4 address is an IPv4 address, and a range of them a range of those; else the families are
/// strangers.
fn is_within(address: IpAddr, range: &str) -> bool {
    let (base, length) = range.split_once('/').unwrap();
    let (base, length): (IpAddr, usize) = (base.parse().unwrap(), length.parse().unwrap());
    let (base, length) = match base.to_canonical() {
        v4 if v4 != base && length >= 96 => (v4, length - 96),
        _ => (base, length),
    };
    let (a, b) = (bits(address.to_canonical()), bits(base));
    a.len() == b.len() && a[..length] == b[..length]
}

fn bits(address: IpAddr) -> Vec<bool> {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    octets.iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1 == 1)).collect()
}
