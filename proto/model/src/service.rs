use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::{Port, ServiceKey};

/// The front-end half of one Kubernetes Service, in canonical form: the order and the
/// uniqueness that each field states hold, see [`Service::canonicalise`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: ServiceKey,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs` in spec order, at most one per family.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`, sorted, unique.
    pub external_ips: Vec<IpAddr>,
    /// Load-balancer addresses, sorted by address, unique.
    pub load_balancer_ingress: Vec<LoadBalancerIngress>,
    /// Ports, sorted by (protocol, port, name); no two share (protocol, port) or name.
    pub ports: Vec<ServicePort>,
    /// Who answers on the cluster IPs.
    pub internal_traffic_policy: TrafficPolicy,
    /// Who answers on every other address.
    pub external_traffic_policy: TrafficPolicy,
    /// For display; the decision is in the endpoints' hints.
    pub traffic_distribution: Option<TrafficDistribution>,
    /// Session affinity by client IP: seconds an idle client keeps its endpoint.
    pub client_ip_affinity_seconds: Option<u32>,
    /// CIDRs that may use the load-balancer addresses, sorted, unique; empty = everybody.
    pub load_balancer_source_ranges: Vec<IpNet>,
    /// Port on which nodes answer load-balancer health checks.
    pub health_check_node_port: Option<Port>,
    /// For display; the decision is in [`Conditions`](crate::Conditions)`::ready`.
    pub publish_not_ready_addresses: bool,
}

/// One load-balancer address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoadBalancerIngress {
    /// The address.
    pub ip: IpAddr,
    /// `ipMode: Proxy`: nodes leave traffic to the address alone.
    pub proxy_mode: bool,
}

/// One port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on every address of the Service.
    pub port: Port,
    /// Name that endpoint ports refer to; empty = the unnamed port.
    pub name: Arc<str>,
    /// Port on the node addresses.
    pub node_port: Option<Port>,
    /// `appProtocol`, for display.
    pub app_protocol: Option<Arc<str>>,
}

/// Kubernetes `spec.type`, of the types that have something to program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ServiceType {
    /// ClusterIP.
    ClusterIp = 1,
    /// NodePort.
    NodePort = 2,
    /// LoadBalancer.
    LoadBalancer = 3,
}

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 1,
    /// UDP.
    Udp = 2,
    /// SCTP.
    Sctp = 3,
}

/// IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// IPv4.
    V4 = 1,
    /// IPv6.
    V6 = 2,
}

/// Which endpoints answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TrafficPolicy {
    /// All endpoints of the cluster.
    Cluster = 1,
    /// Only endpoints on the node that handles the packet.
    Local = 2,
}

/// `spec.trafficDistribution`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TrafficDistribution {
    /// PreferSameZone, also written PreferClose.
    PreferSameZone = 1,
    /// PreferSameNode.
    PreferSameNode = 2,
}

/// What a client must understand to program a Service without misrouting.
///
/// The discriminants are those of `lockstep.v1.Feature`; the two session-only features of
/// that enum are no property of a Service and are not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Feature {
    /// SCTP ports.
    Sctp = 1,
    /// Session affinity by client IP.
    SessionAffinity = 2,
    /// Load-balancer addresses that are left alone.
    LbProxyMode = 3,
    /// Load-balancer source ranges.
    SourceRanges = 4,
}

impl Family {
    /// Both families, in order.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// Family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

impl Protocol {
    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// Lower-case name, as the kernel tools write it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    /// Upper case, as Kubernetes writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

impl Service {
    /// Brings the fields into canonical order and drops duplicates; an empty text means the same
    /// as none, and host bits of ranges are cleared. Two ports with the same
    /// name or the same (protocol, port) are not duplicates but a fault, which the reader of
    /// the object reports; this keeps both.
    pub fn canonicalise(&mut self) {
        self.external_ips.sort_unstable();
        self.external_ips.dedup();
        self.load_balancer_ingress.sort_unstable();
        self.load_balancer_ingress.dedup_by_key(|ingress| ingress.ip);
        for port in &mut self.ports {
            port.app_protocol.take_if(|protocol| protocol.is_empty());
        }
        self.ports.sort_unstable();
        self.load_balancer_source_ranges = std::mem::take(&mut self.load_balancer_source_ranges)
            .into_iter()
            .map(|range| range.trunc())
            .collect();
        self.load_balancer_source_ranges.sort_unstable();
        self.load_balancer_source_ranges.dedup();
    }

