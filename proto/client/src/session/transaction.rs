//! One transaction: collected message by message beside the state, then applied at once or
//! not at all.

use std::sync::Arc;
use std::time::SystemTime;

use lockstep_model::{
    Digest, EndpointSet, Feature, Interner, Key, Kind, Put, Resource, ServiceKey, State, Version, canonical,
};
use lockstep_wire::{DecodeError, ReceivedPatch, batch, convert, decode_body, decode_key, raw, take_body};

use super::fault::{Fault, Faults};
use super::{Change, Identity, lacking};
use crate::Position;
use crate::report::{Failure, FailureReason, InForce};

/// What a transaction builds on.
pub(super) struct Held<'a> {
    pub(super) state: &'a State,
    /// Who takes it in; `None` = whatever was taken in before is.
    pub(super) identity: Option<&'a Identity>,
    pub(super) now: SystemTime,
}

impl Held<'_> {
    fn lacking(&self, resource: &Resource) -> Option<Feature> {
        match (self.identity, resource) {
            (Some(identity), Resource::Service(service)) => lacking(identity, service),
            _ => None,
        }
    }
}

/// A transaction under way.
pub(super) struct Transaction {
    pub(super) to: Position,
    work: Work,
    trigger: Option<SystemTime>,
    faults: Vec<Fault>,
    /// Made when first needed, and not kept longer: it is large.
    unpacker: Option<batch::Unpacker>,
}

enum Work {
    /// Changes to what is held.
    Changes(Vec<Change>),
    /// What takes the place of what is held.
    Replacement(Box<State>),
}

/// What a commit did.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) changes: Vec<Change>,
    pub(super) services: Vec<ServiceKey>,
    pub(super) trigger: Option<SystemTime>,
    pub(super) full: bool,
    /// Something must be asked for again.
    pub(super) refetch: bool,
}

/// A resource that does not become part of the transaction.
struct Refused {
    key: Option<Key>,
    version: Option<Version>,
    reason: FailureReason,
    message: String,
    lost: bool,
}

impl Transaction {
    pub(super) fn new(to: Position, full: bool) -> Self {
        let work = if full { Work::Replacement(Box::default()) } else { Work::Changes(Vec::new()) };
        Self { to, work, trigger: None, faults: Vec::new(), unpacker: None }
    }

    /// Takes one message in. An error concerns the message as a whole: the stream is of no use.
    pub(super) fn stage(
        &mut self,
        update: raw::Update,
        held: &Held<'_>,
        interner: &mut Interner,
    ) -> Result<(), batch::UnpackError> {
        let trigger = update.trigger_time.and_then(|time| SystemTime::try_from(time).ok());
        self.trigger = match (self.trigger, trigger) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let Some(payload) = update.payload else { return Ok(()) };
        let batch = self.unpack(payload)?;
        if let Work::Changes(changes) = &mut self.work {
            changes.reserve(batch.upserts.len() + batch.removals.len() + batch.patches.len());
        }
        for resource in batch.upserts {
            let result = self.upsert(resource, held, interner);
            self.keep(result, held);
        }
        for gone in batch.removals {
            // Of a kind that is not known nothing is held.
            if let Ok(kind) = convert::kind_from_wire("kind", gone.kind) {
                let result = removal(kind, &gone.key);
                self.keep(result, held);
            }
        }
        for patch in &batch.patches {
            let result = self.patch(patch, held.state, interner);
            self.keep(result, held);
        }
        Ok(())
    }

    /// What is wrong with the first resource that was not taken in though its kind is known.
    pub(super) fn damage(&self) -> Option<&str> {
        let damaged = self.faults.iter().find(|fault| !fault.is_of_unknown_kind());
        damaged.map(|fault| &*fault.failure.message)
    }

    fn unpack(&mut self, payload: raw::update::Payload) -> Result<raw::ResourceBatch, batch::UnpackError> {
        match (payload, &mut self.unpacker) {
            (raw::update::Payload::Batch(batch), _) => Ok(batch),
            (payload, Some(unpacker)) => unpacker.unpack(payload),
            (payload, slot @ None) => slot.insert(batch::Unpacker::new()?).unpack(payload),
        }
    }

    fn keep(&mut self, result: Result<Change, Refused>, held: &Held<'_>) {
        let refused = match (result, &mut self.work) {
            (Ok(change), Work::Changes(changes)) => return changes.push(change),
            (Ok(Change::Upsert(version, resource)), Work::Replacement(state)) => {
                state.upsert(version, resource);
                return;
            }
            (Ok(Change::Remove(key)), Work::Replacement(state)) => {
                state.remove(&key);
                return;
            }
            (Err(refused), _) => refused,
        };
        let before = refused.key.as_ref().and_then(|key| held.state.get(key));
        let in_force = match (&refused.key, &before) {
            (None, _) => InForce::Unknown,
            (_, Some(_)) => InForce::Previous,
            (_, None) => InForce::Nothing,
        };
        if let (Some((version, resource)), Work::Replacement(state)) = (before, &mut self.work) {
            // A snapshot does not take away what it has a new version of, readable or not.
            state.upsert(version, resource);
        }
        self.faults.push(Fault {
            failure: Failure {
                key: refused.key,
                version: refused.version,
                in_force,
                reason: refused.reason,
                message: refused.message,
                retrying: refused.lost,
                attempts: 1,
                first_seen: held.now,
            },
            lost: refused.lost,
        });
    }

