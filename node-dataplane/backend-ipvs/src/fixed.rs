//! The chains beside IPVS: always the same ones, however many Services there are. What differs from
//! Service to Service is in sets.
//!
//! IPVS takes packets from others behind filter INPUT, and the node's own between nat OUTPUT and filter
//! OUTPUT. So marks are made in nat before it, packets of others are filtered in INPUT, and the node's
//! own in mangle OUTPUT. A packet that IPVS sends on comes to POSTROUTING with its new destination.

use lockstep_model::Family;
use lockstep_view::PodSources;
use lockstep_xtables::{FixedChains, Jumps, PodMatch, Table, host};

use crate::names::{self, Purpose, Set};
use crate::terms::Terms;

/// The chains of one family. `random_fully`: the tool and the kernel know that option.
pub(crate) fn chains(terms: &Terms, family: Family, random_fully: bool) -> FixedChains {
    let rules = Rules { family, pods: PodMatch::all(family, terms.pods.as_ref()), terms };
    let chains = vec![
        (Table::Filter, names::FORWARD, rules.forward()),
        (Table::Filter, names::NODE_PORT, rules.health_checks()),
        (Table::Filter, names::FIREWALL, rules.firewall()),
        (Table::Filter, names::SOURCE_RANGES, rules.source_ranges()),
        (Table::Filter, names::FILTER, rules.filter()),
        (Table::Filter, names::FILTER_EXTERNAL, rules.filter_external()),
        (Table::Mangle, names::OUT_FILTER, rules.out_filter()),
        (Table::Mangle, names::SOURCE_RANGES, rules.source_ranges()),
        (Table::Nat, names::SERVICES, rules.services()),
        (Table::Nat, names::CLUSTER_IP, rules.cluster_ip()),
        (Table::Nat, names::LOAD_BALANCER, rules.load_balancer()),
        (Table::Nat, names::NODE_PORT, rules.node_port()),
        (Table::Nat, names::MARK_MASQ, vec![format!("-j MARK --set-xmark {0}/{0}", rules.mark())]),
        (Table::Nat, names::POSTROUTING, rules.postrouting(random_fully)),
    ];
    FixedChains { chains, others: Vec::new(), jumps: jumps() }
}

/// What keeps the node's own listeners from answering at addresses that stay when everything else of
/// this mode goes.
pub(crate) fn protection(family: Family) -> FixedChains {
    let bound = Set { family, purpose: Purpose::Bound }.name();
    let rule = format!("{NEW}-m set --match-set {bound} dst -j {}", reject(family));
    let jumps = jumps().into_iter().filter(|jumps| (jumps.table, jumps.chain) == (Table::Filter, "INPUT"));
    let jumps = jumps.map(|mut jumps| {
        jumps.rules.truncate(1);
        jumps
    });
    FixedChains {
        chains: vec![(Table::Filter, names::FILTER, vec![rule])],
        others: Vec::new(),
        jumps: jumps.collect(),
    }
}

fn reject(family: Family) -> &'static str {
    match family {
        Family::V4 => "REJECT --reject-with icmp-port-unreachable",
        Family::V6 => "REJECT --reject-with icmp6-port-unreachable",
    }
}

/// True for the chains that this mode writes. In filter, kube-proxy has a chain for what the node itself
/// sends, too: that goes when we take over from it.
pub fn is_written(table: Table, chain: &str) -> bool {
    is_ours(table, chain) && (table, chain) != (Table::Filter, names::OUT_FILTER)
}

/// True for the chains of this mode, some of which iptables mode has under the same name.
pub fn is_ours(table: Table, chain: &str) -> bool {
    use names::{
        CLUSTER_IP, FILTER, FILTER_EXTERNAL, FIREWALL, FORWARD, LOAD_BALANCER, MARK_MASQ, NODE_PORT,
        OUT_FILTER, POSTROUTING, SERVICES, SOURCE_RANGES,
    };
    match table {
        Table::Filter => [FORWARD, NODE_PORT, FIREWALL, SOURCE_RANGES, FILTER, FILTER_EXTERNAL, OUT_FILTER]
            .contains(&chain),
        Table::Mangle => [OUT_FILTER, SOURCE_RANGES].contains(&chain),
        Table::Nat => {
            [SERVICES, CLUSTER_IP, LOAD_BALANCER, NODE_PORT, MARK_MASQ, POSTROUTING].contains(&chain)
        }
    }
}

