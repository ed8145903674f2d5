//! The difference between a Service as it is in force and as it should be.
//!
//! Endpoints keep their index where they can. The indices stay dense, because the rules
//! draw a number below the count: an endpoint that leaves is replaced by one that comes, or
//! by the last one.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;

use lockstep_view::{Frontend, Pool, PortPlan, ServicePlan, Target};
use smallvec::SmallVec;

use crate::contents::{Installed, frontend_elements, pools_of, verdict_elements};
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
        (None, Some(new)) => {
            let installed = Installed::as_planned(new);
            installed.each_element(&mut |family, set, key, datum| stage.add(family, set, key, datum));
            new.ports.iter().for_each(|port| stage.count_hairpin(port, 1));
            Some(installed)
        }
        (Some(old), Some(new)) if Arc::ptr_eq(&old.plan, new) => Some(old.clone()),
        (Some(old), Some(new)) => Some(stage_both(stage, old, new)),
    }
}

fn stage_both(stage: &mut Stage, old: &Installed, new: &Arc<ServicePlan>) -> Installed {
    let mut installed = Installed::as_planned(new);
    let same_port = |(a, b): (&PortPlan, &PortPlan)| {
        (a.family, a.protocol, a.port) == (b.family, b.protocol, b.port) && a.name == b.name
    };
    // Nearly always the ports are the same and only endpoints differ.
    if old.plan.ports.len() == new.ports.len() && old.plan.ports.iter().zip(&new.ports).all(same_port) {
        for position in 0..new.ports.len() {
            let orders = stage_port(stage, old, position, &new.ports[position]);
            keep_orders(&mut installed, position, orders);
        }
        return installed;
    }
    let identity = |a: &(usize, &PortPlan), b: &(usize, &PortPlan)| {
        (a.1.family, a.1.protocol, a.1.port, &a.1.name).cmp(&(b.1.family, b.1.protocol, b.1.port, &b.1.name))
    };
    let old_ports: Vec<_> = old.plan.ports.iter().enumerate().collect();
    let new_ports: Vec<_> = new.ports.iter().enumerate().collect();
    merge(&old_ports, &new_ports, identity, |before, after| match (before, after) {
        (Some((position, port)), None) => {
            for frontend in &port.frontends {
                remove_frontend(stage, port, frontend, &|pool| old.order(*position, pool));
            }
            stage.count_hairpin(port, -1);
        }
        (None, Some((_, port))) => {
            for frontend in &port.frontends {
                add_frontend(stage, port, frontend, &|pool| port.pool(pool));
            }
            stage.count_hairpin(port, 1);
        }
        (Some((before, _)), Some((after, _))) => {
            let orders = stage_port(stage, old, *before, &new.ports[*after]);
            keep_orders(&mut installed, *after, orders);
        }
        (None, None) => {}
    });
    installed
}

fn keep_orders(installed: &mut Installed, port: usize, orders: [Option<Box<[Target]>>; 2]) {
    if orders.iter().any(Option::is_some) {
        installed.orders.resize_with(installed.plan.ports.len(), || [None, None]);
        installed.orders[port] = orders;
    }
}

/// Stages the changes of a port that stays; returns the orders that are not the plan's.
fn stage_port(
    stage: &mut Stage,
    old: &Installed,
    position: usize,
    new: &PortPlan,
) -> [Option<Box<[Target]>>; 2] {
    let before = &old.plan.ports[position];
    if before.hairpin != new.hairpin {
        stage.count_hairpin(before, -1);
        stage.count_hairpin(new, 1);
    }
    let mut edits = [Edits::new(), Edits::new()];
    let orders = [Pool::Cluster, Pool::Local].map(|pool| {
        let was = old.order(position, pool);
        if before.pool(pool) == new.pool(pool) {
            return Cow::Borrowed(was);
        }
        let mut order = was.to_vec();
        edits[pool as usize] = reorder(&mut order, before.pool(pool), new.pool(pool));
        Cow::Owned(order)
    });
    let surface = |a: &Frontend, b: &Frontend| (a.surface, a.port).cmp(&(b.surface, b.port));
    merge(&before.frontends, &new.frontends, surface, |a, b| match (a, b) {
        (Some(a), None) => remove_frontend(stage, before, a, &|pool| old.order(position, pool)),
        (None, Some(b)) => add_frontend(stage, new, b, &|pool| &orders[pool as usize]),
        (Some(a), Some(b)) => {
            stage_verdicts(stage, (before, a), (new, b));
            for pool in [Pool::Cluster, Pool::Local] {
                let used = (pools_of(a).any(|used| used == pool), pools_of(b).any(|used| used == pool));
                let (was, will) = (old.order(position, pool), &*orders[pool as usize]);
                stage_pool(stage, new, b, pool, used, (was, will, &edits[pool as usize]));
            }
        }
        (None, None) => {}
    });
    let mut orders = orders.into_iter();
    [Pool::Cluster, Pool::Local].map(|pool| {
        let order = orders.next().filter(|order| **order != *new.pool(pool));
        order.map(|order| order.into_owned().into_boxed_slice())
    })
}

/// The elements of one frontend and pool: written out, taken away, or only what changed.
fn stage_pool(
    stage: &mut Stage,
    port: &PortPlan,
    frontend: &Frontend,
    pool: Pool,
    used: (bool, bool),
    (was, will, edits): (&[Target], &[Target], &[Edit]),
) {
    let key = Key::frontend(port.protocol, frontend);
    let (family, set) = (port.family, SetId::endpoints(via(frontend), pool));
    match used {
        (false, false) => {}
        (true, true) => {
            for edit in edits {
                let key = Key::endpoint(&key, edit.index);
                if let Some(old) = edit.old {
                    stage.delete(family, set, &key, Datum::Target(old));
                }
                if let Some(new) = edit.new {
                    stage.add(family, set, &key, Datum::Target(new));
                }
            }
        }
        (true, false) => {
            for (index, target) in was.iter().enumerate() {
                stage.delete(family, set, &Key::endpoint(&key, index), Datum::Target(*target));
            }
        }
        (false, true) => {
            for (index, target) in will.iter().enumerate() {
                stage.add(family, set, &Key::endpoint(&key, index), Datum::Target(*target));
            }
        }
    }
}

/// Everything of a frontend but its endpoints.
fn stage_verdicts(stage: &mut Stage, (before, a): (&PortPlan, &Frontend), (new, b): (&PortPlan, &Frontend)) {
    let counts_equal =
        [Pool::Cluster, Pool::Local].into_iter().all(|pool| before.pool(pool).len() == new.pool(pool).len());
    if a == b && counts_equal {
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

fn add_frontend<'a>(
    stage: &mut Stage,
    port: &PortPlan,
    frontend: &Frontend,
    order: &impl Fn(Pool) -> &'a [Target],
) {
    frontend_elements(port, frontend, order, &mut |set, key, datum| {
        stage.add(port.family, set, key, datum);
    });
}

fn remove_frontend<'a>(
    stage: &mut Stage,
    port: &PortPlan,
    frontend: &Frontend,
    order: &impl Fn(Pool) -> &'a [Target],
) {
    frontend_elements(port, frontend, order, &mut |set, key, datum| {
        stage.delete(port.family, set, key, datum);
    });
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
