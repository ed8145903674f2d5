//! Sends the connections, in every network at the same time, and holds what became of them
//! against what must.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;

use crate::lab::{Lab, Place};
use crate::product::Mode;
use crate::random::expectation::{Circumstances, Expected, Plans};
use crate::random::objects::Door;
use crate::scenario::{Network, Proxy};
use crate::traffic::{Outcome, Transport, probe};

/// Probes that run at the same time in one network.
const AT_ONCE: usize = 24;
/// Connections that look for an endpoint that should not be there.
const TRIES_AT_LEAST: usize = 6;
/// Connections for each endpoint of a pool until one that never answered counts as missing:
/// among six, the odds of missing one by chance are 1 in 10,000,000,000.
const TRIES_EACH: usize = 24;

/// Connections from one place to one address.
#[derive(Debug, Clone)]
pub struct Probe {
    from: Place,
    to: SocketAddr,
    transport: Transport,
    expected: Expected,
}

/// Who asks at which door, and what must become of it: `most` of all the pairs there are.
pub fn generate(rng: &mut Rng, lab: &Lab, plans: &Plans, doors: &[Door], most: usize) -> Result<Vec<Probe>> {
    let mut clients: Vec<Place> = lab.pods().collect();
    clients.extend((1..=lab.nodes()).map(Place::Node));
    clients.push(Place::Outside);
    let mut pairs = Vec::new();
    for door in doors {
        for to in plans.addresses(door) {
            pairs.extend(clients.iter().map(|from| (*from, to, door.transport)));
        }
    }
    rng.shuffle(&mut pairs);
    let mut probes = Vec::new();
    for (from, to, transport) in pairs {
        let expected = plans.expect(from, to, transport)?;
        if expected != Expected::Unclear && probes.len() < most {
            probes.push(Probe { from, to, transport, expected });
        }
    }
    Ok(probes)
}

