//! Removing everything of ours, which is everything of a kube-proxy too, and nothing else.

use std::sync::Arc;

use lockstep_kernel::exec::{ExecError, Run};
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
            Err(error) if is_absent(&error) => {
                tracing::info!(%flavour, ?family, %error, "this iptables is not there");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(objects)
}

/// True where the host has no such iptables, in its tools or in its kernel: then it holds no rules
/// of ours either. Tools that are there and fail may well be hiding some.
fn is_absent(error: &ToolError) -> bool {
    match error {
        ToolError::Exec(error) => matches!(error, ExecError::NotFound { .. }),
        ToolError::Locked { .. } => false,
        // The kernel's errno for a subsystem that it lacks, in the C library's words.
        ToolError::Refused { complaint, .. } => {
            ["not supported", "Invalid argument", "do you need to insmod"]
                .iter()
                .any(|it| complaint.contains(it))
        }
    }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lockstep_kernel::exec::Output;

    use super::*;

    /// A tool that answers every call in this way.
    struct Answer(fn(&str) -> Result<Output, ExecError>);

    impl Run for Answer {
        fn run(&self, program: &str, _: &[&str], _: &[u8], _: Duration) -> Result<Output, ExecError> {
            self.0(program)
        }
    }

    fn complaint(text: &str) -> Result<Output, ExecError> {
        Ok(Output { status: Some(1), stdout: Vec::new(), stderr: text.into() })
    }

    fn removed(answer: fn(&str) -> Result<Output, ExecError>) -> Result<usize, String> {
        let run: Arc<dyn Run> = Arc::new(Answer(answer));
        remove(&run, Flavour::Nft).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_not_there_has_nothing_of_ours_and_what_fails_may_have() {
        assert_eq!(removed(|program| Err(ExecError::NotFound { program: program.to_owned() })), Ok(0));
        assert_eq!(
            removed(|_| complaint("Could not fetch rule set generation id: Protocol not supported")),
            Ok(0)
        );
        let late = |program: &str| {
            Err(ExecError::TimedOut { program: program.to_owned(), limit: Duration::from_secs(1) })
        };
        assert!(removed(late).unwrap_err().contains("did not end within"));
        assert!(removed(|_| complaint("Permission denied")).unwrap_err().contains("Permission denied"));
    }
}
