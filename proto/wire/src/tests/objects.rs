//! Random objects in canonical form, and hand-made ones that between them set every field.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, Hints, LoadBalancerIngress,
    NodeContext, Port, Protocol, Service, ServiceCidr, ServiceCidrKey, ServiceKey, ServicePort, ServiceType,
    TrafficDistribution, TrafficPolicy,
};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

fn name() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![
        9 => "[a-z]([a-z0-9-]{0,14}[a-z0-9])?",
        1 => "[a-z]{100,253}",
    ]
    .prop_map(Arc::from)
}

/// Few enough that they repeat.
fn zone() -> impl Strategy<Value = Arc<str>> {
    "zone-[a-d]".prop_map(Arc::from)
}

/// A port's name; often none.
fn port_name() -> impl Strategy<Value = Arc<str>> {
    "(|http|dns|p[0-9])".prop_map(Arc::from)
}

fn v4() -> impl Strategy<Value = Ipv4Addr> {
    prop_oneof![any::<u32>(), 0x0a00_0000..0x0a00_0010u32].prop_map(Ipv4Addr::from)
}

/// With runs of zeros, which is what the canonical text is about.
fn v6() -> impl Strategy<Value = Ipv6Addr> {
    let segment = prop_oneof![3 => Just(0u16), 1 => any::<u16>(), 1 => 0..0x20u16];
    proptest::array::uniform8(segment)
        .prop_map(Ipv6Addr::from)
        .prop_filter("IPv4-mapped", |address| address.to_ipv4_mapped().is_none())
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![v4().prop_map(IpAddr::from), v6().prop_map(IpAddr::from)]
}

fn cidr() -> impl Strategy<Value = IpNet> {
    (address(), 0..=128u8)
        .prop_map(|(address, bits)| {
            let max = if address.is_ipv4() { 32 } else { 128 };
            IpNet::new(address, bits % (max + 1)).unwrap().trunc()
        })
        .prop_filter("IPv4-mapped", |cidr| {
            matches!(cidr.addr(), IpAddr::V6(v6) if v6.to_ipv4_mapped().is_none()) || cidr.addr().is_ipv4()
        })
}

fn port() -> impl Strategy<Value = Port> {
    prop_oneof![any::<Port>(), (1..9u16).prop_map(|port| Port::new(port).unwrap())]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn service_port() -> impl Strategy<Value = ServicePort> {
    (protocol(), port(), port_name(), option::of(port()), option::of("[a-zA-Z0-9./ä]{1,20}")).prop_map(
        |(protocol, port, name, node_port, app_protocol)| ServicePort {
            protocol,
            port,
            name,
            node_port,
            app_protocol: app_protocol.map(Arc::from),
        },
    )
}

pub(super) fn service() -> impl Strategy<Value = Service> {
    let types = vec![ServiceType::ClusterIp, ServiceType::NodePort, ServiceType::LoadBalancer];
    let distributions = vec![TrafficDistribution::PreferSameZone, TrafficDistribution::PreferSameNode];
    let identity = (name(), name(), prop::sample::select(types));
    let ingress =
        (address(), any::<bool>()).prop_map(|(ip, proxy_mode)| LoadBalancerIngress { ip, proxy_mode });
    let cluster_ips = (option::of(v4()), option::of(v6()), any::<bool>());
    let addresses = (cluster_ips, vec(address(), 0..4), vec(ingress, 0..4), vec(cidr(), 0..4));
    let policies = (policy(), policy(), option::of(prop::sample::select(distributions)));
    let rest = (option::of(1..=86_400u32), option::of(port()), any::<bool>());
    (identity, addresses, vec(service_port(), 0..6), policies, rest).prop_map(
        |((namespace, name, service_type), addresses, mut ports, policies, rest)| {
            let ((v4, v6, v6_first), external_ips, load_balancer_ingress, ranges) = addresses;
            let mut cluster_ips: Vec<IpAddr> =
                v4.map(IpAddr::from).into_iter().chain(v6.map(IpAddr::from)).collect();
            if v6_first {
                cluster_ips.reverse();
            }
            let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
            ports
                .retain(|port| names.insert(port.name.clone()) && numbers.insert((port.protocol, port.port)));
            let mut service = Service {
                key: ServiceKey { namespace, name },
                service_type,
                cluster_ips,
                external_ips,
                load_balancer_ingress,
                ports,
                internal_traffic_policy: policies.0,
                external_traffic_policy: policies.1,
                traffic_distribution: policies.2,
                client_ip_affinity_seconds: rest.0,
                load_balancer_source_ranges: ranges,
                health_check_node_port: rest.1,
                publish_not_ready_addresses: rest.2,
            };
            service.canonicalise();
            service
        },
    )
}

fn endpoint(address: impl Strategy<Value = IpAddr>) -> impl Strategy<Value = Endpoint> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let hints = (vec(zone(), 0..3), vec(name(), 0..2));
    (address, option::of(name()), option::of(zone()), flags, hints).prop_map(
        |(address, node_name, zone, (ready, serving, terminating), (zones, nodes))| Endpoint {
            address,
            node_name,
            zone,
            conditions: Conditions { ready, serving, terminating },
            hints: Hints::new(zones, nodes),
        },
    )
}

