//! How people see the answers.

use super::optional_time;
use crate::ctl::output::{Table, fields, time};
use crate::ctl::view::{Convergence, Failures, Node, NodeDetail, Overview, Service, ServiceDetail, Waited};

pub(super) fn overview(it: &Overview) -> String {
    let source = match it.source_age {
        Some(age) => format!("heard of {} ago", time(age)),
        None => "not heard of yet".into(),
    };
    let serving = match it.serving {
        true => "yes".into(),
        false => format!("no: {}", it.not_serving_reason),
    };
    let now = &it.convergence;
    let nodes = format!(
        "{} expected: {} received, {} applied, {} verified; {} with failures, {} without a stream",
        now.nodes_expected,
        now.nodes_received,
        now.nodes_applied,
        now.nodes_verified,
        now.nodes_degraded,
        now.nodes_disconnected
    );
    let quarantine = match it.quarantined {
        0 => "empty".into(),
        1 => "1 object, see `failures`".into(),
        count => format!("{count} objects, see `failures`"),
    };
    let mut text = fields(&[
        ("Serving", serving),
        ("Source", source),
        (
            "Head",
            format!(
                "seq {}, {} resources, digest {}",
                it.head.seq,
                it.head.resources,
                short(&it.head.digest)
            ),
        ),
        (
            "Services",
            format!(
                "{} with {} endpoint sets; {} ServiceCIDRs",
                it.services, it.endpoint_sets, it.service_cidrs
            ),
        ),
        ("Quarantine", quarantine),
        ("Nodes", nodes),
        (
            "Converged",
            now.last_convergence_seconds.map_or("not yet".into(), |it| format!("last in {}", time(it))),
        ),
    ]);
    if !it.behind.is_empty() {
        text.push_str("\nNot verified at the head:\n");
        text.push_str(&nodes_table(&it.behind));
    }
    if it.behind_truncated {
        text.push_str("... and more, see `nodes --behind`\n");
    }
    text
}

pub(super) fn convergence(now: &Convergence, at: prost_types::Timestamp) -> String {
    let laggards = match now.laggards.len() {
        0 => String::new(),
        _ => format!("  behind: {}", now.laggards.join(" ")),
    };
    format!(
        "{at}  seq {}  verified {}/{}  applied {}  received {}  failing {}  disconnected {}{laggards}\n",
        now.head.seq,
        now.nodes_verified,
        now.nodes_expected,
        now.nodes_applied,
        now.nodes_received,
        now.nodes_degraded,
        now.nodes_disconnected,
    )
}

pub(super) fn services(all: &[Service]) -> String {
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "TYPE",
        "ADDRESSES",
        "PORTS",
        "READY",
        "CHANGED",
        "VERIFIED",
        "FAILING",
    ]);
    for it in all {
        table.row([
            it.namespace.clone(),
            it.name.clone(),
            it.r#type.into(),
            it.addresses.join(","),
            it.ports.join(", "),
            format!("{}/{}", it.ready_endpoints, it.total_endpoints),
            it.last_changed_seq.to_string(),
            format!("{}/{}", it.nodes_verified, it.nodes_expected),
            it.nodes_failing.to_string(),
        ]);
    }
    table.text()
}

