use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use lockstep_model::{
    Digest, EndpointPatch, EndpointSetKey, Key, Kind, Resource, ServiceCidrKey, ServiceKey, Version,
};

use crate::Changes;
use crate::history::{History, Published};
use crate::node_addresses::NodeAddresses;
use crate::services::Members;

#[cfg(test)]
pub(crate) mod tests;

/// How many published transactions a [`Store`] remembers the digest of.
pub const HELD_HISTORY: usize = 1_024;

/// How many removed keys a [`Store`] remembers. A cursor from before the first forgotten
/// removal gets no delta any more.
pub const TOMBSTONES: usize = 65_536;

/// The state, indexed by key, by Service and by last change.
#[derive(Debug)]
pub struct Store {
    epoch: NonZeroU64,
    seq: u64,
    digest: Digest,
    counts: Counts,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
    /// Every slot in use, once, at the seq that changed it last.
    by_seq: BTreeSet<(u64, u32)>,
    pub(crate) by_service: BTreeMap<ServiceKey, Members>,
    /// The slots with content of what belongs to no Service.
    service_cidrs: BTreeMap<ServiceCidrKey, u32>,
    node_addresses: NodeAddresses,
    /// The slots without content, as in `by_seq`.
    tombstones: BTreeSet<(u64, u32)>,
    max_tombstones: usize,
    /// Newest seq of a forgotten tombstone: a cursor before it may hold what is gone.
    horizon: u64,
    history: History,
    revisions: BTreeMap<String, String>,
}

/// One key. The free ones keep the key they had.
#[derive(Debug)]
struct Slot {
    key: Key,
    seq: u64,
    /// `None` = removed at `seq`.
    content: Option<Content>,
}

#[derive(Debug)]
struct Content {
    version: Version,
    body: Bytes,
    resource: Resource,
    previous: Option<Box<Previous>>,
}

/// One step back, for cursors that hold exactly that.
#[derive(Debug)]
struct Previous {
    version: Version,
    seq: u64,
    patch: Arc<EndpointPatch>,
}

/// A point in the history of one [`Store`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    /// Which store; never 0.
    pub epoch: u64,
    /// Transactions published so far.
    pub seq: u64,
    /// Digest of the state.
    pub digest: Digest,
    /// Number of resources in the state.
    pub resources: u64,
}

/// One resource as it is sent.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Its content version.
    pub version: Version,
    /// Its canonical bytes.
    pub body: Bytes,
}

/// A changed endpoint set as a difference.
#[derive(Debug, Clone)]
pub struct Patch {
    /// The set.
    pub key: EndpointSetKey,
    /// Version it starts from.
    pub base: Version,
    /// Version it leads to.
    pub version: Version,
    /// The difference.
    pub patch: Arc<EndpointPatch>,
}

/// What turns the state at `from` into the state at `to`. Lists are sorted by (kind, key); no
/// key is named twice.
#[derive(Debug, Clone)]
pub struct Delta {
    /// seq it starts from.
    pub from: u64,
    /// Where it leads.
    pub to: Position,
    /// New and changed resources.
    pub upserts: Vec<Entry>,
    /// Resources that are gone; some of them the state at `from` may not have had either.
    pub removals: Vec<Key>,
    /// Changed endpoint sets.
    pub patches: Vec<Patch>,
    /// Oldest cause, where it is known for all of it.
    pub trigger: Option<SystemTime>,
}

/// The whole state, sorted by (kind, key).
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it was taken.
    pub position: Position,
    /// Everything.
    pub entries: Vec<Entry>,
}

impl Store {
    /// An empty store. `epoch` is random: a seq means nothing without it.
    pub fn new(epoch: NonZeroU64, now: Instant) -> Self {
        Self::with_limits(epoch, now, HELD_HISTORY, TOMBSTONES)
    }

    /// An empty store that remembers this many transactions and removals.
    pub fn with_limits(epoch: NonZeroU64, now: Instant, held_history: usize, tombstones: usize) -> Self {
        Self {
            epoch,
            seq: 0,
            digest: Digest::EMPTY,
            counts: Counts::default(),
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            by_seq: BTreeSet::new(),
            by_service: BTreeMap::new(),
            service_cidrs: BTreeMap::new(),
            node_addresses: NodeAddresses::default(),
            tombstones: BTreeSet::new(),
            max_tombstones: tombstones,
            horizon: 0,
            history: History::new(held_history, now),
            revisions: BTreeMap::new(),
        }
    }

    /// The newest state.
    pub fn head(&self) -> Position {
        Position { epoch: self.epoch.get(), seq: self.seq, digest: self.digest, resources: self.counts.all() }
    }

    /// Resources of a kind in the state.
    pub fn resource_count(&self, kind: Kind) -> u64 {
        self.counts.of(kind)
    }

