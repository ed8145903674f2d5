use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_model::{Family, NodeContext};

use crate::{InterfaceName, NodePlan, NodePortScope, PodSources};

/// What the operator decided for this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewConfig {
    /// Name of this node, as endpoints name it.
    pub node_name: Arc<str>,
    /// Families to plan for; the others of a Service are left out.
    pub families: Vec<Family>,
    /// How packets of pods are told from others. A family in which they cannot be has no short
    /// circuit for pods and no masquerade on cluster IPs.
    pub detect_local: DetectLocal,
    /// Which addresses of the node answer on node ports.
    pub node_port_addresses: NodePortAddresses,
    /// IPv4 node ports answer at loopback addresses too, where `node_port_addresses` does not
    /// leave them out. To be set only where the backend can.
    pub localhost_node_ports: bool,
    /// Masquerade everything that is sent to a cluster IP.
    pub masquerade_all: bool,
    /// All sources of a frontend are sent to the same pool, see
    /// [`Description::one_pool`](crate::backend::Description::one_pool).
    pub one_pool: bool,
    /// Addresses of Services become the node's own, see
    /// [`Description::binds_addresses`](crate::backend::Description::binds_addresses).
    pub binds_addresses: bool,
    /// The bit of the packet mark that means "masquerade", 0 to 31.
    pub masquerade_bit: u8,
}

/// How packets of pods are told from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectLocal {
    /// By their source: address ranges of the cluster's pods; a family may have none.
    ClusterCidrs(Vec<IpNet>),
    /// By their source: the ranges of this node's pods, as its Node object states them at the time.
    NodeCidrs,
    /// By the interface they come in by.
    BridgeInterface(InterfaceName),
    /// By how the name of that interface begins.
    InterfaceNamePrefix(InterfaceName),
}

/// Which addresses of the node answer on node ports. Loopback addresses do only where
/// [`ViewConfig::localhost_node_ports`] is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every address local to the node.
    AllLocal,
    /// The node's primary address in each family. While the node's addresses are not known, every
    /// local address: a node port that answers nowhere would be a Service that is not in force.
    Primary,
    /// The node's addresses inside these. A family without a CIDR, or with the one that
    /// holds everything, answers on every local address.
    Cidrs(Vec<IpNet>),
}

/// The facts that planning uses, resolved once per change of node or configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Name of this node.
    pub node: Arc<str>,
    /// Zone of this node.
    pub zone: Option<Arc<str>>,
    /// Primary address per family: the first of the family that the Node object states.
    primary: [Option<IpAddr>; 2],
    /// Families that are planned for.
    planned: [bool; 2],
    /// Families in which pods can be told from others.
    pods: [bool; 2],
    /// Pods of other nodes are told as pods, too.
    pub tells_remote_pods: bool,
    /// Masquerade everything that is sent to a cluster IP.
    pub masquerade_all: bool,
    /// All sources of a frontend are sent to the same pool.
    pub one_pool: bool,
}

impl ViewConfig {
    /// The usual: both families, node ports on every local address, mark bit 14.
    pub fn new(node_name: impl Into<Arc<str>>) -> Self {
        Self {
            node_name: node_name.into(),
            families: Family::ALL.to_vec(),
            detect_local: DetectLocal::ClusterCidrs(Vec::new()),
            node_port_addresses: NodePortAddresses::AllLocal,
            localhost_node_ports: false,
            masquerade_all: false,
            one_pool: false,
            binds_addresses: false,
            masquerade_bit: 14,
        }
    }

    /// The part of a plan that holds for the whole node. `interfaces` are addresses that the
    /// node has beside those of its Node object; only [`NodePortAddresses::Cidrs`] uses them.
    /// `service_cidrs` are those of all ServiceCidrs, in any order.
    pub fn node_plan(&self, node: &NodeContext, interfaces: &[IpAddr], service_cidrs: &[IpNet]) -> NodePlan {
        let node_ports_v4 = self.node_ports(Family::V4, node, interfaces);
        let localhost_node_ports = self.allows_localhost(Family::V4)
            && match &node_ports_v4 {
                NodePortScope::AllLocal => true,
                // Of 127.0.0.0/8 the kernel takes every address for its own. Node ports answer at
                // those that an interface has, as with kube-proxy; where none has, nothing is opened.
                NodePortScope::Addresses(addresses) => addresses.iter().any(IpAddr::is_loopback),
            };
        NodePlan {
            pods: self.pods(node),
            node_ports_v4,
            node_ports_v6: self.node_ports(Family::V6, node, interfaces),
            localhost_node_ports,
            masquerade_mark: 1 << (self.masquerade_bit % 32),
            service_cidrs: self.outermost(service_cidrs),
            node_addresses: self.node_addresses(node),
        }
    }

