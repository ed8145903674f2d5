//! `iptables-restore` and `iptables-save` of one flavour and family.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use lockstep_kernel::exec::{ExecError, Output, Run};
use lockstep_model::Family;

use crate::input::line;
use crate::table::Table;

/// Which of the two kernel interfaces iptables speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flavour {
    /// xtables: `iptables-legacy-*`.
    Legacy,
    /// nf_tables: `iptables-nft-*`.
    Nft,
}

impl Flavour {
    /// Both, in the order of preference where nothing speaks for either.
    pub const ALL: [Flavour; 2] = [Flavour::Nft, Flavour::Legacy];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Legacy => "legacy",
            Flavour::Nft => "nft",
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a call of the tool did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// Somebody else held the lock for longer than we wait.
    #[error("{program}: the lock is held by another program: {complaint}")]
    Locked {
        /// The tool.
        program: String,
        /// Its words.
        complaint: String,
    },
    /// It refused.
    #[error("{program}: {complaint}")]
    Refused {
        /// The tool.
        program: String,
        /// Its words.
        complaint: String,
        /// The line of the input it names, counted from 1.
        line: Option<usize>,
    },
}

impl ToolError {
    /// True where the rules themselves were refused, so that leaving some out may help.
    pub fn concerns_rules(&self) -> bool {
        matches!(self, ToolError::Refused { .. })
    }
}

/// Long enough for a hundred thousand rules on a slow machine.
const LIMIT: Duration = Duration::from_secs(300);
const LOCK_WAIT_SECONDS: &str = "5";
/// Exit status where the lock was not got.
const LOCKED: i32 = 4;

/// The tools of one flavour and family: `iptables-nft-restore`, `iptables-nft-save`.
#[derive(Clone)]
pub struct Tool {
    run: Arc<dyn Run>,
    /// Which kernel interface it speaks to.
    pub flavour: Flavour,
    /// `iptables` or `ip6tables`.
    pub family: Family,
}

impl Tool {
    /// Runs nothing yet.
    pub fn new(run: Arc<dyn Run>, flavour: Flavour, family: Family) -> Self {
        Self { run, flavour, family }
    }

    fn program(&self, what: &str) -> String {
        let family = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        format!("{family}-{}-{what}", self.flavour)
    }

    /// One restore that leaves alone what it does not name. Each `COMMIT` of it is done as a whole or not
    /// at all; those before one that is refused stay done.
    pub fn restore(&self, input: &str) -> Result<(), ToolError> {
        self.call("restore", &["--noflush", "-w", LOCK_WAIT_SECONDS], input.as_bytes()).map(|_| ())
    }

    /// All tables that are there, as text. Never makes a table.
    pub fn save(&self) -> Result<String, ToolError> {
        let output = self.call("save", &[], b"")?;
        Ok(text(output.stdout))
    }

    /// What `-S` prints of some chains, table by table in the order of
    /// [`Table::ALL`]. Writes nothing; the nft flavour reads no other chain. Refused where one is missing.
    pub fn list(&self, chains: &[(Table, &str)]) -> Result<String, ToolError> {
        let mut input = String::new();
        for table in Table::ALL {
            let mut of_table = chains.iter().filter(|(of, _)| *of == table).peekable();
            // What is named is made, and a kernel need not have every table.
            if of_table.peek().is_none() {
                continue;
            }
            line(&mut input, &["*", table.name()]);
            of_table.for_each(|(_, chain)| line(&mut input, &["-S ", chain]));
            line(&mut input, &["COMMIT"]);
        }
        let output = self.call("restore", &["--noflush", "-w", LOCK_WAIT_SECONDS], input.as_bytes())?;
        Ok(text(output.stdout))
    }

    /// `iptables-restore v1.8.9 (legacy)` -> `1.8.9`.
    pub fn version(&self) -> Result<String, ToolError> {
        let output = self.call("restore", &["--version"], b"")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().find_map(|word| word.strip_prefix('v'));
        Ok(version.unwrap_or("of unknown version").to_owned())
    }

    fn call(&self, what: &str, arguments: &[&str], stdin: &[u8]) -> Result<Output, ToolError> {
        let program = self.program(what);
        let output = self.run.run(&program, arguments, stdin, LIMIT)?;
        if output.success() {
            return Ok(output);
        }
        let complaint = output.complaint();
        if output.status == Some(LOCKED) && complaint.contains("lock") {
            return Err(ToolError::Locked { program, complaint });
        }
        let line = refused_line(&complaint);
        Err(ToolError::Refused { program, complaint, line })
    }
}

/// Somebody else's comment may be anything; all else is ASCII and need not be copied.
fn text(printed: Vec<u8>) -> String {
    String::from_utf8(printed).unwrap_or_else(|other| String::from_utf8_lossy(other.as_bytes()).into_owned())
}

/// The number in `line 12 failed`, `Error occurred at line: 12` and the like, as a word of its own:
/// the hash in the name of a chain may spell it too.
fn refused_line(complaint: &str) -> Option<usize> {
    let mut words = complaint.split([' ', ':', '\n']).filter(|word| !word.is_empty()).peekable();
    let mut found = None;
    while let Some(word) = words.next() {
        if word == "line" {
            found = words.peek().and_then(|number| number.parse().ok()).or(found);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_line_it_names() {
        for (complaint, line) in [
            ("iptables-restore: line 12 failed", Some(12)),
            (
                "iptables-restore v1.8.9: bad IP\nError occurred at line: 7\nTry `iptables-restore -h'",
                Some(7),
            ),
            (
                "iptables-nft-restore: \nline 3: CHAIN_USER_DEL failed (Device or resource busy): chain X",
                Some(3),
            ),
            (
                "iptables-nft-restore: \nline 3: CHAIN_USER_DEL failed (Device or resource busy): chain KUBE-SVC-AALINE27AALINE45",
                Some(3),
            ),
            ("out of luck", None),
        ] {
            assert_eq!(refused_line(complaint), line, "{complaint}");
        }
    }
}
