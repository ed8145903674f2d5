//! The names of everything in our tables, and how a fresh process recognises them.
//!
//! | chain | what it does |
//! |---|---|
//! | `svc.c10` | DNAT to a random one of the 10 cluster endpoints of the address dialled |
//! | `svc.l2` | the same with the 2 local endpoints |
//! | `svc.c10s60` | the same, and a client keeps its endpoint until it was idle for 60 seconds |
//! | `svc.c10m` | sets the masquerade mark, then `svc.c10` |
//! | `svc.c10.c10m.l2` | pods go to `svc.c10`, the node itself to `svc.c10m`, all others to `svc.l2`; `x` = nowhere |
//! | `np.…` | the same for node ports |
//! | `refuse` | ICMP port unreachable |
//! | `refuse.r.d.x` | by source: rejected, dropped, let through |

use std::fmt::Write as _;

use lockstep_view::{Action, Frontend, Pool, Source};

/// Name of our table in both families.
pub(crate) const TABLE: &str = "lockstep";
/// Table of the probe; never outlives its transaction.
pub(crate) const PROBE_TABLE: &str = "lockstep-probe";

/// What a frontend's key is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Via {
    /// Address, protocol, port.
    Address,
    /// Protocol, port: a node port.
    NodePort,
}

/// Where packets of one class of source go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Way {
    /// Not translated.
    Nowhere,
    /// To a target.
    Targets { choice: Choice, masquerade: bool },
}

/// How a target is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Choice {
    /// A random one of this pool,
    pub(crate) pool: Pool,
    /// which has so many;
    pub(crate) count: u32,
    /// unless the client has one: it keeps it until it was idle for so many seconds.
    pub(crate) affinity: Option<u32>,
}

/// What happens in the filter hooks to packets that were not translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Refusal {
    LetThrough,
    Reject,
    Drop,
}

/// A chain that is shared by all Services that need the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum SharedChain {
    /// DNAT to a target.
    Targets { via: Via, choice: Choice },
    /// The mark, then the same.
    Marked { via: Via, choice: Choice },
    /// By class of source: pod, node, elsewhere.
    BySource { via: Via, ways: [Way; 3] },
    /// ICMP port unreachable.
    Refuse,
    /// By class of source: pod, node, elsewhere.
    RefuseBySource([Refusal; 3]),
}

const SOURCES: [Source; 3] = [Source::Pod, Source::Node, Source::Elsewhere];

impl Way {
    /// The chain for it; `None` for nowhere.
    pub(crate) fn chain(self, via: Via) -> Option<SharedChain> {
        match self {
            Way::Nowhere => None,
            Way::Targets { choice, masquerade: false } => Some(SharedChain::Targets { via, choice }),
            Way::Targets { choice, masquerade: true } => Some(SharedChain::Marked { via, choice }),
        }
    }
}

impl SharedChain {
    /// The chain that translates what a frontend forwards; `None` where it forwards nothing.
    pub(crate) fn translating(
        via: Via,
        frontend: &Frontend,
        choice: impl Fn(Pool) -> Choice,
    ) -> Option<SharedChain> {
        let ways = SOURCES.map(|source| match frontend.action(source) {
            Action::Forward { pool, masquerade } => Way::Targets { choice: choice(pool), masquerade },
            Action::Reject | Action::Drop => Way::Nowhere,
        });
        if ways[0] == ways[1] && ways[1] == ways[2] {
            return ways[0].chain(via);
        }
        Some(SharedChain::BySource { via, ways })
    }

    /// What refuses the rest of a frontend's packets.
    pub(crate) fn refusing(frontend: &Frontend) -> Refusing {
        let by_source = SOURCES.map(|source| match frontend.action(source) {
            Action::Forward { .. } => Refusal::LetThrough,
            Action::Reject => Refusal::Reject,
            Action::Drop => Refusal::Drop,
        });
        // Forwarded packets have left the address by now, so classes that forward do not count.
        let rejects = by_source.contains(&Refusal::Reject);
        match (rejects, by_source.contains(&Refusal::Drop)) {
            (false, false) => Refusing::Nothing,
            (true, false) => Refusing::By(SharedChain::Refuse),
            (false, true) => Refusing::Drop,
            (true, true) => Refusing::By(SharedChain::RefuseBySource(by_source)),
        }
    }

    /// The chains that its rules go to.
    pub(crate) fn leads_to(self) -> Vec<SharedChain> {
        match self {
            SharedChain::Targets { .. } | SharedChain::Refuse => Vec::new(),
            SharedChain::Marked { via, choice } => vec![SharedChain::Targets { via, choice }],
            SharedChain::BySource { via, ways } => ways.iter().filter_map(|way| way.chain(via)).collect(),
            SharedChain::RefuseBySource(_) => vec![SharedChain::Refuse],
        }
    }

