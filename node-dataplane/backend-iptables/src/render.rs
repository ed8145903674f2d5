//! One Service's plan -> its rules in one family, in the form that `iptables-save` prints.
//!
//! Only the plan's actions are looked at. The shapes that kube-proxy writes come out as it
//! writes them; every other combination of actions gets a chain that tests the sources.

use std::ops::Range;

use lockstep_model::{Family, Port};
use lockstep_view::{Action, Frontend, Pool, PortPlan, ServicePlan, Surface, Target};
use lockstep_xtables::{PodMatch, host, line, print_probability};

use crate::fixed::Terms;
use crate::names::{self, ChainName, HashText, Shared};

/// Rules of one Service in one family.
#[derive(Debug, Default)]
pub(crate) struct ServiceRules {
    /// The rules of all chains of its own, one chain after the other, with `-A NAME` before each.
    text: String,
    /// Where the rules of each chain are, by name.
    chains: Vec<(ChainName, Range<usize>)>,
    /// Lines in shared chains, sorted.
    pub(crate) blocks: Vec<Block>,
}

/// Lines of a shared chain that keep their order among themselves.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Block {
    pub(crate) chain: Shared,
    /// True = behind what is there; false = before it.
    pub(crate) back: bool,
    /// Without `-A CHAIN`.
    pub(crate) rules: Vec<String>,
}

/// The kernel keeps 255 bytes of a comment and cuts off the rest, which would then never equal
/// what was written. The longest words around the text take 70. Kubernetes' own limits add up to 143.
const LONGEST_TEXT: usize = 185;

/// Why a Service cannot be written at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RenderError {
    #[error("{0:?} cannot be written into a comment: only printable ASCII can")]
    Name(String),
    #[error("{0:?} is too long for a comment")]
    Long(String),
    #[error("port {port}: {address} is not of its family")]
    Family { port: u16, address: String },
}

impl ServiceRules {
    /// Renders what the plan says for `terms.family`.
    pub(crate) fn render(plan: &ServicePlan, terms: &Terms) -> Result<Self, RenderError> {
        let mut rules = Self::default();
        let ports = plan.ports.iter().filter(|port| port.family == terms.family);
        for port in ports.clone() {
            PortRender::new(plan, port, terms)?.render(&mut rules);
        }
        if let (Some(check), Some(port)) = (plan.health_check, ports.clone().next()) {
            let comment = format!("{} health check node port", port.text(&plan.key));
            let rule =
                format!("-p tcp -m comment --comment \"{comment}\" -m tcp --dport {} -j ACCEPT", check.port);
            rules.blocks.push(Block { chain: Shared::HealthChecks, back: true, rules: vec![rule] });
        }
        rules.blocks.sort_unstable();
        rules.blocks.dedup();
        // An endpoint that is in both pools has one chain, which was rendered twice.
        rules.chains.sort_by_key(|(name, _)| *name);
        rules.chains.dedup_by_key(|(name, _)| *name);
        Ok(rules)
    }

    /// Chains of its own: name and rules, by name.
    pub(crate) fn chains(&self) -> impl Iterator<Item = (&ChainName, &str)> {
        self.chains.iter().map(|(name, at)| (name, &self.text[at.clone()]))
    }

    /// The rules of one of its chains.
    pub(crate) fn chain(&self, name: &ChainName) -> Option<&str> {
        let at = self.chains.binary_search_by_key(name, |(known, _)| *known).ok()?;
        self.chains.get(at).map(|(_, at)| &self.text[at.clone()])
    }

    /// Adds a chain; `write` appends its rules.
    fn add(&mut self, name: ChainName, write: impl FnOnce(&mut String)) {
        let start = self.text.len();
        write(&mut self.text);
        self.chains.push((name, start..self.text.len()));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.blocks.is_empty()
    }
}

/// What a packet meets by source: the actions of a [`Frontend`], reduced to what this family
/// can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Actions {
    /// `None` = no pod can be told, or pods are like everybody.
    pod: Option<Action>,
    /// `None` = the node is like everybody else.
    node: Option<Action>,
    rest: Action,
}

