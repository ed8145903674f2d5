//! What a plan does with one packet: the plan, read aloud.
//!
//! Plain and slow on purpose (it looks at every Service), and independent of every backend. So it
//! serves two: people, who want to know what a node is meant to do, and tests, which compare it
//! with what a kernel does with packets.
//!
//! One thing is not in it: where the plan refuses or drops a packet to an address of a Service at
//! which node ports answer too, the rules may find a node port of the same number, as kube-proxy's
//! do. Without an endpoint they have nothing for the address in any mode; by policy or source
//! ranges, nothing in iptables mode, while nftables mode drops. [`ForwardingPlan::node_port_behind`]
//! says whose node port that is.

use std::net::IpAddr;

use ipnet::IpNet;
use lockstep_model::{Family, Port, Protocol, ServiceKey};

use crate::{
    Action, ForwardingPlan, Frontend, InterfaceName, NodePlan, NodePortScope, PodSources, Pool, PortPlan,
    ServicePlan, Source, Surface, Target,
};

/// The first packet of a new connection, as it comes to the node or starts there, before anybody
/// translates it. Both addresses are of one family; where they are not, nothing matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Where it comes from.
    pub source: IpAddr,
    /// The interface it comes in by; `None` = none, as for packets of the node itself, or not known.
    pub interface: Option<InterfaceName>,
    /// Where it is sent.
    pub destination: IpAddr,
    /// Port at the destination.
    pub port: Port,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// Every decision about one packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace<'a> {
    /// Class of its source.
    pub source: Source,
    /// By what the class is told.
    pub told_by: ToldBy,
    /// The address that it is for; `None` = no Service has it, and the packet is left alone.
    pub matched: Option<Match<'a>>,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Who may answer, in order of the pool: one of them at random, unless session affinity
    /// remembers one for the client. Empty unless it is forwarded.
    pub answers: Vec<Answer>,
}

/// By what the class of a source is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToldBy {
    /// The source is in this network of pods.
    PodNetwork(IpNet),
    /// It comes in by the interface of pods, or one whose name begins like theirs.
    PodInterface,
    /// The source is an address local to the node.
    LocalAddress,
    /// It is neither, so it is from elsewhere.
    Nothing,
}

/// The frontend that a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match<'a> {
    /// Whose it is.
    pub service: &'a ServicePlan,
    /// The Service port.
    pub port: &'a PortPlan,
    /// Address and port.
    pub frontend: &'a Frontend,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No Service has the destination: it goes where the routes lead.
    LeftAlone,
    /// The destination is a cluster IP, and it has no such port: refused where the backend can, as
    /// nftables does, else left alone.
    OtherPort,
    /// No Service has the destination, which is in a ServiceCIDR: dropped where the backend can, as
    /// nftables does, else left alone.
    Unallocated,
    /// Its source may not use the address: it is dropped before anything else is decided.
    SourceRefused,
    /// What the frontend says for the class of its source.
    Decided(Action),
}

/// One endpoint that may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The endpoint.
    pub target: Target,
    /// Why it sees an address of the node instead of the client's; `None` = it sees the client's.
    pub masquerade: Option<Masquerade>,
}

/// Why a packet is masqueraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masquerade {
    /// The action says so, for every target of the pool.
    Action,
    /// The client is the target: it would answer itself past the node.
    Hairpin,
}

