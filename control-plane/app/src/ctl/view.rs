//! Answers as plain structs. Their names are what scripts see with `-o json` and `-o yaml`:
//! they are only added to. Times are RFC 3339, durations seconds.

use lockstep_wire::v1;
use serde::Serialize;

/// A point in the server's history.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Position {
    pub(super) epoch: String,
    pub(super) seq: u64,
    pub(super) digest: String,
    pub(super) resources: u64,
}

impl From<v1::Position> for Position {
    fn from(from: v1::Position) -> Self {
        let digest = from.digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { epoch: format!("{:016x}", from.epoch), seq: from.seq, digest, resources: from.resource_count }
    }
}

/// Output of `status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Overview {
    pub(super) server_id: String,
    pub(super) version: String,
    pub(super) serving: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) not_serving_reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_fresh_at: Option<String>,
    #[serde(skip)]
    pub(super) source_age: Option<f64>,
    pub(super) head: Position,
    pub(super) services: u64,
    pub(super) endpoint_sets: u64,
    pub(super) service_cidrs: u64,
    pub(super) quarantined: u32,
    pub(super) streams: u32,
    pub(super) convergence: Convergence,
    pub(super) behind: Vec<Node>,
    pub(super) behind_truncated: bool,
}

/// Output of `watch`, and part of `status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Convergence {
    pub(super) head: Position,
    pub(super) nodes_expected: u32,
    pub(super) nodes_received: u32,
    pub(super) nodes_applied: u32,
    pub(super) nodes_verified: u32,
    pub(super) nodes_degraded: u32,
    pub(super) nodes_disconnected: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_convergence_seconds: Option<f64>,
    pub(super) laggards: Vec<String>,
}

impl From<v1::WatchConvergenceResponse> for Convergence {
    fn from(from: v1::WatchConvergenceResponse) -> Self {
        Self {
            head: from.head.unwrap_or_default().into(),
            nodes_expected: from.nodes_expected,
            nodes_received: from.nodes_received,
            nodes_applied: from.nodes_applied,
            nodes_verified: from.nodes_verified,
            nodes_degraded: from.nodes_degraded,
            nodes_disconnected: from.nodes_disconnected,
            last_convergence_seconds: from.last_convergence.map(seconds),
            laggards: from.laggards,
        }
    }
}

/// Output of `services`, and part of `service`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Service {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) r#type: &'static str,
    pub(super) addresses: Vec<String>,
    pub(super) ports: Vec<String>,
    pub(super) ready_endpoints: u32,
    pub(super) total_endpoints: u32,
    pub(super) last_changed_seq: u64,
    pub(super) nodes_verified: u32,
    pub(super) nodes_expected: u32,
    pub(super) nodes_failing: u32,
}

impl From<v1::ServiceSummary> for Service {
    fn from(from: v1::ServiceSummary) -> Self {
        Self {
            r#type: match from.r#type() {
                v1::ServiceType::Unspecified => "Unknown",
                v1::ServiceType::ClusterIp => "ClusterIP",
                v1::ServiceType::NodePort => "NodePort",
                v1::ServiceType::LoadBalancer => "LoadBalancer",
            },
            namespace: from.namespace,
            name: from.name,
            addresses: from.addresses,
            ports: from.ports,
            ready_endpoints: from.ready_endpoints,
            total_endpoints: from.total_endpoints,
            last_changed_seq: from.last_changed_seq,
            nodes_verified: from.nodes_verified,
            nodes_expected: from.nodes_expected,
            nodes_failing: from.nodes_failing,
        }
    }
}

/// Output of `service`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceDetail {
    #[serde(flatten)]
    pub(super) service: Service,
    pub(super) internal_traffic_policy: &'static str,
    pub(super) external_traffic_policy: &'static str,
    pub(super) endpoint_sets: Vec<EndpointSet>,
    pub(super) nodes_behind: Vec<String>,
}

/// One EndpointSlice.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSet {
    pub(super) slice: String,
    pub(super) ports: Vec<String>,
    pub(super) endpoints: Vec<Endpoint>,
}

