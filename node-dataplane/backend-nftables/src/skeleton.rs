//! Writing what is there before any element: a whole table, or what a table lacks.
//!
//! A table that lacks sets, chains or rules is as a release before this one left it, or
//! somebody damaged it. It is mended in place: what packets taught its maps stays.

use std::collections::{BTreeSet, HashMap};

use lockstep_kernel::netlink::Error;
use lockstep_kernel::nf_tables::{self, Batch, Netfilter, Rule};
use lockstep_model::Family;
use lockstep_view::NodePlan;
use rustc_hash::FxHashSet;

use crate::layout::{self, ChainLayout};
use crate::names::{SharedChain, TABLE};
use crate::rules::kernel_family;
use crate::sets::SetId;

/// Writes a table with its sets and fixed chains; returns how many objects that are.
pub(crate) fn write_skeleton(
    batch: &mut Batch,
    table: &str,
    family: Family,
    node: &NodePlan,
    size: impl Fn(SetId) -> u32,
) -> usize {
    let kernel = kernel_family(family);
    batch.add_table(kernel, table);
    for set in SetId::ALL {
        batch.add_set(kernel, table, &set.declare(family, size(set)));
    }
    let fixed = layout::fixed(family, node);
    for chain in &fixed {
        batch.add_chain(kernel, table, &chain.chain);
    }
    let rules: Vec<_> = fixed.iter().flat_map(|chain| chain.kernel_rules(family)).collect();
    for rule in &rules {
        batch.add_rule(kernel, table, rule);
    }
    1 + SetId::ALL.len() + fixed.len() + rules.len()
}

/// The sets of both tables that are declared as we declare them.
pub(crate) fn declared(netfilter: &mut dyn Netfilter) -> Result<FxHashSet<(Family, SetId)>, Error> {
    let mut declared = FxHashSet::default();
    for family in Family::ALL {
        let sets = nf_tables::sets(netfilter, kernel_family(family), TABLE)?;
        declared.extend(sets.iter().filter_map(|found| Some((family, ours(family, found)?))));
    }
    Ok(declared)
}

/// Which of ours a set is, if it is declared so.
fn ours(family: Family, found: &nf_tables::Set) -> Option<SetId> {
    SetId::ALL.into_iter().find(|set| set.name() == found.name && *found == set.declare(family, found.size))
}

/// What makes a table whole.
#[derive(Debug)]
pub(crate) struct Mending {
    pub(crate) family: Family,
    /// Sets that are missing.
    pub(crate) sets: Vec<SetId>,
    /// Shared chains whose rules differ.
    pub(crate) shared: Vec<SharedChain>,
    /// Fixed chains that are missing.
    missing: Vec<ChainLayout>,
    /// Fixed chains whose rules differ.
    differing: Vec<ChainLayout>,
}

impl Mending {
    /// Reads a table. `None` where it must be made anew: it is not there, or it has what is not
    /// ours or is declared in another way, which cannot be changed.
    pub(crate) fn of(
        netfilter: &mut dyn Netfilter,
        family: Family,
        node: &NodePlan,
    ) -> Result<Option<Self>, Error> {
        let table = kernel_family(family);
        let sets = nf_tables::sets(netfilter, table, TABLE)?;
        if sets.is_empty() || sets.iter().any(|found| ours(family, found).is_none()) {
            return Ok(None);
        }
        let mut rules: HashMap<String, Vec<Rule>> = HashMap::new();
        for rule in nf_tables::rules(netfilter, table, TABLE)? {
            rules.entry(rule.chain.clone()).or_default().push(rule);
        }
        let missing = SetId::ALL.into_iter().filter(|set| sets.iter().all(|found| found.name != set.name()));
        let mut mending = Self {
            family,
            sets: missing.collect(),
            shared: Vec::new(),
            missing: layout::fixed(family, node),
            differing: Vec::new(),
        };
        for found in nf_tables::chains(netfilter, table, TABLE)? {
            let fixed = mending.missing.iter().position(|chain| chain.chain.name == found.name);
            let (expected, shared) = match (fixed, SharedChain::parse(&found.name)) {
                (Some(position), _) => (mending.missing.remove(position), None),
                (None, Some(chain)) => (layout::shared(family, node, chain), Some(chain)),
                (None, None) => return Ok(None),
            };
            if expected.chain != found {
                return Ok(None);
            }
            let rules = rules.remove(&found.name).unwrap_or_default();
            match shared {
                _ if expected.kernel_rules(family).eq(rules) => {}
                Some(chain) => mending.shared.push(chain),
                None => mending.differing.push(expected),
            }
        }
        Ok(Some(mending))
    }

    /// Writes the declarations of what is missing, which all the rest may refer to; returns how
    /// many objects that are.
    pub(crate) fn declare(&self, batch: &mut Batch, size: impl Fn(SetId) -> u32) -> usize {
        let table = kernel_family(self.family);
        for set in &self.sets {
            batch.add_set(table, TABLE, &set.declare(self.family, size(*set)));
        }
        for chain in &self.missing {
            batch.add_chain(table, TABLE, &chain.chain);
        }
        self.sets.len() + self.missing.len()
    }

    /// Writes the rules, where every chain that is `needed` has been made. A shared chain that is
    /// not is emptied, because it may lead to others that are not there. Returns how many objects
    /// that are.
    pub(crate) fn fill(
        &self,
        batch: &mut Batch,
        node: &NodePlan,
        needed: &BTreeSet<(Family, SharedChain)>,
    ) -> usize {
        let table = kernel_family(self.family);
        let shared: Vec<ChainLayout> = self
            .shared
            .iter()
            .filter(|chain| needed.contains(&(self.family, **chain)))
            .map(|chain| layout::shared(self.family, node, *chain))
            .collect();
        let differing = self.differing.iter().map(|chain| chain.chain.name.clone());
        let emptied: Vec<String> = differing.chain(self.shared.iter().map(|chain| chain.name())).collect();
        for chain in &emptied {
            batch.flush_chain(table, TABLE, chain);
        }
        let filled = self.missing.iter().chain(&self.differing).chain(&shared);
        let rules: Vec<Rule> = filled.flat_map(|chain| chain.kernel_rules(self.family)).collect();
        for rule in &rules {
            batch.add_rule(table, TABLE, rule);
        }
        emptied.len() + rules.len()
    }
}
