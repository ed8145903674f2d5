//! The rules one by one, each by its name.

use lockstep_model::{
    EndpointPort, Family, Key, NodeContext, Protocol, ServiceCidr, ServiceCidrKey, ServiceType, TrafficPolicy,
};

use super::cluster::*;
use crate::explain::{Exclusion, explain};
use crate::{
    Action, Changed, DetectLocal, Facts, HealthCheck, InterfaceName, NodePortAddresses, NodePortScope,
    PodSources, Pool, PortPlan, ServicePlan, Surface, Target, ViewConfig, load_balancers_may_use,
};

/// `address:port` of a pool.
fn texts(targets: &[Target]) -> Vec<String> {
    targets.iter().map(|it| std::net::SocketAddr::new(it.address, it.port.get()).to_string()).collect()
}

fn only_port(plan: &ServicePlan) -> &PortPlan {
    assert_eq!(plan.ports.len(), 1);
    &plan.ports[0]
}

/// Cluster pool of a one-port Service with these endpoints in one slice.
fn cluster_pool(endpoints: Vec<lockstep_model::Endpoint>) -> Vec<String> {
    let mut cluster = Cluster::new(config());
    let web = service("a/web", &["172.30.0.1"]);
    cluster.put(web.clone());
    cluster.put(slice(&web, "s1", endpoints));
    texts(&only_port(&cluster.plan(&web)).cluster)
}

#[test]
fn ready_endpoints_are_used_and_no_others() {
    let pool = cluster_pool(vec![
        endpoint("10.1.0.1", "n1", READY),
        endpoint("10.1.0.2", "n2", UNREADY),
        endpoint("10.1.0.3", "", READY),
        endpoint("10.1.0.4", "n1", DRAINING),
    ]);
    assert_eq!(pool, ["10.1.0.1:8080", "10.1.0.3:8080"]);
}

#[test]
fn serving_terminating_endpoints_are_the_last_resort_and_ignore_hints() {
    let pool = cluster_pool(vec![
        hinted(endpoint("10.1.0.1", "n2", DRAINING), &["z2"], &[]),
        endpoint("10.1.0.2", "n2", UNREADY),
        endpoint("10.1.0.3", "n2", DEAD),
    ]);
    assert_eq!(pool, ["10.1.0.1:8080"]);
}

#[test]
fn zone_hints_keep_traffic_in_the_zone() {
    let one = || hinted(endpoint("10.1.0.1", "n2", READY), &["z1"], &[]);
    let two = || hinted(endpoint("10.1.0.2", "n2", READY), &["z2"], &[]);
    assert_eq!(cluster_pool(vec![one(), two()]), ["10.1.0.1:8080"]);
    assert_eq!(cluster_pool(vec![two()]), ["10.1.0.2:8080"], "no hint for this zone");
    let unhinted = endpoint("10.1.0.3", "n2", READY);
    assert_eq!(cluster_pool(vec![one(), two(), unhinted]).len(), 3, "one ready endpoint without hints");
    let unready = endpoint("10.1.0.3", "n2", UNREADY);
    assert_eq!(cluster_pool(vec![one(), two(), unready]), ["10.1.0.1:8080"], "unready ones have no say");
}

#[test]
fn node_hints_come_before_zone_hints() {
    let here = || hinted(endpoint("10.1.0.1", "n1", READY), &["z1"], &["n1"]);
    let near = || hinted(endpoint("10.1.0.2", "n2", READY), &["z1"], &["n2"]);
    let far = || hinted(endpoint("10.1.0.3", "n3", READY), &["z2"], &["n3"]);
    assert_eq!(cluster_pool(vec![here(), near(), far()]), ["10.1.0.1:8080"]);
    assert_eq!(cluster_pool(vec![near(), far()]), ["10.1.0.2:8080"]);
    assert_eq!(cluster_pool(vec![far()]), ["10.1.0.3:8080"]);
}