fn jumps() -> Vec<Jumps> {
    let jump = |comment: &str, to: &str| format!("-m comment --comment \"{comment}\" -j {to}");
    let services = jump("kubernetes service portals", names::SERVICES);
    let at = |table, chain, rules| Jumps { table, chain, rules };
    vec![
        at(
            Table::Filter,
            "INPUT",
            vec![
                jump("kubernetes ipvs access filter", names::FILTER),
                jump("kube-proxy firewall rules", names::FIREWALL),
                jump("kubernetes health check rules", names::NODE_PORT),
            ],
        ),
        at(Table::Filter, "FORWARD", vec![jump("kubernetes forwarding rules", names::FORWARD)]),
        at(Table::Mangle, "OUTPUT", vec![jump("kubernetes ipvs access filter", names::OUT_FILTER)]),
        at(Table::Nat, "PREROUTING", vec![services.clone()]),
        at(Table::Nat, "OUTPUT", vec![services]),
        at(Table::Nat, "POSTROUTING", vec![jump("kubernetes postrouting rules", names::POSTROUTING)]),
    ]
}

const NEW: &str = "-m conntrack --ctstate NEW ";
const FROM_NODE: &str = "-m addrtype --src-type LOCAL ";
const TO_NODE: &str = "-m addrtype --dst-type LOCAL ";

struct Rules<'a> {
    family: Family,
    pods: Vec<PodMatch>,
    terms: &'a Terms,
}

