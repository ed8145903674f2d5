//! What a Service puts into the sets and maps: the one definition that writing, comparing
//! and rendering share.

use std::sync::Arc;

use lockstep_model::{Family, Feature};
use lockstep_view::{Action, Frontend, Pool, PortPlan, ServicePlan, Source, Target};

use crate::layout::via;
use crate::names::{Choice, Refusing, SharedChain};
use crate::sets::{Datum, Key, SetId};

/// What this backend can program beyond the common core, sorted.
pub(crate) const FEATURES: [Feature; 4] =
    [Feature::Sctp, Feature::SessionAffinity, Feature::LbProxyMode, Feature::SourceRanges];

/// A Service as it is in force: its plan, and which endpoint has which index.
#[derive(Debug, Clone)]
pub(crate) struct Installed {
    pub(crate) plan: Arc<ServicePlan>,
    /// Per port and pool, the endpoints by index, where that is not the plan's order.
    /// Empty = the plan's order everywhere.
    pub(crate) orders: Vec<[Option<Box<[Target]>>; 2]>,
    /// Per port and pool, the serial numbers of the plan's endpoints where the port has
    /// affinity. Empty = no port has.
    pub(crate) serials: Vec<[Box<[u32]>; 2]>,
}

/// The endpoints of a port's pool as they are in force.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Members<'a> {
    /// By index.
    pub(crate) order: &'a [Target],
    /// As in the plan, sorted.
    pub(crate) sorted: &'a [Target],
    /// Of the sorted ones; empty without affinity.
    pub(crate) serials: &'a [u32],
}

impl Members<'_> {
    /// The serial number of an endpoint; `None` where there is no such one, or no affinity.
    pub(crate) fn serial(&self, target: &Target) -> Option<u32> {
        if self.serials.is_empty() {
            return None;
        }
        self.serials.get(self.sorted.binary_search(target).ok()?).copied()
    }
}

impl Installed {
    /// In the plan's own order, with the serial number that `number` has for an endpoint of a
    /// port and pool.
    pub(crate) fn as_planned(
        plan: &Arc<ServicePlan>,
        mut number: impl FnMut(usize, Pool, &Target) -> u32,
    ) -> Self {
        let mut serials = Vec::new();
        if plan.ports.iter().any(|port| port.affinity_seconds.is_some()) {
            serials.resize_with(plan.ports.len(), <[Box<[u32]>; 2]>::default);
            for (position, port) in plan.ports.iter().enumerate() {
                if port.affinity_seconds.is_some() {
                    serials[position] = [Pool::Cluster, Pool::Local].map(|pool| {
                        port.pool(pool).iter().map(|target| number(position, pool, target)).collect()
                    });
                }
            }
        }
        Self { plan: Arc::clone(plan), orders: Vec::new(), serials }
    }

    /// The endpoints of a port's pool.
    pub(crate) fn members(&self, port: usize, pool: Pool) -> Members<'_> {
        Members {
            order: self.order(port, pool),
            sorted: self.plan.ports[port].pool(pool),
            serials: self.serials.get(port).map_or(&[], |pools| &pools[pool as usize]),
        }
    }

    /// The endpoints of a port's pool, by index.
    pub(crate) fn order(&self, port: usize, pool: Pool) -> &[Target] {
        let changed = self.orders.get(port).and_then(|pools| pools[pool as usize].as_deref());
        changed.unwrap_or_else(|| self.plan.ports[port].pool(pool))
    }

    /// Every element that the Service has.
    pub(crate) fn each_element(&self, each: &mut impl FnMut(Family, SetId, &Key, Datum)) {
        for address in &self.plan.cluster_ips {
            each(Family::of(*address), SetId::ClusterIps, &Key::address(*address), Datum::Present);
        }
        for (position, port) in self.plan.ports.iter().enumerate() {
            for frontend in &port.frontends {
                let members = |pool| self.members(position, pool);
                frontend_elements(port, frontend, &members, &mut |set, key, datum| {
                    each(port.family, set, key, datum);
                });
            }
        }
    }
}

/// The pools that a frontend forwards to.
pub(crate) fn pools_of(frontend: &Frontend) -> impl Iterator<Item = Pool> {
    let uses = |pool| {
        [Source::Pod, Source::Node, Source::Elsewhere].into_iter().any(
            |source| matches!(frontend.action(source), Action::Forward { pool: used, .. } if used == pool),
        )
    };
    let (cluster, local) = (uses(Pool::Cluster), uses(Pool::Local));
    [(cluster, Pool::Cluster), (local, Pool::Local)]
        .into_iter()
        .filter_map(|(used, pool)| used.then_some(pool))
}

