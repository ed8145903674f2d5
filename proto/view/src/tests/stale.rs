//! Which UDP flows are cut, rule by rule.

use std::net::SocketAddr;

use lockstep_model::{EndpointPort, Protocol, Service, TrafficPolicy};

use super::cluster::*;
use crate::stale::{Fate, Flow, UdpFrontends, concerns, entangled};
use crate::{NodePortScope, Target};

const ALL_FRONTENDS: [&str; 3] = ["172.30.0.10:53", "203.0.113.1:53", "198.51.100.1:53"];

fn target(text: &str) -> Target {
    let at: SocketAddr = text.parse().unwrap();
    Target { address: at.ip(), port: number(at.port()) }
}

fn dns() -> Service {
    let mut dns = service("kube/dns", &["172.30.0.10"]);
    dns.external_ips = vec![ip("203.0.113.1")];
    dns.load_balancer_ingress = vec![vip("198.51.100.1")];
    dns.ports = vec![port("udp", Protocol::Udp, 53), port("tcp", Protocol::Tcp, 53)];
    dns.ports[0].node_port = Some(number(30053));
    dns
}

fn with(service: &Service, endpoints: Vec<lockstep_model::Endpoint>) -> Cluster {
    let mut cluster = Cluster::new(config());
    let mut set = slice(service, "s1", endpoints);
    set.ports = [("tcp", Protocol::Tcp), ("udp", Protocol::Udp)]
        .map(|(name, protocol)| EndpointPort { name: name.into(), protocol, port: number(5353) })
        .into();
    cluster.put(service.clone());
    cluster.put(set);
    cluster
}

/// What becomes of a flow from somewhere to `to` that `by` answers.
fn fate(cluster: &mut Cluster, service: &Service, to: &str, by: &str) -> Fate {
    let plan = cluster.plan(service);
    let node = cluster.view.plan().node.clone();
    let flow = Flow { destination: target(to), answers: target(by) };
    UdpFrontends::of(&node, [&*plan]).fate(&flow)
}

#[test]
fn a_flow_to_an_endpoint_that_serves_stays_and_any_other_is_cut() {
    let dns = dns();
    let mut cluster = with(
        &dns,
        vec![
            endpoint("10.1.0.1", "n1", READY),
            endpoint("10.1.0.2", "n2", DRAINING),
            endpoint("10.1.0.3", "n2", DEAD),
        ],
    );
    for frontend in ALL_FRONTENDS {
        let mut fate = |by| fate(&mut cluster, &dns, frontend, by);
        assert_eq!(fate("10.1.0.1:5353"), Fate::Keep, "{frontend}: ready");
        assert_eq!(fate("10.1.0.2:5353"), Fate::Keep, "{frontend}: shutting down, serves");
        assert_eq!(fate("10.1.0.3:5353"), Fate::Cut, "{frontend}: serves no more");
        assert_eq!(fate("10.1.0.9:5353"), Fate::Cut, "{frontend}: not an endpoint");
        assert_eq!(fate("10.1.0.1:5354"), Fate::Cut, "{frontend}: another port of the endpoint");
        assert_eq!(fate(frontend), Fate::Cut, "{frontend}: began before there were rules");
    }
}

#[test]
fn what_is_no_udp_frontend_is_somebody_elses() {
    let dns = dns();
    let mut cluster = with(&dns, vec![endpoint("10.1.0.1", "n1", READY)]);
    for destination in ["172.30.0.10:54", "172.30.0.11:53", "8.8.8.8:53", "10.1.0.9:5353"] {
        assert_eq!(fate(&mut cluster, &dns, destination, destination), Fate::Keep, "{destination}");
    }
    let mut tcp = dns;
    tcp.ports.remove(0);
    let mut cluster = with(&tcp, vec![endpoint("10.1.0.1", "n1", READY)]);
    let plan = cluster.plan(&tcp);
    assert!(!concerns(&plan), "only TCP");
    assert_eq!(fate(&mut cluster, &tcp, "172.30.0.10:53", "10.1.0.9:5353"), Fate::Keep);
}

#[test]
fn without_an_endpoint_that_serves_nothing_is_cut() {
    let dns = dns();
    let mut cluster = with(&dns, vec![endpoint("10.1.0.3", "n2", DEAD)]);
    assert!(!concerns(&cluster.plan(&dns)));
    for destination in ["172.30.0.10:53", "10.9.9.9:30053"] {
        assert_eq!(fate(&mut cluster, &dns, destination, "10.1.0.3:5353"), Fate::Keep);
    }
}

