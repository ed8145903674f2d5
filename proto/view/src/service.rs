//! The plan of one Service.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_model::{
    EndpointSet, Family, Feature, Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use smallvec::SmallVec;

use crate::claims::{self, Owners, Place};
use crate::config::Facts;
use crate::decide::{self, Situation, Verdicts};
use crate::select::{self, Candidates};
use crate::{Action, Conflict, Frontend, HealthCheck, Pool, PortPlan, ServicePlan, Surface};

/// Plans one Service from its endpoint sets, in order of slice name. `None` where it has
/// nothing to program and nothing to report.
pub(crate) fn plan(
    service: &Service,
    sets: &[&EndpointSet],
    facts: &Facts,
    owners: Owners<'_>,
) -> Option<ServicePlan> {
    let mut conflicts = Vec::new();
    let mut ports = Vec::with_capacity(claims::families(service, facts).count() * service.ports.len());
    for family in claims::families(service, facts) {
        let surfaces = claims::surfaces(service, family);
        for (at, port) in service.ports.iter().enumerate() {
            let places = won(service, family, &surfaces, at, owners, &mut conflicts);
            if !places.is_empty() {
                ports.push(port_plan(service, family, port, &places, sets, facts));
            }
        }
    }
    conflicts.sort_unstable();
    let cluster_ips = cluster_ips(service, facts, owners);
    let health_check = health_check(service, sets, facts);
    if ports.is_empty() && conflicts.is_empty() && health_check.is_none() {
        return None;
    }
    let required_features = features(&ports);
    Some(ServicePlan {
        key: service.key.clone(),
        ports,
        cluster_ips,
        required_features,
        health_check,
        conflicts,
    })
}

/// The cluster IPs whose other ports are this Service's to refuse, sorted.
fn cluster_ips(service: &Service, facts: &Facts, owners: Owners<'_>) -> Vec<IpAddr> {
    let wanted = claims::families(service, facts).flat_map(|family| claims::rests(service, family));
    let is_mine = |ip: &IpAddr| owners.of(&Place::rest_of(*ip)).is_none_or(|owner| *owner == service.key);
    wanted.filter(is_mine).collect()
}

type Places = SmallVec<[(Surface, lockstep_model::Port); 4]>;

/// The frontends of a port that no other Service has, sorted.
fn won(
    service: &Service,
    family: Family,
    surfaces: &[Surface],
    at: usize,
    owners: Owners<'_>,
    conflicts: &mut Vec<Conflict>,
) -> Places {
    let port = &service.ports[at];
    let node_port = port.node_port.filter(|_| claims::has_node_port(service, port, at));
    let wanted = surfaces.iter().map(|surface| (*surface, port.port));
    let wanted = wanted.chain(node_port.map(|number| (Surface::NodePort, number)));
    let mut places = Places::new();
    for (surface, number) in wanted {
        match owners.of(&Place::new(family, surface, port.protocol, number)) {
            Some(owner) if *owner != service.key => conflicts.push(Conflict {
                family,
                surface,
                protocol: port.protocol,
                port: number,
                owner: owner.clone(),
            }),
            _ => places.push((surface, number)),
        }
    }
    places
}

