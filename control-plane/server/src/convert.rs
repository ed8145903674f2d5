//! Between what the store keeps and what the wire says.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use lockstep_model::{Digest, InvalidField, NodeContext, check_name};
use lockstep_store::{
    BackendFacts, Facts, Failure, FailureClass, InForce, Levels, NodeSettings, NodeState, Outcome, Pass,
    Position, Report, Resume,
};
use lockstep_wire::{convert, v1};
use prost_types::Timestamp;

/// Most bytes kept of one text for people.
const MAX_TEXT: usize = 512;

/// Most networks that one setting of a node may have.
const MAX_NETWORKS: usize = 256;
/// The longest text of a network: an IPv6 address whose end is written as IPv4, and three digits.
const MAX_NETWORK: usize = 49;
/// The longest name of a network interface: IFNAMSIZ without its zero byte.
const MAX_INTERFACE: usize = 15;
/// Most addresses of nodes that nodes are told of, so that a message has room for them: the longest
/// text of one takes 41 bytes.
pub(crate) const MAX_NODE_ADDRESSES: usize = 16_384;

pub(crate) fn position(position: Position) -> v1::Position {
    v1::Position {
        epoch: position.epoch,
        seq: position.seq,
        digest: convert::digest_to_wire(position.digest),
        source_revisions: Vec::new(),
        resource_count: position.resources,
    }
}

/// The wall-clock time of an instant.
pub(crate) fn timestamp(at: Instant) -> Timestamp {
    Timestamp::from(SystemTime::now() - at.elapsed())
}

pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    // Fails above 290,000 million years only.
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

/// Negative and absent durations are none.
pub(crate) fn optional_duration(duration: Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(duration?).ok()
}

pub(crate) fn resume(resume: Resume) -> v1::ResumeMode {
    match resume {
        Resume::InSync => v1::ResumeMode::InSync,
        Resume::Delta => v1::ResumeMode::Delta,
        Resume::Full => v1::ResumeMode::Full,
    }
}

pub(crate) fn state(state: NodeState) -> v1::NodeSyncState {
    match state {
        NodeState::InSync => v1::NodeSyncState::InSync,
        NodeState::Behind => v1::NodeSyncState::Behind,
        NodeState::Degraded => v1::NodeSyncState::Degraded,
        NodeState::Failed => v1::NodeSyncState::Failed,
        NodeState::Disconnected => v1::NodeSyncState::Disconnected,
        NodeState::NeverSeen => v1::NodeSyncState::NeverSeen,
    }
}

/// Facts of a Hello; what is for people only is shortened, never refused.
pub(crate) fn facts(hello: v1::Hello, peer: String, resume: Resume) -> Result<Facts, InvalidField> {
    let fault = |field: &str, value: String, reason: &str| InvalidField {
        field: field.into(),
        value,
        reason: reason.into(),
    };
    let length = |text: &str| format!("{} bytes", text.len());
    check_name("hello.node_name", &hello.node_name)?;
    if !(1..=64).contains(&hello.instance_id.len()) {
        return Err(fault("hello.instance_id", length(&hello.instance_id), "is not a text of 1 to 64 bytes"));
    }
    let backend = hello.backend.unwrap_or_default();
    Ok(Facts {
        node_name: hello.node_name.into(),
        instance_id: hello.instance_id,
        started: hello.started_at.and_then(|at| SystemTime::try_from(at).ok()),
        agent_version: shorten(hello.agent_version),
        backend: BackendFacts {
            kind: backend.kind,
            version: shorten(backend.version),
            families: backend.families.into_iter().take(2).collect(),
        },
        settings: hello.settings.and_then(settings).map(Box::new),
        peer,
        resume,
    })
}

