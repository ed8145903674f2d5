//! The difference between a Service as it is in force and as it should be.
//!
//! Endpoints keep their index where they can. The indices stay dense, because the rules
//! draw a number below the count: an endpoint that leaves is replaced by one that comes, or
//! by the last one.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;

use lockstep_model::Family;
use lockstep_view::{Frontend, Pool, PortPlan, ServicePlan, Target};
use smallvec::SmallVec;

use crate::contents::{Installed, Members, frontend_elements, pool_elements, pools_of, verdict_elements};
use crate::layout::via;
use crate::sets::{Datum, Key, SetId};
use crate::stage::Stage;

/// An index whose endpoint changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edit {
    pub(crate) index: usize,
    pub(crate) old: Option<Target>,
    pub(crate) new: Option<Target>,
}

/// Edits of one pool; nearly always one.
pub(crate) type Edits = SmallVec<[Edit; 2]>;
/// Endpoints that come or go.
type Few = SmallVec<[Target; 4]>;

/// Changes `order` (old endpoints by index) to hold `new`; both plans are sorted.
pub(crate) fn reorder(order: &mut Vec<Target>, old: &[Target], new: &[Target]) -> Edits {
    let (removed, mut added) = difference(old, new);
    let mut holes: SmallVec<[usize; 4]> =
        removed.iter().filter_map(|target| order.iter().position(|at| at == target)).collect();
    holes.sort_unstable();
    let mut edits = Edits::new();
    // Replace in place as long as both last, then fill holes from the end.
    added.reverse();
    let replaced = holes.len().min(added.len());
    for &index in &holes[..replaced] {
        let Some(target) = added.pop() else { break };
        edits.push(Edit { index, old: Some(order[index]), new: Some(target) });
        order[index] = target;
    }
    for &index in holes[replaced..].iter().rev() {
        let last = order.len() - 1;
        let leaving = order.swap_remove(index);
        match edits.iter_mut().find(|edit| edit.index == last) {
            // The last one had moved here in this very change.
            Some(edit) => edit.new = None,
            None if last != index => {
                let moved = order[index];
                edits.push(Edit { index: last, old: Some(moved), new: None });
            }
            None => {}
        }
        let new = (last != index).then(|| order[index]);
        match edits.iter_mut().find(|edit| edit.index == index) {
            Some(edit) => edit.new = new,
            None => edits.push(Edit { index, old: Some(leaving), new }),
        }
    }
    while let Some(target) = added.pop() {
        edits.push(Edit { index: order.len(), old: None, new: Some(target) });
        order.push(target);
    }
    edits.retain(|edit| edit.old != edit.new);
    edits
}

/// What only `old` has, and what only `new` has; both are sorted.
fn difference(old: &[Target], new: &[Target]) -> (Few, Few) {
    let (mut removed, mut added) = (Few::new(), Few::new());
    merge(old, new, Ord::cmp, |old, new| match (old, new) {
        (Some(old), None) => removed.push(*old),
        (None, Some(new)) => added.push(*new),
        _ => {}
    });
    (removed, added)
}

/// Walks two sorted lists side by side.
fn merge<'a, T>(
    old: &'a [T],
    new: &'a [T],
    compare: impl Fn(&T, &T) -> Ordering,
    mut each: impl FnMut(Option<&'a T>, Option<&'a T>),
) {
    let (mut i, mut j) = (0, 0);
    while i < old.len() || j < new.len() {
        let order = match (old.get(i), new.get(j)) {
            (Some(a), Some(b)) => compare(a, b),
            (Some(_), None) => Ordering::Less,
            _ => Ordering::Greater,
        };
        let (a, b) = (order.is_le().then(|| &old[i]), order.is_ge().then(|| &new[j]));
        i += usize::from(a.is_some());
        j += usize::from(b.is_some());
        each(a, b);
    }
}