impl Actions {
    fn of(frontend: &Frontend, terms: &Terms) -> Self {
        if terms.pods.iter().any(PodMatch::is_everybody) {
            // Every source is a pod's. The tools have no way to write "not in 0.0.0.0/0".
            return Self { pod: None, node: None, rest: frontend.from_pod };
        }
        let rest = frontend.from_elsewhere;
        let node = (frontend.from_node != rest).then_some(frontend.from_node);
        // Pods come first, so they are told apart also where only the node differs.
        let pod = (!terms.pods.is_empty() && (frontend.from_pod != rest || node.is_some()))
            .then_some(frontend.from_pod);
        Self { pod, node, rest }
    }

    fn all(self) -> impl Iterator<Item = Action> {
        [self.pod, self.node, Some(self.rest)].into_iter().flatten()
    }

    fn forwards(self) -> bool {
        self.all().any(|action| matches!(action, Action::Forward { .. }))
    }

    fn refuses(self) -> bool {
        self.all().any(|action| !matches!(action, Action::Forward { .. }))
    }

    /// The pool where all sources share it, and who is masqueraded there.
    fn cluster_ip_shape(self) -> Option<(Pool, Masquerade)> {
        let Action::Forward { pool, masquerade } = self.rest else { return None };
        let kept = Action::Forward { pool, masquerade: false };
        match (self.pod, self.node, masquerade) {
            (None, None, false) => Some((pool, Masquerade::Nobody)),
            (None, None, true) => Some((pool, Masquerade::Everybody)),
            (Some(pod), None, true) if pod == kept => Some((pool, Masquerade::AllButPods)),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Masquerade {
    Nobody,
    AllButPods,
    Everybody,
}

struct PortRender<'a> {
    port: &'a PortPlan,
    terms: &'a Terms,
    text: String,
    hash: HashText,
    /// Rules that come first in the chains of the pools.
    cluster_head: String,
    local_head: String,
    /// Dispatch chains so far: what they do -> name. The first has kube-proxy's name.
    dispatch: Vec<(Actions, ChainName)>,
    /// Guarding chains so far: where they lead, whom they let pass -> name.
    guards: Vec<(ChainName, Vec<String>, ChainName)>,
}

impl<'a> PortRender<'a> {
    fn new(plan: &ServicePlan, port: &'a PortPlan, terms: &'a Terms) -> Result<Self, RenderError> {
        let text = port.text(&plan.key);
        if !text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'\'')) {
            return Err(RenderError::Name(text));
        }
        if text.len() > LONGEST_TEXT {
            return Err(RenderError::Long(text));
        }
        let addresses = port.frontends.iter().filter_map(|frontend| frontend.surface.address());
        let targets = port.cluster.iter().chain(&port.local).map(|target| target.address);
        if let Some(address) = addresses.chain(targets).find(|ip| Family::of(*ip) != terms.family) {
            return Err(RenderError::Family { port: port.port.get(), address: address.to_string() });
        }
        let hash = names::port_hash(&text, port.protocol);
        let (cluster_head, local_head) = (String::new(), String::new());
        Ok(Self { port, terms, text, hash, cluster_head, local_head, dispatch: vec![], guards: vec![] })
    }

    fn render(mut self, rules: &mut ServiceRules) {
        let mut used = Vec::new();
        for frontend in &self.port.frontends {
            let actions = Actions::of(frontend, self.terms);
            self.forward(frontend, actions, rules);
            self.guard(frontend, actions, rules);
            self.refuse(frontend, actions, rules);
            used.extend(actions.all().filter_map(pool_of));
        }
        for (pool, targets) in [(Pool::Cluster, &self.port.cluster), (Pool::Local, &self.port.local)] {
            if used.contains(&pool) {
                self.pool(pool, targets, rules);
            }
        }
    }

    fn pool_chain(&self, pool: Pool) -> ChainName {
        let prefix = match pool {
            Pool::Cluster => "KUBE-SVC-",
            Pool::Local => "KUBE-SVL-",
        };
        ChainName::new(prefix, self.hash)
    }

    /// The chain of this prefix for the port as a whole, and further ones.
    fn nth_chain(&self, prefix: &'static str, nth: usize) -> ChainName {
        let hash = match nth {
            0 => self.hash,
            nth => names::hash(&[&self.text, self.port.protocol.name(), "/", &nth.to_string()]),
        };
        ChainName::new(prefix, hash)
    }

    fn comment(&self, what: &str) -> String {
        ["-m comment --comment \"", &self.text, what, "\" "].concat()
    }

    /// `-p tcp COMMENT MATCHES-m tcp --dport 80 `.
    fn to_port(&self, comment: &str, matches: &str, port: Port) -> String {
        let protocol = self.port.protocol.name();
        format!("-p {protocol} {comment}{matches}-m {protocol} --dport {port} ")
    }