#[test]
fn policy_and_topology_have_no_say() {
    let mut dns = dns();
    dns.internal_traffic_policy = TrafficPolicy::Local;
    dns.external_traffic_policy = TrafficPolicy::Local;
    let mut cluster = with(
        &dns,
        vec![endpoint("10.1.0.1", "n1", READY), hinted(endpoint("10.1.0.2", "n2", READY), &["z2"], &[])],
    );
    assert!(cluster.plan(&dns).ports.iter().all(|port| port.local.len() == 1), "the test means nothing else");
    for frontend in ALL_FRONTENDS {
        assert_eq!(fate(&mut cluster, &dns, frontend, "10.1.0.2:5353"), Fate::Keep, "{frontend}");
    }
}

#[test]
fn a_node_port_is_one_only_at_the_addresses_of_the_node() {
    let dns = dns();
    let mut cluster = with(&dns, vec![endpoint("10.1.0.1", "n1", READY)]);
    assert_eq!(cluster.view.plan().node.node_ports_v4, NodePortScope::AllLocal);
    assert_eq!(fate(&mut cluster, &dns, "10.9.9.9:30053", "10.1.0.9:5353"), Fate::CutIfLocal);
    assert_eq!(fate(&mut cluster, &dns, "10.9.9.9:30053", "10.9.9.9:30053"), Fate::CutIfLocal);
    assert_eq!(fate(&mut cluster, &dns, "10.9.9.9:30053", "10.1.0.1:5353"), Fate::Keep);
    assert_eq!(fate(&mut cluster, &dns, "127.0.0.1:30053", "127.0.0.1:30053"), Fate::Keep, "a program's own");
    assert_eq!(fate(&mut cluster, &dns, "127.0.0.1:30053", "10.1.0.9:5353"), Fate::CutIfLocal);
    let plan = cluster.plan(&dns);
    let mut node = cluster.view.plan().node.clone();
    node.localhost_node_ports = true;
    let own = Flow { destination: target("127.0.0.1:30053"), answers: target("127.0.0.1:30053") };
    let fate_of_own = UdpFrontends::of(&node, [&*plan]).fate(&own);
    assert_eq!(fate_of_own, Fate::CutIfLocal, "from before there were rules: the number is the Service's");
    node.node_ports_v4 = NodePortScope::Addresses(vec![ip("10.9.9.9")]);
    let frontends = UdpFrontends::of(&node, [&*plan]);
    let fate = |to: &str| frontends.fate(&Flow { destination: target(to), answers: target("10.1.0.9:5353") });
    assert_eq!(fate("10.9.9.9:30053"), Fate::Cut);
    assert_eq!(fate("10.9.9.8:30053"), Fate::Keep);
    assert_eq!(fate("[fd00::1]:30053"), Fate::Keep, "the Service has no IPv6");
    assert_eq!(frontends.families().collect::<Vec<_>>(), [lockstep_model::Family::V4]);
}

#[test]
fn a_flow_by_a_node_port_behind_an_address_that_is_not_for_all_clients_stays() {
    let dns = dns();
    let mut behind = service("kube/other", &["172.30.0.11"]);
    behind.ports = vec![port("udp", Protocol::Udp, 53)];
    behind.ports[0].node_port = Some(number(53));
    let mut cluster = with(&dns, vec![endpoint("10.1.0.1", "n1", READY)]);
    let mut set = slice(&behind, "s1", vec![endpoint("10.1.0.7", "n1", READY)]);
    set.ports = vec![EndpointPort { name: "udp".into(), protocol: Protocol::Udp, port: number(5353) }];
    cluster.put(set);
    cluster.put(behind.clone());
    let node = cluster.view.plan().node.clone();
    let node_port = cluster.plan(&behind);
    let fate = |policy, ranges: &[&str], scope: NodePortScope, to: &str, by: &str| {
        let mut dns = dns.clone();
        dns.service_type = lockstep_model::ServiceType::LoadBalancer;
        dns.external_traffic_policy = policy;
        dns.load_balancer_source_ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
        let plan = with(&dns, vec![endpoint("10.1.0.1", "n2", READY)]).plan(&dns);
        let node = crate::NodePlan { node_ports_v4: scope, ..node.clone() };
        let flow = Flow { destination: target(to), answers: target(by) };
        UdpFrontends::of(&node, [&*plan, &*node_port]).fate(&flow)
    };
    let (external, balanced, other) = ("203.0.113.1:53", "198.51.100.1:53", "10.1.0.7:5353");
    let mine = || NodePortScope::Addresses(vec![ip("203.0.113.1"), ip("198.51.100.1")]);
    use TrafficPolicy::{Cluster as All, Local};
    assert_eq!(fate(All, &[], mine(), external, other), Fate::Cut, "the address is for all");
    assert_eq!(fate(Local, &[], mine(), external, other), Fate::Keep);
    assert_eq!(fate(Local, &[], NodePortScope::AllLocal, external, other), Fate::Keep);
    assert_eq!(fate(All, &["10.0.0.0/8"], mine(), balanced, other), Fate::Keep);
    assert_eq!(fate(All, &["10.0.0.0/8"], mine(), external, other), Fate::Cut, "ranges do not hold there");
    assert_eq!(
        fate(Local, &[], NodePortScope::Addresses(vec![]), external, other),
        Fate::Cut,
        "not a node's"
    );
    assert_eq!(fate(Local, &[], mine(), external, "10.1.0.9:5353"), Fate::Cut, "nobody's endpoint");
    assert_eq!(fate(Local, &[], mine(), external, "10.1.0.1:5353"), Fate::Keep, "its own endpoint");
}

