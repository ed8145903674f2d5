//! Changes -> one input for `iptables-restore --noflush`, and back from a line of it to whom
//! it belongs.
//!
//! ```text
//! *filter  refusals that are added          first: a refusal never leaves a gap
//! *nat     everything                       in sections where it is much, see below
//! *filter  refusals that are taken away     last: until then what is forwarded passes them by
//! ```
//! Every section is committed as a whole, but each by itself.
//!
//! The nft flavour of the tool keeps the chains that one commit names in a sorted list and
//! searches it from its beginning for every line: 22,000 chains in one commit take minutes.
//! So nat is cut into sections of few chains. First come the chains of Services, those that
//! are led to before those that lead to them; then all lines of shared chains; then what is
//! deleted, the other way round. Whatever a section does not reach stays as it was, and what it
//! leads to is there. The legacy flavour writes the whole table with every commit, so there
//! nat is one section.

use std::cmp::Reverse;
use std::fmt::Write;

use lockstep_model::ServiceKey;
use rustc_hash::FxHashSet;

use crate::names::{self, Shared, Table};
use crate::tool::Flavour;

/// Who a change is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Owner {
    /// All Services: fixed chains and jumps.
    Everybody,
    /// Nobody any more: what a kube-proxy or an earlier process left.
    Nobody,
    /// One Service.
    Service(ServiceKey),
}

/// One step of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// The chain has exactly these rules, made where it is missing.
    Write { table: Table, chain: String, body: String },
    /// The chain is gone.
    Delete { table: Table, chain: String },
    /// Lines come into a shared chain.
    Insert { chain: Shared, back: bool, rules: Vec<String> },
    /// A line leaves a chain.
    Remove { table: Table, chain: String, rule: String },
    /// Lines come before everything else in a chain.
    Prepend { table: Table, chain: String, rules: Vec<String> },
    /// Lines come behind everything else, also behind all inserts.
    Append { table: Table, chain: String, rules: Vec<String> },
}

/// What one owner needs.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) owner: Owner,
    pub(crate) ops: Vec<Op>,
}

/// An input and its lines' owners.
#[derive(Debug, Default)]
pub(crate) struct Input {
    pub(crate) text: String,
    /// Rules and chains written or deleted.
    pub(crate) objects: usize,
    lines: usize,
    /// First line -> owner, ascending.
    owners: Vec<(usize, Owner)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    FilterFirst,
    Nat,
    FilterLast,
}

/// Chains in a section of the nft flavour, where nothing stands yet. Of 100, 250 and 1,000 the
/// one that took the least time for 60,000 chains: more make the list long, fewer make the
/// commits many.
const SECTION: usize = 250;
/// With every commit the kernel walks what stands in the table, about 30 us for each Service,
/// and the list costs 50 ns for each pair of a section's chains. Their sum is least with this
/// many chains times the square root of the number of Services.
const SECTION_AMONG: usize = 25;

impl Input {
    /// `standing`: about how many Services are in the tables already.
    pub(crate) fn new(flavour: Flavour, standing: usize, changes: &[Change]) -> Self {
        let mut input = Self::default();
        let inserted = inserted(changes);
        let has_nat = changes.iter().flat_map(|change| &change.ops).any(|op| op.table() == Table::Nat);
        // Only Services' own lines wait: what goes with a chain goes before it.
        let part = |owner: &Owner, op: &Op| match op {
            _ if op.table() == Table::Nat => Part::Nat,
            Op::Remove { chain, rule, .. }
                if has_nat
                    && matches!(owner, Owner::Service(_))
                    && !inserted.contains(&(chain.as_str(), rule.as_str())) =>
            {
                Part::FilterLast
            }
            _ => Part::FilterFirst,
        };
        for (wanted, table) in
            [(Part::FilterFirst, Table::Filter), (Part::Nat, Table::Nat), (Part::FilterLast, Table::Filter)]
        {
            let ops: Vec<(&Owner, &Op)> = changes
                .iter()
                .flat_map(|change| change.ops.iter().map(move |op| (&change.owner, op)))
                .filter(|(owner, op)| part(owner, op) == wanted)
                .collect();
            match (flavour, wanted) {
                (Flavour::Nft, Part::Nat) => input.sections(standing, ops),
                _ => input.table(table, &ops),
            }
        }
        input
    }

