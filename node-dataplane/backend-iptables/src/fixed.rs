//! What is there whatever Services there are: jumps from the built-in chains, and the chains
//! that are the same for every Service.

use std::net::IpAddr;

use lockstep_model::Family;
use lockstep_view::{NodePlan, NodePortScope};
use lockstep_xtables::{FixedChains, Jumps, PodMatch, Table, host};

use crate::guard;
use crate::names::{self, Shared};

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

/// [`NodePortScope`] of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scope {
    AllLocal,
    Addresses(Vec<IpAddr>),
}

impl Terms {
    pub(crate) fn new(family: Family, node: &NodePlan, random_fully: bool, liberal: bool) -> Self {
        let pods = PodMatch::all(family, node.pods.as_ref());
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

const NEW: &str = "-m conntrack --ctstate NEW ";

/// What leads to our chains. kube-proxy does not hook its external refusals into OUTPUT, so there the
/// node's own connections to a refused address leave the node; the plan says that they are refused.
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
    let guard = terms.localhost.then_some((Table::Filter, guard::CHAIN));
    let mut chains = all(terms).places();
    chains.extend(guard);
    chains
}

/// The chains that no Service has lines in, and what leads to these and to the others.
pub(crate) fn all(terms: &Terms) -> FixedChains {
    const FORWARDING: &str = "-m comment --comment \"kubernetes forwarding rules\" ";
    const TRACKED: &str = "-m comment --comment \"kubernetes forwarding conntrack rule\" ";
    const SNAT: &str = "-m comment --comment \"kubernetes service traffic requiring SNAT\" ";
    let mark = format!("{:#x}", terms.mark);
    let mut forward = vec![
        format!("{FORWARDING}-m mark --mark {mark}/{mark} -j ACCEPT"),
        format!("{TRACKED}-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
    ];
    if !terms.liberal {
        forward.insert(0, "-m conntrack --ctstate INVALID -j DROP".to_owned());
    }
    let random = if terms.random_fully { " --random-fully" } else { "" };
    let postrouting = vec![
        format!("-m mark ! --mark {mark}/{mark} -j RETURN"),
        // Cleared first, so that an encapsulated packet that passes here again is not changed twice.
        format!("-j MARK --set-xmark {mark}/0x0"),
        format!("{SNAT}-j MASQUERADE{random}"),
    ];
    let masquerade = vec![format!("-j MARK --set-xmark {mark}/{mark}")];
    let chains = vec![
        (Table::Filter, names::FORWARD, forward),
        (Table::Nat, names::MARK_MASQ, masquerade),
        (Table::Nat, names::POSTROUTING, postrouting),
    ];
    let others = Shared::ALL.map(|shared| (shared.table(), shared.chain()));
    FixedChains { chains, others: others.into(), jumps: jumps() }
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
