//! Cheap signs that somebody else changed the tables.
//!
//! nft: the generation counter, which every transaction of anybody raises. legacy: size and
//! number of entries of each table, which a flush and nearly every edit changes; an edit
//! that keeps both is found by the audit.

use lockstep_kernel::nf_tables::{self, Kernel};
use lockstep_kernel::xtables;

use crate::tool::Flavour;

pub(crate) struct Watch {
    flavour: Flavour,
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
    pub(crate) fn new(flavour: Flavour) -> Self {
        Self { flavour, netfilter: None, last: None, suspected: false }
    }

    /// Takes what is there now as ours.
    pub(crate) fn settle(&mut self) {
        self.last = self.marks();
    }

    /// Makes the next look say yes.
    pub(crate) fn suspect(&mut self) {
        self.suspected = true;
    }

    /// True where something changed since the last look.
    pub(crate) fn look(&mut self) -> bool {
        let now = self.marks();
        let changed = now.is_none() || now != self.last;
        let changed = std::mem::take(&mut self.suspected) || (changed && self.last.is_some());
        self.last = now;
        changed
    }

    fn marks(&mut self) -> Option<Marks> {
        match self.flavour {
            Flavour::Nft => {
                if self.netfilter.is_none() {
                    self.netfilter = Kernel::open().ok();
                }
                let generation = nf_tables::generation(self.netfilter.as_mut()?).ok();
                if generation.is_none() {
                    self.netfilter = None;
                }
                generation.map(Marks::Generation)
            }
            Flavour::Legacy => {
                let tables = [false, true].into_iter().flat_map(|v6| {
                    ["filter", "nat"].into_iter().map(move |table| xtables::extent(v6, table).ok().flatten())
                });
                Some(Marks::Tables(tables.collect()))
            }
        }
    }
}