#[test]
fn ports_match_by_name_and_protocol_and_each_endpoint_keeps_its_own() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.ports = vec![port("dns", Protocol::Tcp, 53), port("dns-udp", Protocol::Udp, 53)];
    cluster.put(web.clone());
    for (slice_name, address, target) in [("s1", "10.1.0.1", 5353), ("s2", "10.1.0.2", 1053)] {
        let mut set = slice(&web, slice_name, vec![endpoint(address, "n2", READY)]);
        set.ports = [("dns", Protocol::Tcp), ("dns", Protocol::Udp), ("dns-udp", Protocol::Tcp)]
            .map(|(name, protocol)| EndpointPort { name: name.into(), protocol, port: number(target) })
            .to_vec();
        cluster.put(set);
    }
    let plan = cluster.plan(&web);
    assert_eq!(texts(&plan.ports[0].cluster), ["10.1.0.1:5353", "10.1.0.2:1053"]);
    assert_eq!(texts(&plan.ports[1].cluster), [""; 0], "no UDP port of that name");
    assert_eq!(plan.ports[1].frontends[0].from_pod, Action::Reject);
}

#[test]
fn a_running_endpoint_beats_a_terminating_one_with_its_address() {
    for (first, second) in [(READY, DRAINING), (DRAINING, READY)] {
        let mut cluster = Cluster::new(config());
        let web = service("a/web", &["172.30.0.1"]);
        cluster.put(web.clone());
        cluster.put(slice(&web, "s1", vec![endpoint("10.1.0.1", "n1", first)]));
        cluster.put(slice(&web, "s2", vec![endpoint("10.1.0.1", "n1", second)]));
        cluster.put(slice(&web, "s3", vec![endpoint("10.1.0.2", "n1", READY)]));
        assert_eq!(texts(&only_port(&cluster.plan(&web)).cluster), ["10.1.0.1:8080", "10.1.0.2:8080"]);
    }
}

#[test]
fn hairpin_holds_the_targets_that_may_be_on_this_node() {
    let mut cluster = Cluster::new(config());
    let web = service("a/web", &["172.30.0.1"]);
    cluster.put(web.clone());
    let nodes = [("10.1.0.1", "n1"), ("10.1.0.2", "n2"), ("10.1.0.3", "")];
    let endpoints = nodes.map(|(address, node)| endpoint(address, node, READY)).to_vec();
    cluster.put(slice(&web, "s1", endpoints));
    let plan = cluster.plan(&web);
    assert_eq!(texts(&only_port(&plan).hairpin), ["10.1.0.1:8080", "10.1.0.3:8080"]);
    assert!(only_port(&plan).local.is_empty(), "no frontend uses it");
}

#[test]
fn hairpin_holds_targets_elsewhere_where_their_pods_may_ask_this_node_and_keep_their_source() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.ports[0].node_port = Some(number(30080));
    let endpoints = vec![endpoint("10.1.0.1", "n1", READY), endpoint("10.1.0.2", "n2", READY)];
    cluster.put(web.clone());
    cluster.put(slice(&web, "s1", endpoints));
    assert_eq!(texts(&only_port(&cluster.plan(&web)).hairpin), ["10.1.0.1:8080"]);
    web.external_traffic_policy = TrafficPolicy::Local;
    cluster.put(web.clone());
    assert_eq!(texts(&only_port(&cluster.plan(&web)).hairpin), ["10.1.0.1:8080", "10.1.0.2:8080"]);
}

#[test]
fn hairpin_holds_no_target_elsewhere_where_pods_of_other_nodes_are_not_told() {
    let name = || InterfaceName::new("cni0").unwrap();
    for detect_local in [
        DetectLocal::NodeCidrs,
        DetectLocal::BridgeInterface(name()),
        DetectLocal::InterfaceNamePrefix(name()),
    ] {
        let mut cluster = Cluster::new(ViewConfig { detect_local, ..config() });
        cluster.view.set_node(NodeContext { pod_cidrs: vec!["10.1.0.0/24".parse().unwrap()], ..node() });
        let mut web = service("a/web", &["172.30.0.1"]);
        web.ports[0].node_port = Some(number(30080));
        web.external_traffic_policy = TrafficPolicy::Local;
        let nodes = [("10.1.0.1", "n1"), ("10.1.1.1", "n2"), ("10.1.2.1", "")];
        let endpoints = nodes.map(|(address, node)| endpoint(address, node, READY)).to_vec();
        cluster.put(web.clone());
        cluster.put(slice(&web, "s1", endpoints));
        let plan = cluster.plan(&web);
        assert_eq!(only_port(&plan).cluster.len(), 3, "pods of this node go anywhere");
        let hairpin = texts(&only_port(&plan).hairpin);
        assert_eq!(hairpin, ["10.1.0.1:8080", "10.1.2.1:8080"], "{:?}", cluster.view.facts());
    }
}

