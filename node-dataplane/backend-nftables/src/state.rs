//! What is in force, as far as this process knows: the last transaction's outcome.

use std::collections::BTreeSet;
use std::net::IpAddr;

use lockstep_model::{Family, ServiceKey};
use lockstep_view::NodePlan;
use rustc_hash::FxHashMap;

use crate::contents::Installed;
use crate::names::SharedChain;
use crate::node;
use crate::sets::{Datum, Key, SetId};
use crate::stage::{Stage, lane_index};

/// Sets begin with room for this many elements.
const SMALLEST: usize = 1024;

/// So many clients can have an endpoint; one takes about 150 bytes. Those beyond are served
/// without affinity until others were idle.
pub(crate) const CLIENTS: u32 = 1 << 18;

/// What is in force.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// `None` = nothing is known, nothing was written.
    pub(crate) node: Option<NodePlan>,
    pub(crate) services: Services,
    /// How many elements lead to a chain.
    pub(crate) references: FxHashMap<(Family, SharedChain), i64>,
    /// The shared chains that exist.
    pub(crate) chains: BTreeSet<(Family, SharedChain)>,
    /// How many ports have a local endpoint at an address.
    pub(crate) hairpin: FxHashMap<IpAddr, i64>,
    /// Per set: elements, and how many fit.
    fill: Fills,
}

#[derive(Debug)]
struct Fills([Fill; 2 * SetId::ALL.len()]);

impl Default for Fills {
    fn default() -> Self {
        Self([Fill::default(); 2 * SetId::ALL.len()])
    }
}

/// How full a set is.
#[derive(Debug, Default, Clone, Copy)]
struct Fill {
    elements: usize,
    /// 0 = not declared yet.
    size: u32,
}

/// The Services in force. A slot stays valid until its Service is removed, so that a
/// transaction looks each Service up once.
#[derive(Debug, Default)]
pub(crate) struct Services {
    slots: FxHashMap<ServiceKey, usize>,
    installed: Vec<Option<Installed>>,
    free: Vec<usize>,
}

impl Services {
    pub(crate) fn slot(&self, key: &ServiceKey) -> Option<usize> {
        self.slots.get(key).copied()
    }

    pub(crate) fn at(&self, slot: usize) -> Option<&Installed> {
        self.installed.get(slot).and_then(Option::as_ref)
    }

    pub(crate) fn get(&self, key: &ServiceKey) -> Option<&Installed> {
        self.at(self.slot(key)?)
    }

    pub(crate) fn contains_key(&self, key: &ServiceKey) -> bool {
        self.slots.contains_key(key)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &Installed> {
        self.installed.iter().filter_map(Option::as_ref)
    }

    pub(crate) fn reserve(&mut self, services: usize) {
        self.slots.reserve(services);
        self.installed.reserve(services);
    }

    /// Replaces what is in a slot.
    pub(crate) fn replace(&mut self, slot: usize, installed: Installed) {
        self.installed[slot] = Some(installed);
    }

    /// Adds a Service that is not there.
    pub(crate) fn insert(&mut self, key: ServiceKey, installed: Installed) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.installed.push(None);
            self.installed.len() - 1
        });
        self.installed[slot] = Some(installed);
        self.slots.insert(key, slot);
    }

    pub(crate) fn remove(&mut self, key: &ServiceKey) {
        if let Some(slot) = self.slots.remove(key) {
            self.installed[slot] = None;
            self.free.push(slot);
        }
    }
}

/// Room for `elements` and half as many again.
pub(crate) fn size_for(elements: usize) -> u32 {
    u32::try_from((elements + elements / 2).max(SMALLEST)).unwrap_or(u32::MAX)
}

impl State {
    /// Nothing but a node.
    pub(crate) fn of(node: &NodePlan) -> Self {
        Self { node: Some(node.clone()), ..Self::default() }
    }

    pub(crate) fn size(&self, family: Family, set: SetId) -> u32 {
        if set.is_learned() {
            return CLIENTS;
        }
        match self.fill.0[lane_index(family, set)].size {
            0 => size_for(0),
            size => size,
        }
    }

    /// How many elements a set has.
    pub(crate) fn elements_in(&self, family: Family, set: SetId) -> usize {
        self.fill.0[lane_index(family, set)].elements
    }

    /// A set was found or declared: so many elements, so many fit.
    pub(crate) fn set_fill(&mut self, family: Family, set: SetId, elements: usize, size: u32) {
        self.fill.0[lane_index(family, set)] = Fill { elements, size };
    }

    /// True where every set has room for a transaction. Deleted elements count as there
    /// while the transaction is made.
    pub(crate) fn has_room(&self, stage: &Stage) -> bool {
        stage.touched().all(|index| {
            let Fill { elements, size } = self.fill.0[index];
            elements + stage.lane(index).added <= size as usize
        })
    }

