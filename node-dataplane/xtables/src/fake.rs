//! iptables in memory: restore and save over real tables, of which a refused commit changes
//! none; and the faults of the real one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lockstep_kernel::exec::{ExecError, Output, Run};

use crate::observe::target;
use crate::table::Table;

type Chains = BTreeMap<String, Vec<String>>;

const BUILT_IN: [&str; 5] = ["INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"];

/// Both families' tables, and what is to go wrong.
#[derive(Default)]
pub struct Fake {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// (program's family, table) -> chains.
    tables: BTreeMap<(bool, String), Chains>,
    restores: usize,
    locked: usize,
    locked_v6: bool,
    without_v6: bool,
    without_tables: Vec<&'static str>,
    /// A commit is refused, without naming a line, where a rule has this text.
    hated: Option<String>,
    /// How often a tool ran.
    runs: usize,
}

impl Fake {
    /// The next restore does not get the lock.
    pub fn lock_once(&self) {
        self.state().locked = 1;
    }

    /// No restore of IPv6 gets the lock.
    pub fn lock_v6(&self, locked: bool) {
        self.state().locked_v6 = locked;
    }

    /// There are no tools for IPv6.
    pub fn take_v6_away(&self) {
        self.state().without_v6 = true;
    }

    /// The kernel does not have this table, in neither family.
    pub fn take_table_away(&self, table: Table) {
        self.state().without_tables.push(table.name());
    }

    /// Refuses commits after which a rule has this text, without naming a line; `None` = no longer.
    pub fn refuse(&self, text: Option<&str>) {
        self.state().hated = text.map(str::to_owned);
    }

    /// How often a tool ran since the last call.
    pub fn runs(&self) -> usize {
        std::mem::take(&mut self.state().runs)
    }

    /// How many of these were restores that write.
    pub fn restores(&self) -> usize {
        std::mem::take(&mut self.state().restores)
    }

    /// All rules of both families, sorted where order means nothing.
    pub fn rules(&self) -> String {
        let mut text = String::new();
        for ((v6, table), chains) in &self.state().tables {
            for (chain, rules) in chains {
                let mut rules = rules.clone();
                rules.sort_unstable();
                let _ = writeln!(text, "{v6} {table} {chain} {rules:#?}");
            }
        }
        text
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run for Fake {
    fn run(&self, program: &str, arguments: &[&str], stdin: &[u8], _: Duration) -> Result<Output, ExecError> {
        let mut state = self.state();
        state.runs += 1;
        let v6 = program.starts_with("ip6");
        if v6 && state.without_v6 {
            return Err(ExecError::NotFound { program: program.to_owned() });
        }
        let done = |stdout: String| Output { status: Some(0), stdout: stdout.into(), stderr: Vec::new() };
        let failed =
            |status, text: String| Output { status: Some(status), stdout: Vec::new(), stderr: text.into() };
        if arguments == ["--version"] {
            return Ok(done("iptables-restore v1.8.9 (fake)".to_owned()));
        }
        if program.ends_with("-save") {
            return Ok(done(state.save(v6)));
        }
        if state.locked > 0 || (v6 && state.locked_v6) {
            state.locked = state.locked.saturating_sub(1);
            return Ok(failed(4, "Another app is currently holding the xtables lock".to_owned()));
        }
        let input = &*String::from_utf8_lossy(stdin);
        let only_asks = |line: &str| ["*", "-S ", "COMMIT"].iter().any(|start| line.starts_with(start));
        state.restores += usize::from(!input.lines().all(only_asks));
        Ok(state.restore(v6, input).map_or_else(|fault| failed(1, fault), done))
    }
}

impl State {
    fn save(&self, v6: bool) -> String {
        let mut text = String::new();
        for ((_, table), chains) in self.tables.iter().filter(|((family, _), _)| *family == v6) {
            let _ = writeln!(text, "*{table}");
            text.extend(chains.keys().map(|chain| format!(":{chain} - [0:0]\n")));
            for (chain, rules) in chains {
                text.extend(rules.iter().map(|rule| format!("-A {chain} {rule}\n")));
            }
            text.push_str("COMMIT\n");
        }
        text
    }

    /// Returns what is asked for with `-S`.
    fn restore(&mut self, v6: bool, input: &str) -> Result<String, String> {
        let mut listed = String::new();
        let mut open: Option<(String, Chains)> = None;
        for (index, line) in input.lines().enumerate() {
            let fault =
                |what: &str| format!("iptables-restore: {what}\nError occurred at line: {}", index + 1);
            if let Some(table) = line.strip_prefix('*') {
                if self.without_tables.contains(&table) {
                    return Err(fault("Table does not exist"));
                }
                let built_in = || BUILT_IN.map(|chain| (chain.to_owned(), Vec::new())).into_iter().collect();
                let chains = self.tables.get(&(v6, table.to_owned())).cloned().unwrap_or_else(built_in);
                open = Some((table.to_owned(), chains));
                continue;
            }
            if line == "COMMIT" {
                let (table, chains) = open.take().ok_or_else(|| fault("no table"))?;
                self.check(&chains)?;
                self.tables.insert((v6, table), chains);
                continue;
            }
            let Some((_, chains)) = &mut open else { return Err(fault("no table")) };
            match line.strip_prefix("-S ") {
                Some(chain) => listed += &list(chains, chain).ok_or_else(|| fault("no such chain"))?,
                None => edit(chains, line).map_err(fault)?,
            }
        }
        Ok(listed)
    }

    fn check(&self, chains: &Chains) -> Result<(), String> {
        for rule in chains.values().flatten() {
            if self.hated.as_ref().is_some_and(|hated| rule.contains(hated.as_str())) {
                return Err("iptables-restore: out of luck".to_owned());
            }
            let to = target(rule).unwrap_or("RETURN");
            if to.starts_with("KUBE-") && !chains.contains_key(to) {
                return Err(format!("no chain {to}"));
            }
        }
        Ok(())
    }
}

fn list(chains: &Chains, chain: &str) -> Option<String> {
    let head = match BUILT_IN.contains(&chain) {
        true => format!("-P {chain} ACCEPT\n"),
        false => format!("-N {chain}\n"),
    };
    let rules = chains.get(chain)?.iter().map(|rule| format!("-A {chain} {rule}\n"));
    Some(std::iter::once(head).chain(rules).collect())
}

fn edit(chains: &mut Chains, line: &str) -> Result<(), &'static str> {
    if let Some(chain) = line.strip_prefix(':') {
        chains.insert(chain.split(' ').next().unwrap_or(chain).to_owned(), Vec::new());
        return Ok(());
    }
    let mut words = line.splitn(3, ' ');
    let (verb, chain, rule) = (words.next(), words.next().unwrap_or(""), words.next().unwrap_or(""));
    if verb == Some("-X") {
        let used = chains.values().flatten().any(|rule| target(rule) == Some(chain));
        return match chains.remove(chain) {
            Some(rules) if rules.is_empty() && !used => Ok(()),
            _ => Err("chain missing, not empty or in use"),
        };
    }
    if verb == Some("-N") {
        return match chains.insert(chain.to_owned(), Vec::new()) {
            None => Ok(()),
            Some(_) => Err("chain already exists"),
        };
    }
    let rules = chains.get_mut(chain).ok_or("no such chain")?;
    match verb {
        Some("-A") => rules.push(rule.to_owned()),
        Some("-I") => rules.insert(0, rule.to_owned()),
        Some("-D") => {
            let at = rules.iter().position(|known| known == rule).ok_or("no such rule")?;
            rules.remove(at);
        }
        _ => return Err("unknown verb"),
    }
    Ok(())
}