#[test]
fn a_pool_is_there_only_where_a_frontend_uses_it() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.internal_traffic_policy = TrafficPolicy::Local;
    cluster.put(web.clone());
    let endpoints = vec![endpoint("10.1.0.1", "n1", READY), endpoint("10.1.0.2", "n2", READY)];
    cluster.put(slice(&web, "s1", endpoints));
    let plan = cluster.plan(&web);
    assert_eq!(texts(&only_port(&plan).local), ["10.1.0.1:8080"]);
    assert!(only_port(&plan).cluster.is_empty());

    web.ports[0].node_port = Some(number(30080));
    cluster.put(web.clone());
    let plan = cluster.plan(&web);
    assert_eq!(only_port(&plan).cluster.len(), 2);
    assert_eq!(only_port(&plan).frontends.len(), 2);
}

#[test]
fn families_are_those_of_the_cluster_ips() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["fd00:30::1", "172.30.0.1"]);
    web.external_ips = vec![ip("203.0.113.1")];
    cluster.put(web.clone());
    cluster.put(slice(&web, "s4", vec![endpoint("10.1.0.1", "n2", READY)]));
    cluster.put(slice(&web, "s6", vec![endpoint("fd00:10::1", "n2", READY)]));
    let plan = cluster.plan(&web);
    assert_eq!(plan.ports.iter().map(|it| it.family).collect::<Vec<_>>(), [Family::V4, Family::V6]);
    assert_eq!(texts(&plan.ports[0].cluster), ["10.1.0.1:8080"]);
    assert_eq!(texts(&plan.ports[1].cluster), ["[fd00:10::1]:8080"]);

    web.cluster_ips = vec![ip("fd00:30::1")];
    cluster.put(web.clone());
    assert_eq!(only_port(&cluster.plan(&web)).frontends.len(), 1, "no external IP of the other family");
}

#[test]
fn load_balancer_addresses_in_proxy_mode_are_left_alone() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.load_balancer_ingress = vec![vip("203.0.113.1"), vip("203.0.113.2")];
    web.load_balancer_ingress[0].proxy_mode = true;
    cluster.put(web.clone());
    let plan = cluster.plan(&web);
    let surfaces: Vec<_> = only_port(&plan).frontends.iter().map(|it| it.surface).collect();
    assert_eq!(surfaces, [Surface::ClusterIp(ip("172.30.0.1")), Surface::LoadBalancerIp(ip("203.0.113.2"))]);
    assert!(plan.required_features.is_empty());
}

/// Who may use the VIP 203.0.113.9 under these source ranges.
fn allowed(ranges: &[&str]) -> Option<Vec<String>> {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.load_balancer_ingress = vec![vip("203.0.113.9")];
    web.load_balancer_source_ranges = ranges.iter().map(|it| it.parse().unwrap()).collect();
    web.ports[0].node_port = Some(number(30080));
    web.external_ips = vec![ip("203.0.113.8")];
    web.canonicalise();
    cluster.put(web.clone());
    let plan = cluster.plan(&web);
    for frontend in &only_port(&plan).frontends {
        let restricted = matches!(frontend.surface, Surface::LoadBalancerIp(_));
        assert!(restricted || frontend.allowed_sources.is_none(), "{:?}", frontend.surface);
    }
    let frontend =
        only_port(&plan).frontends.iter().find(|it| it.surface == Surface::LoadBalancerIp(ip("203.0.113.9")));
    frontend.unwrap().allowed_sources.as_ref().map(|it| it.iter().map(ToString::to_string).collect())
}

