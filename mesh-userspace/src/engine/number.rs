//! Numbers for what kernel maps and records name by 32 bits: services, policy groups, identities.

use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};

/// Gives each key a number that nobody else has while somebody uses it. It is a hash of the key, so that a restarted
/// daemon gives the same one and what a predecessor left in the kernel still means the same; only where two keys
/// collide does the later one take the next free number.
#[derive(Debug)]
pub(super) struct Numbers<K> {
    in_use: HashMap<K, Use>,
    taken: HashSet<u32>,
    first: u32,
    last: u32,
}

#[derive(Debug)]
struct Use {
    number: u32,
    users: usize,
}

impl<K: Hash + Eq + Clone> Numbers<K> {
    /// Numbers from `first` to `last`, which is one less than a power of two.
    pub(super) fn new(first: u32, last: u32) -> Self {
        debug_assert!(first <= last && last & last.wrapping_add(1) == 0, "{first}..={last}");
        Self { in_use: HashMap::new(), taken: HashSet::new(), first, last }
    }

    /// The number of a key that is in use.
    pub(super) fn get(&self, key: &K) -> Option<u32> {
        self.in_use.get(key).map(|used| used.number)
    }

    /// Counts one more user; also says whether it is the first.
    pub(super) fn acquire(&mut self, key: &K) -> (u32, bool) {
        let mut hasher = Fnv::default();
        key.hash(&mut hasher);
        self.acquire_near(key, hasher.0)
    }

    fn acquire_near(&mut self, key: &K, wanted: u32) -> (u32, bool) {
        if let Some(used) = self.in_use.get_mut(key) {
            used.users += 1;
            return (used.number, false);
        }
        let mut number = (wanted & self.last).max(self.first);
        while !self.taken.insert(number) {
            number = if number == self.last { self.first } else { number + 1 };
        }
        self.in_use.insert(key.clone(), Use { number, users: 1 });
        (number, true)
    }

    /// Counts one user less; the number that became free with the last one.
    pub(super) fn release(&mut self, key: &K) -> Option<u32> {
        let used = self.in_use.get_mut(key)?;
        used.users -= 1;
        if used.users > 0 {
            return None;
        }
        let number = self.in_use.remove(key)?.number;
        self.taken.remove(&number);
        Some(number)
    }
}

/// FNV-1a: the same in every process, unlike the standard library's hashers.
struct Fnv(u32);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x811c_9dc5)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    }

    fn finish(&self) -> u64 {
        self.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers() -> Numbers<&'static str> {
        Numbers::new(1, u32::MAX)
    }

    #[test]
    fn a_number_stays_with_its_key_until_its_last_user_has_gone() {
        let mut numbers = numbers();
        let (cart, first) = numbers.acquire(&"cart");
        assert!(first);
        assert_ne!(cart, numbers.acquire(&"web").0);
        assert_eq!(numbers.acquire(&"cart"), (cart, false));
        assert_eq!(numbers.get(&"cart"), Some(cart));
        assert_eq!(numbers.release(&"cart"), None);
        assert_eq!(numbers.release(&"cart"), Some(cart));
        assert_eq!((numbers.get(&"cart"), numbers.release(&"cart")), (None, None));
        assert_eq!(self::numbers().acquire(&"cart"), (cart, true), "the same after a restart");
    }

    #[test]
    fn colliding_keys_get_different_numbers_within_the_range() {
        let mut numbers = Numbers::new(2, 0xff);
        assert_eq!(numbers.acquire_near(&"a", u32::MAX), (0xff, true));
        assert_eq!(numbers.acquire_near(&"b", u32::MAX), (2, true));
        assert_eq!(numbers.acquire_near(&"c", 0), (3, true));
        assert_eq!(numbers.release(&"b"), Some(2));
        assert_eq!(numbers.acquire_near(&"d", 0x1ff), (2, true));
    }
}
