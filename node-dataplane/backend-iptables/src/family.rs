//! One family's half of the backend: its tool, what it wrote, what it had to leave out.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_model::{Feature, ServiceKey};
use lockstep_view::backend::FailureKind;
use lockstep_view::{ForwardingPlan, NodePlan, ServicePlan};
use lockstep_xtables::{Flavour, Snapshot, Table, Tool, ToolError};
use rustc_hash::FxHashMap;

use crate::diff::{self, Kept, KernelDiff, Wanted};
use crate::fixed::{self, Terms};
use crate::guard;
use crate::input::{self, Change, Input, Op, Owner};
use crate::names::{ChainName, Shared};
use crate::render::ServiceRules;

/// What the tool and the kernel can do for one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    pub(crate) random_fully: bool,
    pub(crate) recent: bool,
    pub(crate) sctp: bool,
    /// The guard of the loopback can be written.
    pub(crate) guard: bool,
}

/// Why a Service is not in force as planned.
#[derive(Debug, Clone)]
pub(crate) struct LeftOut {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
    pub(crate) previous_in_force: bool,
}

/// What a write touched.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    pub(crate) services: BTreeSet<ServiceKey>,
    /// Chains that lines of Services came into or left.
    pub(crate) shared: BTreeSet<Shared>,
    /// Chains that were deleted.
    pub(crate) gone: Vec<ChainName>,
}

impl Touched {
    fn add(&mut self, Wanted { old, new }: &Wanted) {
        // A chain that an earlier write deleted may be back.
        self.gone.retain(|chain| new.chain(chain).is_none());
        let gone = old.chains().filter(|(chain, _)| new.chain(chain).is_none());
        self.gone.extend(gone.map(|(chain, _)| *chain));
        let left = old.blocks.iter().filter(|block| !new.blocks.contains(block));
        let came = new.blocks.iter().filter(|block| !old.blocks.contains(block));
        self.shared.extend(left.chain(came).map(|block| block.chain));
    }
}

pub(crate) struct FamilyState {
    pub(crate) tool: Tool,
    pub(crate) abilities: Abilities,
    pub(crate) features: Vec<Feature>,
    pub(crate) liberal: bool,
    /// `None` before the first complete sync.
    pub(crate) terms: Option<Terms>,
    pub(crate) in_force: FxHashMap<ServiceKey, Arc<ServicePlan>>,
    pub(crate) left_out: BTreeMap<ServiceKey, LeftOut>,
    /// Services whose write failed for a reason that is not theirs: written with the next.
    owed: BTreeSet<ServiceKey>,
    /// Transactions of the last `apply`, as far as they succeeded.
    pub(crate) commits: u32,
    /// What the last write touched, and those before it that are not read back; `None` = everything.
    pub(crate) touched: Option<Touched>,
    /// What is touched so far is read back with what the next write touches.
    pub(crate) unread: bool,
    /// What was said to accept packets before they come to the guard.
    ahead_of_guard: Option<String>,
}

impl FamilyState {
    pub(crate) fn new(tool: Tool, abilities: Abilities, features: Vec<Feature>, liberal: bool) -> Self {
        Self {
            tool,
            abilities,
            features,
            liberal,
            terms: None,
            in_force: FxHashMap::default(),
            left_out: BTreeMap::new(),
            owed: BTreeSet::new(),
            commits: 0,
            touched: Some(Touched::default()),
            unread: false,
            ahead_of_guard: None,
        }
    }

    pub(crate) fn terms(&self, node: &NodePlan) -> Terms {
        Terms::new(self.tool.family, node, self.abilities.random_fully, self.liberal)
    }

    /// Rules that are in force for a Service, as far as this process knows.
    pub(crate) fn rules_in_force(&self, key: &ServiceKey) -> ServiceRules {
        match (self.in_force.get(key), &self.terms) {
            (Some(plan), Some(terms)) => ServiceRules::render(plan, terms).unwrap_or_default(),
            _ => ServiceRules::default(),
        }
    }

    /// The rules a Service should have; an error where it cannot have them.
    fn wanted(&self, plan: &ServicePlan, terms: &Terms) -> Result<ServiceRules, (FailureKind, String)> {
        if let Some(feature) = plan.lacking(&self.features) {
            return Err((
                FailureKind::Unsupported,
                format!("needs {feature:?}, which iptables cannot do here"),
            ));
        }
        ServiceRules::render(plan, terms).map_err(|error| (FailureKind::Unsupported, error.to_string()))
    }

    fn leave_out(&mut self, key: &ServiceKey, kind: FailureKind, message: String, previous_in_force: bool) {
        tracing::warn!(service = %key, %message, "left out");
        self.left_out.insert(key.clone(), LeftOut { kind, message, previous_in_force });
    }

