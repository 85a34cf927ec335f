//! Maglev hashing (Eisenbud et al., NSDI 2016): a table that spreads callers evenly, and moves few of them when an endpoint
//! comes or goes.

use super::hash;

/// Table sizes: primes, each about twice the one before.
const SIZES: [u32; 10] = [2_039, 4_093, 8_191, 16_381, 32_749, 65_537, 131_071, 262_139, 524_287, 1_048_573];
/// Places per endpoint at least, up to the largest size: shares are then exact to one percent.
const PLACES_PER_ENDPOINT: usize = 100;

/// An endpoint in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Hash of what it is, the same on every node.
    pub(super) hash: u64,
    pub(super) slot: u32,
    pub(super) weight: u32,
}

/// The slots of endpoints, each as often as its weight says.
#[derive(Debug, Default)]
pub(super) struct Table(Box<[u32]>);

impl Table {
    /// Builds the table of some endpoints, in any order. Costs about as many steps as it has places times their number's
    /// logarithm.
    pub(super) fn build(mut places: Vec<Place>) -> Self {
        places.retain(|place| place.weight > 0);
        // The order decides about ties: it must not hang on names or on history.
        places.sort_unstable_by_key(|place| (place.hash, place.slot));
        let Some(heaviest) = places.iter().map(|place| u64::from(place.weight)).max() else { return Self::default() };
        let size = u64::from(size_for(places.len()));
        let mut walks: Vec<Walk> = places.iter().map(|place| Walk::new(place, size)).collect();
        let mut table = vec![None; size as usize];
        let mut empty = table.len();
        // In each round an endpoint takes places in proportion to its weight; the heaviest takes one.
        while empty > 0 {
            for (place, walk) in places.iter().zip(&mut walks) {
                walk.credit += u64::from(place.weight);
                if walk.credit >= heaviest && empty > 0 {
                    walk.credit -= heaviest;
                    walk.take(&mut table, place.slot);
                    empty -= 1;
                }
            }
        }
        Self(table.into_iter().flatten().collect())
    }

    pub(super) fn get(&self, hash: u64) -> Option<u32> {
        let index = hash::scale(hash, self.0.len() as u64) as usize;
        self.0.get(index).copied()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// An endpoint's own order of all places.
struct Walk {
    next: u64,
    step: u64,
    size: u64,
    credit: u64,
}

impl Walk {
    fn new(place: &Place, size: u64) -> Self {
        let next = hash::scale(hash::pair(place.hash, 1), size);
        // Any step visits every place, since the size is a prime.
        let step = 1 + hash::scale(hash::pair(place.hash, 2), size - 1);
        Self { next, step, size, credit: 0 }
    }

    /// Takes the first place in its order that is free.
    fn take(&mut self, table: &mut [Option<u32>], slot: u32) {
        while table[self.next as usize].is_some() {
            self.next = (self.next + self.step) % self.size;
        }
        table[self.next as usize] = Some(slot);
    }
}

fn size_for(endpoints: usize) -> u32 {
    let wanted = endpoints.saturating_mul(PLACES_PER_ENDPOINT);
    *SIZES.iter().find(|size| **size as usize >= wanted).unwrap_or(&SIZES[SIZES.len() - 1])
}
