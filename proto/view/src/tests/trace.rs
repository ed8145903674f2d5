//! Packets through plans: kube-proxy's own tables of what must become of them, in its notation
//! (`A` and `B` answer, `m` = masqueraded).

use std::net::IpAddr;

use lockstep_model::{NodeContext, Protocol, Service, ServiceType, TrafficPolicy};

use super::cluster::{
    Cluster, DRAINING, READY, config, endpoint, ip, node, number, port, service, slice, vip,
};
use crate::trace::{Masquerade, Packet, ToldBy, Trace, Verdict};
use crate::{Action, DetectLocal, InterfaceName, NodePortAddresses, Source, Surface, ViewConfig};

const POD: &str = "10.0.0.2";
const NODE: &str = "192.168.0.2";
const OUTSIDE: &str = "203.0.113.2";
/// On this node and on another.
const A: &str = "10.180.0.1";
const B: &str = "10.180.1.1";

fn local() -> Vec<IpAddr> {
    node().addresses.into_iter().chain([ip("127.0.0.1")]).collect()
}

fn packet(from: &str, to: &str, port: u16) -> Packet {
    Packet {
        source: ip(from),
        interface: None,
        destination: ip(to),
        port: number(port),
        protocol: Protocol::Tcp,
    }
}

fn follow<'a>(cluster: &'a Cluster, from: &str, to: &str, port: u16) -> Trace<'a> {
    cluster.view.plan().trace(&packet(from, to, port), &local())
}

/// `A,B m`, `DROP`, `REJECT`, `BLOCKED` or empty for what no Service has.
fn result(cluster: &Cluster, from: &str, to: &str, port: u16) -> String {
    let trace = follow(cluster, from, to, port);
    match trace.verdict {
        Verdict::LeftAlone => String::new(),
        Verdict::OtherPort => "OTHER PORT".into(),
        Verdict::Unallocated => "UNALLOCATED".into(),
        Verdict::SourceRefused => "BLOCKED".into(),
        Verdict::Decided(Action::Drop) => "DROP".into(),
        Verdict::Decided(Action::Reject) => "REJECT".into(),
        Verdict::Decided(Action::Forward { .. }) => {
            let name = |address: IpAddr| match address.to_string().as_str() {
                A => "A".to_owned(),
                B => "B".to_owned(),
                other => other.to_owned(),
            };
            let names: Vec<String> = trace.answers.iter().map(|it| name(it.target.address)).collect();
            let marked = trace.answers.iter().filter(|it| it.masquerade.is_some()).count();
            let mark = if marked == 0 { "" } else { " m" };
            assert!(marked == 0 || marked == trace.answers.len(), "{:?}", trace.answers);
            names.join(",") + mark
        }
    }
}

/// A load balancer's Service with cluster IP 172.30.0.`n`, 5.6.7.`n`, node port 3000 + `n`.
fn balanced(n: u8) -> Service {
    let mut balanced = service(&format!("ns/svc{n}"), &[&format!("172.30.0.{n}")]);
    balanced.service_type = ServiceType::LoadBalancer;
    balanced.load_balancer_ingress = vec![vip(&format!("5.6.7.{n}"))];
    balanced.ports[0].node_port = Some(number(3000 + u16::from(n)));
    balanced
}

/// svc1 Cluster/Cluster, svc2 external Local, svc3 internal Local, each with A and B.
fn masquerade_cluster(config: ViewConfig) -> Cluster {
    let mut cluster = Cluster::new(config);
    for n in 1..=3 {
        let mut it = balanced(n);
        if n == 2 {
            it.external_traffic_policy = TrafficPolicy::Local;
        }
        if n == 3 {
            it.internal_traffic_policy = TrafficPolicy::Local;
        }
        cluster.put(slice(&it, "s1", vec![endpoint(A, "n1", READY), endpoint(B, "n2", READY)]));
        cluster.put(it);
    }
    cluster
}

