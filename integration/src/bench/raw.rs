//! The raw limit: a program that writes a given kernel state with one batch on one socket, and
//! knows nothing of Services. What it writes is read from the kernel after Lockstep wrote it,
//! so both leave exactly the same tables, chains, rules, sets and elements.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lockstep_kernel::nf_tables::{
    self, Batch, Chain, ElementOp, Family, Kernel, Netfilter, Rule, Set, Step, put_key, put_mapping,
    put_range, put_verdict,
};

const TABLE: &str = "lockstep";

/// The contents of our tables.
#[derive(Debug, PartialEq, Eq)]
pub struct Copy(Vec<Table>);

#[derive(Debug, PartialEq, Eq)]
struct Table {
    family: Family,
    chains: Vec<Chain>,
    rules: Vec<Rule>,
    sets: Vec<(Set, Vec<Element>)>,
}

/// One element with the bytes that the kernel keeps.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Element {
    key: Vec<u8>,
    end: Option<Vec<u8>>,
    data: Data,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Data {
    None,
    Bytes(Vec<u8>),
    Verdict(i32, Option<String>),
}

impl Copy {
    /// Reads what is in force, elements sorted.
    pub fn read(kernel: &mut Kernel) -> Result<Self> {
        let mut tables = Vec::new();
        for family in [Family::Ipv4, Family::Ipv6] {
            if !nf_tables::table_exists(kernel, family, TABLE)? {
                continue;
            }
            let mut chains = nf_tables::chains(kernel, family, TABLE)?;
            chains.sort_by(|a, b| a.name.cmp(&b.name));
            let mut rules = nf_tables::rules(kernel, family, TABLE)?;
            rules.sort_by(|a, b| a.chain.cmp(&b.chain));
            let mut sets = Vec::new();
            for set in nf_tables::sets(kernel, family, TABLE)? {
                let mut elements = Vec::new();
                nf_tables::elements(kernel, family, TABLE, &set.name, &mut |step| match step {
                    Step::Begin => elements.clear(),
                    Step::Element(it) => elements.push(Element {
                        key: it.key.to_vec(),
                        end: it.key_end.map(<[u8]>::to_vec),
                        data: match (it.bytes(), it.verdict()) {
                            (Some(bytes), _) => Data::Bytes(bytes.to_vec()),
                            (None, Some((code, chain))) => Data::Verdict(code, chain.map(str::to_owned)),
                            (None, None) => Data::None,
                        },
                    }),
                })?;
                elements.sort();
                sets.push((set, elements));
            }
            sets.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
            tables.push(Table { family, chains, rules, sets });
        }
        Ok(Self(tables))
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.0.iter().flat_map(|table| &table.sets).map(|(_, elements)| elements.len()).sum()
    }

    /// Writes everything into a namespace that has none of it: one batch, one `sendmsg`.
    pub fn write(&self, kernel: &mut Kernel) -> Result<()> {
        let mut batch = Batch::new();
        batch.reserve(self.elements() * 64 + (64 << 10));
        let mut encoded = Vec::new();
        for table in &self.0 {
            let family = table.family;
            batch.add_table(family, TABLE);
            table.sets.iter().for_each(|(set, _)| batch.add_set(family, TABLE, set));
            table.chains.iter().for_each(|chain| batch.add_chain(family, TABLE, chain));
            for (set, elements) in &table.sets {
                encoded.clear();
                elements.iter().for_each(|element| element.put(&mut encoded));
                batch.elements(ElementOp::Add, family, TABLE, &set.name, &encoded);
            }
            // Rules last: an element that is added to a map in use is checked against its users.
            table.rules.iter().for_each(|rule| batch.add_rule(family, TABLE, rule));
        }
        kernel.commit(batch.finish()).context("raw load")
    }

    /// The endpoints that can be replaced: the largest map to bytes.
    pub fn endpoints(self) -> Result<Endpoints> {
        let mut maps: Vec<Endpoints> = Vec::new();
        for table in self.0 {
            for (set, elements) in table.sets {
                let mut pairs = Vec::new();
                for element in elements {
                    if let Data::Bytes(data) = element.data {
                        pairs.push((element.key, data));
                    }
                }
                maps.push(Endpoints {
                    family: table.family,
                    map: set.name,
                    pairs,
                    batch: Batch::new(),
                    at: 0,
                });
            }
        }
        maps.into_iter().max_by_key(|map| map.pairs.len()).context("no map of endpoints")
    }
}

impl Element {
    fn put(&self, out: &mut Vec<u8>) {
        match (&self.data, &self.end) {
            (Data::Bytes(data), _) => put_mapping(out, &self.key, data),
            (Data::Verdict(code, chain), _) => put_verdict(out, &self.key, *code, chain.as_deref()),
            (Data::None, Some(end)) => put_range(out, &self.key, end),
            (Data::None, None) => put_key(out, &self.key),
        }
    }
}

/// A map whose elements are replaced.
pub struct Endpoints {
    family: Family,
    map: String,
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
    batch: Batch,
    at: usize,
}

impl Endpoints {
    /// Replaces the data of elements in one transaction: `runs` times as many as `length` that are
    /// neighbours by key. Returns how long that took.
    pub fn swap(&mut self, kernel: &mut Kernel, runs: usize, length: usize) -> Result<Duration> {
        let start = Instant::now();
        let count = runs * length;
        let (mut old, mut new) = (Vec::with_capacity(count * 48), Vec::with_capacity(count * 64));
        for _ in 0..runs {
            self.at = (self.at + 7919 * length) % self.pairs.len();
            for offset in 0..length {
                let at = (self.at + offset) % self.pairs.len();
                let (key, data) = &mut self.pairs[at];
                data[3] ^= 0x80;
                put_key(&mut old, key);
                put_mapping(&mut new, key, data);
            }
        }
        self.batch.clear();
        self.batch.elements(ElementOp::Delete, self.family, TABLE, &self.map, &old);
        self.batch.elements(ElementOp::Add, self.family, TABLE, &self.map, &new);
        kernel.commit(self.batch.finish()).context("raw swap")?;
        Ok(start.elapsed())
    }
}
