//! A transaction while it is put together.
//!
//! Elements are encoded at once, one buffer per set and direction, so that thousands of
//! them go out in a few messages, all deletions before all additions. Where refusals must
//! be attributed, the buffers are cut at Service boundaries instead.

use std::net::IpAddr;
use std::ops::Range;

use lockstep_kernel::nf_tables::{self, Batch, ElementOp, Verdict};
use lockstep_model::Family;
use lockstep_view::{NodePlan, PortPlan};
use rustc_hash::FxHashMap;

use crate::layout;
use crate::names::{SharedChain, TABLE};
use crate::observe::Remembered;
use crate::rules::kernel_family;
use crate::sets::{Datum, GOTO, Key, Ranges, SERIALS, SetId, target_bytes};

/// Elements of one set that are written.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    delete: Encoded,
    add: Encoded,
    pub(crate) deleted: usize,
    pub(crate) added: usize,
    sealed: [usize; 2],
}

/// Encoded elements. What is full is given back piece by piece while it is copied into the batch,
/// so that a large transaction is not in memory twice.
#[derive(Debug, Default)]
struct Encoded {
    full: Vec<Vec<u8>>,
    open: Vec<u8>,
}

impl Encoded {
    fn cut(&mut self) {
        if self.open.len() > FULL {
            self.full.push(std::mem::replace(&mut self.open, Vec::with_capacity(PIECE)));
        }
    }

    fn clear(&mut self) {
        self.full.clear();
        self.open.clear();
        self.open.shrink_to(KEEP_CAPACITY);
    }

    fn len(&self) -> usize {
        self.full.iter().map(Vec::len).sum::<usize>() + self.open.len()
    }
}

/// A stretch of a lane that belongs to one Service.
#[derive(Debug)]
struct Mark {
    lane: usize,
    op: ElementOp,
    bytes: Range<usize>,
    service: usize,
}

/// What was written, for reading it back.
#[derive(Debug, Default, Clone)]
pub(crate) struct Written {
    /// Elements, in the order of staging; `None` = deleted.
    pub(crate) elements: Vec<(Family, SetId, Key, Option<Datum>)>,
    /// More was written than is worth reading one by one.
    pub(crate) everything: bool,
    /// Chains were written.
    pub(crate) chains: bool,
}

/// Past this, reading back everything is cheaper.
const WRITTEN_LIMIT: usize = 4096;
/// A buffer that a large transaction left behind is not kept past this.
const KEEP_CAPACITY: usize = 64 << 10;
/// Large enough that the allocator maps it by itself: then it is really given back.
const PIECE: usize = 1 << 20;
/// Another element might not fit without growing the piece.
const FULL: usize = PIECE - 256;
const LANES: usize = SetId::ALL.len();

/// The transaction.
#[derive(Debug)]
pub(crate) struct Stage {
    lanes: Vec<Lane>,
    /// Bit per lane that has anything.
    touched: u64,
    marks: Vec<Mark>,
    attributed: bool,
    /// Changes of how many elements lead to a chain.
    pub(crate) references: FxHashMap<(Family, SharedChain), i64>,
    /// Changes of how many ports have a local endpoint.
    pub(crate) hairpin: FxHashMap<IpAddr, i64>,
    pub(crate) written: Written,
    name: String,
    /// The serial number that was given out last.
    last_serial: u32,
}

/// Which Service a refused message belongs to.
#[derive(Debug, Default)]
pub(crate) struct Attribution {
    /// Sequence numbers of messages, and the Service's position.
    owners: Vec<(Range<u32>, usize)>,
    /// False: messages hold elements of many Services.
    pub(crate) complete: bool,
}

impl Attribution {
    pub(crate) fn owner(&self, seq: u32) -> Option<usize> {
        self.owners.iter().find(|(seqs, _)| seqs.contains(&seq)).map(|(_, service)| *service)
    }
}

impl Stage {
    pub(crate) fn new() -> Self {
        Self {
            lanes: (0..2 * LANES).map(|_| Lane::default()).collect(),
            touched: 0,
            marks: Vec::new(),
            attributed: false,
            references: FxHashMap::default(),
            hairpin: FxHashMap::default(),
            written: Written::default(),
            name: String::new(),
            last_serial: 0,
        }
    }

