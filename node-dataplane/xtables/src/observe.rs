//! What `iptables-save` prints, read without copying: chain -> its rules as one piece of text.
//!
//! Rules are compared as text first. Only what differs is put into one spelling, because
//! versions and flavours of the tool print some options differently.

use rustc_hash::FxHashMap;

use crate::table::Table;

/// The chains of all tables of [`Table::ALL`] that are there.
#[derive(Debug, Default)]
pub struct Snapshot<'a> {
    filter: FxHashMap<&'a str, &'a str>,
    nat: FxHashMap<&'a str, &'a str>,
    mangle: FxHashMap<&'a str, &'a str>,
}

impl<'a> Snapshot<'a> {
    /// Reads the output of `iptables-save`; other tables are passed over.
    pub fn parse(text: &'a str) -> Self {
        let mut snapshot = Self::default();
        let mut table = None;
        let mut offset = 0;
        // The run of rules that is being read: chain, where it began.
        let mut run: Option<(&'a str, usize)> = None;
        for line in text.split_inclusive('\n') {
            let (start, end) = (offset, offset + line.len());
            offset = end;
            let chain = line.strip_prefix("-A ").and_then(|rest| rest.split([' ', '\n']).next());
            if let (Some(table), Some((name, begin))) = (table, run)
                && chain != Some(name)
            {
                snapshot.of_mut(table).insert(name, &text[begin..start]);
                run = None;
            }
            if let Some(chain) = chain {
                run = run.or(table.map(|_| (chain, start)));
            } else if let Some(name) = line.strip_prefix('*') {
                table = Table::ALL.into_iter().find(|table| table.name() == name.trim_end());
            } else if let (Some(declared), Some(table)) = (line.strip_prefix(':'), table) {
                let name = declared.split(' ').next().unwrap_or(declared);
                snapshot.of_mut(table).entry(name).or_insert("");
            }
        }
        snapshot
    }

    /// Reads what [`list`](crate::Tool::list) prints of some chains; `None` where it is anything else than
    /// these chains, each once and in this order.
    pub fn of_list(text: &'a str, chains: &[(Table, &str)]) -> Option<Self> {
        let mut snapshot = Self::default();
        let mut asked =
            Table::ALL.into_iter().flat_map(|table| chains.iter().filter(move |it| it.0 == table));
        // The chain that is being read: table, name, where its rules began.
        let mut run: Option<(Table, &'a str, usize)> = None;
        let mut offset = 0;
        for line in text.split_inclusive('\n') {
            offset += line.len();
            let (verb, rest) = line.split_once(' ')?;
            let name = rest.split([' ', '\n']).next()?;
            match (verb, run) {
                ("-N" | "-P", _) => {
                    let (table, expected) = *asked.next()?;
                    let first = snapshot.of_mut(table).insert(name, "").is_none();
                    run = (first && name == expected).then_some((table, name, offset));
                    run?;
                }
                ("-A", Some((table, of, begin))) if name == of => {
                    snapshot.of_mut(table).insert(of, &text[begin..offset]);
                }
                _ => return None,
            }
        }
        asked.next().is_none().then_some(snapshot)
    }

    fn of_mut(&mut self, table: Table) -> &mut FxHashMap<&'a str, &'a str> {
        match table {
            Table::Filter => &mut self.filter,
            Table::Nat => &mut self.nat,
            Table::Mangle => &mut self.mangle,
        }
    }

    /// All chains of a table and their bodies, in no order. None where the table is not there.
    pub fn chains(&self, table: Table) -> &FxHashMap<&'a str, &'a str> {
        match table {
            Table::Filter => &self.filter,
            Table::Nat => &self.nat,
            Table::Mangle => &self.mangle,
        }
    }

    /// The rules of a chain with `-A NAME` before each; `None` = no such chain.
    pub fn body(&self, table: Table, chain: &str) -> Option<&'a str> {
        self.chains(table).get(chain).copied()
    }

    /// The rules of a chain without `-A NAME`, as printed.
    pub fn rules(&self, table: Table, chain: &str) -> Vec<&'a str> {
        self.body(table, chain).unwrap_or("").lines().map(without_chain).collect()
    }

    /// True where the chain has exactly these rules, with `-A NAME` before each, in any spelling.
    pub fn has(&self, table: Table, chain: &str, body: &str) -> bool {
        self.body(table, chain).is_some_and(|found| found == body || same(found, body))
    }
}

fn without_chain(line: &str) -> &str {
    line.splitn(3, ' ').nth(2).unwrap_or("")
}

fn same(found: &str, rendered: &str) -> bool {
    found.lines().count() == rendered.lines().count()
        && found.lines().zip(rendered.lines()).all(|(a, b)| a == b || canonical(a) == b)
}

/// A rule in the spelling of the newest tools, which is the one that rules are to be written in here.
pub fn canonical(rule: &str) -> String {
    let mut out = String::with_capacity(rule.len() + 16);
    let mut option = "";
    for word in words(rule) {
        if !out.is_empty() {
            out.push(' ');
        }
        let printed;
        let parts: [&str; 3] = match (option, word) {
            ("--comment", text) => ["\"", text.trim_matches('"'), "\""],
            ("--probability", share) => match share.parse() {
                Ok(share) => [
                    {
                        printed = print_probability(share);
                        &printed
                    },
                    "",
                    "",
                ],
                Err(_) => [share, "", ""],
            },
            ("-p", "6") => ["tcp", "", ""],
            ("-p", "17") => ["udp", "", ""],
            ("-p", "132") => ["sctp", "", ""],
            ("-s" | "-d", host) if !host.contains('/') => {
                [host, if host.contains(':') { "/128" } else { "/32" }, ""]
            }
            ("--or-mark", mark) => [mark, "/", mark],
            ("--xor-mark", mark) => [mark, "/0x0", ""],
            (_, "--or-mark" | "--xor-mark") => ["--set-xmark", "", ""],
            (_, word) => [word, "", ""],
        };
        parts.iter().for_each(|part| out.push_str(part));
        option = word;
    }
    out
}