    fn upsert(
        &self,
        resource: raw::Resource,
        held: &Held<'_>,
        interner: &mut Interner,
    ) -> Result<Change, Refused> {
        let announced = Version::from_bytes(&resource.version);
        let Some(body) = resource.body else {
            let message = "a kind of resource that this client does not know".to_owned();
            return Err(Refused {
                key: None,
                version: announced,
                reason: FailureReason::Unsupported,
                message,
                lost: false,
            });
        };
        let (kind, body) = take_body(body);
        let version = Version::of(&body);
        if !resource.version.is_empty() && announced != Some(version) {
            return Err(Refused {
                key: decode_key(kind, &body),
                version: announced,
                reason: FailureReason::Decode,
                message: format!("the body hashes to {version}, not to the version it was sent with"),
                lost: true,
            });
        }
        if matches!(self.work, Work::Replacement(_)) && !held.state.is_empty() {
            // Most of a repeated snapshot is held already: no need to decode it again.
            let same = decode_key(kind, &body).and_then(|key| held.state.get(&key));
            if let Some((same, resource)) = same.filter(|(same, _)| *same == version) {
                return Ok(Change::Upsert(same, resource));
            }
        }
        let resource = decode_body(kind, &body, interner)
            .map_err(|error| Refused::undecodable(decode_key(kind, &body), Some(version), &error))?;
        match held.lacking(&resource) {
            None => Ok(Change::Upsert(version, resource)),
            Some(feature) => {
                let failure = Fault::unsupported(resource.key(), Some(version), feature).failure;
                let Failure { key, version, reason, message, .. } = failure;
                Err(Refused { key, version, reason, message, lost: false })
            }
        }
    }

    fn patch(&self, patch: &[u8], held: &State, interner: &mut Interner) -> Result<Change, Refused> {
        let patch = ReceivedPatch::read(patch).map_err(|error| Refused::undecodable(None, None, &error))?;
        let announced = Version::from_bytes(patch.version);
        // Only a patch that cannot be applied needs a key of its own.
        let key = || Key::parse(Kind::EndpointSet, patch.key);
        let refused = |key, message, lost| Refused {
            key,
            version: announced,
            reason: FailureReason::Decode,
            message,
            lost,
        };
        let base = match &self.work {
            Work::Changes(_) => find_set(held, patch.key),
            Work::Replacement(state) => find_set(state, patch.key),
        };
        let Some((_, base)) = base.filter(|(version, _)| version.0[..] == *patch.base_version) else {
            let Some(key) = key() else {
                let message = format!("a patch of {:?}, which names no endpoint set", patch.key);
                return Err(refused(None, message, false));
            };
            return Err(refused(Some(key), "a patch of a version that is not held".to_owned(), true));
        };
        let endpoints =
            patch.decode(interner).map_err(|error| Refused::undecodable(key(), announced, &error))?;
        let set = base.patched(endpoints);
        let version = Version::of(&canonical::endpoint_set(&set));
        if announced != Some(version) {
            let message = format!("the patched set hashes to {version}, not to the version announced");
            return Err(refused(key(), message, true));
        }
        Ok(Change::Upsert(version, Resource::EndpointSet(Arc::new(set))))
    }

    /// Applies the transaction, if the outcome is what the server announced. Otherwise nothing
    /// is changed, and the error is the digest it came to.
    pub(super) fn commit(self, state: &mut State, faults: &mut Faults) -> Result<Outcome, Digest> {
        let full = matches!(self.work, Work::Replacement(_));
        let refetch = self.faults.iter().any(|fault| fault.lost);
        let next_faults = self.next_faults(faults);
        let check = |state: &State| match &next_faults {
            Some(faults) => faults.explain(state, self.to.digest),
            None if state.digest() == self.to.digest => Ok(()),
            None => Err(state.digest()),
        };
        let changes = match self.work {
            Work::Changes(changes) => {
                let (changes, undo) = apply(changes, state);
                if let Err(digest) = check(state) {
                    revert(undo, state);
                    return Err(digest);
                }
                changes
            }
            Work::Replacement(new) => {
                check(&new)?;
                let changes = difference(state, &new);
                *state = *new;
                changes
            }
        };
        if state.digest() == self.to.digest {
            // Equal to the server's: whatever was wrong before is gone from there too.
            faults.clear();
        } else if let Some(next) = next_faults {
            *faults = next;
        }
        let mut services: Vec<ServiceKey> =
            changes.iter().filter_map(|change| change.service().cloned()).collect();
        if !services.is_sorted() {
            services.sort_unstable();
        }
        services.dedup();
        Ok(Outcome { changes, services, trigger: self.trigger, full, refetch: refetch && !faults.is_empty() })
    }

