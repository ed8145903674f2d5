use std::collections::{HashMap, VecDeque};
use std::time::{Instant, SystemTime};

use lockstep_model::Digest;

/// The last published transactions: how a client that knows only a digest finds its place,
/// and when what was published.
#[derive(Debug)]
pub(crate) struct History {
    /// Consecutive seqs, oldest first, never empty.
    ring: VecDeque<Published>,
    /// Newest seq at which the state had this digest.
    by_digest: HashMap<Digest, u64>,
    capacity: usize,
}

/// One transaction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Published {
    pub(crate) seq: u64,
    /// After the transaction.
    pub(crate) digest: Digest,
    /// After the transaction.
    pub(crate) resources: u64,
    pub(crate) at: Instant,
    pub(crate) trigger: Option<SystemTime>,
}

impl History {
    /// Starts with the state nobody published: empty, seq 0.
    pub(crate) fn new(capacity: usize, now: Instant) -> Self {
        let start = Published { seq: 0, digest: Digest::EMPTY, resources: 0, at: now, trigger: None };
        Self {
            ring: VecDeque::from([start]),
            by_digest: HashMap::from([(Digest::EMPTY, 0)]),
            capacity: capacity.max(1),
        }
    }

    /// Adds the transaction after the newest one.
    pub(crate) fn push(&mut self, published: Published) {
        if self.ring.len() == self.capacity
            && let Some(oldest) = self.ring.pop_front()
            && self.by_digest.get(&oldest.digest) == Some(&oldest.seq)
        {
            self.by_digest.remove(&oldest.digest);
        }
        self.by_digest.insert(published.digest, published.seq);
        self.ring.push_back(published);
    }

    /// Newest seq at which the state had this digest, if it is remembered.
    pub(crate) fn seq_of(&self, digest: Digest) -> Option<u64> {
        self.by_digest.get(&digest).copied()
    }

    /// The transaction, if it is remembered.
    pub(crate) fn get(&self, seq: u64) -> Option<&Published> {
        let oldest = self.ring.front()?.seq;
        self.ring.get(usize::try_from(seq.checked_sub(oldest)?).ok()?)
    }

    /// Oldest cause of the transactions after `seq`; `None` where one of them is forgotten or
    /// none of them has a cause.
    pub(crate) fn trigger_after(&self, seq: u64) -> Option<SystemTime> {
        let oldest = self.ring.front()?.seq;
        let skip = usize::try_from((seq + 1).checked_sub(oldest)?).ok()?;
        self.ring.iter().skip(skip).filter_map(|published| published.trigger).min()
    }
}