    /// Whole state. Returns the objects written.
    pub(crate) fn sync(&mut self, plan: &ForwardingPlan) -> Result<usize, ToolError> {
        let terms = self.terms(&plan.node);
        self.in_force.clear();
        self.left_out.clear();
        self.owed.clear();
        self.touched = None;
        self.terms = None;
        let mut wanted = Vec::with_capacity(plan.services.len());
        for (key, service) in &plan.services {
            match self.wanted(service, &terms) {
                Ok(new) => wanted.push((key.clone(), Wanted { new, old: ServiceRules::default() })),
                Err((kind, message)) => self.leave_out(key, kind, message, false),
            }
        }
        let wanted = BTreeMap::from_iter(wanted);
        let mut owners: BTreeSet<Owner> = wanted.keys().cloned().map(Owner::Service).collect();
        owners.insert(Owner::Nobody);
        let mut pass = Pass { wanted, terms, full: true, objects: 0 };
        self.settle(&mut pass, owners)?;
        for key in pass.wanted.keys().filter(|key| !self.left_out.contains_key(*key)) {
            self.in_force.insert(key.clone(), Arc::clone(&plan.services[key]));
        }
        self.terms = Some(pass.terms);
        self.look_for_previous()?;
        Ok(pass.objects)
    }

    /// Finds out what is there of Services that a sync had to leave out.
    fn look_for_previous(&mut self) -> Result<(), ToolError> {
        if self.left_out.is_empty() {
            return Ok(());
        }
        let saved = self.tool.save()?;
        let snapshot = Snapshot::parse(&saved);
        for (key, left) in &mut self.left_out {
            left.previous_in_force = !Kept::find(&snapshot, std::iter::once(key)).lines.is_empty();
        }
        Ok(())
    }

    /// Changed Services only. Returns the objects written.
    pub(crate) fn apply(
        &mut self,
        plan: &ForwardingPlan,
        changed: &[ServiceKey],
    ) -> Result<usize, ToolError> {
        self.commits = 0;
        let Some(terms) = self.terms.clone().filter(|terms| *terms == self.terms(&plan.node)) else {
            return self.sync(plan);
        };
        let keys: BTreeSet<ServiceKey> =
            changed.iter().cloned().chain(std::mem::take(&mut self.owed)).collect();
        let mut wanted = BTreeMap::new();
        for key in &keys {
            let new = match plan.services.get(key).map(|service| self.wanted(service, &terms)) {
                Some(Err((kind, message))) => {
                    let left = self.left_out.get(key).is_some_and(|left| left.previous_in_force);
                    let previous = left || self.in_force.contains_key(key);
                    self.leave_out(key, kind, message, previous);
                    continue;
                }
                Some(Ok(new)) => new,
                None => ServiceRules::default(),
            };
            let left = self.left_out.remove(key);
            if left.is_some_and(|left| left.previous_in_force) && !self.in_force.contains_key(key) {
                // An earlier process wrote what is there of it: only the kernel knows what that is.
                return self.sync(plan);
            }
            wanted.insert(key.clone(), Wanted { new, old: self.rules_in_force(key) });
        }
        let mut pass = Pass { wanted, terms, full: false, objects: 0 };
        let written = self.write(&mut pass);
        if let Err(error) = written {
            self.owed = keys;
            return Err(error);
        }
        let unread = std::mem::take(&mut self.unread);
        let mut touched = match self.touched.take() {
            touched if unread => touched,
            _ => Some(Touched::default()),
        };
        for (key, wanted) in &pass.wanted {
            if self.left_out.contains_key(key) {
                continue;
            }
            if let Some(touched) = &mut touched {
                touched.add(wanted);
            }
            match plan.services.get(key) {
                Some(service) => drop(self.in_force.insert(key.clone(), Arc::clone(service))),
                None => drop(self.in_force.remove(key)),
            }
        }
        if let Some(touched) = &mut touched {
            touched.services.extend(keys);
        }
        self.touched = touched;
        Ok(pass.objects)
    }

