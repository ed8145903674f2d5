//! Writing: whole tables, differences, single Services.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_kernel::netlink::Refusal;
use lockstep_kernel::nf_tables::{self, CommitError, Netfilter};
use lockstep_model::{Family, ServiceKey};
use lockstep_view::backend::FailureKind;
use lockstep_view::{ForwardingPlan, NodePlan, ServicePlan};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::adopt::{Observed, adopt_service, compare, note_serials};
use crate::change::{stage_anew, stage_change, stage_whole};
use crate::contents::{Installed, check};
use crate::keep::Places;
use crate::names::TABLE;
use crate::node::stage_service_cidrs;
use crate::observe::Remembered;
use crate::rules::kernel_family;
use crate::sets::{Datum, Key, Ranges, SetId};
use crate::skeleton::{Mending, declared, write_skeleton};
use crate::stage::{Attribution, lane_index};
use crate::state::{State, every_set, size_for};
use crate::{Error, Nftables, node, observe};

/// Up to this many changed Services, refusals are attributed at the first attempt.
const ATTRIBUTE_UP_TO: usize = 32;
/// How often a comparison is repeated where our tables change under it.
const ATTEMPTS: u32 = 4;

/// Services that a transaction leaves out, and why.
pub(crate) type Excluded = BTreeMap<ServiceKey, (FailureKind, String)>;

/// A Service that changes.
#[derive(Debug, Clone, Copy)]
struct Changed<'a> {
    key: &'a ServiceKey,
    plan: Option<&'a Arc<ServicePlan>>,
    slot: Option<usize>,
}

/// Why a transaction was not made.
enum Fault {
    /// These Services' messages were refused.
    Services(Vec<(ServiceKey, Refusal)>),
    /// Some message was refused, and the transaction was too packed to say whose.
    Unattributed,
    /// The kernel holds something else than was thought.
    Mismatch,
    /// Nothing of it can be made.
    Whole(Error),
}

impl<N: Netfilter> Nftables<N> {
    /// Compares the kernel with the plan and writes the difference.
    pub(crate) fn sync_all(&mut self, plan: &ForwardingPlan) -> Result<usize, Error> {
        let mut excluded = excluded_by_plan(plan.services.iter());
        let mut attributed = false;
        let mut mismatches = 0;
        loop {
            // Somebody may write while we compare. Where it happens again it is the plan
            // that contradicts itself, and the Services concerned are left out.
            self.blame = mismatches > 0;
            let result = self.sync_once(plan, &excluded, attributed || self.blame);
            self.blame = false;
            let fault = match result {
                Ok(objects) => {
                    self.settle(plan, None, excluded);
                    return Ok(objects);
                }
                Err(fault) => fault,
            };
            match fault {
                Fault::Services(refused) => exclude(&mut excluded, refused),
                Fault::Unattributed => attributed = true,
                Fault::Mismatch if mismatches < ATTEMPTS => mismatches += 1,
                Fault::Mismatch => return Err(Error::Unstable { times: mismatches }),
                Fault::Whole(error) => return Err(error),
            }
        }
    }

    /// Brings the changed Services to what the plan says.
    pub(crate) fn apply_changed(
        &mut self,
        plan: &ForwardingPlan,
        changed: &[ServiceKey],
    ) -> Result<usize, Error> {
        if !self.state.node.as_ref().is_some_and(|node| node.equals_but_for_service_cidrs(&plan.node)) {
            return self.sync_all(plan);
        }
        // Twice the same would be staged twice. Whoever sorts has no duplicates beside each other.
        let mut seen = FxHashSet::default();
        let unique = changed.is_sorted_by(|a, b| a < b);
        let changed: Vec<Changed<'_>> = changed
            .iter()
            .filter(|key| unique || seen.insert(*key))
            .map(|key| Changed { key, plan: plan.services.get(key), slot: self.state.services.slot(key) })
            .collect();
        let mut excluded = excluded_by_plan(changed.iter().filter_map(|one| Some((one.key, one.plan?))));
        let mut attributed = changed.len() <= ATTRIBUTE_UP_TO;
        loop {
            let fault = match self.apply_once(plan, &changed, &excluded, attributed) {
                Ok(objects) => {
                    self.settle(plan, Some(&changed), excluded);
                    return Ok(objects);
                }
                Err(fault) => fault,
            };
            match fault {
                Fault::Services(refused) => exclude(&mut excluded, refused),
                Fault::Unattributed => attributed = true,
                // Somebody changed our tables: compare all of them.
                Fault::Mismatch => return self.sync_all(plan),
                Fault::Whole(error) => return Err(error),
            }
        }
    }