/// One endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Endpoint {
    pub(super) address: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) node: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) zone: String,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
}

impl From<v1::GetServiceResponse> for ServiceDetail {
    fn from(from: v1::GetServiceResponse) -> Self {
        let (mut internal, mut external) = ("Unknown", "Unknown");
        if let Some(v1::resource::Body::Service(service)) = from.service.and_then(|resource| resource.body) {
            (internal, external) =
                (policy(service.internal_traffic_policy()), policy(service.external_traffic_policy()));
        }
        let sets = from.endpoint_sets.into_iter().filter_map(|resource| match resource.body {
            Some(v1::resource::Body::EndpointSet(set)) => Some(set.into()),
            _ => None,
        });
        Self {
            service: from.summary.unwrap_or_default().into(),
            internal_traffic_policy: internal,
            external_traffic_policy: external,
            endpoint_sets: sets.collect(),
            nodes_behind: from.nodes_behind,
        }
    }
}

impl From<v1::EndpointSet> for EndpointSet {
    fn from(from: v1::EndpointSet) -> Self {
        let port = |port: &v1::EndpointPort| {
            let name = if port.name.is_empty() { String::new() } else { format!("{} ", port.name) };
            let protocol = match port.protocol() {
                v1::Protocol::Unspecified => "?",
                v1::Protocol::Tcp => "TCP",
                v1::Protocol::Udp => "UDP",
                v1::Protocol::Sctp => "SCTP",
            };
            format!("{name}{}/{protocol}", port.port)
        };
        let endpoints = from.endpoints.into_iter().map(|endpoint| Endpoint {
            address: endpoint.address,
            node: endpoint.node_name,
            zone: endpoint.zone,
            ready: endpoint.ready,
            serving: endpoint.serving,
            terminating: endpoint.terminating,
        });
        Self {
            slice: from.slice,
            ports: from.ports.iter().map(port).collect(),
            endpoints: endpoints.collect(),
        }
    }
}

impl Endpoint {
    /// In one word.
    pub(super) fn state(&self) -> &'static str {
        conditions(self.ready, self.serving, self.terminating)
    }
}

/// Conditions of an endpoint in one word.
pub(super) fn conditions(ready: bool, serving: bool, terminating: bool) -> &'static str {
    match (ready, serving, terminating) {
        (true, _, _) => "ready",
        (false, true, true) => "terminating, serving",
        (false, false, true) => "terminating",
        (false, _, false) => "not ready",
    }
}

/// Output of `nodes`, part of `node` and `status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) state: &'static str,
    pub(super) connected: bool,
    pub(super) has_node_object: bool,
    pub(super) backend: String,
    pub(super) agent_version: String,
    pub(super) instance_id: String,
    pub(super) peer: String,
    pub(super) resume: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_seen: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) behind_seconds: Option<f64>,
    pub(super) sent_seq: u64,
    pub(super) received_seq: u64,
    pub(super) applied_seq: u64,
    pub(super) verified_seq: u64,
    pub(super) backend_error: String,
    pub(super) failures: Vec<Failure>,
    pub(super) failures_truncated: u32,
    pub(super) drift_repairs: u64,
    pub(super) superseded: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_pass: Option<Pass>,
}

/// One programming pass.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pass {
    pub(super) queue_seconds: f64,
    pub(super) program_seconds: f64,
    pub(super) verify_seconds: f64,
    pub(super) coalesced: u32,
    pub(super) kernel_objects_changed: u32,
    pub(super) full_sync: bool,
}

