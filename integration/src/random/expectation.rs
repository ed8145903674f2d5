//! What must become of a connection: the plan of the node that decides it, read aloud.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lockstep_model::{Interner, NodeContext, Port, Protocol, ServiceKey, State};
use lockstep_view::trace::{Masquerade, Packet, Trace, Verdict};
use lockstep_view::{Action, DetectLocal, ForwardingPlan, Surface, View, ViewConfig};
use lockstep_wire::convert;
use lockstep_wire::v1;
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use lockstep_wire::v1::sync_service_client::SyncServiceClient;
use tonic::transport::Channel;

use crate::lab::{Family, POD_CIDRS, Place};
use crate::product::Product;
use crate::random::objects::{Door, family_of};
use crate::traffic::Transport;

/// The plan of every node, from what a control plane serves.
#[derive(Debug)]
pub struct Plans {
    state: State,
    /// By node, from 1.
    nodes: Vec<ForwardingPlan>,
}

/// What must become of every connection from one place to one door.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// One of these answers, each of them now and then, and sees an address of this place.
    Answers {
        /// Pod and whom it sees.
        by: BTreeMap<Place, Place>,
        /// A client keeps to one of them.
        affinity: bool,
        /// One of them is the client itself, in a way that kube-proxy's nftables mode does not
        /// masquerade: by another node, or no slice says on which node it is.
        hairpin_lost_upstream: bool,
    },
    /// ICMP error or reset.
    Refused(Circumstances),
    /// Nothing comes back.
    Dropped(Circumstances),
    /// No Service is concerned, so no pod answers.
    LeftAlone,
    /// A port that a cluster IP does not have: refused in nftables mode, else left alone.
    OtherPort,
    /// An address of a ServiceCIDR that no Service has: dropped in nftables mode, else left alone.
    Unallocated,
    /// Nothing to be told: the answers take another way back than the packets came, and a node
    /// that sees half of a connection may do anything with it.
    Unclear,
}

/// What a known difference may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Circumstances {
    /// The client is the node that decides.
    pub from_node: bool,
    /// The destination is an external or a load balancer's address.
    pub external_address: bool,
    /// No endpoint is usable anywhere.
    pub no_endpoints: bool,
}

impl Plans {
    /// Asks a control plane for the state and plans every node as its agent does.
    pub fn of(product: &Product) -> Result<Self> {
        let nodes: Vec<String> =
            (1..=product.lab.nodes()).map(|node| Place::Node(node).to_string()).collect();
        let (state, contexts) = product.call(async |channel| {
            let mut status = StatusServiceClient::new(channel.clone());
            let mut contexts = Vec::new();
            for node_name in nodes {
                let request = v1::GetNodeRequest { node_name };
                let context = status.get_node(request).await?.into_inner().context;
                let context = context.context("a node without context")?;
                contexts.push(convert::node_context_from_wire(&context)?);
            }
            Ok((snapshot(SyncServiceClient::new(channel)).await?, contexts))
        })?;
        let nodes = contexts.into_iter().map(|node| plan(&state, node)).collect::<Result<_>>()?;
        Ok(Self { state, nodes })
    }

    /// What must become of a connection.
    pub fn expect(&self, from: Place, to: SocketAddr, transport: Transport) -> Result<Expected> {
        let family = family_of(to.ip());
        let packet = Packet {
            source: from.address(family),
            interface: None,
            destination: to.ip(),
            port: Port::new(to.port()).context("port 0")?,
            protocol: match transport {
                Transport::Tcp => Protocol::Tcp,
                Transport::Udp => Protocol::Udp,
                Transport::Sctp => Protocol::Sctp,
            },
        };
        let first = first_node(from, to.ip());
        let trace = self.trace(first, &packet)?;
        if trace.verdict != Verdict::LeftAlone {
            return self.translate(from, first, &trace, false);
        }
        // It goes on to the node that has the address, which decides for itself.
        match (1..=self.count()).find(|node| Place::Node(*node).address(family) == to.ip()) {
            Some(other) if other != first => self.translate(from, other, &self.trace(other, &packet)?, true),
            _ => Ok(Expected::LeftAlone),
        }
    }

    fn count(&self) -> u8 {
        u8::try_from(self.nodes.len()).unwrap_or(u8::MAX)
    }