    /// Addresses of nodes that Services name, where they matter.
    fn node_addresses(&self, node: &NodeContext) -> Vec<IpAddr> {
        let matters = |ip: &&IpAddr| self.binds_addresses && self.families.contains(&Family::of(**ip));
        node.node_addresses.iter().filter(matters).copied().collect()
    }

    fn pods(&self, node: &NodeContext) -> Option<PodSources> {
        let cidrs = match &self.detect_local {
            DetectLocal::ClusterCidrs(cidrs) => cidrs,
            DetectLocal::NodeCidrs => &node.pod_cidrs,
            DetectLocal::BridgeInterface(name) => return Some(PodSources::Interface(name.clone())),
            DetectLocal::InterfaceNamePrefix(name) => return Some(PodSources::InterfacePrefix(name.clone())),
        };
        let mut cidrs = cidrs.clone();
        cidrs.sort_unstable();
        cidrs.dedup();
        (!cidrs.is_empty()).then_some(PodSources::Cidrs(cidrs))
    }

    /// True where node ports of the family may answer at loopback addresses, if they do at any. Never
    /// in IPv6: its kernel has no `route_localnet`.
    fn allows_localhost(&self, family: Family) -> bool {
        self.localhost_node_ports
            && family == Family::V4
            && self.families.contains(&family)
            && self.node_port_addresses != NodePortAddresses::Primary
    }

    /// The ranges of the families that are planned for, without those inside another.
    fn outermost(&self, ranges: &[IpNet]) -> Vec<IpNet> {
        let planned = |range: &&IpNet| self.families.contains(&Family::of(range.addr()));
        let mut ranges: Vec<IpNet> = ranges.iter().filter(planned).copied().collect();
        // Whatever contains a range comes before it, and nothing that it does not contain between.
        ranges.sort_unstable();
        let mut outermost: Vec<IpNet> = Vec::with_capacity(ranges.len());
        for range in ranges {
            if outermost.last().is_none_or(|last| !last.contains(&range)) {
                outermost.push(range);
            }
        }
        outermost
    }

    fn node_ports(&self, family: Family, node: &NodeContext, interfaces: &[IpAddr]) -> NodePortScope {
        let localhost = self.allows_localhost(family);
        let usable = |ip: &IpAddr| Family::of(*ip) == family && (localhost || !ip.is_loopback());
        let mut addresses: Vec<IpAddr> = match &self.node_port_addresses {
            NodePortAddresses::AllLocal => return NodePortScope::AllLocal,
            NodePortAddresses::Primary if node.addresses.is_empty() => return NodePortScope::AllLocal,
            NodePortAddresses::Primary => primary(node, family).filter(usable).into_iter().collect(),
            NodePortAddresses::Cidrs(cidrs) => {
                let mut cidrs = cidrs.iter().filter(|cidr| Family::of(cidr.addr()) == family).peekable();
                if cidrs.peek().is_none() || cidrs.clone().any(|cidr| cidr.prefix_len() == 0) {
                    return NodePortScope::AllLocal;
                }
                let known = node.addresses.iter().chain(interfaces).copied().filter(usable);
                known.filter(|ip| cidrs.clone().any(|cidr| cidr.contains(ip))).collect()
            }
        };
        addresses.sort_unstable();
        addresses.dedup();
        NodePortScope::Addresses(addresses)
    }
}

impl Facts {
    /// The facts of a node under a configuration.
    pub fn new(config: &ViewConfig, node: &NodeContext) -> Self {
        let pods = config.pods(node);
        Self {
            node: config.node_name.clone(),
            zone: node.zone.clone(),
            primary: Family::ALL.map(|family| primary(node, family)),
            planned: Family::ALL.map(|family| config.families.contains(&family)),
            pods: Family::ALL.map(|family| pods.as_ref().is_some_and(|pods| pods.tells(family))),
            // The node's own ranges and interfaces tell its own pods; all others are elsewhere.
            tells_remote_pods: matches!(config.detect_local, DetectLocal::ClusterCidrs(_)),
            masquerade_all: config.masquerade_all,
            one_pool: config.one_pool,
        }
    }

    /// Primary address of the node in a family.
    pub fn primary(&self, family: Family) -> Option<IpAddr> {
        self.primary[index(family)]
    }

    /// True where the family is planned for.
    pub fn plans(&self, family: Family) -> bool {
        self.planned[index(family)]
    }

    /// True where pods of the family can be told from others.
    pub fn tells_pods(&self, family: Family) -> bool {
        self.pods[index(family)]
    }
}

/// True where load balancers may send new connections to this node: the cluster has it, and it
/// is not on its way out. What the node programs does not depend on it.
pub fn load_balancers_may_use(node: &NodeContext) -> bool {
    node.uid.is_some() && !node.being_removed
}

fn primary(node: &NodeContext, family: Family) -> Option<IpAddr> {
    node.addresses.iter().copied().find(|ip| Family::of(*ip) == family)
}

fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}
