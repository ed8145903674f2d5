//! Resources that the server sent and the session could not take in.

use std::collections::BTreeMap;
use std::time::SystemTime;

use lockstep_model::{Digest, Feature, Key, State, Version};

use crate::report::{Failure, FailureReason, InForce};

/// Faults without a name that are told apart; more say nothing more.
const NAMELESS: usize = 16;

/// Bytes of keys that one request asks for at most: a message may have 1 MiB, and a client that
/// misses more than this is better off with a snapshot anyway.
const ASKED_BYTES: usize = 256 * 1024;

/// Bytes of a named resource in a request beside its key: kind, lengths, tags.
const REF_BYTES: usize = 16;

/// What is to be asked for again.
#[derive(Debug)]
pub(super) enum Missing<'a> {
    Keys(Vec<&'a Key>),
    /// Too much to name it.
    Everything,
}

/// A resource that could not be taken in.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) failure: Failure,
    /// True = another copy may be better: it is asked for again.
    pub(super) lost: bool,
}

fn missing<'a>(keys: impl Iterator<Item = &'a Key>) -> Option<Missing<'a>> {
    let (mut asked, mut bytes) = (Vec::new(), 0);
    for key in keys {
        bytes += key_bytes(key) + REF_BYTES;
        if bytes > ASKED_BYTES {
            return Some(Missing::Everything);
        }
        asked.push(key);
    }
    (!asked.is_empty()).then_some(Missing::Keys(asked))
}

/// Length of a key's text, about.
fn key_bytes(key: &Key) -> usize {
    key.names().map(|name| name.len() + 1).sum()
}

impl Fault {
    /// A Service that this client held and can no longer program.
    pub(super) fn unsupported(key: Key, version: Option<Version>, feature: Feature) -> Self {
        let message = format!("{key} needs {feature:?}, which this node cannot program");
        let failure = Failure {
            key: Some(key),
            version,
            in_force: InForce::Nothing,
            reason: FailureReason::Unsupported,
            message,
            retrying: false,
            attempts: 1,
            first_seen: SystemTime::now(),
        };
        Self { failure, lost: false }
    }

    /// True where it is of a kind that this release does not have: no other failure without a key
    /// has this reason.
    pub(super) fn is_of_unknown_kind(&self) -> bool {
        self.failure.key.is_none() && self.failure.reason == FailureReason::Unsupported
    }
}

/// Every such resource: at most one fault per key, and those that have not even a key.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults {
    named: BTreeMap<Key, Fault>,
    /// Until the next full snapshot.
    nameless: Vec<Failure>,
}

impl Faults {
    pub(super) fn len(&self) -> usize {
        self.named.len() + self.nameless.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Failure> {
        self.named.values().map(|fault| &fault.failure).chain(&self.nameless)
    }

    /// A fault of this resource that is known already.
    pub(super) fn get(&self, key: &Key) -> Option<&Fault> {
        self.named.get(key)
    }

    pub(super) fn remove(&mut self, key: &Key) {
        self.named.remove(key);
    }

    pub(super) fn insert(&mut self, fault: Fault) {
        match fault.failure.key.clone() {
            Some(key) => {
                self.named.insert(key, fault);
            }
            // A kind of resource that is not known changes as often as others do: it is reported once.
            None if self.nameless.len() >= NAMELESS => {}
            None if self.nameless.iter().any(|known| known.message == fault.failure.message) => {}
            None => self.nameless.push(fault.failure),
        }
    }

    /// What another copy may mend and was tried no more often than this; `None` = nothing.
    pub(super) fn refetch(&self, tried: u32) -> Option<Missing<'_>> {
        let again = |fault: &Fault| fault.lost && fault.failure.attempts <= tried;
        missing(self.named.iter().filter(|(_, fault)| again(fault)).map(|(key, _)| key))
    }

    /// Everything with a name; `None` = nothing.
    pub(super) fn refetch_all(&self) -> Option<Missing<'_>> {
        missing(self.named.keys())
    }

    /// True where something is missing, and it is known in which version and by what name: the
    /// state is that of its position but for these, by digest and not by hope.
    pub(super) fn all_known(&self) -> bool {
        let known = |fault: &Fault| fault.failure.version.is_some();
        self.nameless.is_empty() && !self.named.is_empty() && self.named.values().all(known)
    }

    /// True where something is missing that cannot be asked for by name.
    pub(super) fn lost_without_name(&self) -> bool {
        self.nameless.iter().any(|failure| failure.retrying)
    }

    /// True where `state`, together with what could not be taken in, adds up to `expected`.
    pub(super) fn explain(&self, state: &State, expected: Digest) -> Result<(), Digest> {
        let mut digest = state.digest();
        let mut unknown = !self.nameless.is_empty();
        for (key, fault) in &self.named {
            if let Some((held, _)) = state.get(key) {
                digest.remove(key, held);
            }
            match fault.failure.version {
                Some(version) => digest.add(key, version),
                None => unknown = true,
            }
        }
        if digest == expected || unknown { Ok(()) } else { Err(digest) }
    }
}
