use std::fmt;

use lockstep_model::Digest;
use lockstep_wire::v1;

/// A point in the history of one server process, and what the state is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Which server process counted `seq`; 0 = none that is known.
    pub epoch: u64,
    /// Transactions published by that process.
    pub seq: u64,
    /// What the whole state adds up to; the same on every replica.
    pub digest: Digest,
}

impl Position {
    /// From the wire form; `None` where the digest has not 32 bytes.
    pub fn from_wire(position: &v1::Position) -> Option<Self> {
        let digest = Digest::from_bytes(&position.digest)?;
        Some(Self { epoch: position.epoch, seq: position.seq, digest })
    }

    /// The wire form, without what a client does not know (source revisions).
    pub fn to_wire(self, resource_count: u64) -> v1::Position {
        v1::Position {
            epoch: self.epoch,
            seq: self.seq,
            digest: self.digest.to_bytes().to_vec().into(),
            source_revisions: Vec::new(),
            resource_count,
        }
    }

    /// True where `self` was counted by the same process as `other`.
    pub fn same_epoch(self, other: Position) -> bool {
        self.epoch == other.epoch && self.epoch != 0
    }
}

impl fmt::Display for Position {
    /// `seq@epoch`, the epoch in hex.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:016x}", self.seq, self.epoch)
    }
}
