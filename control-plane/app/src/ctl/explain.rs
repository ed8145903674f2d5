//! `explain`: the plan of a node, made once more, and one packet followed through it.
//!
//! ```text
//! GetNode ──> settings ──> ViewConfig ─┐
//! FetchSnapshot ──> State ─────────────┴─> View ──> trace, explain ──> answer ──> text | JSON | YAML
//! ```
//!
//! State, view and rules are the node's own code, so what is said here is what a node of this
//! release does once it has the state; whether it has it, its last report says.

use std::net::IpAddr;

use anyhow::Context;
use lockstep_model::{Family, Interner, NodeContext, Protocol, Resource, ServiceKey, State, Version};
use lockstep_view::View;
use lockstep_view::trace::Packet;
use lockstep_wire::v1::status_service_client::StatusServiceClient;
use lockstep_wire::v1::sync_service_client::SyncServiceClient;
use lockstep_wire::{convert, v1};
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use super::Failure;
use super::args::{Question, Transport};
use super::client;

pub(super) mod answer;
mod in_force;
mod nearby;
mod reasons;
mod settings;
pub(super) mod text;

use answer::Explanation;

/// How often everything is read again where it changed while it was read.
const TRIES: usize = 5;

/// All that an explanation is made of.
struct Evidence {
    packet: Packet,
    /// Addresses local to the node beside loopback ones, as far as the control plane knows them.
    local: Vec<IpAddr>,
    node: v1::NodeStatus,
    head_seq: u64,
    context: NodeContext,
    settings: settings::Told,
    state: State,
    view: View,
    /// seq of the last change to the Service that the packet is for; `None` = it is for none.
    last_changed_seq: Option<u64>,
    notes: Vec<String>,
}

impl Evidence {
    fn backend(&self) -> v1::BackendKind {
        self.node.backend.as_ref().map_or(v1::BackendKind::Unspecified, v1::Backend::kind)
    }

    /// True where the node's backend refuses other ports at cluster IPs.
    fn refuses_other_ports(&self) -> bool {
        matches!(self.backend(), v1::BackendKind::Nftables | v1::BackendKind::Ipvs)
    }

    /// True where it drops what is sent to addresses in a ServiceCIDR that no Service has.
    fn drops_unallocated(&self) -> bool {
        self.backend() == v1::BackendKind::Nftables
    }
}

impl Question {
    /// The packet; `Err` = a question that has no answer, for people.
    pub(super) fn packet(&self) -> Result<Packet, String> {
        let (source, destination) = (self.from.to_canonical(), self.to.ip().to_canonical());
        if Family::of(source) != Family::of(destination) {
            return Err(format!("--from {source}: is not of the family of {destination}"));
        }
        let port = self.to.port().try_into().map_err(|_| format!("{}: 0 is not a port", self.to))?;
        let protocol = match self.protocol {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
            Transport::Sctp => Protocol::Sctp,
        };
        Ok(Packet { source, interface: self.interface.clone(), destination, port, protocol })
    }
}

/// Answers the question. Reads the Services, then the endpoints of the one that it is about; where
/// the Service is another one by then, it starts anew.
pub(super) async fn explain(channel: Channel, question: &Question) -> Result<Explanation, Failure> {
    explain_with(client::status(channel.clone()), client::sync(channel), question).await
}

/// The same, with a client for each part.
pub(super) async fn explain_with(
    mut status: StatusServiceClient<Channel>,
    mut sync: SyncServiceClient<Channel>,
    question: &Question,
) -> Result<Explanation, Failure> {
    let packet = question.packet().map_err(Failure::Usage)?;
    for _ in 0..TRIES {
        let request = v1::GetNodeRequest { node_name: question.node.clone() };
        let node = status.get_node(request).await?.into_inner();
        if let Some(evidence) = gather(&mut status, &mut sync, packet.clone(), node).await? {
            return Ok(Explanation::new(&evidence));
        }
    }
    Err(anyhow::anyhow!("{}: changed each of {TRIES} times while it was read", question.to).into())
}