    /// The lines of nat that lead sources with a forward action to their pool.
    fn forward(&mut self, frontend: &Frontend, actions: Actions, rules: &mut ServiceRules) {
        if !actions.forwards() {
            return;
        }
        let what = match frontend.surface {
            Surface::ClusterIp(_) => " cluster IP",
            Surface::ExternalIp(_) => " external IP",
            Surface::LoadBalancerIp(_) => " loadbalancer IP",
            Surface::NodePort => "",
        };
        let (shape, is_cluster_ip) =
            (actions.cluster_ip_shape(), matches!(frontend.surface, Surface::ClusterIp(_)));
        let mut target = match shape {
            Some((pool, masquerade)) if is_cluster_ip => {
                self.mark_at_cluster_ip(frontend, pool, masquerade);
                self.pool_chain(pool)
            }
            _ => self.dispatch(actions, rules),
        };
        if let Some(allowed) = &frontend.allowed_sources {
            let allowed = allowed.iter().filter(|range| Family::of(range.addr()) == self.terms.family);
            target = self.guarded(target, allowed.map(|range| range.trunc().to_string()).collect(), rules);
        }
        let matched = self.to_port(&self.comment(what), "", frontend.port);
        let (chain, back, before) = match frontend.surface.address() {
            Some(ip) => (Shared::Services, false, format!("-d {} ", host(ip))),
            None => (Shared::NodePorts, true, String::new()),
        };
        rules.blocks.push(Block { chain, back, rules: vec![format!("{before}{matched}-j {target}")] });
    }

    /// kube-proxy marks traffic to the cluster IP in the pool's chain, by destination.
    fn mark_at_cluster_ip(&mut self, frontend: &Frontend, pool: Pool, masquerade: Masquerade) {
        let Some(ip) = frontend.surface.address() else { return };
        let name = self.pool_chain(pool);
        let chain = name.as_str();
        let (host, matched) = (host(ip), self.to_port(&self.comment(" cluster IP"), "", frontend.port));
        let head = match pool {
            Pool::Cluster => &mut self.cluster_head,
            Pool::Local => &mut self.local_head,
        };
        match (masquerade, self.terms.pods.split_first()) {
            (Masquerade::Nobody, _) => {}
            (Masquerade::Everybody, _) | (Masquerade::AllButPods, None) => {
                line(head, &["-A ", chain, " -d ", &host, " ", &matched, "-j ", names::MARK_MASQ]);
            }
            (Masquerade::AllButPods, Some((first, more))) => {
                let to = format!("-d {host} ");
                line(head, &["-A ", chain, " ", &first.not(&to), &matched, "-j ", names::MARK_MASQ]);
                // One rule can exclude one range only; the mark of the others is taken back.
                for range in more {
                    let unmark = format!("-j MARK --set-xmark 0x0/{:#x}", self.terms.mark);
                    line(head, &["-A ", chain, " ", &range.and(&to), &matched, &unmark]);
                }
            }
        }
    }

    /// A chain that sends each source where its action says; sources that are refused return.
    fn dispatch(&mut self, actions: Actions, rules: &mut ServiceRules) -> ChainName {
        if let Some((_, name)) = self.dispatch.iter().find(|(known, _)| *known == actions) {
            return *name;
        }
        let name = self.nth_chain("KUBE-EXT-", self.dispatch.len());
        rules.add(name, |body| {
            if let Some(action) = actions.pod {
                for pods in &self.terms.pods {
                    let pods = (&*pods.and(""), "");
                    self.send(body, name, pods, ["masquerade", "pod traffic for"], action);
                }
            }
            if let Some(action) = actions.node {
                let local = ("", "-m addrtype --src-type LOCAL ");
                self.send(body, name, local, ["masquerade LOCAL", "route LOCAL traffic for"], action);
            }
            self.send(body, name, ("", ""), ["masquerade", ""], actions.rest);
        });
        self.dispatch.push((actions, name));
        name
    }

