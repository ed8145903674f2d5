//! What has been sent, and what has to be sent because of what was read.
//!
//! ```text
//! conversion of an object ──> Tracker (one per kind: names, keys, versions, faults) ──> Batch ──> Changes
//! ```
//!
//! The tracker keeps no content, only what is needed to send no change twice and to know
//! after a new list what is gone.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::SystemTime;

use lockstep_model::{InvalidField, Key, NodeContext, Resource, Version, canonical};

use crate::convert::{Conversion, Outcome};
use crate::{Changes, NodeChange, ObjectName, QuarantineChange};

/// An object of whatever kind, as the model has it.
#[derive(Debug, Clone)]
pub(crate) enum Object {
    Resource(Resource),
    Node(NodeContext),
}

/// Names what was sent, so that it can be taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Sent {
    Resource(Key),
    Node(Arc<str>),
}

/// Everything that was ever read of the objects of one kind.
#[derive(Debug)]
pub(crate) struct Tracker {
    kind: &'static str,
    objects: HashMap<Box<str>, Entry>,
    /// Number of the current list; what has another number at its end is gone.
    list: u32,
}

/// One object that is in force, in quarantine, or both.
#[derive(Debug)]
struct Entry {
    sent: Option<(Sent, Version)>,
    fault: Option<Box<InvalidField>>,
    /// Hash of the uid: a new object of an old name inherits nothing.
    incarnation: u64,
    list: u32,
}

/// One reading of an object.
pub(crate) struct Reading<'a> {
    /// `namespace/name`, or a Node's name.
    pub(crate) name: &'a str,
    /// `metadata.uid`, where there is one.
    pub(crate) uid: Option<&'a str>,
    /// What it was converted to.
    pub(crate) conversion: Conversion<Object>,
    /// A fault that does not keep the object from being in force.
    pub(crate) note: Option<InvalidField>,
    /// Why it changed, by its own word.
    pub(crate) trigger: Option<SystemTime>,
}

impl Tracker {
    pub(crate) fn new(kind: &'static str) -> Self {
        Self { kind, objects: HashMap::new(), list: 0 }
    }

    /// Takes in an object as it is now.
    pub(crate) fn take(&mut self, reading: Reading<'_>, batch: &mut Batch) {
        let mut hasher = DefaultHasher::new();
        reading.uid.hash(&mut hasher);
        let incarnation = hasher.finish();
        if self.objects.get(reading.name).is_some_and(|entry| entry.incarnation != incarnation) {
            self.remove(reading.name, batch);
        }
        let object = match reading.conversion {
            Ok(Outcome::Skip(_)) => return self.remove(reading.name, batch),
            Ok(Outcome::Object(object)) => Ok(object),
            Err(fault) => Err(fault),
        };
        if !self.objects.contains_key(reading.name) {
            let new = Entry { sent: None, fault: None, incarnation, list: 0 };
            self.objects.insert(reading.name.into(), new);
        }
        let Some(entry) = self.objects.get_mut(reading.name) else { return };
        entry.list = self.list;
        let fault = match object {
            Ok(object) => {
                entry.put(object, reading.trigger, batch);
                reading.note
            }
            Err(fault) => Some(fault),
        };
        let fault = fault.map(Box::new);
        if fault == entry.fault {
            return;
        }
        let name = ObjectName { kind: self.kind.to_owned(), name: reading.name.to_owned() };
        match &fault {
            Some(fault) => batch.quarantine(name, (**fault).clone(), entry.sent.is_some()),
            None => batch.release(name),
        }
        entry.fault = fault;
    }

    /// Takes an object away. One that was never taken in is no matter.
    pub(crate) fn remove(&mut self, name: &str, batch: &mut Batch) {
        if let Some((name, entry)) = self.objects.remove_entry(name) {
            self.forget(&name, entry, batch);
        }
    }

