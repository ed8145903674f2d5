//! Endpoint selection: which endpoints of a Service port this node sends to.

use std::sync::Arc;

use lockstep_model::{Endpoint, EndpointSet, Family, ServicePort};
use smallvec::SmallVec;

use crate::Target;
use crate::config::Facts;

/// Which topology filter holds for a Service port on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// All ready endpoints.
    Everywhere,
    /// Ready endpoints with a hint for this node.
    ThisNode,
    /// Ready endpoints with a hint for this node's zone.
    ThisZone,
}

/// An endpoint of a Service port, after merging.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate<'a> {
    pub(crate) target: Target,
    pub(crate) endpoint: &'a Endpoint,
}

/// All endpoints of one Service port in one family, merged over the slices: one per address
/// and port, sorted by them.
#[derive(Debug)]
pub struct Candidates<'a> {
    list: SmallVec<[Candidate<'a>; 16]>,
    ready: usize,
    draining: usize,
    topology: Topology,
}

impl<'a> Candidates<'a> {
    /// Merges the endpoints of the slices that have a port with the Service port's name and
    /// protocol. `sets` in order of slice name. An address and port that several slices have
    /// is taken from the last one in which it is not terminating, else from the first.
    pub fn of(port: &ServicePort, family: Family, sets: &[&'a EndpointSet], facts: &Facts) -> Self {
        let mut list = SmallVec::new();
        let mut sources = 0;
        for set in sets.iter().filter(|set| set.family == family) {
            let Some(target) = target_port(port, set) else { continue };
            sources += 1;
            list.extend(set.endpoints.iter().map(|endpoint| Candidate {
                target: Target { address: endpoint.address, port: target },
                endpoint,
            }));
        }
        if sources > 1 {
            merge(&mut list);
        }
        let mut this = Self { list, ready: 0, draining: 0, topology: Topology::Everywhere };
        this.summarise(facts);
        this
    }

    /// Counts, and decides the topology: over the ready endpoints alone, node hints first.
    /// One ready endpoint without hints of a kind switches that kind off.
    fn summarise(&mut self, facts: &Facts) {
        let (mut all_nodes, mut this_node) = (true, false);
        let (mut all_zones, mut this_zone) = (facts.zone.is_some(), false);
        for candidate in &self.list {
            let conditions = candidate.endpoint.conditions;
            if !conditions.ready {
                self.draining += usize::from(conditions.serving && conditions.terminating);
                continue;
            }
            self.ready += 1;
            let Some(hints) = candidate.endpoint.hints.as_deref() else {
                (all_nodes, all_zones) = (false, false);
                continue;
            };
            all_nodes &= !hints.nodes.is_empty();
            all_zones &= !hints.zones.is_empty();
            this_node |= hints.nodes.contains(&facts.node);
            this_zone |= facts.zone.as_ref().is_some_and(|zone| hints.zones.contains(zone));
        }
        self.topology = match (all_nodes && this_node, all_zones && this_zone) {
            (true, _) => Topology::ThisNode,
            (false, true) => Topology::ThisZone,
            (false, false) => Topology::Everywhere,
        };
    }

    /// The filter in force over the ready endpoints of the cluster pool.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// True where an endpoint is usable on any node.
    pub fn any_usable(&self) -> bool {
        self.ready + self.draining > 0
    }

    /// True where this very endpoint stands for the target after merging.
    pub(crate) fn counts(&self, target: Target, endpoint: &Endpoint) -> bool {
        self.list.iter().any(|it| it.target == target && std::ptr::eq(it.endpoint, endpoint))
    }

    /// The endpoints in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Candidate<'a>> {
        self.list.iter()
    }

    /// The cluster pool: ready endpoints that the topology leaves, else all that are
    /// shutting down and still serve.
    pub fn cluster(&self, facts: &Facts) -> Vec<Target> {
        let mut pool = Vec::with_capacity(match (self.ready, self.topology) {
            (0, _) => self.draining,
            (ready, Topology::Everywhere) => ready,
            _ => 0,
        });
        pool.extend(self.list.iter().filter(|it| self.in_cluster(it.endpoint, facts)).map(|it| it.target));
        pool
    }