    /// Records which Services are not in force as planned, of those that were written.
    fn settle(&mut self, plan: &ForwardingPlan, changed: Option<&[Changed<'_>]>, excluded: Excluded) {
        match changed {
            None => self.failures.clear(),
            Some(_) if self.failures.is_empty() => {}
            Some(changed) => changed.iter().for_each(|one| {
                self.failures.remove(one.key);
            }),
        }
        debug_assert!(excluded.keys().all(|key| plan.services.contains_key(key) || changed.is_some()));
        for (key, (kind, message)) in excluded {
            self.fail(&key, kind, message);
        }
    }

    fn apply_once(
        &mut self,
        plan: &ForwardingPlan,
        changed: &[Changed<'_>],
        excluded: &Excluded,
        attributed: bool,
    ) -> Result<usize, Fault> {
        self.stage.begin(attributed);
        let mut staged = Vec::with_capacity(changed.len());
        for (position, one) in changed.iter().enumerate() {
            if !excluded.is_empty() && excluded.contains_key(one.key) {
                continue;
            }
            let old = one.slot.and_then(|slot| self.state.services.at(slot));
            staged.push((one, stage_change(&mut self.stage, old, one.plan)));
            self.stage.seal(position);
        }
        let kept = self.stage_kept(changed, excluded);
        self.state.stage_hairpin(&mut self.stage);
        if let Some(node) = &self.state.node {
            stage_service_cidrs(&mut self.stage, &node.service_cidrs, &plan.node.service_cidrs);
        }
        if !self.state.has_room(&self.stage) {
            return self.rebuild(plan, excluded, attributed);
        }
        let objects = self.commit_stage(&plan.node, &[], |position| changed[position].key.clone())?;
        for (one, installed) in staged {
            match (installed, one.slot) {
                (Some(installed), Some(slot)) => self.state.services.replace(slot, installed),
                (Some(installed), None) => self.state.services.insert(one.key.clone(), installed),
                (None, _) => self.state.services.remove(one.key),
            }
        }
        for (key, slot, installed) in kept {
            match installed {
                Some(installed) => self.state.services.replace(slot, installed),
                None => {
                    self.state.services.remove(&key);
                    self.failures.entry(key).and_modify(|failure| failure.previous_in_force = false);
                }
            }
        }
        if let Some(node) = &mut self.state.node {
            node.service_cidrs.clone_from(&plan.node.service_cidrs);
        }
        self.reap();
        Ok(objects)
    }

    /// Takes from Services that are left out, now or before, what the changed ones are given.
    fn stage_kept(
        &mut self,
        changed: &[Changed<'_>],
        excluded: &Excluded,
    ) -> Vec<(ServiceKey, usize, Option<Installed>)> {
        if excluded.is_empty() && self.failures.is_empty() {
            return Vec::new();
        }
        let written = || changed.iter().filter(|one| !excluded.contains_key(one.key));
        let given = Places::of(written().filter_map(|one| one.plan));
        let written: FxHashSet<&ServiceKey> = written().map(|one| one.key).collect();
        let keys: BTreeSet<&ServiceKey> = excluded.keys().chain(self.failures.keys()).collect();
        let mut kept = Vec::new();
        for key in keys.into_iter().filter(|key| !written.contains(key)) {
            let Some(slot) = self.state.services.slot(key) else { continue };
            let Some(old) = self.state.services.at(slot) else { continue };
            let rest = given.leave(&old.plan);
            if !matches!(rest, Some(Cow::Borrowed(_))) {
                kept.push((key.clone(), slot, stage_change(&mut self.stage, Some(old), rest.as_deref())));
            }
        }
        kept
    }

    /// Commits what is staged and brings the state's counts up to it. Returns how many
    /// objects were written; nothing staged is no transaction.
    fn commit_stage(
        &mut self,
        node: &NodePlan,
        mendings: &[Mending],
        service: impl Fn(usize) -> ServiceKey,
    ) -> Result<usize, Fault> {
        let mut needed = BTreeSet::new();
        let chains = if mendings.is_empty() {
            self.state.chains_to_make(&self.stage)
        } else {
            needed = self.state.chains_needed(&self.stage);
            needed.difference(&self.state.chains).copied().collect()
        };
        let mut objects = self.stage.changes() + chains.len();
        if objects == 0 && mendings.is_empty() {
            return Ok(0);
        }
        self.batch.clear();
        self.batch.reserve(self.stage.bytes());
        for mending in mendings {
            objects += mending.declare(&mut self.batch, |set| self.state.size(mending.family, set));
        }
        let attribution = self.stage.write(&mut self.batch, node, &chains);
        for mending in mendings {
            objects += mending.fill(&mut self.batch, node, &needed);
            self.stage.written.everything = true;
        }
        self.commit(&attribution, service)?;
        self.state.committed(&self.stage, chains);
        Ok(objects)
    }

    fn commit(
        &mut self,
        attribution: &Attribution,
        service: impl Fn(usize) -> ServiceKey,
    ) -> Result<(), Fault> {
        // Our own changes must not be reported back to us; the generation tells foreign ones.
        self.netfilter.listen(false).map_err(|error| Fault::Whole(error.into()))?;
        match self.netfilter.commit(self.batch.finish()) {
            Ok(()) => {
                self.generation = self.generation.map(next_generation);
                // At once: what is not heard until then counts as changes to our tables. Where it cannot,
                // the transaction is made all the same, and the next look tries again.
                let _ = self.netfilter.listen(true);
                Ok(())
            }
            Err(CommitError::Link(error)) => Err(Fault::Whole(error.into())),
            Err(CommitError::Refused(refusals)) => {
                if !self.blame && refusals.iter().any(|refusal| refusal.errno.is_state_mismatch()) {
                    return Err(Fault::Mismatch);
                }
                let owners: Option<Vec<_>> = refusals
                    .iter()
                    .map(|refusal| Some((service(attribution.owner(refusal.seq)?), refusal.clone())))
                    .collect();
                match owners {
                    Some(owners) if !owners.is_empty() => Err(Fault::Services(owners)),
                    _ if !attribution.complete => Err(Fault::Unattributed),
                    _ => Err(Fault::Whole(CommitError::Refused(refusals).into())),
                }
            }
        }
    }

    /// Deletes chains that nothing leads to any more, in a transaction of its own: kernels
    /// before 6.2 still count the references that the transaction before has dropped. What
    /// they refuse is tried again after the next change.
    fn reap(&mut self) {
        if !self.reap_again && self.stage.references.values().all(|by| *by >= 0) {
            return;
        }
        let idle = self.state.idle_chains();
        self.reap_again = false;
        if idle.is_empty() {
            return;
        }
        self.batch.clear();
        for (family, chain) in &idle {
            self.batch.delete_chain(kernel_family(*family), TABLE, &chain.name());
        }
        if self.commit(&Attribution::default(), |_| ServiceKey::new("", "")).is_ok() {
            for chain in idle {
                self.state.chains.remove(&chain);
            }
        } else {
            self.reap_again = true;
        }
    }

    fn sync_once(
        &mut self,
        plan: &ForwardingPlan,
        excluded: &Excluded,
        attributed: bool,
    ) -> Result<usize, Fault> {
        let whole = |error: lockstep_kernel::netlink::Error| Fault::Whole(error.into());
        self.generation = Some(nf_tables::generation(&mut self.netfilter).map_err(whole)?);
        let mut state = State::of(&plan.node);
        let mut mendings = Vec::new();
        for family in Family::ALL {
            let skeleton = observe::skeleton(&mut self.netfilter, family, &plan.node).map_err(whole)?;
            if let Some(first) = skeleton.drift.first() {
                let differences = skeleton.drift.len();
                let Some(mending) = Mending::of(&mut self.netfilter, family, &plan.node).map_err(whole)?
                else {
                    tracing::info!(differences, %first, "making our tables anew");
                    return self.rebuild(plan, excluded, attributed);
                };
                tracing::info!(differences, %first, "mending our table");
                state.chains.extend(mending.shared.iter().map(|chain| (family, *chain)));
                mendings.push(mending);
            }
            state.chains.extend(skeleton.chains.into_iter().map(|chain| (family, chain)));
            for (set, size) in skeleton.sizes {
                state.set_fill(family, set, 0, size);
            }
        }
        if self.state.node.is_none() {
            let remembered = observe::remembered(&mut self.netfilter).map_err(whole)?;
            remembered.values().for_each(|given| self.stage.serial_is_taken(given.serial));
        }
        let mut observed = FxHashMap::default();
        for (family, set) in every_set() {
            let found = observe::elements(&mut self.netfilter, family, set).map_err(whole)?;
            let size = state.size(family, set);
            if found.has_strange() {
                // What holds for every other key is not deleted by a key of ours.
                tracing::info!(set = set.name(), "holds what is no key of ours, making our tables anew");
                return self.rebuild(plan, excluded, attributed);
            }
            if set.ranges() == Ranges::ByEnds && found.iter().any(|(_, datum)| datum == Datum::Foreign) {
                // Half a range cannot be taken away by what it should be.
                tracing::info!(set = set.name(), "not a set of whole ranges, making our tables anew");
                return self.rebuild(plan, excluded, attributed);
            }
            state.set_fill(family, set, found.len() * set.kernel_elements(), size);
            observed.insert((family, set), found);
        }
        self.adopt(plan, excluded, attributed, state, observed, &mendings)
    }

    /// Takes over what the kernel holds and writes only what differs.
    fn adopt(
        &mut self,
        plan: &ForwardingPlan,
        excluded: &Excluded,
        attributed: bool,
        mut state: State,
        mut observed: Observed,
        mendings: &[Mending],
    ) -> Result<usize, Fault> {
        for ((family, _), elements) in &observed {
            for (_, datum) in elements.iter() {
                if let Datum::Goto(chain) = datum {
                    *state.references.entry((*family, chain)).or_default() += 1;
                }
            }
        }
        self.stage.begin(attributed);
        note_serials(&mut self.stage, &observed);
        let desired = desired(&self.state, plan, excluded);
        for (position, (key, service)) in desired.iter().enumerate() {
            let stage = &mut self.stage;
            let installed = adopt_service(service, &observed, || stage.next_serial());
            installed.each_element(&mut |family, set, key, datum| {
                compare(stage, &mut observed, family, set, key, datum);
            });
            for port in &service.ports {
                for target in &port.hairpin {
                    *state.hairpin.entry(target.address).or_default() += 1;
                }
            }
            state.services.insert((*key).clone(), installed);
            self.stage.seal(position);
        }
        let stage = &mut self.stage;
        let mut local: Vec<_> = state.hairpin.keys().copied().collect();
        local.sort_unstable();
        for address in local {
            compare(
                stage,
                &mut observed,
                Family::of(address),
                SetId::Hairpin,
                &Key::hairpin(address),
                Datum::Present,
            );
        }
        node::each_element(&plan.node, &mut |family, set, key, datum| {
            compare(stage, &mut observed, family, set, key, datum);
        });
        for (family, set) in every_set() {
            let Some(rest) = observed.get(&(family, set)) else { continue };
            let mut rest: Vec<_> = rest.iter().collect();
            rest.sort_unstable_by_key(|(key, _)| *key);
            for (key, datum) in rest {
                stage.delete(family, set, &key, datum);
            }
        }
        for (family, set) in mendings.iter().flat_map(|it| it.sets.iter().map(|set| (it.family, *set))) {
            state.set_fill(family, set, 0, size_for(self.stage.lane(lane_index(family, set)).added));
        }
        let has_room = state.has_room(&self.stage);
        let keys: Vec<ServiceKey> = desired.iter().map(|(key, _)| (*key).clone()).collect();
        // The state before stays until the transaction is made.
        let before = std::mem::replace(&mut self.state, state);
        if !has_room {
            return self.rebuild(plan, excluded, attributed).inspect_err(|_| self.state = before);
        }
        match self.commit_stage(&plan.node, mendings, |position| keys[position].clone()) {
            Ok(objects) => {
                self.reap_again = true;
                self.reap();
                Ok(objects)
            }
            Err(Fault::Whole(Error::Commit(refused @ CommitError::Refused(_)))) if !mendings.is_empty() => {
                tracing::warn!(%refused, "our tables cannot be mended, making them anew");
                self.state = before;
                self.rebuild(plan, excluded, attributed)
            }
            Err(fault) => {
                self.state = before;
                Err(fault)
            }
        }
    }

    /// The endpoints that the kernel has in sets that are `declared` as ours, for a process that
    /// wrote none of them; no serial number in there is given out again.
    fn found(
        &mut self,
        declared: &FxHashSet<(Family, SetId)>,
        remembered: &FxHashMap<(Family, SetId, Key), Remembered>,
    ) -> Result<Observed, Fault> {
        let mut found = Observed::default();
        for (family, set) in every_set().filter(|of| declared.contains(of) && of.1.has_endpoints()) {
            let elements = observe::elements(&mut self.netfilter, family, set);
            found.insert((family, set), elements.map_err(|error| Fault::Whole(error.into()))?);
        }
        note_serials(&mut self.stage, &found);
        remembered.values().for_each(|given| self.stage.serial_is_taken(given.serial));
        Ok(found)
    }

    /// Makes both tables anew, in one transaction that also deletes the old ones. Clients keep
    /// their endpoints, but for those that get one between the dump and the transaction, and those
    /// in a map that is declared in another way.
    fn rebuild(
        &mut self,
        plan: &ForwardingPlan,
        excluded: &Excluded,
        attributed: bool,
    ) -> Result<usize, Fault> {
        let mut state = State::of(&plan.node);
        self.stage.begin(attributed);
        let whole = |error: lockstep_kernel::netlink::Error| Fault::Whole(error.into());
        let declared = declared(&mut self.netfilter).map_err(whole)?;
        let mut remembered = observe::remembered(&mut self.netfilter).map_err(whole)?;
        remembered.retain(|(family, set, _), _| declared.contains(&(*family, *set)));
        // What an earlier process gave to endpoints, clients may have.
        let found = match self.state.node {
            Some(_) => None,
            None => Some(self.found(&declared, &remembered)?),
        };
        let desired = desired(&self.state, plan, excluded);
        state.services.reserve(desired.len());
        for (position, (key, service)) in desired.iter().enumerate() {
            let stage = &mut self.stage;
            let installed = match &found {
                Some(found) => {
                    let installed = adopt_service(service, found, || stage.next_serial());
                    stage_whole(stage, &installed);
                    installed
                }
                None => stage_anew(stage, self.state.services.get(key), service),
            };
            state.services.insert((*key).clone(), installed);
            self.stage.seal(position);
        }
        state.stage_hairpin(&mut self.stage);
        node::each_element(&plan.node, &mut |family, set, key, datum| {
            self.stage.add(family, set, key, datum);
        });
        for (family, set) in every_set() {
            let size = size_for(self.stage.lane(lane_index(family, set)).added);
            state.set_fill(family, set, 0, size);
        }
        let chains = state.chains_to_make(&self.stage);
        let mut objects = self.stage.changes() + chains.len();
        for ((family, set, key), given) in &remembered {
            self.stage.remember(*family, *set, key, *given);
        }
        self.batch.clear();
        self.batch.reserve(self.stage.bytes());
        for family in Family::ALL {
            self.batch.add_table(kernel_family(family), TABLE);
            self.batch.delete_table(kernel_family(family), TABLE);
            objects +=
                write_skeleton(&mut self.batch, TABLE, family, &plan.node, |set| state.size(family, set));
        }
        let attribution = self.stage.write(&mut self.batch, &plan.node, &chains);
        self.stage.written.everything = true;
        let keys = &desired;
        let attributed_to: Vec<ServiceKey> =
            if attributed { keys.iter().map(|(key, _)| (*key).clone()).collect() } else { Vec::new() };
        drop(desired);
        self.commit(&attribution, |position| attributed_to[position].clone())?;
        state.committed(&self.stage, chains);
        self.state = state;
        self.batch.clear();
        self.stage.release();
        Ok(objects)
    }
}

fn next_generation(generation: u32) -> u32 {
    // The kernel skips 0.
    generation.checked_add(1).unwrap_or(1)
}

/// What should be in force: the plan, with what Services left out keep of the version before.
fn desired<'a>(
    state: &'a State,
    plan: &'a ForwardingPlan,
    excluded: &Excluded,
) -> Vec<(&'a ServiceKey, Cow<'a, Arc<ServicePlan>>)> {
    let given = match excluded.is_empty() {
        true => Places::default(),
        false => Places::of(plan.services.values().filter(|service| !excluded.contains_key(&service.key))),
    };
    let choose = |(key, planned): (&'a ServiceKey, &'a Arc<ServicePlan>)| {
        if excluded.contains_key(key) {
            return given.leave(&state.services.get(key)?.plan).map(|kept| (key, kept));
        }
        Some((key, Cow::Borrowed(planned)))
    };
    plan.services.iter().filter_map(choose).collect()
}

fn excluded_by_plan<'a>(services: impl Iterator<Item = (&'a ServiceKey, &'a Arc<ServicePlan>)>) -> Excluded {
    let mut excluded = Excluded::new();
    for (key, service) in services {
        if let Err(fault) = check(service) {
            let kind = if fault.is_unsupported() { FailureKind::Unsupported } else { FailureKind::Kernel };
            excluded.insert(key.clone(), (kind, fault.to_string()));
        }
    }
    excluded
}

fn exclude(excluded: &mut Excluded, refused: Vec<(ServiceKey, Refusal)>) {
    for (key, refusal) in refused {
        let kind = if refusal.errno.is_resources() { FailureKind::Resources } else { FailureKind::Kernel };
        let message = match &refusal.message {
            Some(text) => format!("kernel refused elements of {key}: {} ({text})", refusal.errno),
            None => format!("kernel refused elements of {key}: {}", refusal.errno),
        };
        excluded.entry(key).or_insert((kind, message));
    }
}
