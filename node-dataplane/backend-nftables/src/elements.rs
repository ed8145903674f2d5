//! What a set of the kernel holds, as far as it has to be held here too.

use std::hash::BuildHasher;
use std::net::IpAddr;

use hashbrown::HashTable;
use lockstep_view::Target;
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::names::SharedChain;
use crate::sets::{Datum, Key};

/// The elements of one set, by key. They are a process's largest piece of memory while it takes
/// over a hundred thousand of them, so a key takes as many bytes as it has, not as many as the
/// longest could have, and a chain is kept once.
#[derive(Debug, Default)]
pub(crate) struct Elements {
    /// One after the other. All keys of a set are equally long.
    keys: Vec<u8>,
    /// As many as keys, in the same order.
    data: Vec<Held>,
    chains: Chains,
    /// Positions of those that were not taken out.
    positions: HashTable<u32>,
    key_length: usize,
    /// How many have a key of another length, or none because they stand for every other key, so
    /// that they are none of ours.
    strange: usize,
}

/// A datum. The description of a chain is by far the largest, and many elements have the same.
#[derive(Debug, Clone, Copy)]
enum Held {
    Present,
    UpTo(IpAddr),
    Target(Target),
    Serial(u32),
    Goto(ChainNumber),
    Drop,
    Foreign,
}

#[derive(Debug, Clone, Copy)]
struct ChainNumber(u32);

/// The chains that elements lead to.
#[derive(Debug, Default)]
struct Chains {
    all: Vec<SharedChain>,
    numbers: FxHashMap<SharedChain, ChainNumber>,
}

impl Chains {
    fn pack(&mut self, datum: Datum) -> Held {
        match datum {
            Datum::Present => Held::Present,
            Datum::UpTo(last) => Held::UpTo(last),
            Datum::Target(target) => Held::Target(target),
            Datum::Serial(serial) => Held::Serial(serial),
            Datum::Goto(chain) => Held::Goto(*self.numbers.entry(chain).or_insert_with(|| {
                self.all.push(chain);
                // One per element at most, and those are counted in 32 bits.
                ChainNumber(u32::try_from(self.all.len() - 1).unwrap_or(u32::MAX))
            })),
            Datum::Drop => Held::Drop,
            Datum::Foreign => Held::Foreign,
        }
    }

    fn unpack(&self, held: Held) -> Datum {
        match held {
            Held::Present => Datum::Present,
            Held::UpTo(last) => Datum::UpTo(last),
            Held::Target(target) => Datum::Target(target),
            Held::Serial(serial) => Datum::Serial(serial),
            Held::Goto(ChainNumber(number)) => Datum::Goto(self.all[number as usize]),
            Held::Drop => Datum::Drop,
            Held::Foreign => Datum::Foreign,
        }
    }
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

    /// True where there are elements that cannot be looked up or taken out.
    pub(crate) fn has_strange(&self) -> bool {
        self.strange > 0
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
        let Self { keys, data, chains, positions, key_length, .. } = self;
        let datum = chains.pack(datum);
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
        Some(self.chains.unpack(self.data[*position as usize]))
    }

    /// Takes an element out.
    pub(crate) fn remove(&mut self, key: &Key) -> Option<Datum> {
        let key = key.bytes();
        let Self { keys, data, chains, positions, key_length, .. } = self;
        let found = positions.find_entry(hash(key), |position| at(keys, *key_length, *position) == key);
        let (position, _) = found.ok()?.remove();
        Some(chains.unpack(data[position as usize]))
    }

    /// Those that were not taken out, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, Datum)> {
        self.positions.iter().filter_map(|position| {
            let key = Key::read(at(&self.keys, self.key_length, *position))?;
            Some((key, self.chains.unpack(self.data[*position as usize])))
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

    use lockstep_model::Port;
    use lockstep_view::Pool;
    use proptest::prelude::*;

    use super::*;
    use crate::names::{Choice, Via};

    /// One of every kind.
    fn datum(number: u32) -> Datum {
        let address = IpAddr::from(number.to_be_bytes());
        match number % 7 {
            0 => Datum::Present,
            1 => Datum::UpTo(address),
            2 => Datum::Target(Target { address, port: Port::MIN }),
            3 => Datum::Serial(number),
            4 => Datum::Goto(SharedChain::Targets {
                via: Via::Address,
                choice: Choice { pool: Pool::Cluster, count: number % 5, affinity: None },
            }),
            5 => Datum::Drop,
            _ => Datum::Foreign,
        }
    }

    #[test]
    fn an_endpoint_takes_less_than_half_of_what_describes_a_chain() {
        assert!(2 * size_of::<Held>() < size_of::<Datum>(), "{}", size_of::<Held>());
    }

    proptest! {
        /// Whatever is done to it, it holds what a map would.
        #[test]
        fn is_a_map(steps in proptest::collection::vec((0_u16..40, proptest::option::of(any::<u32>())), 0..200)) {
            let key = |n: u16| Key::address([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]].into());
            let mut elements = Elements::with_keys_of(4);
            let mut map = BTreeMap::new();
            for (n, step) in steps {
                match step {
                    Some(number) => {
                        let datum = datum(number);
                        elements.insert(&key(n), datum);
                        map.insert(key(n), datum);
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
        assert!(elements.has_strange());
        assert_eq!(elements.get(&Key::read(&[1; 16]).unwrap()), None);
        assert_eq!(elements.get(&Key::read(&[1; 4]).unwrap()), None);
    }
}
