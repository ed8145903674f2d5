//! Why it is so, for people: the rule behind each decision.

use lockstep_model::{Service, TrafficPolicy};
use lockstep_view::trace::{Match, Trace, Verdict};
use lockstep_view::{Action, Pool, Source, Surface};
use lockstep_wire::v1;

use super::Evidence;

/// Why the verdict is what it is.
pub(super) fn verdict(evidence: &Evidence, trace: &Trace<'_>, service: Option<&Service>) -> String {
    let packet = &evidence.packet;
    let (Some(matched), Some(service)) = (&trace.matched, service) else {
        let to = std::net::SocketAddr::new(packet.destination, packet.port.get());
        let nobody = format!("no Service has {to}/{} on this node", packet.protocol);
        let concerned = if evidence.refuses_other_ports() { "" } else { ", which this mode leaves alone" };
        return match trace.verdict {
            Verdict::OtherPort => format!("{nobody}, and {} is a cluster IP{concerned}", packet.destination),
            Verdict::Unallocated => {
                format!("{nobody}, and {} is in a ServiceCIDR{concerned}", packet.destination)
            }
            _ => nobody,
        };
    };
    let policy = policy(matched, service);
    match trace.verdict {
        Verdict::LeftAlone | Verdict::OtherPort | Verdict::Unallocated => String::new(),
        Verdict::SourceRefused => format!("{} is in no source range of the load balancer", packet.source),
        Verdict::Decided(Action::Reject) => "no endpoint of this port is usable on any node".into(),
        Verdict::Decided(Action::Drop) => format!("{policy}, and no endpoint on this node is usable"),
        Verdict::Decided(Action::Forward { pool, .. }) => match (pool, trace.source) {
            (Pool::Cluster, Source::Pod) if keeps_clients(matched, service) => {
                format!("{policy} does not bind pods: it is as if they had gone out and come back")
            }
            (Pool::Cluster, Source::Node) if keeps_clients(matched, service) => {
                format!("{policy} does not bind the node itself: it is as if it had gone out and come back")
            }
            _ => policy,
        },
    }
}

/// Why the endpoints see the client's address or not, whoever they are.
pub(super) fn masquerade(evidence: &Evidence, trace: &Trace<'_>, service: &Service) -> Option<String> {
    let (matched, Verdict::Decided(Action::Forward { masquerade, .. })) =
        (trace.matched.as_ref()?, trace.verdict)
    else {
        return None;
    };
    let facts = evidence.view.facts();
    let inside = matches!(matched.frontend.surface, Surface::ClusterIp(_));
    Some(match (inside, masquerade) {
        (true, true) if facts.masquerade_all => "the node masquerades all that is sent to cluster IPs".into(),
        (true, true) => "the client is no pod: answers must come back through this node".into(),
        (true, false) if facts.tells_pods(matched.port.family) => "the client is a pod".into(),
        (true, false) => "the node has no way to tell pods from others".into(),
        (false, true) if keeps_clients(matched, service) => "the node itself is the client".into(),
        (false, true) => {
            format!("{}: answers must come back through this node", policy(matched, service))
        }
        (false, false) => format!("{} keeps it", policy(matched, service)),
    })
}

/// Whose node port decides where the plan refuses or drops, as the kernel sees it.
pub(super) fn behind(evidence: &Evidence, trace: &Trace<'_>) -> Option<String> {
    let packet = &evidence.packet;
    let behind = evidence.view.plan().node_port_behind(packet, &evidence.local)?;
    let place = std::net::SocketAddr::new(packet.destination, packet.port.get());
    let decides = format!("node port {} of {} decides instead", packet.port, behind.key());
    match (trace.verdict, evidence.backend()) {
        // There the address has a virtual server, which refuses by itself.
        (_, v1::BackendKind::Ipvs) => None,
        (Verdict::Decided(Action::Reject), _) => {
            Some(format!("{decides}: without endpoints, the rules have nothing for {place} itself"))
        }
        (_, v1::BackendKind::Nftables) => None,
        _ => Some(format!("in iptables mode {decides}: the rules for {place} do not take this client")),
    }
}

fn keeps_clients(matched: &Match<'_>, service: &Service) -> bool {
    !matches!(matched.frontend.surface, Surface::ClusterIp(_))
        && service.external_traffic_policy == TrafficPolicy::Local
}

fn policy(matched: &Match<'_>, service: &Service) -> String {
    let (name, policy) = match matched.frontend.surface {
        Surface::ClusterIp(_) => ("internalTrafficPolicy", service.internal_traffic_policy),
        _ => ("externalTrafficPolicy", service.external_traffic_policy),
    };
    let policy = match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    };
    format!("{name} {policy}")
}
