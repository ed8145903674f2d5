//! A second evaluator of the same rules: slow, plain, and sharing no code with the first.
//! It looks at all Services and all slices for every question.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use lockstep_model::{
    Endpoint, EndpointSet, Family, Feature, NodeContext, Port, Protocol, Service, ServiceKey, ServiceType,
    State, TrafficPolicy,
};

use crate::{
    Action, Conflict, DetectLocal, Frontend, HealthCheck, NodePortAddresses, Pool, PortPlan, ServicePlan,
    Surface, Target, ViewConfig,
};

pub(super) struct Oracle<'a> {
    pub(super) config: &'a ViewConfig,
    pub(super) node: &'a NodeContext,
    services: Vec<&'a Service>,
    state: &'a State,
}

type PortId = (Family, Protocol, Port, String);

/// (frontend, family, protocol, port of the Service, port name)
type Wish = (Surface, Port, Family, Protocol, Port, String);

impl<'a> Oracle<'a> {
    pub(super) fn new(config: &'a ViewConfig, node: &'a NodeContext, state: &'a State) -> Self {
        let services = state.service_keys().filter_map(|key| state.service(key)).map(|it| &**it).collect();
        Self { config, node, services, state }
    }

    /// Which packets are pods', in words.
    pub(super) fn pods(&self) -> Option<String> {
        let list = |ranges: &[IpNet]| {
            let unique: BTreeSet<&IpNet> = ranges.iter().collect();
            let texts: Vec<String> = unique.into_iter().map(ToString::to_string).collect();
            (!texts.is_empty()).then(|| texts.join(" "))
        };
        match &self.config.detect_local {
            DetectLocal::ClusterCidrs(ranges) => list(ranges),
            DetectLocal::NodeCidrs => list(&self.node.pod_cidrs),
            DetectLocal::BridgeInterface(name) => Some(format!("in by {name}")),
            DetectLocal::InterfaceNamePrefix(prefix) => Some(format!("in by {prefix}...")),
        }
    }

