//! What a set of the kernel holds, as far as it has to be held here too.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

use crate::sets::{Datum, Key};

/// The elements of one set, by key. They are a process's largest piece of memory while it takes
/// over a hundred thousand of them, so a key takes as many bytes as it has, not as many as the
/// longest could have.
#[derive(Debug, Default)]
pub(crate) struct Elements {
    /// One after the other. All keys of a set are equally long.
    keys: Vec<u8>,
    /// As many as keys, in the same order.
    data: Vec<Datum>,
    /// Positions of those that were not taken out.
    positions: HashTable<u32>,
    key_length: usize,
    /// How many have a key of another length, so that they are none of ours.
    strange: usize,
}

fn hash(key: &[u8]) -> u64 {
    FxBuildHasher.hash_one(key)
}

impl Elements {
    /// For a set whose keys are that long.
    pub(crate) fn with_keys_of(length: usize) -> Self {
        Self { key_length: length, ..Self::default() }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::with_keys_of(self.key_length);
    }

    pub(crate) fn len(&self) -> usize {
        self.positions.len() + self.strange
    }

    /// Adds an element, or gives the one with this key another datum. One with a key of another
    /// length is only counted.
    pub(crate) fn insert(&mut self, key: &Key, datum: Datum) {
        let key = key.bytes();
        if key.len() != self.key_length {
            self.strange += 1;
            return;
        }
        let hash = hash(key);
        let Self { keys, data, positions, key_length, .. } = self;
        let at = |position: u32| at(keys, *key_length, position);
        if let Some(position) = positions.find(hash, |position| at(*position) == key) {
            data[*position as usize] = datum;
            return;
        }
        // The kernel counts the elements of a set in 32 bits.
        let Ok(position) = u32::try_from(data.len()) else { return };
        positions.insert_unique(hash, position, |position| self::hash(at(*position)));
        keys.extend_from_slice(key);
        data.push(datum);
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Datum> {
        let key = key.bytes();
        let position =
            self.positions.find(hash(key), |position| at(&self.keys, self.key_length, *position) == key)?;
        self.data.get(*position as usize).copied()
    }

    /// Takes an element out.
    pub(crate) fn remove(&mut self, key: &Key) -> Option<Datum> {
        let key = key.bytes();
        let Self { keys, data, positions, key_length, .. } = self;
        let found = positions.find_entry(hash(key), |position| at(keys, *key_length, *position) == key);
        let (position, _) = found.ok()?.remove();
        data.get(position as usize).copied()
    }

    /// Those that were not taken out, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, Datum)> {
        self.positions.iter().filter_map(|position| {
            let key = Key::read(at(&self.keys, self.key_length, *position))?;
            Some((key, self.data[*position as usize]))
        })
    }
}

fn at(keys: &[u8], length: usize, position: u32) -> &[u8] {
    let start = position as usize * length;
    &keys[start..start + length]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is done to it, it holds what a map would.
        #[test]
        fn is_a_map(steps in proptest::collection::vec((0_u16..40, proptest::option::of(any::<u32>())), 0..200)) {
            let key = |n: u16| Key::address([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]].into());
            let mut elements = Elements::with_keys_of(4);
            let mut map = BTreeMap::new();
            for (n, step) in steps {
                match step {
                    Some(serial) => {
                        elements.insert(&key(n), Datum::Serial(serial));
                        map.insert(key(n), Datum::Serial(serial));
                    }
                    None => prop_assert_eq!(elements.remove(&key(n)), map.remove(&key(n))),
                }
                prop_assert_eq!(elements.get(&key(n)), map.get(&key(n)).copied());
            }
            prop_assert_eq!(elements.len(), map.len());
            prop_assert_eq!(elements.iter().collect::<BTreeMap<_, _>>(), map);
            elements.clear();
            prop_assert_eq!(elements.iter().count(), 0);
        }
    }

    #[test]
    fn a_key_of_another_length_is_counted_and_is_nothing_that_could_be_expected() {
        let mut elements = Elements::with_keys_of(4);
        elements.insert(&Key::read(&[1; 16]).unwrap(), Datum::Present);
        assert_eq!(elements.len(), 1);
        assert_eq!(elements.get(&Key::read(&[1; 16]).unwrap()), None);
        assert_eq!(elements.get(&Key::read(&[1; 4]).unwrap()), None);
    }
}