/// Stages what takes a Service from `old` to `new`, and returns how it will be in force.
pub(crate) fn stage_change(
    stage: &mut Stage,
    old: Option<&Installed>,
    new: Option<&Arc<ServicePlan>>,
) -> Option<Installed> {
    match (old, new) {
        (None, None) => None,
        (Some(old), None) => {
            old.each_element(&mut |family, set, key, datum| stage.delete(family, set, key, datum));
            old.plan.ports.iter().for_each(|port| stage.count_hairpin(port, -1));
            None
        }
        (None, Some(new)) => Some(stage_anew(stage, None, new)),
        (Some(old), Some(new)) if Arc::ptr_eq(&old.plan, new) => Some(old.clone()),
        (Some(old), Some(new)) => Some(stage_both(stage, old, new)),
    }
}

/// Stages all of a Service, with the serial numbers that its endpoints had.
pub(crate) fn stage_anew(stage: &mut Stage, old: Option<&Installed>, new: &Arc<ServicePlan>) -> Installed {
    let installed = match old {
        None => Installed::as_planned(new, |_, _, _| stage.next_serial()),
        Some(old) => numbered(stage, old, new, &pairs(old, new)),
    };
    stage_whole(stage, &installed);
    installed
}

/// Stages every element of a Service, of which nothing is there.
pub(crate) fn stage_whole(stage: &mut Stage, installed: &Installed) {
    installed.each_element(&mut |family, set, key, datum| stage.add(family, set, key, datum));
    installed.plan.ports.iter().for_each(|port| stage.count_hairpin(port, 1));
}

/// Positions of the same port before and after.
type Pairs = SmallVec<[(Option<usize>, Option<usize>); 4]>;

fn pairs(old: &Installed, new: &ServicePlan) -> Pairs {
    let same_port = |(a, b): (&PortPlan, &PortPlan)| {
        (a.family, a.protocol, a.port) == (b.family, b.protocol, b.port) && a.name == b.name
    };
    let identity = |a: &(usize, &PortPlan), b: &(usize, &PortPlan)| {
        (a.1.family, a.1.protocol, a.1.port, &a.1.name).cmp(&(b.1.family, b.1.protocol, b.1.port, &b.1.name))
    };
    let mut pairs = Pairs::new();
    // Nearly always the ports are the same and only endpoints differ.
    if old.plan.ports.len() == new.ports.len() && old.plan.ports.iter().zip(&new.ports).all(same_port) {
        pairs.extend((0..new.ports.len()).map(|position| (Some(position), Some(position))));
    } else {
        let old_ports: Vec<_> = old.plan.ports.iter().enumerate().collect();
        let new_ports: Vec<_> = new.ports.iter().enumerate().collect();
        let position = |port: Option<&(usize, &PortPlan)>| port.map(|(position, _)| *position);
        merge(&old_ports, &new_ports, identity, |before, after| {
            pairs.push((position(before), position(after)));
        });
    }
    pairs
}

/// An endpoint that stays at a port keeps its serial number there; one that comes back has
/// been away, and gets another.
fn numbered(stage: &mut Stage, old: &Installed, new: &Arc<ServicePlan>, pairs: &Pairs) -> Installed {
    Installed::as_planned(new, |port, pool, target| {
        let before = pairs.iter().find(|(_, after)| *after == Some(port)).and_then(|(before, _)| *before);
        let serial = before.and_then(|before| old.members(before, pool).serial(target));
        serial.unwrap_or_else(|| stage.next_serial())
    })
}

fn stage_both(stage: &mut Stage, old: &Installed, new: &Arc<ServicePlan>) -> Installed {
    let pairs = pairs(old, new);
    let mut installed = numbered(stage, old, new, &pairs);
    merge(&old.plan.cluster_ips, &new.cluster_ips, Ord::cmp, |before, after| match (before, after) {
        (Some(gone), None) => {
            stage.delete(Family::of(*gone), SetId::ClusterIps, &Key::address(*gone), Datum::Present);
        }
        (None, Some(come)) => {
            stage.add(Family::of(*come), SetId::ClusterIps, &Key::address(*come), Datum::Present);
        }
        _ => {}
    });
    for pair in pairs {
        match pair {
            (Some(before), None) => {
                let port = &old.plan.ports[before];
                each_port_element(port, &|pool| old.members(before, pool), &mut |set, key, datum| {
                    stage.delete(port.family, set, key, datum);
                });
                stage.count_hairpin(port, -1);
            }
            (None, Some(after)) => {
                let port = &new.ports[after];
                let members = |pool| installed.members(after, pool);
                each_port_element(port, &members, &mut |set, key, datum| {
                    stage.add(port.family, set, key, datum);
                });
                stage.count_hairpin(port, 1);
            }
            (Some(before), Some(after)) => stage_port(stage, old, before, &mut installed, after),
            (None, None) => {}
        }
    }
    installed
}

