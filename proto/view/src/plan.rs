//! The ForwardingPlan: the seam between policy and mechanism.
//!
//! Every Service rule is decided before a plan exists. A backend chooses *how* a decision
//! becomes kernel rules, never *whether*: it needs no traffic policy, no readiness and no
//! topology, and the types here offer none.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_model::{Family, Feature, Port, Protocol, ServiceKey};
use rustc_hash::FxHashMap;

use crate::InterfaceName;

/// Everything one node does with Service traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardingPlan {
    /// What holds for the node as a whole.
    pub node: NodePlan,
    /// One entry per Service that has something to program.
    pub services: FxHashMap<ServiceKey, Arc<ServicePlan>>,
}

/// What holds for the node as a whole. A change of it concerns every Service, but for one of
/// `service_cidrs`, which concerns none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// Which packets count as [`Source::Pod`]; `None` = no way to tell, so none do.
    pub pods: Option<PodSources>,
    /// Which IPv4 destination addresses [`Surface::NodePort`] stands for.
    pub node_ports_v4: NodePortScope,
    /// The same for IPv6.
    pub node_ports_v6: NodePortScope,
    /// IPv4 node ports also answer at loopback addresses, to the node itself and nobody else.
    pub localhost_node_ports: bool,
    /// The one bit of the packet mark that means "masquerade".
    pub masquerade_mark: u32,
    /// Where cluster IPs come from, both families, sorted, none inside another. New packets to
    /// an address in here that no Service has as a cluster IP are dropped, where the backend can.
    /// Empty = not known.
    pub service_cidrs: Vec<IpNet>,
    /// Addresses of nodes of the cluster that Services name as external or load-balancer addresses,
    /// sorted. One that the node does not have on an interface is left alone, whatever Services want
    /// there: packets go to the node that has it, which has the Services' frontends. Empty where the
    /// backend does not make addresses of Services the node's own.
    pub node_addresses: Vec<IpAddr>,
}

/// How a packet from a pod is recognised. A packet of the node itself came in by no interface, so
/// where interfaces are looked at it is no pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodSources {
    /// By source address: those of the cluster or of the node, sorted. A family without one has
    /// no pods.
    Cidrs(Vec<IpNet>),
    /// By the interface that it came in by.
    Interface(InterfaceName),
    /// By how the name of that interface begins.
    InterfacePrefix(InterfaceName),
}

/// Which destination addresses of one family node ports answer on. Loopback addresses do where
/// [`NodePlan::localhost_node_ports`] says so, else never.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodePortScope {
    /// Every address that is local to the node, also ones added later.
    AllLocal,
    /// These, all of that family, sorted; none at all where empty.
    Addresses(Vec<IpAddr>),
}

/// What the node does for one Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePlan {
    /// The Service.
    pub key: ServiceKey,
    /// Per family and Service port, sorted by (family, protocol, port, name).
    pub ports: Vec<PortPlan>,
    /// Its cluster IPs, with or without endpoints, sorted: new packets to any other port or
    /// protocol there are refused, where the backend can. Where several Services name one, a
    /// single plan has it.
    pub cluster_ips: Vec<IpAddr>,
    /// What a backend must be able to do to carry this plan, sorted. A backend that lacks
    /// one leaves what it has in force for the Service and reports it.
    pub required_features: Vec<Feature>,
    /// The health check that load balancers ask for.
    pub health_check: Option<HealthCheck>,
    /// Parts of the Service that the plan leaves out, and why. Empty = none.
    pub conflicts: Vec<Conflict>,
}

/// One Service port in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortPlan {
    /// Family of every address in here.
    pub family: Family,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port of the Service; the node port is in the frontend.
    pub port: Port,
    /// Name of the port; empty = unnamed.
    pub name: Arc<str>,
    /// Endpoints of [`Pool::Cluster`], sorted. Filled only where a frontend uses it.
    pub cluster: Vec<Target>,
    /// Endpoints of [`Pool::Local`], sorted. Filled only where a frontend uses it.
    pub local: Vec<Target>,
    /// Targets among `cluster` and `local` that can meet themselves as clients (hairpin), sorted;
    /// their packets must then be masqueraded. These are the ones on this node, the ones that do
    /// not say where they are, and all of them where an external address leads pods to `cluster`
    /// with their address kept and pods of other nodes are told as pods: one can dial a node port
    /// here.
    pub hairpin: Vec<Target>,
    /// UDP only: every endpoint anywhere that serves, sorted. A flow that is established may go
    /// on to any of these, whatever policy or topology say about new ones, see
    /// [`stale`](crate::stale). No backend programs it.
    pub serving: Vec<Target>,
    /// Addresses that lead here, sorted.
    pub frontends: Vec<Frontend>,
    /// Session affinity by client IP: seconds an idle client keeps its endpoint.
    pub affinity_seconds: Option<u32>,
}

/// Where a connection can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Port at the endpoint.
    pub port: Port,
}

/// One address and port, and what happens to new connections to it, by where they come from.
/// The first class that matches counts: pod, then node, then anything else.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frontend {
    /// The address.
    pub surface: Surface,
    /// Port at that address.
    pub port: Port,
    /// For packets from pods of this cluster, as [`NodePlan::pods`] tells them.
    pub from_pod: Action,
    /// For packets from the node itself (source address local to it).
    pub from_node: Action,
    /// For all others.
    pub from_elsewhere: Action,
    /// Sources that may use this frontend, all of its family, sorted, none inside another;
    /// all others are dropped before anything else is decided. `None` = everybody.
    pub allowed_sources: Option<Arc<[IpNet]>>,
}

