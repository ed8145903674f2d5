//! Services.

use lockstep_model::{Protocol, ServiceType, TrafficDistribution, TrafficPolicy};
use serde_json::{Value, json};

use super::{faults, good_service, merged, service_with};
use crate::convert::{Outcome, Skip};

#[test]
fn a_service_as_it_is() {
    let service = good_service(json!({}));
    assert_eq!(service.key.to_string(), "shop/web");
    assert_eq!(service.service_type, ServiceType::LoadBalancer);
    assert_eq!(
        service.cluster_ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.1", "fd00::1"]
    );
    let ports = service.ports.iter();
    let ports: Vec<_> = ports
        .map(|port| {
            (&*port.name, port.protocol, port.port.get(), port.node_port.map_or(0, |port| port.get()))
        })
        .collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 80, 30080), ("dns", Protocol::Udp, 53, 0)]);
    assert_eq!(service.internal_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.external_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.client_ip_affinity_seconds, None);
    assert_eq!(service.health_check_node_port, None);
    assert!(!service.publish_not_ready_addresses);
}

#[test]
fn services_for_others() {
    let rows = [
        (json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}), Skip::Headless),
        (json!({"spec": {"clusterIP": null, "clusterIPs": ["None"]}}), Skip::Headless),
        (json!({"spec": {"clusterIP": "", "clusterIPs": null}}), Skip::NoClusterIp),
        (json!({"spec": {"clusterIP": null, "clusterIPs": []}}), Skip::NoClusterIp),
        (json!({"spec": {"type": "ExternalName", "externalName": "example.com"}}), Skip::ExternalName),
        (json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}}), Skip::OtherProxy),
        (json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}), Skip::Headless),
        // What is not ours to read is not ours to fault.
        (
            json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 0}]}}),
            Skip::Headless,
        ),
    ];
    for (changes, skip) in rows {
        assert_eq!(service_with(&changes), Ok(Outcome::Skip(skip)), "{changes}");
    }
}

#[test]
fn defaults_of_services() {
    let service = good_service(json!({
        "metadata": {"namespace": null},
        "spec": {"type": null, "clusterIPs": null, "ports": [{"port": 80}]},
    }));
    assert_eq!(service.key.to_string(), "default/web");
    assert_eq!(service.service_type, ServiceType::ClusterIp);
    assert_eq!(service.cluster_ips.len(), 1, "clusterIP stands in for clusterIPs");
    assert_eq!((&*service.ports[0].name, service.ports[0].protocol), ("", Protocol::Tcp));
    assert_eq!(service.ports[0].app_protocol, None);
}

