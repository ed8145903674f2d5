use std::time::Instant;

use lockstep_model::ServiceKey;
use lockstep_store::{Failure, Node, NodeState};
use lockstep_wire::v1;
use tonic::Status;

use super::page_size;
use crate::convert;
use crate::hub::{Shared, invalid};

pub(super) fn list(shared: &Shared, request: &v1::ListNodesRequest) -> Result<v1::ListNodesResponse, Status> {
    let head = shared.store.head().seq;
    if request.page_token.contains('/') {
        return Err(invalid("page_token: is not one of this list's"));
    }
    let after = (!request.page_token.is_empty()).then_some(request.page_token.as_str());
    let wanted = |node: &Node| {
        (!request.only_behind || node.levels().verified != Some(head))
            && (!request.only_failing || node.degraded())
    };
    let size = page_size(request.page_size);
    let mut page: Vec<_> = shared.nodes.iter(after).filter(|(_, node)| wanted(node)).take(size + 1).collect();
    let more = page.len() > size;
    page.truncate(size);
    let next_page_token = match page.last() {
        Some((name, _)) if more => name.to_string(),
        _ => String::new(),
    };
    Ok(v1::ListNodesResponse {
        nodes: page.into_iter().map(|(name, node)| status(shared, name, node)).collect(),
        next_page_token,
        head: Some(shared.position(head)),
    })
}

pub(super) fn get(shared: &Shared, name: &str) -> Result<v1::GetNodeResponse, Status> {
    if name.is_empty() {
        return Err(invalid("node_name: is missing"));
    }
    let node = shared.nodes.get(name).ok_or_else(|| Status::not_found(format!("node {name}: not found")))?;
    let settings = node.session().and_then(|session| session.facts.settings.as_deref());
    Ok(v1::GetNodeResponse {
        node: Some(status(shared, name, node)),
        context: Some(shared.context(name)),
        head: Some(shared.position(shared.store.head().seq)),
        settings: settings.map(convert::settings_to_wire),
    })
}

fn status(shared: &Shared, name: &str, node: &Node) -> v1::NodeStatus {
    let head = shared.store.head().seq;
    let mut status = v1::NodeStatus {
        node_name: name.into(),
        state: convert::state(node.state(head)).into(),
        connected: node.connected(),
        has_node_object: node.context().is_some(),
        last_seen: node.last_seen().map(convert::timestamp),
        received_seq: node.levels().received.unwrap_or(0),
        applied_seq: node.levels().applied.unwrap_or(0),
        verified_seq: node.levels().verified.unwrap_or(0),
        behind_for: shared.nodes.behind_for(node, head, Instant::now()).map(convert::duration),
        superseded: node.superseded(),
        ..Default::default()
    };
    if let Some(session) = node.session() {
        let facts = &session.facts;
        status.agent_version = facts.agent_version.clone();
        status.instance_id = facts.instance_id.clone();
        status.backend = Some(v1::Backend {
            kind: facts.backend.kind,
            version: facts.backend.version.clone(),
            families: facts.backend.families.clone(),
        });
        status.sent_seq = session.sent.unwrap_or(0);
        status.resume_mode = convert::resume(facts.resume).into();
        status.peer = facts.peer.clone();
    }
    if let Some(report) = node.report() {
        status.failures = report.failures.iter().map(convert::failure_to_wire).collect();
        status.failures_truncated = report.failures_truncated;
        status.backend_error = report.backend_error.clone();
        status.last_stats = report.pass.map(convert::pass_to_wire);
        status.drift_repairs = report.drift_repairs;
    }
    status
}

/// What is known about a node that somebody waits for; with `service`, for that Service only.
pub(super) fn laggard(shared: &Shared, name: &str, service: Option<&ServiceKey>) -> v1::Laggard {
    let head = shared.store.head().seq;
    let Some(node) = shared.nodes.get(name) else { return v1::Laggard::default() };
    let concerns = |failure: &&Failure| service.is_none_or(|service| failure.may_concern(service));
    let fails = service.map_or(node.degraded(), |service| node.may_fail(service));
    let unlisted = node.report().map_or(0, |report| report.failures_truncated);
    let reason = match (node.state(head), node.failures().iter().find(concerns)) {
        (NodeState::NeverSeen, _) => "no stream since the server started".into(),
        (NodeState::Disconnected, _) => "no stream".into(),
        _ if !node.backend_error().is_empty() => node.backend_error().into(),
        (_, Some(failure)) => match &failure.key {
            Some(key) => format!("{key}: {}", failure.message),
            None => format!("a resource without a key: {}", failure.message),
        },
        (_, None) if fails => format!("{unlisted} failures not listed"),
        _ => String::new(),
    };
    v1::Laggard {
        node_name: name.into(),
        state: convert::state(node.state(head)).into(),
        behind_for: shared.nodes.behind_for(node, head, Instant::now()).map(convert::duration),
        reason,
    }
}
