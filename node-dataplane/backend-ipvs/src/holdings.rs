//! What we have in sets and on the interface, and for how many reasons: an endpoint may belong to two
//! Services, and an address has many ports. It goes with the last of them.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::net::IpAddr;

use lockstep_kernel::ipset::Entry;
use rustc_hash::FxHashMap;

use crate::names::Set;
use crate::render::Rendered;

#[derive(Debug, Default)]
pub(crate) struct Holdings {
    entries: FxHashMap<(Set, Entry), u32>,
    addresses: FxHashMap<IpAddr, u32>,
    /// Entries of each set.
    sizes: BTreeMap<Set, u32>,
}

/// What came or went as a whole.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    pub(crate) entries: BTreeMap<Set, Vec<Entry>>,
    pub(crate) addresses: Vec<IpAddr>,
}

impl Moved {
    pub(crate) fn len(&self) -> usize {
        self.addresses.len() + self.entries.values().map(Vec::len).sum::<usize>()
    }
}

impl Holdings {
    /// Adds what a Service needs; what was not there before is written down in `came`.
    pub(crate) fn take(&mut self, rendered: &Rendered, came: &mut Moved) {
        for held in &rendered.entries {
            if more(&mut self.entries, *held) {
                let (set, entry) = *held;
                *self.sizes.entry(set).or_default() += 1;
                came.entries.entry(set).or_default().push(entry);
            }
        }
        came.addresses.extend(rendered.addresses.iter().filter(|ip| more(&mut self.addresses, **ip)));
    }

    /// Takes that back; what nobody needs any more is written down in `gone`.
    pub(crate) fn release(&mut self, rendered: &Rendered, gone: &mut Moved) {
        for held in &rendered.entries {
            if less(&mut self.entries, held) {
                let (set, entry) = *held;
                if let Some(size) = self.sizes.get_mut(&set) {
                    *size = size.saturating_sub(1);
                }
                gone.entries.entry(set).or_default().push(entry);
            }
        }
        gone.addresses.extend(rendered.addresses.iter().filter(|ip| less(&mut self.addresses, ip)));
    }

    pub(crate) fn has(&self, set: Set, entry: Entry) -> bool {
        self.entries.contains_key(&(set, entry))
    }

    /// True where another network of the same address and port has this one in it.
    pub(crate) fn covers(&self, set: Set, entry: Entry) -> bool {
        self.entries.keys().any(|(other, held)| *other == set && held.covers(&entry))
    }

    pub(crate) fn has_address(&self, ip: IpAddr) -> bool {
        self.addresses.contains_key(&ip)
    }

    /// Entries of a set.
    pub(crate) fn size(&self, set: Set) -> u32 {
        self.sizes.get(&set).copied().unwrap_or(0)
    }

    /// All entries of a set, in no order.
    pub(crate) fn of_set(&self, wanted: Set) -> Vec<Entry> {
        let all = self.entries.keys().filter(|(set, _)| *set == wanted);
        all.map(|(_, entry)| *entry).collect()
    }

    /// All addresses, sorted.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let mut all: Vec<IpAddr> = self.addresses.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// Entries by set.
    pub(crate) fn by_set(&self) -> BTreeMap<Set, Vec<Entry>> {
        let mut all: BTreeMap<Set, Vec<Entry>> = BTreeMap::new();
        for (set, entry) in self.entries.keys() {
            all.entry(*set).or_default().push(*entry);
        }
        all
    }
}

/// True where it is the first.
fn more<T: Eq + Hash>(counts: &mut FxHashMap<T, u32>, of: T) -> bool {
    let count = counts.entry(of).or_default();
    *count += 1;
    *count == 1
}

/// True where it was the last.
fn less<T: Eq + Hash>(counts: &mut FxHashMap<T, u32>, of: &T) -> bool {
    let Some(count) = counts.get_mut(of) else { return false };
    *count -= 1;
    if *count == 0 {
        counts.remove(of);
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Purpose;
    use lockstep_model::Family;

    #[test]
    fn an_address_stays_until_the_last_port_is_gone() {
        let ip: IpAddr = [10, 96, 0, 1].into();
        let bound = (Set { family: Family::V4, purpose: Purpose::Bound }, Entry::Ip(ip));
        let one = Rendered { entries: vec![bound], addresses: vec![ip], ..Rendered::default() };
        let (mut holdings, mut came, mut gone) = (Holdings::default(), Moved::default(), Moved::default());
        holdings.take(&one, &mut came);
        holdings.take(&one, &mut came);
        assert_eq!((came.addresses, holdings.size(bound.0)), (vec![ip], 1));
        holdings.release(&one, &mut gone);
        assert_eq!((gone.len(), holdings.has_address(ip)), (0, true));
        holdings.release(&one, &mut gone);
        assert_eq!((gone.len(), holdings.has(bound.0, bound.1)), (2, false));
        holdings.release(&one, &mut gone);
        assert_eq!(gone.len(), 2, "what is not held cannot go");
    }
}