    /// The chains that are led to after a transaction, with those they lead to.
    pub(crate) fn chains_needed(&self, stage: &Stage) -> BTreeSet<(Family, SharedChain)> {
        let mut open: Vec<(Family, SharedChain)> = Vec::new();
        let after = |chain, before: i64| before + stage.references.get(chain).copied().unwrap_or(0);
        open.extend(
            self.references.iter().filter(|(chain, n)| after(chain, **n) > 0).map(|(chain, _)| *chain),
        );
        open.extend(stage.references.iter().filter(|(_, n)| **n > 0).map(|(chain, _)| *chain));
        let mut needed = BTreeSet::new();
        while let Some((family, chain)) = open.pop() {
            if needed.insert((family, chain)) {
                open.extend(chain.leads_to().into_iter().map(|next| (family, next)));
            }
        }
        needed
    }

    /// The chains that a transaction must make.
    pub(crate) fn chains_to_make(&self, stage: &Stage) -> Vec<(Family, SharedChain)> {
        if stage.references.iter().all(|(chain, n)| *n <= 0 || self.chains.contains(chain)) {
            return Vec::new();
        }
        self.chains_needed(stage).difference(&self.chains).copied().collect()
    }

    /// Stages the hairpin elements for what was counted.
    pub(crate) fn stage_hairpin(&self, stage: &mut Stage) {
        let mut changes: Vec<(IpAddr, i64)> =
            stage.hairpin.iter().filter(|(_, by)| **by != 0).map(|(address, by)| (*address, *by)).collect();
        changes.sort_unstable();
        for (address, by) in changes {
            let before = self.hairpin.get(&address).copied().unwrap_or(0);
            let (family, key) = (Family::of(address), Key::hairpin(address));
            match (before > 0, before + by > 0) {
                (false, true) => stage.add(family, SetId::Hairpin, &key, Datum::Present),
                (true, false) => stage.delete(family, SetId::Hairpin, &key, Datum::Present),
                _ => {}
            }
        }
    }

    /// The transaction was made.
    pub(crate) fn committed(&mut self, stage: &Stage, made: Vec<(Family, SharedChain)>) {
        self.chains.extend(made);
        for (chain, by) in &stage.references {
            add(&mut self.references, *chain, *by);
        }
        for (address, by) in &stage.hairpin {
            add(&mut self.hairpin, *address, *by);
        }
        for index in stage.touched() {
            let (lane, fill) = (stage.lane(index), &mut self.fill.0[index]);
            fill.elements = (fill.elements + lane.added).saturating_sub(lane.deleted);
        }
    }

    /// Chains that exist and that nothing leads to.
    pub(crate) fn idle_chains(&self) -> Vec<(Family, SharedChain)> {
        let mut led_to: BTreeSet<(Family, SharedChain)> = BTreeSet::new();
        let mut open: Vec<_> = self.references.keys().copied().collect();
        while let Some((family, chain)) = open.pop() {
            if led_to.insert((family, chain)) {
                open.extend(chain.leads_to().into_iter().map(|next| (family, next)));
            }
        }
        let mut idle: Vec<_> = self.chains.difference(&led_to).copied().collect();
        // Those that lead to others go first.
        idle.sort_by_key(|(_, chain)| std::cmp::Reverse(depth(*chain)));
        idle
    }

    /// Every element that is in force.
    pub(crate) fn each_element(&self, each: &mut impl FnMut(Family, SetId, &Key, Datum)) {
        for installed in self.services.values() {
            installed.each_element(each);
        }
        for address in self.hairpin.keys() {
            each(Family::of(*address), SetId::Hairpin, &Key::hairpin(*address), Datum::Present);
        }
        if let Some(node) = &self.node {
            node::each_element(node, each);
        }
    }
}

/// Every set of both tables that we write the elements of.
pub(crate) fn every_set() -> impl Iterator<Item = (Family, SetId)> {
    let written = || SetId::ALL.into_iter().filter(|set| !set.is_learned());
    Family::ALL.into_iter().flat_map(move |family| written().map(move |set| (family, set)))
}

fn depth(chain: SharedChain) -> usize {
    chain.leads_to().into_iter().map(|next| 1 + depth(next)).max().unwrap_or(0)
}

fn add<K: std::hash::Hash + Eq>(counts: &mut FxHashMap<K, i64>, key: K, by: i64) {
    use std::collections::hash_map::Entry;
    match counts.entry(key) {
        Entry::Occupied(mut entry) => {
            *entry.get_mut() += by;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        Entry::Vacant(entry) if by != 0 => {
            entry.insert(by);
        }
        Entry::Vacant(_) => {}
    }
}
