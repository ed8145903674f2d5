//! `lockstepctl explain` is held against packets: whatever it says becomes of a connection is what
//! becomes of it, for Services of every policy, from every place, on an nftables and on an
//! iptables node. Needs root.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use lockstep_integration::lab::{Family, Lab, Place};
use lockstep_integration::product::{Mode, Product};
use lockstep_integration::traffic::{Outcome, POD_PORT, Transport, probe};
use serde_json::Value;

/// Connections until every endpoint has answered: to miss one of three has odds of 1 in 10^7.
const TRIES: usize = 40;
/// Connections that look for an endpoint that should not be there.
const TRIES_AT_LEAST: usize = 6;
/// Questions that are asked at the same time.
const AT_ONCE: usize = 6;
/// A port that no Service has.
const NOBODYS_PORT: u16 = 81;
/// In the ServiceCIDR, and no Service's.
const UNALLOCATED: [&str; 2] = ["10.96.0.99:80", "[fd00:96::99]:80"];
/// An external IP of the first Service that is an address of node 2.
const AT_NODE2: &str = "10.200.0.12:80";

const SERVICE_CIDR: &str = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
                            spec: {cidrs: [10.96.0.0/16, 'fd00:96::/112']}\n";

const READY: &str = "conditions: {ready: true}";
const DRAINING: &str = "conditions: {ready: false, serving: true, terminating: true}";
const DEAD: &str = "conditions: {ready: false, serving: false, terminating: true}";

/// A Service: its number, policies, further lines of its spec, and its endpoints.
struct Served {
    number: u8,
    internal: &'static str,
    external: &'static str,
    spec: &'static str,
    endpoints: &'static [(Place, &'static str)],
}

const N1P1: Place = Place::Pod(1, 1);
const N2P1: Place = Place::Pod(2, 1);
const N2P2: Place = Place::Pod(2, 2);
const AFFINITY: u8 = 9;

const SERVED: &[Served] = &[
    served(1, "Cluster", "Cluster", "", &[(N1P1, READY), (N2P1, READY)]),
    served(2, "Local", "Local", "", &[(N1P1, READY), (N2P1, READY), (N2P2, READY)]),
    served(3, "Local", "Local", "", &[(N2P1, READY)]),
    served(4, "Cluster", "Local", "", &[(N1P1, DRAINING), (N2P1, READY)]),
    served(5, "Local", "Local", "", &[(N1P1, DEAD), (N2P1, DEAD)]),
    served(
        6,
        "Cluster",
        "Cluster",
        "",
        &[
            (N1P1, "conditions: {ready: true}, hints: {forZones: [{name: zone1}]}"),
            (N2P1, "conditions: {ready: true}, hints: {forZones: [{name: zone2}]}"),
        ],
    ),
    served(
        7,
        "Local",
        "Local",
        "loadBalancerSourceRanges: [10.200.0.100/32, 10.200.0.11/32, 'fd00:200::100/128']",
        &[(N1P1, READY)],
    ),
    served(8, "Cluster", "Local", "loadBalancerSourceRanges: [10.244.0.0/16, 'fd00:244::/32']", &[]),
    served(AFFINITY, "Cluster", "Cluster", "sessionAffinity: ClientIP", &[(N1P1, READY), (N2P1, READY)]),
];

const fn served(
    number: u8,
    internal: &'static str,
    external: &'static str,
    spec: &'static str,
    endpoints: &'static [(Place, &'static str)],
) -> Served {
    Served { number, internal, external, spec, endpoints }
}

