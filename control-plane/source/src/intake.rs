//! What has been sent, and what has to be sent because of what was read.
//!
//! ```text
//! conversion of an object ──> Tracker (one per kind: names, keys, versions, faults) ──> Batch ──> Changes
//! ```
//!
//! The tracker keeps no content, only what is needed to send no change twice and to know
//! after a new list what is gone.

use std::collections::btree_map::Entry as MapEntry;
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
    /// `namespace/name`, or the name alone of what has no namespace.
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
            Some(fault) => {
                let told = entry.fault.is_some();
                batch.quarantine(name, (**fault).clone(), entry.sent.is_some(), told);
            }
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
        let mut told = false;
        if let Some((old, old_version)) = &self.sent {
            if *old_version == version {
                return;
            }
            told = *old == sent;
            if !told {
                batch.remove(old.clone());
            }
        }
        self.sent = Some((sent, version));
        batch.upsert(object, told, trigger);
    }
}

/// What is to be told of things of one sort. The last word on each counts, and of what came
/// and went before anybody was told there is none.
#[derive(Debug)]
struct Pending<K, T>(BTreeMap<K, Word<T>>);

#[derive(Debug)]
struct Word<T> {
    /// `None` = it is gone.
    now: Option<T>,
    /// Nobody was ever told of it.
    new: bool,
}

impl<K, T> Default for Pending<K, T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord, T> Pending<K, T> {
    /// `told`: this key was put before, in this batch or an earlier one.
    fn put(&mut self, key: K, value: T, told: bool) {
        let word = self.0.entry(key).or_insert(Word { now: None, new: !told });
        word.now = Some(value);
    }

    fn take(&mut self, key: K) {
        match self.0.entry(key) {
            MapEntry::Occupied(word) if word.get().new => {
                word.remove();
            }
            MapEntry::Occupied(mut word) => word.get_mut().now = None,
            MapEntry::Vacant(vacant) => {
                vacant.insert(Word { now: None, new: false });
            }
        }
    }

    fn into_words(self) -> impl Iterator<Item = (K, Option<T>)> {
        self.0.into_iter().map(|(key, word)| (key, word.now))
    }
}

/// Changes being gathered.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    resources: Pending<Key, Resource>,
    nodes: Pending<Arc<str>, NodeContext>,
    quarantine: Pending<ObjectName, (InvalidField, bool)>,
    trigger: Option<SystemTime>,
    revisions: BTreeMap<&'static str, String>,
}

impl Batch {
    fn upsert(&mut self, object: Object, told: bool, trigger: Option<SystemTime>) {
        match object {
            Object::Resource(resource) => self.resources.put(resource.key(), resource, told),
            Object::Node(node) => self.nodes.put(node.name.clone(), node, told),
        }
        self.trigger = match (self.trigger, trigger) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }

    fn remove(&mut self, sent: Sent) {
        match sent {
            Sent::Resource(key) => self.resources.take(key),
            Sent::Node(name) => self.nodes.take(name),
        }
    }

    /// Says nothing to the log: whoever keeps the quarantine does, once the last word is known.
    /// `told`: the object was in quarantine before, for another reason.
    pub(crate) fn quarantine(
        &mut self,
        object: ObjectName,
        fault: InvalidField,
        previous_in_force: bool,
        told: bool,
    ) {
        self.quarantine.put(object, (fault, previous_in_force), told);
    }

    pub(crate) fn release(&mut self, object: ObjectName) {
        self.quarantine.take(object);
    }

    /// How far the watch of `resource` has come.
    pub(crate) fn revision(&mut self, resource: &'static str, revision: String) {
        self.revisions.insert(resource, revision);
    }