/// Sends all of them in all networks. Returns what was not as it must be.
pub fn send(networks: &[Network<'_>], probes: &[Probe]) -> Vec<String> {
    let mut faults: Vec<String> = thread::scope(|scope| {
        let mut running = Vec::new();
        for network in networks {
            let next = std::sync::Arc::new(AtomicUsize::new(0));
            for _ in 0..AT_ONCE {
                let next = next.clone();
                running.push(scope.spawn(move || {
                    let mut faults = Vec::new();
                    while let Some(probe) = probes.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = probe.run(network) {
                            faults.push(format!(
                                "{:?} {}: {probe}: {error:#}",
                                network.proxy,
                                network.mode.name()
                            ));
                        }
                    }
                    faults
                }));
            }
        }
        let joined = running.into_iter().map(|thread| thread.join());
        joined.flat_map(|faults| faults.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    faults.sort();
    faults
}

/// True where a connection that reaches its own client gets lost with the real kube-proxy:
/// "a pod reaches itself, and its slice does not say on which node it is", "a pod reaches itself
/// through another node's node port, external policy Local" in `docs/parity.md`.
fn loses_hairpins(network: &Network<'_>) -> bool {
    network.proxy != Proxy::Lockstep && network.mode == Mode::Nftables
}

/// What else may become of a connection with the real kube-proxy: a row of `docs/parity.md`
/// each.
fn differs(network: &Network<'_>, expected: &Expected) -> Option<Wanted> {
    if network.proxy == Proxy::Lockstep {
        return None;
    }
    let nftables = network.mode == Mode::Nftables;
    match expected {
        _ if nftables => None,
        // "the node dials an external or load-balancer address of a Service without endpoints"
        Expected::Refused(Circumstances { from_node: true, external_address: true, .. }) => {
            Some(Wanted::NoAnswer)
        }
        // "a source outside `loadBalancerSourceRanges`, Service without endpoints"
        Expected::Dropped(Circumstances { no_endpoints: true, from_node, .. }) => {
            Some(if *from_node { Wanted::NoAnswer } else { Wanted::Refused })
        }
        _ => None,
    }
}

/// What a single connection must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Refused,
    Dropped,
    NoAnswer,
}

impl Wanted {
    fn check(self, outcome: &Outcome) -> Result<()> {
        let good = match self {
            Wanted::Refused => *outcome == Outcome::Refused,
            Wanted::Dropped => *outcome == Outcome::Timeout,
            Wanted::NoAnswer => !matches!(outcome, Outcome::Answered { .. }),
        };
        if good { Ok(()) } else { bail!("expected: {self:?}; got: {outcome}") }
    }
}

/// Connects until every pod of `by` has answered. A connection to `lost` may stay without an
/// answer, and so may one of which nobody knows whether it went there; everything else is as
/// with the others.
fn expect_answers(
    by: &BTreeMap<Place, Place>,
    affinity: bool,
    lost: Option<Place>,
    mut connect: impl FnMut() -> Result<Outcome>,
) -> Result<()> {
    let mut missing: BTreeSet<Place> = by.keys().copied().filter(|pod| lost != Some(*pod)).collect();
    for attempt in 1..=by.len() * TRIES_EACH {
        match connect()? {
            Outcome::Timeout if lost.is_some_and(|client| by.contains_key(&client)) => {}
            outcome @ Outcome::Answered { by: pod, source } => {
                let seen = by.get(&pod).with_context(|| format!("attempt {attempt}: {outcome}"))?;
                ensure!(seen.owns(source), "{outcome}, which is not an address of {seen}");
                missing.remove(&pod);
            }
            outcome => bail!("attempt {attempt}: {outcome}"),
        }
        if attempt >= TRIES_AT_LEAST && (affinity || missing.is_empty()) {
            return Ok(());
        }
    }
    bail!("these never answered: {missing:?}")
}

impl Probe {
    fn run(&self, network: &Network<'_>) -> Result<()> {
        if let Some(wanted) = differs(network, &self.expected) {
            return wanted.check(&self.connect(network.lab)?);
        }
        match &self.expected {
            Expected::Refused(_) => Wanted::Refused.check(&self.connect(network.lab)?),
            Expected::Dropped(_) => Wanted::Dropped.check(&self.connect(network.lab)?),
            Expected::OtherPort if network.mode == Mode::Nftables => {
                Wanted::Refused.check(&self.connect(network.lab)?)
            }
            Expected::Unallocated if network.mode == Mode::Nftables => {
                Wanted::Dropped.check(&self.connect(network.lab)?)
            }
            Expected::LeftAlone | Expected::OtherPort | Expected::Unallocated => {
                Wanted::NoAnswer.check(&self.connect(network.lab)?)
            }
            Expected::Unclear => Ok(()),
            Expected::Answers { by, affinity, hairpin_lost_upstream } => {
                let lost = (*hairpin_lost_upstream && loses_hairpins(network)).then_some(self.from);
                expect_answers(by, *affinity, lost, || self.connect(network.lab))
            }
        }
    }

    fn connect(&self, lab: &Lab) -> Result<Outcome> {
        probe(lab, self.from, self.transport, self.to)
    }
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, to, transport, expected } = self;
        write!(f, "{from} -> {to} {transport:?}, expected {expected:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Family;

    const CLIENT: Place = Place::Pod(1, 1);
    const OTHER: Place = Place::Pod(2, 1);

    fn answer(by: Place, seen: Place) -> Outcome {
        Outcome::Answered { by, source: seen.address(Family::V4) }
    }

    /// What `outcomes`, again and again, are taken for.
    fn judged(pool: &[Place], lost: Option<Place>, outcomes: &[Outcome]) -> bool {
        let by = pool.iter().map(|pod| (*pod, Place::Node(1))).collect();
        let mut outcomes = outcomes.iter().cloned().cycle();
        expect_answers(&by, false, lost, || outcomes.next().context("no outcome")).is_ok()
    }

    #[test]
    fn where_hairpins_get_lost_only_silence_is_excused() {
        let (good, lost) = (answer(OTHER, Place::Node(1)), Some(CLIENT));
        assert!(judged(&[CLIENT], lost, &[Outcome::Timeout]));
        assert!(judged(&[CLIENT, OTHER], lost, &[Outcome::Timeout, good.clone()]));
        assert!(judged(&[CLIENT, OTHER], lost, &[answer(CLIENT, Place::Node(1)), good.clone()]));
        assert!(!judged(&[CLIENT, OTHER], lost, &[Outcome::Timeout]), "the other one never answers");
        assert!(!judged(&[CLIENT], lost, &[Outcome::Timeout, Outcome::Refused]));
        assert!(!judged(&[CLIENT], lost, &[Outcome::Timeout, good.clone()]), "not of the pool");
        assert!(!judged(&[CLIENT, OTHER], lost, &[Outcome::Timeout, answer(OTHER, CLIENT)]));
        assert!(!judged(&[OTHER], lost, &[Outcome::Timeout, good.clone()]), "the client is not in it");
        assert!(!judged(&[CLIENT, OTHER], None, &[Outcome::Timeout, good]));
    }
}
