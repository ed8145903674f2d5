//! Scenarios: files that say which objects there are, which packets are sent, and what must
//! become of them. `scenarios/README.md` has the format.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::guest;
use crate::lab::{Family, Lab, Place};
use crate::product::Mode;
use crate::traffic::{OTHER_POD_PORT, Outcome, POD_PORT, Transport, probe, probe_with};

/// Connections per endpoint that look for one before it counts as missing: the odds of missing
/// one by chance are 1 in 100,000,000 with three endpoints, 1 in 2,000,000 with nine.
const TRIES_EACH: usize = 16;
/// Connections that look for a client that is sent elsewhere: between two endpoints, the odds
/// that it meets the same one by chance are 1 in 30,000.
const STICKS: usize = 16;
/// Connections that look for an endpoint that should not be there.
const TRIES_AT_LEAST: usize = 8;

/// What a scenario is played on.
pub trait Subject {
    /// Makes these objects all there are, but for what is always there, and waits until every
    /// node has programmed them.
    fn make(&mut self, objects: &str) -> Result<()>;

    /// Removes them all. Whoever plays next has other ones, so nobody need wait.
    fn clear(&mut self) -> Result<()> {
        self.make("")
    }

    /// The networks that probes are sent in, all of them at the same time.
    fn networks(&self) -> Vec<Network<'_>>;
}

/// A network and what programs its nodes.
#[derive(Debug, Clone, Copy)]
pub struct Network<'a> {
    /// The network.
    pub lab: &'a Lab,
    /// Whose rules they are.
    pub proxy: Proxy,
    /// What the rules are made of.
    pub mode: Mode,
}

/// Whose rules the kernels have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Ours.
    Lockstep,
    /// The real kube-proxy's.
    KubeProxy,
}

/// What a difference may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// nftables.
    Nftables,
    /// iptables of either flavour.
    Iptables,
    /// IPVS.
    Ipvs,
}

/// What only the guest's kernel is sure to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// Sockets of SCTP.
    Sctp,
}

/// Something that every scenario must leave alone.
pub const ALWAYS: &str = "\
apiVersion: v1
kind: Service
metadata: {name: always, namespace: default, uid: uid-always}
spec:
  clusterIP: 10.96.0.250
  clusterIPs: [10.96.0.250]
  ports: [{port: 80}]
";

/// One scenario.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, one sentence.
    pub about: String,
    /// What the kernel must have for it that not every kernel has. It is played in the guest only.
    pub needs: Option<Need>,
    /// What happens, in order. The nodes are verified at the new state before probes are sent.
    pub steps: Vec<Step>,
}

/// One state and what packets do in it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Kubernetes manifests, all of them: what an earlier step had and this one has not is
    /// gone. Unset = as before.
    pub objects: Option<String>,
    /// Addresses on interfaces, during this step.
    #[serde(default)]
    pub bound: Vec<Bound>,
    /// Probes, sent at the same time.
    pub probes: Vec<Probe>,
}

/// An address on an interface of a place.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// Place.
    pub at: String,
    /// Address.
    pub address: IpAddr,
}

impl Bound {
    fn ip(&self, lab: &Lab, verb: &str) -> Result<()> {
        let host = format!("{}/{}", self.address, if self.address.is_ipv4() { 32 } else { 128 });
        lab.tool(self.at.parse()?, &["ip", "address", verb, &host, "dev", "lo"]).map(drop)
    }
}

/// Connections from one place to one address.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Place: `n1p1`, `node1`, `outside`.
    pub from: String,
    /// Address.
    pub to: String,
    /// Port.
    pub port: u16,
    /// Transport; TCP where unset.
    #[serde(default = "tcp")]
    pub protocol: Transport,
    /// Milliseconds between its connections, for what depends on how long a client was idle.
    #[serde(default)]
    pub pause: u64,
    /// Bytes that each of its connections carries there and back, beside the question.
    #[serde(default)]
    pub bytes: usize,
    /// What must become of them.
    pub expect: Expect,
    /// Where something else must become of them; the first that applies counts.
    #[serde(default)]
    pub differs: Vec<Difference>,
}

