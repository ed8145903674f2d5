//! What the kernel holds in our tables.

use std::collections::BTreeSet;
use std::hash::RandomState;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lockstep_kernel::netlink::Error;
use lockstep_kernel::nf_tables::{self, Lifetime, Netfilter, Step};
use lockstep_model::Family;
use lockstep_view::NodePlan;
use lockstep_view::backend::Drift;
use rustc_hash::FxHashMap;

use crate::elements::Elements;
use crate::fingerprint::Fingerprint;
use crate::layout::{self, ChainLayout};
use crate::names::{SharedChain, TABLE};
use crate::rules::kernel_family;
use crate::sets::{Datum, Key, Ranges, SetId, read_serial};

/// The skeleton of one table.
#[derive(Debug, Default)]
pub(crate) struct Skeleton {
    /// What is not as it should be. Empty = everything is.
    pub(crate) drift: Vec<Drift>,
    /// The shared chains that are there, with the right rules.
    pub(crate) chains: BTreeSet<SharedChain>,
    /// How many elements fit into each set.
    pub(crate) sizes: FxHashMap<SetId, u32>,
}

/// Reads the skeleton of a table and compares it with the layout.
pub(crate) fn skeleton(
    netfilter: &mut dyn Netfilter,
    family: Family,
    node: &NodePlan,
) -> Result<Skeleton, Error> {
    let mut skeleton = Skeleton::default();
    let table = kernel_family(family);
    let drift = |object: String, fault: &str| Drift { object, fault: fault.to_owned() };
    let named = |kind: &str, name: &str| format!("{kind} {} {TABLE} {name}", table.word());

    let sets = nf_tables::sets(netfilter, table, TABLE)?;
    for set in SetId::ALL {
        match sets.iter().find(|found| found.name == set.name()) {
            None => skeleton.drift.push(drift(named("set", set.name()), "missing")),
            Some(found) if *found == set.declare(family, found.size) => {
                skeleton.sizes.insert(set, found.size);
            }
            Some(_) => skeleton.drift.push(drift(named("set", set.name()), "declared differently")),
        }
    }
    for found in sets.iter().filter(|found| SetId::ALL.iter().all(|set| set.name() != found.name)) {
        skeleton.drift.push(drift(named("set", &found.name), "not ours"));
    }

    let chains = nf_tables::chains(netfilter, table, TABLE)?;
    let mut rules: FxHashMap<String, Vec<nf_tables::Rule>> = FxHashMap::default();
    for rule in nf_tables::rules(netfilter, table, TABLE)? {
        rules.entry(rule.chain.clone()).or_default().push(rule);
    }
    let fixed = layout::fixed(family, node);
    let is_as = |expected: &ChainLayout, found: &nf_tables::Chain| {
        let found_rules = rules.get(&found.name).map_or(&[][..], Vec::as_slice);
        expected.chain == *found && expected.kernel_rules(family).eq(found_rules.iter().cloned())
    };
    for expected in &fixed {
        match chains.iter().find(|found| found.name == expected.chain.name) {
            None => skeleton.drift.push(drift(named("chain", &expected.chain.name), "missing")),
            Some(found) if is_as(expected, found) => {}
            Some(found) => skeleton.drift.push(drift(named("chain", &found.name), "differs")),
        }
    }
    for found in chains.iter().filter(|found| fixed.iter().all(|chain| chain.chain.name != found.name)) {
        match SharedChain::parse(&found.name) {
            None => skeleton.drift.push(drift(named("chain", &found.name), "not ours")),
            Some(chain) if is_as(&layout::shared(family, node, chain), found) => {
                skeleton.chains.insert(chain);
            }
            Some(_) => skeleton.drift.push(drift(named("chain", &found.name), "differs")),
        }
    }
    Ok(skeleton)
}

/// The elements of a set, with ranges that are two elements put together.
pub(crate) fn elements(netfilter: &mut dyn Netfilter, family: Family, set: SetId) -> Result<Elements, Error> {
    if set.ranges() == Ranges::ByEnds {
        return intervals(netfilter, family, set);
    }
    let mut found = Elements::with_keys_of(set.key_length(family));
    walk(netfilter, family, set, &mut |element| match element {
        None => found.clear(),
        Some((key, datum)) => found.insert(&key, datum),
    })?;
    Ok(found)
}

