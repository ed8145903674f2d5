//! Steps -> one input for `iptables-restore --noflush`.
//!
//! Every table is committed as a whole, and each by itself.

use crate::table::Table;

/// One step of a change. What `iptables-save` printed is borrowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<'a> {
    /// The chain has exactly these rules, made where it is missing.
    Write {
        /// Its table.
        table: Table,
        /// Its name.
        chain: &'a str,
        /// Its rules with `-A NAME` before each, a line each.
        body: String,
    },
    /// The chain is gone. Refused where something that stays leads to it.
    Delete {
        /// Its table.
        table: Table,
        /// Its name.
        chain: &'a str,
    },
    /// A line leaves a chain.
    Remove {
        /// Its table.
        table: Table,
        /// The chain's name.
        chain: &'a str,
        /// Without `-A NAME`, as printed.
        rule: &'a str,
    },
    /// Lines come before everything else in a chain.
    Prepend {
        /// Its table.
        table: Table,
        /// The chain's name.
        chain: &'a str,
        /// Without `-A NAME`, in the order in which they stand afterwards.
        rules: Vec<String>,
    },
}

impl Step<'_> {
    /// The table that it changes.
    pub fn table(&self) -> Table {
        match self {
            Step::Write { table, .. }
            | Step::Delete { table, .. }
            | Step::Remove { table, .. }
            | Step::Prepend { table, .. } => *table,
        }
    }
}

/// An input and how much it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Input {
    /// For [`Tool::restore`](crate::Tool::restore).
    pub text: String,
    /// Rules and chains written or deleted.
    pub objects: usize,
    /// Transactions that it is made of.
    pub commits: u32,
}

/// Chains in a commit of the nft flavour, where nothing stands yet. Of 100, 250 and 1,000 the
/// one that took the least time for 60,000 chains: more make the list long, fewer make the
/// commits many.
const SECTION: usize = 250;
/// With every commit the kernel walks what stands in the table, about 30 us for each Service,
/// and the list costs 50 ns for each pair of a section's chains. Their sum is least with this
/// many chains times the square root of the number of Services.
const SECTION_AMONG: usize = 25;

/// How many chains one commit of the nft flavour should name at most, because the tool keeps them in
/// a sorted list and searches it from its beginning for every line. `standing`: about how many Services
/// are in the tables already.
pub fn section(standing: usize) -> usize {
    SECTION.max(SECTION_AMONG * standing.isqrt())
}

impl Input {
    /// All steps in one commit per table, in the order of [`Table::ALL`].
    pub fn new(steps: &[Step<'_>]) -> Self {
        let mut input = Self::default();
        Table::ALL.into_iter().for_each(|table| input.add(table, steps));
        input
    }

    /// One more commit: the steps that are of this table. Nothing where there are none.
    pub fn add(&mut self, table: Table, steps: &[Step<'_>]) {
        let of_table = || steps.iter().filter(|step| step.table() == table);
        if of_table().next().is_none() {
            return;
        }
        self.push(&["*", table.name()]);
        // What is declared is made or emptied. All of them first: their rules lead to each other.
        for step in of_table() {
            if let Step::Write { chain, .. } | Step::Delete { chain, .. } = step {
                self.push(&[":", chain, " - [0:0]"]);
                self.objects += 1;
            }
        }
        for step in of_table() {
            match step {
                Step::Write { body, .. } => {
                    self.text.push_str(body);
                    self.objects += body.lines().count();
                }
                Step::Remove { chain, rule, .. } => self.rule("-D", chain, rule),
                Step::Delete { .. } | Step::Prepend { .. } => {}
            }
        }
        for step in of_table() {
            if let Step::Prepend { chain, rules, .. } = step {
                rules.iter().rev().for_each(|rule| self.rule("-I", chain, rule));
            }
        }
        for step in of_table() {
            if let Step::Delete { chain, .. } = step {
                self.push(&["-X ", chain]);
            }
        }
        self.push(&["COMMIT"]);
        self.commits += 1;
    }

    fn rule(&mut self, verb: &str, chain: &str, rule: &str) {
        self.objects += 1;
        self.push(&[verb, " ", chain, " ", rule]);
    }

    fn push(&mut self, parts: &[&str]) {
        line(&mut self.text, parts);
    }
}

/// Appends one line, which is these parts.
pub fn line(text: &mut String, parts: &[&str]) {
    parts.iter().for_each(|part| text.push_str(part));
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_one_commit_in_which_chains_are_declared_first() {
        let steps = [
            Step::Delete { table: Table::Nat, chain: "OLD" },
            Step::Prepend {
                table: Table::Mangle,
                chain: "OUTPUT",
                rules: vec!["-j A".to_owned(), "-j B".to_owned()],
            },
            Step::Write { table: Table::Nat, chain: "NEW", body: "-A NEW -j RETURN\n".to_owned() },
            Step::Remove { table: Table::Nat, chain: "OUTPUT", rule: "-j OLD" },
        ];
        let input = Input::new(&steps);
        assert_eq!(
            input.text,
            "*nat\n:OLD - [0:0]\n:NEW - [0:0]\n-A NEW -j RETURN\n-D OUTPUT -j OLD\n-X OLD\nCOMMIT\n\
             *mangle\n-I OUTPUT -j B\n-I OUTPUT -j A\nCOMMIT\n"
        );
        assert_eq!((input.objects, input.commits), (6, 2));
        assert_eq!(Input::new(&[]), Input::default());
    }
}
