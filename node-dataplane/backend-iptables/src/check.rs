//! What should be there against what `iptables-save` prints: the read-back of `verify` and
//! `audit`. Shares no code with the diff that writes.

use lockstep_model::{Family, ServiceKey};
use lockstep_view::backend::Drift;
use lockstep_xtables::{Snapshot, Table, canonical, comment, drift, target};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::diff::Kept;
use crate::family::{FamilyState, Touched};
use crate::fixed::{self, Terms};
use crate::guard;
use crate::names::{self, ChainName, Shared};

/// Compares everything, or, where `only` is given, what was touched and what all Services need.
/// `shared`: the shared chains that the snapshot has.
pub(crate) fn compare(
    state: &FamilyState,
    snapshot: &Snapshot<'_>,
    only: Option<&Touched>,
    shared: &[Shared],
) -> Vec<Drift> {
    let Some(terms) = &state.terms else { return Vec::new() };
    let mut check = Check { snapshot, shared, family: state.tool.family, drift: Vec::new() };
    check.fixed(terms);
    match only {
        Some(touched) => check.some(state, touched),
        None => check.all(state),
    }
    check.drift
}

/// True where the guard of the loopback is not as it should be.
pub(crate) fn is_of_guard(drift: &Drift) -> bool {
    [&drift.object, &drift.fault].iter().any(|text| text.ends_with(guard::CHAIN))
}

struct Check<'a> {
    snapshot: &'a Snapshot<'a>,
    shared: &'a [Shared],
    family: Family,
    drift: Vec<Drift>,
}

impl Check<'_> {
    fn report(&mut self, table: Table, chain: &str, fault: impl Into<String>) {
        self.drift.push(drift(self.family, table, chain, fault));
    }

    fn chain(&mut self, table: Table, chain: &str, body: &str) {
        match self.snapshot.body(table, chain) {
            None => self.report(table, chain, "missing"),
            Some(_) if !self.snapshot.has(table, chain, body) => self.report(table, chain, "rules differ"),
            Some(_) => {}
        }
    }

    fn fixed(&mut self, terms: &Terms) {
        self.drift.extend(fixed::all(terms).drift(self.family, self.snapshot));
        for shared in self.shared {
            if self.snapshot.body(shared.table(), shared.chain()).is_none() {
                self.report(shared.table(), shared.chain(), "missing");
            }
        }
        if terms.localhost {
            self.guard();
        }
        if !self.shared.contains(&Shared::Services) {
            return;
        }
        let tail = fixed::services_tail(terms);
        let rules = self.snapshot.rules(Table::Nat, Shared::Services.chain());
        let end = rules.len().saturating_sub(tail.len());
        if !rules[end..].iter().map(|rule| canonical(rule)).eq(tail) {
            self.report(Table::Nat, Shared::Services.chain(), "does not end in the jump to the node ports");
        }
    }

    /// Others may have rules in these chains; those before the guard's own must let nothing by.
    fn guard(&mut self) {
        for chain in guard::ENTRANCES {
            let mut found = self.snapshot.rules(Table::Filter, chain).into_iter().map(canonical);
            if !found.any(|rule| rule == guard::JUMP) {
                self.report(Table::Filter, chain, format!("lacks {}", guard::JUMP));
            }
        }
        for rule in self.snapshot.rules(Table::Filter, guard::CHAIN) {
            if canonical(rule) == guard::RULE {
                return;
            }
            if target(rule).is_some_and(|target| !guard::KEEPING.contains(&target)) {
                return self.report(Table::Filter, guard::CHAIN, format!("lets packets by: {rule}"));
            }
        }
        self.report(Table::Filter, guard::CHAIN, format!("lacks {}", guard::RULE));
    }

    /// Every line of these Services, and nothing left of what they had.
    fn some(&mut self, state: &FamilyState, touched: &Touched) {
        for chain in &touched.gone {
            if self.snapshot.body(Table::Nat, chain.as_str()).is_some() {
                self.report(Table::Nat, chain.as_str(), "still there");
            }
        }
        let mut lines: FxHashSet<(Shared, String)> = FxHashSet::default();
        for key in &touched.services {
            let rules = state.rules_in_force(key);
            for (chain, body) in rules.chains() {
                self.chain(Table::Nat, chain.as_str(), body);
            }
            for block in rules.blocks {
                lines.extend(block.rules.into_iter().map(|rule| (block.chain, rule)));
            }
        }
        let names: FxHashSet<String> = touched.services.iter().map(ToString::to_string).collect();
        let left_out: FxHashSet<String> = state.left_out.keys().map(ToString::to_string).collect();
        for &shared in self.shared {
            let mut surplus = 0;
            for rule in self.snapshot.rules(shared.table(), shared.chain()) {
                let named = comment(rule).and_then(|text| text.split([':', ' ']).next());
                // Our lines begin with the name of their Service: no other line needs a look.
                let Some(name) = named.filter(|name| names.contains(*name)) else { continue };
                let found = lines.remove(&(shared, canonical(rule)));
                surplus += usize::from(!found && !left_out.contains(name));
            }
            let missing = lines.iter().filter(|(chain, _)| *chain == shared).count();
            self.count(shared, missing, surplus);
        }
    }

    fn count(&mut self, shared: Shared, missing: usize, surplus: usize) {
        for (count, word) in [(missing, "missing"), (surplus, "too many")] {
            if count > 0 {
                self.report(shared.table(), shared.chain(), format!("{count} rules {word}"));
            }
        }
    }

    fn all(&mut self, state: &FamilyState) {
        let kept = Kept::find(self.snapshot, state.left_out.keys());
        let mut chains: FxHashSet<ChainName> = FxHashSet::default();
        let mut lines: FxHashMap<(Shared, String), usize> = FxHashMap::default();
        let mut keys: Vec<&ServiceKey> = state.in_force.keys().collect();
        keys.sort_unstable();
        for key in keys {
            let rules = state.rules_in_force(key);
            for (chain, body) in rules.chains() {
                self.chain(Table::Nat, chain.as_str(), body);
                chains.insert(*chain);
            }
            for block in rules.blocks {
                for rule in block.rules {
                    *lines.entry((block.chain, rule)).or_default() += 1;
                }
            }
        }
        let chains: FxHashSet<&str> = chains.iter().map(ChainName::as_str).collect();
        let mut there: Vec<&str> = self.snapshot.chains(Table::Nat).keys().copied().collect();
        there.sort_unstable();
        for chain in there {
            let known = chains.contains(chain) || kept.chains.contains(chain);
            if names::is_service_chain(Table::Nat, chain) && !known {
                self.report(Table::Nat, chain, "in no plan");
            }
        }
        for shared in Shared::ALL {
            let mut surplus = 0;
            for rule in self.snapshot.rules(shared.table(), shared.chain()) {
                let tail = shared == Shared::Services && target(rule) == Some(Shared::NodePorts.chain());
                match lines.get_mut(&(shared, canonical(rule))) {
                    Some(left) if *left > 0 => *left -= 1,
                    _ => surplus += usize::from(!tail && !kept.lines.contains(rule)),
                }
            }
            let missing = lines.iter().filter(|((chain, _), _)| *chain == shared).map(|(_, left)| left).sum();
            self.count(shared, missing, surplus);
        }
    }
}