/// The fingerprint of a set whose ranges, where it has any, are one element each.
pub(crate) fn fingerprint(
    netfilter: &mut dyn Netfilter,
    secret: &RandomState,
    family: Family,
    set: SetId,
) -> Result<Fingerprint, Error> {
    let mut found = Fingerprint::default();
    walk(netfilter, family, set, &mut |element| match element {
        None => found = Fingerprint::default(),
        Some((key, datum)) => found.add(secret, &key, &datum),
    })?;
    Ok(found)
}

/// Walks the elements of a set. `None`: forget what came before, the kernel begins (again).
fn walk(
    netfilter: &mut dyn Netfilter,
    family: Family,
    set: SetId,
    each: &mut dyn FnMut(Option<(Key, Datum)>),
) -> Result<(), Error> {
    nf_tables::elements(netfilter, kernel_family(family), TABLE, set.name(), &mut |step| match step {
        Step::Begin => each(None),
        Step::Element(element) => {
            if let Some(key) = Key::read(element.key) {
                let datum = Datum::read(set, element.bytes(), element.verdict(), element.key_end);
                each(Some((key, datum)));
            }
        }
    })
}

/// The ranges of a set that has them as two elements. Half a range is foreign: we write none.
fn intervals(netfilter: &mut dyn Netfilter, family: Family, set: SetId) -> Result<Elements, Error> {
    // Sorted, an end comes before a beginning at the same key.
    let mut bounds = BTreeSet::new();
    nf_tables::elements(netfilter, kernel_family(family), TABLE, set.name(), &mut |step| match step {
        Step::Begin => bounds.clear(),
        Step::Element(element) => {
            if let Some(key) = Key::read(element.key) {
                bounds.insert((key, !element.ends_interval));
            }
        }
    })?;
    let mut found = Elements::with_keys_of(set.key_length(family));
    let mut open: Option<Key> = None;
    for (key, begins) in bounds {
        let half = match (open.take(), begins) {
            (None, true) => {
                open = Some(key);
                continue;
            }
            (Some(first), false) => {
                found.insert(&first, key.before().map_or(Datum::Foreign, Datum::UpTo));
                continue;
            }
            (Some(first), true) => {
                open = Some(key);
                first
            }
            (None, false) => key,
        };
        found.insert(&half, Datum::Foreign);
    }
    if let Some(first) = open {
        found.insert(&first, Datum::UpTo(last_address(family)));
    }
    Ok(found)
}

fn last_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::BROADCAST.into(),
        Family::V6 => Ipv6Addr::from_bits(u128::MAX).into(),
    }
}

/// The serial number that a client has at a frontend, also of an endpoint that has left.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remembered {
    pub(crate) serial: u32,
    pub(crate) lifetime: Lifetime,
}

/// What clients have been given.
pub(crate) fn remembered(
    netfilter: &mut dyn Netfilter,
) -> Result<FxHashMap<(Family, SetId, Key), Remembered>, Error> {
    let mut all = FxHashMap::default();
    for family in Family::ALL {
        for set in SetId::ALL.into_iter().filter(|set| set.is_learned()) {
            nf_tables::elements(netfilter, kernel_family(family), TABLE, set.name(), &mut |step| {
                if let Step::Element(element) = step
                    && let (Some(serial), Some(lifetime)) =
                        (element.bytes().and_then(read_serial), element.lifetime)
                    && let Some(key) = Key::read(element.key)
                {
                    // A packet sets what is left, by the time of its rule, and not the time in all, which may
                    // be shorter; and the kernel takes no element with more left than there is in all.
                    let Lifetime { timeout, left } = lifetime;
                    let lifetime = Lifetime { timeout: timeout.max(left), left };
                    all.insert((family, set, key), Remembered { serial, lifetime });
                }
            })?;
        }
    }
    Ok(all)
}

/// How many objects our table of a family has; `None` where there is no table.
pub(crate) fn count(netfilter: &mut dyn Netfilter, family: Family) -> Result<Option<usize>, Error> {
    let table = kernel_family(family);
    if !nf_tables::table_exists(netfilter, table, TABLE)? {
        return Ok(None);
    }
    let sets = nf_tables::sets(netfilter, table, TABLE)?;
    let mut objects = 1 + sets.len();
    objects += nf_tables::chains(netfilter, table, TABLE)?.len();
    objects += nf_tables::rules(netfilter, table, TABLE)?.len();
    for set in &sets {
        let mut elements = 0;
        nf_tables::elements(netfilter, table, TABLE, &set.name, &mut |step| match step {
            Step::Begin => elements = 0,
            Step::Element(_) => elements += 1,
        })?;
        objects += elements;
    }
    Ok(Some(objects))
}