/// What must become of the connections of a probe with some proxy or in some mode.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// With whom; unset = with both.
    proxy: Option<Proxy>,
    /// In which mode; unset = in every one.
    mode: Option<Mechanism>,
    /// What must become of them.
    expect: Expect,
    /// The row of `docs/parity.md` that says so: how it begins.
    parity: String,
}

impl Difference {
    fn concerns(&self, network: &Network<'_>) -> bool {
        let mechanism = match network.mode {
            Mode::Nftables => Mechanism::Nftables,
            Mode::IptablesLegacy | Mode::IptablesNft => Mechanism::Iptables,
            Mode::Ipvs => Mechanism::Ipvs,
        };
        self.proxy.is_none_or(|proxy| proxy == network.proxy)
            && self.mode.is_none_or(|mode| mode == mechanism)
    }
}

/// What must become of the connections of a probe.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Expect {
    /// Exactly these pods answer.
    Answers {
        /// Pods.
        by: Vec<String>,
        /// Whose address they see: `client`, the node that masquerades, or `destination`: that which was dialed.
        seeing: String,
    },
    /// One of these pods answers, and always the same one.
    Sticks {
        /// Pods.
        by: Vec<String>,
        /// Whose address they see.
        seeing: String,
    },
    /// ICMP error or reset.
    Refused,
    /// Nothing comes back.
    Dropped,
    /// No pod answers, whatever else happens: the address is nobody's, and the packet goes where
    /// the routes lead.
    Unanswered,
}

/// Plays cases, each by whichever of the players is free, and says how each ended, as `cargo
/// test` does. Returns how many passed and failed.
///
/// Scenarios have nothing in common, so they do not disturb each other, and while one waits for
/// the nodes another sends packets. The two families of one are never played at the same time:
/// they have names and node ports in common.
#[allow(clippy::print_stdout, reason = "the report of a test")]
pub fn play_all<S: Subject + Send>(cases: &[Case], players: Vec<S>) -> (usize, usize) {
    let turns: BTreeMap<_, _> = cases.iter().map(|case| (case.path.clone(), Mutex::new(()))).collect();
    let next = AtomicUsize::new(0);
    let play = |mut player: S| {
        let (mut passed, mut failed) = (0, 0);
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let turn = turns[&case.path].lock();
            let scenario = Scenario::read(&case.path, case.family);
            let result = scenario.and_then(|scenario| scenario.play(&mut player));
            drop(turn);
            match result {
                Ok(()) => {
                    passed += 1;
                    println!("test {} ... ok", case.name);
                }
                Err(error) => {
                    failed += 1;
                    println!("{}: {error:#}\ntest {} ... FAILED", case.name, case.name);
                }
            }
        }
        (passed, failed)
    };
    std::thread::scope(|scope| {
        let play = &play;
        let running: Vec<_> = players.into_iter().map(|player| scope.spawn(move || play(player))).collect();
        let counts = running.into_iter().map(|thread| match thread.join() {
            Ok(counts) => counts,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        counts.fold((0, 0), |(passed, failed), (good, bad)| (passed + good, failed + bad))
    })
}

/// A scenario in one family.
#[derive(Debug)]
pub struct Case {
    /// `IPv4/cluster-ip`, after what whoever plays it puts before.
    pub name: String,
    /// Family.
    pub family: Family,
    /// File.
    pub path: PathBuf,
}

/// Every scenario in both families, as far as its name has all of `filters` in it; sorted. A filter
/// with commas is several, of which one is enough. Outside the guest, those are not among them that are
/// for it alone.
pub fn cases(prefix: &str, filters: &[String]) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for path in files()? {
        if !guest::is_here() && Scenario::read(&path, Family::V4)?.needs.is_some() {
            continue;
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for family in [Family::V4, Family::V6] {
            let name = format!("{prefix}{family}/{stem}");
            if filters.iter().all(|filter| filter.split(',').any(|word| name.contains(word))) {
                cases.push(Case { name, family, path: path.clone() });
            }
        }
    }
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(cases)
}

fn files() -> Result<Vec<PathBuf>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let entries = std::fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    Ok(files)
}