/// Where a frontend is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Surface {
    /// A cluster IP.
    ClusterIp(IpAddr),
    /// An external IP.
    ExternalIp(IpAddr),
    /// A load balancer's address.
    LoadBalancerIp(IpAddr),
    /// The node's own addresses, see [`NodePlan::node_ports`].
    NodePort,
}

/// What happens to a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It goes to a random target of the pool, which is not empty.
    Forward {
        /// The pool.
        pool: Pool,
        /// True = the target sees an address of the node instead of the client's.
        masquerade: bool,
    },
    /// It is refused: ICMP port unreachable.
    Reject,
    /// It is dropped silently.
    Drop,
}

/// A list of targets in a [`PortPlan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// [`PortPlan::cluster`].
    Cluster,
    /// [`PortPlan::local`].
    Local,
}

/// Where a packet comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A pod of this cluster.
    Pod,
    /// The node itself.
    Node,
    /// Anywhere else.
    Elsewhere,
}

/// A health-check node port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port.
    pub port: Port,
    /// Distinct addresses of ready endpoints on this node, over all ports and families.
    pub local_endpoints: usize,
}

/// A frontend that another Service has. One address, protocol and port can lead to one
/// Service only. A cluster IP beats a load balancer's address, which beats an external IP
/// (a user may write any address there, also another Service's); among equals the Service
/// with the lower key (namespace, then name) has it. So the outcome depends on what is
/// there and not on what came first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// Family; a node port is contested in each family by itself.
    pub family: Family,
    /// Where.
    pub surface: Surface,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port there.
    pub port: Port,
    /// Who has it.
    pub owner: ServiceKey,
}

impl NodePlan {
    /// True where the two differ in nothing that concerns Services.
    pub fn equals_but_for_service_cidrs(&self, other: &NodePlan) -> bool {
        let NodePlan {
            pods,
            node_ports_v4,
            node_ports_v6,
            localhost_node_ports,
            masquerade_mark,
            service_cidrs: _,
            node_addresses,
        } = self;
        *pods == other.pods
            && *node_ports_v4 == other.node_ports_v4
            && *node_ports_v6 == other.node_ports_v6
            && *localhost_node_ports == other.localhost_node_ports
            && *masquerade_mark == other.masquerade_mark
            && *node_addresses == other.node_addresses
    }

    /// True where a Service names an address that is a node's: this node does with it what the plan
    /// says only where it has the address itself.
    pub fn is_of_a_node(&self, address: IpAddr) -> bool {
        self.node_addresses.binary_search(&address).is_ok()
    }

    /// Where node ports answer in a family.
    pub fn node_ports(&self, family: Family) -> &NodePortScope {
        match family {
            Family::V4 => &self.node_ports_v4,
            Family::V6 => &self.node_ports_v6,
        }
    }

    /// True where node ports of the family answer at loopback addresses too.
    pub fn has_localhost_node_ports(&self, family: Family) -> bool {
        self.localhost_node_ports && family == Family::V4
    }
}

impl PodSources {
    /// True where pods of the family can be told from others.
    pub fn tells(&self, family: Family) -> bool {
        match self {
            PodSources::Cidrs(cidrs) => cidrs.iter().any(|cidr| Family::of(cidr.addr()) == family),
            PodSources::Interface(_) | PodSources::InterfacePrefix(_) => true,
        }
    }
}

impl ServicePlan {
    /// What a backend that can do `features` lacks for it.
    pub fn lacking(&self, features: &[Feature]) -> Option<Feature> {
        self.required_features.iter().copied().find(|feature| !features.contains(feature))
    }
}

impl Frontend {
    /// The action for a source.
    pub fn action(&self, source: Source) -> Action {
        match source {
            Source::Pod => self.from_pod,
            Source::Node => self.from_node,
            Source::Elsewhere => self.from_elsewhere,
        }
    }

    /// True where every class of sources is forwarded.
    pub fn forwards_all(&self) -> bool {
        [self.from_pod, self.from_node, self.from_elsewhere]
            .iter()
            .all(|action| matches!(action, Action::Forward { .. }))
    }
}

impl PortPlan {
    /// Targets of a pool.
    pub fn pool(&self, pool: Pool) -> &[Target] {
        match pool {
            Pool::Cluster => &self.cluster,
            Pool::Local => &self.local,
        }
    }

    /// `namespace/name:port`, or `namespace/name` for the unnamed port: the text that
    /// kube-proxy hashes into chain names and writes into comments.
    pub fn text(&self, service: &ServiceKey) -> String {
        if self.name.is_empty() { service.to_string() } else { format!("{service}:{}", self.name) }
    }
}

impl Surface {
    /// The address; `None` for node ports.
    pub fn address(self) -> Option<IpAddr> {
        match self {
            Surface::ClusterIp(ip) | Surface::ExternalIp(ip) | Surface::LoadBalancerIp(ip) => Some(ip),
            Surface::NodePort => None,
        }
    }
}
