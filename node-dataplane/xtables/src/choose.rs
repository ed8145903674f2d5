//! Which flavour of iptables to use, and whether it works at all.

use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_model::Family;

use crate::input::line;
use crate::table::Table;
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

/// The name of the scratch chains of a probe; no other program's.
pub const SCRATCH: &str = "LOCKSTEP-PROBE";

/// Takes the flavour that already holds rules on this host: kubelet's hint chains decide, then
/// the number of rules, then what works. `needs`: as for [`probe`].
pub fn detect(run: &Arc<dyn Run>, needs: &[(Table, String)]) -> Result<Choice, Unusable> {
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
        match probe(run, flavour, needs) {
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

/// Proves by real transactions, which leave nothing, that IPv4 works in this flavour. `needs`: what the
/// user cannot do without, beyond what everybody needs.
pub fn probe(run: &Arc<dyn Run>, flavour: Flavour, needs: &[(Table, String)]) -> Result<(), ToolError> {
    abilities(&Tool::new(Arc::clone(run), flavour, Family::V4), needs).map(|_| ())
}

/// What one family can do beyond what everybody needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// The tool and the kernel know `MASQUERADE --random-fully`.
    pub random_fully: bool,
}

/// What one family can do; an error where it lacks what everybody needs, or one of `needs`: rules of this
/// family without `-A NAME`.
pub fn abilities(tool: &Tool, needs: &[(Table, String)]) -> Result<Abilities, ToolError> {
    let (host, reject) = match tool.family {
        Family::V4 => ("192.0.2.1/32", "icmp-port-unreachable"),
        Family::V6 => ("2001:db8::1/128", "icmp6-port-unreachable"),
    };
    let general = [
        (
            Table::Filter,
            format!(
                "-d {host} -p tcp -m comment --comment \"a b\" -m addrtype --dst-type LOCAL -m tcp --dport 1 -j REJECT --reject-with {reject}"
            ),
        ),
        (Table::Filter, "-m conntrack --ctstate NEW -m mark --mark 0x1/0x1 -j DROP".to_owned()),
        (Table::Nat, "-j MARK --set-xmark 0x1/0x1".to_owned()),
        (Table::Nat, "-j MASQUERADE".to_owned()),
    ];
    for table in Table::ALL {
        let all = general.iter().chain(needs).filter(|(of, _)| *of == table);
        let rules: Vec<&str> = all.map(|(_, rule)| rule.as_str()).collect();
        if !rules.is_empty() {
            attempt(tool, table, &rules)?;
        }
    }
    Ok(Abilities { random_fully: can(tool, Table::Nat, "-j MASQUERADE --random-fully")? })
}

/// Whether a rule, without `-A NAME`, can be written into a chain of this table. `-j RETURN` asks for the
/// table. An error where that cannot be found out.
pub fn can(tool: &Tool, table: Table, rule: &str) -> Result<bool, ToolError> {
    match attempt(tool, table, &[rule]) {
        Ok(()) => Ok(true),
        Err(error) if error.concerns_rules() => Ok(false),
        Err(error) => Err(error),
    }
}

fn attempt(tool: &Tool, table: Table, rules: &[&str]) -> Result<(), ToolError> {
    let table = table.name();
    let mut make = format!("*{table}\n:{SCRATCH} - [0:0]\n");
    rules.iter().for_each(|rule| line(&mut make, &["-A ", SCRATCH, " ", rule]));
    make.push_str("COMMIT\n");
    let made = tool.restore(&make);
    let unmake = tool.restore(&format!("*{table}\n:{SCRATCH} - [0:0]\n-X {SCRATCH}\nCOMMIT\n"));
    made.and(unmake)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    #[test]
    fn what_is_tried_out_leaves_nothing_and_a_table_that_is_not_there_is_known() {
        let fake = Arc::new(Fake::default());
        fake.take_table_away(Table::Mangle);
        let run = Arc::clone(&fake) as Arc<dyn Run>;
        let tool = Tool::new(Arc::clone(&run), Flavour::Nft, Family::V4);
        assert!(can(&tool, Table::Nat, "-j RETURN").unwrap());
        assert!(!can(&tool, Table::Mangle, "-j RETURN").unwrap());
        fake.refuse(Some("random-fully"));
        assert_eq!(abilities(&tool, &[]).unwrap(), Abilities { random_fully: false });
        let needs = [(Table::Mangle, "-j DROP".to_owned())];
        assert!(probe(&run, Flavour::Nft, &needs).unwrap_err().concerns_rules());
        assert!(detect(&run, &needs).is_err());
        assert_eq!(detect(&run, &[]).unwrap().flavour, Flavour::Nft);
        fake.refuse(None);
        assert!(abilities(&tool, &[]).unwrap().random_fully);
        assert!(!fake.rules().contains(SCRATCH));
        fake.lock_once();
        assert!(can(&tool, Table::Nat, "-j RETURN").is_err(), "the lock says nothing about the rule");
    }

    #[test]
    fn rules_that_are_there_speak_for_their_flavour() {
        let run: Arc<dyn Run> = Arc::new(Fake::default());
        let tool = Tool::new(Arc::clone(&run), Flavour::Nft, Family::V4);
        tool.restore("*nat\n-A OUTPUT -j ACCEPT\nCOMMIT\n").unwrap();
        let choice = detect(&run, &[]).unwrap();
        assert!(choice.reason.contains("holds 1 rules"), "{}", choice.reason);
    }
}
