//! The explanation as plain structs, with the names that scripts see: they are only added to.

use std::net::IpAddr;

use lockstep_model::{Endpoint, EndpointSet, Service};
use lockstep_view::DetectLocal;
use lockstep_view::explain::{EndpointExplanation, Exclusion, PortExplanation, explain};
use lockstep_view::select::Topology;
use lockstep_view::trace::{Answer, Masquerade, Match, ToldBy, Trace, Verdict};
use lockstep_view::{Action, Pool, Source, Surface};
use serde::Serialize;

use super::settings::node_ports;
use super::{Evidence, in_force, nearby, reasons};
use crate::ctl::view;

/// Output of `explain`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::ctl) struct Explanation {
    pub(super) node: String,
    pub(super) packet: Packet,
    pub(super) settings: Settings,
    pub(super) source: ClientClass,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service: Option<Matched>,
    pub(super) verdict: &'static str,
    pub(super) reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) forward: Option<Forward>,
    pub(super) endpoints: Vec<Candidate>,
    pub(super) nearby: Vec<String>,
    pub(super) in_force: InForce,
    pub(super) notes: Vec<String>,
}

/// The packet that is asked about.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) interface: Option<String>,
    pub(super) destination: IpAddr,
    pub(super) port: u16,
    pub(super) protocol: String,
}

/// How the node is configured.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Settings {
    /// False = the node does not say, and these are assumed.
    pub(super) known: bool,
    pub(super) detect_local_mode: &'static str,
    /// By these, where pods are told by their addresses.
    pub(super) pod_networks: Vec<String>,
    /// By this name, or beginning of one, where they are told by their interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod_interface: Option<String>,
    pub(super) node_ports: String,
    pub(super) masquerade_all: bool,
}

/// Class of the client.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ClientClass {
    pub(super) class: &'static str,
    pub(super) told_by: String,
}

/// The address that it is for.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Matched {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port_name: String,
    pub(super) port: u16,
    pub(super) surface: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_ranges: Option<SourceRanges>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) affinity_seconds: Option<u32>,
    /// Others that claim the same address and port, and do not have it.
    pub(super) also_claimed_by: Vec<String>,
    /// What this Service claims and others have.
    pub(super) conflicts: Vec<Conflict>,
}

/// Who may use a load balancer's address.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SourceRanges {
    pub(super) ranges: Vec<String>,
    pub(super) allowed: bool,
}

/// An address and port that another Service has.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Conflict {
    pub(super) surface: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) address: Option<IpAddr>,
    pub(super) port: u16,
    pub(super) protocol: String,
    pub(super) owner: String,
}

/// Where it is sent.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Forward {
    pub(super) pool: &'static str,
    pub(super) topology: &'static str,
    pub(super) masquerade: bool,
    pub(super) masquerade_reason: String,
}

/// One endpoint of the Service, in one slice.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Candidate {
    pub(super) address: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) port: Option<u16>,
    pub(super) slice: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) node: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) zone: String,
    pub(super) state: &'static str,
    /// It may answer.
    pub(super) candidate: bool,
    /// Whose address it sees: `Client`, `Node`; of candidates only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sees: Option<&'static str>,
    /// Why it is not in the pool that decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) excluded: Option<&'static str>,
    /// The same for people; of a candidate, why it sees what it sees where that is its own case.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) why: String,
}

/// Whether the node does what is explained, by its last report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct InForce {
    pub(super) state: &'static str,
    pub(super) text: String,
    pub(super) head_seq: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_changed_seq: Option<u64>,
    pub(super) applied_seq: u64,
    pub(super) verified_seq: u64,
    pub(super) failures: Vec<view::Failure>,
    pub(super) failures_unlisted: u32,
}