/// What the operator decided for a node. A part of it would say something else than the whole, so
/// what has no room, or is none of what it should be, is not kept at all.
fn settings(from: v1::NodeSettings) -> Option<NodeSettings> {
    let is_network = |text: &String| text.len() <= MAX_NETWORK && text.parse::<IpNet>().is_ok();
    let are_networks = |texts: &[String]| texts.len() <= MAX_NETWORKS && texts.iter().all(is_network);
    if !are_networks(&from.cluster_cidrs)
        || !are_networks(&from.node_port_cidrs)
        || from.pod_interface.len() > MAX_INTERFACE
    {
        return None;
    }
    Some(NodeSettings {
        detect_local_mode: from.detect_local_mode,
        cluster_cidrs: from.cluster_cidrs,
        pod_interface: from.pod_interface,
        node_port_addresses: from.node_port_addresses,
        node_port_cidrs: from.node_port_cidrs,
        masquerade_all: from.masquerade_all,
        masquerade_mark: from.masquerade_mark,
        loopback_node_ports: from.loopback_node_ports,
    })
}

pub(crate) fn settings_to_wire(from: &NodeSettings) -> v1::NodeSettings {
    v1::NodeSettings {
        detect_local_mode: from.detect_local_mode,
        cluster_cidrs: from.cluster_cidrs.clone(),
        pod_interface: from.pod_interface.clone(),
        node_port_addresses: from.node_port_addresses,
        node_port_cidrs: from.node_port_cidrs.clone(),
        masquerade_all: from.masquerade_all,
        masquerade_mark: from.masquerade_mark,
        loopback_node_ports: from.loopback_node_ports,
    }
}

/// A report. Too long texts are cut, and a failure whose resource cannot be read is kept without
/// one: a report is about the node's state, and no node must lose its stream over one line of it.
pub(crate) fn report(ack: v1::Ack) -> Result<Report, InvalidField> {
    let position = ack.position.ok_or_else(|| InvalidField {
        field: "ack.position".into(),
        value: String::new(),
        reason: "is missing".into(),
    })?;
    Ok(Report {
        epoch: position.epoch,
        levels: Levels {
            received: reached(ack.received_seq),
            applied: reached(ack.applied_seq),
            verified: reached(ack.verified_seq),
        },
        outcome: outcome(v1::Outcome::try_from(ack.outcome).unwrap_or_default()),
        digest: Digest::from_bytes(&position.digest),
        failures: ack.failures.into_iter().map(failure).collect(),
        failures_truncated: ack.failures_truncated,
        backend_error: shorten(ack.backend_error),
        pass: ack.stats.map(pass),
        drift_repairs: ack.drift_repairs,
    })
}

/// 0 = nothing of this epoch yet.
fn reached(seq: u64) -> Option<u64> {
    (seq != 0).then_some(seq)
}

fn failure(failure: v1::ResourceFailure) -> Failure {
    let (in_force, reason) = (failure.in_force(), failure.reason());
    let (mut class, mut message) = (class_from_wire(reason), failure.message);
    let (key, version) = match failure.r#ref.as_ref().map(convert::key_from_wire) {
        Some(Ok((key, version))) => (Some(key), version),
        // The node could not read the key, or does not know the kind: that has no name here either.
        None => (None, None),
        Some(Err(fault)) => {
            message = format!("{message} (ref.{fault})");
            // Without a key, UNSUPPORTED would say that no Service is concerned.
            if class == FailureClass::Unsupported {
                class = FailureClass::Unknown;
            }
            (None, None)
        }
    };
    Failure {
        key,
        version,
        in_force: match in_force {
            v1::InForce::Unspecified => InForce::Unknown,
            v1::InForce::Nothing => InForce::Nothing,
            v1::InForce::Previous => InForce::Previous,
            v1::InForce::Part => InForce::Part,
        },
        class,
        message: Arc::from(shorten(message)),
        retrying: failure.retrying,
        attempts: failure.attempts,
        first_seen: failure.first_seen.and_then(|at| SystemTime::try_from(at).ok()),
    }
}

