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
//! nat is one section. It keeps the chains sorted and searches the place of each by steps of some
//! dozens, but a chain behind the last is there at once: by name, 110,000 chains take 6 to 8 s to
//! load, in the order of Services 11 to 12 s.

use std::borrow::Cow;
use std::cmp::Reverse;

use lockstep_model::ServiceKey;
use lockstep_xtables::{Flavour, Snapshot, Step as FixedStep, Table, line, section};
use rustc_hash::FxHashSet;

use crate::names::{self, Shared};

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

/// One step of a change. Texts are borrowed from the rules and from what the tool printed: they
/// are copied once, into the input.
#[derive(Debug)]
pub(crate) enum Op<'a> {
    /// The chain has exactly these rules, made where it is missing.
    Write { table: Table, chain: &'a str, body: Cow<'a, str> },
    /// The chain is gone.
    Delete { table: Table, chain: &'a str },
    /// Lines come into a shared chain.
    Insert { chain: Shared, back: bool, rules: Cow<'a, [String]> },
    /// A line leaves a chain.
    Remove { table: Table, chain: &'a str, rule: &'a str },
    /// Lines come before everything else in a chain.
    Prepend { table: Table, chain: &'a str, rules: Vec<String> },
    /// Lines come behind everything else, also behind all inserts.
    Append { table: Table, chain: &'a str, rules: Vec<String> },
}

/// What one owner needs.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    pub(crate) owner: Owner,
    pub(crate) ops: Vec<Op<'a>>,
}

/// An input and its lines' owners.
#[derive(Debug, Default)]
pub(crate) struct Input {
    pub(crate) text: String,
    /// Rules and chains written or deleted.
    pub(crate) objects: usize,
    /// Transactions that it is made of.
    pub(crate) commits: u32,
    lines: usize,
    /// First line -> the change it is of, ascending; `None` = nobody's in particular.
    owners: Vec<(usize, Option<usize>)>,
}

/// An op and the change it is of.
type Step<'a> = (usize, &'a Op<'a>);

impl Input {
    /// `standing`: about how many Services are in the tables already.
    pub(crate) fn new(flavour: Flavour, standing: usize, changes: &[Change<'_>]) -> Self {
        let mut input = Self::default();
        let steps =
            || changes.iter().enumerate().flat_map(|(at, change)| change.ops.iter().map(move |op| (at, op)));
        let inserted = inserted(changes);
        let (mut nat, filter): (Vec<Step<'_>>, Vec<Step<'_>>) =
            steps().partition(|(_, op)| op.table() == Table::Nat);
        // Only Services' own lines wait: what goes with a chain goes before it.
        let (last, first): (Vec<Step<'_>>, Vec<Step<'_>>) =
            filter.into_iter().partition(|(at, op)| match op {
                Op::Remove { chain, rule, .. } => {
                    !nat.is_empty()
                        && matches!(changes[*at].owner, Owner::Service(_))
                        && !inserted.contains(&(*chain, *rule))
                }
                _ => false,
            });
        input.text.reserve(steps().map(|(_, op)| op.length()).sum());
        input.table(Table::Filter, &first);
        match flavour {
            Flavour::Nft => input.sections(standing, nat),
            Flavour::Legacy => {
                nat.sort_by_key(|(_, op)| op.declares());
                input.table(Table::Nat, &nat);
            }
        }
        input.table(Table::Filter, &last);
        input
    }

    /// nat in as many commits as it takes to keep each small.
    fn sections(&mut self, standing: usize, steps: Vec<Step<'_>>) {
        let size = section(standing);
        if steps.iter().filter(|(_, op)| op.declares().is_some()).count() <= size {
            return self.table(Table::Nat, &steps);
        }
        let (mut writes, mut lines, mut deletes) = (Vec::new(), Vec::new(), Vec::new());
        for (at, op) in steps {
            match op {
                Op::Write { chain, .. } if !names::is_shared_chain(Table::Nat, chain) => &mut writes,
                Op::Delete { .. } => &mut deletes,
                _ => &mut lines,
            }
            .push((at, op));
        }
        // Not by name within a level: reading back, the tool sorts the chains by a quicksort that
        // takes the square of their number where they were made in order. Hashes are not.
        let level = |(_, op): &Step<'_>| op.declares().map_or(0, names::level);
        writes.sort_by_key(level);
        deletes.sort_by_key(|step| Reverse(level(step)));
        writes.chunks(size).for_each(|some| self.table(Table::Nat, some));
        self.table(Table::Nat, &lines);
        deletes.chunks(size).for_each(|some| self.table(Table::Nat, some));
    }

    /// The position of the change that a line is of, counted from 1.
    pub(crate) fn change_at(&self, line: usize) -> Option<usize> {
        let after = self.owners.partition_point(|(first, _)| *first <= line);
        self.owners.get(after.checked_sub(1)?).and_then(|(_, change)| *change)
    }

    fn table(&mut self, table: Table, steps: &[Step<'_>]) {
        if steps.is_empty() {
            return;
        }
        self.push(None, &["*", table.name()]);
        for (at, op) in steps {
            if let Some(chain) = op.declares() {
                self.push(Some(*at), &[":", chain, " - [0:0]"]);
                self.objects += 1;
            }
        }
        for (at, op) in steps {
            match op {
                Op::Write { body, .. } if !body.is_empty() => self.paste(*at, body),
                Op::Remove { chain, rule, .. } => self.rule(*at, "-D", chain, rule),
                _ => {}
            }
        }
        let emptied = |chain: &str| {
            steps.iter().any(|(_, op)| matches!(op, Op::Write { chain: written, .. } if *written == chain))
        };
        let emptied: Vec<Shared> =
            Shared::ALL.into_iter().filter(|it| it.table() == table && emptied(it.chain())).collect();
        for last in [false, true] {
            for (at, op) in steps {
                if let Op::Insert { chain, back, rules } = op
                    && *back == last
                {
                    self.insert(*at, *back || emptied.contains(chain), chain.chain(), rules);
                }
            }
        }
        for (at, op) in steps {
            match op {
                Op::Prepend { chain, rules, .. } => self.insert(*at, false, chain, rules),
                Op::Append { chain, rules, .. } => self.insert(*at, true, chain, rules),
                _ => {}
            }
        }
        for (at, op) in steps {
            if let Op::Delete { chain, .. } = op {
                self.push(Some(*at), &["-X ", chain]);
            }
        }
        self.push(None, &["COMMIT"]);
        self.commits += 1;
    }

    fn insert(&mut self, change: usize, append: bool, chain: &str, rules: &[String]) {
        if append {
            rules.iter().for_each(|rule| self.rule(change, "-A", chain, rule));
        } else {
            rules.iter().rev().for_each(|rule| self.rule(change, "-I", chain, rule));
        }
    }

    fn rule(&mut self, change: usize, verb: &str, chain: &str, rule: &str) {
        self.objects += 1;
        self.push(Some(change), &[verb, " ", chain, " ", rule]);
    }

    fn paste(&mut self, change: usize, body: &str) {
        self.begin(Some(change));
        let lines = body.bytes().filter(|byte| *byte == b'\n').count();
        self.objects += lines;
        self.lines += lines;
        self.text.push_str(body);
    }

    fn push(&mut self, change: Option<usize>, parts: &[&str]) {
        self.begin(change);
        self.lines += 1;
        line(&mut self.text, parts);
    }

    fn begin(&mut self, change: Option<usize>) {
        if self.owners.last().is_none_or(|(_, last)| *last != change) {
            self.owners.push((self.lines + 1, change));
        }
    }
}

fn inserted<'a>(changes: &'a [Change<'_>]) -> FxHashSet<(&'a str, &'a str)> {
    let mut all = FxHashSet::default();
    for op in changes.iter().flat_map(|change| &change.ops) {
        if let Op::Insert { chain, rules, .. } = op
            && chain.table() == Table::Filter
        {
            all.extend(rules.iter().map(|rule| (chain.chain(), rule.as_str())));
        } else if let Op::Prepend { table: Table::Filter, chain, rules } = op {
            all.extend(rules.iter().map(|rule| (*chain, rule.as_str())));
        }
    }
    all
}

/// About how many Services are in force: lines that lead to them.
pub(crate) fn standing(snapshot: &Snapshot<'_>) -> usize {
    snapshot.body(Table::Nat, Shared::Services.chain()).map_or(0, |body| body.lines().count())
}

impl<'a> From<FixedStep<'a>> for Op<'a> {
    fn from(step: FixedStep<'a>) -> Self {
        match step {
            FixedStep::Write { table, chain, body } => Op::Write { table, chain, body: Cow::Owned(body) },
            FixedStep::Delete { table, chain } => Op::Delete { table, chain },
            FixedStep::Remove { table, chain, rule } => Op::Remove { table, chain, rule },
            FixedStep::Prepend { table, chain, rules } => Op::Prepend { table, chain, rules },
        }
    }
}

impl Op<'_> {
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

    /// About how many bytes it takes in an input: so that the text is allocated once, and a large
    /// one is not copied while it grows.
    fn length(&self) -> usize {
        const AROUND: usize = 48; // a verb, the name of a chain, the end of the line
        match self {
            Op::Write { body, .. } => body.len() + AROUND,
            Op::Delete { .. } => 2 * AROUND,
            Op::Remove { rule, .. } => rule.len() + AROUND,
            Op::Insert { rules, .. } => rules.iter().map(|rule| rule.len() + AROUND).sum(),
            Op::Prepend { rules, .. } | Op::Append { rules, .. } => {
                rules.iter().map(|rule| rule.len() + AROUND).sum()
            }
        }
    }
}