/// `None` = it changed in between.
async fn gather(
    status: &mut StatusServiceClient<Channel>,
    sync: &mut SyncServiceClient<Channel>,
    packet: Packet,
    response: v1::GetNodeResponse,
) -> Result<Option<Evidence>, Failure> {
    let node = response.node.unwrap_or_default();
    let head = response.head.unwrap_or_default();
    let context = convert::node_context_from_wire(&response.context.unwrap_or_default())
        .with_context(|| format!("node {}", node.node_name))?;
    let told = settings::Told::read(&node, &context, response.settings.as_ref())?;
    let mut notes = told.notes.clone();

    let mut interner = Interner::default();
    let services = fetch_services(sync, &mut notes).await?;
    let (resources, position) = snapshot(services, &mut interner, &mut notes).await?;
    if position.epoch != head.epoch {
        return Ok(None);
    }
    let mut state = State::default();
    for (version, resource) in resources {
        state.upsert(version, resource);
    }
    let mut view = View::new(told.config.clone());
    view.set_node(context.clone());
    let keys: Vec<ServiceKey> = state.service_keys().cloned().collect();
    view.update(&state, &keys);

    let local = context.addresses.clone();
    let matched = |view: &View| view.plan().trace(&packet, &local).matched.map(|it| it.key().clone());
    let mut last_changed_seq = None;
    if let Some(key) = matched(&view) {
        let one = v1::FetchSnapshotRequest {
            namespace: key.namespace.to_string(),
            service: key.name.to_string(),
            ..Default::default()
        };
        let one = sync.fetch_snapshot(one).await?.into_inner();
        let (resources, there) = snapshot(one, &mut interner, &mut notes).await?;
        for (version, resource) in resources {
            state.upsert(version, resource);
        }
        view.update(&state, std::slice::from_ref(&key));
        let request =
            v1::GetServiceRequest { namespace: key.namespace.to_string(), name: key.name.to_string() };
        let summary = match status.get_service(request).await {
            Ok(response) => response.into_inner().summary.unwrap_or_default(),
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(status.into()),
        };
        // A change after the endpoints were read is not in what is explained.
        if there.epoch != head.epoch
            || summary.last_changed_seq > there.seq
            || matched(&view).as_ref() != Some(&key)
        {
            return Ok(None);
        }
        last_changed_seq = Some(summary.last_changed_seq);
    }
    let head_seq = head.seq;
    let settings = told;
    Ok(Some(Evidence {
        packet,
        local,
        node,
        head_seq,
        context,
        settings,
        state,
        view,
        last_changed_seq,
        notes,
    }))
}

/// All Services and ServiceCIDRs. A control plane of a release that has no ServiceCIDRs refuses to
/// be asked for them; they only tell what no Service has.
async fn fetch_services(
    sync: &mut SyncServiceClient<Channel>,
    notes: &mut Vec<String>,
) -> Result<Streaming<v1::FetchSnapshotResponse>, Failure> {
    let request = |kinds: &[v1::ResourceKind]| v1::FetchSnapshotRequest {
        kinds: kinds.iter().map(|kind| i32::from(*kind)).collect(),
        ..Default::default()
    };
    let both = request(&[v1::ResourceKind::Service, v1::ResourceKind::ServiceCidr]);
    match sync.fetch_snapshot(both).await {
        Err(status) if status.code() == Code::InvalidArgument => {
            let services = sync.fetch_snapshot(request(&[v1::ResourceKind::Service])).await?;
            notes.push(
                "the control plane does not serve ServiceCIDRs: whether an address that no Service has is in \
                 one is not known"
                    .into(),
            );
            Ok(services.into_inner())
        }
        answer => Ok(answer?.into_inner()),
    }
}

/// One consistent snapshot. What this release cannot read is left out, with a note: a node of this
/// release leaves it out, too.
async fn snapshot(
    mut parts: Streaming<v1::FetchSnapshotResponse>,
    interner: &mut Interner,
    notes: &mut Vec<String>,
) -> Result<(Vec<(Version, Resource)>, v1::Position), Failure> {
    let (mut resources, mut position) = (Vec::new(), v1::Position::default());
    while let Some(part) = parts.message().await? {
        position = part.position.unwrap_or_default();
        for resource in part.batch.unwrap_or_default().upserts {
            match convert::resource_from_wire(&resource, interner) {
                Ok(read) => resources.extend(read),
                Err(it) => notes.push(format!("{} cannot be read and is left out: {}", it.object, it.fault)),
            }
        }
    }
    Ok((resources, position))
}