    /// One class of sources of a dispatch chain. `words`: how the comments of the marking and
    /// of the jump begin; an empty one = no comment.
    fn send(
        &self,
        body: &mut String,
        chain: ChainName,
        source: (&str, &str),
        words: [&str; 2],
        action: Action,
    ) {
        let (before, after) = source;
        let chain = chain.as_str();
        let comment =
            |word: &str| format!("-m comment --comment \"{word} {} external destinations\" ", self.text);
        let jump = if words[1].is_empty() { String::new() } else { comment(words[1]) };
        match action {
            Action::Forward { pool, masquerade } => {
                if masquerade {
                    let mark = comment(&format!("{} traffic for", words[0]));
                    line(body, &["-A ", chain, " ", before, &mark, after, "-j ", names::MARK_MASQ]);
                }
                let to = self.pool_chain(pool);
                line(body, &["-A ", chain, " ", before, &jump, after, "-j ", to.as_str()]);
            }
            Action::Reject | Action::Drop if before.is_empty() && after.is_empty() => {}
            Action::Reject | Action::Drop => {
                line(body, &["-A ", chain, " ", before, &jump, after, "-j RETURN"]);
            }
        }
    }

    /// A chain that lets only some sources on.
    fn guarded(&mut self, target: ChainName, allowed: Vec<String>, rules: &mut ServiceRules) -> ChainName {
        let known = self.guards.iter().find(|(to, ranges, _)| *to == target && *ranges == allowed);
        if let Some((_, _, name)) = known {
            return *name;
        }
        let name = self.nth_chain("KUBE-FW-", self.guards.len());
        let (chain, to) = (name.as_str(), target.as_str());
        rules.add(name, |body| {
            let comment = self.comment(" loadbalancer IP");
            for range in &allowed {
                line(body, &["-A ", chain, " ", &source_match(range), &comment, "-j ", to]);
            }
            let others =
                ["other traffic to ", &self.text, " will be dropped by KUBE-PROXY-FIREWALL"].concat();
            line(body, &["-A ", chain, " -m comment --comment \"", &others, "\""]);
        });
        self.guards.push((target, allowed, name));
        name
    }

    /// filter: sources that may not use the frontend are dropped before refusals are looked at.
    fn guard(&self, frontend: &Frontend, actions: Actions, rules: &mut ServiceRules) {
        let Some(allowed) = &frontend.allowed_sources else { return };
        let what = format!(" traffic not accepted by {}", ChainName::new("KUBE-FW-", self.hash));
        for (before, after) in self.destinations(frontend) {
            let matched = self.to_port(&self.comment(&what), after, frontend.port);
            let mut lines = Vec::new();
            if actions.refuses() {
                let allowed = allowed.iter().filter(|range| Family::of(range.addr()) == self.terms.family);
                for range in allowed {
                    let source = source_match(&range.trunc().to_string());
                    lines.push(format!("{source}{before}{matched}-j RETURN"));
                }
            }
            lines.push(format!("{before}{matched}-j DROP"));
            rules.blocks.push(Block { chain: Shared::Firewall, back: false, rules: lines });
        }
    }

    /// filter: what nat let pass because its source is refused.
    fn refuse(&self, frontend: &Frontend, actions: Actions, rules: &mut ServiceRules) {
        if !actions.refuses() {
            return;
        }
        let chain = match frontend.surface {
            Surface::ClusterIp(_) => Shared::Refused,
            _ => Shared::RefusedExternal,
        };
        let back = frontend.surface == Surface::NodePort;
        for (before, after) in self.destinations(frontend) {
            let lines = self.refusals(frontend, actions, &before, after);
            rules.blocks.push(Block { chain, back, rules: lines });
        }
    }

    fn refusals(&self, frontend: &Frontend, actions: Actions, before: &str, after: &str) -> Vec<String> {
        let refusal = |before: &str, origin: &str, action: Action| -> Option<String> {
            let (what, target) = match (action, self.terms.family) {
                (Action::Forward { .. }, _) => return None,
                (Action::Reject, Family::V4) => {
                    (" has no endpoints", "REJECT --reject-with icmp-port-unreachable")
                }
                (Action::Reject, Family::V6) => {
                    (" has no endpoints", "REJECT --reject-with icmp6-port-unreachable")
                }
                (Action::Drop, _) => (" has no local endpoints", "DROP"),
            };
            let matched = self.to_port(&self.comment(what), &format!("{after}{origin}"), frontend.port);
            Some(format!("{before}{matched}-j {target}"))
        };
        let mut kinds: Vec<Action> =
            actions.all().filter(|action| !matches!(action, Action::Forward { .. })).collect();
        kinds.dedup();
        // nat has rewritten what is forwarded, so one kind of refusal needs no look at sources.
        if let [only] = kinds[..] {
            return refusal(before, "", only).into_iter().collect();
        }
        let pods = self
            .terms
            .pods
            .iter()
            .filter_map(|pods| actions.pod.and_then(|action| refusal(&pods.and(before), "", action)));
        let node = actions.node.and_then(|action| refusal(before, "-m addrtype --src-type LOCAL ", action));
        pods.chain(node).chain(refusal(before, "", actions.rest)).collect()
    }

