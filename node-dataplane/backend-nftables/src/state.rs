//! What is in force, as far as this process knows: the last transaction's outcome.

use std::collections::BTreeSet;
use std::net::IpAddr;

use lockstep_model::{Family, ServiceKey};
use lockstep_view::{NodePlan, NodePortScope};
use rustc_hash::FxHashMap;

use crate::contents::Installed;
use crate::names::SharedChain;
use crate::sets::{Datum, Key, SetId};
use crate::stage::Stage;

/// Sets begin with room for this many elements.
const SMALLEST: usize = 1024;

/// What is in force.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// `None` = nothing is known, nothing was written.
    pub(crate) node: Option<NodePlan>,
    pub(crate) services: FxHashMap<ServiceKey, Installed>,
    /// How many elements lead to a chain.
    pub(crate) references: FxHashMap<(Family, SharedChain), i64>,
    /// The shared chains that exist.
    pub(crate) chains: BTreeSet<(Family, SharedChain)>,
    /// How many ports have a local endpoint at an address.
    pub(crate) hairpin: FxHashMap<IpAddr, i64>,
    /// Per set: elements, and how many fit.
    pub(crate) fill: FxHashMap<(Family, SetId), (usize, u32)>,
}

/// Room for `elements` and half as many again.
pub(crate) fn size_for(elements: usize) -> u32 {
    u32::try_from((elements + elements / 2).max(SMALLEST)).unwrap_or(u32::MAX)
}

impl State {
    pub(crate) fn size(&self, family: Family, set: SetId) -> u32 {
        self.fill.get(&(family, set)).map_or_else(|| size_for(0), |(_, size)| *size)
    }

    pub(crate) fn count(&self, family: Family, set: SetId) -> usize {
        self.fill.get(&(family, set)).map_or(0, |(count, _)| *count)
    }

    /// How many elements a set will have after a transaction.
    pub(crate) fn count_after(&self, stage: &Stage, family: Family, set: SetId) -> usize {
        let lane = stage.lane(family, set);
        (self.count(family, set) + lane.added).saturating_sub(lane.deleted)
    }

    /// True where every set has room for a transaction.
    pub(crate) fn has_room(&self, stage: &Stage) -> bool {
        every_set().all(|(family, set)| {
            let lane = stage.lane(family, set);
            // The kernel may count an element twice while it is being replaced.
            lane.added == 0
                || self.count(family, set) + lane.added <= self.size(family, set) as usize
                || self.count_after(stage, family, set) + 64 <= self.size(family, set) as usize
                    && lane.added <= 32
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
        for (family, set) in every_set() {
            let lane = stage.lane(family, set);
            if lane.added + lane.deleted > 0 {
                let (count, size) = (self.count_after(stage, family, set), self.size(family, set));
                self.fill.insert((family, set), (count, size));
            }
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
            for address in node_ips(node) {
                each(Family::of(address), SetId::NodeIps, &Key::address(address), Datum::Present);
            }
        }
    }
}

/// Addresses that node ports answer on, where they are listed. Never a loopback address.
pub(crate) fn node_ips(node: &NodePlan) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = Family::ALL
        .into_iter()
        .flat_map(|family| match node.node_ports(family) {
            NodePortScope::AllLocal => &[][..],
            NodePortScope::Addresses(addresses) => addresses,
        })
        .copied()
        .filter(|address| !address.is_loopback())
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Every set of both tables.
pub(crate) fn every_set() -> impl Iterator<Item = (Family, SetId)> {
    Family::ALL.into_iter().flat_map(|family| SetId::ALL.into_iter().map(move |set| (family, set)))
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