fn each_port_element<'a>(
    port: &PortPlan,
    members: &impl Fn(Pool) -> Members<'a>,
    each: &mut impl FnMut(SetId, &Key, Datum),
) {
    for frontend in &port.frontends {
        frontend_elements(port, frontend, members, each);
    }
}

/// Stages the changes of a port that stays, and notes the orders that are not the plan's.
fn stage_port(stage: &mut Stage, old: &Installed, before: usize, installed: &mut Installed, after: usize) {
    let plan = Arc::clone(&installed.plan);
    let (was, will) = (&old.plan.ports[before], &plan.ports[after]);
    if was.hairpin != will.hairpin {
        stage.count_hairpin(was, -1);
        stage.count_hairpin(will, 1);
    }
    let mut edits = [Edits::new(), Edits::new()];
    let orders = [Pool::Cluster, Pool::Local].map(|pool| {
        if was.pool(pool) == will.pool(pool) {
            return Cow::Borrowed(old.order(before, pool));
        }
        let mut order = old.order(before, pool).to_vec();
        edits[pool as usize] = reorder(&mut order, was.pool(pool), will.pool(pool));
        Cow::Owned(order)
    });
    for (pool, order) in [Pool::Cluster, Pool::Local].into_iter().zip(orders) {
        if *order != *will.pool(pool) {
            installed.orders.resize_with(plan.ports.len(), || [None, None]);
            installed.orders[after][pool as usize] = Some(order.into_owned().into_boxed_slice());
        }
    }
    let installed = &*installed;
    let surface = |a: &Frontend, b: &Frontend| (a.surface, a.port).cmp(&(b.surface, b.port));
    merge(&was.frontends, &will.frontends, surface, |a, b| {
        if let (Some(a), Some(b)) = (a, b)
            && was.affinity_seconds.is_some() == will.affinity_seconds.is_some()
        {
            stage_verdicts(stage, (was, a), (will, b));
            for pool in [Pool::Cluster, Pool::Local] {
                let used = (pools_of(a).any(|used| used == pool), pools_of(b).any(|used| used == pool));
                let members = (old.members(before, pool), installed.members(after, pool));
                stage_pool(stage, will, b, pool, used, members, &edits[pool as usize]);
            }
            return;
        }
        // It comes, it goes, or its endpoints are in other maps from now on.
        if let Some(a) = a {
            frontend_elements(was, a, &|pool| old.members(before, pool), &mut |set, key, datum| {
                stage.delete(was.family, set, key, datum);
            });
        }
        if let Some(b) = b {
            frontend_elements(will, b, &|pool| installed.members(after, pool), &mut |set, key, datum| {
                stage.add(will.family, set, key, datum);
            });
        }
    });
}

/// The elements of one frontend and pool: written out, taken away, or only what changed.
fn stage_pool(
    stage: &mut Stage,
    port: &PortPlan,
    frontend: &Frontend,
    pool: Pool,
    used: (bool, bool),
    (was, will): (Members<'_>, Members<'_>),
    edits: &[Edit],
) {
    let key = Key::frontend(port.protocol, frontend);
    let family = port.family;
    match used {
        (false, false) => {}
        (true, true) => {
            let affine = port.affinity_seconds.is_some();
            for edit in edits {
                stage_edit(stage, port, frontend, &key, pool, (was, will), edit);
            }
            if affine && !edits.is_empty() {
                stage_affine_endpoints(
                    stage,
                    family,
                    SetId::affine_endpoints(via(frontend), pool),
                    &key,
                    (was, will),
                );
            }
        }
        (true, false) => pool_elements(frontend, &key, pool, was, &mut |set, key, datum| {
            stage.delete(family, set, key, datum);
        }),
        (false, true) => pool_elements(frontend, &key, pool, will, &mut |set, key, datum| {
            stage.add(family, set, key, datum);
        }),
    }
}

