//! Removing everything of ours, which is everything of a kube-proxy too, and nothing else.

use crate::fixed;
use crate::input::{Change, Input, Op, Owner};
use crate::names::{self, CANARY, Table};
use crate::observe::Snapshot;
use crate::tool::{Tool, ToolError};

/// Returns the number of rules and chains that are gone.
pub(crate) fn cleanup(tool: &Tool) -> Result<usize, ToolError> {
    let saved = tool.save()?;
    let snapshot = Snapshot::parse(&saved);
    let mut ops = Vec::new();
    let mut objects = 0;
    for table in Table::ALL {
        for (chain, body) in snapshot.chains(table) {
            if names::is_fixed_chain(table, chain)
                || names::is_service_chain(table, chain)
                || *chain == CANARY
            {
                objects += 1 + body.lines().count();
                ops.push(Op::Delete { table, chain: (*chain).to_owned() });
            } else if fixed::jumps().iter().any(|jumps| jumps.table == table && jumps.chain == *chain) {
                for rule in snapshot.rules(table, chain) {
                    if fixed::is_our_jump(table, rule) {
                        objects += 1;
                        ops.push(Op::Remove { table, chain: (*chain).to_owned(), rule: rule.to_owned() });
                    }
                }
            }
        }
    }
    if !ops.is_empty() {
        let standing = snapshot.services();
        tool.restore(&Input::new(tool.flavour, standing, &[Change { owner: Owner::Everybody, ops }]).text)?;
    }
    Ok(objects)
}
