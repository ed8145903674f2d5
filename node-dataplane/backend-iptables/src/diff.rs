//! Desired rules against what is known to be there -> changes.
//!
//! `against_memory` costs what changed. `against_kernel` looks at everything and is right
//! whatever is there: it is used at start, after a refusal and after drift.

use std::borrow::Cow;
use std::collections::BTreeMap;

use lockstep_model::ServiceKey;
use lockstep_xtables::{Snapshot, Table, canonical, comment, target};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::fixed::{self, Terms};
use crate::guard;
use crate::input::{Change, Op, Owner};
use crate::names::{self, ChainName, Shared};
use crate::render::{Block, ServiceRules};

/// What one Service's rules need to become others.
pub(crate) fn against_memory<'a>(old: &'a ServiceRules, new: &'a ServiceRules) -> Vec<Op<'a>> {
    let mut ops = Vec::new();
    for (chain, body) in new.chains() {
        if old.chain(chain) != Some(body) {
            ops.push(write(chain, body));
        }
    }
    for (chain, _) in old.chains().filter(|(chain, _)| new.chain(chain).is_none()) {
        ops.push(Op::Delete { table: Table::Nat, chain: chain.as_str() });
    }
    for block in old.blocks.iter().filter(|block| new.blocks.binary_search(block).is_err()) {
        ops.extend(block.rules.iter().map(|rule| remove(block.chain, rule)));
    }
    for block in new.blocks.iter().filter(|block| old.blocks.binary_search(block).is_err()) {
        ops.push(insert(block));
    }
    ops
}

fn write<'a>(chain: &'a ChainName, body: &'a str) -> Op<'a> {
    Op::Write { table: Table::Nat, chain: chain.as_str(), body: Cow::Borrowed(body) }
}

pub(crate) fn insert(block: &Block) -> Op<'_> {
    Op::Insert { chain: block.chain, back: block.back, rules: Cow::Borrowed(&block.rules) }
}

fn remove(shared: Shared, rule: &str) -> Op<'_> {
    Op::Remove { table: shared.table(), chain: shared.chain(), rule }
}

/// Rules of one Service, as they should be and as they were written last.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) new: ServiceRules,
    pub(crate) old: ServiceRules,
}

/// The lines of a shared chain that were found there.
struct Lines<'a> {
    /// In order, as printed.
    printed: Vec<&'a str>,
    /// Our spelling -> positions.
    at: FxHashMap<String, Vec<usize>>,
}

/// One comparison with the kernel.
pub(crate) struct KernelDiff<'a> {
    snapshot: &'a Snapshot<'a>,
    terms: &'a Terms,
    shared: BTreeMap<Shared, Lines<'a>>,
    /// Rewritten as a whole.
    flushed: FxHashSet<Shared>,
    kept: Kept<'a>,
}

/// What stays although no plan has it: the rules of Services that are left out.
#[derive(Debug, Default)]
pub(crate) struct Kept<'a> {
    pub(crate) chains: FxHashSet<&'a str>,
    pub(crate) lines: FxHashSet<&'a str>,
}

impl<'a> Kept<'a> {
    /// The lines that name one of `services` in their comment, and the chains they lead to.
    pub(crate) fn find<'k>(
        snapshot: &'a Snapshot<'a>,
        services: impl Iterator<Item = &'k ServiceKey>,
    ) -> Self {
        let services: FxHashSet<String> = services.map(ToString::to_string).collect();
        let mut kept = Self::default();
        if services.is_empty() {
            return kept;
        }
        let mut reached = Vec::new();
        for shared in Shared::ALL {
            for rule in snapshot.rules(shared.table(), shared.chain()) {
                let named = comment(rule).and_then(|text| text.split([':', ' ']).next());
                if named.is_some_and(|name| services.contains(name)) {
                    kept.lines.insert(rule);
                    reached.extend(target(rule));
                }
            }
        }
        while let Some(chain) = reached.pop() {
            if names::is_service_chain(Table::Nat, chain) && kept.chains.insert(chain) {
                let rules = snapshot.rules(Table::Nat, chain);
                reached.extend(rules.into_iter().filter_map(target));
            }
        }
        kept
    }
}