#[test]
fn sloppy_addresses_are_read_as_kubernetes_reads_them() {
    let service = good_service(json!({"spec": {
        "clusterIP": "172.30.0.041", "clusterIPs": ["172.30.0.041"],
        "externalIPs": ["198.51.100.012", "::ffff:198.51.100.7", "198.51.100.12"],
        "loadBalancerSourceRanges": [" 203.0.113.000/025 ", "2001:db8::1/32", "10.9.8.7/8", "::ffff:192.0.2.77/120"],
    }, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.010"}]}}}));
    assert_eq!(service.cluster_ips[0].to_string(), "172.30.0.41");
    let texts = |values: &[std::net::IpAddr]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&service.external_ips), ["198.51.100.7", "198.51.100.12"]);
    let ranges: Vec<_> = service.load_balancer_source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.0.0.0/8", "192.0.2.0/24", "203.0.113.0/25", "2001:db8::/32"]);
    assert_eq!(service.load_balancer_ingress[0].ip.to_string(), "203.0.113.10");
}

#[test]
fn traffic_policies_and_health_check_ports() {
    let of = |changes| {
        let service = good_service(changes);
        let port = service.health_check_node_port.map_or(0, |port| port.get());
        (service.external_traffic_policy, port)
    };
    let local = |kind: &str| {
        json!({"spec": {"type": kind, "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
                        "ports": [{"port": 80}]}})
    };
    assert_eq!(of(local("LoadBalancer")), (TrafficPolicy::Local, 32000));
    assert_eq!(of(local("NodePort")), (TrafficPolicy::Local, 0));
    assert_eq!(of(local("ClusterIP")), (TrafficPolicy::Cluster, 0), "no way in from outside");
    let with_external_ip = merged(&local("ClusterIP"), &json!({"spec": {"externalIPs": ["198.51.100.1"]}}));
    assert_eq!(of(with_external_ip), (TrafficPolicy::Local, 0));
    let cluster = merged(&local("LoadBalancer"), &json!({"spec": {"externalTrafficPolicy": "Cluster"}}));
    assert_eq!(of(cluster), (TrafficPolicy::Cluster, 0));
    let none = merged(&local("LoadBalancer"), &json!({"spec": {"healthCheckNodePort": 0}}));
    assert_eq!(of(none), (TrafficPolicy::Local, 0));
    let internal = good_service(json!({"spec": {"internalTrafficPolicy": "Local"}}));
    assert_eq!(internal.internal_traffic_policy, TrafficPolicy::Local);
}

#[test]
fn affinity() {
    let of = |spec: Value| good_service(json!({"spec": spec})).client_ip_affinity_seconds;
    let client_ip = |seconds: Value| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
    assert_eq!(of(json!({"sessionAffinity": "None"})), None);
    assert_eq!(of(json!({"sessionAffinity": "ClientIP"})), Some(10_800));
    assert_eq!(of(client_ip(Value::Null)), Some(10_800));
    assert_eq!(of(client_ip(1.into())), Some(1));
    assert_eq!(of(client_ip(86_400.into())), Some(86_400));
}

#[test]
fn load_balancer_addresses() {
    let ingress = |entries: Value| json!({"status": {"loadBalancer": {"ingress": entries}}});
    let service = good_service(ingress(json!([
        {"hostname": "lb.example.com"},
        {"ip": "", "hostname": "lb.example.com"},
        {"ip": "203.0.113.2", "ipMode": "Proxy"},
        {"ip": "203.0.113.1", "ipMode": "VIP"},
        {"ip": "2001:db8::5"},
        {"ip": "2001:db8::5"},
        {"ip": "fe80::1"},
    ])));
    let all: Vec<_> =
        service.load_balancer_ingress.iter().map(|entry| (entry.ip.to_string(), entry.proxy_mode)).collect();
    let expected =
        [("203.0.113.1", false), ("203.0.113.2", true), ("2001:db8::5", false), ("fe80::1", false)];
    assert_eq!(all, expected.map(|(ip, proxy)| (ip.to_owned(), proxy)));
}

#[test]
fn for_display() {
    let of = |text: &str| good_service(json!({"spec": {"trafficDistribution": text}})).traffic_distribution;
    assert_eq!(of("PreferClose"), Some(TrafficDistribution::PreferSameZone));
    assert_eq!(of("PreferSameZone"), Some(TrafficDistribution::PreferSameZone));
    assert_eq!(of("PreferSameNode"), Some(TrafficDistribution::PreferSameNode));
    assert_eq!(of("PreferSomethingOfALaterKubernetes"), None);
    let service = good_service(json!({"spec": {
        "publishNotReadyAddresses": true, "ports": [{"port": 80, "appProtocol": "kubernetes.io/h2c"}]}}));
    assert!(service.publish_not_ready_addresses);
    assert_eq!(service.ports[0].app_protocol.as_deref(), Some("kubernetes.io/h2c"));
}

#[test]
fn faults_of_services() {
    let ports = |ports: Value| json!({"spec": {"ports": ports}});
    let cluster_ip = |ip: &str| json!({"spec": {"clusterIP": ip, "clusterIPs": [ip]}});
    let ingress = |entry: Value| json!({"status": {"loadBalancer": {"ingress": [{"hostname": "x"}, entry]}}});
    let two = |first: Value, second: Value| {
        ports(json!([
            merged(&json!({"name": "a", "port": 1}), &first),
            merged(&json!({"name": "b", "port": 2}), &second)
        ]))
    };
    faults(
        service_with,
        &[
            (
                json!({"metadata": {"name": "Web"}}),
                r#"metadata.name: "Web" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (
                json!({"metadata": {"name": null}}),
                r#"metadata.name: "" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (
                json!({"metadata": {"namespace": "a/b"}}),
                r#"metadata.namespace: "a/b" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (
                json!({"spec": {"type": "Loadbalancer"}}),
                r#"spec.type: "Loadbalancer" is not ClusterIP, NodePort, LoadBalancer or ExternalName"#,
            ),
            // Cluster IPs.
            (cluster_ip("10.0.0.256"), r#"spec.clusterIPs[0]: "10.0.0.256" is not an IP address"#),
            (cluster_ip("10.0.0"), r#"spec.clusterIPs[0]: "10.0.0" is not an IP address"#),
            (cluster_ip("10.0.0.1.2"), r#"spec.clusterIPs[0]: "10.0.0.1.2" is not an IP address"#),
            (cluster_ip("10.0.0.+1"), r#"spec.clusterIPs[0]: "10.0.0.+1" is not an IP address"#),
            (cluster_ip(" 10.0.0.1"), r#"spec.clusterIPs[0]: " 10.0.0.1" is not an IP address"#),
            (cluster_ip("10.0..1"), r#"spec.clusterIPs[0]: "10.0..1" is not an IP address"#),
            (cluster_ip("fd00::1%eth0"), r#"spec.clusterIPs[0]: "fd00::1%eth0" is not an IP address"#),
            (cluster_ip("web"), r#"spec.clusterIPs[0]: "web" is not an IP address"#),
            (cluster_ip("0.0.0.0"), r#"spec.clusterIPs[0]: "0.0.0.0" is the unspecified address"#),
            (cluster_ip("::"), r#"spec.clusterIPs[0]: "::" is the unspecified address"#),
            (cluster_ip("127.0.0.1"), r#"spec.clusterIPs[0]: "127.0.0.1" is a loopback address"#),
            (cluster_ip("::1"), r#"spec.clusterIPs[0]: "::1" is a loopback address"#),
            (
                cluster_ip("::ffff:127.0.0.1"),
                r#"spec.clusterIPs[0]: "::ffff:127.0.0.1" is a loopback address"#,
            ),
            (cluster_ip("169.254.1.1"), r#"spec.clusterIPs[0]: "169.254.1.1" is a link-local address"#),
            (cluster_ip("fe80::1"), r#"spec.clusterIPs[0]: "fe80::1" is a link-local address"#),
            (cluster_ip("224.0.0.1"), r#"spec.clusterIPs[0]: "224.0.0.1" is a multicast address"#),
            (cluster_ip("ff02::1"), r#"spec.clusterIPs[0]: "ff02::1" is a multicast address"#),
            (
                cluster_ip("255.255.255.255"),
                r#"spec.clusterIPs[0]: "255.255.255.255" is the broadcast address"#,
            ),
            (
                json!({"spec": {"clusterIP": "x", "clusterIPs": null}}),
                r#"spec.clusterIP: "x" is not an IP address"#,
            ),
            (
                json!({"spec": {"clusterIP": "10.0.0.2"}}),
                r#"spec.clusterIP: "10.0.0.2" is not the first of spec.clusterIPs (10.0.0.1)"#,
            ),
            (
                json!({"spec": {"clusterIPs": ["10.0.0.1", "10.0.0.2"]}}),
                r#"spec.clusterIPs[1]: "10.0.0.2" is the second address of its family"#,
            ),
            (
                json!({"spec": {"clusterIPs": ["10.0.0.1", "fd00::1", "fd00::2"]}}),
                r#"spec.clusterIPs[2]: "fd00::2" is the second address of its family"#,
            ),
            (
                json!({"spec": {"clusterIPs": ["10.0.0.1", "None"]}}),
                r#"spec.clusterIPs[1]: "None" is not an IP address"#,
            ),
            // Ports.
            (ports(json!([])), r#"spec.ports: "" is empty: a Service that is not headless has a port"#),
            (ports(json!([{"port": 0}])), r#"spec.ports[0].port: "0" is not a port number (1-65535)"#),
            (ports(json!([{"port": -1}])), r#"spec.ports[0].port: "-1" is not a port number (1-65535)"#),
            (
                ports(json!([{"port": 65536}])),
                r#"spec.ports[0].port: "65536" is not a port number (1-65535)"#,
            ),
            (
                ports(json!([{"port": 80, "nodePort": -1}])),
                r#"spec.ports[0].nodePort: "-1" is not a port number (1-65535)"#,
            ),
            (
                two(json!({}), json!({"nodePort": 70000})),
                r#"spec.ports[1].nodePort: "70000" is not a port number (1-65535)"#,
            ),
            (
                two(json!({"nodePort": 30000}), json!({"nodePort": 30000})),
                r#"spec.ports[1].nodePort: "30000" is the TCP node port of spec.ports[0] too"#,
            ),
            (
                json!({"spec": {"type": "ClusterIP"}}),
                r#"spec.ports[0].nodePort: "30080" is not for a Service of type ClusterIP"#,
            ),
            (
                two(json!({}), json!({"port": 1})),
                r#"spec.ports[1].port: "1" is the TCP port of spec.ports[0] too"#,
            ),
            (
                two(json!({}), json!({"name": "a"})),
                r#"spec.ports[1].name: "a" is the name of another port too"#,
            ),
            (
                two(json!({"name": null}), json!({"name": ""})),
                r#"spec.ports[1].name: "" is the name of another port too"#,
            ),
            (
                two(json!({}), json!({"name": "a b"})),
                r#"spec.ports[1].name: "a b" is not a DNS label (a-z, 0-9, -, at most 63)"#,
            ),
            (
                two(json!({}), json!({"protocol": "tcp"})),
                r#"spec.ports[1].protocol: "tcp" is not TCP, UDP or SCTP"#,
            ),
            (
                two(json!({}), json!({"appProtocol": "a b"})),
                r#"spec.ports[1].appProtocol: "a b" is not a qualified name"#,
            ),
            // Everything else.
            (
                json!({"spec": {"externalIPs": ["198.51.100.1", "x"]}}),
                r#"spec.externalIPs[1]: "x" is not an IP address"#,
            ),
            (
                json!({"spec": {"externalIPs": ["127.0.0.1"]}}),
                r#"spec.externalIPs[0]: "127.0.0.1" is a loopback address"#,
            ),
            (
                json!({"spec": {"externalIPs": ["169.254.0.1"]}}),
                r#"spec.externalIPs[0]: "169.254.0.1" is a link-local address"#,
            ),
            (ingress(json!({"ip": "x"})), r#"status.loadBalancer.ingress[1].ip: "x" is not an IP address"#),
            (
                ingress(json!({"ip": "::1"})),
                r#"status.loadBalancer.ingress[1].ip: "::1" is a loopback address"#,
            ),
            (
                ingress(json!({"ip": "203.0.113.1", "ipMode": "vip"})),
                r#"status.loadBalancer.ingress[1].ipMode: "vip" is not VIP or Proxy"#,
            ),
            (
                json!({"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "203.0.113.1", "ipMode": "Proxy"}]}}}),
                r#"status.loadBalancer.ingress[1].ipMode: "203.0.113.1" is listed with two modes"#,
            ),
            (
                json!({"spec": {"loadBalancerSourceRanges": ["10.0.0.0/8", "10.0.0.1"]}}),
                r#"spec.loadBalancerSourceRanges[1]: "10.0.0.1" is not a CIDR"#,
            ),
            (
                json!({"spec": {"loadBalancerSourceRanges": ["10.0.0.0/33"]}}),
                r#"spec.loadBalancerSourceRanges[0]: "10.0.0.0/33" has a longer prefix than its family allows"#,
            ),
            (
                json!({"spec": {"loadBalancerSourceRanges": ["10.0.0.0/+8"]}}),
                r#"spec.loadBalancerSourceRanges[0]: "10.0.0.0/+8" is not a CIDR"#,
            ),
            (
                json!({"spec": {"loadBalancerSourceRanges": ["10.0.0.0/8/9"]}}),
                r#"spec.loadBalancerSourceRanges[0]: "10.0.0.0/8/9" is not a CIDR"#,
            ),
            (
                json!({"spec": {"loadBalancerSourceRanges": ["::ffff:10.0.0.0/64"]}}),
                r#"spec.loadBalancerSourceRanges[0]: "::ffff:10.0.0.0/64" spans IPv4 and IPv6"#,
            ),
            (
                json!({"spec": {"loadBalancerSourceRanges": [""]}}),
                r#"spec.loadBalancerSourceRanges[0]: "" is not a CIDR"#,
            ),
            (
                json!({"spec": {"internalTrafficPolicy": "local"}}),
                r#"spec.internalTrafficPolicy: "local" is not Cluster or Local"#,
            ),
            (
                json!({"spec": {"externalTrafficPolicy": "Global"}}),
                r#"spec.externalTrafficPolicy: "Global" is not Cluster or Local"#,
            ),
            (
                json!({"spec": {"sessionAffinity": "Cookie"}}),
                r#"spec.sessionAffinity: "Cookie" is not None or ClientIP"#,
            ),
            (
                json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}}),
                r#"spec.sessionAffinityConfig.clientIP.timeoutSeconds: "0" is not between 1 and 86400"#,
            ),
            (
                json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}}),
                r#"spec.sessionAffinityConfig.clientIP.timeoutSeconds: "86401" is not between 1 and 86400"#,
            ),
            (
                json!({"spec": {"healthCheckNodePort": 65536}}),
                r#"spec.healthCheckNodePort: "65536" is not a port number (1-65535)"#,
            ),
            (
                json!({"spec": {"healthCheckNodePort": -2}}),
                r#"spec.healthCheckNodePort: "-2" is not a port number (1-65535)"#,
            ),
        ],
    );
}

#[test]
fn one_number_may_be_a_port_of_each_protocol() {
    let service = good_service(json!({"spec": {"ports": [
        {"name": "tcp", "port": 53, "nodePort": 30053}, {"name": "udp", "port": 53, "nodePort": 30053, "protocol": "UDP"},
        {"name": "sctp", "port": 53, "protocol": "SCTP"}]}}));
    assert_eq!(service.ports.len(), 3);
}

#[test]
fn a_long_value_is_cut_where_it_is_shown() {
    let fault = service_with(&json!({"metadata": {"name": "ä".repeat(500)}})).unwrap_err();
    assert_eq!(fault.value.chars().count(), 129);
    assert!(fault.value.ends_with('…'));
}
