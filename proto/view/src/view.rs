use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_model::{EndpointSet, Held, NodeContext, ServiceKey, State, Version};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::claims::{self, Claims, Index, Owners};
use crate::config::{DetectLocal, Facts, ViewConfig};
use crate::{ForwardingPlan, ServicePlan, service};

/// The plan of this node, kept up to date.
///
/// The plan depends on state, node and configuration alone, never on the order in which
/// they came.
#[derive(Debug)]
pub struct View {
    config: ViewConfig,
    node: NodeContext,
    interfaces: Vec<IpAddr>,
    /// Versions of the ServiceCidrs that `service_cidrs` are of, sorted by name.
    cidr_versions: Vec<Version>,
    service_cidrs: Vec<IpNet>,
    facts: Facts,
    plan: ForwardingPlan,
    index: Index,
    /// The facts changed since the last update: every Service is planned again.
    facts_changed: bool,
    /// The node's part of the plan changed since the last update, beyond the ServiceCIDRs.
    node_changed: bool,
    /// The ServiceCIDRs of the plan changed since the last update.
    service_cidrs_changed: bool,
}

/// What an update changed in the plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// Services whose plan is new, different or gone, sorted.
    pub services: Vec<ServiceKey>,
    /// The node's part changed beyond its ServiceCIDRs: a backend needs a sync.
    pub node: bool,
    /// The ServiceCIDRs changed: `apply` takes them in.
    pub service_cidrs: bool,
}

impl Changed {
    /// True where the plan is what it was.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.node && !self.service_cidrs
    }
}

impl View {
    /// An empty plan for a node of which only the name is known. The first update says that
    /// the node's part is new.
    pub fn new(config: ViewConfig) -> Self {
        let node = NodeContext::unknown(config.node_name.clone());
        let facts = Facts::new(&config, &node);
        let plan = ForwardingPlan { node: config.node_plan(&node, &[], &[]), services: FxHashMap::default() };
        Self {
            config,
            node,
            interfaces: Vec::new(),
            cidr_versions: Vec::new(),
            service_cidrs: Vec::new(),
            facts,
            plan,
            index: Index::default(),
            facts_changed: false,
            node_changed: true,
            service_cidrs_changed: false,
        }
    }

    /// Takes new facts about the node; the next [`update`](Self::update) uses them.
    pub fn set_node(&mut self, node: NodeContext) {
        self.node = node;
        self.refresh();
    }

    /// Takes the addresses of the node's interfaces, for node ports that are restricted to
    /// CIDRs; the next [`update`](Self::update) uses them. True where it has a use for them: most that
    /// come and go are those of pods.
    pub fn set_interface_addresses(&mut self, addresses: Vec<IpAddr>) -> bool {
        self.interfaces = addresses;
        self.refresh();
        self.node_changed
    }

    fn refresh(&mut self) {
        let facts = Facts::new(&self.config, &self.node);
        self.facts_changed |= facts != self.facts;
        self.facts = facts;
        let node = self.config.node_plan(&self.node, &self.interfaces, &self.service_cidrs);
        self.node_changed |= !node.equals_but_for_service_cidrs(&self.plan.node);
        self.service_cidrs_changed |= node.service_cidrs != self.plan.node.service_cidrs;
        self.plan.node = node;
    }

    /// The plan as of the last update.
    pub fn plan(&self) -> &ForwardingPlan {
        &self.plan
    }

    /// True where pods are told by what the Node object says of them.
    pub fn follows_pod_cidrs(&self) -> bool {
        self.config.detect_local == DetectLocal::NodeCidrs
    }

    /// The facts in use, for explanations.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Plans the Services again of which a resource changed since the last update, in any
    /// order, and whoever gains or loses an address by it. The caller names every one. What
    /// belongs to no Service needs no naming.
    pub fn update(&mut self, state: &State, changed: &[ServiceKey]) -> Changed {
        let mut services = Vec::new();
        let versions = || state.service_cidrs().map(|(version, _)| version);
        if !versions().eq(self.cidr_versions.iter().copied()) {
            self.cidr_versions = versions().collect();
            self.service_cidrs = state.service_cidrs().flat_map(|(_, it)| it.cidrs.iter().copied()).collect();
            self.refresh();
        }
        if std::mem::take(&mut self.facts_changed) {
            let gone = self.plan.services.keys().filter(|key| state.service(key).is_none());
            let gone: Vec<ServiceKey> = gone.cloned().collect();
            let keys: Vec<&ServiceKey> = state.service_keys().chain(&gone).collect();
            self.replan(state, &keys, &mut services);
        } else {
            let keys: SmallVec<[&ServiceKey; 4]> = changed.iter().collect();
            self.replan(state, &keys, &mut services);
        }
        // The usual order already.
        if !services.is_sorted_by(|a, b| a < b) {
            services.sort_unstable();
            services.dedup();
        }
        Changed {
            services,
            node: std::mem::take(&mut self.node_changed),
            service_cidrs: std::mem::take(&mut self.service_cidrs_changed),
        }
    }

    /// Claims first, then plans: a plan is made when everybody's claims are known.
    fn replan(&mut self, state: &State, keys: &[&ServiceKey], changed: &mut Vec<ServiceKey>) {
        let new = keys.len().saturating_sub(self.plan.services.len());
        if new > 64 {
            self.plan.services.reserve(new);
            self.index.reserve(new);
            changed.reserve(new);
        }
        let (mut shaken, mut open) = (Vec::new(), Vec::new());
        for key in keys {
            let held = state.held(key);
            let old = self.plan.services.get_mut(*key);
            let before = old.as_ref().map_or_else(Claims::new, |plan| claims::of_plan(plan));
            let after = held.service().map_or_else(Claims::new, |it| claims::of_service(it, &self.facts));
            if before != after {
                self.index.replace(key, &before, &after, &mut shaken);
            } else if let Some(old) = old.filter(|plan| claims::has_all(plan, &after))
                && let Some(new) = plan_held(held, &self.facts, Owners::Settled)
            {
                // It claims what it had and nobody contested: nearly every change.
                if **old != new {
                    *old = Arc::new(new);
                    changed.push((*key).clone());
                }
                continue;
            }
            open.push(*key);
        }
        shaken.sort_unstable();
        shaken.dedup();
        for key in open.into_iter().chain(&shaken) {
            if self.plan_service(state, key) {
                changed.push(key.clone());
            }
        }
    }

    /// Plans one Service. False where its plan is what it was.
    fn plan_service(&mut self, state: &State, key: &ServiceKey) -> bool {
        let plan = plan_held(state.held(key), &self.facts, Owners::Index(&self.index));
        match (plan, self.plan.services.get_mut(key)) {
            (None, None) => false,
            (None, Some(_)) => self.plan.services.remove(key).is_some(),
            (Some(new), Some(old)) if **old == new => false,
            (Some(new), Some(old)) => {
                *old = Arc::new(new);
                true
            }
            (Some(new), None) => {
                let key = new.key.clone();
                self.plan.services.insert(key, Arc::new(new)).is_none()
            }
        }
    }
}

fn plan_held(held: Held<'_>, facts: &Facts, owners: Owners<'_>) -> Option<ServicePlan> {
    let service = held.service()?;
    let sets: SmallVec<[&EndpointSet; 8]> = held.endpoint_sets().map(|set| &**set).collect();
    service::plan(service, &sets, facts, owners)
}

impl ForwardingPlan {
    /// The plan of one Service.
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<ServicePlan>> {
        self.services.get(key)
    }
}
