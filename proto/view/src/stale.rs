//! Which established flows may not go on.
//!
//! The kernel decides once per flow where it goes. A TCP connection ends when its endpoint
//! does; a UDP client with a fixed source port goes on talking to an endpoint that is gone, or
//! to nobody where it began before there was an endpoint. Such flows are cut, so that their
//! next packet is a new one. The rules, as with kube-proxy:
//!
//! * UDP alone. TCP and SCTP flows live on: their peers find out by themselves.
//! * A flow to a frontend may stay where it is answered by an endpoint that serves, ready or
//!   shutting down, on any node: a change of policy or topology cuts nothing.
//! * Where no endpoint serves, nothing is cut: there is no better place.
//! * A flow to anything that is no frontend is somebody else's.
//!
//! Which Service has a flow is told among those that are given. So a Service is given together with
//! those that it is [`entangled`] with.

use std::net::IpAddr;
use std::sync::Arc;

use lockstep_model::{Family, Port, Protocol, ServiceKey};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::{ForwardingPlan, NodePlan, NodePortScope, ServicePlan, Surface, Target};

/// A UDP flow as the kernel tracks it, both ends of it as far as they matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Where the client sends to.
    pub destination: Target,
    /// Where answers come from: the endpoint, or `destination` where nothing was translated.
    pub answers: Target,
}

/// What is to become of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Keep,
    /// It is cut.
    Cut,
    /// It is cut if its destination is an address of this node, which only the kernel knows.
    CutIfLocal,
}

/// Where UDP flows to some Services may end.
#[derive(Debug)]
pub struct UdpFrontends<'a> {
    node: &'a NodePlan,
    addresses: FxHashMap<Target, AtAddress<'a>>,
    node_ports: FxHashMap<(Family, Port), &'a [Target]>,
}

#[derive(Debug)]
struct AtAddress<'a> {
    serving: &'a [Target],
    /// Some clients are refused or dropped there.
    not_for_all: bool,
}

/// True where the Service has UDP flows that may have to be cut.
pub fn concerns(service: &ServicePlan) -> bool {
    service.ports.iter().any(|port| !port.serving.is_empty())
}

/// Which other Services must be looked at together with those that changed: they have a node port
/// of the number that one of these has at an external or load balancer's address, or the other way
/// round. Where the address is the node's, a flow to it may be either's.
pub fn entangled<'a>(
    plan: &'a ForwardingPlan,
    changed: &'a [ServiceKey],
) -> impl Iterator<Item = &'a Arc<ServicePlan>> {
    let changed_ones = changed.iter().filter_map(|key| plan.services.get(key));
    let others: FxHashSet<_> = changed_ones
        .flat_map(|service| doors(service))
        .map(|(is_node_port, family, port)| (!is_node_port, family, port))
        .collect();
    // Few Services have UDP doors, so most changes end here.
    let all = (!others.is_empty()).then(|| plan.services.values()).into_iter().flatten();
    all.filter(move |service| {
        doors(service).any(|door| others.contains(&door)) && !changed.contains(&service.key)
    })
}

/// UDP frontends where node ports may be, too: true = a node port, its family, its number.
fn doors(service: &ServicePlan) -> impl Iterator<Item = (bool, Family, Port)> + '_ {
    let ports = service.ports.iter().filter(|port| !port.serving.is_empty());
    ports.flat_map(|port| {
        let outside = port.frontends.iter().filter(|it| !matches!(it.surface, Surface::ClusterIp(_)));
        outside.map(|it| (it.surface == Surface::NodePort, port.family, it.port))
    })
}

impl<'a> UdpFrontends<'a> {
    /// Those of `services`, all from one plan. Ports without an endpoint that serves are none.
    pub fn of(node: &'a NodePlan, services: impl IntoIterator<Item = &'a ServicePlan>) -> Self {
        let mut this = Self { node, addresses: FxHashMap::default(), node_ports: FxHashMap::default() };
        let ports = services.into_iter().flat_map(|service| &service.ports);
        for port in ports.filter(|port| port.protocol == Protocol::Udp && !port.serving.is_empty()) {
            for frontend in &port.frontends {
                match frontend.surface.address() {
                    Some(address) => {
                        let not_for_all = frontend.allowed_sources.is_some() || !frontend.forwards_all();
                        let here = AtAddress { serving: &port.serving, not_for_all };
                        this.addresses.insert(Target { address, port: frontend.port }, here);
                    }
                    None => {
                        this.node_ports.insert((port.family, frontend.port), &port.serving);
                    }
                }
            }
        }
        this
    }

    /// Families in which there is one.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        Family::ALL.into_iter().filter(|family| {
            self.addresses.keys().any(|place| Family::of(place.address) == *family)
                || self.node_ports.keys().any(|(of, _)| of == family)
        })
    }

    /// What is to become of a flow. An address beats a node port, as it does in the rules; where it
    /// is not for all clients, the others may be with the node port.
    pub fn fate(&self, flow: &Flow) -> Fate {
        let Flow { destination, answers } = flow;
        let gone = |serving: &[Target]| serving.binary_search(answers).is_err();
        let node_port = self.node_ports.get(&(Family::of(destination.address), destination.port));
        if let Some(here) = self.addresses.get(destination) {
            let behind = node_port.filter(|_| here.not_for_all && self.may_be_own(destination.address));
            let stays = !gone(here.serving) || behind.is_some_and(|serving| !gone(serving));
            return match stays {
                true => Fate::Keep,
                // A flow to another node is that one's.
                false if self.node.is_of_a_node(destination.address) => Fate::CutIfLocal,
                false => Fate::Cut,
            };
        }
        match node_port {
            Some(serving) if gone(serving) => self.at_node_port(destination.address, flow),
            _ => Fate::Keep,
        }
    }

    /// True unless node ports are known not to be at the address.
    fn may_be_own(&self, address: IpAddr) -> bool {
        match self.node.node_ports(Family::of(address)) {
            NodePortScope::AllLocal => true,
            NodePortScope::Addresses(mine) => mine.contains(&address),
        }
    }

    fn at_node_port(&self, address: IpAddr, flow: &Flow) -> Fate {
        match self.node.node_ports(Family::of(address)) {
            NodePortScope::Addresses(mine) if mine.contains(&address) => Fate::Cut,
            // Where node ports are not there, a program on this node may use the number on the
            // loopback for itself.
            NodePortScope::AllLocal
                if address.is_loopback()
                    && !self.node.has_localhost_node_ports(Family::of(address))
                    && flow.answers == flow.destination =>
            {
                Fate::Keep
            }
            NodePortScope::AllLocal => Fate::CutIfLocal,
            NodePortScope::Addresses(_) => Fate::Keep,
        }
    }
}
