//! Which flavour of iptables to use, and whether it works at all.

use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_model::Family;

use crate::family::Abilities;
use crate::guard;
use crate::tool::{Flavour, Tool, ToolError};

/// A flavour and why it was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The flavour.
    pub flavour: Flavour,
    /// For people: `kubelet's hint chains are in nft`.
    pub reason: String,
}

/// No flavour works.
#[derive(Debug, thiserror::Error)]
#[error("iptables nft: {nft}; iptables legacy: {legacy}")]
pub struct Unusable {
    /// Why nft does not.
    pub nft: Box<ToolError>,
    /// Why legacy does not.
    pub legacy: Box<ToolError>,
}

/// Chosen for the scratch chains of a probe; no other program's.
const SCRATCH: &str = "LOCKSTEP-PROBE";

/// Takes the flavour that already holds rules on this host: kubelet's hint chains decide, then
/// the number of rules, then what works.
pub fn detect(run: &Arc<dyn Run>) -> Result<Choice, Unusable> {
    let found = Flavour::ALL.map(|flavour| (flavour, Holdings::of(run, flavour)));
    let with_hint: Vec<&(Flavour, Holdings)> = found.iter().filter(|(_, held)| held.hint).collect();
    let mut ranked: Vec<(Flavour, String)> = Vec::new();
    if let [(flavour, _)] = with_hint[..] {
        ranked.push((*flavour, format!("kubelet's hint chains are in {flavour}")));
    }
    if let Some((flavour, held)) =
        found.iter().filter(|(_, held)| held.rules > 0).max_by_key(|(_, held)| held.rules)
    {
        ranked.push((*flavour, format!("{flavour} holds {} rules on this host, the most", held.rules)));
    }
    for flavour in Flavour::ALL {
        ranked.push((flavour, format!("{flavour} works, and no flavour holds rules on this host")));
    }
    let mut failed = Vec::new();
    for (flavour, reason) in ranked {
        match probe(run, flavour) {
            Ok(()) if failed.is_empty() => return Ok(Choice { flavour, reason }),
            Ok(()) => return Ok(Choice { flavour, reason: format!("{flavour} works, the other does not") }),
            Err(error) => failed.push((flavour, error)),
        }
    }
    let mut last = |wanted| {
        let at = failed.iter().rposition(|(flavour, _)| *flavour == wanted);
        Box::new(failed.swap_remove(at.unwrap_or(0)).1)
    };
    let (legacy, nft) = (last(Flavour::Legacy), last(Flavour::Nft));
    Err(Unusable { nft, legacy })
}

#[derive(Debug, Default)]
struct Holdings {
    rules: usize,
    hint: bool,
}

impl Holdings {
    fn of(run: &Arc<dyn Run>, flavour: Flavour) -> Self {
        let mut held = Self::default();
        for family in Family::ALL {
            let Ok(saved) = Tool::new(Arc::clone(run), flavour, family).save() else { continue };
            held.rules += saved.lines().filter(|line| line.starts_with("-A ")).count();
            let hints = [":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY "];
            held.hint |= saved.lines().any(|line| hints.iter().any(|hint| line.starts_with(hint)));
        }
        held
    }
}

/// Proves by real transactions, which leave nothing, that IPv4 works in this flavour.
pub fn probe(run: &Arc<dyn Run>, flavour: Flavour) -> Result<(), ToolError> {
    abilities(&Tool::new(Arc::clone(run), flavour, Family::V4)).map(|_| ())
}

/// What one family can do; an error where it lacks what every Service needs.
pub(crate) fn abilities(tool: &Tool) -> Result<Abilities, ToolError> {
    let (host, reject) = match tool.family {
        Family::V4 => ("192.0.2.1/32", "icmp-port-unreachable"),
        Family::V6 => ("2001:db8::1/128", "icmp6-port-unreachable"),
    };
    let end = match tool.family {
        Family::V4 => "192.0.2.1:1",
        Family::V6 => "[2001:db8::1]:1",
    };
    let filter = [
        format!(
            "-d {host} -p tcp -m comment --comment \"a b\" -m addrtype --dst-type LOCAL -m tcp --dport 1 -j REJECT --reject-with {reject}"
        ),
        "-m conntrack --ctstate NEW -m mark --mark 0x1/0x1 -j DROP".to_owned(),
    ];
    let nat = [
        format!("-d {host} -p udp -m udp --dport 1 -m statistic --mode random --probability 0.5 -j RETURN"),
        "-j MARK --set-xmark 0x1/0x1".to_owned(),
        format!("-p tcp -m tcp -j DNAT --to-destination {end}"),
        "-j MASQUERADE".to_owned(),
    ];
    attempt(tool, "filter", &filter)?;
    attempt(tool, "nat", &nat)?;
    let can = |table: &str, rule: String| match attempt(tool, table, &[rule]) {
        Ok(()) => Ok(true),
        Err(error) if error.concerns_rules() => Ok(false),
        Err(error) => Err(error),
    };
    Ok(Abilities {
        random_fully: can("nat", "-j MASQUERADE --random-fully".to_owned())?,
        recent: can(
            "nat",
            format!("-m recent --rcheck --seconds 1 --reap --name {SCRATCH} --rsource -j RETURN"),
        )?,
        guard: tool.family == Family::V4 && can("filter", guard::RULE.to_owned())?,
        sctp: can("nat", format!("-p sctp -m sctp -j DNAT --to-destination {end}"))?,
    })
}

fn attempt(tool: &Tool, table: &str, rules: &[String]) -> Result<(), ToolError> {
    let mut make = format!("*{table}\n:{SCRATCH} - [0:0]\n");
    for rule in rules {
        make.push_str(&format!("-A {SCRATCH} {rule}\n"));
    }
    make.push_str("COMMIT\n");
    let made = tool.restore(&make);
    let unmake = tool.restore(&format!("*{table}\n:{SCRATCH} - [0:0]\n-X {SCRATCH}\nCOMMIT\n"));
    made.and(unmake)
}