impl From<v1::NodeStatus> for Node {
    fn from(from: v1::NodeStatus) -> Self {
        let backend = from.backend.clone().unwrap_or_default();
        let kind = match backend.kind() {
            v1::BackendKind::Unspecified => "",
            v1::BackendKind::Iptables => "iptables",
            v1::BackendKind::Nftables => "nftables",
            v1::BackendKind::Ipvs => "ipvs",
            v1::BackendKind::External => "external",
        };
        Self {
            state: state(from.state()),
            resume: match from.resume_mode() {
                v1::ResumeMode::Unspecified => "",
                v1::ResumeMode::InSync => "InSync",
                v1::ResumeMode::Delta => "Delta",
                v1::ResumeMode::Full => "Full",
            },
            backend: format!("{kind} {}", backend.version).trim().to_owned(),
            connected: from.connected,
            has_node_object: from.has_node_object,
            last_seen: from.last_seen.map(|at| at.to_string()),
            behind_seconds: from.behind_for.map(seconds),
            sent_seq: from.sent_seq,
            received_seq: from.received_seq,
            applied_seq: from.applied_seq,
            verified_seq: from.verified_seq,
            failures_truncated: from.failures_truncated,
            drift_repairs: from.drift_repairs,
            superseded: from.superseded,
            last_pass: from.last_stats.map(|stats| Pass {
                queue_seconds: stats.queue.map_or(0.0, seconds),
                program_seconds: stats.program.map_or(0.0, seconds),
                verify_seconds: stats.verify.map_or(0.0, seconds),
                coalesced: stats.coalesced,
                kernel_objects_changed: stats.kernel_objects_changed,
                full_sync: stats.full_sync,
            }),
            failures: from.failures.into_iter().map(Failure::from).collect(),
            name: from.node_name,
            agent_version: from.agent_version,
            instance_id: from.instance_id,
            peer: from.peer,
            backend_error: from.backend_error,
        }
    }
}

impl Node {
    /// Why it is not in sync, in a line.
    pub(super) fn reason(&self) -> String {
        match (self.backend_error.is_empty(), self.failures.first()) {
            (false, _) => self.backend_error.clone(),
            (true, Some(failure)) => {
                let more = self.failures.len() - 1 + self.failures_truncated as usize;
                let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
                match failure.key.as_str() {
                    "" => format!("{}{more}", failure.message),
                    key => format!("{key}: {}{more}", failure.message),
                }
            }
            (true, None) if self.failures_truncated > 0 => {
                format!("{} failures not listed", self.failures_truncated)
            }
            (true, None) => String::new(),
        }
    }
}

/// Output of `node`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeDetail {
    #[serde(flatten)]
    pub(super) node: Node,
    pub(super) head_seq: u64,
    pub(super) uid: String,
    pub(super) zone: String,
    pub(super) region: String,
    pub(super) addresses: Vec<String>,
    pub(super) pod_cidrs: Vec<String>,
    pub(super) being_removed: bool,
}

impl From<v1::GetNodeResponse> for NodeDetail {
    fn from(from: v1::GetNodeResponse) -> Self {
        let context = from.context.unwrap_or_default();
        Self {
            node: from.node.unwrap_or_default().into(),
            head_seq: from.head.unwrap_or_default().seq,
            uid: context.uid,
            zone: context.zone,
            region: context.region,
            addresses: context.addresses,
            pod_cidrs: context.pod_cidrs,
            being_removed: context.being_removed,
        }
    }
}

/// A resource that is not in force on a node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Failure {
    pub(super) kind: &'static str,
    pub(super) key: String,
    pub(super) reason: &'static str,
    pub(super) in_force: &'static str,
    pub(super) message: String,
    pub(super) retrying: bool,
    pub(super) attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) first_seen: Option<String>,
}

impl From<v1::ResourceFailure> for Failure {
    fn from(from: v1::ResourceFailure) -> Self {
        let named = from.r#ref.clone().unwrap_or_default();
        Self {
            kind: kind(named.kind()),
            key: named.key,
            reason: reason(from.reason()),
            in_force: in_force(from.in_force()),
            message: from.message,
            retrying: from.retrying,
            attempts: from.attempts,
            first_seen: from.first_seen.map(|at| at.to_string()),
        }
    }
}

/// Output of `failures`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Failures {
    pub(super) groups: Vec<FailureGroup>,
    pub(super) quarantined: Vec<Quarantined>,
    pub(super) failed_nodes: Vec<String>,
}