#[test]
fn an_address_and_a_node_port_of_one_number_are_looked_at_together() {
    let dns = dns();
    let mut cluster = with(&dns, vec![endpoint("10.1.0.1", "n1", READY)]);
    // The number of the address; of the node port; of nothing; TCP; without endpoints; cluster IPs only.
    for (name, node_port, external, protocol, served) in [
        ("by-node-port", Some(53), None, Protocol::Udp, true),
        ("by-address", None, Some(30053), Protocol::Udp, true),
        ("aside", Some(54), Some(30054), Protocol::Udp, true),
        ("tcp", None, Some(30053), Protocol::Tcp, true),
        ("nobody", None, Some(30053), Protocol::Udp, false),
        ("inside", None, None, Protocol::Udp, true),
    ] {
        let mut other = service(&format!("kube/{name}"), &["172.30.0.11"]);
        other.ports = vec![port("udp", protocol, external.unwrap_or(30053))];
        other.ports[0].node_port = node_port.map(number);
        other.external_ips = external.map(|_| ip("192.168.0.2")).into_iter().collect();
        let endpoints = if served { vec![endpoint("10.1.0.7", "n1", READY)] } else { Vec::new() };
        let mut set = slice(&other, &format!("{name}-1"), endpoints);
        set.ports = vec![EndpointPort { name: "udp".into(), protocol, port: number(5353) }];
        cluster.put(set);
        cluster.put(other);
    }
    let with = |changed: &[&str]| {
        let keys: Vec<_> =
            changed.iter().map(|name| lockstep_model::ServiceKey::new("kube", *name)).collect();
        let mut names: Vec<String> =
            entangled(cluster.view.plan(), &keys).map(|it| it.key.name.to_string()).collect();
        names.sort();
        names
    };
    assert_eq!(with(&["dns"]), ["by-address", "by-node-port"]);
    assert_eq!(with(&["by-node-port"]), ["dns"]);
    assert_eq!(with(&["by-address"]), ["dns"]);
    assert_eq!(with(&["dns", "by-address"]), ["by-node-port"]);
    assert!(with(&["aside", "tcp", "nobody", "inside", "gone"]).is_empty());
}

#[test]
fn at_an_address_of_a_node_a_flow_is_cut_only_on_that_node() {
    let dns = dns();
    let mut cluster = with(&dns, vec![endpoint("10.1.0.1", "n1", READY)]);
    let plan = cluster.plan(&dns);
    let [_, address, _] = ALL_FRONTENDS;
    assert_eq!(fate(&mut cluster, &dns, address, "10.1.0.9:5353"), Fate::Cut);
    let mut node = cluster.view.plan().node.clone();
    node.node_addresses = vec![target(address).address];
    let frontends = UdpFrontends::of(&node, [&*plan]);
    let fate =
        |answers: &str| frontends.fate(&Flow { destination: target(address), answers: target(answers) });
    assert_eq!(fate("10.1.0.9:5353"), Fate::CutIfLocal);
    assert_eq!(fate(address), Fate::CutIfLocal, "untranslated here, because it is for another node");
    assert_eq!(fate("10.1.0.1:5353"), Fate::Keep);
}
