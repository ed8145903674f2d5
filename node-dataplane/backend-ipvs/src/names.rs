//! Names of sets and chains. They are kube-proxy's, where it has one for the purpose, so that a host
//! can go from one to the other and back, and `ipset list` says what its users know.

use lockstep_kernel::ipset::Kind;
use lockstep_model::{Family, Protocol};

/// The interface that addresses of Services are bound to.
pub(crate) const DEVICE: &str = "kube-ipvs0";

/// What a set is for. One per family, whose name in IPv6 begins otherwise. In the order in which what
/// belongs to one Service is entered; it is withdrawn the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Purpose {
    /// Endpoints that can meet themselves as clients.
    LoopBack,
    /// Cluster IPs.
    ClusterIp,
    /// Cluster IPs whose every client is hidden. Not kube-proxy's: there it is one rule for all.
    ClusterIpMasquerade,
    /// External IPs whose clients are hidden.
    ExternalIp,
    /// External IPs that keep their client's address.
    ExternalIpLocal,
    /// Load balancers' addresses, all.
    LoadBalancer,
    /// Those that keep their client's address.
    LoadBalancerLocal,
    /// The sources that those are open to which are closed to some.
    SourceCidr,
    /// Those that are open to the node itself, which asks from the very address that it asks for.
    SourceIp,
    /// Those that are closed to some sources. After what they are open to, which has to be there first.
    Firewall,
    /// Node ports by number.
    NodePortTcp,
    /// Those that keep their client's address.
    NodePortLocalTcp,
    /// The same for UDP.
    NodePortUdp,
    /// The same for UDP.
    NodePortLocalUdp,
    /// Node ports by address and number.
    NodePortSctp,
    /// Those that keep their client's address.
    NodePortLocalSctp,
    /// Node ports of health checks.
    HealthCheck,
    /// What is bound to the interface.
    Bound,
    /// What is dropped, whoever asks. Not kube-proxy's.
    Drop,
    /// What is dropped unless a pod or the node asks. Not kube-proxy's.
    DropExternal,
}

/// A set of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Set {
    pub(crate) family: Family,
    pub(crate) purpose: Purpose,
}

impl Purpose {
    pub(crate) const ALL: [Purpose; 20] = [
        Purpose::LoopBack,
        Purpose::ClusterIp,
        Purpose::ClusterIpMasquerade,
        Purpose::ExternalIp,
        Purpose::ExternalIpLocal,
        Purpose::LoadBalancer,
        Purpose::LoadBalancerLocal,
        Purpose::SourceCidr,
        Purpose::SourceIp,
        Purpose::Firewall,
        Purpose::NodePortTcp,
        Purpose::NodePortLocalTcp,
        Purpose::NodePortUdp,
        Purpose::NodePortLocalUdp,
        Purpose::NodePortSctp,
        Purpose::NodePortLocalSctp,
        Purpose::HealthCheck,
        Purpose::Bound,
        Purpose::Drop,
        Purpose::DropExternal,
    ];

    /// How it is named in IPv4, and in IPv6, where a name has 31 characters at most.
    fn names(self) -> [&'static str; 2] {
        match self {
            Purpose::LoopBack => ["KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK"],
            Purpose::ClusterIp => ["KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP"],
            Purpose::ClusterIpMasquerade => ["KUBE-CLUSTER-IP-MASQ", "KUBE-6-CLUSTER-IP-MASQ"],
            Purpose::ExternalIp => ["KUBE-EXTERNAL-IP", "KUBE-6-EXTERNAL-IP"],
            Purpose::ExternalIpLocal => ["KUBE-EXTERNAL-IP-LOCAL", "KUBE-6-EXTERNAL-IP-LOCAL"],
            Purpose::LoadBalancer => ["KUBE-LOAD-BALANCER", "KUBE-6-LOAD-BALANCER"],
            Purpose::LoadBalancerLocal => ["KUBE-LOAD-BALANCER-LOCAL", "KUBE-6-LOAD-BALANCER-LOCAL"],
            Purpose::Firewall => ["KUBE-LOAD-BALANCER-FW", "KUBE-6-LOAD-BALANCER-FW"],
            Purpose::SourceCidr => ["KUBE-LOAD-BALANCER-SOURCE-CIDR", "KUBE-6-LOAD-BALANCER-SOURCE-CID"],
            Purpose::SourceIp => ["KUBE-LOAD-BALANCER-SOURCE-IP", "KUBE-6-LOAD-BALANCER-SOURCE-IP"],
            Purpose::NodePortTcp => ["KUBE-NODE-PORT-TCP", "KUBE-6-NODE-PORT-TCP"],
            Purpose::NodePortLocalTcp => ["KUBE-NODE-PORT-LOCAL-TCP", "KUBE-6-NODE-PORT-LOCAL-TCP"],
            Purpose::NodePortUdp => ["KUBE-NODE-PORT-UDP", "KUBE-6-NODE-PORT-UDP"],
            Purpose::NodePortLocalUdp => ["KUBE-NODE-PORT-LOCAL-UDP", "KUBE-6-NODE-PORT-LOCAL-UDP"],
            Purpose::NodePortSctp => ["KUBE-NODE-PORT-SCTP-HASH", "KUBE-6-NODE-PORT-SCTP-HASH"],
            Purpose::NodePortLocalSctp => {
                ["KUBE-NODE-PORT-LOCAL-SCTP-HASH", "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS"]
            }
            Purpose::HealthCheck => ["KUBE-HEALTH-CHECK-NODE-PORT", "KUBE-6-HEALTH-CHECK-NODE-PORT"],
            Purpose::Bound => ["KUBE-IPVS-IPS", "KUBE-6-IPVS-IPS"],
            Purpose::Drop => ["KUBE-DROP", "KUBE-6-DROP"],
            Purpose::DropExternal => ["KUBE-DROP-EXTERNAL", "KUBE-6-DROP-EXTERNAL"],
        }
    }

