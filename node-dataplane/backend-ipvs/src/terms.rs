//! What differs between nodes.

use std::net::IpAddr;
use std::sync::Arc;

use lockstep_kernel::ipvs::Key;
use lockstep_model::Family;
use lockstep_view::{NodePlan, NodePortScope, PodSources, ServicePlan, Surface};
use rustc_hash::FxHashSet;

use crate::render::number;

/// What the rendering of Services and the chains depend on, beside a Service's plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) scheduler: Arc<str>,
    pub(crate) mark: u32,
    pub(crate) pods: Option<PodSources>,
    /// Those that work here.
    pub(crate) families: Vec<Family>,
    /// Node ports answer at every local address.
    all_local: [bool; 2],
    /// Addresses of the node's other interfaces, sorted.
    pub(crate) own: Vec<IpAddr>,
    node_ports: [Vec<IpAddr>; 2],
    /// Addresses of other nodes that Services name, sorted: these are left alone.
    others: Vec<IpAddr>,
    /// What Services have at the node's own addresses by external or load-balancer addresses: a node
    /// port of that number is not there.
    pub(crate) taken: Arc<FxHashSet<Key>>,
}

impl Terms {
    /// `own`: addresses of every interface but ours, sorted.
    pub(crate) fn new(
        scheduler: &Arc<str>,
        families: Vec<Family>,
        node: &NodePlan,
        own: Vec<IpAddr>,
    ) -> Self {
        let all_local = Family::ALL.map(|family| *node.node_ports(family) == NodePortScope::AllLocal);
        let node_ports = Family::ALL.map(|family| {
            let usable = own.iter().copied().filter(|ip| Family::of(*ip) == family && is_usable(*ip));
            match node.node_ports(family) {
                NodePortScope::AllLocal => usable.collect(),
                NodePortScope::Addresses(all) => usable.filter(|ip| all.contains(ip)).collect(),
            }
        });
        let all = node.node_addresses.iter().copied();
        let others = all.filter(|ip| own.binary_search(ip).is_err()).collect();
        let (scheduler, pods) = (Arc::clone(scheduler), node.pods.clone());
        let taken = Arc::default();
        let mark = node.masquerade_mark;
        Self { scheduler, mark, pods, families, all_local, own, node_ports, others, taken }
    }

    /// Addresses that node ports of a family answer at.
    pub(crate) fn node_ports(&self, family: Family) -> &[IpAddr] {
        &self.node_ports[index(family)]
    }

    /// Node ports answer at every local address.
    pub(crate) fn all_local(&self, family: Family) -> bool {
        self.all_local[index(family)]
    }

    /// Addresses that the node has for others to see.
    pub(crate) fn visible(&self) -> impl Iterator<Item = &IpAddr> {
        self.own.iter().filter(|ip| is_usable(**ip))
    }

    /// What a Service takes of the node's own addresses, see [`taken`](Self::taken). Sorted.
    pub(crate) fn takes(&self, plan: &ServicePlan) -> Vec<Key> {
        let mut keys = Vec::new();
        for port in &plan.ports {
            for frontend in &port.frontends {
                if let Surface::ExternalIp(ip) | Surface::LoadBalancerIp(ip) = frontend.surface
                    && self.is_own(ip)
                {
                    let protocol = number(port.protocol);
                    keys.push(Key { protocol, address: ip, port: frontend.port.get() });
                }
            }
        }
        keys.sort_unstable();
        keys
    }

    /// True where the address is another node's: were it bound here, or a virtual server, this node
    /// would take for itself what is sent there.
    pub(crate) fn is_of_another_node(&self, ip: IpAddr) -> bool {
        self.others.binary_search(&ip).is_ok()
    }

    /// True where another interface of the node has the address: then it is not ours to bind.
    pub(crate) fn is_own(&self, ip: IpAddr) -> bool {
        self.own.binary_search(&ip).is_ok()
    }
}

/// Loopback addresses lead nowhere in IPVS, and a link-local one is not the node's alone.
fn is_usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

fn index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}
