//! Changes -> one input for `iptables-restore --noflush`, and back from a line of it to whom
//! it belongs.
//!
//! ```text
//! *filter  refusals that are added          first: a refusal never leaves a gap
//! *nat     everything
//! *filter  refusals that are taken away     last: until then what is forwarded passes them by
//! ```
//! Every table is committed as a whole, but each by itself.

use std::fmt::Write;

use lockstep_model::ServiceKey;
use rustc_hash::FxHashSet;

use crate::names::{Shared, Table};

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

impl Input {
    pub(crate) fn new(changes: &[Change]) -> Self {
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
            if !ops.is_empty() {
                input.table(table, &ops);
            }
        }
        input
    }

    /// Whose line this is, counted from 1.
    pub(crate) fn owner(&self, line: usize) -> Option<&Owner> {
        let after = self.owners.partition_point(|(first, _)| *first <= line);
        self.owners.get(after.checked_sub(1)?).map(|(_, owner)| owner)
    }

    fn table(&mut self, table: Table, ops: &[(&Owner, &Op)]) {
        self.push(&Owner::Everybody, format_args!("*{}", table.name()));
        for (owner, op) in ops {
            if let Op::Write { chain, .. } | Op::Delete { chain, .. } = op {
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
