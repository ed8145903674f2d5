//! The chains and their rules: fixed ones, and those that Services share.

use lockstep_kernel::nf_tables::{Chain, ChainKind, Expression, Hook, HookPoint, Rule, Verdict};
use lockstep_model::Family;
use lockstep_view::{NodePlan, NodePortScope, PodSources};

use crate::names::{Choice, Refusal, SharedChain, Via};
use crate::rules::Clause;
use crate::sets::{SERIALS, SetId};

/// Before DNAT: sources that may not use an address are dropped.
const BEFORE_DNAT: i32 = -110;
const DNAT: i32 = -100;
const FILTER: i32 = 0;
const SNAT: i32 = 100;

/// A chain and its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChainLayout {
    pub(crate) chain: Chain,
    pub(crate) rules: Vec<Vec<Clause>>,
}

impl ChainLayout {
    fn plain(name: &str, rules: Vec<Vec<Clause>>) -> Self {
        Self { chain: Chain { name: name.to_owned(), hook: None }, rules }
    }

    fn base(name: &str, kind: ChainKind, point: HookPoint, priority: i32, rules: Vec<Vec<Clause>>) -> Self {
        let hook = Some(Hook { kind, point, priority });
        Self { chain: Chain { name: name.to_owned(), hook }, rules }
    }

    /// The rules as the kernel has them.
    pub(crate) fn kernel_rules(&self, family: Family) -> impl Iterator<Item = Rule> + '_ {
        self.rules.iter().map(move |clauses| Rule {
            chain: self.chain.name.clone(),
            expressions: expressions(clauses, family),
        })
    }
}

pub(crate) fn expressions(clauses: &[Clause], family: Family) -> Vec<Expression> {
    let mut out = Vec::new();
    clauses.iter().for_each(|clause| clause.expressions(family, &mut out));
    out
}

fn jump(chain: &str) -> Clause {
    Clause::Then(Verdict::Jump(chain.to_owned()))
}

fn goto(chain: SharedChain) -> Clause {
    Clause::Then(Verdict::Goto(chain.name()))
}

/// The chains that are always there, in an order in which every jump finds its chain.
pub(crate) fn fixed(family: Family, node: &NodePlan) -> Vec<ChainLayout> {
    let node_ports = |map| {
        let mut clauses = match node.node_ports(family) {
            NodePortScope::AllLocal => vec![Clause::ToThisNode, Clause::NotToLoopback],
            NodePortScope::Addresses(_) => vec![Clause::In { set: SetId::NodeIps, not: false }],
        };
        clauses.push(Clause::VerdictOf(map));
        clauses
    };
    let bit = node.masquerade_mark;
    let nat = |name, point, rules| ChainLayout::base(name, ChainKind::Nat, point, DNAT, rules);
    let early = |name, point, rules| ChainLayout::base(name, ChainKind::Filter, point, BEFORE_DNAT, rules);
    let filter = |name, point, chains: &[&str]| {
        let rules = chains.iter().map(|chain| vec![Clause::New, jump(chain)]).collect();
        ChainLayout::base(name, ChainKind::Filter, point, FILTER, rules)
    };
    vec![
        ChainLayout::plain(
            "services",
            vec![vec![Clause::VerdictOf(SetId::Frontends)], node_ports(SetId::NodePorts)],
        ),
        ChainLayout::plain(
            "no-endpoints",
            vec![vec![Clause::VerdictOf(SetId::NoEndpoints)], node_ports(SetId::NoEndpointsNodePorts)],
        ),
        // Packets that a Service forwards have left the address by now. What is left over goes to
        // a port that a cluster IP does not have, or to a cluster IP that nobody has.
        ChainLayout::plain(
            "cluster-ips-check",
            vec![
                vec![Clause::In { set: SetId::ClusterIps, not: false }, Clause::Reject],
                vec![Clause::In { set: SetId::ServiceCidrs, not: false }, Clause::Then(Verdict::Drop)],
            ],
        ),
        ChainLayout::plain(
            "source-ranges",
            vec![vec![
                Clause::In { set: SetId::Restricted, not: false },
                Clause::In { set: SetId::Allowed, not: true },
                Clause::Then(Verdict::Drop),
            ]],
        ),
        early("filter-prerouting", HookPoint::Prerouting, vec![vec![Clause::New, jump("source-ranges")]]),
        early("filter-output-early", HookPoint::Output, vec![vec![Clause::New, jump("source-ranges")]]),
        nat("nat-prerouting", HookPoint::Prerouting, vec![vec![jump("services")]]),
        nat("nat-output", HookPoint::Output, vec![vec![jump("services")]]),
        filter("filter-input", HookPoint::Input, &["no-endpoints"]),
        filter("filter-forward", HookPoint::Forward, &["no-endpoints", "cluster-ips-check"]),
        filter("filter-output", HookPoint::Output, &["no-endpoints", "cluster-ips-check"]),
        ChainLayout::base(
            "nat-postrouting",
            ChainKind::Nat,
            HookPoint::Postrouting,
            SNAT,
            vec![
                // What affinity left behind is not for the queues of an interface.
                vec![Clause::PriorityHas(SERIALS), Clause::ClearPriority],
                vec![Clause::In { set: SetId::Hairpin, not: false }, Clause::SetMark(bit)],
                // The bit is cleared before, so that a packet that comes back in a tunnel
                // is not translated twice.
                vec![Clause::Marked(bit), Clause::FlipMark(bit), Clause::Masquerade],
            ],
        ),
    ]
}

