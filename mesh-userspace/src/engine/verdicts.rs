//! A policy group as the kernel has it: entries of `VERDICTS`, and the classes of source addresses in `RANGES`.
//!
//! A rule is filed under each source that it recognises: everyone, every proven identity, each identity of this node
//! (others never call connect() here), each class of addresses. What the kernel joins for a connection is then what
//! [`PolicyGroup::matched`] says about it.

use super::{GroupRule, PolicyGroup};
use crate::model::{Source, SpiffeId};
use ipnet::{IpNet, Ipv4Net};
use mesh_common::policy::source::{AUTHENTICATED, CLASS, EVERYONE};
use mesh_common::policy::{Matched, VerdictKey};
use mesh_common::service::RangeKey;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Length of the v4-mapped prefix, `::ffff:0:0/96`.
const MAPPED_PREFIX: u32 = 96;
/// Bits of the group's number, before those of the address.
const GROUP_BITS: u32 = 32;

pub(super) type Verdicts = BTreeMap<VerdictKey, Matched>;
/// Key: prefix length within 160 bits, of the group's number and the network address.
pub(super) type Ranges = BTreeMap<(u32, RangeKey), u32>;

/// The group's entries but those of single identities.
pub(super) fn of_group(group: &PolicyGroup) -> (Verdicts, Ranges) {
    let mut verdicts = Verdicts::new();
    let header = Matched::new(0, 0, 0, 0, 0, group.flags);
    verdicts.insert(VerdictKey::new(group.number, EVERYONE, 0), header);
    for (rule, number) in group.rules.iter().zip(1..) {
        match &rule.sources {
            None => file(&mut verdicts, group.number, EVERYONE, rule, number),
            Some(sources) if sources.iter().any(is_any_identity) => {
                file(&mut verdicts, group.number, AUTHENTICATED, rule, number);
            }
            Some(_) => {}
        }
    }
    let ranges = file_classes(&mut verdicts, group);
    (verdicts, ranges)
}

/// The group's entries of one identity.
pub(super) fn of_identity(group: &PolicyGroup, identity: &SpiffeId, source: u32) -> Verdicts {
    let mut verdicts = Verdicts::new();
    for (rule, number) in group.rules.iter().zip(1..) {
        let sources = rule.sources.iter().flatten();
        // What holds for every identity is filed for all at once.
        if sources.clone().any(|source| source.matches_identity(identity)) && !sources.clone().any(is_any_identity) {
            file(&mut verdicts, group.number, source, rule, number);
        }
    }
    verdicts
}

fn is_any_identity(source: &Source) -> bool {
    matches!(source, Source::Spiffe(pattern) if pattern.is_any())
}

fn file(verdicts: &mut Verdicts, group: u32, source: u32, rule: &GroupRule, number: u32) {
    let mut add = |port: u16| {
        let entry = verdicts.entry(VerdictKey::new(group, source, port.to_be())).or_insert(Matched::NOTHING);
        *entry = entry.and(&rule.alone(number));
    };
    match &rule.ports {
        None => add(0),
        Some(ports) => ports.iter().copied().for_each(add),
    }
}

/// The longest prefix that holds an address says which rules do: those with a range that contains that prefix. Prefixes
/// for which the same rules hold are one class.
fn file_classes(verdicts: &mut Verdicts, group: &PolicyGroup) -> Ranges {
    let mut rules_of: HashMap<IpNet, BTreeSet<u32>> = HashMap::new();
    for (rule, number) in group.rules.iter().zip(1..) {
        for source in rule.sources.iter().flatten() {
            if let Source::Range(range) = source {
                rules_of.entry(range.trunc()).or_default().insert(number);
            }
        }
    }
    let mut prefixes: BTreeSet<IpNet> = rules_of.keys().copied().collect();
    if prefixes.iter().any(|prefix| matches!(prefix, IpNet::V6(range) if range.contains(&MAPPED))) {
        // IPv6 ranges hold no IPv4 address, wherever the kernel's keys have those.
        prefixes.insert(Ipv4Net::default().into());
    }
    let mut classes: BTreeMap<BTreeSet<u32>, u32> = BTreeMap::new();
    let mut ranges = Ranges::new();
    for prefix in prefixes {
        let containing = std::iter::successors(Some(prefix), IpNet::supernet);
        let rules: BTreeSet<u32> = containing.filter_map(|range| rules_of.get(&range)).flatten().copied().collect();
        let next = CLASS | u32::try_from(classes.len()).unwrap_or(u32::MAX);
        let class = *classes.entry(rules).or_insert(next);
        ranges.insert(range_key(group.number, prefix), class);
    }
    for (rules, class) in classes {
        for (rule, number) in group.rules.iter().zip(1..).filter(|(_, number)| rules.contains(number)) {
            file(verdicts, group.number, class, rule, number);
        }
    }
    ranges
}

/// `::ffff:0.0.0.0`: an IPv6 range that contains it contains every mapped address, or is within them; the engine keeps
/// none of the latter.
const MAPPED: std::net::Ipv6Addr = std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();

fn range_key(group: u32, prefix: IpNet) -> (u32, RangeKey) {
    let mapped = if prefix.network().is_ipv4() { MAPPED_PREFIX } else { 0 };
    (GROUP_BITS + mapped + u32::from(prefix.prefix_len()), RangeKey::new(group, prefix.network().into()))
}