impl Explanation {
    /// Follows the packet.
    pub(super) fn new(evidence: &Evidence) -> Self {
        let packet = &evidence.packet;
        let trace = evidence.view.plan().trace(packet, &evidence.local);
        let service = trace.matched.as_ref().and_then(|it| evidence.state.service(it.key())).map(|it| &**it);
        let port = trace.matched.as_ref().zip(service).and_then(|(it, service)| port(evidence, it, service));
        let forward = match (trace.verdict, service, &port) {
            (Verdict::Decided(Action::Forward { pool, masquerade }), Some(service), Some(port)) => {
                Some(Forward {
                    pool: pool_name(pool),
                    topology: topology(port.topology),
                    masquerade,
                    masquerade_reason: reasons::masquerade(evidence, &trace, service).unwrap_or_default(),
                })
            }
            _ => None,
        };
        let mut notes = evidence.notes.clone();
        if evidence.context.uid.is_none() {
            notes.push(
                "the cluster has no Node object of this name: its addresses and zone are not known".into(),
            );
        }
        notes.extend(reasons::behind(evidence, &trace));
        let in_force = in_force::of(evidence, &trace);
        notes.extend(in_force::doubt(evidence, &in_force));
        Self {
            node: evidence.context.name.to_string(),
            packet: Packet {
                source: packet.source,
                interface: packet.interface.as_ref().map(ToString::to_string),
                destination: packet.destination,
                port: packet.port.get(),
                protocol: packet.protocol.to_string(),
            },
            settings: settings(evidence),
            source: client(evidence, &trace),
            service: trace.matched.as_ref().map(|it| matched(evidence, it)),
            verdict: verdict(evidence, trace.verdict),
            reason: reasons::verdict(evidence, &trace, service),
            forward,
            endpoints: port.map(|port| endpoints(evidence, &trace, &port)).unwrap_or_default(),
            nearby: if trace.matched.is_none() { nearby::services(evidence) } else { Vec::new() },
            in_force,
            notes,
        }
    }
}

fn settings(evidence: &Evidence) -> Settings {
    let config = &evidence.settings.config;
    let texts = |cidrs: &[ipnet::IpNet]| cidrs.iter().map(ToString::to_string).collect();
    let (pod_networks, pod_interface) = match &config.detect_local {
        DetectLocal::ClusterCidrs(cidrs) => (texts(cidrs), None),
        DetectLocal::NodeCidrs => (texts(&evidence.context.pod_cidrs), None),
        DetectLocal::BridgeInterface(name) | DetectLocal::InterfaceNamePrefix(name) => {
            (Vec::new(), Some(name.to_string()))
        }
    };
    Settings {
        known: evidence.settings.known,
        detect_local_mode: evidence.settings.detect_local_mode,
        pod_networks,
        pod_interface,
        node_ports: node_ports(config),
        masquerade_all: config.masquerade_all,
    }
}

fn client(evidence: &Evidence, trace: &Trace<'_>) -> ClientClass {
    let interface = evidence.packet.interface.as_ref();
    let told_by = match (trace.told_by, &evidence.settings.config.detect_local) {
        (ToldBy::PodNetwork(network), _) => format!("in {network}, a network of pods"),
        (ToldBy::PodInterface, _) => "came in by an interface of pods".into(),
        (ToldBy::LocalAddress, _) => "an address of the node".into(),
        (ToldBy::Nothing, DetectLocal::ClusterCidrs(_) | DetectLocal::NodeCidrs) => {
            "in no network of pods, and no address that the Node object names".into()
        }
        (ToldBy::Nothing, _) if interface.is_none() => {
            "pods are told by the interface they come in by, and --interface names none".into()
        }
        (ToldBy::Nothing, _) => {
            "came in by no interface of pods, and has no address that the Node object names".into()
        }
    };
    let class = match trace.source {
        Source::Pod => "Pod",
        Source::Node => "Node",
        Source::Elsewhere => "Elsewhere",
    };
    ClientClass { class, told_by }
}

fn matched(evidence: &Evidence, it: &Match<'_>) -> Matched {
    let same = |conflict: &&lockstep_view::Conflict| {
        conflict.owner == *it.key()
            && conflict.family == it.port.family
            && conflict.protocol == it.port.protocol
            && conflict.port == it.frontend.port
            && conflict.surface.address() == it.frontend.surface.address()
    };
    let others = evidence.view.plan().services.values();
    let mut also: Vec<String> = others
        .filter(|other| other.conflicts.iter().any(|conflict| same(&conflict)))
        .map(|other| other.key.to_string())
        .collect();
    also.sort();
    Matched {
        namespace: it.key().namespace.to_string(),
        name: it.key().name.to_string(),
        port_name: it.port.name.to_string(),
        port: it.port.port.get(),
        surface: surface(it.frontend.surface),
        source_ranges: it.frontend.allowed_sources.as_ref().map(|ranges| SourceRanges {
            ranges: ranges.iter().map(ToString::to_string).collect(),
            allowed: it.frontend.allows(evidence.packet.source),
        }),
        affinity_seconds: it.port.affinity_seconds,
        also_claimed_by: also,
        conflicts: it.service.conflicts.iter().map(conflict).collect(),
    }
}

fn conflict(it: &lockstep_view::Conflict) -> Conflict {
    Conflict {
        surface: surface(it.surface),
        address: it.surface.address(),
        port: it.port.get(),
        protocol: it.protocol.to_string(),
        owner: it.owner.to_string(),
    }
}

