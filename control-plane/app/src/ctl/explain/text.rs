//! How people see it.

use std::net::SocketAddr;

use super::answer::{Candidate, Explanation, Forward, Matched};
use crate::ctl::output::{Table, fields, time};

/// The decisions in their order, the endpoints, and what a reader must know.
pub(in crate::ctl) fn explanation(it: &Explanation) -> String {
    let packet = &it.packet;
    let to = SocketAddr::new(packet.destination, packet.port);
    let class = match it.source.class {
        "Pod" => "a pod",
        "Node" => "the node itself",
        _ => "elsewhere",
    };
    let mut lines = vec![
        ("Packet", format!("{} -> {to}/{}, a new connection at {}", packet.source, packet.protocol, it.node)),
        ("Client", format!("{class}: {}", it.source.told_by)),
    ];
    if let Some(service) = &it.service {
        lines.extend(service_lines(service));
    }
    lines.push(("Verdict", format!("{}: {}", verdict(it), it.reason)));
    if let Some(forward) = &it.forward {
        lines.extend(forward_lines(it, forward));
    }
    lines.push(("In force", it.in_force.text.clone()));
    let mut text = fields(&lines);
    if !it.endpoints.is_empty() {
        text.push('\n');
        text.push_str(&endpoints(&it.endpoints));
    }
    for (title, list) in [("Close to it", &it.nearby), ("Notes", &it.notes)] {
        if !list.is_empty() {
            text.push_str(&format!("\n{title}:\n"));
            list.iter()
                .for_each(|line| text.push_str(&format!("  {}\n", crate::ctl::output::one_line(line))));
        }
    }
    text
}

fn service_lines(service: &Matched) -> Vec<(&'static str, String)> {
    let surface = match service.surface {
        "ClusterIP" => "its cluster IP",
        "ExternalIP" => "an external IP",
        "LoadBalancerIP" => "a load balancer's address",
        _ => "its node port",
    };
    let name = match service.port_name.as_str() {
        "" => String::new(),
        name => format!("{name} "),
    };
    let mut lines = vec![(
        "Service",
        format!("{}/{}, port {name}{}, by {surface}", service.namespace, service.name, service.port),
    )];
    if let Some(ranges) = &service.source_ranges {
        let allowed = if ranges.allowed { "let the client in" } else { "do not let the client in" };
        lines.push(("Source ranges", format!("{} {allowed}", ranges.ranges.join(", "))));
    }
    if !service.also_claimed_by.is_empty() {
        let others = service.also_claimed_by.join(", ");
        lines.push(("Also claimed", format!("by {others}, which do not have it")));
    }
    for conflict in &service.conflicts {
        let place = match conflict.address {
            Some(address) => SocketAddr::new(address, conflict.port).to_string(),
            None => format!("node port {}", conflict.port),
        };
        lines.push(("Conflict", format!("{place}/{} is {}'s", conflict.protocol, conflict.owner)));
    }
    lines
}

fn verdict(it: &Explanation) -> String {
    match it.verdict {
        "LeftAlone" => "left alone".into(),
        "DroppedBySourceRanges" | "Dropped" => "dropped".into(),
        "Refused" => "refused (ICMP port unreachable)".into(),
        _ => match it.endpoints.iter().filter(|it| it.candidate).count() {
            1 => "forwarded to 1 endpoint".into(),
            count => format!("forwarded to one of {count} endpoints"),
        },
    }
}

fn forward_lines(it: &Explanation, forward: &Forward) -> Vec<(&'static str, String)> {
    let pool = match (forward.pool, forward.topology) {
        ("Local", _) => "endpoints on this node".into(),
        (_, "ThisNode") => "ready endpoints whose hints name this node".into(),
        (_, "ThisZone") => "ready endpoints whose hints name this node's zone".into(),
        _ => "endpoints on every node".to_owned(),
    };
    let seen = if forward.masquerade { "an address of the node" } else { "the client's" };
    let affinity = match it.service.as_ref().and_then(|service| service.affinity_seconds) {
        Some(seconds) => {
            format!("by client: it keeps its endpoint until it was idle for {}", time(f64::from(seconds)))
        }
        None => "none".into(),
    };
    vec![
        ("Pool", pool),
        ("Source seen", format!("{seen}: {}", forward.masquerade_reason)),
        ("Affinity", affinity),
    ]
}

fn endpoints(all: &[Candidate]) -> String {
    let mut table = Table::new(&["ENDPOINT", "NODE", "ZONE", "STATE", "SLICE", "ANSWERS", "SEES", "WHY"]);
    for it in all {
        let endpoint = match it.port {
            Some(port) => SocketAddr::new(it.address, port).to_string(),
            None => it.address.to_string(),
        };
        table.row([
            endpoint,
            it.node.clone(),
            it.zone.clone(),
            it.state.into(),
            it.slice.clone(),
            if it.candidate { "yes" } else { "no" }.into(),
            it.sees.map(str::to_lowercase).unwrap_or_default(),
            it.why.clone(),
        ]);
    }
    table.text()
}
