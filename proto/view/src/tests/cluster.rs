//! A small cluster that tests fill: objects from short texts, and random ones.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use lockstep_model::{
    Conditions, Endpoint, EndpointPort, EndpointSet, EndpointSetKey, Family, Hints, Key, LoadBalancerIngress,
    NodeContext, Protocol, Resource, Service, ServiceCidr, ServiceCidrKey, ServiceKey, ServicePort,
    ServiceType, State, TrafficPolicy,
};

use crate::{Changed, DetectLocal, InterfaceName, NodePortAddresses, ServicePlan, View, ViewConfig};

pub(super) const READY: Conditions = Conditions::READY;
pub(super) const UNREADY: Conditions = Conditions { ready: false, serving: true, terminating: false };
pub(super) const DRAINING: Conditions = Conditions { ready: false, serving: true, terminating: true };
pub(super) const DEAD: Conditions = Conditions { ready: false, serving: false, terminating: true };

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn number(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).unwrap()
}

/// `namespace/name` with one unnamed TCP port 80.
pub(super) fn service(key: &str, cluster_ips: &[&str]) -> Service {
    let (namespace, name) = key.split_once('/').unwrap();
    Service {
        key: ServiceKey::new(namespace, name),
        service_type: ServiceType::ClusterIp,
        cluster_ips: cluster_ips.iter().map(|it| ip(it)).collect(),
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: vec![port("", Protocol::Tcp, 80)],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        traffic_distribution: None,
        client_ip_affinity_seconds: None,
        load_balancer_source_ranges: Vec::new(),
        health_check_node_port: None,
        publish_not_ready_addresses: false,
    }
}

pub(super) fn port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort { protocol, port: number(port), name: name.into(), node_port: None, app_protocol: None }
}

pub(super) fn vip(address: &str) -> LoadBalancerIngress {
    LoadBalancerIngress { ip: ip(address), proxy_mode: false }
}

/// A slice with one unnamed TCP port 8080.
pub(super) fn slice(service: &Service, name: &str, endpoints: Vec<Endpoint>) -> EndpointSet {
    let family = endpoints.first().map_or(Family::V4, |it| Family::of(it.address));
    let ports = vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: number(8080) }];
    let mut set =
        EndpointSet { key: EndpointSetKey::new(service.key.clone(), name), family, ports, endpoints };
    set.canonicalise();
    set
}

pub(super) fn endpoint(address: &str, node: &str, conditions: Conditions) -> Endpoint {
    Endpoint {
        address: ip(address),
        node_name: (!node.is_empty()).then(|| node.into()),
        zone: None,
        conditions,
        hints: None,
    }
}

pub(super) fn hinted(mut endpoint: Endpoint, zones: &[&str], nodes: &[&str]) -> Endpoint {
    let texts = |list: &[&str]| list.iter().map(|it| Arc::from(*it)).collect();
    endpoint.hints = Some(Box::new(Hints { zones: texts(zones), nodes: texts(nodes) }));
    endpoint
}

/// Node `n1` in zone `z1`, 192.168.0.2 and 2001:db8::1.
pub(super) fn node() -> NodeContext {
    NodeContext {
        uid: Some("uid".into()),
        zone: Some("z1".into()),
        addresses: vec![ip("192.168.0.2"), ip("192.168.1.2"), ip("2001:db8::1")],
        ..NodeContext::unknown("n1")
    }
}

const CLUSTER_CIDRS: [&str; 2] = ["10.0.0.0/8", "fd00:10::/64"];

/// Pods in these two.
pub(super) fn config() -> ViewConfig {
    ViewConfig {
        detect_local: DetectLocal::ClusterCidrs(CLUSTER_CIDRS.map(|cidr| cidr.parse().unwrap()).into()),
        ..ViewConfig::new("n1")
    }
}

/// State and view together; what is put in is planned at once.
pub(super) struct Cluster {
    pub(super) state: State,
    pub(super) view: View,
}