/// Every endpoint of the port that was matched.
fn port(evidence: &Evidence, it: &Match<'_>, service: &Service) -> Option<PortExplanation> {
    let sets: Vec<&EndpointSet> = evidence.state.endpoint_sets(it.key()).map(|set| &**set).collect();
    explain(service, &sets, evidence.view.facts()).into_iter().find(|port| {
        let same = &port.port;
        port.family == it.port.family
            && same.protocol == it.port.protocol
            && same.port == it.port.port
            && same.name == it.port.name
    })
}

/// The candidates first, each part in order of slice and address.
fn endpoints(evidence: &Evidence, trace: &Trace<'_>, port: &PortExplanation) -> Vec<Candidate> {
    let Some(matched) = &trace.matched else { return Vec::new() };
    let pool = match trace.verdict {
        Verdict::Decided(Action::Forward { pool, .. }) => pool,
        Verdict::Decided(Action::Drop) => Pool::Local,
        _ => Pool::Cluster,
    };
    let mut list = Vec::with_capacity(port.endpoints.len());
    for it in &port.endpoints {
        let mut sets = evidence.state.endpoint_sets(matched.key());
        let set = sets.find(|set| set.key.slice == it.slice);
        let endpoint = set.and_then(|set| set.endpoints.iter().find(|other| other.address == it.address));
        let Some(endpoint) = endpoint else { continue };
        let excluded = match pool {
            Pool::Cluster => it.not_cluster,
            Pool::Local => it.not_local,
        };
        let answer = trace.answers.iter().find(|answer| Some(answer.target) == it.target);
        list.push(candidate(it, endpoint, excluded, answer.filter(|_| excluded.is_none())));
    }
    list.sort_by_key(|it| !it.candidate);
    list
}

fn candidate(
    it: &EndpointExplanation,
    endpoint: &Endpoint,
    excluded: Option<Exclusion>,
    answer: Option<&Answer>,
) -> Candidate {
    let conditions = endpoint.conditions;
    let why = match (excluded, answer.and_then(|answer| answer.masquerade)) {
        (Some(excluded), _) => excluded.to_string(),
        (None, Some(Masquerade::Hairpin)) => "it is the client itself".into(),
        (None, _) => String::new(),
    };
    Candidate {
        address: it.address,
        port: it.target.map(|target| target.port.get()),
        slice: it.slice.to_string(),
        node: endpoint.node_name.as_deref().unwrap_or_default().to_owned(),
        zone: endpoint.zone.as_deref().unwrap_or_default().to_owned(),
        state: view::conditions(conditions.ready, conditions.serving, conditions.terminating),
        candidate: answer.is_some(),
        sees: answer.map(|answer| if answer.masquerade.is_some() { "Node" } else { "Client" }),
        excluded: excluded.map(exclusion),
        why,
    }
}

fn verdict(evidence: &Evidence, verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::OtherPort if evidence.refuses_other_ports() => "Refused",
        Verdict::Unallocated if evidence.drops_unallocated() => "Dropped",
        Verdict::LeftAlone | Verdict::OtherPort | Verdict::Unallocated => "LeftAlone",
        Verdict::SourceRefused => "DroppedBySourceRanges",
        Verdict::Decided(Action::Forward { .. }) => "Forwarded",
        Verdict::Decided(Action::Reject) => "Refused",
        Verdict::Decided(Action::Drop) => "Dropped",
    }
}

fn surface(surface: Surface) -> &'static str {
    match surface {
        Surface::ClusterIp(_) => "ClusterIP",
        Surface::ExternalIp(_) => "ExternalIP",
        Surface::LoadBalancerIp(_) => "LoadBalancerIP",
        Surface::NodePort => "NodePort",
    }
}

fn pool_name(pool: Pool) -> &'static str {
    match pool {
        Pool::Cluster => "Cluster",
        Pool::Local => "Local",
    }
}

fn topology(topology: Topology) -> &'static str {
    match topology {
        Topology::Everywhere => "Everywhere",
        Topology::ThisNode => "ThisNode",
        Topology::ThisZone => "ThisZone",
    }
}

fn exclusion(exclusion: Exclusion) -> &'static str {
    match exclusion {
        Exclusion::Family => "Family",
        Exclusion::PortMissing => "PortMissing",
        Exclusion::Duplicate => "Duplicate",
        Exclusion::NotReady => "NotReady",
        Exclusion::Terminating => "Terminating",
        Exclusion::NotLocal => "NotLocal",
        Exclusion::OtherNode => "OtherNode",
        Exclusion::OtherZone => "OtherZone",
    }
}
