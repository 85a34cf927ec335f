//! A caller's endpoint by its address alone: Maglev tables, one for each tier of localities.

use super::candidates::Candidates;
use super::hash;
use super::locality::{self, TIERS};
use super::maglev::{Place, Table};
use super::plan::{Plan, Sources};
use super::slow_start;
use std::net::IpAddr;

/// Other places of the table that are looked at if an endpoint takes no connections.
const ATTEMPTS: u64 = 16;

/// Tables that are built when they are first needed, and kept while the endpoints and their weights are the same, whatever
/// becomes of them.
#[derive(Default)]
pub(super) struct Tables {
    tiers: [Option<Built>; TIERS],
}

struct Built {
    /// Hash of what the table was built from.
    signature: u64,
    /// Whether the signature was compared since the list changed.
    is_checked: bool,
    table: Table,
}

impl Tables {
    /// The list of endpoints has changed.
    pub(super) fn invalidate(&mut self) {
        self.tiers.iter_mut().flatten().for_each(|built| built.is_checked = false);
    }

    /// A caller's endpoint; while that takes no connections, another one that is the caller's just as consistently.
    pub(super) fn slot(
        &mut self,
        caller: IpAddr,
        plan: &Plan,
        sources: &Sources,
        candidates: &Candidates,
    ) -> Option<u32> {
        let caller = hash::ip(caller);
        let tier = tier_of(caller, plan)?;
        let table = self.table(tier, sources);
        (0..ATTEMPTS).find_map(|attempt| {
            let slot = table.get(hash::pair(caller, attempt))?;
            let member = candidates.members.at(slot);
            let takes = plan.is_panic || !member.is_out(candidates.now);
            // In slow start only a part of an endpoint's callers is its own already, ever more of them.
            let warmth = u64::from(member.warmth(sources.traffic.slow_start, candidates.now));
            let is_warm = hash::scale(hash::pair(caller, !attempt), u64::from(slow_start::FULL_PERMILLE)) < warmth;
            (takes && is_warm && candidates.accepts(slot)).then_some(slot)
        })
    }

    fn table(&mut self, tier: usize, sources: &Sources) -> &Table {
        let built = &mut self.tiers[tier];
        if !built.as_ref().is_some_and(|built| built.is_checked) {
            let places: Vec<Place> = places(tier, sources).collect();
            let signature = places.iter().fold(places.len() as u64, |signature, place| {
                hash::pair(signature, hash::pair(place.hash, (u64::from(place.slot) << 32) | u64::from(place.weight)))
            });
            let kept = built.take().filter(|built| built.signature == signature);
            let table = kept.map_or_else(|| Table::build(places), |built| built.table);
            *built = Some(Built { signature, is_checked: true, table });
        }
        &built.as_ref().expect("it was built just now").table
    }
}

fn places(tier: usize, sources: &Sources) -> impl Iterator<Item = Place> {
    let listed = sources.endpoints.iter().zip(sources.listed);
    let prefer = sources.traffic.prefer;
    listed
        .filter(move |(endpoint, _)| locality::tier(prefer, endpoint.locality) == tier)
        .map(|(endpoint, slot)| Place { hash: hash::socket(endpoint.address), slot: *slot, weight: endpoint.weight })
}

/// The tier that serves a caller: if its own cannot serve everybody, the same callers go elsewhere each time.
fn tier_of(caller: u64, plan: &Plan) -> Option<usize> {
    // 53 bits: as many as an f64 holds.
    let position = (hash::pair(caller, u64::MAX) >> 11) as f64 / (1u64 << 53) as f64;
    let mut end = 0.0;
    let found = plan.shares.iter().position(|share| {
        end += share;
        position < end
    });
    // Rounding may leave the sum a little below 1.
    found.or_else(|| plan.shares.iter().rposition(|share| *share > 0.0))
}