#[test]
fn source_ranges_restrict_the_load_balancer_address_and_nothing_else() {
    assert_eq!(allowed(&["198.51.100.0/24"]).unwrap(), ["198.51.100.0/24"]);
    assert_eq!(allowed(&[]), None);
    assert_eq!(allowed(&["2001:db8::/64"]), None, "ranges of the other family restrict nothing");
    assert_eq!(allowed(&["198.51.100.0/24", "0.0.0.0/0"]), None);
    assert_eq!(allowed(&["198.51.100.0/24", "198.51.0.0/16"]).unwrap(), ["198.51.0.0/16"]);
}

#[test]
fn a_range_with_the_node_in_it_lets_the_address_itself_in() {
    assert_eq!(allowed(&["192.168.0.0/24"]).unwrap(), ["192.168.0.0/24", "203.0.113.9/32"]);
    assert_eq!(allowed(&["192.168.1.0/24"]).unwrap(), ["192.168.1.0/24"], "not the primary address");
}

#[test]
fn health_check_counts_ready_endpoints_here_for_policy_local_only() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.service_type = ServiceType::LoadBalancer;
    web.health_check_node_port = Some(number(32000));
    web.ports.push(port("more", Protocol::Tcp, 81));
    cluster.put(web.clone());
    let mut set = slice(
        &web,
        "s1",
        vec![
            endpoint("10.1.0.1", "n1", READY),
            endpoint("10.1.0.2", "n2", READY),
            endpoint("10.1.0.3", "n1", DRAINING),
        ],
    );
    set.ports.push(EndpointPort { name: "more".into(), protocol: Protocol::Tcp, port: number(8081) });
    cluster.put(set);
    assert_eq!(cluster.plan(&web).health_check, None, "policy Cluster");
    web.external_traffic_policy = TrafficPolicy::Local;
    cluster.put(web.clone());
    let expected = HealthCheck { port: number(32000), local_endpoints: 1 };
    assert_eq!(cluster.plan(&web).health_check, Some(expected));
}

#[test]
fn the_lower_key_has_a_contested_address_and_the_next_inherits_it() {
    let mut cluster = Cluster::new(config());
    let contest = |key: &str, own: &str| {
        let mut service = service(key, &[own]);
        service.external_ips = vec![ip("203.0.113.1")];
        service
    };
    let (low, mid, high) =
        (contest("a/x", "172.30.0.1"), contest("b/x", "172.30.0.2"), contest("c/x", "172.30.0.3"));
    cluster.put(high.clone());
    let changed = cluster.put(mid.clone());
    assert_eq!(changed.services, [mid.key.clone(), high.key.clone()]);
    let changed = cluster.put(low.clone());
    assert_eq!(changed.services, [low.key.clone(), mid.key.clone(), high.key.clone()]);
    assert!(cluster.plan(&low).conflicts.is_empty());
    assert_eq!(cluster.plan(&high).conflicts[0].owner, low.key);
    assert_eq!(only_port(&cluster.plan(&high)).frontends.len(), 1, "the rest of the loser stays");
    let changed = cluster.remove(&Key::Service(low.key.clone()));
    assert_eq!(changed.services.len(), 3);
    assert!(cluster.plan(&mid).conflicts.is_empty());
    assert_eq!(cluster.plan(&high).conflicts[0].owner, mid.key);
}

#[test]
fn nobody_takes_a_cluster_ip_as_an_external_ip() {
    let mut cluster = Cluster::new(config());
    let mut thief = service("a/thief", &["172.30.0.66"]);
    thief.external_ips = vec![ip("172.30.0.10")];
    let dns = service("kube-system/dns", &["172.30.0.10"]);
    cluster.put(thief.clone());
    cluster.put(dns.clone());
    assert!(cluster.plan(&dns).conflicts.is_empty());
    assert_eq!(cluster.plan(&thief).conflicts[0].owner, dns.key);
}

