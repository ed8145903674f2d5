//! Taking over what the kernel holds: indices and serial numbers, as far as they fit.

use std::sync::Arc;

use lockstep_model::Family;
use lockstep_view::{Frontend, Pool, PortPlan, ServicePlan, Target};
use rustc_hash::FxHashMap;

use crate::change::reorder;
use crate::contents::{Installed, pools_of};
use crate::elements::Elements;
use crate::layout::via;
use crate::sets::{Datum, Key, SetId};
use crate::stage::Stage;

/// What the kernel holds.
pub(crate) type Observed = FxHashMap<(Family, SetId), Elements>;

/// Stages what makes the kernel's element equal to ours.
pub(crate) fn compare(
    stage: &mut Stage,
    observed: &mut Observed,
    family: Family,
    set: SetId,
    key: &Key,
    datum: Datum,
) {
    match observed.get_mut(&(family, set)).and_then(|elements| elements.remove(key)) {
        Some(found) if found == datum => {}
        Some(found) => {
            stage.delete(family, set, key, found);
            stage.add(family, set, key, datum);
        }
        None => stage.add(family, set, key, datum),
    }
}

/// Notes the serial numbers that are in use, so that none is given out twice.
pub(crate) fn note_serials(stage: &mut Stage, observed: &Observed) {
    for ((_, set), elements) in observed {
        if set.is_affine() {
            elements.iter().for_each(|(key, _)| stage.serial_is_taken(key.last_number()));
        }
    }
}

/// A Service with the indices and serial numbers that the kernel has for its endpoints, as far
/// as they fit. `next` gives the others a serial number.
pub(crate) fn adopt_service(
    plan: &Arc<ServicePlan>,
    observed: &Observed,
    mut next: impl FnMut() -> u32,
) -> Installed {
    let mut orders = Vec::new();
    let mut serials: FxHashMap<(usize, Pool, Target), u32> = FxHashMap::default();
    for (position, port) in plan.ports.iter().enumerate() {
        for pool in [Pool::Cluster, Pool::Local] {
            let Some(frontend) = port.frontends.iter().find(|one| pools_of(one).any(|used| used == pool))
            else {
                continue;
            };
            let held = held(port, frontend, pool, observed);
            let mut order: Vec<Target> = held.iter().map(|(target, _)| *target).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                continue;
            }
            for (target, serial) in held {
                if let Some(serial) = serial {
                    serials.insert((position, pool, target), serial);
                }
            }
            reorder(&mut order, &sorted, port.pool(pool));
            if order != port.pool(pool) {
                orders.resize_with(plan.ports.len(), || [None, None]);
                orders[position][pool as usize] = Some(order.into_boxed_slice());
            }
        }
    }
    let number =
        |port, pool, target: &Target| serials.get(&(port, pool, *target)).copied().unwrap_or_else(&mut next);
    Installed { orders, ..Installed::as_planned(plan, number) }
}

/// The endpoints that a frontend has in the kernel, by index, with their serial numbers.
fn held(port: &PortPlan, frontend: &Frontend, pool: Pool, observed: &Observed) -> Vec<(Target, Option<u32>)> {
    let key = Key::frontend(port.protocol, frontend);
    let via = via(frontend);
    let find = |set, key: &Key| observed.get(&(port.family, set))?.get(key);
    let target = |datum| match datum {
        Some(Datum::Target(target)) => Some(target),
        _ => None,
    };
    if port.affinity_seconds.is_none() {
        let at = |index| target(find(SetId::endpoints(via, pool), &Key::endpoint(&key, index)));
        return (0..).map_while(at).map(|target| (target, None)).collect();
    }
    let at = |index| match find(SetId::serials(via, pool), &Key::endpoint(&key, index))? {
        Datum::Serial(serial) => {
            let by_serial = Key::affine_endpoint(&key, serial);
            Some((target(find(SetId::affine_endpoints(via, pool), &by_serial))?, Some(serial)))
        }
        _ => None,
    };
    (0..).map_while(at).collect()
}