    /// True where no object has changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.resources.0.is_empty() && self.nodes.0.is_empty() && self.quarantine.0.is_empty()
    }

    /// What was gathered since the last time, in an order that depends on nothing else;
    /// `None` where that is nothing.
    pub(crate) fn finish(&mut self) -> Option<Changes> {
        if self.is_empty() && self.revisions.is_empty() {
            return None;
        }
        let batch = std::mem::take(self);
        let mut changes = Changes { trigger: batch.trigger, ..Changes::default() };
        for (key, resource) in batch.resources.into_words() {
            match resource {
                Some(resource) => changes.upserts.push(resource),
                None => changes.removals.push(key),
            }
        }
        changes.nodes.extend(batch.nodes.into_words().map(|(name, node)| match node {
            Some(node) => NodeChange::Upsert(node),
            None => NodeChange::Remove(name.as_ref().to_owned()),
        }));
        changes.quarantine.extend(batch.quarantine.into_words().map(|(object, fault)| match fault {
            Some((fault, previous_in_force)) => QuarantineChange::Add { object, fault, previous_in_force },
            None => QuarantineChange::Remove(object),
        }));
        let revisions = batch.revisions.into_iter();
        changes.revisions.extend(revisions.map(|(resource, revision)| (resource.to_owned(), revision)));
        Some(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::Skip;
    use lockstep_model::NodeContext;

    fn node(name: &str, zone: &str) -> Object {
        Object::Node(NodeContext { zone: Some(zone.into()), ..NodeContext::unknown(name) })
    }

    fn fault(value: &str) -> InvalidField {
        InvalidField { field: "f".into(), value: value.into(), reason: "is wrong".into() }
    }

    /// One step of a life: what was read, of which incarnation.
    struct Life {
        tracker: Tracker,
        batch: Batch,
    }

    impl Life {
        fn new() -> Self {
            Self { tracker: Tracker::new("Node"), batch: Batch::default() }
        }

        fn read(&mut self, uid: &str, conversion: Conversion<Object>) {
            let reading = Reading { name: "n", uid: Some(uid), conversion, note: None, trigger: None };
            self.tracker.take(reading, &mut self.batch);
        }

        /// What a consumer is told: nodes, then quarantine, `!` = nothing of it is in force.
        fn told(&mut self) -> String {
            let changes = self.batch.finish().unwrap_or_default();
            let nodes = changes.nodes.iter().map(|node| match node {
                NodeChange::Upsert(node) => format!("+{}", node.zone.as_deref().unwrap_or_default()),
                NodeChange::Remove(_) => "-".to_owned(),
            });
            let quarantine = changes.quarantine.iter().map(|change| match change {
                QuarantineChange::Add { fault, previous_in_force, .. } => {
                    format!("q{}{}", fault.value, if *previous_in_force { "" } else { "!" })
                }
                QuarantineChange::Remove(_) => "ok".to_owned(),
            });
            nodes.chain(quarantine).collect::<Vec<_>>().join(" ")
        }
    }

    #[test]
    fn only_differences_are_told() {
        let mut life = Life::new();
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        assert_eq!(life.told(), "+a");
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        assert_eq!(life.told(), "");
        life.read("1", Ok(Outcome::Object(node("n", "b"))));
        life.read("1", Ok(Outcome::Object(node("n", "c"))));
        assert_eq!(life.told(), "+c", "the last word counts");
        life.read("1", Ok(Outcome::Skip(Skip::Headless)));
        assert_eq!(life.told(), "-");
        life.tracker.remove("n", &mut life.batch);
        assert_eq!(life.told(), "");
    }

    #[test]
    fn what_came_and_went_untold_stays_untold() {
        let mut life = Life::new();
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        life.read("1", Err(fault("x")));
        life.tracker.remove("n", &mut life.batch);
        assert_eq!(life.told(), "");
        life.read("2", Ok(Outcome::Object(node("n", "a"))));
        assert_eq!(life.told(), "+a");
        life.tracker.remove("n", &mut life.batch);
        life.read("3", Ok(Outcome::Object(node("n", "b"))));
        life.tracker.remove("n", &mut life.batch);
        assert_eq!(life.told(), "-", "it was told before");
    }

    #[test]
    fn a_fault_keeps_what_was_good() {
        let mut life = Life::new();
        life.read("1", Err(fault("x")));
        assert_eq!(life.told(), "qx!");
        life.read("1", Err(fault("x")));
        assert_eq!(life.told(), "");
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        assert_eq!(life.told(), "+a ok");
        life.read("1", Err(fault("y")));
        assert_eq!(life.told(), "qy");
        life.read("1", Err(fault("z")));
        assert_eq!(life.told(), "qz");
        life.tracker.remove("n", &mut life.batch);
        assert_eq!(life.told(), "- ok");
    }

    #[test]
    fn a_new_object_of_an_old_name_inherits_nothing() {
        let mut life = Life::new();
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        assert_eq!(life.told(), "+a");
        life.read("2", Err(fault("x")));
        assert_eq!(life.told(), "- qx!");
    }

    #[test]
    fn a_list_takes_away_what_it_does_not_have_once_it_is_complete() {
        let mut life = Life::new();
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        assert_eq!(life.told(), "+a");
        life.tracker.begin_list();
        assert_eq!(life.told(), "");
        life.tracker.begin_list();
        life.read("1", Ok(Outcome::Object(node("n", "a"))));
        life.tracker.end_list(&mut life.batch);
        assert_eq!(life.told(), "", "a list that breaks off and begins anew takes nothing");
        life.tracker.begin_list();
        life.read("1", Err(fault("x")));
        life.tracker.end_list(&mut life.batch);
        assert_eq!(life.told(), "qx", "what is broken is still there");
        life.tracker.begin_list();
        life.read("1", Err(fault("x")));
        life.tracker.end_list(&mut life.batch);
        assert_eq!(life.told(), "", "and stays there");
        life.tracker.begin_list();
        life.tracker.end_list(&mut life.batch);
        assert_eq!(life.told(), "- ok");
    }
}