/// One resource failing for one reason on some nodes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FailureGroup {
    pub(super) kind: &'static str,
    pub(super) key: String,
    pub(super) reason: &'static str,
    pub(super) sample_message: String,
    pub(super) node_count: u32,
    pub(super) sample_nodes: Vec<String>,
}

/// A source object that could not be taken in.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Quarantined {
    pub(super) kind: String,
    pub(super) name: String,
    pub(super) field: String,
    pub(super) value: String,
    pub(super) reason: String,
    pub(super) in_force: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) since: Option<String>,
}

impl From<v1::ListFailuresResponse> for Failures {
    fn from(from: v1::ListFailuresResponse) -> Self {
        let groups = from.groups.into_iter().map(|group| {
            let named = group.r#ref.clone().unwrap_or_default();
            FailureGroup {
                kind: kind(named.kind()),
                key: named.key,
                reason: reason(group.reason()),
                sample_message: group.sample_message,
                node_count: group.node_count,
                sample_nodes: group.sample_nodes,
            }
        });
        let quarantined = from.quarantined.into_iter().map(|object| Quarantined {
            in_force: in_force(object.in_force()),
            since: object.since.map(|at| at.to_string()),
            kind: object.kind,
            name: object.name,
            field: object.field,
            value: object.value,
            reason: object.reason,
        });
        Self { groups: groups.collect(), quarantined: quarantined.collect(), failed_nodes: from.failed_nodes }
    }
}

/// Output of `wait`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Waited {
    pub(super) done: bool,
    pub(super) target: String,
    pub(super) level: &'static str,
    pub(super) seq: u64,
    pub(super) nodes_expected: u32,
    pub(super) nodes_done: u32,
    pub(super) waited_seconds: f64,
    pub(super) laggards: Vec<Laggard>,
}

/// A node that a wait still waits for.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Laggard {
    pub(super) node: String,
    pub(super) state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) behind_seconds: Option<f64>,
    pub(super) reason: String,
}

impl From<v1::Laggard> for Laggard {
    fn from(from: v1::Laggard) -> Self {
        Self {
            state: state(from.state()),
            node: from.node_name,
            behind_seconds: from.behind_for.map(seconds),
            reason: from.reason,
        }
    }
}

pub(super) fn seconds(duration: prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

fn policy(policy: v1::TrafficPolicy) -> &'static str {
    match policy {
        v1::TrafficPolicy::Unspecified => "Unknown",
        v1::TrafficPolicy::Cluster => "Cluster",
        v1::TrafficPolicy::Local => "Local",
    }
}

fn state(state: v1::NodeSyncState) -> &'static str {
    match state {
        v1::NodeSyncState::Unspecified => "Unknown",
        v1::NodeSyncState::InSync => "InSync",
        v1::NodeSyncState::Behind => "Behind",
        v1::NodeSyncState::Degraded => "Degraded",
        v1::NodeSyncState::Failed => "Failed",
        v1::NodeSyncState::Disconnected => "Disconnected",
        v1::NodeSyncState::NeverSeen => "NeverSeen",
    }
}

fn kind(kind: v1::ResourceKind) -> &'static str {
    match kind {
        v1::ResourceKind::Unspecified => "Unknown",
        v1::ResourceKind::Service => "Service",
        v1::ResourceKind::EndpointSet => "EndpointSet",
        v1::ResourceKind::ServiceCidr => "ServiceCIDR",
    }
}

fn reason(reason: v1::FailureReason) -> &'static str {
    match reason {
        v1::FailureReason::Unspecified => "Unknown",
        v1::FailureReason::Decode => "Decode",
        v1::FailureReason::Invalid => "Invalid",
        v1::FailureReason::Unsupported => "Unsupported",
        v1::FailureReason::Conflict => "Conflict",
        v1::FailureReason::Kernel => "Kernel",
        v1::FailureReason::Resources => "Resources",
    }
}

fn in_force(in_force: v1::InForce) -> &'static str {
    match in_force {
        v1::InForce::Unspecified => "Unknown",
        v1::InForce::Nothing => "Nothing",
        v1::InForce::Previous => "Previous",
        v1::InForce::Part => "Part",
    }
}