/// One line per source and destination, one column per Service.
fn table(config: ViewConfig) -> String {
    let cluster = masquerade_cluster(config);
    let mut table = String::new();
    for (class, from) in [("pod", POD), ("node", NODE), ("ext", OUTSIDE)] {
        for kind in ["CIP", "NP", "VIP"] {
            let cells: Vec<String> = (1..=3)
                .map(|n| match kind {
                    "CIP" => result(&cluster, from, &format!("172.30.0.{n}"), 80),
                    "NP" => result(&cluster, from, NODE, 3000 + n),
                    _ => result(&cluster, from, &format!("5.6.7.{n}"), 80),
                })
                .collect();
            table.push_str(&format!("{class} -> {kind}: {}\n", cells.join(" | ")));
        }
    }
    table
}

const BASE: &str = "\
pod -> CIP: A,B | A,B | A
pod -> NP: A,B m | A,B | A,B m
pod -> VIP: A,B m | A,B | A,B m
node -> CIP: A,B m | A,B m | A m
node -> NP: A,B m | A,B m | A,B m
node -> VIP: A,B m | A,B m | A,B m
ext -> CIP: A,B m | A,B m | A m
ext -> NP: A,B m | A | A,B m
ext -> VIP: A,B m | A | A,B m
";

/// `BASE` with these lines instead of its own.
fn base_but(lines: &[&str]) -> String {
    let of = |line: &str| line.split_once(": ").unwrap().0.to_owned();
    let own =
        |line: &str| lines.iter().find(|it| of(it) == of(line)).map_or(line.to_owned(), |it| (*it).into());
    BASE.lines().map(|line| own(line) + "\n").collect()
}

#[test]
fn internal_and_external_policy_and_who_is_masqueraded() {
    assert_eq!(table(config()), BASE);
}

#[test]
fn without_a_way_to_tell_pods_nobody_is_short_circuited_and_cluster_ips_see_clients() {
    let nobody = ViewConfig { detect_local: DetectLocal::ClusterCidrs(Vec::new()), ..config() };
    let pods_are_outside = ["pod -> NP: A,B m | A | A,B m", "pod -> VIP: A,B m | A | A,B m"];
    let plain = ["node -> CIP: A,B | A,B | A", "ext -> CIP: A,B | A,B | A"];
    assert_eq!(table(nobody.clone()), base_but(&[pods_are_outside, plain].concat()));
    let all = ViewConfig { masquerade_all: true, ..nobody };
    let marked = ["pod -> CIP: A,B m | A,B m | A m"];
    assert_eq!(table(all), base_but(&[&pods_are_outside[..], &marked[..]].concat()));
}

#[test]
fn by_interface_whoever_comes_in_by_it_is_a_pod_and_nobody_else() {
    let name = |text: &str| InterfaceName::new(text).unwrap();
    let modes = [DetectLocal::BridgeInterface(name("cali1")), DetectLocal::InterfaceNamePrefix(name("cali"))];
    for (detect_local, other) in modes.into_iter().zip(["cali10", "eth0"]) {
        let cluster = masquerade_cluster(ViewConfig { detect_local, ..config() });
        let class = |from: &str, interface: Option<&str>| {
            let packet = Packet { interface: interface.map(name), ..packet(from, "5.6.7.2", 80) };
            let trace = cluster.view.plan().trace(&packet, &local());
            (trace.source, trace.told_by)
        };
        assert_eq!(class(OUTSIDE, Some("cali1")), (Source::Pod, ToldBy::PodInterface));
        assert_eq!(class(POD, Some(other)), (Source::Elsewhere, ToldBy::Nothing));
        assert_eq!(class(POD, None), (Source::Elsewhere, ToldBy::Nothing));
        assert_eq!(class(NODE, None), (Source::Node, ToldBy::LocalAddress));
    }
}

#[test]
fn node_ports_answer_at_localhost_where_they_are_meant_to() {
    let at = |localhost_node_ports| {
        let cluster = masquerade_cluster(ViewConfig { localhost_node_ports, ..config() });
        result(&cluster, "127.0.0.1", "127.0.0.1", 3001)
    };
    assert_eq!((at(true).as_str(), at(false).as_str()), ("A,B m", ""));
}

