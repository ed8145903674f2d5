use std::collections::BTreeMap;
use std::time::Instant;

use super::Levels;

/// Counts over the expected nodes, kept up to date: asking "how many have verified the head"
/// costs a lookup, not a walk over the nodes.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) expected: u32,
    pub(super) degraded: u32,
    pub(super) disconnected: u32,
    received: BTreeMap<Option<u64>, u32>,
    applied: BTreeMap<Option<u64>, u32>,
    verified: BTreeMap<Option<u64>, Group>,
}

/// What one node adds to the counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    pub(super) levels: Levels,
    pub(super) degraded: bool,
    pub(super) disconnected: bool,
}

/// The nodes that have verified up to one seq.
#[derive(Debug, Default)]
struct Group {
    nodes: u32,
    /// When that seq stopped being the head. Kept per group, because when a transaction is
    /// published every node falls behind at once, and that must not cost a walk over them.
    superseded_at: Option<Instant>,
}

impl Tally {
    pub(super) fn add(&mut self, share: Share) {
        self.expected += 1;
        self.degraded += u32::from(share.degraded);
        self.disconnected += u32::from(share.disconnected);
        *self.received.entry(share.levels.received).or_default() += 1;
        *self.applied.entry(share.levels.applied).or_default() += 1;
        self.verified.entry(share.levels.verified).or_default().nodes += 1;
    }

    pub(super) fn take(&mut self, share: Share) {
        self.expected -= 1;
        self.degraded -= u32::from(share.degraded);
        self.disconnected -= u32::from(share.disconnected);
        for (counts, seq) in
            [(&mut self.received, share.levels.received), (&mut self.applied, share.levels.applied)]
        {
            if let Some(count) = counts.get_mut(&seq) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&seq);
                }
            }
        }
        if let Some(group) = self.verified.get_mut(&share.levels.verified) {
            group.nodes -= 1;
            if group.nodes == 0 {
                self.verified.remove(&share.levels.verified);
            }
        }
    }

    /// The state at `old_head` is not the newest any more.
    pub(super) fn superseded(&mut self, old_head: u64, now: Instant) {
        if let Some(group) = self.verified.get_mut(&Some(old_head)) {
            group.superseded_at.get_or_insert(now);
        }
    }

    /// When nodes that are still at `verified` fell behind.
    pub(super) fn superseded_at(&self, verified: Option<u64>) -> Option<Instant> {
        self.verified.get(&verified)?.superseded_at
    }

    /// (received, applied, verified) counts at exactly this seq.
    pub(super) fn at(&self, seq: u64) -> (u32, u32, u32) {
        let count = |counts: &BTreeMap<_, u32>| counts.get(&Some(seq)).copied().unwrap_or(0);
        let verified = self.verified.get(&Some(seq)).map_or(0, |group| group.nodes);
        (count(&self.received), count(&self.applied), verified)
    }

    /// The seq that every expected node has verified; `None` where there is no node, or one
    /// that has verified nothing.
    pub(super) fn verified_everywhere(&self) -> Option<u64> {
        *self.verified.first_key_value()?.0
    }
}