impl Served {
    fn manifest(&self) -> String {
        let n = self.number;
        let at_node2 = if n == 1 { ", 10.200.0.12" } else { "" };
        let mut text = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: default, uid: uid-{n}}}\n\
             spec:\n  type: LoadBalancer\n  clusterIP: 10.96.0.{n}\n  clusterIPs: [10.96.0.{n}, 'fd00:96::{n}']\n  \
             ipFamilies: [IPv4, IPv6]\n  externalIPs: [192.0.2.{}{at_node2}]\n  internalTrafficPolicy: {}\n  \
             externalTrafficPolicy: {}\n  {}\n  ports:\n  - {{name: tcp, port: 80, nodePort: {}}}\n  \
             - {{name: udp, port: 53, protocol: UDP, nodePort: {}}}\n\
             status:\n  loadBalancer:\n    ingress: [{{ip: 192.0.2.{n}}}, {{ip: 198.51.100.{n}}}, {{ip: '2001:db8:2::{n}'}}]\n",
            100 + n,
            self.internal,
            self.external,
            self.spec,
            self.node_port(),
            self.node_port() + 1000,
        );
        for (slice, family) in [("v4", Family::V4), ("v6", Family::V6)] {
            let _ = write!(
                text,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: s{n}-{slice}, namespace: default, labels: {{kubernetes.io/service-name: s{n}}}}}\n\
                 addressType: {family}\n\
                 ports: [{{name: tcp, port: {POD_PORT}}}, {{name: udp, port: {POD_PORT}, protocol: UDP}}]\nendpoints:\n"
            );
            for (place, rest) in self.endpoints {
                let Place::Pod(node, _) = place else { continue };
                let address = place.address(family);
                let _ = writeln!(text, "- {{addresses: ['{address}'], nodeName: node{node}, {rest}}}");
            }
            if self.endpoints.is_empty() {
                text.truncate(text.trim_end().len());
                text.push_str(" []\n");
            }
        }
        text
    }

    fn node_port(&self) -> u16 {
        30_000 + u16::from(self.number)
    }

    /// Every way to dial it. Where affinity remembers, one: what is learnt at one address may count
    /// at another.
    fn destinations(&self) -> Result<Vec<(Transport, SocketAddr)>> {
        let n = self.number;
        let mut all = vec![(Transport::Tcp, format!("10.96.0.{n}:80"))];
        if n != AFFINITY {
            for to in [
                format!("192.0.2.{}:80", 100 + n),
                format!("192.0.2.{n}:80"),
                format!("198.51.100.{n}:80"),
                format!("10.200.0.11:{}", self.node_port()),
                format!("10.200.0.12:{}", self.node_port()),
                format!("[fd00:96::{n}]:80"),
                format!("[2001:db8:2::{n}]:80"),
                format!("[fd00:200::12]:{}", self.node_port()),
                format!("127.0.0.1:{}", self.node_port()),
                format!("[::1]:{}", self.node_port()),
                format!("10.96.0.{n}:{NOBODYS_PORT}"),
                format!("192.0.2.{n}:{NOBODYS_PORT}"),
            ] {
                all.push((Transport::Tcp, to));
            }
            all.push((Transport::Udp, format!("10.96.0.{n}:53")));
            all.push((Transport::Udp, format!("10.200.0.11:{}", self.node_port() + 1000)));
        }
        all.into_iter().map(|(transport, to)| Ok((transport, to.parse().context(to)?))).collect()
    }
}

/// One question.
#[derive(Debug, Clone, Copy)]
struct Question {
    from: Place,
    transport: Transport,
    to: SocketAddr,
}

/// What is said or seen to become of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// These pods answer; true = it sees the client's address, false = one of the node's.
    Answered(BTreeMap<Place, bool>),
    /// The same one of these always answers.
    Sticks(BTreeMap<Place, bool>),
    Refused,
    Dropped,
    /// No pod answers, whatever else.
    LeftAlone,
}

