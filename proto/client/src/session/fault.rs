//! Resources that the server sent and the session could not take in.

use std::collections::BTreeMap;

use lockstep_model::{Digest, Key, State};
use lockstep_wire::v1;

use crate::report::Failure;

/// A resource that could not be taken in.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) failure: Failure,
    /// True = another copy may be better: it is asked for again.
    pub(super) lost: bool,
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
            None => self.nameless.push(fault.failure),
        }
    }

    /// The request that asks for them again; `None` where there are none with a name.
    pub(super) fn refetch(&self) -> Option<v1::SyncRequest> {
        (!self.named.is_empty()).then(|| super::refetch(self.named.keys()))
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