/// An index leads to another endpoint.
fn stage_edit(
    stage: &mut Stage,
    port: &PortPlan,
    frontend: &Frontend,
    key: &Key,
    pool: Pool,
    (was, will): (Members<'_>, Members<'_>),
    edit: &Edit,
) {
    let key = Key::endpoint(key, edit.index);
    let element = |members: Members<'_>, target: Target| match members.serial(&target) {
        Some(serial) => (SetId::serials(via(frontend), pool), Datum::Serial(serial)),
        None => (SetId::endpoints(via(frontend), pool), Datum::Target(target)),
    };
    if let Some(target) = edit.old {
        let (set, datum) = element(was, target);
        stage.delete(port.family, set, &key, datum);
    }
    if let Some(target) = edit.new {
        let (set, datum) = element(will, target);
        stage.add(port.family, set, &key, datum);
    }
}

/// The serial numbers that come and go; one whose endpoint only has another index stays.
fn stage_affine_endpoints(
    stage: &mut Stage,
    family: Family,
    set: SetId,
    key: &Key,
    (was, will): (Members<'_>, Members<'_>),
) {
    let (removed, added) = difference(was.sorted, will.sorted);
    for target in removed {
        if let Some(serial) = was.serial(&target) {
            stage.delete(family, set, &Key::affine_endpoint(key, serial), Datum::Target(target));
        }
    }
    for target in added {
        if let Some(serial) = will.serial(&target) {
            stage.add(family, set, &Key::affine_endpoint(key, serial), Datum::Target(target));
        }
    }
}

/// Everything of a frontend but its endpoints.
fn stage_verdicts(stage: &mut Stage, (before, a): (&PortPlan, &Frontend), (new, b): (&PortPlan, &Frontend)) {
    let counts_equal =
        [Pool::Cluster, Pool::Local].into_iter().all(|pool| before.pool(pool).len() == new.pool(pool).len());
    if a == b && counts_equal && before.affinity_seconds == new.affinity_seconds {
        return;
    }
    let collect = |port: &PortPlan, frontend: &Frontend| {
        let mut elements = Vec::new();
        let key = Key::frontend(port.protocol, frontend);
        verdict_elements(port, frontend, &key, &mut |set, key, datum| elements.push((set, *key, datum)));
        elements
    };
    let (before, after) = (collect(before, a), collect(new, b));
    for (set, key, datum) in before.iter().filter(|element| !after.contains(element)) {
        stage.delete(new.family, *set, key, *datum);
    }
    for (set, key, datum) in after.iter().filter(|element| !before.contains(element)) {
        stage.add(new.family, *set, key, *datum);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(n: u8) -> Target {
        Target { address: [10, 0, 0, n].into(), port: lockstep_model::Port::new(80).unwrap() }
    }

    proptest! {
        #[test]
        fn reordering_keeps_indices_dense_and_edits_tell_the_whole_difference(
            histories in proptest::collection::vec(proptest::collection::btree_set(0_u8..12, 0..10), 2..8)
        ) {
            let sets: Vec<Vec<Target>> =
                histories.iter().map(|set| set.iter().map(|n| target(*n)).collect()).collect();
            let mut order = sets[0].clone();
            for pair in sets.windows(2) {
                let before = order.clone();
                let edits = reorder(&mut order, &pair[0], &pair[1]);
                let mut sorted = order.clone();
                sorted.sort_unstable();
                prop_assert_eq!(&sorted, &pair[1]);
                // Applying the edits to what was there gives what is there.
                let mut replayed: Vec<Option<Target>> = before.iter().copied().map(Some).collect();
                replayed.resize(before.len().max(order.len()), None);
                for edit in &edits {
                    prop_assert_eq!(replayed[edit.index], edit.old);
                    replayed[edit.index] = edit.new;
                }
                replayed.truncate(order.len());
                prop_assert_eq!(replayed, order.iter().copied().map(Some).collect::<Vec<_>>());
                // No more is written than has to be.
                let gone = pair[0].iter().filter(|t| !pair[1].contains(t)).count();
                let came = pair[1].iter().filter(|t| !pair[0].contains(t)).count();
                prop_assert!(edits.len() <= 2 * gone.max(came));
            }
        }
    }
}
