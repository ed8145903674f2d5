//! What the node as a whole puts into the sets.

use std::net::IpAddr;

use ipnet::IpNet;
use lockstep_model::Family;
use lockstep_view::{NodePlan, NodePortScope};

use crate::sets::{Datum, Key, SetId, following};
use crate::stage::Stage;

/// Every element that is of no Service.
pub(crate) fn each_element(node: &NodePlan, each: &mut impl FnMut(Family, SetId, &Key, Datum)) {
    for address in node_ips(node) {
        each(Family::of(address), SetId::NodeIps, &Key::address(address), Datum::Present);
    }
    for (first, last) in ranges(&node.service_cidrs) {
        each(Family::of(first), SetId::ServiceCidrs, &Key::address(first), Datum::UpTo(last));
    }
}

/// Stages what takes the ranges of the ServiceCIDRs from `old` to `new`.
pub(crate) fn stage_service_cidrs(stage: &mut Stage, old: &[IpNet], new: &[IpNet]) {
    if old == new {
        return;
    }
    let (old, new) = (ranges(old), ranges(new));
    for (first, last) in old.iter().filter(|range| !new.contains(range)) {
        stage.delete(Family::of(*first), SetId::ServiceCidrs, &Key::address(*first), Datum::UpTo(*last));
    }
    for (first, last) in new.iter().filter(|range| !old.contains(range)) {
        stage.add(Family::of(*first), SetId::ServiceCidrs, &Key::address(*first), Datum::UpTo(*last));
    }
}

/// Addresses that node ports answer on, where they are listed. Never a loopback address.
fn node_ips(node: &NodePlan) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = Family::ALL
        .into_iter()
        .flat_map(|family| match node.node_ports(family) {
            NodePortScope::AllLocal => &[][..],
            NodePortScope::Addresses(addresses) => addresses,
        })
        .copied()
        .filter(|address| !address.is_loopback())
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The ranges that networks make up, sorted and none inside another: first and last address.
/// Those side by side are one, so that no address is the end of one and the begin of the next.
fn ranges(networks: &[IpNet]) -> Vec<(IpAddr, IpAddr)> {
    let mut ranges: Vec<(IpAddr, IpAddr)> = Vec::with_capacity(networks.len());
    for network in networks {
        match ranges.last_mut() {
            Some((_, last)) if following(*last) == Some(network.network()) => *last = network.broadcast(),
            _ => ranges.push((network.network(), network.broadcast())),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_side_by_side_are_one_range() {
        let networks =
            ["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/23", "10.1.0.0/16", "192.0.0.0/2", "::/96", "fd00::/8"];
        let networks: Vec<IpNet> = networks.iter().map(|it| it.parse().unwrap()).collect();
        let text: Vec<String> =
            ranges(&networks).iter().map(|(first, last)| format!("{first}-{last}")).collect();
        assert_eq!(
            text,
            [
                "10.0.0.0-10.0.3.255",
                "10.1.0.0-10.1.255.255",
                "192.0.0.0-255.255.255.255",
                "::-::ffff:ffff",
                "fd00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            ]
        );
    }
}