impl Question {
    fn family(self) -> Family {
        if self.to.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The node whose rules decide: the one that is dialled, else that of the client; a client
    /// outside has a route to each range through one node.
    fn decider(self) -> u8 {
        let dialled = (1..=2).find(|node| Place::Node(*node).owns(self.to.ip()));
        let through_node2 =
            ["198.51.100.", "2001:db8:2:"].iter().any(|it| self.to.ip().to_string().starts_with(it));
        match (dialled, self.from) {
            (Some(node), _) => node,
            (None, Place::Pod(node, _) | Place::Node(node)) => node,
            (None, _) if through_node2 => 2,
            (None, _) => 1,
        }
    }

    /// False where the packet comes to no node that is asked: nobody but a node reaches its own
    /// loopback addresses, and what node 1 sends to a Service's address it translates itself.
    fn is_asked(self) -> bool {
        match self.to.ip().is_loopback() {
            true => matches!(self.from, Place::Node(_)),
            false => {
                self.to.to_string() != AT_NODE2 || !matches!(self.from, Place::Node(1) | Place::Pod(1, _))
            }
        }
    }

    /// Who talks to a loopback address has it.
    fn client(self) -> IpAddr {
        if self.to.ip().is_loopback() { self.to.ip() } else { self.from.address(self.family()) }
    }

    /// By which it comes in to the node that decides.
    fn interface(self) -> Option<String> {
        match self.from {
            Place::Node(node) if node == self.decider() => None,
            Place::Pod(node, _) if node == self.decider() => Some(self.from.to_string()),
            _ => Some("eth0".into()),
        }
    }

    fn explain(self, product: &Product) -> Result<Value> {
        let node = Place::Node(self.decider()).to_string();
        let from = self.client().to_string();
        let transport = if self.transport == Transport::Tcp { "tcp" } else { "udp" };
        let to = self.to.to_string();
        let mut line = vec!["explain", "-o", "json", "--node", &node, "--from", &from, transport, &to];
        let interface = self.interface();
        if let Some(name) = &interface {
            line.extend(["--interface", name]);
        }
        let output = product.ctl(&line)?.output()?;
        ensure!(output.status.success(), "lockstepctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What the explanation says will become of it.
    fn said(self, answer: &Value, lab: &Lab) -> Result<Fate> {
        ensure!(answer["inForce"]["state"] == "Verified", "in force: {}", answer["inForce"]);
        Ok(match answer["verdict"].as_str().context("no verdict")? {
            "Refused" => Fate::Refused,
            "Dropped" | "DroppedBySourceRanges" => Fate::Dropped,
            "LeftAlone" => Fate::LeftAlone,
            "Forwarded" => {
                let all = answer["endpoints"].as_array().context("no endpoints")?;
                let mut by = BTreeMap::new();
                for it in all.iter().filter(|it| it["candidate"] == true) {
                    let address = it["address"].as_str().context("no address")?.parse()?;
                    let pod = lab.pods().find(|pod| pod.owns(address));
                    by.insert(pod.with_context(|| format!("{address} is no pod"))?, it["sees"] == "Client");
                }
                match answer["service"]["affinitySeconds"].is_number() {
                    true => Fate::Sticks(by),
                    false => Fate::Answered(by),
                }
            }
            other => bail!("verdict {other}"),
        })
    }

    /// True where it cannot be shown: another node sends a pod's connection, with its address kept,
    /// back to the client's own node, which is then answered past the one that translated it. That
    /// is lost, as with kube-proxy.
    fn is_lost(self, said: &Fate) -> bool {
        let (Fate::Answered(by), Place::Pod(node, _)) = (said, self.from) else { return false };
        node != self.decider()
            && by.iter().any(|(pod, kept)| matches!(pod, Place::Pod(own, _) if *own == node) && *kept)
    }

    /// Sends connections until they have shown that it is so, or something else.
    fn shown(self, product: &Product, said: &Fate) -> Result<()> {
        let once = || probe(&product.lab, self.from, self.transport, self.to);
        match said {
            Fate::Refused => ensure_is(&once()?, &Outcome::Refused),
            Fate::Dropped => ensure_is(&once()?, &Outcome::Timeout),
            Fate::LeftAlone => match once()? {
                Outcome::Answered { by, .. } => bail!("{by} answered"),
                _ => Ok(()),
            },
            Fate::Answered(wanted) => {
                let mut answered = BTreeSet::new();
                for attempt in 1..=TRIES {
                    answered.insert(self.one(&once()?, wanted)?);
                    if answered.len() == wanted.len() && attempt >= TRIES_AT_LEAST {
                        return Ok(());
                    }
                }
                bail!("only {answered:?} answered in {TRIES} connections")
            }
            Fate::Sticks(wanted) => {
                let first = self.one(&once()?, wanted)?;
                for _ in 1..TRIES_AT_LEAST * 2 {
                    let next = self.one(&once()?, wanted)?;
                    ensure!(next == first, "{next} answered after {first}");
                }
                Ok(())
            }
        }
    }

    /// One answer, which must be of one of these, who sees whom it should.
    fn one(self, outcome: &Outcome, wanted: &BTreeMap<Place, bool>) -> Result<Place> {
        let Outcome::Answered { by, source } = outcome else { bail!("{outcome}") };
        let sees_client = wanted.get(by).with_context(|| format!("{outcome}"))?;
        let right = match sees_client {
            true => *source == self.client(),
            false => Place::Node(self.decider()).owns(*source),
        };
        ensure!(right, "{outcome}");
        Ok(*by)
    }
}

fn ensure_is(got: &Outcome, wanted: &Outcome) -> Result<()> {
    ensure!(got == wanted, "{got}");
    Ok(())
}

/// Two nodes, the first in nftables mode, with all the Services.
fn started(flags: &[&str]) -> Result<Product> {
    let mut product = Product::new(Lab::new(2, 2)?, &[Mode::Nftables, Mode::IptablesLegacy])?;
    if !flags.is_empty() {
        product.set_agent_flags(flags);
    }
    product.write_manifest("nodes.yaml", &product.node_manifest())?;
    product.write_manifest("services.yaml", &SERVED.iter().map(Served::manifest).collect::<String>())?;
    product.write_manifest("cidr.yaml", SERVICE_CIDR)?;
    product.start()?;
    let quarantined = product.list_failures()?.quarantined;
    ensure!(quarantined.is_empty(), "what this test made up is wrong: {quarantined:?}");
    Ok(product)
}

/// How often each verdict was shown, by the node that decided it.
type Shown = BTreeMap<(u8, String), usize>;

/// Asks about these from everywhere, and sends.
fn hold(product: &Product, destinations: &[(Transport, SocketAddr)]) -> Result<Shown> {
    let places: Vec<Place> =
        product.lab.pods().chain([Place::Node(1), Place::Node(2), Place::Outside]).collect();
    let mut questions = Vec::new();
    for (transport, to) in destinations {
        questions.extend(places.iter().map(|from| Question { from: *from, transport: *transport, to: *to }));
    }
    questions.retain(|question| question.is_asked());
    let count = questions.len();
    let (queue, results) = (Mutex::new(questions), Mutex::new((Vec::new(), Shown::new())));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(question) = next(&queue) {
                    let result = ask(question, product);
                    let mut results = results.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    match result {
                        Ok(verdict) => *results.1.entry((question.decider(), verdict)).or_insert(0) += 1,
                        Err(fault) => results.0.push(format!("{fault:#}")),
                    }
                }
            });
        }
    });
    let (faults, shown) = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    ensure!(faults.is_empty(), "{} of {count} are not as explained:\n{}", faults.len(), faults.join("\n"));
    Ok(shown)
}