fn endpoints(family: Family) -> BoxedStrategy<Vec<Endpoint>> {
    match family {
        Family::V4 => vec(endpoint(v4().prop_map(IpAddr::from)), 0..12).boxed(),
        Family::V6 => vec(endpoint(v6().prop_map(IpAddr::from)), 0..12).boxed(),
    }
}

fn endpoint_port() -> impl Strategy<Value = EndpointPort> {
    (port_name(), protocol(), port()).prop_map(|(name, protocol, port)| EndpointPort { name, protocol, port })
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(Family::ALL.to_vec())
}

/// An EndpointSet, and a later version of it.
pub(super) fn endpoint_set_and_next() -> impl Strategy<Value = (EndpointSet, EndpointSet)> {
    let contents = family().prop_flat_map(|family| {
        let keep = vec(any::<bool>(), 12);
        (Just(family), endpoints(family), endpoints(family), keep)
    });
    (name(), name(), name(), vec(endpoint_port(), 0..4), contents).prop_map(
        |(namespace, service, slice, ports, (family, endpoints, changes, keep))| {
            let key = EndpointSetKey::new(ServiceKey::new(namespace, service), slice);
            let mut old = EndpointSet { key, family, ports, endpoints };
            old.canonicalise();
            let mut new = old.clone();
            let mut keep = keep.into_iter();
            new.endpoints.retain(|_| keep.next().unwrap_or(true));
            new.endpoints.extend(changes);
            new.canonicalise();
            (old, new)
        },
    )
}

pub(super) fn endpoint_set() -> impl Strategy<Value = EndpointSet> {
    endpoint_set_and_next().prop_map(|(set, _)| set)
}

pub(super) fn service_cidr() -> impl Strategy<Value = ServiceCidr> {
    (name(), vec(cidr(), 0..4)).prop_map(|(name, cidrs)| {
        let mut cidr = ServiceCidr { key: ServiceCidrKey(name), cidrs };
        cidr.canonicalise();
        cidr
    })
}

pub(super) fn node_context() -> impl Strategy<Value = NodeContext> {
    let lists = (vec(address(), 0..4), vec(cidr(), 0..3));
    let facts = (name(), option::of(zone()), option::of(zone()), lists, any::<bool>());
    let node_addresses = btree_set(address(), 0..4).prop_map(|all| all.into_iter().collect());
    (name(), option::of(facts), node_addresses).prop_map(|(name, facts, node_addresses)| match facts {
        None => NodeContext { node_addresses, ..NodeContext::unknown(name) },
        Some((uid, zone, region, (mut addresses, pod_cidrs), being_removed)) => {
            let (mut seen, uid) = (HashSet::new(), Some(uid));
            addresses.retain(|address| seen.insert(*address));
            NodeContext { name, uid, zone, region, addresses, pod_cidrs, being_removed, node_addresses }
        }
    })
}