#[test]
fn node_port_addresses_per_family() {
    let scope = |addresses: NodePortAddresses, family| {
        let config = ViewConfig { node_port_addresses: addresses, ..config() };
        let plan = config.node_plan(&node(), &[ip("192.168.7.7"), ip("127.0.0.1")], &[]);
        match plan.node_ports(family) {
            NodePortScope::AllLocal => vec!["all".to_owned()],
            NodePortScope::Addresses(list) => list.iter().map(ToString::to_string).collect(),
        }
    };
    let cidrs = |list: &[&str]| NodePortAddresses::Cidrs(list.iter().map(|it| it.parse().unwrap()).collect());
    assert_eq!(scope(NodePortAddresses::AllLocal, Family::V4), ["all"]);
    assert_eq!(scope(NodePortAddresses::Primary, Family::V4), ["192.168.0.2"]);
    assert_eq!(scope(NodePortAddresses::Primary, Family::V6), ["2001:db8::1"]);
    assert_eq!(
        scope(cidrs(&["192.168.0.0/16", "127.0.0.0/8"]), Family::V4),
        ["192.168.0.2", "192.168.1.2", "192.168.7.7"]
    );
    assert_eq!(scope(cidrs(&["192.168.0.0/16"]), Family::V6), ["all"], "no CIDR of the family");
    assert_eq!(scope(cidrs(&["192.168.0.0/16", "0.0.0.0/0"]), Family::V4), ["all"]);
    assert_eq!(scope(cidrs(&["198.51.100.0/24"]), Family::V4), [""; 0]);
}

#[test]
fn a_node_whose_addresses_are_unknown_answers_node_ports_at_all_of_them() {
    let config = ViewConfig { node_port_addresses: NodePortAddresses::Primary, ..config() };
    let unknown = NodeContext::unknown("node-a");
    let plan = config.node_plan(&unknown, &[ip("192.168.7.7")], &[]);
    assert_eq!(plan.node_ports(Family::V4), &NodePortScope::AllLocal);
    // A family that a known node has no address of is another matter.
    let known = NodeContext { addresses: vec![ip("192.168.0.2")], ..unknown };
    let plan = config.node_plan(&known, &[], &[]);
    assert_eq!(plan.node_ports(Family::V4), &NodePortScope::Addresses(vec![ip("192.168.0.2")]));
    assert_eq!(plan.node_ports(Family::V6), &NodePortScope::Addresses(Vec::new()));
}

#[test]
fn node_ports_answer_at_localhost_where_the_configuration_does_not_leave_it_out() {
    let (config, interfaces) = (config(), ["127.0.0.1", "::1", "192.168.0.2"].map(ip));
    let at = |addresses: NodePortAddresses, localhost_node_ports| {
        let config = ViewConfig { node_port_addresses: addresses, localhost_node_ports, ..config.clone() };
        let plan = config.node_plan(&node(), &interfaces, &[]);
        (plan.localhost_node_ports, plan.node_ports_v4, plan.node_ports_v6)
    };
    let cidrs = |list: &[&str]| NodePortAddresses::Cidrs(list.iter().map(|it| it.parse().unwrap()).collect());
    let all = || NodePortScope::AllLocal;
    let only = |list: &[&str]| NodePortScope::Addresses(list.iter().map(|it| ip(it)).collect());
    assert_eq!(at(NodePortAddresses::AllLocal, true), (true, all(), all()));
    assert_eq!(at(NodePortAddresses::AllLocal, false), (false, all(), all()));
    let primary = (false, only(&["192.168.0.2"]), only(&["2001:db8::1"]));
    assert_eq!(at(NodePortAddresses::Primary, true), primary);
    assert_eq!(at(cidrs(&["192.168.0.0/24"]), true), (false, only(&["192.168.0.2"]), all()));
    let both = ["192.168.0.0/24", "127.0.0.1/32", "::1/128"];
    assert_eq!(at(cidrs(&both), true), (true, only(&["127.0.0.1", "192.168.0.2"]), only(&[])));
    assert_eq!(at(cidrs(&both), false), (false, only(&["192.168.0.2"]), only(&[])));
    assert_eq!(at(cidrs(&["fd00::/8"]), true), (true, all(), only(&[])), "no CIDR of the family");
    assert_eq!(at(cidrs(&["126.0.0.0/7"]), true), (true, only(&["127.0.0.1"]), all()));
    // No interface has one of these: nothing answers there, so nothing is opened for it.
    assert_eq!(at(cidrs(&["127.0.0.2/32"]), true), (false, only(&[]), all()));
    assert_eq!(at(cidrs(&["127.1.0.0/16", "192.168.0.0/24"]), true), (false, only(&["192.168.0.2"]), all()));
    let v6_only = ViewConfig { families: vec![Family::V6], localhost_node_ports: true, ..config.clone() };
    assert!(!v6_only.node_plan(&node(), &interfaces, &[]).localhost_node_ports);
}

