//! Cheap signs that somebody else changed the tables.
//!
//! nft: the generation counter, which every transaction of anybody raises, and then the
//! kernel's messages about it: only what touches chains that concern the user counts, and in those of all
//! only rules that lead to ours. Where messages were lost everything counts. legacy: size and number of
//! entries of each table and the extent of its built-in chains, which a flush and nearly every edit changes. The kernel counts no changes there and
//! sends no messages. An edit within other chains that keeps size and number is found by the audit.

use lockstep_kernel::netlink::attr::Attributes;
use lockstep_kernel::nf_tables::{self, Kernel, Netfilter};
use lockstep_kernel::xtables;

use lockstep_model::Family;

use crate::table::Table;
use crate::tool::Flavour;

/// Looks at both families of one flavour.
pub struct Watch {
    flavour: Flavour,
    tables: &'static [Table],
    concerns: fn(Table, &str) -> bool,
    netfilter: Option<Kernel>,
    last: Option<Marks>,
    suspected: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Marks {
    Generation(u32),
    Tables(Vec<Option<xtables::Extent>>),
}

impl Watch {
    /// Only what happens in `tables` counts; where it can be told, only what happens to the chains there
    /// that `concerns` names, or to a table as a whole.
    pub fn new(flavour: Flavour, tables: &'static [Table], concerns: fn(Table, &str) -> bool) -> Self {
        Self { flavour, tables, concerns, netfilter: None, last: None, suspected: false }
    }

    /// Takes what is there now as ours.
    pub fn settle(&mut self) {
        let now = self.marks();
        self.heard();
        self.last = now;
    }

    /// The same after so many transactions of our own; true where somebody else changed what concerns
    /// us among them. Only the nft flavour can tell, and only while no message is lost.
    pub fn settle_beside(&mut self, commits: u32) -> bool {
        let now = self.marks();
        let heard = self.heard();
        self.last = now;
        heard.by_others && heard.transactions > commits
    }

    /// Makes the next look say yes.
    pub fn suspect(&mut self) {
        self.suspected = true;
    }

    /// True where something changed since the last look.
    pub fn look(&mut self) -> bool {
        let now = self.marks();
        let last = self.last.take();
        let changed = match (&last, &now) {
            (_, None) => true,
            (Some(Marks::Generation(last)), Some(Marks::Generation(now))) if last != now => {
                let heard = self.heard();
                !heard.complete || heard.concerning || heard.transactions != now.wrapping_sub(*last)
            }
            (last, now) => last != now,
        };
        let changed = std::mem::take(&mut self.suspected) || (changed && last.is_some());
        self.last = now;
        changed
    }

    fn marks(&mut self) -> Option<Marks> {
        match self.flavour {
            Flavour::Nft => {
                if self.netfilter.is_none() {
                    self.netfilter = Kernel::open().ok();
                }
                let netfilter = self.netfilter.as_mut()?;
                let generation = netfilter.listen(true).and_then(|()| nf_tables::generation(netfilter)).ok();
                if generation.is_none() {
                    self.netfilter = None;
                }
                generation.map(Marks::Generation)
            }
            Flavour::Legacy => {
                let tables = [false, true].into_iter().flat_map(|v6| {
                    let extent = move |table: &Table| xtables::extent(v6, table.name()).ok().flatten();
                    self.tables.iter().map(extent)
                });
                Some(Marks::Tables(tables.collect()))
            }
        }
    }

    /// True where the kernel says that a table has none of these chains. Only the nft flavour's can be
    /// asked for single chains.
    pub fn lacks<'n>(
        &mut self,
        family: Family,
        table: Table,
        mut chains: impl Iterator<Item = &'n str>,
    ) -> bool {
        let Some(netfilter) = &mut self.netfilter else { return false };
        let family = match family {
            Family::V4 => nf_tables::Family::Ipv4,
            Family::V6 => nf_tables::Family::Ipv6,
        };
        chains.all(|chain| {
            nf_tables::chain_exists(netfilter, family, table.name(), chain).is_ok_and(|there| !there)
        })
    }

    /// What the messages since the last call are about.
    fn heard(&mut self) -> Heard {
        let mut heard = Heard { complete: true, ..Heard::default() };
        let (tables, concerns) = (self.tables, self.concerns);
        let Some(netfilter) = &mut self.netfilter else { return heard };
        // A transaction's end comes behind what it changed.
        let mut concerning = false;
        let complete = netfilter.heard(&mut |message| {
            if message.kind & 0xff == NEW_GENERATION {
                heard.transactions += 1;
                heard.concerning |= concerning;
                heard.by_others |= concerning && !is_our_tool(message.payload);
                concerning = false;
            } else {
                concerning |= is_concerned(tables, concerns, message.kind & 0xff, message.payload);
            }
        });
        heard.complete = complete.unwrap_or(false);
        heard.concerning |= concerning;
        heard
    }
}

#[derive(Default)]
struct Heard {
    /// No message was lost.
    complete: bool,
    transactions: u32,
    /// Something concerns us.
    concerning: bool,
    /// Something that concerns us was done by a program that is not our tool.
    by_others: bool,
}

/// The names of our tools as the kernel cuts them.
const OUR_TOOLS: [&str; 2] = ["iptables-nft-re", "ip6tables-nft-r"];

/// True where the program that made a transaction has the name of our tool.
fn is_our_tool(payload: &[u8]) -> bool {
    let attributes = Attributes::of(payload.get(4..).unwrap_or_default());
    attributes.get(3).is_some_and(|name| OUR_TOOLS.contains(&name.text()))
}

/// `NFT_MSG_*` of the end of a transaction, and of chains and rules that come and go.
const NEW_GENERATION: u16 = 15;
const CHAINS: [u16; 2] = [3, 5];
const RULES: [u16; 2] = [6, 8];

/// How the names of all chains begin that are written through this crate.
const OURS: &str = "KUBE-";

/// True for a message about a chain that concerns the user, or about a table of its own as a whole. Of the
/// rules in a chain that is not ours only those that lead to one that is.
fn is_concerned(tables: &[Table], concerns: fn(Table, &str) -> bool, kind: u16, payload: &[u8]) -> bool {
    let attributes = Attributes::of(payload.get(4..).unwrap_or_default());
    let text = |kind| attributes.get(kind).map(|name| name.text());
    let named = |name| tables.iter().copied().find(|table| table.name() == name);
    let Some(table) = text(1).and_then(named) else { return false };
    let chain = match kind {
        kind if CHAINS.contains(&kind) => text(3),
        kind if RULES.contains(&kind) => text(2),
        _ => None,
    };
    let leads_to_ours = || payload.windows(OURS.len()).any(|part| part == OURS.as_bytes());
    // Pods that come and go have rules of others in chains that belong to all, and those are no matter of ours.
    let matters = |chain: &str| !RULES.contains(&kind) || chain.starts_with(OURS) || leads_to_ours();
    chain.is_none_or(|chain| concerns(table, chain) && matters(chain))
}