#[test]
fn loopback_addresses_are_the_nodes_own_and_nobody_else_reaches_node_ports_there() {
    let scopes = [NodePortAddresses::AllLocal, NodePortAddresses::Cidrs(vec!["0.0.0.0/0".parse().unwrap()])];
    for node_port_addresses in scopes {
        let cluster =
            masquerade_cluster(ViewConfig { localhost_node_ports: true, node_port_addresses, ..config() });
        for (from, to, expected) in [
            ("127.0.0.1", "127.0.0.1", "A,B m"),
            ("127.0.0.9", "127.0.0.1", "A,B m"),
            (NODE, "127.0.0.1", "A,B m"),
            (NODE, "127.9.9.9", "A,B m"),
            (OUTSIDE, "127.0.0.1", ""),
            (POD, "127.0.0.1", ""),
            ("::1", "::1", ""),
        ] {
            assert_eq!(result(&cluster, from, to, 3001), expected, "{from} -> {to}");
        }
        let class = |from: &str, to: &str| follow(&cluster, from, to, 80).source;
        assert_eq!(class("127.1.2.3", "172.30.0.1"), Source::Node);
        assert_eq!(class("::1", "fd00::1"), Source::Node);
        assert_eq!(class("128.0.0.1", "172.30.0.1"), Source::Elsewhere);
    }
    // Not loopback, yet local: the node's bridge in the network of pods is the node, too.
    let cluster = masquerade_cluster(ViewConfig { localhost_node_ports: true, ..config() });
    let bridge = packet("10.180.0.254", "127.0.0.1", 3001);
    let trace = cluster.view.plan().trace(&bridge, &[ip("10.180.0.254")]);
    assert!(trace.matched.is_some());
}

#[test]
fn masquerade_all_concerns_cluster_ips_only() {
    let all = ViewConfig { masquerade_all: true, ..config() };
    assert_eq!(table(all), base_but(&["pod -> CIP: A,B m | A,B m | A m"]));
}

#[test]
fn source_ranges_come_before_everything_and_hold_at_load_balancers_addresses_only() {
    let mut cluster = Cluster::new(config());
    let mut it = balanced(1);
    it.load_balancer_ingress = vec![vip("1.2.3.4"), vip("5.6.7.8")];
    it.load_balancer_source_ranges =
        vec!["192.168.0.0/24".parse().unwrap(), "203.0.113.0/25".parse().unwrap()];
    cluster.put(slice(&it, "s1", vec![endpoint("10.180.0.1", "n2", READY)]));
    cluster.put(it.clone());
    let blocked = "203.0.113.130";
    for (from, to, expected) in [
        (POD, "172.30.0.1", "A"),
        (OUTSIDE, "node port", "A m"),
        (blocked, "node port", "A m"),
        (OUTSIDE, "1.2.3.4", "A m"),
        (OUTSIDE, "5.6.7.8", "A m"),
        (blocked, "1.2.3.4", "BLOCKED"),
        (blocked, "5.6.7.8", "BLOCKED"),
        (POD, "1.2.3.4", "BLOCKED"),
        (POD, "5.6.7.8", "BLOCKED"),
        (NODE, "1.2.3.4", "A m"),
        (NODE, "5.6.7.8", "A m"),
        ("1.2.3.4", "1.2.3.4", "A m"),
        ("5.6.7.8", "5.6.7.8", "A m"),
    ] {
        let (to, port) = if to == "node port" { (NODE, 3001) } else { (to, 80) };
        assert_eq!(result(&cluster, from, to, port), expected, "{from} -> {to}");
    }
    // Also where the answer would be a refusal.
    cluster.put(slice(&it, "s1", Vec::new()));
    assert_eq!(result(&cluster, blocked, "1.2.3.4", 80), "BLOCKED");
    assert_eq!(result(&cluster, OUTSIDE, "1.2.3.4", 80), "REJECT");
    assert_eq!(result(&cluster, POD, "172.30.0.1", 80), "REJECT");
}