    /// The faults after this transaction; `None` = none before and none now, the usual case.
    fn next_faults(&self, before: &Faults) -> Option<Faults> {
        if before.is_empty() && self.faults.is_empty() {
            return None;
        }
        let mut next = match &self.work {
            Work::Changes(changes) => {
                let mut next = before.clone();
                changes.iter().for_each(|change| next.remove(&change.key()));
                next
            }
            Work::Replacement(_) => Faults::default(),
        };
        for fault in &self.faults {
            let mut fault = fault.clone();
            if let Some(known) = fault.failure.key.as_ref().and_then(|key| before.get(key)) {
                fault.failure.attempts = known.failure.attempts.saturating_add(1);
                fault.failure.first_seen = known.failure.first_seen;
            }
            next.insert(fault);
        }
        Some(next)
    }
}

fn removal(kind: Kind, key: &str) -> Result<Change, Refused> {
    Key::parse(kind, key).map(Change::Remove).ok_or_else(|| Refused {
        key: None,
        version: None,
        reason: FailureReason::Decode,
        message: format!("removal of {key:?}, which names no resource"),
        lost: false,
    })
}

/// The set that a patch names by its text: looked up without making a key.
fn find_set<'a>(state: &'a State, text: &str) -> Option<(Version, &'a Arc<EndpointSet>)> {
    let (namespace, rest) = text.split_once('/')?;
    let (name, slice) = rest.split_once('/')?;
    state.held_by_names(namespace, name).endpoint_set(slice)
}

/// What is put back where the transaction does not add up.
enum Undo {
    Remove(Key),
    Put(Version, Resource),
}

/// Applies changes; returns those that made a difference, and the way back.
fn apply(changes: Vec<Change>, state: &mut State) -> (Vec<Change>, Vec<Undo>) {
    let mut undo = Vec::with_capacity(changes.len());
    let mut effective = Vec::with_capacity(changes.len());
    for change in changes {
        undo.push(match &change {
            Change::Upsert(version, resource) => match state.put(*version, resource.clone()) {
                Put::Same => continue,
                Put::New => Undo::Remove(resource.key()),
                Put::Replaced(version, resource) => Undo::Put(version, resource),
            },
            Change::Remove(key) => {
                let Some((version, resource)) = state.get(key) else { continue };
                state.remove(key);
                Undo::Put(version, resource)
            }
        });
        effective.push(change);
    }
    (effective, undo)
}

fn revert(undo: Vec<Undo>, state: &mut State) {
    for step in undo.into_iter().rev() {
        match step {
            Undo::Put(version, resource) => state.upsert(version, resource),
            Undo::Remove(key) => state.remove(&key),
        };
    }
}

/// What turns `old` into `new`.
fn difference(old: &State, new: &State) -> Vec<Change> {
    let mut changes = Vec::new();
    for (version, resource) in new.resources() {
        if old.get(&resource.key()).is_none_or(|(held, _)| held != version) {
            changes.push(Change::Upsert(version, resource));
        }
    }
    for (_, resource) in old.resources() {
        let key = resource.key();
        if new.get(&key).is_none() {
            changes.push(Change::Remove(key));
        }
    }
    changes.sort_by_cached_key(Change::key);
    changes
}

impl Refused {
    fn undecodable(key: Option<Key>, version: Option<Version>, error: &DecodeError) -> Self {
        let reason = match error {
            DecodeError::Malformed { .. } => FailureReason::Decode,
            DecodeError::Invalid(_) => FailureReason::Invalid,
            // Without a key, "unsupported" says that it is of an unknown kind, which this is not.
            DecodeError::Unsupported(_) if key.is_none() => FailureReason::Decode,
            DecodeError::Unsupported(_) => FailureReason::Unsupported,
        };
        Self { key, version, reason, message: error.to_string(), lost: false }
    }
}

impl Change {
    /// The resource it is about.
    pub fn key(&self) -> Key {
        match self {
            Change::Upsert(_, resource) => resource.key(),
            Change::Remove(key) => key.clone(),
        }
    }

    /// The Service it is about; `None` = it is about none.
    pub fn service(&self) -> Option<&ServiceKey> {
        match self {
            Change::Upsert(_, Resource::Service(service)) => Some(&service.key),
            Change::Upsert(_, Resource::EndpointSet(set)) => Some(&set.key.service),
            Change::Upsert(_, Resource::ServiceCidr(_)) => None,
            Change::Remove(key) => key.service(),
        }
    }
}
