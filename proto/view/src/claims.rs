//! Claims: which address, protocol and port a Service wants, and who has it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lockstep_model::{Family, Port, Protocol, Service, ServiceKey, ServicePort};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::config::Facts;
use crate::{ServicePlan, Surface};

/// Where packets are told apart: one Service only can have it. A node port is at the
/// unspecified address of its family, because it is no particular one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    address: IpAddr,
    /// `None` = whatever no Service has of a cluster IP.
    at: Option<(Protocol, Port)>,
}

/// What a Service wants of a place: the lower wins. The kind of surface counts first, so
/// that nobody takes a cluster IP by naming it as an external IP.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    rank: u8,
    key: ServiceKey,
}

/// A place and the surface that wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    place: Place,
    rank: u8,
}

pub(crate) type Claims = SmallVec<[Claim; 6]>;

/// Every claim of every Service.
#[derive(Debug, Default)]
pub(crate) struct Index(FxHashMap<Place, SmallVec<[Claimant; 1]>>);

/// Whom to ask who has a place.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Owners<'a> {
    /// The claims of all Services.
    Index(&'a Index),
    /// Nobody: what the Service claims is known to be its own.
    Settled,
}

impl Owners<'_> {
    /// Who has a place; `None` = whoever asks, as far as is known.
    pub(crate) fn of(&self, place: &Place) -> Option<&ServiceKey> {
        match self {
            Owners::Index(index) => index.owner(place),
            Owners::Settled => None,
        }
    }
}

impl Place {
    pub(crate) fn new(family: Family, surface: Surface, protocol: Protocol, port: Port) -> Self {
        let any: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        Self { address: surface.address().unwrap_or(any), at: Some((protocol, port)) }
    }

    /// The rest of a cluster IP.
    pub(crate) fn rest_of(cluster_ip: IpAddr) -> Self {
        Self { address: cluster_ip, at: None }
    }
}

impl Claim {
    fn new(family: Family, surface: Surface, protocol: Protocol, port: Port) -> Self {
        let rank = match surface {
            Surface::ClusterIp(_) | Surface::NodePort => 0,
            Surface::LoadBalancerIp(_) => 1,
            Surface::ExternalIp(_) => 2,
        };
        Self { place: Place::new(family, surface, protocol, port), rank }
    }

    fn rest_of(cluster_ip: IpAddr) -> Self {
        Self { place: Place::rest_of(cluster_ip), rank: 0 }
    }
}

/// Families in which a Service has something to program: those of its cluster IPs.
pub(crate) fn families<'a>(service: &'a Service, facts: &'a Facts) -> impl Iterator<Item = Family> + 'a {
    let has = |family| service.cluster_ips.iter().any(|ip| Family::of(*ip) == family);
    Family::ALL.into_iter().filter(move |family| facts.plans(*family) && has(*family))
}

/// Addresses of a Service in one family, sorted. An address that the Service has twice is
/// its cluster IP first, then the load balancer's (whose source ranges then hold).
/// Load-balancer addresses in proxy mode are left alone.
pub(crate) fn surfaces(service: &Service, family: Family) -> SmallVec<[Surface; 4]> {
    let mine = |ip: &IpAddr| Family::of(*ip) == family;
    let cluster = service.cluster_ips.iter().copied().find(mine);
    let balanced =
        || service.load_balancer_ingress.iter().filter(|it| !it.proxy_mode).map(|it| it.ip).filter(mine);
    let mut surfaces = SmallVec::new();
    surfaces.extend(cluster.map(Surface::ClusterIp));
    let external = service.external_ips.iter().copied().filter(mine);
    let external = external.filter(|ip| Some(*ip) != cluster && !balanced().any(|it| it == *ip));
    surfaces.extend(external.map(Surface::ExternalIp));
    surfaces.extend(balanced().filter(|ip| Some(*ip) != cluster).map(Surface::LoadBalancerIp));
    surfaces
}