#[test]
fn endpoints_that_shut_down_are_used_where_nothing_is_ready() {
    let mut cluster = Cluster::new(config());
    let mut it = balanced(1);
    it.external_traffic_policy = TrafficPolicy::Local;
    cluster.put(it.clone());
    cluster.put(slice(&it, "s1", vec![endpoint(A, "n1", DRAINING), endpoint(B, "n2", READY)]));
    assert_eq!(result(&cluster, POD, "172.30.0.1", 80), "B");
    assert_eq!(result(&cluster, OUTSIDE, "5.6.7.1", 80), "A");
    cluster.put(slice(&it, "s1", vec![endpoint(B, "n2", DRAINING)]));
    assert_eq!(result(&cluster, POD, "172.30.0.1", 80), "B");
    assert_eq!(result(&cluster, OUTSIDE, "5.6.7.1", 80), "DROP");
}

#[test]
fn a_client_is_masqueraded_only_towards_itself() {
    let cluster = masquerade_cluster(config());
    let trace = follow(&cluster, A, "172.30.0.1", 80);
    let seen: Vec<_> = trace.answers.iter().map(|it| it.masquerade).collect();
    assert_eq!(seen, [Some(Masquerade::Hairpin), None]);
    // On another node, too: it dials a node port here, and its address is kept.
    let trace = follow(&cluster, B, NODE, 3002);
    let seen: Vec<_> = trace.answers.iter().map(|it| it.masquerade).collect();
    assert_eq!(seen, [None, Some(Masquerade::Hairpin)]);
    let trace = follow(&cluster, A, "5.6.7.1", 80);
    assert!(trace.answers.iter().all(|it| it.masquerade == Some(Masquerade::Action)));
}

#[test]
fn what_no_service_has_is_left_alone() {
    let cluster = masquerade_cluster(config());
    for (from, to, port) in [
        (POD, "172.30.0.9", 80),
        (POD, "127.0.0.1", 3001),
        (POD, "192.168.7.7", 3001),
        ("2001:db8::9", "172.30.0.1", 80),
    ] {
        assert_eq!(result(&cluster, from, to, port), "", "{from} -> {to}:{port}");
    }
    assert_eq!(result(&cluster, POD, "172.30.0.1", 81), "OTHER PORT");
    let udp = Packet { protocol: Protocol::Udp, ..packet(POD, "172.30.0.1", 80) };
    let trace = cluster.view.plan().trace(&udp, &local());
    assert_eq!((trace.matched, trace.verdict), (None, Verdict::OtherPort));
}

#[test]
fn what_is_at_another_nodes_address_is_left_to_that_node_where_addresses_are_bound() {
    let external_ips = ["192.168.0.2", "192.168.0.3", "203.0.113.1"].map(ip);
    let web = Service { external_ips: external_ips.into(), ..service("a/web", &["172.30.0.1"]) };
    let results = |binds_addresses| {
        let mut cluster = Cluster::new(ViewConfig { binds_addresses, ..config() });
        cluster.put(web.clone());
        cluster.put(slice(&web, "s1", vec![endpoint("10.1.0.1", "n2", READY)]));
        let node_addresses = external_ips[..2].to_vec();
        cluster.view.set_node(NodeContext { node_addresses, ..node() });
        cluster.view.update(&cluster.state, &[]);
        external_ips.map(|to| result(&cluster, "10.2.0.9", &to.to_string(), 80))
    };
    let [own, others, nobodys] = results(false);
    assert!(own == others && own == nobodys && own.contains("10.1.0.1"), "{own}, {others}, {nobodys}");
    assert_eq!(results(true), [own.clone(), String::new(), own], "left alone");
}

#[test]
fn node_ports_answer_where_their_scope_says() {
    let second = "192.168.1.2";
    let at = |addresses: NodePortAddresses| {
        let cluster = masquerade_cluster(ViewConfig { node_port_addresses: addresses, ..config() });
        [NODE, second, "192.168.7.7", "127.0.0.1"].map(|to| result(&cluster, OUTSIDE, to, 3001))
    };
    assert_eq!(at(NodePortAddresses::AllLocal), ["A,B m", "A,B m", "", ""]);
    assert_eq!(at(NodePortAddresses::Primary), ["A,B m", "", "", ""]);
    let cidrs = NodePortAddresses::Cidrs(vec!["192.168.1.0/24".parse().unwrap()]);
    assert_eq!(at(cidrs), ["", "A,B m", "", ""]);
}

