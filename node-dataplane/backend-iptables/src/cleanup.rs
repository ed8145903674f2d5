//! Removing everything of ours, which is everything of a kube-proxy too, and nothing else.

use std::sync::Arc;

use lockstep_kernel::exec::Run;
use lockstep_model::Family;

use crate::fixed;
use crate::input::{Change, Input, Op, Owner};
use crate::names::{self, CANARY, Table};
use crate::observe::Snapshot;
use crate::tool::{Flavour, Tool, ToolError};

/// Removes what is ours in a flavour. Tries nothing out and makes no table: a host that does not
/// use this flavour is left without a trace. Returns the number of rules and chains that are gone.
pub fn remove(run: &Arc<dyn Run>, flavour: Flavour) -> Result<usize, ToolError> {
    let mut objects = 0;
    for family in Family::ALL {
        let tool = Tool::new(Arc::clone(run), flavour, family);
        match tool.save() {
            Ok(saved) => objects += remove_from(&tool, &saved)?,
            // Where its tools do not work, this agent has hardly written with them.
            Err(error) => tracing::info!(%flavour, ?family, %error, "this iptables cannot be read here"),
        }
    }
    Ok(objects)
}

/// Returns the number of rules and chains that are gone.
pub(crate) fn cleanup(tool: &Tool) -> Result<usize, ToolError> {
    remove_from(tool, &tool.save()?)
}

fn remove_from(tool: &Tool, saved: &str) -> Result<usize, ToolError> {
    let snapshot = Snapshot::parse(saved);
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
