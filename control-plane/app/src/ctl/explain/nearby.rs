//! Services that a packet for nobody may have been meant for.

use std::net::IpAddr;

use lockstep_model::{Family, Service};
use lockstep_view::NodePortScope;

use super::Evidence;
use super::settings::node_ports;

/// Most Services that are named.
const MOST: usize = 5;

/// A line for each Service that has the address at another port, or the node port at other
/// addresses.
pub(super) fn services(evidence: &Evidence) -> Vec<String> {
    let mut services: Vec<&Service> =
        evidence.state.service_keys().filter_map(|key| evidence.state.service(key)).map(|it| &**it).collect();
    services.sort_by(|a, b| a.key.cmp(&b.key));
    services.into_iter().filter_map(|service| why_not(evidence, service)).take(MOST).collect()
}

fn why_not(evidence: &Evidence, service: &Service) -> Option<String> {
    let packet = &evidence.packet;
    let (key, to, node) = (&service.key, packet.destination, &evidence.context.name);
    let mine = |ip: IpAddr| ip == to;
    let mut balanced = service.load_balancer_ingress.iter().filter(|it| mine(it.ip));
    if balanced.clone().any(|it| it.proxy_mode) {
        return Some(format!("{key} has {to} with ipMode Proxy: nodes leave that to the load balancer"));
    }
    let addresses = service.cluster_ips.iter().chain(&service.external_ips).copied();
    let wanted = |it: &lockstep_model::ServicePort| it.protocol == packet.protocol;
    if addresses.clone().any(mine) || balanced.next().is_some() {
        let ports: Vec<String> =
            service.ports.iter().map(|it| format!("{}/{}", it.port, it.protocol)).collect();
        if service.ports.iter().any(|it| wanted(it) && it.port == packet.port) {
            if evidence.view.plan().node.is_of_a_node(to) {
                return Some(format!(
                    "{key} has {to}, which is another node's address: {node} leaves it to that node in this mode"
                ));
            }
            return Some(format!("{key} has {to}, in a family that {node} does not program"));
        }
        return Some(format!("{key} has {to}, but only port {}", ports.join(", ")));
    }
    if !service.ports.iter().any(|it| wanted(it) && it.node_port == Some(packet.port)) {
        return None;
    }
    if to.is_loopback() {
        let whom = match evidence.view.plan().node.has_node_ports_at(to, &evidence.local) {
            true => format!("answers at {to} on {node} to the node itself alone"),
            false => format!("does not answer at {to} on {node}"),
        };
        return Some(format!("{key} has node port {}, which {whom}", packet.port));
    }
    let own = match evidence.view.plan().node.node_ports(Family::of(to)) {
        NodePortScope::AllLocal => {
            format!(
                "at every local address; of those, only the Node object's are known here, and {to} is none"
            )
        }
        NodePortScope::Addresses(list) => {
            let list: Vec<String> = list.iter().map(ToString::to_string).collect();
            let known = if list.is_empty() { "none that is known here".into() } else { list.join(", ") };
            format!("{}: {known}", node_ports(&evidence.settings.config))
        }
    };
    Some(format!("{key} has node port {}, which answers on {node} {own}", packet.port))
}