/// A chain that Services share.
pub(crate) fn shared(family: Family, node: &NodePlan, chain: SharedChain) -> ChainLayout {
    let rules = match chain {
        SharedChain::Targets { via, choice } => targets(via, choice),
        SharedChain::Marked { via, choice } => {
            vec![vec![Clause::SetMark(node.masquerade_mark), goto(SharedChain::Targets { via, choice })]]
        }
        SharedChain::BySource { via, ways } => by_source(
            family,
            node,
            &ways.map(|way| match way.chain(via) {
                Some(chain) => goto(chain),
                None => Clause::Then(Verdict::Return),
            }),
        ),
        SharedChain::Refuse => vec![vec![Clause::Reject]],
        SharedChain::RefuseBySource(refusals) => by_source(
            family,
            node,
            &refusals.map(|refusal| match refusal {
                Refusal::LetThrough => Clause::Then(Verdict::Return),
                Refusal::Reject => goto(SharedChain::Refuse),
                Refusal::Drop => Clause::Then(Verdict::Drop),
            }),
        ),
    };
    ChainLayout::plain(&chain.name(), rules)
}

/// Rules that choose a target.
///
/// With affinity, what a client is given is not an endpoint but the serial number of one at
/// the frontend dialled. It leads somewhere only as long as that endpoint is there, so an
/// endpoint takes all of its clients with it by the one element that it is: nobody has to
/// look for them, and a packet that is on its way meanwhile cannot bring them back.
fn targets(via: Via, Choice { pool, count, affinity }: Choice) -> Vec<Vec<Clause>> {
    let Some(seconds) = affinity else {
        return vec![vec![Clause::TranslateBy { set: SetId::endpoints(via, pool), count }]];
    };
    let map = SetId::affinity(via);
    let translate = Clause::Translate { map: SetId::affine_endpoints(via, pool) };
    vec![
        // Has one, which is there: the time begins anew.
        vec![Clause::TakeSerial { map, count }, Clause::Remember { map, seconds }, translate.clone()],
        // An update leaves the data of an element that is there as it was.
        vec![Clause::Forget { map }],
        vec![Clause::TakeSerial { map: SetId::serials(via, pool), count }],
        // A rule of its own: where the map is full, the client is served all the same.
        vec![Clause::Remember { map, seconds }],
        vec![translate],
    ]
}

/// Rules for pods, the node itself and all others, in this order; the first match counts.
fn by_source(family: Family, node: &NodePlan, [pod, own, elsewhere]: &[Clause; 3]) -> Vec<Vec<Clause>> {
    let mut rules = Vec::new();
    // Where all are treated alike, nobody needs to be told apart.
    if pod != elsewhere || own != elsewhere {
        for condition in pods(family, node) {
            rules.push(condition.into_iter().chain([pod.clone()]).collect());
        }
    }
    if own != elsewhere {
        rules.push(vec![Clause::FromThisNode, own.clone()]);
    }
    rules.push(vec![elsewhere.clone()]);
    rules
}

/// What the packets of pods have, each by itself; `None` = every packet is a pod's.
fn pods(family: Family, node: &NodePlan) -> Vec<Option<Clause>> {
    match &node.pods {
        None => Vec::new(),
        Some(PodSources::Interface(name)) => vec![Some(Clause::InBy(name.clone()))],
        Some(PodSources::InterfacePrefix(prefix)) => vec![Some(Clause::InByPrefix(prefix.clone()))],
        Some(PodSources::Cidrs(cidrs)) => {
            let cidrs = cidrs.iter().filter(|cidr| Family::of(cidr.addr()) == family);
            cidrs.map(|cidr| (cidr.prefix_len() > 0).then_some(Clause::From(*cidr))).collect()
        }
    }
}

/// What a frontend's key is made of.
pub(crate) fn via(frontend: &lockstep_view::Frontend) -> Via {
    if frontend.surface.address().is_some() { Via::Address } else { Via::NodePort }
}