    /// nat in as many commits as it takes to keep each small.
    fn sections(&mut self, standing: usize, ops: Vec<(&Owner, &Op)>) {
        let size = SECTION.max(SECTION_AMONG * standing.isqrt());
        if ops.iter().filter(|(_, op)| op.declares().is_some()).count() <= size {
            return self.table(Table::Nat, &ops);
        }
        let (mut writes, mut lines, mut deletes) = (Vec::new(), Vec::new(), Vec::new());
        for (owner, op) in ops {
            match op {
                Op::Write { chain, .. } if !names::is_shared_chain(Table::Nat, chain) => &mut writes,
                Op::Delete { .. } => &mut deletes,
                _ => &mut lines,
            }
            .push((owner, op));
        }
        // Not by name within a level: reading back, the tool sorts the chains by a quicksort that
        // takes the square of their number where they were made in order. Hashes are not.
        let level = |(_, op): &(&Owner, &Op)| op.declares().map_or(0, names::level);
        writes.sort_by_key(level);
        deletes.sort_by_key(|op| Reverse(level(op)));
        writes.chunks(size).for_each(|some| self.table(Table::Nat, some));
        self.table(Table::Nat, &lines);
        deletes.chunks(size).for_each(|some| self.table(Table::Nat, some));
    }

    /// Whose line this is, counted from 1.
    pub(crate) fn owner(&self, line: usize) -> Option<&Owner> {
        let after = self.owners.partition_point(|(first, _)| *first <= line);
        self.owners.get(after.checked_sub(1)?).map(|(_, owner)| owner)
    }

    fn table(&mut self, table: Table, ops: &[(&Owner, &Op)]) {
        if ops.is_empty() {
            return;
        }
        self.push(&Owner::Everybody, format_args!("*{}", table.name()));
        for (owner, op) in ops {
            if let Some(chain) = op.declares() {
                self.push(owner, format_args!(":{chain} - [0:0]"));
                self.objects += 1;
            }
        }
        for (owner, op) in ops {
            match op {
                Op::Write { body, .. } if !body.is_empty() => self.paste(owner, body),
                Op::Remove { chain, rule, .. } => self.rule(owner, "-D", chain, rule),
                _ => {}
            }
        }
        let flushed: FxHashSet<&str> = ops
            .iter()
            .filter_map(|(_, op)| match op {
                Op::Write { chain, .. } => Some(chain.as_str()),
                _ => None,
            })
            .collect();
        for last in [false, true] {
            for (owner, op) in ops {
                if let Op::Insert { chain, back, rules } = op
                    && *back == last
                {
                    let append = *back || flushed.contains(chain.chain());
                    self.insert(owner, append, chain.chain(), rules);
                }
            }
        }
        for (owner, op) in ops {
            match op {
                Op::Prepend { chain, rules, .. } => self.insert(owner, false, chain, rules),
                Op::Append { chain, rules, .. } => self.insert(owner, true, chain, rules),
                _ => {}
            }
        }
        for (owner, op) in ops {
            if let Op::Delete { chain, .. } = op {
                self.push(owner, format_args!("-X {chain}"));
            }
        }
        self.push(&Owner::Everybody, format_args!("COMMIT"));
    }

    fn insert(&mut self, owner: &Owner, append: bool, chain: &str, rules: &[String]) {
        if append {
            rules.iter().for_each(|rule| self.rule(owner, "-A", chain, rule));
        } else {
            rules.iter().rev().for_each(|rule| self.rule(owner, "-I", chain, rule));
        }
    }

    fn rule(&mut self, owner: &Owner, verb: &str, chain: &str, rule: &str) {
        self.objects += 1;
        self.push(owner, format_args!("{verb} {chain} {rule}"));
    }

    fn paste(&mut self, owner: &Owner, body: &str) {
        self.begin(owner);
        let lines = body.lines().count();
        self.objects += lines;
        self.lines += lines;
        self.text.push_str(body);
    }

    fn push(&mut self, owner: &Owner, line: std::fmt::Arguments<'_>) {
        self.begin(owner);
        self.lines += 1;
        let _ = writeln!(self.text, "{line}");
    }

    fn begin(&mut self, owner: &Owner) {
        if self.owners.last().is_none_or(|(_, last)| last != owner) {
            self.owners.push((self.lines + 1, owner.clone()));
        }
    }
}

fn inserted(changes: &[Change]) -> FxHashSet<(&str, &str)> {
    let mut all = FxHashSet::default();
    for op in changes.iter().flat_map(|change| &change.ops) {
        if let Op::Insert { chain, rules, .. } = op
            && chain.table() == Table::Filter
        {
            all.extend(rules.iter().map(|rule| (chain.chain(), rule.as_str())));
        } else if let Op::Prepend { table: Table::Filter, chain, rules } = op {
            all.extend(rules.iter().map(|rule| (chain.as_str(), rule.as_str())));
        }
    }
    all
}

impl Op {
    /// The chain that is declared, which makes it or empties it.
    fn declares(&self) -> Option<&str> {
        match self {
            Op::Write { chain, .. } | Op::Delete { chain, .. } => Some(chain),
            _ => None,
        }
    }

    pub(crate) fn table(&self) -> Table {
        match self {
            Op::Write { table, .. }
            | Op::Delete { table, .. }
            | Op::Remove { table, .. }
            | Op::Prepend { table, .. }
            | Op::Append { table, .. } => *table,
            Op::Insert { chain, .. } => chain.table(),
        }
    }
}