impl Cluster {
    pub(super) fn new(config: ViewConfig) -> Self {
        let mut view = View::new(config);
        view.set_node(node());
        let state = State::default();
        view.update(&state, &[]);
        Self { state, view }
    }

    pub(super) fn put(&mut self, resource: impl Into<Resource>) -> Changed {
        let resource = resource.into();
        let keys: Vec<_> = resource.key().service().cloned().into_iter().collect();
        self.state.upsert(resource.version(), resource);
        self.view.update(&self.state, &keys)
    }

    pub(super) fn remove(&mut self, key: &Key) -> Changed {
        self.state.remove(key);
        let keys: Vec<_> = key.service().cloned().into_iter().collect();
        self.view.update(&self.state, &keys)
    }

    pub(super) fn plan(&self, service: &Service) -> Arc<ServicePlan> {
        self.view.plan().service(&service.key).unwrap().clone()
    }

    pub(super) fn plans(&self) -> BTreeMap<ServiceKey, ServicePlan> {
        self.view.plan().services.iter().map(|(key, plan)| (key.clone(), (**plan).clone())).collect()
    }
}

/// Draws objects from a universe so small that every rule meets every other.
pub(super) struct Draw(pub(super) fastrand::Rng);

impl Draw {
    fn of<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.0.usize(..from.len())].clone()
    }

    fn some<T: Clone>(&mut self, from: &[T]) -> Vec<T> {
        from.iter().filter(|_| self.0.u8(..3) == 0).cloned().collect()
    }

    pub(super) fn key(&mut self) -> ServiceKey {
        let keys = ["a/x", "a/y", "b/x", "b/y"].map(|key| service(key, &[]).key);
        self.of(&keys)
    }

    pub(super) fn service(&mut self) -> Service {
        let policies = [TrafficPolicy::Cluster, TrafficPolicy::Local];
        let v4 = ["172.30.0.1", "172.30.0.2", "172.30.0.3"];
        let v6 = ["fd00:30::1", "fd00:30::2"];
        let ips = match self.0.u8(..4) {
            0 => vec![self.of(&v6)],
            1 => vec![self.of(&v6), self.of(&v4)],
            _ => vec![self.of(&v4)],
        };
        let shared = ["203.0.113.1", "203.0.113.2", "172.30.0.1", "2001:db8:9::1"].map(ip);
        let ranges = ["203.0.113.0/24", "192.168.0.0/23", "10.0.0.0/8", "2001:db8::/64", "0.0.0.0/0", "::/0"];
        let all_ports = [
            port("", Protocol::Tcp, 80),
            port("a", Protocol::Tcp, 81),
            port("a2", Protocol::Udp, 80),
            port("b", Protocol::Sctp, 80),
        ];
        let mut ports = self.some(&all_ports);
        for (at, port) in ports.iter_mut().enumerate() {
            if self.0.bool() {
                port.node_port = Some(number(30000 + u16::try_from(at).unwrap() + self.0.u16(..3) * 10));
            }
        }
        let mut service = Service {
            key: self.key(),
            service_type: self.of(&[
                ServiceType::ClusterIp,
                ServiceType::NodePort,
                ServiceType::LoadBalancer,
            ]),
            external_ips: self.some(&shared),
            ports,
            internal_traffic_policy: self.of(&policies),
            external_traffic_policy: self.of(&policies),
            client_ip_affinity_seconds: self.of(&[None, None, Some(10800)]),
            load_balancer_source_ranges: self.some(&ranges.map(|range| range.parse().unwrap())),
            health_check_node_port: self.of(&[None, Some(number(32000))]),
            ..service("a/a", &ips)
        };
        let ingress = self.some(&shared);
        service.load_balancer_ingress = ingress
            .into_iter()
            .map(|ip| LoadBalancerIngress { ip, proxy_mode: self.0.u8(..4) == 0 })
            .collect();
        service.canonicalise();
        service
    }

    pub(super) fn set_key(&mut self) -> EndpointSetKey {
        EndpointSetKey::new(self.key(), self.of(&["s1", "s2", "s3"]))
    }

    pub(super) fn set(&mut self) -> EndpointSet {
        let family = self.of(&[Family::V4, Family::V4, Family::V6]);
        let ports = ["", "a", "a2", "b"].map(|name| EndpointPort {
            name: name.into(),
            protocol: match name {
                "a2" => Protocol::Udp,
                "b" => Protocol::Sctp,
                _ => Protocol::Tcp,
            },
            port: number(8080 + self.0.u16(..2)),
        });
        let ports = ports.into_iter().filter(|_| self.0.u8(..4) != 0).collect();
        let hint = self.0.u8(..3) != 0;
        let endpoints = (1..=4)
            .filter_map(|at| {
                let address = match family {
                    Family::V4 => format!("10.1.0.{at}"),
                    Family::V6 => format!("fd00:10::{at}"),
                };
                let conditions = self.of(&[READY, READY, UNREADY, DRAINING, DEAD]);
                let here = self.of(&["", "n1", "n2"]);
                let one = endpoint(&address, here, conditions);
                let one = match self.0.u8(..8) {
                    _ if !hint => one,
                    0 => one,
                    1 | 2 => hinted(one, &["z1"], &[self.of(&["n1", "n2"])]),
                    3 => hinted(one, &[], &["n1"]),
                    _ => hinted(one, &[self.of(&["z1", "z2"])], &[]),
                };
                self.0.bool().then_some(one)
            })
            .collect();
        let mut set = EndpointSet { key: self.set_key(), family, ports, endpoints };
        set.canonicalise();
        set
    }

    pub(super) fn cidr_key(&mut self) -> ServiceCidrKey {
        ServiceCidrKey(self.of(&["r1", "r2", "r3"]).into())
    }

    pub(super) fn cidr(&mut self) -> ServiceCidr {
        let ranges = ["172.30.0.0/16", "172.30.0.0/24", "172.30.4.0/24", "172.31.0.0/16", "fd00:30::/108"];
        let cidrs = self.some(&ranges.map(|range| range.parse().unwrap()));
        let mut cidr = ServiceCidr { key: self.cidr_key(), cidrs };
        cidr.canonicalise();
        cidr
    }

    pub(super) fn node(&mut self) -> NodeContext {
        let cidrs = ["10.1.0.0/24", "fd00:10:1::/64"].map(|cidr| cidr.parse().unwrap());
        let zone = self.of(&[None, Some("z1".into()), Some("z2".into())]);
        NodeContext { zone, pod_cidrs: self.some(&cidrs), ..node() }
    }

    pub(super) fn config(&mut self) -> ViewConfig {
        let cidrs = self.some(&CLUSTER_CIDRS.map(|cidr| cidr.parse().unwrap()));
        let name = |text| InterfaceName::new(text).unwrap();
        let scopes =
            [vec!["192.168.0.0/24"], vec!["192.168.0.0/16", "127.0.0.0/16", "::1/128"], vec!["0.0.0.0/0"]];
        let [some, with_loopback, every] = scopes.map(|scope| {
            NodePortAddresses::Cidrs(scope.into_iter().map(|cidr| cidr.parse().unwrap()).collect())
        });
        ViewConfig {
            detect_local: self.of(&[
                DetectLocal::ClusterCidrs(cidrs.clone()),
                DetectLocal::ClusterCidrs(cidrs),
                DetectLocal::NodeCidrs,
                DetectLocal::BridgeInterface(name("br0")),
                DetectLocal::InterfaceNamePrefix(name("veth")),
            ]),
            localhost_node_ports: self.0.bool(),
            node_port_addresses: self.of(&[
                NodePortAddresses::AllLocal,
                NodePortAddresses::Primary,
                some,
                with_loopback,
                every,
            ]),
            masquerade_all: self.0.u8(..4) == 0,
            families: self.of(&[Family::ALL.to_vec(), vec![Family::V4]]),
            ..config()
        }
    }
}