    fn trace(&self, node: u8, packet: &Packet) -> Result<Trace<'_>> {
        let plan = self.nodes.get(usize::from(node) - 1).with_context(|| format!("no node{node}"))?;
        Ok(plan.trace(packet, &local_addresses(node)))
    }

    /// From what a node decides to what is seen from outside. `detour`: the packet came to it by
    /// another node.
    fn translate(&self, from: Place, node: u8, trace: &Trace<'_>, detour: bool) -> Result<Expected> {
        let decided = match trace.verdict {
            Verdict::LeftAlone => return Ok(Expected::LeftAlone),
            Verdict::OtherPort => return Ok(Expected::OtherPort),
            Verdict::Unallocated => return Ok(Expected::Unallocated),
            Verdict::SourceRefused => Action::Drop,
            Verdict::Decided(action) => action,
        };
        let matched = trace.matched.as_ref().context("decided by no frontend")?;
        let circumstances = Circumstances {
            from_node: from == Place::Node(node),
            external_address: matches!(
                matched.frontend.surface,
                Surface::ExternalIp(_) | Surface::LoadBalancerIp(_)
            ),
            no_endpoints: matched.frontend.action(trace.source) == Action::Reject,
        };
        match decided {
            Action::Drop => Ok(Expected::Dropped(circumstances)),
            Action::Reject => Ok(Expected::Refused(circumstances)),
            Action::Forward { .. } => {
                ensure!(!trace.answers.is_empty(), "{} forwards to nobody", matched.key());
                let mut by = BTreeMap::new();
                for answer in &trace.answers {
                    let pod = pod_at(answer.target.address)
                        .with_context(|| format!("{} is no pod", answer.target.address))?;
                    let seen = if answer.masquerade.is_some() { Place::Node(node) } else { from };
                    // The answer would not come back by this node, and the client knows nobody of
                    // the pod's address.
                    if detour && seen == from && on_node(pod) != Some(node) {
                        return Ok(Expected::Unclear);
                    }
                    by.insert(pod, seen);
                }
                let affinity = matched.port.affinity_seconds.is_some();
                let meets_itself = trace.answers.iter().any(|it| it.masquerade == Some(Masquerade::Hairpin));
                let hairpin_lost_upstream =
                    meets_itself && (detour || self.without_node(matched.key(), from));
                Ok(Expected::Answers { by, affinity, hairpin_lost_upstream })
            }
        }
    }

    fn without_node(&self, service: &ServiceKey, pod: Place) -> bool {
        let mut endpoints = self.state.endpoint_sets(service).flat_map(|set| &set.endpoints);
        endpoints.any(|it| it.node_name.is_none() && pod.address(family_of(it.address)) == it.address)
    }

    /// Every address and port of a door, and who may be asked about it.
    pub fn addresses(&self, door: &Door) -> Vec<SocketAddr> {
        match door.address {
            Some(ip) => vec![SocketAddr::new(ip, door.port)],
            None => (1..=self.count())
                .map(|node| SocketAddr::new(Place::Node(node).address(door.family), door.port))
                .collect(),
        }
    }
}

/// The state, as it is served to whoever asks.
async fn snapshot(mut sync: SyncServiceClient<Channel>) -> Result<State> {
    let mut parts = sync.fetch_snapshot(v1::FetchSnapshotRequest::default()).await?.into_inner();
    let (mut interner, mut state) = (Interner::default(), State::default());
    while let Some(part) = parts.message().await? {
        for resource in part.batch.unwrap_or_default().upserts {
            let read = convert::resource_from_wire(&resource, &mut interner)?;
            let (version, resource) = read.context("a resource of no known kind")?;
            state.upsert(version, resource);
        }
    }
    Ok(state)
}

fn plan(state: &State, node: NodeContext) -> Result<ForwardingPlan> {
    let mut config = ViewConfig::new(node.name.clone());
    let cidrs = POD_CIDRS.split(',').map(str::parse).collect::<Result<_, _>>()?;
    config.detect_local = DetectLocal::ClusterCidrs(cidrs);
    let mut view = View::new(config);
    view.set_node(node);
    let keys: Vec<ServiceKey> = state.service_keys().cloned().collect();
    view.update(state, &keys);
    Ok(view.plan().clone())
}

fn local_addresses(node: u8) -> Vec<IpAddr> {
    let place = Place::Node(node);
    let mut all = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    all.extend([Family::V4, Family::V6].map(|family| place.address(family)));
    all
}

/// The node that a connection meets first: see the routes of `outside` in the lab.
fn first_node(from: Place, to: IpAddr) -> u8 {
    if let Place::Node(node) | Place::Pod(node, _) = from {
        return node;
    }
    match to {
        IpAddr::V4(ip) => match ip.octets() {
            [10, 200, 0, last] => last - 10,
            [198, 51, 100, _] => 2,
            [203, 0, 113, _] => 3,
            _ => 1,
        },
        IpAddr::V6(ip) => match ip.segments() {
            [0xfd00, 0x200, .., last] => u8::try_from(last - 0x10).unwrap_or(1),
            [0x2001, 0xdb8, node, ..] => u8::try_from(node).unwrap_or(1),
            _ => 1,
        },
    }
}

fn on_node(place: Place) -> Option<u8> {
    match place {
        Place::Node(node) | Place::Pod(node, _) => Some(node),
        _ => None,
    }
}

fn pod_at(address: IpAddr) -> Option<Place> {
    let mut places = (1..=9).flat_map(|node| (1..=9).map(move |pod| Place::Pod(node, pod)));
    places.find(|place| place.address(family_of(address)) == address)
}
