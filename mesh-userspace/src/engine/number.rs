//! Numbers for services: kernel maps and records name a service by 32 bits.

use crate::model::ObjectName;
use std::collections::HashMap;

/// Gives each service name a number that is never 0 and nobody else's. It is a hash of the name, so that a restarted
/// daemon gives the same one and records of before the restart still mean the same service; only where two names
/// collide does the later one take the next free number.
#[derive(Debug, Default)]
pub(super) struct ServiceNumbers {
    by_name: HashMap<ObjectName, u32>,
    by_number: HashMap<u32, ObjectName>,
}

impl ServiceNumbers {
    pub(super) fn assign(&mut self, name: &ObjectName) -> u32 {
        self.assign_near(name, hash(name))
    }

    fn assign_near(&mut self, name: &ObjectName, wanted: u32) -> u32 {
        if let Some(number) = self.by_name.get(name) {
            return *number;
        }
        let mut number = wanted.max(1);
        while self.by_number.contains_key(&number) {
            number = number.wrapping_add(1).max(1);
        }
        self.by_name.insert(name.clone(), number);
        self.by_number.insert(number, name.clone());
        number
    }

    pub(super) fn release(&mut self, name: &ObjectName) {
        if let Some(number) = self.by_name.remove(name) {
            self.by_number.remove(&number);
        }
    }
}

/// FNV-1a: stable across versions and machines, unlike the standard library's hasher.
fn hash(name: &ObjectName) -> u32 {
    let bytes = name.namespace().bytes().chain(std::iter::once(b'/')).chain(name.name().bytes());
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ObjectName {
        ObjectName::parse("shop", name).unwrap()
    }

    #[test]
    fn a_number_stays_with_its_name_until_released() {
        let mut numbers = ServiceNumbers::default();
        let cart = numbers.assign(&name("cart"));
        assert_ne!(cart, numbers.assign(&name("web")));
        assert_eq!(cart, numbers.assign(&name("cart")));
        numbers.release(&name("cart"));
        assert_eq!(cart, ServiceNumbers::default().assign(&name("cart")), "the same after a restart");
        assert_eq!(cart, numbers.assign(&name("cart")));
    }

    #[test]
    fn colliding_names_get_different_numbers_and_never_zero() {
        let mut numbers = ServiceNumbers::default();
        assert_eq!(numbers.assign_near(&name("a"), u32::MAX), u32::MAX);
        assert_eq!(numbers.assign_near(&name("b"), u32::MAX), 1);
        assert_eq!(numbers.assign_near(&name("c"), 0), 2);
        numbers.release(&name("b"));
        assert_eq!(numbers.assign_near(&name("d"), u32::MAX), 1);
    }
}