    pub(crate) fn in_cluster(&self, endpoint: &Endpoint, facts: &Facts) -> bool {
        if self.ready == 0 {
            drains(endpoint)
        } else {
            endpoint.conditions.ready && self.hinted(endpoint, facts)
        }
    }

    /// True where the topology in force leaves the endpoint in.
    pub(crate) fn hinted(&self, endpoint: &Endpoint, facts: &Facts) -> bool {
        let hints = endpoint.hints.as_deref();
        match self.topology {
            Topology::Everywhere => true,
            Topology::ThisNode => hints.is_some_and(|hints| hints.nodes.contains(&facts.node)),
            Topology::ThisZone => {
                hints.zip(facts.zone.as_ref()).is_some_and(|(hints, zone)| hints.zones.contains(zone))
            }
        }
    }

    /// The local pool: ready endpoints on this node, else those on this node that are
    /// shutting down and still serve. Topology has no say.
    pub fn local(&self, facts: &Facts) -> Vec<Target> {
        let here = || self.list.iter().filter(|it| is_local(it.endpoint, facts));
        let ready: Vec<_> = here().filter(|it| it.endpoint.conditions.ready).map(|it| it.target).collect();
        if ready.is_empty() {
            here().filter(|it| drains(it.endpoint)).map(|it| it.target).collect()
        } else {
            ready
        }
    }

    /// All that serve, ready or shutting down, on any node: where a flow that is established
    /// may stay. Policies and topology are about new ones.
    pub fn serving(&self) -> Vec<Target> {
        let serves = |it: &&Candidate<'_>| it.endpoint.conditions.ready || it.endpoint.conditions.serving;
        self.list.iter().filter(serves).map(|it| it.target).collect()
    }

    /// Those of the pools in use that can be sent to themselves by this node: those that run on
    /// it, and where `keeps_pods`, that is where pods of other nodes ask here and keep their
    /// source, those that run elsewhere, too.
    pub fn hairpin(&self, facts: &Facts, cluster: bool, keeps_pods: bool, local: &[Target]) -> Vec<Target> {
        let met = |it: &&Candidate<'_>| {
            let in_cluster = cluster && self.in_cluster(it.endpoint, facts);
            is_local(it.endpoint, facts) && (in_cluster || local.binary_search(&it.target).is_ok())
                || keeps_pods && in_cluster
        };
        self.list.iter().filter(met).map(|it| it.target).collect()
    }
}

/// Port at the endpoints of a set for a Service port: matched by name and protocol, never by
/// number.
pub(crate) fn target_port(port: &ServicePort, set: &EndpointSet) -> Option<lockstep_model::Port> {
    let same = |name: &Arc<str>| Arc::ptr_eq(name, &port.name) || **name == *port.name;
    set.ports.iter().find(|it| it.protocol == port.protocol && same(&it.name)).map(|it| it.port)
}

/// True where the endpoint runs on this node. One with no node name is local nowhere.
pub(crate) fn is_local(endpoint: &Endpoint, facts: &Facts) -> bool {
    endpoint.node_name.as_deref() == Some(&*facts.node)
}

/// Shutting down, and still answering: used where nothing is ready.
pub(crate) fn drains(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions;
    !conditions.ready && conditions.serving && conditions.terminating
}

/// Sorts by address and port and keeps one of each. The sort is stable, so the slices'
/// order is still there to decide by.
fn merge(list: &mut SmallVec<[Candidate<'_>; 16]>) {
    list.sort_by_key(|candidate| candidate.target);
    list.dedup_by(|later, kept| {
        let same = later.target == kept.target;
        if same && !later.endpoint.conditions.terminating {
            kept.endpoint = later.endpoint;
        }
        same
    });
}