fn port_plan(
    service: &Service,
    family: Family,
    port: &ServicePort,
    places: &[(Surface, lockstep_model::Port)],
    sets: &[&EndpointSet],
    facts: &Facts,
) -> PortPlan {
    let candidates = Candidates::of(port, family, sets, facts);
    let inside = places.iter().any(|(surface, _)| matches!(surface, Surface::ClusterIp(_)));
    let outside = places.iter().any(|(surface, _)| !matches!(surface, Surface::ClusterIp(_)));
    let wants_local = inside && service.internal_traffic_policy == TrafficPolicy::Local
        || outside && service.external_traffic_policy == TrafficPolicy::Local;
    let local = if wants_local { candidates.local(facts) } else { Vec::new() };
    let situation = Situation {
        any_usable: candidates.any_usable(),
        any_local: !local.is_empty(),
        tells_pods: facts.tells_pods(family),
        masquerade_all: facts.masquerade_all,
        one_pool: facts.one_pool,
    };
    let internal = decide::internal(service.internal_traffic_policy, situation);
    let external = decide::external(service.external_traffic_policy, situation);
    let uses_cluster = inside && internal.uses(Pool::Cluster) || outside && external.uses(Pool::Cluster);
    let cluster = if uses_cluster { candidates.cluster(facts) } else { Vec::new() };
    // A pod of another node that dials a node port here keeps its address, so it can meet itself:
    // where it is told as a pod. Where it is not, it gets the local pool or is masqueraded.
    let short_circuit = Action::Forward { pool: Pool::Cluster, masquerade: false };
    let everywhere = outside && external.from_pod == short_circuit && facts.tells_remote_pods;
    let hairpin = candidates.hairpin(facts, uses_cluster, &local, everywhere);
    let serving = if port.protocol == Protocol::Udp { candidates.serving() } else { Vec::new() };
    let mut frontends = Vec::with_capacity(places.len());
    frontends.extend(places.iter().map(|(surface, number)| match surface {
        Surface::ClusterIp(_) => frontend(*surface, *number, internal, None),
        Surface::LoadBalancerIp(ip) => {
            frontend(*surface, *number, external, allowed_sources(service, *ip, facts))
        }
        _ => frontend(*surface, *number, external, None),
    }));
    PortPlan {
        family,
        protocol: port.protocol,
        port: port.port,
        name: port.name.clone(),
        cluster,
        local,
        hairpin,
        serving,
        frontends,
        affinity_seconds: service.client_ip_affinity_seconds,
    }
}

fn frontend(
    surface: Surface,
    port: lockstep_model::Port,
    verdicts: Verdicts,
    allowed_sources: Option<Arc<[IpNet]>>,
) -> Frontend {
    let Verdicts { from_pod, from_node, from_elsewhere } = verdicts;
    Frontend { surface, port, from_pod, from_node, from_elsewhere, allowed_sources }
}

/// Who may use a load balancer's address. Ranges of the other family restrict nothing here.
/// Where the node itself may, so may the address: a node that has the address on an
/// interface sends from it when it dials it.
fn allowed_sources(service: &Service, vip: IpAddr, facts: &Facts) -> Option<Arc<[IpNet]>> {
    let family = Family::of(vip);
    let ranges = service.load_balancer_source_ranges.iter();
    let mut ranges: Vec<IpNet> = ranges.filter(|it| Family::of(it.addr()) == family).copied().collect();
    if ranges.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
        return None;
    }
    if facts.primary(family).is_some_and(|node| ranges.iter().any(|range| range.contains(&node))) {
        ranges.push(IpNet::from(vip));
    }
    ranges = IpNet::aggregate(&ranges);
    ranges.sort_unstable();
    if ranges.iter().any(|range| range.prefix_len() == 0) {
        return None;
    }
    Some(ranges.into())
}

/// The health check of a load-balancer Service with external policy Local.
fn health_check(service: &Service, sets: &[&EndpointSet], facts: &Facts) -> Option<HealthCheck> {
    let port = service.health_check_node_port?;
    if service.service_type != ServiceType::LoadBalancer
        || service.external_traffic_policy != TrafficPolicy::Local
    {
        return None;
    }
    let mut ready: Vec<IpAddr> = Vec::new();
    for family in claims::families(service, facts) {
        for port in &service.ports {
            let candidates = Candidates::of(port, family, sets, facts);
            let here = candidates
                .iter()
                .filter(|it| it.endpoint.conditions.ready && select::is_local(it.endpoint, facts));
            ready.extend(here.map(|it| it.target.address));
        }
    }
    ready.sort_unstable();
    ready.dedup();
    Some(HealthCheck { port, local_endpoints: ready.len() })
}

/// What a backend must be able to do, sorted. Load-balancer addresses in proxy mode need
/// nothing of a backend: they are not in the plan.
fn features(ports: &[PortPlan]) -> Vec<Feature> {
    let mut frontends = ports.iter().flat_map(|port| &port.frontends);
    let needed = [
        (Feature::Sctp, ports.iter().any(|port| port.protocol == Protocol::Sctp)),
        (Feature::SessionAffinity, ports.iter().any(|port| port.affinity_seconds.is_some())),
        (Feature::SourceRanges, frontends.any(|frontend| frontend.allowed_sources.is_some())),
    ];
    needed.into_iter().filter_map(|(feature, needed)| needed.then_some(feature)).collect()
}