    /// A serial number that no endpoint had yet, in this process or one before it. After 268
    /// million endpoints they begin anew; by then no client has an old one any more.
    pub(crate) fn next_serial(&mut self) -> u32 {
        self.last_serial = (self.last_serial + 1) & !SERIALS;
        SERIALS | self.last_serial
    }

    /// Somebody before us gave this one out.
    pub(crate) fn serial_is_taken(&mut self, serial: u32) {
        self.last_serial = self.last_serial.max(serial & !SERIALS);
    }

    /// Begins anew. `attributed`: refusals can be told apart by Service, which costs
    /// messages.
    pub(crate) fn begin(&mut self, attributed: bool) {
        for index in bits(std::mem::take(&mut self.touched)) {
            let lane = &mut self.lanes[index];
            lane.delete.clear();
            lane.add.clear();
            (lane.deleted, lane.added, lane.sealed) = (0, 0, [0, 0]);
        }
        self.marks.clear();
        self.attributed = attributed;
        self.references.clear();
        self.hairpin.clear();
        self.written.elements.clear();
        self.written.elements.shrink_to(WRITTEN_LIMIT);
        (self.written.everything, self.written.chains) = (false, false);
    }

    /// The lanes that have anything.
    pub(crate) fn touched(&self) -> impl Iterator<Item = usize> + use<> {
        bits(self.touched)
    }

    pub(crate) fn lane(&self, index: usize) -> &Lane {
        &self.lanes[index]
    }

    /// How many elements change.
    pub(crate) fn changes(&self) -> usize {
        self.touched().map(|index| self.lanes[index].deleted + self.lanes[index].added).sum()
    }

    /// Adds an element that must not be there, or is deleted in the same transaction.
    pub(crate) fn add(&mut self, family: Family, set: SetId, key: &Key, datum: Datum) {
        let index = lane_index(family, set);
        self.touched |= 1 << index;
        let lane = &mut self.lanes[index];
        lane.added += set.kernel_elements();
        let out = &mut lane.add.open;
        match datum {
            Datum::Present => nf_tables::put_key(out, key.bytes()),
            Datum::UpTo(last) => put_range(out, set, key, last),
            Datum::Target(target) => {
                let (bytes, length) = target_bytes(&target);
                nf_tables::put_mapping(out, key.bytes(), &bytes[..length]);
            }
            Datum::Serial(serial) => nf_tables::put_mapping(out, key.bytes(), &serial.to_ne_bytes()),
            Datum::Goto(chain) => {
                self.name.clear();
                chain.write_name(&mut self.name);
                nf_tables::put_verdict(out, key.bytes(), GOTO, Some(&self.name));
                *self.references.entry((family, chain)).or_default() += 1;
            }
            Datum::Drop | Datum::Foreign => {
                nf_tables::put_verdict(out, key.bytes(), Verdict::Drop.code(), None);
            }
        }
        if !self.attributed {
            lane.add.cut();
        }
        self.note(family, set, key, Some(datum));
    }

    /// Adds what a client has been given. Packets change it at any time, so it is not compared.
    pub(crate) fn remember(&mut self, family: Family, set: SetId, key: &Key, given: Remembered) {
        let index = lane_index(family, set);
        self.touched |= 1 << index;
        let data = given.serial.to_ne_bytes();
        nf_tables::put_passing(&mut self.lanes[index].add.open, key.bytes(), &data, given.lifetime);
    }

    /// Deletes an element that is there.
    pub(crate) fn delete(&mut self, family: Family, set: SetId, key: &Key, datum: Datum) {
        let index = lane_index(family, set);
        self.touched |= 1 << index;
        let lane = &mut self.lanes[index];
        lane.deleted += set.kernel_elements();
        match datum {
            Datum::UpTo(last) => put_range(&mut lane.delete.open, set, key, last),
            _ => nf_tables::put_key(&mut lane.delete.open, key.bytes()),
        }
        if !self.attributed {
            lane.delete.cut();
        }
        if let Datum::Goto(chain) = datum {
            *self.references.entry((family, chain)).or_default() -= 1;
        }
        self.note(family, set, key, None);
    }

    fn note(&mut self, family: Family, set: SetId, key: &Key, datum: Option<Datum>) {
        if self.written.elements.len() < WRITTEN_LIMIT {
            self.written.elements.push((family, set, *key, datum));
        } else {
            self.written.everything = true;
        }
    }

