//! State reports: from what a node knows of itself to one [`Ack`](v1::Ack).
//!
//! A report is cumulative: it repeats everything that is not in force, so the latest one is
//! all a control plane needs and a lost one costs nothing.

use std::time::{Duration, SystemTime};

use lockstep_model::{Key, Version};
use lockstep_wire::{convert, v1};

use crate::Position;

/// Failures one Ack lists at most; the rest is counted.
pub const MAX_FAILURES: usize = 256;
/// Bytes of a failure's message at most.
pub const MAX_MESSAGE_BYTES: usize = 512;

/// What the node has done with the state, told by whoever programs it.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Position the kernel was brought to; `None` = none yet.
    pub applied: Option<Position>,
    /// Position that was read back and found equal; never newer than `applied`.
    pub verified: Option<Position>,
    /// Resources that are not in force as they should be. Complete; any order.
    pub failures: Vec<Failure>,
    /// Why nothing can be programmed; empty = it can.
    pub backend_error: String,
    /// The last programming pass.
    pub stats: Option<Stats>,
    /// Foreign changes found and repaired since the process started.
    pub drift_repairs: u64,
}

/// One resource that is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The resource; `None` = one whose key cannot be read.
    pub key: Option<Key>,
    /// The version that is not in force; `None` = not known.
    pub version: Option<Version>,
    /// What is in force instead.
    pub in_force: InForce,
    /// Class of the fault.
    pub reason: FailureReason,
    /// The fault, for people. Cut to [`MAX_MESSAGE_BYTES`] when sent.
    pub message: String,
    /// True = it is tried again without anybody's help.
    pub retrying: bool,
    /// Times tried.
    pub attempts: u32,
    /// When it began.
    pub first_seen: SystemTime,
}

/// What is in force for a resource that failed. The order is from bad to less bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InForce {
    /// Nothing of it.
    Nothing,
    /// Not known.
    Unknown,
    /// All of it but the part the message names.
    Part,
    /// The version before.
    Previous,
}

/// Class of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureReason {
    /// The bytes could not be decoded.
    Decode,
    /// Decoded, but a field is out of its range.
    Invalid,
    /// Needs a feature that is missing here.
    Unsupported,
    /// An address and port that somebody else has.
    Conflict,
    /// The kernel refused.
    Kernel,
    /// Out of memory, or a set or table is full.
    Resources,
}

/// How a programming pass went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Commit received -> programming started.
    pub queue: Duration,
    /// Programming started -> kernel transaction committed.
    pub program: Duration,
    /// Kernel transaction committed -> read back; `None` = not read back yet.
    pub verify: Option<Duration>,
    /// Transactions merged in the pass, at least 1.
    pub coalesced: u32,
    /// Kernel objects written.
    pub kernel_objects_changed: u32,
    /// True = the whole state was compared.
    pub full_sync: bool,
}

impl Report {
    /// The Ack that says this. `received` is the position the session holds, `faults` what it
    /// could not take in.
    pub(crate) fn to_ack<'a>(
        &'a self,
        received: Position,
        resources: u64,
        faults: impl Iterator<Item = &'a Failure>,
    ) -> v1::Ack {
        // Sequence numbers of another process mean nothing to this one: they count as 0.
        let seq = |position: Option<Position>| {
            position.filter(|position| position.same_epoch(received)).map_or(0, |position| position.seq)
        };
        let applied_seq = seq(self.applied).min(received.seq);
        let verified_seq = seq(self.verified).min(applied_seq);
        let mut failures: Vec<&Failure> = self.failures.iter().chain(faults).collect();
        failures.sort_by(|a, b| (a.in_force, &a.key, a.reason).cmp(&(b.in_force, &b.key, b.reason)));
        let truncated = failures.len().saturating_sub(MAX_FAILURES);
        let outcome = if !self.backend_error.is_empty() {
            v1::Outcome::Failed
        } else if applied_seq < received.seq || applied_seq == 0 {
            // 0 is the seq of nothing: what was applied for another process says nothing here.
            v1::Outcome::Received
        } else if !failures.is_empty() {
            v1::Outcome::Partial
        } else if verified_seq < applied_seq {
            v1::Outcome::Applied
        } else {
            v1::Outcome::Verified
        };
        let applied = Position {
            epoch: received.epoch,
            seq: applied_seq,
            digest: self.applied.unwrap_or_default().digest,
        };
        let mut position = applied.to_wire(resources);
        if applied_seq == 0 {
            position.digest.clear();
        }
        v1::Ack {
            received_seq: received.seq,
            applied_seq,
            verified_seq,
            position: Some(position),
            outcome: outcome as i32,
            failures: failures.iter().take(MAX_FAILURES).map(|failure| failure.to_wire()).collect(),
            failures_truncated: u32::try_from(truncated).unwrap_or(u32::MAX),
            backend_error: cut(&self.backend_error).to_owned(),
            stats: self.stats.map(Stats::to_wire),
            drift_repairs: self.drift_repairs,
        }
    }
}

impl Failure {
    fn to_wire(&self) -> v1::ResourceFailure {
        v1::ResourceFailure {
            r#ref: self.key.as_ref().map(|key| convert::key_to_wire(key, self.version)),
            in_force: match self.in_force {
                InForce::Unknown => v1::InForce::Unspecified,
                InForce::Nothing => v1::InForce::Nothing,
                InForce::Previous => v1::InForce::Previous,
                InForce::Part => v1::InForce::Part,
            } as i32,
            reason: match self.reason {
                FailureReason::Decode => v1::FailureReason::Decode,
                FailureReason::Invalid => v1::FailureReason::Invalid,
                FailureReason::Unsupported => v1::FailureReason::Unsupported,
                FailureReason::Conflict => v1::FailureReason::Conflict,
                FailureReason::Kernel => v1::FailureReason::Kernel,
                FailureReason::Resources => v1::FailureReason::Resources,
            } as i32,
            message: cut(&self.message).to_owned(),
            retrying: self.retrying,
            attempts: self.attempts,
            first_seen: Some(self.first_seen.into()),
        }
    }
}

impl Stats {
    fn to_wire(self) -> v1::ProgrammingStats {
        v1::ProgrammingStats {
            queue: self.queue.try_into().ok(),
            program: self.program.try_into().ok(),
            verify: self.verify.and_then(|verify| verify.try_into().ok()),
            coalesced: self.coalesced,
            kernel_objects_changed: self.kernel_objects_changed,
            full_sync: self.full_sync,
        }
    }
}

/// At most [`MAX_MESSAGE_BYTES`] of a text, without cutting a character in two.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_MESSAGE_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
