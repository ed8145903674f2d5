//! Plans for tests, and what `nft` says about a namespace.
#![allow(dead_code)] // every test binary uses a part
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;

use lockstep_model::{Family, Port, Protocol, ServiceKey};
use lockstep_view::{
    Action, ForwardingPlan, Frontend, InterfaceName, NodePlan, NodePortScope, PodSources, Pool, PortPlan,
    ServicePlan, Surface, Target,
};

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

pub(crate) fn target(address: &str, number: u16) -> Target {
    Target { address: ip(address), port: port(number) }
}

pub(crate) fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

pub(crate) fn forward(pool: Pool, masquerade: bool) -> Action {
    Action::Forward { pool, masquerade }
}

/// A frontend with actions for pods, the node and all others.
pub(crate) fn frontend(surface: Surface, number: u16, actions: [Action; 3]) -> Frontend {
    let [from_pod, from_node, from_elsewhere] = actions;
    Frontend { surface, port: port(number), from_pod, from_node, from_elsewhere, allowed_sources: None }
}

/// Cluster IP: pods as they are, all others masqueraded.
pub(crate) fn cluster_ip(address: &str, number: u16) -> Frontend {
    let [plain, masquerade] = [false, true].map(|masquerade| forward(Pool::Cluster, masquerade));
    frontend(Surface::ClusterIp(ip(address)), number, [plain, masquerade, masquerade])
}

/// externalTrafficPolicy Cluster: everybody is masqueraded.
pub(crate) fn external(surface: Surface, number: u16) -> Frontend {
    frontend(surface, number, [forward(Pool::Cluster, true); 3])
}

/// externalTrafficPolicy Local: short circuit for pods and the node.
pub(crate) fn external_local(surface: Surface, number: u16, elsewhere: Action) -> Frontend {
    frontend(surface, number, [forward(Pool::Cluster, false), forward(Pool::Cluster, true), elsewhere])
}

pub(crate) fn port_plan(
    protocol: Protocol,
    number: u16,
    cluster: Vec<Target>,
    frontends: Vec<Frontend>,
) -> PortPlan {
    let mut plan = PortPlan {
        family: frontends
            .iter()
            .filter_map(|frontend| frontend.surface.address())
            .chain(cluster.iter().map(|target| target.address))
            .map(Family::of)
            .next()
            .unwrap_or(Family::V4),
        protocol,
        port: port(number),
        name: "".into(),
        cluster,
        local: Vec::new(),
        hairpin: Vec::new(),
        serving: Vec::new(),
        frontends,
        affinity_seconds: None,
    };
    plan.cluster.sort_unstable();
    plan.frontends.sort_unstable();
    plan
}

pub(crate) fn service(name: &str, mut ports: Vec<PortPlan>) -> Arc<ServicePlan> {
    ports.sort_by(|a, b| {
        (a.family, a.protocol, a.port, &a.name).cmp(&(b.family, b.protocol, b.port, &b.name))
    });
    let surfaces = ports.iter().flat_map(|port| &port.frontends).map(|frontend| frontend.surface);
    let mut cluster_ips: Vec<IpAddr> = surfaces
        .filter_map(|surface| match surface {
            Surface::ClusterIp(ip) => Some(ip),
            _ => None,
        })
        .collect();
    cluster_ips.sort_unstable();
    cluster_ips.dedup();
    Arc::new(ServicePlan {
        key: key(name),
        ports,
        required_features: Vec::new(),
        health_check: None,
        conflicts: Vec::new(),
        cluster_ips,
    })
}

pub(crate) fn node() -> NodePlan {
    NodePlan {
        pods: Some(PodSources::Cidrs(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:10:244::/56".parse().unwrap(),
        ])),
        node_ports_v4: NodePortScope::AllLocal,
        node_ports_v6: NodePortScope::Addresses(vec![ip("fd00::1"), ip("::1")]),
        localhost_node_ports: false,
        masquerade_mark: 0x4000,
        service_cidrs: ["10.96.0.0/12", "fd00:96::/112"].map(|cidr| cidr.parse().unwrap()).to_vec(),
        node_addresses: Vec::new(),
    }
}

/// Pods by the interface, or the beginning of its name.
pub(crate) fn pods_by_interface(plan: &mut ForwardingPlan, name: &str, prefix: bool) {
    let name = InterfaceName::new(name).unwrap();
    plan.node.pods =
        Some(if prefix { PodSources::InterfacePrefix(name) } else { PodSources::Interface(name) });
}