#[test]
fn what_is_explained_is_what_packets_do() -> Result<()> {
    let product = started(&[])?;
    let mut destinations = Vec::new();
    for served in SERVED {
        destinations.extend(served.destinations()?);
    }
    for to in UNALLOCATED.into_iter().chain([AT_NODE2]) {
        destinations.push((Transport::Tcp, to.parse()?));
    }
    let shown = hold(&product, &destinations)?;
    // Every verdict was met on either node, so that no table of answers is empty by accident.
    let both = ["Forwarded", "Refused", "Dropped", "DroppedBySourceRanges", "LeftAlone"];
    let mut wanted: Vec<(u8, &str)> =
        both.into_iter().flat_map(|verdict| [(1, verdict), (2, verdict)]).collect();
    wanted.extend([
        (1, "Dropped: unallocated"),
        (2, "LeftAlone: unallocated"),
        (1, "LeftAlone: loopback"),
        (2, "Forwarded: loopback"),
    ]);
    for (node, verdict) in wanted {
        ensure!(shown.contains_key(&(node, verdict.to_owned())), "node{node}: never {verdict}: {shown:?}");
    }
    Ok(())
}

#[test]
fn pods_that_are_told_by_their_interfaces_are_explained_so() -> Result<()> {
    // The pods of node 2 come in by interfaces of other names, so they are none.
    let product = started(&["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=n1p"])?;
    let mut destinations = Vec::new();
    for served in SERVED.iter().filter(|served| matches!(served.number, 2 | 3)) {
        destinations.extend(served.destinations()?.into_iter().filter(|(_, to)| to.port() != NOBODYS_PORT));
    }
    let shown = hold(&product, &destinations)?;
    // External policy Local forwards pods and drops others where no endpoint is on the node.
    for verdict in ["Forwarded", "Dropped"] {
        ensure!(shown.contains_key(&(1, verdict.to_owned())), "never {verdict}: {shown:?}");
    }
    Ok(())
}

fn next(queue: &Mutex<Vec<Question>>) -> Option<Question> {
    queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop()
}

/// Asks and sends. Returns the verdict that was shown, and of what where that is rare.
fn ask(question: Question, product: &Product) -> Result<String> {
    let Question { from, transport, to } = question;
    let context = || format!("{from} -> {to} {transport:?} at node{}", question.decider());
    let answer = question.explain(product).with_context(context)?;
    let said = question.said(&answer, &product.lab).with_context(context)?;
    if question.is_lost(&said) {
        return Ok("Lost".into());
    }
    question.shown(product, &said).with_context(|| format!("explained: {said:?}")).with_context(context)?;
    let verdict = answer["verdict"].as_str().unwrap_or_default();
    let unallocated = answer["reason"].as_str().is_some_and(|reason| reason.contains("is in a ServiceCIDR"));
    Ok(match (to.ip().is_loopback(), unallocated) {
        (true, _) => format!("{verdict}: loopback"),
        (_, true) => format!("{verdict}: unallocated"),
        _ => verdict.into(),
    })
}