impl ForwardingPlan {
    /// Follows a packet. `local` are the addresses local to the node, as far as they are known: by
    /// them the node's own packets and, with [`NodePortScope::AllLocal`], its node ports are told.
    /// Loopback addresses need not be among them.
    pub fn trace(&self, packet: &Packet, local: &[IpAddr]) -> Trace<'_> {
        let (source, told_by) = self.node.classify(packet, local);
        let matched = self.frontend(packet, local);
        let verdict = match &matched {
            None => self.beside(packet),
            Some(it) if !it.frontend.allows(packet.source) => Verdict::SourceRefused,
            Some(it) => Verdict::Decided(it.frontend.action(source)),
        };
        let answers = match (verdict, &matched) {
            (Verdict::Decided(Action::Forward { pool, masquerade }), Some(it)) => {
                it.port.answers(pool, masquerade, packet.source)
            }
            _ => Vec::new(),
        };
        Trace { source, told_by, matched, verdict, answers }
    }

    /// The frontend that a packet is for. One with an address comes before a node port.
    fn frontend(&self, packet: &Packet, local: &[IpAddr]) -> Option<Match<'_>> {
        if Family::of(packet.source) != Family::of(packet.destination) {
            return None;
        }
        let others = self.node.is_of_a_node(packet.destination) && !is_local(packet.destination, local);
        let by_address = |surface: Surface| surface.address() == Some(packet.destination) && !others;
        self.find(packet, by_address).or_else(|| self.node_port(packet, local))
    }

    /// The node port that a packet is for, whoever has its destination as an address. Those at
    /// loopback addresses are for the node itself.
    fn node_port(&self, packet: &Packet, local: &[IpAddr]) -> Option<Match<'_>> {
        let here = self.node.has_node_ports_at(packet.destination, local)
            && (!packet.destination.is_loopback() || is_local(packet.source, local));
        here.then(|| self.find(packet, |surface| surface == Surface::NodePort)).flatten()
    }

    /// The node port that may decide about a packet although the plan refuses or drops it, as the
    /// head of this module says; `None` = there is none, or the packet is neither refused nor
    /// dropped at an address of a Service.
    pub fn node_port_behind(&self, packet: &Packet, local: &[IpAddr]) -> Option<Match<'_>> {
        let trace = self.trace(packet, local);
        let refused =
            matches!(trace.verdict, Verdict::SourceRefused | Verdict::Decided(Action::Reject | Action::Drop));
        trace.matched.filter(|it| refused && it.frontend.surface != Surface::NodePort)?;
        self.node_port(packet, local)
    }

    /// What becomes of a packet to no frontend.
    fn beside(&self, packet: &Packet) -> Verdict {
        let destination = packet.destination;
        if Family::of(packet.source) != Family::of(destination) {
            return Verdict::LeftAlone;
        }
        if self.with_cluster_ip(destination).is_some() {
            return Verdict::OtherPort;
        }
        match self.node.service_cidrs.iter().any(|range| range.contains(&destination)) {
            true => Verdict::Unallocated,
            false => Verdict::LeftAlone,
        }
    }

    /// The Service that has a cluster IP, at whatever port.
    pub fn with_cluster_ip(&self, address: IpAddr) -> Option<&ServiceKey> {
        let mut services = self.services.values();
        services.find(|service| service.cluster_ips.contains(&address)).map(|service| &service.key)
    }

    fn find(&self, packet: &Packet, wanted: impl Fn(Surface) -> bool) -> Option<Match<'_>> {
        self.services.values().find_map(|service| {
            let ports = service.ports.iter().filter(|port| {
                port.protocol == packet.protocol && port.family == Family::of(packet.destination)
            });
            let mut frontends =
                ports.flat_map(|port| port.frontends.iter().map(move |frontend| (port, frontend)));
            let (port, frontend) =
                frontends.find(|(_, frontend)| frontend.port == packet.port && wanted(frontend.surface))?;
            Some(Match { service, port, frontend })
        })
    }
}

/// Every loopback address is the node's: all of 127.0.0.0/8, and ::1.
fn is_local(address: IpAddr, local: &[IpAddr]) -> bool {
    address.is_loopback() || local.contains(&address)
}

impl NodePlan {
    /// Class of the source. The first that matches counts: pod, then node, then anything else.
    pub fn classify(&self, packet: &Packet, local: &[IpAddr]) -> (Source, ToldBy) {
        let came_in_by = |fits: &dyn Fn(&str) -> bool| {
            let name = packet.interface.as_ref().map(InterfaceName::as_str);
            name.is_some_and(fits).then_some(ToldBy::PodInterface)
        };
        let pod = self.pods.as_ref().and_then(|pods| match pods {
            PodSources::Cidrs(cidrs) => {
                let network = cidrs.iter().find(|cidr| cidr.contains(&packet.source));
                network.map(|network| ToldBy::PodNetwork(*network))
            }
            PodSources::Interface(wanted) => came_in_by(&|name| name == wanted.as_str()),
            PodSources::InterfacePrefix(prefix) => came_in_by(&|name| name.starts_with(prefix.as_str())),
        });
        match pod {
            Some(told_by) => (Source::Pod, told_by),
            None if is_local(packet.source, local) => (Source::Node, ToldBy::LocalAddress),
            None => (Source::Elsewhere, ToldBy::Nothing),
        }
    }

    /// True where node ports answer at an address; at a loopback address, to the node itself alone.
    pub fn has_node_ports_at(&self, address: IpAddr, local: &[IpAddr]) -> bool {
        let family = Family::of(address);
        if address.is_loopback() && !self.has_localhost_node_ports(family) {
            return false;
        }
        match self.node_ports(family) {
            NodePortScope::AllLocal => is_local(address, local),
            NodePortScope::Addresses(addresses) => addresses.contains(&address),
        }
    }
}

impl Frontend {
    /// True where a source may use it.
    pub fn allows(&self, source: IpAddr) -> bool {
        self.allowed_sources.as_ref().is_none_or(|ranges| ranges.iter().any(|range| range.contains(&source)))
    }
}

impl PortPlan {
    fn answers(&self, pool: Pool, masquerade: bool, source: IpAddr) -> Vec<Answer> {
        let answer = |target: &Target| {
            let meets_itself = target.address == source && self.hairpin.contains(target);
            let masquerade = match (masquerade, meets_itself) {
                (true, _) => Some(Masquerade::Action),
                (false, true) => Some(Masquerade::Hairpin),
                (false, false) => None,
            };
            Answer { target: *target, masquerade }
        };
        self.pool(pool).iter().map(answer).collect()
    }
}

impl Match<'_> {
    /// Name of the Service.
    pub fn key(&self) -> &ServiceKey {
        &self.service.key
    }
}
