//! What many elements are together, in a few bytes: two sets are compared without either of them
//! being held in memory.

use std::hash::{BuildHasher, RandomState};

use crate::sets::{Datum, Key};

/// How many elements there are, and the sum of a 128-bit hash of each: the same in every order.
///
/// Sets that differ have the same fingerprint once in 2^128, however they differ. Some element is
/// in one of them and not in the other, so its hash is in one sum only, and whatever the rest adds
/// up to, one value of 2^128 hides it. That holds as long as nobody can choose elements by their
/// hashes: the hash is `SipHash` under a key that this process draws at random and shows to nobody.
/// Key and datum go through it together, so two elements that swap their data do not cancel out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    elements: usize,
    sums: [u64; 2],
}

impl Fingerprint {
    /// Counts an element in. Fingerprints are compared with those of the same `secret` only.
    pub(crate) fn add(&mut self, secret: &RandomState, key: &Key, datum: &Datum) {
        self.elements += 1;
        for (half, sum) in (0_u8..).zip(&mut self.sums) {
            // Two questions to one keyed hash: its answers have nothing to do with each other.
            *sum = sum.wrapping_add(secret.hash_one((half, key, datum)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    fn of(secret: &RandomState, elements: &[(Key, Datum)]) -> Fingerprint {
        let mut all = Fingerprint::default();
        elements.iter().for_each(|(key, datum)| all.add(secret, key, datum));
        all
    }

    fn address(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    fn element(key: u8, datum: u8) -> (Key, Datum) {
        (Key::address(address(key)), Datum::UpTo(address(datum)))
    }

    #[test]
    fn keys_and_data_that_only_changed_partners_are_another_set() {
        let secret = RandomState::new();
        let fingerprint = |elements: &[(Key, Datum)]| of(&secret, elements);
        let two = fingerprint(&[element(1, 1), element(2, 2)]);
        assert_eq!(two, fingerprint(&[element(2, 2), element(1, 1)]));
        assert_ne!(two, fingerprint(&[element(1, 2), element(2, 1)]));
        assert_ne!(two, fingerprint(&[element(1, 1), element(1, 1)]));
        assert_ne!(two, fingerprint(&[element(1, 1)]));
        // A shorter key is not a longer one that ends with zeros.
        let short = (Key::read(&[0; 4]).unwrap(), Datum::Present);
        let long = (Key::read(&[0; 16]).unwrap(), Datum::Present);
        assert_ne!(fingerprint(&[short]), fingerprint(&[long]));
    }

    proptest! {
        #[test]
        fn equal_in_any_order_and_only_then(
            elements in proptest::collection::btree_set((0_u8..8, 0_u8..8), 0..12),
            others in proptest::collection::btree_set((0_u8..8, 0_u8..8), 0..12),
        ) {
            let secret = RandomState::new();
            let list = |set: &std::collections::BTreeSet<(u8, u8)>| -> Vec<_> {
                set.iter().map(|(key, datum)| element(*key, *datum)).collect()
            };
            let (first, second) = (list(&elements), list(&others));
            let reversed: Vec<_> = first.iter().rev().copied().collect();
            prop_assert_eq!(of(&secret, &first), of(&secret, &reversed));
            prop_assert_eq!(of(&secret, &first) == of(&secret, &second), elements == others);
        }
    }
}
