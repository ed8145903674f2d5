//! What is there whatever Services there are: jumps from the built-in chains, and the chains
//! that are the same for every Service.

use std::net::IpAddr;

use lockstep_model::Family;
use lockstep_view::{NodePlan, NodePortScope, PodSources};

use crate::guard;
use crate::names::{self, Shared, Table};

/// What differs between hosts in the rules of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) family: Family,
    pub(crate) mark: u32,
    /// What the packets of pods have, each by itself.
    pub(crate) pods: Vec<PodMatch>,
    pub(crate) scope: Scope,
    /// Node ports answer at loopback addresses too.
    pub(crate) localhost: bool,
    /// The tool and the kernel know `MASQUERADE --random-fully`.
    pub(crate) random_fully: bool,
    /// The kernel lets TCP packets that its tracker does not understand pass.
    pub(crate) liberal: bool,
}

/// What a rule can ask a packet for, to know that it is a pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PodMatch {
    /// A range of source addresses.
    Source(String),
    /// The interface it came in by, with `+` behind the beginning of a name.
    Interface(String),
}

impl PodMatch {
    /// What goes before `-p`, in the tools' order, with a match of the destination among it.
    pub(crate) fn and(&self, destination: &str) -> String {
        match self {
            PodMatch::Source(range) => format!("-s {range} {destination}"),
            PodMatch::Interface(name) => format!("{destination}-i {name} "),
        }
    }

    /// The same for everybody else.
    pub(crate) fn not(&self, destination: &str) -> String {
        match self {
            PodMatch::Source(range) => format!("! -s {range} {destination}"),
            PodMatch::Interface(name) => format!("{destination}! -i {name} "),
        }
    }

    /// True where every packet has it.
    pub(crate) fn is_everybody(&self) -> bool {
        matches!(self, PodMatch::Source(range) if range.ends_with("/0"))
    }
}

/// [`NodePortScope`] of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    AllLocal,
    Addresses(Vec<IpAddr>),
}

impl Terms {
    pub(crate) fn new(family: Family, node: &NodePlan, random_fully: bool, liberal: bool) -> Self {
        let pods = match &node.pods {
            Some(PodSources::Cidrs(cidrs)) => cidrs
                .iter()
                .filter(|cidr| Family::of(cidr.addr()) == family)
                .map(|cidr| PodMatch::Source(cidr.trunc().to_string()))
                .collect(),
            Some(PodSources::Interface(name)) => vec![PodMatch::Interface(name.to_string())],
            Some(PodSources::InterfacePrefix(prefix)) => vec![PodMatch::Interface(format!("{prefix}+"))],
            None => Vec::new(),
        };
        let localhost = node.has_localhost_node_ports(family);
        let scope = match node.node_ports(family) {
            NodePortScope::AllLocal => Scope::AllLocal,
            NodePortScope::Addresses(all) => Scope::Addresses(
                all.iter()
                    .copied()
                    .filter(|ip| Family::of(*ip) == family && (localhost || !ip.is_loopback()))
                    .collect(),
            ),
        };
        Self { family, mark: node.masquerade_mark, pods, scope, localhost, random_fully, liberal }
    }

    /// The destination match of node ports, one per rule that is needed: what goes before
    /// `-p`, and what goes after the comment.
    ///
    /// Loopback addresses are for the node's own connections. kube-proxy also takes what comes for
    /// them from outside, which then passes the guard, because it is translated by then.
    pub(crate) fn node_port_matches(&self) -> Vec<(String, &'static str)> {
        const LOCAL: &str = "-m addrtype --dst-type LOCAL ";
        match (&self.scope, self.family) {
            (Scope::AllLocal, Family::V4) => {
                let mut matches = vec![("! -d 127.0.0.0/8 ".to_owned(), LOCAL)];
                if self.localhost {
                    let own = "-m addrtype --src-type LOCAL --dst-type LOCAL ";
                    matches.push(("-d 127.0.0.0/8 ".to_owned(), own));
                }
                matches
            }
            (Scope::AllLocal, Family::V6) => vec![("! -d ::1/128 ".to_owned(), LOCAL)],
            (Scope::Addresses(all), _) => all
                .iter()
                .map(|ip| {
                    let own = if ip.is_loopback() { "-m addrtype --src-type LOCAL " } else { "" };
                    (format!("-d {} ", host(*ip)), own)
                })
                .collect(),
        }
    }
}

/// An address as the tools write a host: `10.0.0.1/32`.
pub(crate) fn host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(_) => format!("{ip}/32"),
        IpAddr::V6(_) => format!("{ip}/128"),
    }
}

const NEW: &str = "-m conntrack --ctstate NEW ";