/// The chain that translates for a frontend.
pub(crate) fn translating(port: &PortPlan, frontend: &Frontend) -> Option<SharedChain> {
    SharedChain::translating(via(frontend), frontend, |pool| Choice {
        pool,
        count: u32::try_from(port.pool(pool).len()).unwrap_or(u32::MAX),
        affinity: port.affinity_seconds,
    })
}

/// The elements of a frontend that do not depend on which endpoints there are, only on how
/// many.
pub(crate) fn verdict_elements(
    port: &PortPlan,
    frontend: &Frontend,
    key: &Key,
    each: &mut impl FnMut(SetId, &Key, Datum),
) {
    if let Some(chain) = translating(port, frontend) {
        each(SetId::frontends(via(frontend)), key, Datum::Goto(chain));
    }
    match SharedChain::refusing(frontend) {
        Refusing::Nothing => {}
        Refusing::Drop => each(SetId::refusals(via(frontend)), key, Datum::Drop),
        Refusing::By(chain) => each(SetId::refusals(via(frontend)), key, Datum::Goto(chain)),
    }
    if let Some(sources) = &frontend.allowed_sources {
        each(SetId::Restricted, key, Datum::Present);
        for network in sources.iter() {
            let (first, last) = Key::allowed(key, network);
            each(SetId::Allowed, &first, last);
        }
    }
}

/// All elements of a frontend.
pub(crate) fn frontend_elements<'a>(
    port: &PortPlan,
    frontend: &Frontend,
    members: &impl Fn(Pool) -> Members<'a>,
    each: &mut impl FnMut(SetId, &Key, Datum),
) {
    let key = Key::frontend(port.protocol, frontend);
    verdict_elements(port, frontend, &key, each);
    for pool in pools_of(frontend) {
        pool_elements(frontend, &key, pool, members(pool), each);
    }
}

/// The elements of a frontend for the endpoints of one pool.
pub(crate) fn pool_elements(
    frontend: &Frontend,
    key: &Key,
    pool: Pool,
    members: Members<'_>,
    each: &mut impl FnMut(SetId, &Key, Datum),
) {
    let via = via(frontend);
    for (index, target) in members.order.iter().enumerate() {
        match members.serial(target) {
            None => each(SetId::endpoints(via, pool), &Key::endpoint(key, index), Datum::Target(*target)),
            Some(serial) => {
                each(SetId::serials(via, pool), &Key::endpoint(key, index), Datum::Serial(serial));
                let key = Key::affine_endpoint(key, serial);
                each(SetId::affine_endpoints(via, pool), &key, Datum::Target(*target));
            }
        }
    }
}

/// Why a plan cannot be programmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlanFault {
    #[error("needs {0:?}, which this backend does not program")]
    Unsupported(Feature),
    #[error("source ranges on a node port are not programmed by this backend")]
    SourceRangesOnNodePort,
    #[error("port {port}: {address} is not of the port's family")]
    Family { port: u16, address: std::net::IpAddr },
    #[error("port {port}: a frontend forwards to an empty pool")]
    EmptyPool { port: u16 },
}

impl PlanFault {
    pub(crate) fn is_unsupported(&self) -> bool {
        matches!(self, PlanFault::Unsupported(_) | PlanFault::SourceRangesOnNodePort)
    }
}

/// Refuses what would be wrong in the kernel, before anything is written.
pub(crate) fn check(plan: &ServicePlan) -> Result<(), PlanFault> {
    if let Some(feature) = plan.lacking(&FEATURES) {
        return Err(PlanFault::Unsupported(feature));
    }
    for port in &plan.ports {
        check_port(port)?;
    }
    Ok(())
}

fn check_port(port: &PortPlan) -> Result<(), PlanFault> {
    let number = port.port.get();
    let targets = port.cluster.iter().chain(&port.local).chain(&port.hairpin).map(|target| target.address);
    let addresses = port.frontends.iter().filter_map(|frontend| frontend.surface.address());
    if let Some(address) = targets.chain(addresses).find(|address| Family::of(*address) != port.family) {
        return Err(PlanFault::Family { port: number, address });
    }
    for frontend in &port.frontends {
        if frontend.surface.address().is_none() && frontend.allowed_sources.is_some() {
            return Err(PlanFault::SourceRangesOnNodePort);
        }
        if pools_of(frontend).any(|pool| port.pool(pool).is_empty()) {
            return Err(PlanFault::EmptyPool { port: number });
        }
    }
    Ok(())
}