    /// How far each watch of the source has come, sorted by resource.
    pub fn revisions(&self) -> impl Iterator<Item = (&str, &str)> {
        self.revisions.iter().map(|(resource, version)| (resource.as_str(), version.as_str()))
    }

    /// Addresses that Node objects state and Services name as external or load-balancer
    /// addresses, sorted, each once. The same `Arc` for as long as nothing has changed.
    pub fn node_addresses(&self) -> &Arc<[IpAddr]> {
        self.node_addresses.settled()
    }

    /// A Node object states other addresses than before, each once. It publishes nothing.
    pub fn change_node(&mut self, before: &[IpAddr], after: &[IpAddr]) {
        self.node_addresses.node(before, after);
        self.node_addresses.settle();
    }

    /// Publishes changes as one transaction and returns its seq; `None` where nothing is
    /// different from before, which publishes nothing.
    pub fn apply(&mut self, changes: Changes, now: Instant) -> Option<u64> {
        let Changes { resources, trigger, revisions } = changes;
        self.revisions.extend(revisions);
        let seq = self.seq + 1;
        let mut changed = false;
        for (key, resource) in resources {
            changed |= match resource {
                Some(resource) => self.upsert(key, resource, seq),
                None => self.remove(&key, seq),
            };
        }
        if !changed {
            return None;
        }
        self.node_addresses.settle();
        self.publish(trigger, now);
        self.forget_tombstones();
        Some(seq)
    }

    /// Publishes the state as it is, where nothing was published yet: 0 stays the seq of
    /// nothing, so a node that has verified an empty cluster can say so. Returns the seq.
    pub fn begin(&mut self, now: Instant) -> u64 {
        if self.seq == 0 {
            self.publish(None, now);
        }
        self.seq
    }

    fn publish(&mut self, trigger: Option<SystemTime>, now: Instant) {
        self.seq += 1;
        self.history.push(Published {
            seq: self.seq,
            digest: self.digest,
            resources: self.counts.all(),
            at: now,
            trigger,
        });
    }

    fn upsert(&mut self, key: Key, resource: Resource, seq: u64) -> bool {
        let body = resource.canonical();
        let version = Version::of(&body);
        let mut content = Content { version, body: body.into(), resource, previous: None };
        let known = self.by_key.get(&key).copied();
        let slot = known.unwrap_or_else(|| self.occupy(key.clone()));
        match self.content(slot) {
            Some(old) if old.version == version => return false,
            Some(old) => {
                content.previous = old.step_to(&content.resource, self.slots[slot as usize].seq);
                let old = old.version;
                self.digest.remove(&key, old);
            }
            None => *self.counts.of_mut(key.kind()) += 1,
        }
        let before = self.slots[slot as usize].content.as_ref().map(|old| &old.resource);
        self.node_addresses.resource(before, Some(&content.resource));
        self.digest.add(&key, version);
        self.slots[slot as usize].content = Some(content);
        self.touch(slot, seq);
        self.file(&key, slot, seq);
        true
    }

    fn remove(&mut self, key: &Key, seq: u64) -> bool {
        let Some(slot) = self.by_key.get(key).copied() else { return false };
        let Some(old) = self.slots[slot as usize].content.take() else { return false };
        self.digest.remove(key, old.version);
        self.node_addresses.resource(Some(&old.resource), None);
        *self.counts.of_mut(key.kind()) -= 1;
        self.touch(slot, seq);
        self.tombstones.insert((seq, slot));
        match key {
            Key::Service(_) | Key::EndpointSet(_) => self.leave_service(slot, seq),
            Key::ServiceCidr(key) => {
                self.service_cidrs.remove(key);
            }
        }
        true
    }

    /// Files a slot with content where snapshots and questions find it.
    fn file(&mut self, key: &Key, slot: u32, seq: u64) {
        match key {
            Key::Service(_) | Key::EndpointSet(_) => self.join_service(slot, seq),
            Key::ServiceCidr(key) => {
                self.service_cidrs.insert(key.clone(), slot);
            }
        }
    }

