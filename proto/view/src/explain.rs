//! Why an endpoint gets traffic or not, for people. Uses the planner's own functions, and
//! nothing here runs while planning.

use std::fmt;
use std::sync::Arc;

use lockstep_model::{Endpoint, EndpointSet, Family, Service, ServicePort};

use crate::Target;
use crate::claims;
use crate::config::Facts;
use crate::select::{self, Candidates, Topology};

/// Every endpoint of one Service port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortExplanation {
    /// Family that was looked at.
    pub family: Family,
    /// The Service port.
    pub port: ServicePort,
    /// The topology filter in force on this node.
    pub topology: Topology,
    /// One entry per endpoint of every slice, in order of slice name and address.
    pub endpoints: Vec<EndpointExplanation>,
}

/// What one endpoint of one slice counts for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointExplanation {
    /// Name of the slice.
    pub slice: Arc<str>,
    /// Address, and port where the slice has one for the Service port.
    pub address: std::net::IpAddr,
    /// Where it would get connections; `None` where the slice has no such port.
    pub target: Option<Target>,
    /// Why it is not in the cluster pool; `None` = it is.
    pub not_cluster: Option<Exclusion>,
    /// Why it is not in the local pool; `None` = it is.
    pub not_local: Option<Exclusion>,
}

/// Why an endpoint is not in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exclusion {
    /// Its addresses are of the other family.
    Family,
    /// Its slice has no port with the Service port's name and protocol.
    PortMissing,
    /// Another slice's entry for the address and port counts.
    Duplicate,
    /// Not ready, and not shutting down either.
    NotReady,
    /// Shutting down, while others are ready or because it no longer serves.
    Terminating,
    /// It runs on another node, or it is not known where.
    NotLocal,
    /// Its hints name other nodes.
    OtherNode,
    /// Its hints name other zones.
    OtherZone,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Exclusion::Family => "address of the other family",
            Exclusion::PortMissing => "its slice has no port of that name and protocol",
            Exclusion::Duplicate => "another slice has the same address and port",
            Exclusion::NotReady => "not ready",
            Exclusion::Terminating => "terminating",
            Exclusion::NotLocal => "not on this node",
            Exclusion::OtherNode => "meant for other nodes",
            Exclusion::OtherZone => "meant for other zones",
        })
    }
}

/// Explains every port of a Service in every family it is planned in. `sets` in order of
/// slice name.
pub fn explain(service: &Service, sets: &[&EndpointSet], facts: &Facts) -> Vec<PortExplanation> {
    let families = claims::families(service, facts);
    families
        .flat_map(|family| service.ports.iter().map(move |port| (family, port)))
        .map(|(family, port)| explain_port(port, family, sets, facts))
        .collect()
}

fn explain_port(port: &ServicePort, family: Family, sets: &[&EndpointSet], facts: &Facts) -> PortExplanation {
    let candidates = Candidates::of(port, family, sets, facts);
    let local = candidates.local(facts);
    let mut endpoints = Vec::new();
    for set in sets {
        let number = select::target_port(port, set);
        for endpoint in &set.endpoints {
            let target = number.map(|port| Target { address: endpoint.address, port });
            let counts = target.is_some_and(|target| candidates.counts(target, endpoint));
            let outside = match target {
                _ if set.family != family => Some(Exclusion::Family),
                None => Some(Exclusion::PortMissing),
                Some(_) if !counts => Some(Exclusion::Duplicate),
                Some(_) => None,
            };
            let in_local = target.is_some_and(|target| local.binary_search(&target).is_ok());
            endpoints.push(EndpointExplanation {
                slice: set.key.slice.clone(),
                address: endpoint.address,
                target,
                not_cluster: outside.or_else(|| not_cluster(endpoint, &candidates, facts)),
                not_local: outside.or_else(|| if in_local { None } else { Some(not_local(endpoint, facts)) }),
            });
        }
    }
    PortExplanation { family, port: port.clone(), topology: candidates.topology(), endpoints }
}

fn not_cluster(endpoint: &Endpoint, candidates: &Candidates<'_>, facts: &Facts) -> Option<Exclusion> {
    if candidates.in_cluster(endpoint, facts) {
        return None;
    }
    Some(match unready(endpoint) {
        Some(reason) => reason,
        None if candidates.topology() == Topology::ThisNode => Exclusion::OtherNode,
        None => Exclusion::OtherZone,
    })
}

fn not_local(endpoint: &Endpoint, facts: &Facts) -> Exclusion {
    if select::is_local(endpoint, facts) {
        unready(endpoint).unwrap_or(Exclusion::NotReady)
    } else {
        Exclusion::NotLocal
    }
}

fn unready(endpoint: &Endpoint) -> Option<Exclusion> {
    let conditions = endpoint.conditions;
    match (conditions.ready, conditions.terminating) {
        (true, _) => None,
        (false, true) => Some(Exclusion::Terminating),
        (false, false) => Some(Exclusion::NotReady),
    }
}