    /// Loopback addresses that node ports of IPv4 answer at: all, none, or one that is listed.
    pub(super) fn localhost(&self, interfaces: &[IpAddr]) -> Vec<String> {
        let (config, v4) = (self.config, |ip: &IpAddr| ip.is_ipv4());
        if !config.localhost_node_ports || !config.families.contains(&Family::V4) {
            return Vec::new();
        }
        let all = vec!["all".to_owned()];
        match &config.node_port_addresses {
            NodePortAddresses::AllLocal => all,
            NodePortAddresses::Primary => Vec::new(),
            NodePortAddresses::Cidrs(ranges) => {
                let ranges: Vec<_> = ranges.iter().filter(|range| v4(&range.addr())).collect();
                if ranges.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
                    return all;
                }
                let inside = |ip: &&IpAddr| ranges.iter().any(|range| range.contains(*ip));
                let own = interfaces.iter().filter(|ip| v4(ip) && ip.is_loopback());
                own.filter(inside).map(ToString::to_string).collect()
            }
        }
    }

    pub(super) fn plans(&self) -> BTreeMap<ServiceKey, ServicePlan> {
        self.services.iter().filter_map(|it| Some((it.key.clone(), self.plan(it)?))).collect()
    }

    /// Everything a Service would like to answer on.
    fn wishes(&self, service: &Service) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for cluster_ip in &service.cluster_ips {
            let family = Family::of(*cluster_ip);
            if !self.config.families.contains(&family) {
                continue;
            }
            let mut addresses = BTreeMap::new();
            for ip in service.external_ips.iter().filter(|ip| Family::of(**ip) == family) {
                addresses.insert(*ip, Surface::ExternalIp(*ip));
            }
            for ingress in &service.load_balancer_ingress {
                if Family::of(ingress.ip) == family && !ingress.proxy_mode {
                    addresses.insert(ingress.ip, Surface::LoadBalancerIp(ingress.ip));
                }
            }
            addresses.insert(*cluster_ip, Surface::ClusterIp(*cluster_ip));
            for port in &service.ports {
                let mut wish = |surface, number| {
                    wishes.push((surface, number, family, port.protocol, port.port, port.name.to_string()));
                };
                for surface in addresses.values() {
                    wish(*surface, port.port);
                }
                if let Some(number) = port.node_port {
                    wish(Surface::NodePort, number);
                }
            }
        }
        wishes
    }

    /// Who gets a wish: cluster IPs before load balancers' addresses before external IPs,
    /// then the lower name.
    fn winner(&self, wish: &Wish) -> ServiceKey {
        let (surface, number, family, protocol, ..) = wish;
        let mut rivals = Vec::new();
        for service in &self.services {
            for (other, other_number, other_family, other_protocol, ..) in self.wishes(service) {
                let same_place = match (surface.address(), other.address()) {
                    (None, None) => *family == other_family,
                    (ours, theirs) => ours == theirs,
                };
                if same_place && *number == other_number && *protocol == other_protocol {
                    let rank = match other {
                        Surface::LoadBalancerIp(_) => 1,
                        Surface::ExternalIp(_) => 2,
                        _ => 0,
                    };
                    rivals.push((rank, service.key.clone()));
                }
            }
        }
        rivals.into_iter().min().unwrap().1
    }

    fn plan(&self, service: &Service) -> Option<ServicePlan> {
        let mut ports: BTreeMap<PortId, Vec<(Surface, Port)>> = BTreeMap::new();
        let mut conflicts = Vec::new();
        for wish in self.wishes(service) {
            let owner = self.winner(&wish);
            let (surface, number, family, protocol, port, name) = wish;
            if owner == service.key {
                ports.entry((family, protocol, port, name)).or_default().push((surface, number));
            } else {
                conflicts.push(Conflict { family, surface, protocol, port: number, owner });
            }
        }
        conflicts.sort();
        let ports: Vec<PortPlan> = ports.into_iter().map(|(of, at)| self.port(service, of, at)).collect();
        let health_check = self.health_check(service);
        if ports.is_empty() && conflicts.is_empty() && health_check.is_none() {
            return None;
        }
        let mut features = BTreeSet::new();
        for port in &ports {
            if port.protocol == Protocol::Sctp {
                features.insert(Feature::Sctp);
            }
            if port.affinity_seconds.is_some() {
                features.insert(Feature::SessionAffinity);
            }
            if port.frontends.iter().any(|frontend| frontend.allowed_sources.is_some()) {
                features.insert(Feature::SourceRanges);
            }
        }
        let required_features = features.into_iter().collect();
        let cluster_ips = self.cluster_ips(service);
        let key = service.key.clone();
        Some(ServicePlan { key, ports, cluster_ips, required_features, health_check, conflicts })
    }

    /// Of all Services with ports that name a cluster IP, the first by name has it.
    fn cluster_ips(&self, service: &Service) -> Vec<IpAddr> {
        let mut ips = BTreeSet::new();
        for ip in &service.cluster_ips {
            let mut names: Vec<_> = self.services.iter().filter(|it| it.cluster_ips.contains(ip)).collect();
            names.retain(|it| !it.ports.is_empty());
            let first = names.iter().map(|it| &it.key).min();
            if first == Some(&service.key) && self.config.families.contains(&Family::of(*ip)) {
                ips.insert(*ip);
            }
        }
        ips.into_iter().collect()
    }

    /// The ranges of all ServiceCidrs that are inside no other.
    pub(super) fn service_cidrs(&self) -> Vec<IpNet> {
        let all: BTreeSet<IpNet> = self.state.service_cidrs().flat_map(|(_, it)| it.cidrs.clone()).collect();
        let planned = |it: &IpNet| self.config.families.contains(&Family::of(it.addr()));
        let inside = |it: &IpNet| all.iter().any(|other| other != it && other.contains(it));
        all.iter().filter(|it| planned(it) && !inside(it)).copied().collect()
    }

    fn sets(&self, service: &Service) -> Vec<&'a EndpointSet> {
        let mut sets: Vec<_> = self.state.endpoint_sets(&service.key).map(|set| &**set).collect();
        sets.sort_by(|a, b| a.key.slice.cmp(&b.key.slice));
        sets
    }

    /// Endpoints of a port; a later one replaces an earlier one unless it is terminating.
    fn endpoints(
        &self,
        service: &Service,
        family: Family,
        protocol: Protocol,
        name: &str,
    ) -> BTreeMap<Target, &'a Endpoint> {
        let mut merged = BTreeMap::new();
        for set in self.sets(service) {
            for port in &set.ports {
                if set.family != family || *port.name != *name || port.protocol != protocol {
                    continue;
                }
                for endpoint in &set.endpoints {
                    let target = Target { address: endpoint.address, port: port.port };
                    if !merged.contains_key(&target) || !endpoint.conditions.terminating {
                        merged.insert(target, endpoint);
                    }
                }
            }
        }
        merged
    }

    fn port(
        &self,
        service: &Service,
        (family, protocol, port, name): PortId,
        mut at: Vec<(Surface, Port)>,
    ) -> PortPlan {
        at.sort();
        let all = self.endpoints(service, family, protocol, &name);
        let here = |endpoint: &Endpoint| endpoint.node_name.as_ref() == Some(&self.config.node_name);
        let ready: Vec<_> = all.iter().filter(|(_, it)| it.conditions.ready).collect();
        let drains =
            |it: &Endpoint| !it.conditions.ready && it.conditions.serving && it.conditions.terminating;
        let draining: Vec<_> = all.iter().filter(|(_, it)| drains(it)).collect();

        let nodes = |it: &Endpoint| it.hints.as_ref().map(|it| it.nodes.to_vec()).unwrap_or_default();
        let zones = |it: &Endpoint| it.hints.as_ref().map(|it| it.zones.to_vec()).unwrap_or_default();
        let for_node = |it: &Endpoint| nodes(it).contains(&self.config.node_name);
        let for_zone = |it: &Endpoint| self.node.zone.as_ref().is_some_and(|zone| zones(it).contains(zone));
        let mut cluster: Vec<Target> = if ready.is_empty() {
            draining.iter().map(|(target, _)| **target).collect()
        } else if ready.iter().all(|(_, it)| !nodes(it).is_empty())
            && ready.iter().any(|(_, it)| for_node(it))
        {
            ready.iter().filter(|(_, it)| for_node(it)).map(|(target, _)| **target).collect()
        } else if ready.iter().all(|(_, it)| !zones(it).is_empty())
            && ready.iter().any(|(_, it)| for_zone(it))
        {
            ready.iter().filter(|(_, it)| for_zone(it)).map(|(target, _)| **target).collect()
        } else {
            ready.iter().map(|(target, _)| **target).collect()
        };
        let local_of = |list: &[(&Target, &&Endpoint)]| -> Vec<Target> {
            list.iter().filter(|(_, it)| here(it)).map(|(target, _)| **target).collect()
        };
        let mut local = local_of(&ready);
        if local.is_empty() {
            local = local_of(&draining);
        }

        let usable = !(ready.is_empty() && draining.is_empty());
        let frontends: Vec<Frontend> = at
            .into_iter()
            .map(|(surface, port)| {
                let action =
                    |source| self.action(service, surface, family, source, usable, !local.is_empty());
                Frontend {
                    surface,
                    port,
                    from_pod: action("pod"),
                    from_node: action("node"),
                    from_elsewhere: action("elsewhere"),
                    allowed_sources: self.allowed(service, surface, family).map(Into::into),
                }
            })
            .collect();
        let uses = |pool: Pool| {
            frontends.iter().any(|it| {
                [it.from_pod, it.from_node, it.from_elsewhere]
                    .iter()
                    .any(|action| matches!(action, Action::Forward { pool: used, .. } if *used == pool))
            })
        };
        if !uses(Pool::Cluster) {
            cluster.clear();
        }
        if !uses(Pool::Local) {
            local.clear();
        }
        let both: BTreeSet<Target> = cluster.iter().chain(&local).copied().collect();
        let unmasked = Action::Forward { pool: Pool::Cluster, masquerade: false };
        // By its interface, or by the ranges of this node, a pod of another node is no pod.
        let by_cluster = matches!(self.config.detect_local, DetectLocal::ClusterCidrs(_));
        let from_afar = by_cluster
            && frontends
                .iter()
                .any(|it| !matches!(it.surface, Surface::ClusterIp(_)) && it.from_pod == unmasked);
        let unknown = |it: &Endpoint| it.node_name.is_none();
        let met = |target: &Target| from_afar || here(all[target]) || unknown(all[target]);
        let hairpin = both.into_iter().filter(met).collect();
        let serves = |it: &Endpoint| it.conditions.ready || it.conditions.serving;
        let mut serving: Vec<Target> = Vec::new();
        if protocol == Protocol::Udp {
            serving.extend(all.iter().filter(|(_, it)| serves(it)).map(|(target, _)| *target));
        }
        PortPlan {
            family,
            protocol,
            port,
            name: name.into(),
            cluster,
            local,
            hairpin,
            serving,
            frontends,
            affinity_seconds: service.client_ip_affinity_seconds,
        }
    }

    fn action(
        &self,
        service: &Service,
        surface: Surface,
        family: Family,
        source: &str,
        usable: bool,
        any_local: bool,
    ) -> Action {
        let detector = match &self.config.detect_local {
            DetectLocal::ClusterCidrs(ranges) => {
                ranges.iter().any(|range| Family::of(range.addr()) == family)
            }
            DetectLocal::NodeCidrs => {
                self.node.pod_cidrs.iter().any(|range| Family::of(range.addr()) == family)
            }
            _ => true,
        };
        let source = if source == "pod" && !detector { "elsewhere" } else { source };
        if !usable {
            return Action::Reject;
        }
        let go = |pool, masquerade| Action::Forward { pool, masquerade };
        if let Surface::ClusterIp(_) = surface {
            let masquerade = self.config.masquerade_all || (detector && source != "pod");
            return match service.internal_traffic_policy {
                TrafficPolicy::Cluster => go(Pool::Cluster, masquerade),
                TrafficPolicy::Local if any_local => go(Pool::Local, masquerade),
                TrafficPolicy::Local => Action::Drop,
            };
        }
        match (service.external_traffic_policy, source) {
            (TrafficPolicy::Cluster, _) => go(Pool::Cluster, true),
            (TrafficPolicy::Local, "pod") => go(Pool::Cluster, false),
            (TrafficPolicy::Local, "node") => go(Pool::Cluster, true),
            (TrafficPolicy::Local, _) if any_local => go(Pool::Local, false),
            (TrafficPolicy::Local, _) => Action::Drop,
        }
    }

    fn allowed(&self, service: &Service, surface: Surface, family: Family) -> Option<Vec<IpNet>> {
        let Surface::LoadBalancerIp(vip) = surface else { return None };
        let mut ranges = service.load_balancer_source_ranges.clone();
        ranges.retain(|range| Family::of(range.addr()) == family);
        if ranges.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
            return None;
        }
        let primary = self.node.addresses.iter().find(|ip| Family::of(**ip) == family);
        if primary.is_some_and(|primary| ranges.iter().any(|range| range.contains(primary))) {
            ranges.push(IpNet::from(vip));
        }
        let mut outer: Vec<IpNet> = ranges
            .iter()
            .filter(|range| !ranges.iter().any(|other| other != *range && other.contains(*range)))
            .copied()
            .collect();
        outer.sort();
        outer.dedup();
        Some(outer)
    }

    fn health_check(&self, service: &Service) -> Option<HealthCheck> {
        let port = service.health_check_node_port?;
        let balanced = service.service_type == ServiceType::LoadBalancer;
        if !balanced || service.external_traffic_policy == TrafficPolicy::Cluster {
            return None;
        }
        let mut addresses: BTreeSet<IpAddr> = BTreeSet::new();
        for ip in &service.cluster_ips {
            let family = Family::of(*ip);
            for port in &service.ports {
                for (target, endpoint) in self.endpoints(service, family, port.protocol, &port.name) {
                    let here = endpoint.node_name.as_ref() == Some(&self.config.node_name);
                    if self.config.families.contains(&family) && endpoint.conditions.ready && here {
                        addresses.insert(target.address);
                    }
                }
            }
        }
        Some(HealthCheck { port, local_endpoints: addresses.len() })
    }
}
