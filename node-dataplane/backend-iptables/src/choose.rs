//! What the tools and the kernel must be able to do, and what they may.

use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_model::Family;
use lockstep_xtables::{Choice, Flavour, SCRATCH, Table, Tool, ToolError, Unusable, can};

use crate::family::Abilities;
use crate::guard;

/// Takes the flavour that already holds rules on this host: kubelet's hint chains decide, then
/// the number of rules, then what works.
pub fn detect(run: &Arc<dyn Run>) -> Result<Choice, Unusable> {
    lockstep_xtables::detect(run, &needs(Family::V4))
}

/// Proves by real transactions, which leave nothing, that IPv4 works in this flavour.
pub fn probe(run: &Arc<dyn Run>, flavour: Flavour) -> Result<(), ToolError> {
    lockstep_xtables::probe(run, flavour, &needs(Family::V4))
}

/// What one family can do; an error where it lacks what every Service needs.
pub(crate) fn abilities(tool: &Tool) -> Result<Abilities, ToolError> {
    let general = lockstep_xtables::abilities(tool, &needs(tool.family))?;
    let recent = format!("-m recent --rcheck --seconds 1 --reap --name {SCRATCH} --rsource -j RETURN");
    Ok(Abilities {
        random_fully: general.random_fully,
        recent: can(tool, Table::Nat, &recent)?,
        guard: tool.family == Family::V4 && can(tool, Table::Filter, guard::RULE)?,
        sctp: can(
            tool,
            Table::Nat,
            &format!("-p sctp -m sctp -j DNAT --to-destination {}", end(tool.family)),
        )?,
    })
}

/// What balances and translates.
fn needs(family: Family) -> [(Table, String); 2] {
    let host = match family {
        Family::V4 => "192.0.2.1/32",
        Family::V6 => "2001:db8::1/128",
    };
    let balance = "-m udp --dport 1 -m statistic --mode random --probability 0.5 -j RETURN";
    [
        (Table::Nat, format!("-d {host} -p udp {balance}")),
        (Table::Nat, format!("-p tcp -m tcp -j DNAT --to-destination {}", end(family))),
    ]
}

/// An endpoint.
fn end(family: Family) -> &'static str {
    match family {
        Family::V4 => "192.0.2.1:1",
        Family::V6 => "[2001:db8::1]:1",
    }
}
