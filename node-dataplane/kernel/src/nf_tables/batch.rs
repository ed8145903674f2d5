use super::{Chain, Family, Rule, Set, declare};
use crate::netlink::{self, attr};

const SUBSYSTEM: u16 = 10; // NFNL_SUBSYS_NFTABLES
/// A message holds elements up to this many bytes: attribute lengths have 16 bits.
const ELEMENTS_PER_MESSAGE: usize = 60_000;
/// A buffer that a large batch left behind is not kept past this.
const KEEP_CAPACITY: usize = 256 << 10;

/// What to do with elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementOp {
    /// Add them; refused where one is there with other data.
    Add,
    /// Delete them; refused where one is not there.
    Delete,
}

/// The messages of one transaction, in one buffer.
///
/// Every message gets a sequence number, so that a refusal can be attributed. 0 is the
/// batch itself.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    last_seq: u32,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the batch and keeps its memory, within reason.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEEP_CAPACITY);
        self.last_seq = 0;
    }

    /// True where the transaction would change nothing.
    pub fn is_empty(&self) -> bool {
        self.last_seq == 0
    }

    /// Sequence number of the last message.
    pub fn last_seq(&self) -> u32 {
        self.last_seq
    }

    /// Makes room at once for a batch of about `bytes`.
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve(bytes);
    }

    /// Closes the batch and returns its bytes.
    pub fn finish(&mut self) -> &[u8] {
        if !self.is_empty() {
            self.control(libc::NFNL_MSG_BATCH_END, self.last_seq + 1);
        }
        &self.bytes
    }

    /// Adds a table, which may exist.
    pub fn add_table(&mut self, family: Family, table: &str) {
        self.message(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, family, |out| {
            attr::put_text(out, 1, table);
        });
    }

    /// Deletes a table with all that is in it.
    pub fn delete_table(&mut self, family: Family, table: &str) {
        self.message(libc::NFT_MSG_DELTABLE, 0, family, |out| attr::put_text(out, 1, table));
    }

    /// Adds a chain, which must not exist.
    pub fn add_chain(&mut self, family: Family, table: &str, chain: &Chain) {
        self.declared(|buffer, seq| declare::chain(buffer, seq, family, table, chain));
    }

    /// Deletes a chain and its rules. Refused while something refers to it.
    pub fn delete_chain(&mut self, family: Family, table: &str, chain: &str) {
        self.message(libc::NFT_MSG_DELCHAIN, 0, family, |out| {
            attr::put_text(out, 1, table);
            attr::put_text(out, 3, chain);
        });
    }

    /// Deletes the rules of a chain.
    pub fn flush_chain(&mut self, family: Family, table: &str, chain: &str) {
        self.message(libc::NFT_MSG_DELRULE, 0, family, |out| {
            attr::put_text(out, 1, table);
            attr::put_text(out, 2, chain);
        });
    }

    /// Appends a rule to its chain.
    pub fn add_rule(&mut self, family: Family, table: &str, rule: &Rule) {
        self.declared(|buffer, seq| declare::rule(buffer, seq, family, table, rule));
    }

    /// Adds a set or map, which must not exist.
    pub fn add_set(&mut self, family: Family, table: &str, set: &Set) {
        self.declared(|buffer, seq| declare::set(buffer, seq, family, table, set));
    }

    /// Adds or deletes elements that the `put_` functions encoded, in as many messages as
    /// it takes.
    pub fn elements(&mut self, op: ElementOp, family: Family, table: &str, set: &str, encoded: &[u8]) {
        let (kind, flags) = match op {
            ElementOp::Add => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE | libc::NLM_F_EXCL),
            ElementOp::Delete => (libc::NFT_MSG_DELSETELEM, 0),
        };
        let mut rest = encoded;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(whole_elements(rest));
            self.message(kind, flags, family, |out| {
                attr::put_text(out, 1, table);
                attr::put_text(out, 2, set);
                attr::put_nest(out, 3, now.len());
                out.extend_from_slice(now);
            });
            rest = later;
        }
    }

    fn message(
        &mut self,
        kind: libc::c_int,
        flags: libc::c_int,
        family: Family,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        self.open();
        put_message(&mut self.bytes, kind, flags, family as u8, self.last_seq, fill);
    }

    fn declared(&mut self, write: impl FnOnce(&mut Vec<u8>, u32)) {
        self.open();
        write(&mut self.bytes, self.last_seq);
    }

    fn open(&mut self) {
        if self.is_empty() {
            self.control(libc::NFNL_MSG_BATCH_BEGIN, 0);
        }
        self.last_seq += 1;
    }

    fn control(&mut self, kind: libc::c_int, seq: u32) {
        let kind = u16::try_from(kind).unwrap_or_default();
        put_header(&mut self.bytes, kind, libc::NLM_F_REQUEST, 0, seq, SUBSYSTEM, |_| {});
    }
}

/// How many bytes of encoded elements fit one message, at least one element's.
fn whole_elements(encoded: &[u8]) -> usize {
    if encoded.len() <= ELEMENTS_PER_MESSAGE {
        return encoded.len();
    }
    let mut end = 0;
    while let Some(header) = encoded.get(end..) {
        let next = end + attr::aligned(usize::from(attr::u16_ne(header)).max(attr::HEADER));
        if next > ELEMENTS_PER_MESSAGE && end > 0 {
            break;
        }
        end = next;
    }
    end.min(encoded.len())
}

/// Appends one nf_tables message.
pub(super) fn put_message(
    out: &mut Vec<u8>,
    kind: libc::c_int,
    flags: libc::c_int,
    family: u8,
    seq: u32,
    fill: impl FnOnce(&mut Vec<u8>),
) {
    let kind = SUBSYSTEM << 8 | u16::try_from(kind).unwrap_or_default();
    put_header(out, kind, flags | libc::NLM_F_REQUEST, family, seq, 0, fill);
}

fn put_header(
    out: &mut Vec<u8>,
    kind: u16,
    flags: libc::c_int,
    family: u8,
    seq: u32,
    resource: u16,
    fill: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.resize(start + netlink::HEADER, 0);
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    fill(out);
    let length = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    let flags = u16::try_from(flags).unwrap_or_default();
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    out[start + 4..start + 6].copy_from_slice(&kind.to_ne_bytes());
    out[start + 6..start + 8].copy_from_slice(&flags.to_ne_bytes());
    out[start + 8..start + 12].copy_from_slice(&seq.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Messages;
    use crate::nf_tables::put_key;

    #[test]
    fn elements_are_split_into_messages_at_element_boundaries() {
        let mut encoded = Vec::new();
        for n in 0..10_000_u32 {
            put_key(&mut encoded, &n.to_be_bytes());
        }
        let mut batch = Batch::new();
        batch.elements(ElementOp::Add, Family::Ipv4, "t", "s", &encoded);
        assert_eq!(batch.last_seq(), 3);
        let mut seen = 0;
        for message in Messages::of(batch.finish()).filter(|message| message.kind >> 8 == SUBSYSTEM) {
            let list = attr::Attributes::of(&message.payload[4..]).get(3).unwrap();
            seen += list.nested().count();
        }
        assert_eq!(seen, 10_000);
    }

    #[test]
    fn an_empty_batch_has_no_bytes() {
        let mut batch = Batch::new();
        assert!(batch.finish().is_empty());
        batch.elements(ElementOp::Add, Family::Ipv4, "t", "s", &[]);
        assert!(batch.is_empty());
    }
}