#[test]
fn pod_ranges_of_the_node_are_followed() {
    let mut cluster = Cluster::new(ViewConfig { detect_local: DetectLocal::NodeCidrs, ..config() });
    let web = service("a/web", &["172.30.0.1"]);
    cluster.put(web.clone());
    cluster.put(slice(&web, "s1", vec![endpoint("10.1.0.2", "n2", READY)]));
    let actions = |cluster: &Cluster| {
        let frontend = only_port(&cluster.plan(&web)).frontends[0].clone();
        (frontend.from_pod, frontend.from_node)
    };
    let [kept, masqueraded] =
        [false, true].map(|masquerade| Action::Forward { pool: Pool::Cluster, masquerade });
    assert_eq!(cluster.view.plan().node.pods, None);
    assert_eq!(actions(&cluster), (kept, kept), "nobody can be told apart");

    let with = |cidr: &str| {
        let cidrs = vec![cidr.parse().unwrap()];
        (NodeContext { pod_cidrs: cidrs.clone(), ..node() }, Some(PodSources::Cidrs(cidrs)))
    };
    let (node, pods) = with("10.1.0.0/24");
    cluster.view.set_node(node);
    let changed = cluster.view.update(&cluster.state, &[]);
    assert_eq!((changed.services, changed.node), (vec![web.key.clone()], true));
    assert_eq!(cluster.view.plan().node.pods, pods);
    assert_eq!(actions(&cluster), (kept, masqueraded));

    // Another range: the same actions, for other packets.
    let (node, pods) = with("10.2.0.0/24");
    cluster.view.set_node(node);
    let changed = cluster.view.update(&cluster.state, &[]);
    assert_eq!((changed.services, changed.node), (Vec::new(), true));
    assert_eq!(cluster.view.plan().node.pods, pods);
}

#[test]
fn interfaces_tell_pods_in_both_families() {
    let name = InterfaceName::new("br0").unwrap();
    for (detect_local, pods) in [
        (DetectLocal::BridgeInterface(name.clone()), PodSources::Interface(name.clone())),
        (DetectLocal::InterfaceNamePrefix(name.clone()), PodSources::InterfacePrefix(name.clone())),
    ] {
        let config = ViewConfig { detect_local, ..config() };
        assert_eq!(config.node_plan(&node(), &[], &[]).pods, Some(pods));
        let facts = Facts::new(&config, &node());
        assert!(Family::ALL.into_iter().all(|family| facts.tells_pods(family)));
    }
}

#[test]
fn an_update_that_changes_nothing_names_nothing_and_keeps_the_plan() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    cluster.put(web.clone());
    let before = cluster.plan(&web);
    web.publish_not_ready_addresses = true;
    assert!(cluster.put(web.clone()).is_empty());
    assert!(std::sync::Arc::ptr_eq(&before, &cluster.plan(&web)));
}

#[test]
fn a_zone_that_changes_plans_everything_again() {
    let mut cluster = Cluster::new(config());
    let web = service("a/web", &["172.30.0.1"]);
    cluster.put(web.clone());
    let near = hinted(endpoint("10.1.0.1", "n2", READY), &["z1"], &[]);
    let far = hinted(endpoint("10.1.0.2", "n2", READY), &["z2"], &[]);
    cluster.put(slice(&web, "s1", vec![near, far]));
    cluster.view.set_node(NodeContext { zone: Some("z2".into()), ..node() });
    let changed = cluster.view.update(&cluster.state, &[]);
    assert_eq!((changed.services, changed.node), (vec![web.key.clone()], false));
    assert_eq!(texts(&only_port(&cluster.plan(&web)).cluster), ["10.1.0.2:8080"]);
}