    /// What a client must understand to program this Service, sorted.
    pub fn required_features(&self) -> Vec<Feature> {
        let needed = [
            (Feature::Sctp, self.ports.iter().any(|port| port.protocol == Protocol::Sctp)),
            (Feature::SessionAffinity, self.client_ip_affinity_seconds.is_some()),
            (Feature::LbProxyMode, self.load_balancer_ingress.iter().any(|ingress| ingress.proxy_mode)),
            (Feature::SourceRanges, !self.load_balancer_source_ranges.is_empty()),
        ];
        needed.into_iter().filter_map(|(feature, needed)| needed.then_some(feature)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(protocol: Protocol, number: u16, name: &str) -> ServicePort {
        ServicePort {
            protocol,
            port: Port::new(number).unwrap(),
            name: name.into(),
            node_port: None,
            app_protocol: None,
        }
    }

    fn service() -> Service {
        Service {
            key: ServiceKey::new("default", "web"),
            service_type: ServiceType::LoadBalancer,
            cluster_ips: vec!["fd00::1".parse().unwrap(), "10.96.0.1".parse().unwrap()],
            external_ips: Vec::new(),
            load_balancer_ingress: Vec::new(),
            ports: vec![port(Protocol::Tcp, 80, "http")],
            internal_traffic_policy: TrafficPolicy::Cluster,
            external_traffic_policy: TrafficPolicy::Local,
            traffic_distribution: None,
            client_ip_affinity_seconds: None,
            load_balancer_source_ranges: Vec::new(),
            health_check_node_port: None,
            publish_not_ready_addresses: false,
        }
    }

    #[test]
    fn canonical_order() {
        let mut it = service();
        it.external_ips = ["::1", "9.0.0.1", "10.0.0.1", "9.0.0.1"].map(|ip| ip.parse().unwrap()).to_vec();
        it.ports = vec![
            port(Protocol::Udp, 53, "dns"),
            port(Protocol::Tcp, 443, "https"),
            port(Protocol::Tcp, 53, "dns-tcp"),
        ];
        it.ports[0].app_protocol = Some("".into());
        let ranges = ["fd00::/8", "10.1.2.3/8", "10.0.0.0/8", "10.0.0.0/16"];
        it.load_balancer_source_ranges = ranges.map(|range| range.parse().unwrap()).to_vec();
        let ingress = |ip: &str, proxy_mode| LoadBalancerIngress { ip: ip.parse().unwrap(), proxy_mode };
        it.load_balancer_ingress =
            vec![ingress("192.0.2.2", true), ingress("192.0.2.1", false), ingress("192.0.2.2", false)];
        it.canonicalise();

        assert_eq!(it.cluster_ips, service().cluster_ips, "the first one is the primary family");
        assert_eq!(
            it.external_ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["9.0.0.1", "10.0.0.1", "::1"]
        );
        let names: Vec<_> = it.ports.iter().map(|port| &*port.name).collect();
        assert_eq!(names, ["dns-tcp", "https", "dns"]);
        assert_eq!(it.ports[2].app_protocol, None);
        let ranges: Vec<_> = it.load_balancer_source_ranges.iter().map(ToString::to_string).collect();
        assert_eq!(ranges, ["10.0.0.0/8", "10.0.0.0/16", "fd00::/8"]);
        assert_eq!(it.load_balancer_ingress, [ingress("192.0.2.1", false), ingress("192.0.2.2", false)]);
    }

    #[test]
    fn features_follow_from_the_fields() {
        let mut it = service();
        assert_eq!(it.required_features(), []);
        it.load_balancer_source_ranges = vec!["10.0.0.0/8".parse().unwrap()];
        it.load_balancer_ingress =
            vec![LoadBalancerIngress { ip: "192.0.2.1".parse().unwrap(), proxy_mode: true }];
        it.client_ip_affinity_seconds = Some(1);
        it.ports.push(port(Protocol::Sctp, 80, "sctp"));
        let all = [Feature::Sctp, Feature::SessionAffinity, Feature::LbProxyMode, Feature::SourceRanges];
        assert_eq!(it.required_features(), all);
    }
}