    /// Counts a port's local endpoints in or out.
    pub(crate) fn count_hairpin(&mut self, port: &PortPlan, by: i64) {
        for target in &port.hairpin {
            *self.hairpin.entry(target.address).or_default() += by;
        }
    }

    /// What was staged since the last seal belongs to this Service.
    pub(crate) fn seal(&mut self, service: usize) {
        if !self.attributed {
            return;
        }
        for index in bits(self.touched) {
            let lane = &mut self.lanes[index];
            let ends = [lane.delete.open.len(), lane.add.open.len()];
            for (side, op) in [(0, ElementOp::Delete), (1, ElementOp::Add)] {
                if ends[side] > lane.sealed[side] {
                    self.marks.push(Mark { lane: index, op, bytes: lane.sealed[side]..ends[side], service });
                }
            }
            lane.sealed = ends;
        }
    }

    /// Writes chains, deletions and additions into a batch.
    pub(crate) fn write(
        &mut self,
        batch: &mut Batch,
        node: &NodePlan,
        chains: &[(Family, SharedChain)],
    ) -> Attribution {
        self.written.chains |= !chains.is_empty();
        write_chains(batch, node, chains);
        let mut attribution = Attribution { owners: Vec::new(), complete: self.attributed };
        for op in [ElementOp::Delete, ElementOp::Add] {
            for mark in self.marks.iter().filter(|mark| mark.op == op) {
                let first = batch.last_seq() + 1;
                let lane = &self.lanes[mark.lane];
                let encoded = if op == ElementOp::Delete { &lane.delete } else { &lane.add };
                put_elements(batch, op, mark.lane, &encoded.open[mark.bytes.clone()]);
                attribution.owners.push((first..batch.last_seq() + 1, mark.service));
            }
            for index in self.touched() {
                let lane = &mut self.lanes[index];
                let (encoded, sealed) = match op {
                    ElementOp::Delete => (&mut lane.delete, lane.sealed[0]),
                    ElementOp::Add => (&mut lane.add, lane.sealed[1]),
                };
                for piece in encoded.full.drain(..) {
                    put_elements(batch, op, index, &piece);
                }
                put_elements(batch, op, index, &encoded.open[sealed..]);
            }
        }
        attribution
    }

    /// Gives the memory of a large transaction back; what was written stays known.
    pub(crate) fn release(&mut self) {
        for lane in &mut self.lanes {
            (lane.delete, lane.add) = (Encoded::default(), Encoded::default());
        }
    }

    /// Bytes that the elements take in a batch, about.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |index: usize| self.lanes[index].delete.len() + self.lanes[index].add.len();
        self.touched().map(bytes).sum::<usize>() * 33 / 32 + 4096
    }
}

/// Writes chains that do not exist, all of them before the first rule.
pub(crate) fn write_chains(batch: &mut Batch, node: &NodePlan, chains: &[(Family, SharedChain)]) {
    let layouts: Vec<_> =
        chains.iter().map(|(family, chain)| (*family, layout::shared(*family, node, *chain))).collect();
    for (family, layout) in &layouts {
        batch.add_chain(kernel_family(*family), TABLE, &layout.chain);
    }
    for (family, layout) in &layouts {
        for rule in layout.kernel_rules(*family) {
            batch.add_rule(kernel_family(*family), TABLE, &rule);
        }
    }
}

/// Appends a range in the way that the set has them.
fn put_range(out: &mut Vec<u8>, set: SetId, first: &Key, last: IpAddr) {
    match set.ranges() {
        Ranges::ByEnds => {
            nf_tables::put_interval(out, first.bytes(), Key::after(last).as_ref().map(Key::bytes));
        }
        Ranges::Whole | Ranges::None => {
            nf_tables::put_range(out, first.bytes(), first.range_end(last).bytes());
        }
    }
}

fn put_elements(batch: &mut Batch, op: ElementOp, lane: usize, encoded: &[u8]) {
    let family = if lane < LANES { Family::V4 } else { Family::V6 };
    batch.elements(op, kernel_family(family), TABLE, SetId::ALL[lane % LANES].name(), encoded);
}

/// The positions of the bits that are set.
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let next = (set != 0).then(|| set.trailing_zeros() as usize)?;
        set &= set - 1;
        Some(next)
    })
}

/// Position of a set among those of both families.
pub(crate) fn lane_index(family: Family, set: SetId) -> usize {
    let base = match family {
        Family::V4 => 0,
        Family::V6 => LANES,
    };
    base + set as usize
}