fn outcome(outcome: v1::Outcome) -> Outcome {
    match outcome {
        v1::Outcome::Unspecified => Outcome::Unknown,
        v1::Outcome::Received => Outcome::Received,
        v1::Outcome::Applied => Outcome::Applied,
        v1::Outcome::Verified => Outcome::Verified,
        v1::Outcome::Partial => Outcome::Partial,
        v1::Outcome::Failed => Outcome::Failed,
    }
}

fn pass(stats: v1::ProgrammingStats) -> Pass {
    Pass {
        queue: optional_duration(stats.queue),
        program: optional_duration(stats.program),
        verify: optional_duration(stats.verify),
        coalesced: stats.coalesced,
        kernel_objects_changed: stats.kernel_objects_changed,
        full_sync: stats.full_sync,
    }
}

pub(crate) fn pass_to_wire(pass: Pass) -> v1::ProgrammingStats {
    v1::ProgrammingStats {
        queue: pass.queue.map(duration),
        program: pass.program.map(duration),
        verify: pass.verify.map(duration),
        coalesced: pass.coalesced,
        kernel_objects_changed: pass.kernel_objects_changed,
        full_sync: pass.full_sync,
    }
}

pub(crate) fn failure_to_wire(failure: &Failure) -> v1::ResourceFailure {
    v1::ResourceFailure {
        r#ref: failure.key.as_ref().map(|key| convert::key_to_wire(key, failure.version)),
        in_force: match failure.in_force {
            InForce::Unknown => v1::InForce::Unspecified,
            InForce::Nothing => v1::InForce::Nothing,
            InForce::Previous => v1::InForce::Previous,
            InForce::Part => v1::InForce::Part,
        }
        .into(),
        reason: class_to_wire(failure.class).into(),
        message: failure.message.to_string(),
        retrying: failure.retrying,
        attempts: failure.attempts,
        first_seen: failure.first_seen.map(Timestamp::from),
    }
}

fn class_from_wire(class: v1::FailureReason) -> FailureClass {
    match class {
        v1::FailureReason::Unspecified => FailureClass::Unknown,
        v1::FailureReason::Decode => FailureClass::Decode,
        v1::FailureReason::Invalid => FailureClass::Invalid,
        v1::FailureReason::Unsupported => FailureClass::Unsupported,
        v1::FailureReason::Conflict => FailureClass::Conflict,
        v1::FailureReason::Kernel => FailureClass::Kernel,
        v1::FailureReason::Resources => FailureClass::Resources,
    }
}

pub(crate) fn class_to_wire(class: FailureClass) -> v1::FailureReason {
    match class {
        FailureClass::Unknown => v1::FailureReason::Unspecified,
        FailureClass::Decode => v1::FailureReason::Decode,
        FailureClass::Invalid => v1::FailureReason::Invalid,
        FailureClass::Unsupported => v1::FailureReason::Unsupported,
        FailureClass::Conflict => v1::FailureReason::Conflict,
        FailureClass::Kernel => v1::FailureReason::Kernel,
        FailureClass::Resources => v1::FailureReason::Resources,
    }
}

/// Facts of a node; of one whose object the source does not have, its name. `node_addresses`: see
/// [`NodeContext`], sorted.
pub(crate) fn context(
    context: Option<&NodeContext>,
    name: &str,
    node_addresses: &[IpAddr],
) -> v1::NodeContext {
    let mut message = match context {
        Some(context) => convert::node_context_to_wire(context),
        None => convert::node_context_to_wire(&NodeContext::unknown(name)),
    };
    let told = node_addresses.iter().take(MAX_NODE_ADDRESSES);
    message.node_addresses = told.map(ToString::to_string).collect();
    message
}

fn shorten(mut text: String) -> String {
    text.truncate(shortened(&text, MAX_TEXT).len());
    text
}

/// The longest start of a text that is at most so many bytes long.
pub(crate) fn shortened(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}
