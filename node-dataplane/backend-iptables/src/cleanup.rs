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
        let mut chains: Vec<(&str, &str)> =
            snapshot.chains(table).iter().map(|(chain, body)| (*chain, *body)).collect();
        chains.sort_unstable();
        for (chain, body) in chains {
            if names::is_fixed_chain(table, chain) || names::is_service_chain(table, chain) || chain == CANARY
            {
                objects += 1 + body.lines().count();
                ops.push(Op::Delete { table, chain });
            } else if fixed::jumps().iter().any(|jumps| jumps.table == table && jumps.chain == chain) {
                for rule in snapshot.rules(table, chain) {
                    if fixed::is_our_jump(table, rule) {
                        objects += 1;
                        ops.push(Op::Remove { table, chain, rule });
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