pub(crate) fn plan(services: impl IntoIterator<Item = Arc<ServicePlan>>) -> ForwardingPlan {
    ForwardingPlan {
        node: node(),
        services: services.into_iter().map(|service| (service.key.clone(), service)).collect(),
    }
}

/// The same, and an idle client keeps its endpoint for so many seconds.
pub(crate) fn affine(mut port: PortPlan, seconds: u32) -> PortPlan {
    port.affinity_seconds = Some(seconds);
    port
}

/// One Service of every shape that a plan can have, in both families.
pub(crate) fn every_shape() -> ForwardingPlan {
    use Surface::{ClusterIp, ExternalIp, LoadBalancerIp, NodePort};
    let v4 = || vec![target("10.244.1.2", 8080), target("10.244.2.2", 8080), target("10.244.3.2", 9090)];
    let v6 = || vec![target("fd00:10:244:1::2", 8080), target("fd00:10:244:2::2", 8080)];
    let mut local = port_plan(
        Protocol::Tcp,
        80,
        v4(),
        vec![
            cluster_ip("10.96.0.2", 80),
            external_local(NodePort, 30080, forward(Pool::Local, false)),
            external_local(LoadBalancerIp(ip("192.0.2.2")), 80, forward(Pool::Local, false)),
        ],
    );
    local.local = vec![target("10.244.1.2", 8080)];
    local.hairpin = local.local.clone();
    let mut sticky = affine(
        port_plan(
            Protocol::Tcp,
            80,
            v4(),
            vec![
                cluster_ip("10.96.0.5", 80),
                external_local(NodePort, 30005, forward(Pool::Local, false)),
                external_local(LoadBalancerIp(ip("192.0.2.5")), 80, forward(Pool::Local, false)),
            ],
        ),
        10_800,
    );
    sticky.local = vec![target("10.244.1.2", 8080)];
    let sticky_v6 =
        port_plan(Protocol::Udp, 53, v6(), vec![cluster_ip("fd00:96::5", 53), external(NodePort, 30005)]);
    let mut restricted = external(LoadBalancerIp(ip("192.0.2.7")), 80);
    restricted.allowed_sources =
        Some(["10.0.0.0/8", "203.0.113.7/32"].map(|net| net.parse().unwrap()).to_vec().into());
    let mut restricted_v6 = external(LoadBalancerIp(ip("2001:db8::7")), 80);
    restricted_v6.allowed_sources = Some(["fd00::/8"].map(|net| net.parse().unwrap()).to_vec().into());
    plan([
        service(
            "plain",
            vec![
                port_plan(
                    Protocol::Tcp,
                    80,
                    v4(),
                    vec![cluster_ip("10.96.0.1", 80), external(NodePort, 30001)],
                ),
                port_plan(Protocol::Udp, 53, v4(), vec![cluster_ip("10.96.0.1", 53)]),
                port_plan(
                    Protocol::Tcp,
                    80,
                    v6(),
                    vec![cluster_ip("fd00:96::1", 80), external(ExternalIp(ip("2001:db8::1")), 80)],
                ),
                port_plan(Protocol::Udp, 53, v6(), vec![external(NodePort, 30053)]),
            ],
        ),
        service("local", vec![local]),
        service(
            "nobody",
            vec![port_plan(
                Protocol::Tcp,
                80,
                vec![],
                vec![
                    frontend(ClusterIp(ip("10.96.0.3")), 80, [Action::Reject; 3]),
                    frontend(ExternalIp(ip("198.51.100.3")), 80, [Action::Reject; 3]),
                    frontend(NodePort, 30003, [Action::Reject; 3]),
                ],
            )],
        ),
        service(
            "elsewhere",
            vec![port_plan(
                Protocol::Tcp,
                80,
                v4(),
                vec![
                    cluster_ip("10.96.0.4", 80),
                    external_local(LoadBalancerIp(ip("192.0.2.4")), 80, Action::Drop),
                    external_local(NodePort, 30004, Action::Drop),
                    frontend(
                        ExternalIp(ip("198.51.100.4")),
                        80,
                        [Action::Reject, Action::Drop, Action::Drop],
                    ),
                ],
            )],
        ),
        service("sticky", vec![sticky, affine(sticky_v6, 86_400)]),
        service("restricted", vec![port_plan(Protocol::Tcp, 80, v4(), vec![restricted])]),
        service("restricted-v6", vec![port_plan(Protocol::Tcp, 80, v6(), vec![restricted_v6])]),
    ])
}

/// Runs a program and returns what it printed; panics where it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(
        output.status.success(),
        "{program} {}: {}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