/// Words of a rule; a quoted text is one word with its quotes.
fn words(rule: &str) -> impl Iterator<Item = &str> {
    let mut rest = rule.trim();
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = match rest.strip_prefix('"') {
            Some(quoted) => quoted.find('"').map_or(rest.len(), |at| at + 2),
            None => rest.find(' ').unwrap_or(rest.len()),
        };
        let (word, after) = rest.split_at(end);
        rest = after.trim_start();
        Some(word)
    })
}

/// The comment of a rule, without its quotes.
pub fn comment(rule: &str) -> Option<&str> {
    let mut words = words(rule);
    words.find(|word| *word == "--comment")?;
    words.next().map(|word| word.trim_matches('"'))
}

/// The chain or target that a rule leads to.
pub fn target(rule: &str) -> Option<&str> {
    let mut words = words(rule);
    words.find(|word| matches!(*word, "-j" | "-g"))?;
    words.next()
}

/// A share between 0 and 1 as `--probability` is printed: rounded to a multiple of 2^-31, as the kernel
/// does, then to the digits that the tools print.
pub fn print_probability(share: f64) -> String {
    let unit = f64::from(1u32 << 31);
    format!("{:.11}", (share * unit).round() / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "# Generated\n*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n-A X -j Y\nCOMMIT\n*nat\n:PREROUTING ACCEPT [12:34]\n\
        :A - [0:0]\n:B - [0:0]\n-A A -j B\n-A A -p tcp -j RETURN\n-A B -j RETURN\nCOMMIT\n# Completed\n";

    #[test]
    fn chains_are_pieces_of_the_text() {
        let snapshot = Snapshot::parse(SAVED);
        assert_eq!(snapshot.body(Table::Nat, "A"), Some("-A A -j B\n-A A -p tcp -j RETURN\n"));
        assert_eq!(snapshot.body(Table::Nat, "B"), Some("-A B -j RETURN\n"));
        assert_eq!(snapshot.body(Table::Nat, "PREROUTING"), Some(""));
        assert_eq!(snapshot.body(Table::Nat, "X"), None, "another table's chain");
        assert_eq!(snapshot.rules(Table::Mangle, "X"), ["-j Y"]);
        assert!(snapshot.chains(Table::Filter).is_empty());
        assert_eq!(snapshot.rules(Table::Nat, "A"), ["-j B", "-p tcp -j RETURN"]);
    }

    #[test]
    fn a_list_counts_only_where_it_is_what_was_asked_for() {
        let asked = [(Table::Nat, "A"), (Table::Filter, "FORWARD"), (Table::Nat, "B")];
        let listed = "-P FORWARD ACCEPT\n-A FORWARD -j C\n-N A\n-N B\n-A B -j A\n-A B -j RETURN\n";
        let snapshot = Snapshot::of_list(listed, &asked).unwrap();
        assert_eq!(snapshot.body(Table::Filter, "FORWARD"), Some("-A FORWARD -j C\n"));
        assert_eq!(snapshot.body(Table::Nat, "A"), Some(""));
        assert_eq!(snapshot.body(Table::Nat, "B"), Some("-A B -j A\n-A B -j RETURN\n"));
        for other in [
            "",
            "-P FORWARD ACCEPT\n-A FORWARD -j C\n-N A\n",
            "-P FORWARD ACCEPT\n-N B\n-N A\n",
            "-P FORWARD ACCEPT\n-N A\n-A B -j A\n-N B\n",
            "-P FORWARD ACCEPT\n# Warning\n-N A\n-N B\n",
            "-P FORWARD ACCEPT\n-N A\n-N B\n-N C\n",
            "Chain FORWARD (policy ACCEPT)\n",
        ] {
            assert!(Snapshot::of_list(other, &asked).is_none(), "{other}");
        }
    }

    #[test]
    fn other_spellings_are_the_same_rule() {
        for (printed, ours) in [
            (
                "-s 10.0.0.1 -p 6 -m comment --comment abc -j X",
                "-s 10.0.0.1/32 -p tcp -m comment --comment \"abc\" -j X",
            ),
            ("--probability 0.3333333333 -j X", "--probability 0.33333333349 -j X"),
            ("-j MARK --or-mark 0x4000", "-j MARK --set-xmark 0x4000/0x4000"),
            ("-j MARK --xor-mark 0x4000", "-j MARK --set-xmark 0x4000/0x0"),
            (
                "-d fd00::1 -m comment --comment \"a b\" -j X",
                "-d fd00::1/128 -m comment --comment \"a b\" -j X",
            ),
        ] {
            assert_eq!(canonical(printed), ours);
            assert_eq!(canonical(ours), ours);
        }
        assert_eq!(comment("-m comment --comment \"a b\" -j X"), Some("a b"));
        assert_eq!(target("-m comment --comment \"x -j Z\" -j X"), Some("X"));
    }
}
