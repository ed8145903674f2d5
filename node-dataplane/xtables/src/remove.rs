//! Removing chains by name, with what leads to them, and nothing else.

use std::sync::Arc;

use lockstep_kernel::exec::{ExecError, Run};
use lockstep_model::Family;
use rustc_hash::FxHashSet;

use crate::input::{Input, Step, section};
use crate::observe::{Snapshot, target};
use crate::table::Table;
use crate::tool::{Flavour, Tool, ToolError};

/// Chains that the kernel makes, of which each table has some.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// Removes the chains that `is_ours` names and the rules of built-in chains that lead to them, in both
/// families. Tries nothing out and makes no table: a host that does not use this flavour is left
/// without a trace. Returns the number of rules and chains that are gone.
///
/// Other chains stay as they are. Where one of them leads to a chain that is to go, the tool refuses:
/// whoever keeps some of its chains writes them anew first.
pub fn remove(
    run: &Arc<dyn Run>,
    flavour: Flavour,
    is_ours: &dyn Fn(Table, &str) -> bool,
) -> Result<usize, ToolError> {
    let mut objects = 0;
    for family in Family::ALL {
        let tool = Tool::new(Arc::clone(run), flavour, family);
        match tool.save() {
            Ok(saved) => objects += remove_saved(&tool, &saved, is_ours)?,
            Err(error) if is_absent(&error) => {
                tracing::info!(%flavour, ?family, %error, "this iptables is not there");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(objects)
}

/// The same in one family, which must be there.
pub fn remove_from(tool: &Tool, is_ours: &dyn Fn(Table, &str) -> bool) -> Result<usize, ToolError> {
    remove_saved(tool, &tool.save()?, is_ours)
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

fn remove_saved(tool: &Tool, saved: &str, is_ours: &dyn Fn(Table, &str) -> bool) -> Result<usize, ToolError> {
    let (input, objects) = removal(&Snapshot::parse(saved), tool.flavour, is_ours);
    if objects > 0 {
        tool.restore(&input.text)?;
    }
    Ok(objects)
}

/// What removes them, and the number of rules and chains that are gone then.
fn removal(
    snapshot: &Snapshot<'_>,
    flavour: Flavour,
    is_ours: &dyn Fn(Table, &str) -> bool,
) -> (Input, usize) {
    let (mut input, mut objects) = (Input::default(), 0);
    for table in Table::ALL {
        let there = snapshot.chains(table).iter();
        let mut gone: Vec<(&str, usize)> = there
            .filter(|(chain, _)| is_ours(table, chain))
            .map(|(chain, body)| (*chain, body.lines().count()))
            .collect();
        gone.sort_unstable();
        let mut steps = Vec::new();
        for chain in BUILT_IN {
            let rules = snapshot.rules(table, chain).into_iter();
            let jumps = rules.filter(|rule| target(rule).is_some_and(|to| is_ours(table, to)));
            steps.extend(jumps.map(|rule| Step::Remove { table, chain, rule }));
        }
        objects += steps.len() + gone.iter().map(|(_, rules)| 1 + rules).sum::<usize>();
        // The longest chain has about one rule for each Service.
        let size = section(gone.iter().map(|(_, rules)| *rules).max().unwrap_or_default());
        let gone: Vec<&str> = gone.into_iter().map(|(chain, _)| chain).collect();
        let delete = |chain| Step::Delete { table, chain };
        if flavour == Flavour::Legacy || gone.len() <= size {
            steps.extend(gone.into_iter().map(delete));
            input.add(table, &steps);
            continue;
        }
        input.add(table, &steps);
        for some in downwards(snapshot, table, &gone).chunks(size) {
            input.add(table, &some.iter().copied().map(delete).collect::<Vec<_>>());
        }
    }
    (input, objects)
}

/// The same chains in another order: each before those that it leads to.
fn downwards<'a>(snapshot: &Snapshot<'a>, table: Table, chains: &[&'a str]) -> Vec<&'a str> {
    let all: FxHashSet<&str> = chains.iter().copied().collect();
    let mut seen: FxHashSet<&str> = FxHashSet::default();
    let mut upwards = Vec::with_capacity(chains.len());
    for start in chains {
        if !seen.insert(*start) {
            continue;
        }
        // From a chain down to one that leads to none that was not seen: that one is next.
        let mut path = vec![(*start, snapshot.rules(table, start).into_iter())];
        while let Some((chain, rules)) = path.last_mut() {
            let chain = *chain;
            let next = rules.filter_map(target).find(|to| all.contains(to) && seen.insert(*to));
            match next {
                Some(to) => path.push((to, snapshot.rules(table, to).into_iter())),
                None => {
                    upwards.push(chain);
                    path.pop();
                }
            }
        }
    }
    upwards.reverse();
    upwards
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lockstep_kernel::exec::Output;

    use super::*;
    use crate::fake::Fake;

    fn is_kubes(_: Table, chain: &str) -> bool {
        chain.starts_with("KUBE-")
    }

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
        remove(&run, Flavour::Nft, &is_kubes).map_err(|error| error.to_string())
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

    #[test]
    fn chains_that_are_kept_and_what_leads_to_them_stay() {
        let fake = Arc::new(Fake::default());
        let run = Arc::clone(&fake) as Arc<dyn Run>;
        let tool = Tool::new(Arc::clone(&run), Flavour::Nft, Family::V6);
        tool.restore(
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:KUBE-SEP-A - [0:0]\n:THEIRS - [0:0]\n\
             -A PREROUTING -j KUBE-SERVICES\n-A PREROUTING -j THEIRS\n-A OUTPUT -j KUBE-SVC-A\n\
             -A KUBE-SVC-A -j KUBE-SEP-A\n-A KUBE-SERVICES -j ACCEPT\nCOMMIT\n\
             *mangle\n:KUBE-CANARY - [0:0]\nCOMMIT\n",
        )
        .unwrap();
        let goes = |table: Table, chain: &str| {
            table == Table::Nat && is_kubes(table, chain) && chain != "KUBE-SERVICES"
        };
        assert_eq!(remove(&run, Flavour::Nft, &goes).unwrap(), 4, "two chains, a rule in one, a jump");
        let saved = tool.save().unwrap();
        let snapshot = Snapshot::parse(&saved);
        assert_eq!(snapshot.rules(Table::Nat, "PREROUTING"), ["-j KUBE-SERVICES", "-j THEIRS"]);
        assert_eq!(snapshot.rules(Table::Nat, "KUBE-SERVICES"), ["-j ACCEPT"]);
        assert!(snapshot.rules(Table::Nat, "OUTPUT").is_empty());
        assert_eq!(snapshot.body(Table::Mangle, "KUBE-CANARY"), Some(""));
        assert_eq!(snapshot.body(Table::Nat, "KUBE-SVC-A"), None);
        fake.restores();
        assert_eq!(remove(&run, Flavour::Nft, &goes).unwrap(), 0);
        assert_eq!(fake.restores(), 0);
        // What stays and leads to what goes is not ours to change.
        tool.restore("*nat\n-A THEIRS -j KUBE-SERVICES\nCOMMIT\n").unwrap();
        assert!(remove(&run, Flavour::Nft, &is_kubes).unwrap_err().concerns_rules());
    }

    #[test]
    fn many_chains_go_in_sections_from_the_top() {
        let mut text = "*nat\n".to_owned();
        // Names sort against the way they lead.
        for at in (0..600).rev() {
            text.push_str(&format!(
                ":KUBE-A{at} - [0:0]\n:KUBE-B{at} - [0:0]\n-A KUBE-B{at} -j KUBE-A{at}\n"
            ));
        }
        text.push_str("-A OUTPUT -j KUBE-B7\nCOMMIT\n");
        let fake = Arc::new(Fake::default());
        let run = Arc::clone(&fake) as Arc<dyn Run>;
        for (flavour, commits) in [(Flavour::Legacy, 1), (Flavour::Nft, 6)] {
            Tool::new(Arc::clone(&run), flavour, Family::V4).restore(&text).unwrap();
            let saved = Tool::new(Arc::clone(&run), flavour, Family::V4).save().unwrap();
            let (input, objects) = removal(&Snapshot::parse(&saved), flavour, &is_kubes);
            assert_eq!((input.commits, objects), (commits, 1801), "{flavour}");
            assert_eq!(remove(&run, flavour, &is_kubes).unwrap(), 1801, "{flavour}");
            assert!(!fake.rules().contains("KUBE-"), "{flavour}");
        }
    }
}