impl Rules<'_> {
    fn mark(&self) -> String {
        format!("{:#x}", self.terms.mark)
    }

    /// A match of a set, by `dst,dst` and the like.
    fn set(&self, purpose: Purpose, by: &str) -> String {
        format!("-m set --match-set {} {by} ", Set { family: self.family, purpose }.name())
    }

    /// What a packet is for, by address and port.
    fn to(&self, purpose: Purpose) -> String {
        self.set(purpose, "dst,dst")
    }

    fn masquerade(matches: &str) -> String {
        format!("{matches}-j {}", names::MARK_MASQ)
    }

    /// Rules that let pods go; the last is for all others.
    fn but_pods(&self, last: String) -> Vec<String> {
        let pods = self.pods.iter().map(|pods| match pods.is_everybody() {
            true => "-j RETURN".to_owned(),
            false => format!("{}-j RETURN", pods.and("")),
        });
        pods.chain([last]).collect()
    }

    fn services(&self) -> Vec<String> {
        let loopback = match self.family {
            Family::V4 => "127.0.0.0/8",
            Family::V6 => "::1/128",
        };
        let mut rules = vec![
            format!("-s {loopback} -j RETURN"),
            format!("{}-j {}", self.to(Purpose::LoadBalancer), names::LOAD_BALANCER),
            format!("{}-j {}", self.to(Purpose::ClusterIp), names::CLUSTER_IP),
            Self::masquerade(&self.to(Purpose::ExternalIp)),
            Self::masquerade(&format!("{}{FROM_NODE}", self.to(Purpose::ExternalIpLocal))),
        ];
        // Or rules of others translate what is for us: for them our addresses are the node's.
        for purpose in
            [Purpose::ClusterIp, Purpose::LoadBalancer, Purpose::ExternalIp, Purpose::ExternalIpLocal]
        {
            rules.push(format!("{}-j ACCEPT", self.to(purpose)));
        }
        if self.terms.all_local(self.family) {
            let bound = Set { family: self.family, purpose: Purpose::Bound }.name();
            rules.push(format!("-m set ! --match-set {bound} dst {TO_NODE}-j {}", names::NODE_PORT));
        } else {
            let at = self.terms.node_ports(self.family).iter();
            rules.extend(at.map(|ip| format!("-d {} -j {}", host(*ip), names::NODE_PORT)));
        }
        rules
    }

    fn cluster_ip(&self) -> Vec<String> {
        let mut rules = vec![Self::masquerade(&self.to(Purpose::ClusterIpMasquerade))];
        match self.terms.pods.as_ref().is_some_and(|pods: &PodSources| pods.tells(self.family)) {
            true => rules.extend(self.but_pods(Self::masquerade(""))),
            // The node asks from the address that it asks for, and only this node has the other end
            // of that.
            false => rules.push(Self::masquerade(&self.set(Purpose::Bound, "src"))),
        }
        rules
    }

    fn load_balancer(&self) -> Vec<String> {
        vec![
            Self::masquerade(&format!("{}{FROM_NODE}", self.to(Purpose::LoadBalancerLocal))),
            format!("{}-j RETURN", self.to(Purpose::LoadBalancerLocal)),
            Self::masquerade(""),
        ]
    }

    fn node_port(&self) -> Vec<String> {
        let mut rules = Vec::new();
        for (protocol, by, local, other) in [
            ("tcp", "dst", Purpose::NodePortLocalTcp, Purpose::NodePortTcp),
            ("udp", "dst", Purpose::NodePortLocalUdp, Purpose::NodePortUdp),
            ("sctp", "dst,dst", Purpose::NodePortLocalSctp, Purpose::NodePortSctp),
        ] {
            let (local, other) = (self.set(local, by), self.set(other, by));
            rules.push(Self::masquerade(&format!("-p {protocol} {local}{FROM_NODE}")));
            rules.push(format!("-p {protocol} {local}-j RETURN"));
            rules.push(Self::masquerade(&format!("-p {protocol} {other}")));
        }
        rules
    }

    fn postrouting(&self, random_fully: bool) -> Vec<String> {
        let mark = self.mark();
        let random = if random_fully { " --random-fully" } else { "" };
        vec![
            // An endpoint that meets itself has to see somebody else.
            format!("{}-j MASQUERADE{random}", self.set(Purpose::LoopBack, "dst,dst,src")),
            format!("-m mark ! --mark {mark}/{mark} -j RETURN"),
            // Cleared first, so that an encapsulated packet that passes here again is not changed twice.
            format!("-j MARK --set-xmark {mark}/0x0"),
            format!("-j MASQUERADE{random}"),
        ]
    }

    fn forward(&self) -> Vec<String> {
        let mark = self.mark();
        vec![
            format!("-m mark --mark {mark}/{mark} -j ACCEPT"),
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned(),
        ]
    }

    fn health_checks(&self) -> Vec<String> {
        vec![format!("-p tcp {}-j ACCEPT", self.set(Purpose::HealthCheck, "dst"))]
    }

    fn firewall(&self) -> Vec<String> {
        vec![format!("{NEW}{}-j {}", self.to(Purpose::Firewall), names::SOURCE_RANGES)]
    }

    /// What the node itself sends IPVS takes before filter sees it. A virtual server that stays for its
    /// connections would refuse what is to be dropped.
    fn out_filter(&self) -> Vec<String> {
        let mut rules = vec![format!("{NEW}{}-j DROP", self.to(Purpose::Drop))];
        rules.extend(self.firewall());
        rules
    }

    fn source_ranges(&self) -> Vec<String> {
        vec![
            format!("{}-j RETURN", self.set(Purpose::SourceCidr, "dst,dst,src")),
            format!("{}-j RETURN", self.set(Purpose::SourceIp, "dst,dst,src")),
            "-j DROP".to_owned(),
        ]
    }

    /// Addresses that are bound are the node's own, and whatever listens at every address of it would
    /// answer there.
    fn filter(&self) -> Vec<String> {
        let reject = reject(self.family);
        let mut rules = vec![
            format!("{NEW}{}-j DROP", self.to(Purpose::Drop)),
            format!("{NEW}{}-j {}", self.to(Purpose::DropExternal), names::FILTER_EXTERNAL),
        ];
        rules.extend(Purpose::LET_BY.map(|purpose| format!("{}-j RETURN", self.to(purpose))));
        rules.push(format!("-p tcp {}-j RETURN", self.set(Purpose::HealthCheck, "dst")));
        rules.push(format!("{NEW}{}-j {reject}", self.set(Purpose::Bound, "dst")));
        rules
    }

    fn filter_external(&self) -> Vec<String> {
        let mut rules = vec![format!("{FROM_NODE}-j RETURN")];
        rules.extend(self.but_pods("-j DROP".to_owned()));
        rules
    }
}