    /// Its name.
    pub(crate) fn name(self) -> String {
        let mut name = String::with_capacity(32);
        self.write_name(&mut name);
        name
    }

    /// Appends its name.
    pub(crate) fn write_name(self, out: &mut String) {
        match self {
            SharedChain::Targets { via, choice } => {
                out.push_str(via.prefix());
                write_way(out, Way::Targets { choice, masquerade: false });
            }
            SharedChain::Marked { via, choice } => {
                out.push_str(via.prefix());
                write_way(out, Way::Targets { choice, masquerade: true });
            }
            SharedChain::BySource { via, ways } => {
                out.push_str(via.prefix());
                ways.iter().for_each(|way| write_way(out, *way));
            }
            SharedChain::Refuse => out.push_str("refuse"),
            SharedChain::RefuseBySource(by_source) => {
                out.push_str("refuse");
                for refusal in by_source {
                    out.push_str(match refusal {
                        Refusal::LetThrough => ".x",
                        Refusal::Reject => ".r",
                        Refusal::Drop => ".d",
                    });
                }
            }
        }
    }

    /// Recognises a name; `None` where it is none of ours.
    pub(crate) fn parse(name: &str) -> Option<SharedChain> {
        let mut parts = name.split('.');
        let via = match parts.next()? {
            "svc" => Via::Address,
            "np" => Via::NodePort,
            "refuse" => return parse_refusing(parts.collect()),
            _ => return None,
        };
        let ways: Vec<Way> = parts.map(parse_way).collect::<Option<_>>()?;
        let chain = match *ways.as_slice() {
            [way] => way.chain(via)?,
            [pod, node, elsewhere] => SharedChain::BySource { via, ways: [pod, node, elsewhere] },
            _ => return None,
        };
        // Only the one spelling that `name` gives.
        (chain.name() == name).then_some(chain)
    }
}

fn parse_refusing(parts: Vec<&str>) -> Option<SharedChain> {
    let refusal = |part: &str| match part {
        "x" => Some(Refusal::LetThrough),
        "r" => Some(Refusal::Reject),
        "d" => Some(Refusal::Drop),
        _ => None,
    };
    match *parts.as_slice() {
        [] => Some(SharedChain::Refuse),
        [pod, node, elsewhere] => {
            Some(SharedChain::RefuseBySource([refusal(pod)?, refusal(node)?, refusal(elsewhere)?]))
        }
        _ => None,
    }
}

/// How the rest of a frontend's packets is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusing {
    /// There is no rest.
    Nothing,
    /// Dropped.
    Drop,
    /// By a chain.
    By(SharedChain),
}

impl Via {
    fn prefix(self) -> &'static str {
        match self {
            Via::Address => "svc",
            Via::NodePort => "np",
        }
    }
}

fn write_way(out: &mut String, way: Way) {
    match way {
        Way::Nowhere => out.push_str(".x"),
        Way::Targets { choice: Choice { pool, count, affinity }, masquerade } => {
            out.push_str(match pool {
                Pool::Cluster => ".c",
                Pool::Local => ".l",
            });
            // Writing to a String cannot fail.
            let _ = write!(out, "{count}");
            if let Some(seconds) = affinity {
                let _ = write!(out, "s{seconds}");
            }
            if masquerade {
                out.push('m');
            }
        }
    }
}

fn parse_way(part: &str) -> Option<Way> {
    if part == "x" {
        return Some(Way::Nowhere);
    }
    let (part, masquerade) = part.strip_suffix('m').map_or((part, false), |rest| (rest, true));
    let (pool, count) = match part.split_at_checked(1)? {
        ("c", count) => (Pool::Cluster, count),
        ("l", count) => (Pool::Local, count),
        _ => return None,
    };
    let positive = |number: &str| number.parse::<u32>().ok().filter(|number| *number > 0);
    let (count, affinity) = match count.split_once('s') {
        Some((count, seconds)) => (count, Some(positive(seconds)?)),
        None => (count, None),
    };
    let choice = Choice { pool, count: positive(count)?, affinity };
    Some(Way::Targets { choice, masquerade })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_recognised_and_nothing_else() {
        for name in
            ["svc.c1", "svc.l30m", "np.c2.c2m.x", "svc.c3.c3m.l2", "np.l2s86400m", "refuse", "refuse.r.d.x"]
        {
            assert_eq!(SharedChain::parse(name).expect(name).name(), name);
        }
        for name in [
            "",
            "svc",
            "svc.",
            "svc.c0",
            "svc.c01",
            "svc.x",
            "svc.c1.c1",
            "svc.c1s",
            "svc.c1s0",
            "svc.c1s060",
            "np.q1",
            "refuse.r",
            "other",
        ] {
            assert_eq!(SharedChain::parse(name), None, "{name}");
        }
    }
}