impl Scenario {
    /// Reads a file, with the addresses of one family in it.
    pub fn read(path: &Path, family: Family) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let text = with_addresses(&text, family).with_context(|| path.display().to_string())?;
        serde_saphyr::from_str(&text).with_context(|| path.display().to_string())
    }

    /// Plays it. Its objects are gone afterwards. Err = what was not as expected.
    pub fn play(&self, subject: &mut dyn Subject) -> Result<()> {
        let played =
            self.steps.iter().enumerate().try_for_each(|(index, step)| {
                step.play(subject).with_context(|| format!("step {}", index + 1))
            });
        let removed = subject.clear();
        played.and(removed)
    }
}

impl Step {
    fn play(&self, subject: &mut dyn Subject) -> Result<()> {
        if let Some(objects) = &self.objects {
            subject.make(objects)?;
        }
        let networks = subject.networks();
        self.bind(&networks, "add")?;
        let faults = self.probe_all(&networks);
        self.bind(&networks, "del")?;
        if faults.is_empty() { Ok(()) } else { bail!("{}", faults.join("\n")) }
    }

    fn bind(&self, networks: &[Network<'_>], verb: &str) -> Result<()> {
        let mut pairs =
            networks.iter().flat_map(|network| self.bound.iter().map(move |bound| (bound, network)));
        pairs.try_for_each(|(bound, network)| bound.ip(network.lab, verb))
    }

    fn probe_all(&self, networks: &[Network<'_>]) -> Vec<String> {
        let mut faults: Vec<String> = std::thread::scope(|scope| {
            let pairs =
                networks.iter().flat_map(|network| self.probes.iter().map(move |probe| (probe, network)));
            let running: Vec<_> = pairs
                .map(|(probe, network)| {
                    scope.spawn(move || {
                        probe.run(network).with_context(|| format!("{}: {probe}", network.mode.name()))
                    })
                })
                .collect();
            running
                .into_iter()
                .filter_map(|thread| match thread.join() {
                    Ok(result) => result.err().map(|error| format!("{error:#}")),
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        });
        faults.sort();
        faults
    }
}

impl Probe {
    fn run(&self, network: &Network<'_>) -> Result<()> {
        let Some(other) = self.differs.iter().find(|difference| difference.concerns(network)) else {
            return self.becomes(&self.expect, network.lab);
        };
        let row = || format!("as {:?} says", other.parity);
        self.becomes(&other.expect, network.lab).with_context(row)?;
        match self.becomes(&self.expect, network.lab) {
            Ok(()) => bail!("{} and it is as elsewhere, too: {:?}", row(), self.expect),
            Err(_) => Ok(()),
        }
    }

    fn becomes(&self, expect: &Expect, lab: &Lab) -> Result<()> {
        let from: Place = self.from.parse()?;
        let to = SocketAddr::new(self.to.parse().with_context(|| self.to.clone())?, self.port);
        match expect {
            Expect::Refused => expect_only(&Outcome::Refused, &probe(lab, from, self.protocol, to)?),
            Expect::Dropped => expect_only(&Outcome::Timeout, &probe(lab, from, self.protocol, to)?),
            Expect::Unanswered => match probe(lab, from, self.protocol, to)? {
                answered @ Outcome::Answered { .. } => bail!("expected no answer; got: {answered}"),
                _ => Ok(()),
            },
            Expect::Answers { by, seeing } => {
                let wanted = places(by)?;
                let mut answered = BTreeSet::new();
                let tries = TRIES_EACH * wanted.len();
                for attempt in 1..=tries {
                    let by = self.one(lab, from, to, &wanted, seeing);
                    answered.insert(by.with_context(|| format!("attempt {attempt}"))?);
                    let costly = self.pause > 0 || self.bytes > 0;
                    if answered == wanted && (attempt >= TRIES_AT_LEAST || costly) {
                        return Ok(());
                    }
                }
                let silent: Vec<String> = wanted.difference(&answered).map(Place::to_string).collect();
                bail!("never answered in {tries} connections: {}", silent.join(", "))
            }
            Expect::Sticks { by, seeing } => {
                let wanted = places(by)?;
                let first = self.one(lab, from, to, &wanted, seeing)?;
                for attempt in 2..=STICKS {
                    let by = self.one(lab, from, to, &wanted, seeing);
                    let by = by.with_context(|| format!("attempt {attempt}"))?;
                    ensure!(by == first, "attempt {attempt}: answered by {by}, after {first}");
                }
                Ok(())
            }
        }
    }

    /// One connection that one of these pods must answer. Returns which, after the pause.
    fn one(
        &self,
        lab: &Lab,
        from: Place,
        to: SocketAddr,
        wanted: &BTreeSet<Place>,
        seeing: &str,
    ) -> Result<Place> {
        let is_seen = |source: IpAddr| -> Result<bool> {
            Ok(match seeing {
                "client" => from.owns(source),
                "destination" => source == to.ip(),
                place => place.parse::<Place>()?.owns(source),
            })
        };
        match probe_with(lab, from, self.protocol, to, self.bytes)? {
            Outcome::Answered { by, source } if wanted.contains(&by) => {
                ensure!(is_seen(source)?, "{by} saw {source}, which is not an address of {seeing}");
                // Being idle is what is waited for.
                std::thread::sleep(Duration::from_millis(self.pause));
                Ok(by)
            }
            other => bail!("{other}"),
        }
    }
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} -> {} port {} {:?}", self.from, self.to, self.port, self.protocol)
    }
}

fn places(names: &[String]) -> Result<BTreeSet<Place>> {
    names.iter().map(|name| name.parse()).collect()
}

fn expect_only(wanted: &Outcome, got: &Outcome) -> Result<()> {
    if got == wanted { Ok(()) } else { bail!("expected: {wanted}; got: {got}") }
}

fn tcp() -> Transport {
    Transport::Tcp
}

/// Replaces `${name}` by the family's value.
fn with_addresses(text: &str, family: Family) -> Result<String> {
    let mut result = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (name, after) = after.split_once('}').context("`${` without `}`")?;
        result.push_str(before);
        result.push_str(&value(name, family)?);
        rest = after;
    }
    result.push_str(rest);
    Ok(result)
}

fn value(name: &str, family: Family) -> Result<String> {
    let (family, name) = match name.strip_prefix("other:") {
        Some(name) => (family.other(), name),
        None => (family, name),
    };
    let four = family == Family::V4;
    let (kind, number) = match name.rsplit_once('-') {
        Some((kind, number)) => (kind, number.parse::<u8>().ok()),
        None => (name, None),
    };
    Ok(match (kind, number) {
        ("family", _) => family.to_string(),
        _ if name == "pod-port" => POD_PORT.to_string(),
        _ if name == "other-pod-port" => OTHER_POD_PORT.to_string(),
        _ if name == "host-bits" => if four { "32" } else { "128" }.to_owned(),
        ("cluster-ip", Some(n)) if four => format!("10.96.0.{n}"),
        ("cluster-ip", Some(n)) => format!("fd00:96::{n}"),
        // The address that the outside client reaches through this node.
        ("via-node1", Some(n)) if four => format!("192.0.2.{n}"),
        ("via-node2", Some(n)) if four => format!("198.51.100.{n}"),
        ("via-node3", Some(n)) if four => format!("203.0.113.{n}"),
        ("via-node1", Some(n)) => format!("2001:db8:1::{n}"),
        ("via-node2", Some(n)) => format!("2001:db8:2::{n}"),
        ("via-node3", Some(n)) => format!("2001:db8:3::{n}"),
        _ => name.parse::<Place>()?.address(family).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_can_be_read_and_sends_something() {
        let files = files().unwrap();
        assert!(!files.is_empty());
        for path in files {
            for family in [Family::V4, Family::V6] {
                let scenario = Scenario::read(&path, family).unwrap();
                assert!(scenario.steps.iter().all(|step| !step.probes.is_empty()), "{}", path.display());
            }
        }
    }

    #[test]
    fn of_a_filter_with_commas_one_word_is_enough() {
        let filters = ["IPv4".to_owned(), "/hairpin,/cluster-ip".to_owned()];
        let names: Vec<String> =
            cases("nftables/", &filters).unwrap().into_iter().map(|case| case.name).collect();
        assert_eq!(names, ["nftables/IPv4/cluster-ip", "nftables/IPv4/hairpin"]);
    }

    #[test]
    fn a_scenario_says_so_where_the_kernel_must_have_more() {
        for path in files().unwrap() {
            let scenario = Scenario::read(&path, Family::V4).unwrap();
            let probes = scenario.steps.iter().flat_map(|step| &step.probes);
            let sctp = probes.into_iter().any(|probe| probe.protocol == Transport::Sctp);
            assert_eq!(scenario.needs == Some(Need::Sctp), sctp, "{}", path.display());
        }
    }

    #[test]
    fn scenarios_that_are_played_at_the_same_time_have_nothing_in_common() {
        let mut owners = BTreeMap::new();
        for path in files().unwrap() {
            let text = std::fs::read_to_string(&path).unwrap();
            let words = text.split(['{', '}', ',', '"', '\n']).map(str::trim);
            let claims = words.filter(|word| {
                let kinds = ["cluster-ip-", "via-node", "nodePort: ", "healthCheckNodePort: "];
                kinds.iter().any(|kind| word.starts_with(kind))
            });
            let lines = text.lines().map(str::trim);
            let objects = lines.filter(|line| line.starts_with("metadata: "));
            // Up to the name: Services and slices are named differently by all.
            let names = objects.filter_map(|line| line.split(',').next());
            for claim in claims.chain(names) {
                let owner = owners.entry(claim.to_owned()).or_insert_with(|| path.clone());
                assert_eq!(owner, &path, "{claim} is in both");
            }
        }
        assert!(owners.len() > 100, "{} claims only", owners.len());
    }

    /// The first column of every table of `docs/parity.md`.
    fn matters() -> Vec<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/parity.md");
        let text = std::fs::read_to_string(path).unwrap();
        let rows = text.lines().filter_map(|line| line.strip_prefix("| "));
        rows.filter_map(|row| row.split_once(" |")).map(|(matter, _)| matter.to_owned()).collect()
    }

    #[test]
    fn every_difference_has_its_row_in_the_list_of_differences() {
        let matters = matters();
        for path in files().unwrap() {
            let scenario = Scenario::read(&path, Family::V4).unwrap();
            for difference in scenario.steps.iter().flat_map(|step| &step.probes).flat_map(|it| &it.differs) {
                let row = &difference.parity;
                assert!(
                    matters.iter().any(|matter| matter.starts_with(row.as_str())),
                    "{}: docs/parity.md has no row that begins with {row:?}",
                    path.display()
                );
            }
        }
    }

    #[test]
    fn addresses_are_those_of_the_family() {
        assert_eq!(with_addresses("${n1p2} ${family}", Family::V4).unwrap(), "10.244.1.2 IPv4");
        assert_eq!(with_addresses("${other:n1p2} ${other:family}", Family::V6).unwrap(), "10.244.1.2 IPv4");
        assert_eq!(with_addresses("[${cluster-ip-7}]", Family::V6).unwrap(), "[fd00:96::7]");
        assert!(with_addresses("${elsewhere}", Family::V4).is_err());
    }
}