    /// From here on everything is read anew.
    pub(crate) fn begin_list(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// What was not read since [`begin_list`](Self::begin_list) is gone.
    pub(crate) fn end_list(&mut self, batch: &mut Batch) {
        let list = self.list;
        let gone: Vec<_> = self.objects.extract_if(|_, entry| entry.list != list).collect();
        for (name, entry) in gone {
            self.forget(&name, entry, batch);
        }
    }

    fn forget(&self, name: &str, entry: Entry, batch: &mut Batch) {
        if let Some((sent, _)) = entry.sent {
            batch.remove(sent);
        }
        if entry.fault.is_some() {
            batch.release(ObjectName { kind: self.kind.to_owned(), name: name.to_owned() });
        }
    }
}

impl Entry {
    /// Sends what differs from what was sent. A slice that went over to another Service has
    /// another key.
    fn put(&mut self, object: Object, trigger: Option<SystemTime>, batch: &mut Batch) {
        let (sent, version) = match &object {
            Object::Resource(resource) => (Sent::Resource(resource.key()), resource.version()),
            Object::Node(node) => {
                (Sent::Node(node.name.clone()), Version::of(&canonical::node_context(node)))
            }
        };
        if let Some((old, old_version)) = &self.sent {
            if *old_version == version {
                return;
            }
            if *old != sent {
                batch.remove(old.clone());
            }
        }
        self.sent = Some((sent, version));
        batch.upsert(object, trigger);
    }
}

/// Changes being gathered. The last word on an object is the one that is sent.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    resources: BTreeMap<Key, Option<Resource>>,
    nodes: BTreeMap<Arc<str>, Option<NodeContext>>,
    quarantine: BTreeMap<ObjectName, Option<(InvalidField, bool)>>,
    trigger: Option<SystemTime>,
    revisions: BTreeMap<&'static str, String>,
}

impl Batch {
    fn upsert(&mut self, object: Object, trigger: Option<SystemTime>) {
        match object {
            Object::Resource(resource) => {
                self.resources.insert(resource.key(), Some(resource));
            }
            Object::Node(node) => {
                self.nodes.insert(node.name.clone(), Some(node));
            }
        }
        self.trigger = match (self.trigger, trigger) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }

    fn remove(&mut self, sent: Sent) {
        match sent {
            Sent::Resource(key) => {
                self.resources.insert(key, None);
            }
            Sent::Node(name) => {
                self.nodes.insert(name, None);
            }
        }
    }

    pub(crate) fn quarantine(&mut self, object: ObjectName, fault: InvalidField, previous_in_force: bool) {
        tracing::warn!(
            kind = object.kind,
            name = object.name,
            previous_in_force,
            "object is in quarantine: {fault}"
        );
        self.quarantine.insert(object, Some((fault, previous_in_force)));
    }

    pub(crate) fn release(&mut self, object: ObjectName) {
        tracing::info!(kind = object.kind, name = object.name, "object has left quarantine");
        self.quarantine.insert(object, None);
    }

    /// How far the watch of `resource` has come.
    pub(crate) fn revision(&mut self, resource: &'static str, revision: String) {
        self.revisions.insert(resource, revision);
    }

    /// Number of objects with changes.
    pub(crate) fn len(&self) -> usize {
        self.resources.len() + self.nodes.len() + self.quarantine.len()
    }

    /// What was gathered since the last time, in an order that depends on nothing else;
    /// `None` where that is nothing.
    pub(crate) fn finish(&mut self) -> Option<Changes> {
        if self.len() == 0 && self.revisions.is_empty() {
            return None;
        }
        let batch = std::mem::take(self);
        let mut changes = Changes { trigger: batch.trigger, ..Changes::default() };
        for (key, resource) in batch.resources {
            match resource {
                Some(resource) => changes.upserts.push(resource),
                None => changes.removals.push(key),
            }
        }
        changes.nodes.extend(batch.nodes.into_iter().map(|(name, node)| match node {
            Some(node) => NodeChange::Upsert(node),
            None => NodeChange::Remove(name.as_ref().to_owned()),
        }));
        changes.quarantine.extend(batch.quarantine.into_iter().map(|(object, fault)| match fault {
            Some((fault, previous_in_force)) => QuarantineChange::Add { object, fault, previous_in_force },
            None => QuarantineChange::Remove(object),
        }));
        changes
            .revisions
            .extend(batch.revisions.into_iter().map(|(resource, revision)| (resource.to_owned(), revision)));
        Some(changes)
    }
}
