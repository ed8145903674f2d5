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

use std::net::IpAddr;

use lockstep_model::{Family, Port, Protocol};
use rustc_hash::FxHashMap;

use crate::{NodePlan, NodePortScope, ServicePlan, Target};

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
    addresses: FxHashMap<Target, &'a [Target]>,
    node_ports: FxHashMap<(Family, Port), &'a [Target]>,
}

/// True where the Service has UDP flows that may have to be cut.
pub fn concerns(service: &ServicePlan) -> bool {
    service.ports.iter().any(|port| !port.serving.is_empty())
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
                        this.addresses.insert(Target { address, port: frontend.port }, &port.serving);
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

    /// What is to become of a flow. An address beats a node port, as it does in the rules.
    pub fn fate(&self, flow: &Flow) -> Fate {
        let Flow { destination, answers } = flow;
        let gone = |serving: &[Target]| serving.binary_search(answers).is_err();
        if let Some(serving) = self.addresses.get(destination) {
            return if gone(serving) { Fate::Cut } else { Fate::Keep };
        }
        let family = Family::of(destination.address);
        match self.node_ports.get(&(family, destination.port)) {
            Some(serving) if gone(serving) => self.at_node_port(destination.address, flow),
            _ => Fate::Keep,
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