    pub(crate) fn kind(self) -> Kind {
        match self {
            Purpose::LoopBack | Purpose::SourceIp => Kind::HashIpPortIp,
            Purpose::SourceCidr => Kind::HashIpPortNet,
            Purpose::Bound => Kind::HashIp,
            Purpose::NodePortTcp
            | Purpose::NodePortLocalTcp
            | Purpose::NodePortUdp
            | Purpose::NodePortLocalUdp
            | Purpose::HealthCheck => Kind::BitmapPort,
            Purpose::ClusterIp
            | Purpose::ClusterIpMasquerade
            | Purpose::ExternalIp
            | Purpose::ExternalIpLocal
            | Purpose::LoadBalancer
            | Purpose::LoadBalancerLocal
            | Purpose::Firewall
            | Purpose::NodePortSctp
            | Purpose::NodePortLocalSctp
            | Purpose::Drop
            | Purpose::DropExternal => Kind::HashIpPort,
        }
    }

    /// True where the rule for what is bound lets a packet by that is in the set.
    pub(crate) fn lets_by(self) -> bool {
        Self::LET_BY.contains(&self)
    }

    /// The sets that [`lets_by`](Self::lets_by) is true of, in the order of their rules.
    pub(crate) const LET_BY: [Purpose; 4] =
        [Purpose::LoadBalancer, Purpose::ClusterIp, Purpose::ExternalIp, Purpose::ExternalIpLocal];

    /// Where node ports of a protocol are, and those that keep their client's address.
    pub(crate) fn node_port(protocol: Protocol, keeps_client: bool) -> Self {
        match (protocol, keeps_client) {
            (Protocol::Tcp, false) => Purpose::NodePortTcp,
            (Protocol::Tcp, true) => Purpose::NodePortLocalTcp,
            (Protocol::Udp, false) => Purpose::NodePortUdp,
            (Protocol::Udp, true) => Purpose::NodePortLocalUdp,
            (Protocol::Sctp, false) => Purpose::NodePortSctp,
            (Protocol::Sctp, true) => Purpose::NodePortLocalSctp,
        }
    }
}

impl Set {
    pub(crate) fn all() -> impl Iterator<Item = Set> {
        Family::ALL.into_iter().flat_map(Self::of_family)
    }

    pub(crate) fn of_family(family: Family) -> impl Iterator<Item = Set> {
        Purpose::ALL.into_iter().map(move |purpose| Set { family, purpose })
    }

    pub(crate) fn name(self) -> &'static str {
        let [v4, v6] = self.purpose.names();
        match self.family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

pub(crate) const SERVICES: &str = "KUBE-SERVICES";
pub(crate) const CLUSTER_IP: &str = "KUBE-CLUSTER-IP";
pub(crate) const LOAD_BALANCER: &str = "KUBE-LOAD-BALANCER";
pub(crate) const NODE_PORT: &str = "KUBE-NODE-PORT";
pub(crate) const MARK_MASQ: &str = "KUBE-MARK-MASQ";
pub(crate) const POSTROUTING: &str = "KUBE-POSTROUTING";
pub(crate) const FORWARD: &str = "KUBE-FORWARD";
pub(crate) const FIREWALL: &str = "KUBE-PROXY-FIREWALL";
pub(crate) const SOURCE_RANGES: &str = "KUBE-SOURCE-RANGES-FIREWALL";
pub(crate) const FILTER: &str = "KUBE-IPVS-FILTER";
pub(crate) const FILTER_EXTERNAL: &str = "KUBE-IPVS-FILTER-EXTERNAL";
pub(crate) const OUT_FILTER: &str = "KUBE-IPVS-OUT-FILTER";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_all_different_and_fit() {
        let mut names: Vec<&str> = Set::all().map(Set::name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 2 * Purpose::ALL.len());
        assert!(names.iter().all(|name| name.len() <= 31), "IPSET_MAXNAMELEN is 32 with the final zero");
        // A set is made anew under its own name with this behind it, see `sizes`.
        for chain in [SOURCE_RANGES, FILTER_EXTERNAL, OUT_FILTER] {
            assert!(chain.len() <= 28, "{chain}: XT_EXTENSION_MAXNAMELEN");
        }
    }

    #[test]
    fn names_in_ipv6_are_cut_as_kube_proxy_cuts_them() {
        for set in Set::of_family(Family::V6) {
            let v4 = Set { family: Family::V4, ..set }.name();
            let mut v6 = v4.replace("KUBE-", "KUBE-6-");
            v6.truncate(31);
            assert_eq!(set.name(), v6);
        }
    }
}