    /// The short way: one restore from memory. What is refused goes the long way.
    fn write(&mut self, pass: &mut Pass) -> Result<(), ToolError> {
        let mut changes: Vec<Change<'_>> = pass
            .wanted
            .iter()
            .map(|(key, wanted)| Change {
                owner: Owner::Service(key.clone()),
                ops: diff::against_memory(&wanted.old, &wanted.new),
            })
            .filter(|change| !change.ops.is_empty())
            .collect();
        if changes.is_empty() {
            return Ok(());
        }
        let owners = changes.iter().map(|change| change.owner.clone()).collect();
        if self.tool.flavour == Flavour::Nft && self.left_out.is_empty() {
            self.rewrite_shared(pass, &mut changes);
        }
        let input = Input::new(self.tool.flavour, self.in_force.len(), &changes);
        drop(changes);
        match self.tool.restore(&input.text) {
            Ok(()) => {
                self.commits += input.commits;
                pass.objects += input.objects;
            }
            Err(error) if error.concerns_rules() => {
                tracing::warn!(%error, "restore refused: looking for the Service");
                self.settle(pass, owners)?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Writes those shared chains of nat whole that would lose many lines.
    fn rewrite_shared<'p>(&self, pass: &'p Pass, changes: &mut Vec<Change<'p>>) {
        for shared in [Shared::Services, Shared::NodePorts] {
            let name = shared.chain();
            let leaves =
                |op: &Op<'_>| matches!(op, Op::Remove { table: Table::Nat, chain, .. } if *chain == name);
            if changes.iter().flat_map(|change| &change.ops).filter(|op| leaves(op)).count() <= REMOVALS {
                continue;
            }
            let comes = |op: &Op<'_>| matches!(op, Op::Insert { chain, .. } if *chain == shared);
            changes.iter_mut().for_each(|change| change.ops.retain(|op| !leaves(op) && !comes(op)));
            let mut stay: Vec<&ServiceKey> =
                self.in_force.keys().filter(|key| !pass.wanted.contains_key(*key)).collect();
            stay.sort_unstable();
            let (table, chain) = (Table::Nat, name);
            let mut ops = vec![Op::Write { table, chain, body: Cow::Borrowed("") }];
            for block in stay.into_iter().flat_map(|key| self.rules_in_force(key).blocks) {
                if block.chain == shared {
                    ops.push(Op::Insert { chain: shared, back: block.back, rules: Cow::Owned(block.rules) });
                }
            }
            let new = pass.wanted.values().flat_map(|wanted| &wanted.new.blocks);
            ops.extend(new.filter(|block| block.chain == shared).map(diff::insert));
            if shared == Shared::Services {
                ops.push(Op::Append { table, chain, rules: fixed::services_tail(&pass.terms) });
            }
            changes.insert(0, Change { owner: Owner::Everybody, ops });
        }
    }

    /// Compares with the kernel and writes the difference for `owners`; what is refused is
    /// narrowed down to single owners, who are left out.
    fn settle(&mut self, pass: &mut Pass, mut owners: BTreeSet<Owner>) -> Result<(), ToolError> {
        loop {
            let mut saved = self.tool.save()?;
            if pass.terms.localhost {
                saved = self.make_guard_chain(pass, saved)?;
            }
            let snapshot = Snapshot::parse(&saved);
            let mut unguarded = Vec::new();
            if pass.terms.localhost {
                unguarded = guard::unguarded(&snapshot);
                self.look_ahead_of_guard(&snapshot);
            }
            let standing = input::standing(&snapshot);
            let changes = self.against_kernel(pass, &snapshot, &owners);
            let input = Input::new(self.tool.flavour, standing, &changes);
            if input.objects == 0 {
                return Ok(());
            }
            let error = match self.tool.restore(&input.text) {
                Ok(()) => {
                    self.commits += input.commits;
                    pass.objects += input.objects;
                    if !unguarded.is_empty() {
                        self.leave_guard_once(pass, &unguarded);
                    }
                    return Ok(());
                }
                Err(error) => error,
            };
            let ToolError::Refused { complaint, line, .. } = &error else { return Err(error) };
            let blamed = line
                .and_then(|line| input.change_at(line))
                .map(|at| &changes[at].owner)
                .filter(|owner| owners.contains(*owner))
                .or(owners.first().filter(|_| owners.len() == 1))
                .cloned();
            match blamed {
                Some(owner) => {
                    owners.remove(&owner);
                    self.refuse(pass, &owner, complaint);
                }
                None if owners.is_empty() => return Err(error),
                None => {
                    let mut first = owners;
                    let middle = first.iter().nth(first.len() / 2).cloned();
                    let second = middle.map(|middle| first.split_off(&middle)).unwrap_or_default();
                    self.settle(pass, first)?;
                    return self.settle(pass, second);
                }
            }
        }
    }

    /// Makes the chain of the guard where `saved` lacks it. Returns what is there then, as far as it
    /// matters: an empty chain is as good as none.
    fn make_guard_chain(&mut self, pass: &mut Pass, saved: String) -> Result<String, ToolError> {
        if guard::has_chain(&Snapshot::parse(&saved)) {
            return Ok(saved);
        }
        match self.tool.restore(guard::MAKE) {
            Ok(()) => {
                self.commits += 1;
                pass.objects += 1;
                Ok(saved)
            }
            Err(error) if error.concerns_rules() => {
                // Somebody else was faster, and may have written more than the chain.
                let saved = self.tool.save()?;
                if guard::has_chain(&Snapshot::parse(&saved)) { Ok(saved) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }

    /// Takes away what somebody else wrote of the guard at the same moment. It does no harm: where that
    /// fails, it stays. `written`: the chains that it was just written to.
    fn leave_guard_once(&mut self, pass: &mut Pass, written: &[&'static str]) {
        let read = match self.tool.flavour {
            Flavour::Nft => self.tool.list(&guard::PLACES),
            Flavour::Legacy => self.tool.save(),
        };
        let Ok(text) = read else { return };
        let snapshot = match self.tool.flavour {
            Flavour::Nft => Snapshot::of_list(&text, &guard::PLACES),
            Flavour::Legacy => Some(Snapshot::parse(&text)),
        };
        let Some(snapshot) = snapshot else { return };
        let ops = guard::doubled(&snapshot, written);
        let input = Input::new(self.tool.flavour, 0, &[Change { owner: Owner::Everybody, ops }]);
        if input.objects > 0 && self.tool.restore(&input.text).is_ok() {
            self.commits += input.commits;
            pass.objects += input.objects;
        }
    }

    fn look_ahead_of_guard(&mut self, snapshot: &Snapshot<'_>) {
        let ahead = guard::ahead(snapshot).map(str::to_owned);
        if ahead == self.ahead_of_guard {
            return;
        }
        if let Some(rule) = &ahead {
            tracing::warn!(
                rule,
                "in filter INPUT this comes before the jump to {}: what it accepts from outside may be \
                 for 127.0.0.1 of this node",
                guard::CHAIN
            );
        }
        self.ahead_of_guard = ahead;
    }

    fn refuse(&mut self, pass: &Pass, owner: &Owner, complaint: &str) {
        let Owner::Service(key) = owner else {
            tracing::warn!(complaint, "leftovers cannot be removed");
            return;
        };
        let lower = complaint.to_lowercase();
        let kind =
            match ["memory", "no buffer space", "too many open"].iter().any(|word| lower.contains(word)) {
                true => FailureKind::Resources,
                false => FailureKind::Kernel,
            };
        let previous = pass.wanted.get(key).is_some_and(|wanted| !wanted.old.is_empty());
        self.leave_out(key, kind, complaint.to_owned(), previous);
    }

    fn against_kernel<'p>(
        &self,
        pass: &'p Pass,
        snapshot: &'p Snapshot<'p>,
        owners: &BTreeSet<Owner>,
    ) -> Vec<Change<'p>> {
        let kept = Kept::find(snapshot, self.left_out.keys());
        let mut diff = KernelDiff::new(snapshot, &pass.terms, kept);
        let all_here = owners.len() > pass.wanted.len();
        if pass.full && all_here {
            diff.choose_rewrites(&pass.wanted);
        }
        let mut changes = vec![diff.everybody()];
        for (key, wanted) in &pass.wanted {
            if owners.contains(&Owner::Service(key.clone())) {
                changes.push(diff.service(key, wanted));
            }
        }
        if owners.contains(&Owner::Nobody) {
            changes.push(diff.nobody(&pass.wanted));
        }
        changes
    }

    /// Services that are not as planned because the family's tool failed: those that wait for
    /// the next write, and all of the family where not even the whole could be compared.
    pub(crate) fn behind<'p>(&'p self, plan: &'p ForwardingPlan) -> Vec<&'p ServiceKey> {
        let family = self.tool.family;
        let planned = |key| {
            plan.services.get(key).is_some_and(|plan| plan.ports.iter().any(|port| port.family == family))
        };
        match self.terms {
            Some(_) => {
                self.owed.iter().filter(|key| self.in_force.contains_key(*key) || planned(*key)).collect()
            }
            None => plan.services.keys().filter(|key| planned(*key)).collect(),
        }
    }
}

/// The nft flavour takes 1.5 us for each pair of a line that leaves a shared chain and a line that
/// is there, and 100 us for a line that is written. More removals than this take longer
/// than the chain as a whole.
const REMOVALS: usize = 64;

/// One pass over some or all Services.
struct Pass {
    wanted: BTreeMap<ServiceKey, Wanted>,
    terms: Terms,
    /// All Services of the plan, and leftovers too.
    full: bool,
    objects: usize,
}