#[test]
fn the_rest_of_a_cluster_ip_is_one_services_whoever_comes_and_goes() {
    let mut cluster = Cluster::new(config());
    let mut low = service("a/low", &["172.30.0.1", "fd00:30::1"]);
    let mut high = service("b/high", &["172.30.0.1"]);
    high.ports = vec![port("", Protocol::Tcp, 81)];
    cluster.put(high.clone());
    assert_eq!(cluster.plan(&high).cluster_ips, [ip("172.30.0.1")], "without endpoints too");
    let changed = cluster.put(low.clone());
    assert_eq!(changed.services, [low.key.clone(), high.key.clone()]);
    assert_eq!(cluster.plan(&low).cluster_ips, [ip("172.30.0.1"), ip("fd00:30::1")]);
    assert_eq!(cluster.plan(&high).cluster_ips, [] as [std::net::IpAddr; 0]);
    assert!(cluster.plan(&high).conflicts.is_empty(), "its own port is its own");
    // A change that moves no address gives it to nobody else.
    cluster.put(slice(&high, "s1", vec![endpoint("10.1.0.1", "n2", READY)]));
    assert_eq!(cluster.plan(&high).cluster_ips, [] as [std::net::IpAddr; 0]);
    low.ports.clear();
    assert_eq!(cluster.put(low.clone()).services, [low.key.clone(), high.key.clone()]);
    assert_eq!(cluster.plan(&high).cluster_ips, [ip("172.30.0.1")]);
    cluster.remove(&Key::Service(low.key));
    assert_eq!(cluster.plan(&high).cluster_ips, [ip("172.30.0.1")]);
}