    fn destinations(&self, frontend: &Frontend) -> Vec<(String, &'static str)> {
        match frontend.surface.address() {
            Some(ip) => vec![(format!("-d {} ", host(ip)), "")],
            None => self.terms.node_port_matches(),
        }
    }

    /// A load-balancing chain and the chains of its endpoints. Their lines have no comments, as
    /// kube-proxy's where there are more than 1,000 endpoints: each takes 288 bytes in the kernel,
    /// and the legacy flavour moves all of them there and back with every change.
    fn pool(&self, pool: Pool, targets: &[Target], rules: &mut ServiceRules) {
        let mut ends: Vec<End> = targets.iter().map(|target| self.end(*target)).collect();
        // By text, as kube-proxy sorts them.
        ends.sort_unstable_by(|a, b| a.socket.cmp(&b.socket));
        // Room for the three lines of an endpoint without options: growing would copy the text over and over.
        rules.chains.reserve(ends.len() + 1);
        rules.text.reserve(ends.len() * 350);
        for end in &ends {
            rules.add(end.chain, |body| self.endpoint(end, body));
        }
        let name = self.pool_chain(pool);
        let head = match pool {
            Pool::Cluster => &self.cluster_head,
            Pool::Local => &self.local_head,
        };
        let pool = name.as_str();
        rules.add(name, |body| {
            body.push_str(head);
            if let Some(seconds) = self.port.affinity_seconds {
                let recent = format!(" -m recent --rcheck --seconds {seconds} --reap --name ");
                let mask = format!(" --mask {} --rsource -j ", self.full_mask());
                for End { chain, .. } in &ends {
                    line(body, &["-A ", pool, &recent, chain.as_str(), &mask, chain.as_str()]);
                }
            }
            for (index, End { chain, .. }) in ends.iter().enumerate() {
                match ends.len() - index {
                    1 => line(body, &["-A ", pool, " -j ", chain.as_str()]),
                    left => {
                        let one_in = " -m statistic --mode random --probability ";
                        line(body, &["-A ", pool, one_in, &probability(left), " -j ", chain.as_str()]);
                    }
                }
            }
        });
    }

    fn end(&self, target: Target) -> End {
        let socket = names::socket(target);
        let chain = names::endpoint_chain(&self.text, self.port.protocol, &socket);
        End { socket, chain, target }
    }

    fn endpoint(&self, end: &End, body: &mut String) {
        let (chain, protocol) = (end.chain.as_str(), self.port.protocol.name());
        let host = host(end.target.address);
        // An endpoint that reaches itself through the Service must get the answer through us.
        line(body, &["-A ", chain, " -s ", &host, " -j ", names::MARK_MASQ]);
        let recent = match self.port.affinity_seconds {
            Some(_) => format!("-m recent --set --name {chain} --mask {} --rsource ", self.full_mask()),
            None => String::new(),
        };
        let dnat = " -j DNAT --to-destination ";
        line(body, &["-A ", chain, " -p ", protocol, " ", &recent, "-m ", protocol, dnat, &end.socket]);
    }

    fn full_mask(&self) -> &'static str {
        match self.terms.family {
            Family::V4 => "255.255.255.255",
            Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        }
    }
}

/// An endpoint and its chain.
struct End {
    /// As [`names::socket`] writes it.
    socket: String,
    chain: ChainName,
    target: Target,
}

fn pool_of(action: Action) -> Option<Pool> {
    match action {
        Action::Forward { pool, .. } => Some(pool),
        Action::Reject | Action::Drop => None,
    }
}

/// The tools print no source where every address matches.
fn source_match(range: &str) -> String {
    if range.ends_with("/0") { String::new() } else { format!("-s {range} ") }
}

/// 1/n as the tools print it: a multiple of 2^-31.
pub(crate) fn probability(n: usize) -> String {
    #[allow(clippy::cast_precision_loss)] // far fewer endpoints than 2^52
    let share = 1.0 / n as f64;
    print_probability(share)
}