/// Jumps from one built-in chain, in order. kube-proxy does not hook its external refusals into
/// OUTPUT, so there the node's own connections to a refused address leave the node; the plan
/// says that they are refused.
pub(crate) struct Jumps {
    pub(crate) table: Table,
    pub(crate) chain: &'static str,
    pub(crate) rules: Vec<String>,
}

pub(crate) fn jumps() -> Vec<Jumps> {
    let jump =
        |state: &str, comment: &str, to: &str| format!("{state}-m comment --comment \"{comment}\" -j {to}");
    let firewall = jump(NEW, "kubernetes load balancer firewall", Shared::Firewall.chain());
    let health = jump("", "kubernetes health check service ports", Shared::HealthChecks.chain());
    let external =
        jump(NEW, "kubernetes externally-visible service portals", Shared::RefusedExternal.chain());
    let refused = jump(NEW, "kubernetes service portals", Shared::Refused.chain());
    let forward = jump("", "kubernetes forwarding rules", names::FORWARD);
    let services = jump("", "kubernetes service portals", Shared::Services.chain());
    let postrouting = jump("", "kubernetes postrouting rules", names::POSTROUTING);
    let at = |table, chain, rules| Jumps { table, chain, rules };
    vec![
        at(Table::Filter, "INPUT", vec![firewall.clone(), health, external.clone()]),
        at(Table::Filter, "FORWARD", vec![firewall.clone(), forward, refused.clone(), external.clone()]),
        at(Table::Filter, "OUTPUT", vec![firewall, refused, external]),
        at(Table::Nat, "PREROUTING", vec![services.clone()]),
        at(Table::Nat, "OUTPUT", vec![services]),
        at(Table::Nat, "POSTROUTING", vec![postrouting]),
    ]
}

/// The chains that are the same whatever Services there are, and those that lead to ours.
pub(crate) fn chains(terms: &Terms) -> Vec<(Table, &'static str)> {
    let fixed = bodies(terms).into_iter().map(|(table, chain, _)| (table, chain));
    let guard = terms.localhost.then_some((Table::Filter, guard::CHAIN));
    fixed.chain(guard).chain(jumps().into_iter().map(|jumps| (jumps.table, jumps.chain))).collect()
}

/// True for a rule of a built-in chain that leads into a fixed chain of ours.
pub(crate) fn is_our_jump(table: Table, rule: &str) -> bool {
    rule.rsplit_once("-j ").is_some_and(|(_, target)| names::is_fixed_chain(table, target.trim_end()))
}

/// A fixed chain that no Service has lines in: name and its rules, with `-A NAME` before each.
pub(crate) fn bodies(terms: &Terms) -> Vec<(Table, &'static str, String)> {
    const FORWARDING: &str = "-m comment --comment \"kubernetes forwarding rules\" ";
    const TRACKED: &str = "-m comment --comment \"kubernetes forwarding conntrack rule\" ";
    const SNAT: &str = "-m comment --comment \"kubernetes service traffic requiring SNAT\" ";
    let mark = format!("{:#x}", terms.mark);
    let body = |chain: &str, rules: &[String]| -> String {
        rules.iter().map(|rule| format!("-A {chain} {rule}\n")).collect()
    };
    let mut forward = vec![
        format!("{FORWARDING}-m mark --mark {mark}/{mark} -j ACCEPT"),
        format!("{TRACKED}-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
    ];
    if !terms.liberal {
        forward.insert(0, "-m conntrack --ctstate INVALID -j DROP".to_owned());
    }
    let random = if terms.random_fully { " --random-fully" } else { "" };
    let postrouting = [
        format!("-m mark ! --mark {mark}/{mark} -j RETURN"),
        // Cleared first, so that an encapsulated packet that passes here again is not changed twice.
        format!("-j MARK --set-xmark {mark}/0x0"),
        format!("{SNAT}-j MASQUERADE{random}"),
    ];
    let masquerade = [format!("-j MARK --set-xmark {mark}/{mark}")];
    vec![
        (Table::Filter, names::FORWARD, body(names::FORWARD, &forward)),
        (Table::Nat, names::MARK_MASQ, body(names::MARK_MASQ, &masquerade)),
        (Table::Nat, names::POSTROUTING, body(names::POSTROUTING, &postrouting)),
    ]
}

/// The last lines of nat KUBE-SERVICES.
pub(crate) fn services_tail(terms: &Terms) -> Vec<String> {
    const COMMENT: &str = "-m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\"";
    let chain = Shared::NodePorts.chain();
    terms
        .node_port_matches()
        .into_iter()
        .map(|(before, after)| format!("{before}{COMMENT} {after}-j {chain}"))
        .collect()
}

/// Appends one line, which is these parts.
pub(crate) fn line(text: &mut String, parts: &[&str]) {
    parts.iter().for_each(|part| text.push_str(part));
    text.push('\n');
}