#[test]
fn service_cidrs_are_the_nodes_and_concern_no_service() {
    let cidr = |name: &str, cidrs: &[&str]| {
        let cidrs = cidrs.iter().map(|it| it.parse().unwrap()).collect();
        let mut cidr = ServiceCidr { key: ServiceCidrKey(name.into()), cidrs };
        cidr.canonicalise();
        cidr
    };
    let mut cluster = Cluster::new(config());
    cluster.put(service("a/web", &["172.30.0.1"]));
    let changed = cluster.put(cidr("kubernetes", &["172.30.0.0/24", "fd00:30::/112"]));
    assert_eq!(changed, Changed { services: vec![], node: false, service_cidrs: true });
    let ranges = |cluster: &Cluster| {
        let ranges = cluster.view.plan().node.service_cidrs.iter();
        ranges.map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(ranges(&cluster), "172.30.0.0/24 fd00:30::/112");
    assert!(cluster.put(cidr("more", &["172.30.0.128/25"])).is_empty(), "inside what is there");
    cluster.put(cidr("more", &["172.30.0.0/16"]));
    assert_eq!(ranges(&cluster), "172.30.0.0/16 fd00:30::/112");
    // Node and addresses may change beside them.
    cluster.view.set_node(NodeContext { zone: None, ..node() });
    assert!(!cluster.view.update(&cluster.state, &[]).service_cidrs);
    assert_eq!(ranges(&cluster), "172.30.0.0/16 fd00:30::/112");
    assert!(cluster.remove(&Key::ServiceCidr(ServiceCidrKey("kubernetes".into()))).service_cidrs);
    assert!(cluster.remove(&Key::ServiceCidr(ServiceCidrKey("more".into()))).service_cidrs);
    assert_eq!(ranges(&cluster), "");
    let mut v4_only = Cluster::new(ViewConfig { families: vec![Family::V4], ..config() });
    v4_only.put(cidr("kubernetes", &["172.30.0.0/24", "fd00:30::/112"]));
    assert_eq!(ranges(&v4_only), "172.30.0.0/24");
}

#[test]
fn addresses_of_nodes_that_services_name_matter_where_addresses_are_bound() {
    let named = ["192.168.0.3", "2001:db8::3"].map(ip);
    let told = NodeContext { node_addresses: named.into(), ..node() };
    let mut other = Cluster::new(config());
    other.view.set_node(told.clone());
    assert!(other.view.update(&other.state, &[]).is_empty(), "nobody else has anything to do by it");
    let mut binding = Cluster::new(ViewConfig { binds_addresses: true, ..config() });
    binding.view.set_node(told.clone());
    assert!(binding.view.update(&binding.state, &[]).node);
    assert_eq!(binding.view.plan().node.node_addresses, named);
    binding.view.set_node(node());
    assert!(binding.view.update(&binding.state, &[]).node);
    let v4_only = ViewConfig { binds_addresses: true, families: vec![Family::V4], ..config() };
    assert_eq!(v4_only.node_plan(&told, &[], &[]).node_addresses, named[..1]);
}

#[test]
fn explanations_name_the_reason() {
    let web = service("a/web", &["172.30.0.1"]);
    let s1 = slice(
        &web,
        "s1",
        vec![
            hinted(endpoint("10.1.0.1", "n1", READY), &["z1"], &[]),
            hinted(endpoint("10.1.0.2", "n2", READY), &["z2"], &[]),
            endpoint("10.1.0.3", "n1", UNREADY),
            endpoint("10.1.0.4", "n1", DRAINING),
            endpoint("10.1.0.5", "n2", DRAINING),
        ],
    );
    let s2 = slice(&web, "s2", vec![hinted(endpoint("10.1.0.5", "n1", READY), &["z1"], &[])]);
    let mut s3 = slice(&web, "s3", vec![endpoint("10.1.0.6", "n1", READY)]);
    s3.ports.clear();
    let s4 = slice(&web, "s4", vec![endpoint("fd00:10::1", "n1", READY)]);
    let cluster = Cluster::new(config());
    let explained = explain(&web, &[&s1, &s2, &s3, &s4], cluster.view.facts());
    let reasons: Vec<_> = explained[0].endpoints.iter().map(|it| (it.not_cluster, it.not_local)).collect();
    let both = |reason| (Some(reason), Some(reason));
    assert_eq!(
        reasons,
        [
            (None, None),
            (Some(Exclusion::OtherZone), Some(Exclusion::NotLocal)),
            both(Exclusion::NotReady),
            both(Exclusion::Terminating),
            both(Exclusion::Duplicate),
            (None, None),
            both(Exclusion::PortMissing),
            both(Exclusion::Family),
        ]
    );
}

#[test]
fn the_short_circuit_needs_the_cluster_pool_without_a_local_endpoint() {
    let mut cluster = Cluster::new(config());
    let mut web = service("a/web", &["172.30.0.1"]);
    web.external_ips = vec![ip("203.0.113.1")];
    web.external_traffic_policy = TrafficPolicy::Local;
    cluster.put(web.clone());
    cluster.put(slice(&web, "s1", vec![endpoint("10.1.0.2", "n2", READY)]));
    let plan = cluster.plan(&web);
    let external = &only_port(&plan).frontends[1];
    assert_eq!(external.from_elsewhere, Action::Drop);
    assert_eq!(external.from_pod, Action::Forward { pool: Pool::Cluster, masquerade: false });
    assert_eq!(only_port(&plan).cluster.len(), 1);
}

#[test]
fn load_balancers_leave_a_node_alone_that_nobody_knows_or_that_is_on_its_way_out() {
    let known = node();
    assert!(load_balancers_may_use(&known));
    assert!(!load_balancers_may_use(&NodeContext { being_removed: true, ..known.clone() }));
    assert!(!load_balancers_may_use(&NodeContext::unknown("n1")));
    // It changes nothing of what is programmed.
    let mut cluster = Cluster::new(config());
    let web = service("a/web", &["172.30.0.1"]);
    cluster.put(web.clone());
    cluster.view.set_node(NodeContext { being_removed: true, ..known });
    assert!(cluster.view.update(&cluster.state, &[]).is_empty());
}
