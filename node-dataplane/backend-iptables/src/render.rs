//! One Service's plan -> its rules in one family, in the form that `iptables-save` prints.
//!
//! Only the plan's actions are looked at. The shapes that kube-proxy writes come out as it
//! writes them; every other combination of actions gets a chain that tests the sources.

use std::collections::BTreeMap;
use std::fmt::Write;

use lockstep_model::Family;
use lockstep_view::{Action, Frontend, Pool, PortPlan, ServicePlan, Surface, Target};

use crate::fixed::{Terms, host, line};
use crate::names::{self, Shared};

/// Rules of one Service in one family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ServiceRules {
    /// Chains of its own: name -> rules, with `-A NAME` before each.
    pub(crate) chains: BTreeMap<String, String>,
    /// Lines in shared chains.
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
        Ok(rules)
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
        if terms.pods.iter().any(|range| range.ends_with("/0")) {
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
    hash: String,
    /// Dispatch chains so far: what they do -> name. The first has kube-proxy's name.
    dispatch: Vec<(Actions, String)>,
    guards: Vec<(String, Vec<String>, String)>,
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
        Ok(Self { port, terms, text, hash, dispatch: Vec::new(), guards: Vec::new() })
    }

    fn render(mut self, rules: &mut ServiceRules) {
        for frontend in &self.port.frontends {
            let actions = Actions::of(frontend, self.terms);
            self.forward(frontend, actions, rules);
            self.guard(frontend, actions, rules);
            self.refuse(frontend, actions, rules);
        }
        for (pool, targets) in [(Pool::Cluster, &self.port.cluster), (Pool::Local, &self.port.local)] {
            let name = self.pool_chain(pool);
            let used = rules.chains.values().any(|body| body.contains(&name))
                || rules.blocks.iter().any(|block| block.rules.iter().any(|rule| rule.contains(&name)));
            if used {
                self.pool(name, targets, rules);
            }
        }
    }

    fn pool_chain(&self, pool: Pool) -> String {
        let prefix = match pool {
            Pool::Cluster => "KUBE-SVC-",
            Pool::Local => "KUBE-SVL-",
        };
        format!("{prefix}{}", self.hash)
    }

    fn comment(&self, what: &str) -> String {
        format!("-m comment --comment \"{}{what}\" ", self.text)
    }

    /// `-p tcp COMMENT MATCHES-m tcp --dport 80 `.
    fn to_port(&self, comment: &str, matches: &str, port: lockstep_model::Port) -> String {
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
                self.mark_at_cluster_ip(frontend, pool, masquerade, rules);
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
    fn mark_at_cluster_ip(
        &self,
        frontend: &Frontend,
        pool: Pool,
        masquerade: Masquerade,
        rules: &mut ServiceRules,
    ) {
        let Some(ip) = frontend.surface.address() else { return };
        let name = self.pool_chain(pool);
        let matched =
            format!("-d {} {}", host(ip), self.to_port(&self.comment(" cluster IP"), "", frontend.port));
        let body = rules.chains.entry(name.clone()).or_default();
        match (masquerade, self.terms.pods.split_first()) {
            (Masquerade::Nobody, _) => {}
            (Masquerade::Everybody, _) | (Masquerade::AllButPods, None) => {
                line(body, &name, &format!("{matched}-j {}", names::MARK_MASQ));
            }
            (Masquerade::AllButPods, Some((first, more))) => {
                line(body, &name, &format!("! -s {first} {matched}-j {}", names::MARK_MASQ));
                // One rule can exclude one range only; the mark of the others is taken back.
                for range in more {
                    let unmark = format!("-j MARK --set-xmark 0x0/{:#x}", self.terms.mark);
                    line(body, &name, &format!("-s {range} {matched}{unmark}"));
                }
            }
        }
    }

    /// A chain that sends each source where its action says; sources that are refused return.
    fn dispatch(&mut self, actions: Actions, rules: &mut ServiceRules) -> String {
        if let Some((_, name)) = self.dispatch.iter().find(|(known, _)| *known == actions) {
            return name.clone();
        }
        let name = match self.dispatch.len() {
            0 => format!("KUBE-EXT-{}", self.hash),
            nth => {
                let nth = nth.to_string();
                format!("KUBE-EXT-{}", names::hash(&[&self.text, self.port.protocol.name(), "/", &nth]))
            }
        };
        let mut body = String::new();
        if let Some(action) = actions.pod {
            for range in &self.terms.pods {
                self.send(
                    &mut body,
                    &name,
                    (&format!("-s {range} "), ""),
                    ["masquerade", "pod traffic for"],
                    action,
                );
            }
        }
        if let Some(action) = actions.node {
            let local = ("", "-m addrtype --src-type LOCAL ");
            self.send(&mut body, &name, local, ["masquerade LOCAL", "route LOCAL traffic for"], action);
        }
        self.send(&mut body, &name, ("", ""), ["masquerade", ""], actions.rest);
        rules.chains.insert(name.clone(), body);
        self.dispatch.push((actions, name.clone()));
        name
    }

    /// One class of sources of a dispatch chain. `words`: how the comments of the marking and
    /// of the jump begin; an empty one = no comment.
    fn send(&self, body: &mut String, chain: &str, source: (&str, &str), words: [&str; 2], action: Action) {
        let (before, after) = source;
        let comment =
            |word: &str| format!("-m comment --comment \"{word} {} external destinations\" ", self.text);
        let jump = if words[1].is_empty() { String::new() } else { comment(words[1]) };
        match action {
            Action::Forward { pool, masquerade } => {
                if masquerade {
                    let mark = comment(&format!("{} traffic for", words[0]));
                    line(body, chain, &format!("{before}{mark}{after}-j {}", names::MARK_MASQ));
                }
                line(body, chain, &format!("{before}{jump}{after}-j {}", self.pool_chain(pool)));
            }
            Action::Reject | Action::Drop if before.is_empty() && after.is_empty() => {}
            Action::Reject | Action::Drop => line(body, chain, &format!("{before}{jump}{after}-j RETURN")),
        }
    }

    /// A chain that lets only some sources on.
    fn guarded(&mut self, target: String, allowed: Vec<String>, rules: &mut ServiceRules) -> String {
        let known = self.guards.iter().find(|(to, ranges, _)| *to == target && *ranges == allowed);
        if let Some((_, _, name)) = known {
            return name.clone();
        }
        let name = match self.guards.len() {
            0 => format!("KUBE-FW-{}", self.hash),
            nth => {
                let nth = nth.to_string();
                format!("KUBE-FW-{}", names::hash(&[&self.text, self.port.protocol.name(), "/", &nth]))
            }
        };
        let mut body = String::new();
        for range in &allowed {
            let source = source_match(range);
            line(&mut body, &name, &format!("{source}{}-j {target}", self.comment(" loadbalancer IP")));
        }
        let end = format!(
            "-m comment --comment \"other traffic to {} will be dropped by KUBE-PROXY-FIREWALL\"",
            self.text
        );
        line(&mut body, &name, &end);
        rules.chains.insert(name.clone(), body);
        self.guards.push((target, allowed, name.clone()));
        name
    }

    /// filter: sources that may not use the frontend are dropped before refusals are looked at.
    fn guard(&self, frontend: &Frontend, actions: Actions, rules: &mut ServiceRules) {
        let Some(allowed) = &frontend.allowed_sources else { return };
        let what = format!(" traffic not accepted by KUBE-FW-{}", self.hash);
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
        let refusal = |source: &str, origin: &str, action: Action| -> Option<String> {
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
            Some(format!("{source}{before}{matched}-j {target}"))
        };
        let mut kinds: Vec<Action> =
            actions.all().filter(|action| !matches!(action, Action::Forward { .. })).collect();
        kinds.dedup();
        // nat has rewritten what is forwarded, so one kind of refusal needs no look at sources.
        if let [only] = kinds[..] {
            return refusal("", "", only).into_iter().collect();
        }
        let pods =
            self.terms.pods.iter().filter_map(|range| {
                actions.pod.and_then(|action| refusal(&format!("-s {range} "), "", action))
            });
        let node = actions.node.and_then(|action| refusal("", "-m addrtype --src-type LOCAL ", action));
        pods.chain(node).chain(refusal("", "", actions.rest)).collect()
    }

    fn destinations(&self, frontend: &Frontend) -> Vec<(String, &'static str)> {
        match frontend.surface.address() {
            Some(ip) => vec![(format!("-d {} ", host(ip)), "")],
            None => self.terms.node_port_matches(),
        }
    }

    /// A load-balancing chain and the chains of its endpoints.
    fn pool(&self, name: String, targets: &[Target], rules: &mut ServiceRules) {
        let mut body = rules.chains.remove(&name).unwrap_or_default();
        // By text, as kube-proxy sorts them.
        let mut ends: Vec<(String, Target)> = targets.iter().map(|t| (names::socket(*t), *t)).collect();
        ends.sort_unstable();
        let mut chains: Vec<String> = Vec::with_capacity(ends.len());
        for (socket, target) in &ends {
            let chain = names::endpoint_chain(&self.text, self.port.protocol, *target);
            if !rules.chains.contains_key(&chain) {
                let rules_of_end = self.endpoint(&chain, socket, *target);
                rules.chains.insert(chain.clone(), rules_of_end);
            }
            chains.push(chain);
        }
        if let Some(seconds) = self.port.affinity_seconds {
            for ((socket, _), chain) in ends.iter().zip(&chains) {
                let _ = writeln!(
                    body,
                    "-A {name} {}-m recent --rcheck --seconds {seconds} --reap --name {chain} --mask {} --rsource -j {chain}",
                    self.comment(&format!(" -> {socket}")),
                    self.full_mask(),
                );
            }
        }
        for (index, ((socket, _), chain)) in ends.iter().zip(&chains).enumerate() {
            let comment = self.comment(&format!(" -> {socket}"));
            let _ = match ends.len() - index {
                1 => writeln!(body, "-A {name} {comment}-j {chain}"),
                left => writeln!(
                    body,
                    "-A {name} {comment}-m statistic --mode random --probability {} -j {chain}",
                    probability(left)
                ),
            };
        }
        rules.chains.insert(name, body);
    }

    fn endpoint(&self, chain: &str, socket: &str, target: Target) -> String {
        let mut body = String::new();
        let (comment, protocol) = (self.comment(""), self.port.protocol.name());
        // An endpoint that reaches itself through the Service must get the answer through us.
        line(&mut body, chain, &format!("-s {} {comment}-j {}", host(target.address), names::MARK_MASQ));
        let recent = match self.port.affinity_seconds {
            Some(_) => format!("-m recent --set --name {chain} --mask {} --rsource ", self.full_mask()),
            None => String::new(),
        };
        let dnat = format!("-p {protocol} {comment}{recent}-m {protocol} -j DNAT --to-destination {socket}");
        line(&mut body, chain, &dnat);
        body
    }

    fn full_mask(&self) -> &'static str {
        match self.terms.family {
            Family::V4 => "255.255.255.255",
            Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        }
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

/// Rounds to a multiple of 2^-31, as the kernel does, then to the digits the tools print.
pub(crate) fn print_probability(share: f64) -> String {
    let unit = f64::from(1u32 << 31);
    format!("{:.11}", (share * unit).round() / unit)
}