/// Everything a Service claims, sorted.
pub(crate) fn of_service(service: &Service, facts: &Facts) -> Claims {
    let mut claims = Claims::new();
    for family in families(service, facts) {
        let surfaces = surfaces(service, family);
        claims.extend(rests(service, family).map(Claim::rest_of));
        for port in &service.ports {
            let at = |surface, number| Claim::new(family, surface, port.protocol, number);
            claims.extend(surfaces.iter().map(|surface| at(*surface, port.port)));
            claims.extend(port.node_port.map(|number| at(Surface::NodePort, number)));
        }
    }
    claims.sort_unstable();
    claims.dedup();
    claims
}

/// Everything that the plan of a Service shows it claimed, sorted.
pub(crate) fn of_plan(plan: &ServicePlan) -> Claims {
    let mut claims = Claims::new();
    for port in &plan.ports {
        for it in &port.frontends {
            claims.push(Claim::new(port.family, it.surface, port.protocol, it.port));
            claims.extend(rest_beside(it.surface));
        }
    }
    for it in &plan.conflicts {
        claims.push(Claim::new(it.family, it.surface, it.protocol, it.port));
        claims.extend(rest_beside(it.surface));
    }
    claims.sort_unstable();
    claims.dedup();
    claims
}

/// The cluster IPs of a Service of which it wants the rest too. A Service without any port has
/// nothing at its cluster IP, and so nothing that is beside it.
pub(crate) fn rests(service: &Service, family: Family) -> impl Iterator<Item = IpAddr> + '_ {
    let ips = service.cluster_ips.iter().copied().filter(move |ip| Family::of(*ip) == family);
    ips.filter(|_| !service.ports.is_empty())
}

/// Whoever wants a port of a cluster IP wants the rest of it.
fn rest_beside(surface: Surface) -> Option<Claim> {
    match surface {
        Surface::ClusterIp(ip) => Some(Claim::rest_of(ip)),
        _ => None,
    }
}

/// True where a plan has everything that its Service claims.
pub(crate) fn has_all(plan: &ServicePlan, claims: &Claims) -> bool {
    let rests = claims.iter().filter(|claim| claim.place.at.is_none()).count();
    plan.conflicts.is_empty() && plan.cluster_ips.len() == rests
}

/// The port of a Service that has its node port: of several that name one, the first.
pub(crate) fn has_node_port(service: &Service, port: &ServicePort, at: usize) -> bool {
    let same = |it: &ServicePort| (it.protocol, it.node_port) == (port.protocol, port.node_port);
    !service.ports[..at].iter().any(same)
}

impl Index {
    /// Who has a place.
    pub(crate) fn owner(&self, place: &Place) -> Option<&ServiceKey> {
        Some(&self.0.get(place)?.first()?.key)
    }

    /// Makes room for `places` more.
    pub(crate) fn reserve(&mut self, places: usize) {
        self.0.reserve(places);
    }

    /// Replaces what a Service claims (both sorted). Adds to `shaken` the others that gain
    /// or lose a place by it, or lose it to somebody else than before.
    pub(crate) fn replace(
        &mut self,
        key: &ServiceKey,
        old: &[Claim],
        new: &[Claim],
        shaken: &mut Vec<ServiceKey>,
    ) {
        for claim in old.iter().filter(|claim| new.binary_search(claim).is_err()) {
            self.withdraw(key, claim, shaken);
        }
        for claim in new.iter().filter(|claim| old.binary_search(claim).is_err()) {
            self.enter(key, claim, shaken);
        }
    }

    fn withdraw(&mut self, key: &ServiceKey, claim: &Claim, shaken: &mut Vec<ServiceKey>) {
        let Some(claimants) = self.0.get_mut(&claim.place) else { return };
        let Some(at) = claimants.iter().position(|it| it.rank == claim.rank && it.key == *key) else {
            return;
        };
        claimants.remove(at);
        if at == 0 {
            shaken.extend(claimants.iter().map(|it| it.key.clone()));
        }
        if claimants.is_empty() {
            self.0.remove(&claim.place);
        }
    }

    fn enter(&mut self, key: &ServiceKey, claim: &Claim, shaken: &mut Vec<ServiceKey>) {
        let claimants = self.0.entry(claim.place).or_default();
        let claimant = Claimant { rank: claim.rank, key: key.clone() };
        let Err(at) = claimants.binary_search(&claimant) else { return };
        if at == 0 {
            shaken.extend(claimants.iter().map(|it| it.key.clone()));
        }
        claimants.insert(at, claimant);
    }
}
