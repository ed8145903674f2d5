//! Addresses of nodes that Services name as external or load-balancer addresses.
//!
//! Nearly always there are none. They are told to every node, because a node that makes addresses
//! of Services its own would take what is another's and swallow whatever is sent there. Only here
//! is every Node object known; all addresses of all nodes would be too much to tell.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use lockstep_model::{Resource, Service};

/// Who states which address, counted: a change costs the addresses in it.
#[derive(Debug, Default)]
pub(crate) struct NodeAddresses {
    stated: HashMap<IpAddr, Statements>,
    /// Stated by both.
    both: BTreeSet<IpAddr>,
    /// `both`, as of the last [`settle`](Self::settle): what is told.
    settled: Arc<[IpAddr]>,
    unsettled: bool,
}

/// How many objects state an address.
#[derive(Debug, Default)]
struct Statements {
    nodes: u32,
    services: u32,
}

/// Kind of an object that states addresses.
#[derive(Debug, Clone, Copy)]
enum By {
    Node,
    Service,
}

impl NodeAddresses {
    /// A node's Node object states other addresses than before, each once.
    pub(crate) fn node(&mut self, before: &[IpAddr], after: &[IpAddr]) {
        // What stays is never gone in between.
        after.iter().for_each(|ip| self.add(By::Node, *ip));
        before.iter().for_each(|ip| self.take(By::Node, *ip));
    }

    /// A resource has come, changed or gone.
    pub(crate) fn resource(&mut self, before: Option<&Resource>, after: Option<&Resource>) {
        let services = |resource: Option<&Resource>| match resource {
            Some(Resource::Service(service)) => named(service),
            _ => Vec::new(),
        };
        services(after).into_iter().for_each(|ip| self.add(By::Service, ip));
        services(before).into_iter().for_each(|ip| self.take(By::Service, ip));
    }

    /// The changes so far are what belongs together.
    pub(crate) fn settle(&mut self) {
        if std::mem::take(&mut self.unsettled) && !self.both.iter().eq(self.settled.iter()) {
            self.settled = self.both.iter().copied().collect();
        }
    }

    /// As of the last [`settle`](Self::settle), sorted, each once. The same `Arc` for as long as
    /// nothing is different.
    pub(crate) fn settled(&self) -> &Arc<[IpAddr]> {
        &self.settled
    }

    fn add(&mut self, by: By, ip: IpAddr) {
        let statements = self.stated.entry(ip).or_default();
        *statements.of(by) += 1;
        if statements.nodes > 0 && statements.services > 0 {
            self.unsettled |= self.both.insert(ip);
        }
    }

    fn take(&mut self, by: By, ip: IpAddr) {
        let Some(statements) = self.stated.get_mut(&ip) else { return };
        let count = statements.of(by);
        *count = count.saturating_sub(1);
        if statements.nodes == 0 || statements.services == 0 {
            self.unsettled |= self.both.remove(&ip);
        }
        if statements.nodes == 0 && statements.services == 0 {
            self.stated.remove(&ip);
        }
    }
}

impl Statements {
    fn of(&mut self, by: By) -> &mut u32 {
        match by {
            By::Node => &mut self.nodes,
            By::Service => &mut self.services,
        }
    }
}

/// What nodes answer for of a Service beside its cluster IPs. Load-balancer addresses in proxy mode
/// are left to the load balancer.
fn named(service: &Service) -> Vec<IpAddr> {
    let balanced = service.load_balancer_ingress.iter().filter(|it| !it.proxy_mode).map(|it| it.ip);
    service.external_ips.iter().copied().chain(balanced).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::service;
    use lockstep_model::LoadBalancerIngress;

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn naming(external: &[u8], balanced: &[u8], proxy: &[u8]) -> Resource {
        let mut service = service("a", "b", 1);
        service.external_ips = external.iter().map(|last| ip(*last)).collect();
        let ingress = |all: &[u8], proxy_mode| {
            all.iter().map(|last| LoadBalancerIngress { ip: ip(*last), proxy_mode }).collect::<Vec<_>>()
        };
        service.load_balancer_ingress = [ingress(balanced, false), ingress(proxy, true)].concat();
        service.into()
    }

    fn told(all: &mut NodeAddresses) -> Vec<IpAddr> {
        all.settle();
        all.settled().to_vec()
    }

    #[test]
    fn an_address_counts_while_a_node_and_a_service_state_it() {
        let mut all = NodeAddresses::default();
        let (one, other) = (naming(&[1, 2], &[], &[]), naming(&[], &[2, 3], &[4]));
        all.resource(None, Some(&one));
        assert!(told(&mut all).is_empty());
        all.node(&[], &[ip(2), ip(4), ip(9)]);
        assert_eq!(told(&mut all), [ip(2)]);
        all.resource(None, Some(&other));
        assert_eq!(told(&mut all), [ip(2)], "in proxy mode an address is left alone anyway");
        all.node(&[], &[ip(3), ip(2)]);
        assert_eq!(told(&mut all), [ip(2), ip(3)], "two nodes may state one address");
        all.node(&[ip(2), ip(4), ip(9)], &[]);
        all.resource(Some(&one), None);
        assert_eq!(told(&mut all), [ip(2), ip(3)], "each is stated by others");
        all.resource(Some(&other), Some(&one));
        assert_eq!(told(&mut all), [ip(2)]);
        all.resource(Some(&one), None);
        all.node(&[ip(3), ip(2)], &[]);
        assert_eq!((told(&mut all).len(), all.stated.len(), all.both.len()), (0, 0, 0), "nothing is kept");
    }

    #[test]
    fn what_comes_out_the_same_is_the_same() {
        let mut all = NodeAddresses::default();
        let (one, other) = (naming(&[1], &[], &[]), naming(&[], &[1], &[]));
        all.node(&[], &[ip(1)]);
        all.resource(None, Some(&one));
        all.settle();
        let before = all.settled().clone();
        all.resource(Some(&one), None);
        all.resource(None, Some(&other));
        all.node(&[ip(1)], &[ip(1), ip(7)]);
        all.settle();
        assert!(Arc::ptr_eq(all.settled(), &before));
        all.node(&[ip(1), ip(7)], &[ip(7)]);
        assert!(told(&mut all).is_empty());
    }
}