#[test]
fn an_address_of_a_service_comes_before_a_node_port() {
    let mut cluster = masquerade_cluster(config());
    let mut other = service("ns/other", &["172.30.0.99"]);
    other.external_ips = vec![ip(NODE)];
    other.ports = vec![port("", Protocol::Tcp, 3001)];
    cluster.put(slice(&other, "s1", vec![endpoint("10.180.1.9", "n2", READY)]));
    cluster.put(other.clone());
    let trace = follow(&cluster, OUTSIDE, NODE, 3001);
    let matched = trace.matched.unwrap();
    assert_eq!((matched.key(), matched.frontend.surface), (&other.key, Surface::ExternalIp(ip(NODE))));
    assert_eq!(result(&cluster, OUTSIDE, "192.168.1.2", 3001), "A,B m");
}

/// Whose node port may decide where the plan refuses or drops.
fn behind(cluster: &Cluster, from: &str, to: &str) -> Option<String> {
    let behind = cluster.view.plan().node_port_behind(&packet(from, to, 3001), &local());
    behind.map(|it| it.key().to_string())
}

#[test]
fn behind_an_address_that_refuses_or_drops_a_node_port_of_the_number_may_decide() {
    let mut cluster = masquerade_cluster(config());
    let mut other = service("ns/other", &["172.30.0.99"]);
    other.service_type = ServiceType::LoadBalancer;
    other.external_ips = vec![ip(NODE)];
    other.ports = vec![port("", Protocol::Tcp, 3001)];
    let svc1 = Some("ns/svc1".to_owned());
    cluster.put(other.clone());
    assert_eq!(
        (result(&cluster, OUTSIDE, NODE, 3001).as_str(), behind(&cluster, OUTSIDE, NODE)),
        ("REJECT", svc1.clone())
    );
    // At an address that is not the node's, or where the verdict is the node port's own, nothing is behind.
    assert_eq!(behind(&cluster, OUTSIDE, "172.30.0.99"), None);
    assert_eq!(behind(&cluster, OUTSIDE, "192.168.1.2"), None);

    cluster.put(slice(&other, "s1", vec![endpoint("10.180.1.9", "n2", READY)]));
    assert_eq!(behind(&cluster, OUTSIDE, NODE), None);
    other.external_traffic_policy = TrafficPolicy::Local;
    cluster.put(other.clone());
    assert_eq!(
        (result(&cluster, OUTSIDE, NODE, 3001).as_str(), behind(&cluster, OUTSIDE, NODE)),
        ("DROP", svc1.clone())
    );
    assert_eq!(behind(&cluster, POD, NODE), None, "a pod is forwarded");

    other.external_traffic_policy = TrafficPolicy::Cluster;
    other.external_ips = Vec::new();
    other.load_balancer_ingress = vec![vip(NODE)];
    other.load_balancer_source_ranges = vec!["10.0.0.0/8".parse().unwrap()];
    cluster.put(other);
    assert_eq!(
        (result(&cluster, OUTSIDE, NODE, 3001).as_str(), behind(&cluster, OUTSIDE, NODE)),
        ("BLOCKED", svc1)
    );
    assert_eq!(behind(&cluster, POD, NODE), None, "a pod is in the range");
}

#[test]
fn a_source_is_told_by_its_network_then_by_the_nodes_addresses() {
    let cluster = masquerade_cluster(config());
    let told = |from: &str| {
        let trace = follow(&cluster, from, "172.30.0.1", 80);
        (trace.source, trace.told_by)
    };
    let pods = "10.0.0.0/8".parse().unwrap();
    assert_eq!(told(POD), (Source::Pod, ToldBy::PodNetwork(pods)));
    assert_eq!(told(NODE), (Source::Node, ToldBy::LocalAddress));
    assert_eq!(told(OUTSIDE), (Source::Elsewhere, ToldBy::Nothing));
    // The node's own address in the network of pods, as bridges have it, counts as a pod's.
    let bridge = packet("10.180.0.254", "172.30.0.1", 80);
    let trace = cluster.view.plan().trace(&bridge, &[ip("10.180.0.254")]);
    assert_eq!(trace.source, Source::Pod);
}