impl<'a> KernelDiff<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot<'a>, terms: &'a Terms, kept: Kept<'a>) -> Self {
        let shared = Shared::ALL
            .into_iter()
            .map(|shared| {
                let printed = snapshot.rules(shared.table(), shared.chain());
                let mut at: FxHashMap<String, Vec<usize>> = FxHashMap::default();
                for (index, rule) in printed.iter().enumerate() {
                    at.entry(canonical(rule)).or_default().push(index);
                }
                (shared, Lines { printed, at })
            })
            .collect();
        Self { snapshot, terms, shared, flushed: FxHashSet::default(), kept }
    }

    /// Chooses the shared chains that are cheaper written anew than line by line.
    pub(crate) fn choose_rewrites(&mut self, wanted: &BTreeMap<ServiceKey, Wanted>) {
        let mut count: BTreeMap<Shared, (usize, usize)> = BTreeMap::new();
        for block in wanted.values().flat_map(|wanted| &wanted.new.blocks) {
            let (all, missing) = count.entry(block.chain).or_default();
            *all += 1;
            *missing += usize::from(!self.in_place(block));
        }
        for (shared, (all, missing)) in count {
            let lines = &self.shared[&shared];
            let keeps = lines.printed.iter().any(|rule| self.kept.lines.contains(rule));
            if !keeps && missing * 2 > all {
                self.flushed.insert(shared);
            }
        }
    }

    fn in_place(&self, block: &Block) -> bool {
        let at = &self.shared[&block.chain].at;
        let positions: Vec<&Vec<usize>> = block.rules.iter().filter_map(|rule| at.get(rule)).collect();
        positions.len() == block.rules.len()
            && positions.iter().all(|found| found.len() == 1)
            && positions.is_sorted()
    }

    /// Fixed chains, jumps and the end of KUBE-SERVICES.
    pub(crate) fn everybody(&self) -> Change<'a> {
        let fixed = fixed::all(self.terms).missing(self.snapshot);
        let mut ops: Vec<Op<'a>> = fixed.into_iter().map(Op::from).collect();
        for shared in Shared::ALL {
            let (table, chain) = (shared.table(), shared.chain());
            if self.flushed.contains(&shared) || self.snapshot.body(table, chain).is_none() {
                ops.push(Op::Write { table, chain, body: Cow::Borrowed("") });
            }
        }
        if self.terms.localhost {
            ops.extend(guard::missing(self.snapshot));
        }
        self.tail(&mut ops);
        Change { owner: Owner::Everybody, ops }
    }

    fn tail(&self, ops: &mut Vec<Op<'a>>) {
        let tail = fixed::services_tail(self.terms);
        let append = |rules| Op::Append { table: Table::Nat, chain: Shared::Services.chain(), rules };
        if self.flushed.contains(&Shared::Services) {
            ops.push(append(tail));
            return;
        }
        let printed = &self.shared[&Shared::Services].printed;
        let is_tail = |rule: &&str| target(rule) == Some(Shared::NodePorts.chain());
        let found: Vec<&str> = printed.iter().copied().filter(|rule| is_tail(rule)).collect();
        let last = printed.iter().rev().take_while(|rule| is_tail(rule)).count();
        if last == found.len() && found.iter().map(|rule| canonical(rule)).eq(tail.iter().cloned()) {
            return;
        }
        ops.extend(found.into_iter().map(|rule| remove(Shared::Services, rule)));
        if !tail.is_empty() {
            ops.push(append(tail));
        }
    }

    /// What one Service needs.
    pub(crate) fn service(&self, key: &ServiceKey, wanted: &'a Wanted) -> Change<'a> {
        let mut ops = Vec::new();
        for (chain, body) in wanted.new.chains() {
            if !self.snapshot.has(Table::Nat, chain.as_str(), body) {
                ops.push(write(chain, body));
            }
        }
        for (chain, _) in wanted.old.chains() {
            let there = self.snapshot.body(Table::Nat, chain.as_str()).is_some();
            if there && wanted.new.chain(chain).is_none() {
                ops.push(Op::Delete { table: Table::Nat, chain: chain.as_str() });
            }
        }
        for block in &wanted.new.blocks {
            if self.flushed.contains(&block.chain) {
                ops.push(insert(block));
            } else if !self.in_place(block) {
                self.remove_all(block, &mut ops);
                ops.push(insert(block));
            }
        }
        for block in wanted.old.blocks.iter().filter(|block| !wanted.new.blocks.contains(block)) {
            self.remove_all(block, &mut ops);
        }
        Change { owner: Owner::Service(key.clone()), ops }
    }

    fn remove_all(&self, block: &Block, ops: &mut Vec<Op<'a>>) {
        let lines = &self.shared[&block.chain];
        let found = block.rules.iter().filter_map(|rule| lines.at.get(rule)).flatten();
        ops.extend(found.map(|index| remove(block.chain, lines.printed[*index])));
    }

    /// What is there under our names and in nobody's plan.
    pub(crate) fn nobody(&self, wanted: &BTreeMap<ServiceKey, Wanted>) -> Change<'a> {
        let mut ops = Vec::new();
        let there = self.snapshot.chains(Table::Nat).keys();
        let mut stale: FxHashSet<&'a str> =
            there.copied().filter(|chain| names::is_service_chain(Table::Nat, chain)).collect();
        stale.retain(|chain| !self.kept.chains.contains(chain));
        if !stale.is_empty() {
            for (chain, _) in wanted.values().flat_map(|wanted| wanted.new.chains()) {
                stale.remove(chain.as_str());
            }
        }
        ops.extend(stale.into_iter().map(|chain| Op::Delete { table: Table::Nat, chain }));
        let lines: FxHashSet<(Shared, &str)> = wanted
            .values()
            .flat_map(|wanted| &wanted.new.blocks)
            .flat_map(|block| block.rules.iter().map(|rule| (block.chain, rule.as_str())))
            .collect();
        for (shared, found) in &self.shared {
            if self.flushed.contains(shared) {
                continue;
            }
            for (rule, positions) in &found.at {
                let tail = *shared == Shared::Services && target(rule) == Some(Shared::NodePorts.chain());
                if tail || lines.contains(&(*shared, rule.as_str())) {
                    continue;
                }
                let printed = positions.iter().map(|index| found.printed[*index]);
                let stale = printed.filter(|printed| !self.kept.lines.contains(printed));
                ops.extend(stale.map(|rule| remove(*shared, rule)));
            }
        }
        ops.sort_unstable_by(|a, b| order(a).cmp(&order(b)));
        Change { owner: Owner::Nobody, ops }
    }
}

fn order<'o>(op: &'o Op<'_>) -> (&'o str, &'o str) {
    match op {
        Op::Remove { chain, rule, .. } => (chain, rule),
        Op::Write { chain, .. } | Op::Delete { chain, .. } => (chain, ""),
        Op::Prepend { chain, .. } | Op::Append { chain, .. } => (chain, ""),
        Op::Insert { chain, .. } => (chain.chain(), ""),
    }
}