    /// A slot for a key that has none.
    fn occupy(&mut self, key: Key) -> u32 {
        let slot = Slot { key: key.clone(), seq: 0, content: None };
        let at = match self.free.pop() {
            Some(at) => {
                self.slots[at as usize] = slot;
                at
            }
            None => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).expect("four thousand million keys do not fit in memory")
            }
        };
        self.by_key.insert(key, at);
        at
    }

    /// Moves a slot to the end of the change order.
    fn touch(&mut self, slot: u32, seq: u64) {
        let old = (self.slots[slot as usize].seq, slot);
        self.by_seq.remove(&old);
        self.tombstones.remove(&old);
        self.slots[slot as usize].seq = seq;
        self.by_seq.insert((seq, slot));
    }

    fn forget_tombstones(&mut self) {
        while self.tombstones.len() > self.max_tombstones
            && let Some(oldest @ (seq, slot)) = self.tombstones.pop_first()
        {
            self.by_seq.remove(&oldest);
            let key = self.slots[slot as usize].key.clone();
            self.by_key.remove(&key);
            if let Some(service) = key.service() {
                self.forget_in_service(service, seq);
            }
            self.free.push(slot);
            self.horizon = self.horizon.max(seq);
        }
    }

    fn content(&self, slot: u32) -> Option<&Content> {
        self.slots[slot as usize].content.as_ref()
    }

    pub(crate) fn key(&self, slot: u32) -> &Key {
        &self.slots[slot as usize].key
    }

    pub(crate) fn resource(&self, slot: u32) -> Option<&Resource> {
        self.content(slot).map(|content| &content.resource)
    }

    pub(crate) fn versioned(&self, slot: u32) -> Option<(Version, Resource)> {
        self.content(slot).map(|content| (content.version, content.resource.clone()))
    }

    pub(crate) fn entry(&self, slot: u32) -> Option<Entry> {
        let content = self.content(slot)?;
        Some(Entry { key: self.key(slot).clone(), version: content.version, body: content.body.clone() })
    }

    /// The resource as it is now.
    pub fn get(&self, key: &Key) -> Option<Entry> {
        self.entry(*self.by_key.get(key)?)
    }

    /// What changed after `from`, each key once at its latest content. `None` where that is
    /// not known: `from` is before the oldest removal remembered, or has not happened.
    /// With `patches`, endpoint sets of which a client at `from` holds exactly the version
    /// before are given as a difference.
    pub fn delta(&self, from: u64, patches: bool) -> Option<Delta> {
        if !self.reaches(from) {
            return None;
        }
        let mut delta = Delta {
            from,
            to: self.head(),
            upserts: Vec::new(),
            removals: Vec::new(),
            patches: Vec::new(),
            trigger: self.history.trigger_after(from),
        };
        for (_, slot) in self.by_seq.range((from + 1, 0)..) {
            let Some(content) = self.content(*slot) else {
                delta.removals.push(self.key(*slot).clone());
                continue;
            };
            match (&content.previous, self.key(*slot)) {
                (Some(previous), Key::EndpointSet(key)) if patches && previous.seq <= from => {
                    delta.patches.push(Patch {
                        key: key.clone(),
                        base: previous.version,
                        version: content.version,
                        patch: previous.patch.clone(),
                    });
                }
                _ => delta.upserts.extend(self.entry(*slot)),
            }
        }
        delta.upserts.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        delta.removals.sort_unstable();
        delta.patches.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Some(delta)
    }

    /// Everything. Costs the state.
    pub fn snapshot(&self) -> Snapshot {
        let members = self.by_service.values();
        let services = members.clone().filter_map(|members| members.service);
        let sets = members.flat_map(|members| members.sets.iter().copied());
        let cidrs = self.service_cidrs.values().copied();
        let entries = services.chain(sets).chain(cidrs).filter_map(|slot| self.entry(slot)).collect();
        Snapshot { position: self.head(), entries }
    }

    /// Newest remembered seq at which the state had this digest.
    pub fn seq_of(&self, digest: Digest) -> Option<u64> {
        self.history.seq_of(digest)
    }

    /// The state after a transaction, if it is remembered.
    pub fn position_at(&self, seq: u64) -> Option<Position> {
        self.history.get(seq).map(|published| Position {
            epoch: self.epoch.get(),
            seq,
            digest: published.digest,
            resources: published.resources,
        })
    }

    /// True where [`delta`](Self::delta) has an answer for this cursor.
    pub fn reaches(&self, from: u64) -> bool {
        (self.horizon..=self.seq).contains(&from)
    }

    /// When a transaction was published, if it is remembered.
    pub fn published_at(&self, seq: u64) -> Option<Instant> {
        self.history.get(seq).map(|published| published.at)
    }
}

/// How many resources of each kind there are.
#[derive(Debug, Default)]
struct Counts([u64; Kind::ALL.len()]);

impl Counts {
    /// Kinds are numbered from 1, in the order of [`Kind::ALL`].
    fn of_mut(&mut self, kind: Kind) -> &mut u64 {
        &mut self.0[kind as usize - 1]
    }

    fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize - 1]
    }

    fn all(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Content {
    /// The step from this content, which has been there since `seq`, to `new`, where it is
    /// worth keeping: a patch that names most of the set costs more than the set.
    fn step_to(&self, new: &Resource, seq: u64) -> Option<Box<Previous>> {
        let (Resource::EndpointSet(old), Resource::EndpointSet(new)) = (&self.resource, new) else {
            return None;
        };
        let patch = old.patch_to(new)?;
        let worth_it = patch.upserts.len() * 2 + patch.removed.len() <= new.endpoints.len();
        worth_it.then(|| Box::new(Previous { version: self.version, seq, patch: Arc::new(patch) }))
    }
}
