//! Scenarios: files that say which objects there are, which packets are sent, and what must
//! become of them. `scenarios/README.md` has the format.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::lab::{Family, Lab, Place};
use crate::product::{Mode, Product};
use crate::traffic::{OTHER_POD_PORT, Outcome, POD_PORT, Transport, probe};

/// Connections that look for an endpoint before it counts as missing: with three endpoints the
/// odds of missing one by chance are 1 in 100,000,000.
const TRIES: usize = 48;
/// Connections that look for a client that is sent elsewhere: between two endpoints, the odds
/// that it meets the same one by chance are 1 in 30,000.
const STICKS: usize = 16;
/// Connections that look for an endpoint that should not be there.
const TRIES_AT_LEAST: usize = 8;

/// One scenario.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, one sentence.
    pub about: String,
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
    /// What must become of them.
    pub expect: Expect,
}

/// What must become of the connections of a probe.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Expect {
    /// Exactly these pods answer.
    Answers {
        /// Pods.
        by: Vec<String>,
        /// Whose address they see: `client`, or the node that masquerades.
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
    /// Not the same in every mode, as `docs/parity.md` has it.
    In {
        /// In nftables mode.
        nftables: Box<Expect>,
        /// In iptables mode, in both flavours.
        iptables: Box<Expect>,
    },
}

impl Expect {
    fn of(&self, mode: Mode) -> &Expect {
        match (self, mode) {
            (Expect::In { nftables, .. }, Mode::Nftables) => nftables.of(mode),
            (Expect::In { iptables, .. }, _) => iptables.of(mode),
            (same, _) => same,
        }
    }
}

impl Scenario {
    /// Reads a file, with the addresses of one family in it.
    pub fn read(path: &Path, family: Family) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let text = with_addresses(&text, family).with_context(|| path.display().to_string())?;
        serde_saphyr::from_str(&text).with_context(|| path.display().to_string())
    }

    /// Plays it. Its objects are gone afterwards. Err = what was not as expected.
    pub fn play(&self, product: &Product) -> Result<()> {
        let played =
            self.steps.iter().enumerate().try_for_each(|(index, step)| {
                step.play(product).with_context(|| format!("step {}", index + 1))
            });
        let removed = product.change(|product| product.remove_manifest("scenario.yaml"));
        played.and(removed)
    }
}

impl Step {
    fn play(&self, product: &Product) -> Result<()> {
        if let Some(objects) = &self.objects {
            product.change(|product| product.write_manifest("scenario.yaml", objects))?;
        }
        self.bound.iter().try_for_each(|bound| bound.ip(&product.lab, "add"))?;
        let faults = self.probe_all(product);
        self.bound.iter().try_for_each(|bound| bound.ip(&product.lab, "del"))?;
        if faults.is_empty() { Ok(()) } else { bail!("{}", faults.join("\n")) }
    }

    fn probe_all(&self, product: &Product) -> Vec<String> {
        let mut faults: Vec<String> = std::thread::scope(|scope| {
            let running: Vec<_> = self
                .probes
                .iter()
                .map(|probe| {
                    scope.spawn(|| probe.run(&product.lab, product.mode()).with_context(|| probe.to_string()))
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
    fn run(&self, lab: &Lab, mode: Mode) -> Result<()> {
        let from: Place = self.from.parse()?;
        let to = SocketAddr::new(self.to.parse().with_context(|| self.to.clone())?, self.port);
        match self.expect.of(mode) {
            Expect::In { .. } => bail!("no mode is another"),
            Expect::Refused => expect_only(&Outcome::Refused, &probe(lab, from, self.protocol, to)?),
            Expect::Dropped => expect_only(&Outcome::Timeout, &probe(lab, from, self.protocol, to)?),
            Expect::Unanswered => match probe(lab, from, self.protocol, to)? {
                answered @ Outcome::Answered { .. } => bail!("expected no answer; got: {answered}"),
                _ => Ok(()),
            },
            Expect::Answers { by, seeing } => {
                let wanted = places(by)?;
                let mut answered = BTreeSet::new();
                for attempt in 1..=TRIES {
                    let by = self.one(lab, from, to, &wanted, seeing);
                    answered.insert(by.with_context(|| format!("attempt {attempt}"))?);
                    if answered == wanted && (attempt >= TRIES_AT_LEAST || self.pause > 0) {
                        return Ok(());
                    }
                }
                let silent: Vec<String> = wanted.difference(&answered).map(Place::to_string).collect();
                bail!("never answered in {TRIES} connections: {}", silent.join(", "))
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
        let seen: Place = if seeing == "client" { from } else { seeing.parse()? };
        match probe(lab, from, self.protocol, to)? {
            Outcome::Answered { by, source } if wanted.contains(&by) => {
                ensure!(seen.owns(source), "{by} saw {source}, which is not an address of {seen}");
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

    fn files() -> Vec<std::path::PathBuf> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut files: Vec<_> =
            std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
        files.sort();
        files
    }

    #[test]
    fn every_scenario_can_be_read_and_sends_something() {
        assert!(!files().is_empty());
        for path in files() {
            for family in [Family::V4, Family::V6] {
                let scenario = Scenario::read(&path, family).unwrap();
                assert!(scenario.steps.iter().all(|step| !step.probes.is_empty()), "{}", path.display());
            }
        }
    }

    #[test]
    fn addresses_are_those_of_the_family() {
        assert_eq!(with_addresses("${n1p2} ${family}", Family::V4).unwrap(), "10.244.1.2 IPv4");
        assert_eq!(with_addresses("[${cluster-ip-7}]", Family::V6).unwrap(), "[fd00:96::7]");
        assert!(with_addresses("${elsewhere}", Family::V4).is_err());
    }
}