pub(super) fn service(it: &ServiceDetail) -> String {
    let summary = &it.service;
    let behind = match it.nodes_behind.len() {
        0 => "none".into(),
        _ => it.nodes_behind.join(" "),
    };
    let mut text = fields(&[
        ("Service", format!("{}/{}", summary.namespace, summary.name)),
        ("Type", summary.r#type.into()),
        ("Addresses", summary.addresses.join(", ")),
        ("Ports", summary.ports.join(", ")),
        ("Internal policy", it.internal_traffic_policy.into()),
        ("External policy", it.external_traffic_policy.into()),
        ("Endpoints", format!("{} ready of {}", summary.ready_endpoints, summary.total_endpoints)),
        ("Last changed", format!("seq {}", summary.last_changed_seq)),
        ("Verified on", format!("{} of {} nodes", summary.nodes_verified, summary.nodes_expected)),
        ("Failing on", format!("{} nodes", summary.nodes_failing)),
        ("Nodes behind", behind),
    ]);
    let mut table = Table::new(&["SLICE", "ENDPOINT", "PORTS", "STATE", "NODE", "ZONE"]);
    for set in &it.endpoint_sets {
        for endpoint in &set.endpoints {
            table.row([
                set.slice.clone(),
                endpoint.address.clone(),
                set.ports.join(", "),
                endpoint.state().into(),
                endpoint.node.clone(),
                endpoint.zone.clone(),
            ]);
        }
    }
    text.push('\n');
    text.push_str(&table.text());
    text
}

pub(super) fn nodes(all: &[Node]) -> String {
    nodes_table(all)
}

fn nodes_table(all: &[Node]) -> String {
    let mut table = Table::new(&[
        "NODE", "STATE", "BEHIND", "RECEIVED", "APPLIED", "VERIFIED", "BACKEND", "VERSION", "REASON",
    ]);
    for it in all {
        table.row([
            it.name.clone(),
            it.state.into(),
            optional_time(it.behind_seconds),
            it.received_seq.to_string(),
            it.applied_seq.to_string(),
            it.verified_seq.to_string(),
            it.backend.clone(),
            it.agent_version.clone(),
            it.reason(),
        ]);
    }
    table.text()
}

pub(super) fn node(it: &NodeDetail) -> String {
    let node = &it.node;
    let progress = format!(
        "head {}: sent {}, received {}, applied {}, verified {}",
        it.head_seq, node.sent_seq, node.received_seq, node.applied_seq, node.verified_seq
    );
    let pass = node.last_pass.as_ref().map(|pass| {
        format!(
            "queued {}, programmed in {}, verified in {}; {} kernel objects, {} transactions{}",
            time(pass.queue_seconds),
            time(pass.program_seconds),
            time(pass.verify_seconds),
            pass.kernel_objects_changed,
            pass.coalesced,
            if pass.full_sync { ", full sync" } else { "" }
        )
    });
    let object = if node.has_node_object { "yes" } else { "no: nothing in the cluster has this name" };
    let mut text = fields(&[
        ("Node", node.name.clone()),
        ("State", node.state.into()),
        ("Behind", node.behind_seconds.map_or("no".into(), |it| format!("for {}", time(it)))),
        ("Progress", progress),
        (
            "Stream",
            if node.connected { format!("from {}, {}", node.peer, node.resume) } else { "none".into() },
        ),
        ("Node object", object.into()),
        ("Backend", node.backend.clone()),
        (
            "Backend error",
            if node.backend_error.is_empty() { "none".into() } else { node.backend_error.clone() },
        ),
        ("Last pass", pass.unwrap_or_else(|| "none yet".into())),
        ("Drift repairs", node.drift_repairs.to_string()),
        ("Agent", node.agent_version.clone()),
        ("Instance", node.instance_id.clone()),
        ("Superseded", format!("{} times", node.superseded)),
        ("Last seen", node.last_seen.clone().unwrap_or_else(|| "never".into())),
        ("Addresses", it.addresses.join(", ")),
        ("Pod CIDRs", it.pod_cidrs.join(", ")),
        ("Zone", it.zone.clone()),
        ("Being removed", if it.being_removed { "yes" } else { "no" }.into()),
    ]);
    if !node.failures.is_empty() {
        let mut table = Table::new(&["KIND", "RESOURCE", "REASON", "IN FORCE", "TRIED", "SINCE", "MESSAGE"]);
        for failure in &node.failures {
            table.row([
                failure.kind.into(),
                failure.key.clone(),
                failure.reason.into(),
                failure.in_force.into(),
                format!("{}{}", failure.attempts, if failure.retrying { ", retrying" } else { "" }),
                failure.first_seen.clone().unwrap_or_default(),
                failure.message.clone(),
            ]);
        }
        text.push_str("\nNot in force:\n");
        text.push_str(&table.text());
    }
    if node.failures_truncated > 0 {
        text.push_str(&format!("... and {} more\n", node.failures_truncated));
    }
    text
}

pub(super) fn failures(it: &Failures) -> String {
    if it.groups.is_empty() && it.quarantined.is_empty() && it.failed_nodes.is_empty() {
        return "No failures.\n".into();
    }
    let mut parts = Vec::new();
    if !it.failed_nodes.is_empty() {
        parts.push(format!("Nodes whose backend cannot program: {}\n", it.failed_nodes.join(" ")));
    }
    if !it.groups.is_empty() {
        let mut table = Table::new(&["KIND", "RESOURCE", "REASON", "NODES", "MESSAGE", "FOR EXAMPLE"]);
        for group in &it.groups {
            table.row([
                group.kind.into(),
                group.key.clone(),
                group.reason.into(),
                group.node_count.to_string(),
                group.sample_message.clone(),
                group.sample_nodes.iter().take(3).cloned().collect::<Vec<_>>().join(" "),
            ]);
        }
        parts.push(format!("Not in force on some nodes:\n{}", table.text()));
    }
    if !it.quarantined.is_empty() {
        let mut table = Table::new(&["KIND", "OBJECT", "FIELD", "VALUE", "IN FORCE", "SINCE", "WHY"]);
        for object in &it.quarantined {
            table.row([
                object.kind.clone(),
                object.name.clone(),
                object.field.clone(),
                object.value.clone(),
                object.in_force.into(),
                object.since.clone().unwrap_or_default(),
                object.reason.clone(),
            ]);
        }
        parts.push(format!("Source objects in quarantine:\n{}", table.text()));
    }
    parts.join("\n")
}

pub(super) fn waited(it: &Waited) -> String {
    let result = format!(
        "{}: seq {} {} on {} of {} nodes after {}\n",
        it.target,
        it.seq,
        it.level,
        it.nodes_done,
        it.nodes_expected,
        time(it.waited_seconds)
    );
    if it.laggards.is_empty() {
        return result;
    }
    let mut table = Table::new(&["NODE", "STATE", "BEHIND", "REASON"]);
    for node in &it.laggards {
        table.row([
            node.node.clone(),
            node.state.into(),
            optional_time(node.behind_seconds),
            node.reason.clone(),
        ]);
    }
    let unnamed = (it.nodes_expected - it.nodes_done) as usize - it.laggards.len();
    let more = if unnamed > 0 { format!("... and {unnamed} more\n") } else { String::new() };
    format!("{result}\nNot done:\n{}{more}", table.text())
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}
