use std::collections::BTreeMap;
use std::time::SystemTime;

use lockstep_model::{Key, Resource};

/// Changes to publish as one transaction. A key is named once: the last word on it counts,
/// so merging the changes of a busy moment is nothing more than adding them up.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// `None` = the resource is gone.
    pub(crate) resources: BTreeMap<Key, Option<Resource>>,
    pub(crate) trigger: Option<SystemTime>,
    pub(crate) revisions: BTreeMap<String, String>,
}

impl Changes {
    /// Adds a new or changed resource.
    pub fn upsert(&mut self, resource: impl Into<Resource>) {
        let resource = resource.into();
        self.resources.insert(resource.key(), Some(resource));
    }

    /// Adds a removal.
    pub fn remove(&mut self, key: Key) {
        self.resources.insert(key, None);
    }

    /// States when the cause of these changes happened; the oldest statement counts.
    pub fn triggered(&mut self, at: SystemTime) {
        self.trigger = Some(self.trigger.map_or(at, |known| known.min(at)));
    }

    /// States how far one watch of the source has come.
    pub fn revision(&mut self, resource: impl Into<String>, version: impl Into<String>) {
        self.revisions.insert(resource.into(), version.into());
    }

    /// Adds what happened after these changes.
    pub fn merge(&mut self, later: Changes) {
        self.resources.extend(later.resources);
        self.revisions.extend(later.revisions);
        if let Some(at) = later.trigger {
            self.triggered(at);
        }
    }

    /// True where no resource is named.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// Number of resources named.
    pub fn len(&self) -> usize {
        self.resources.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lockstep_model::ServiceKey;

    use super::*;
    use crate::store::tests::service;

    #[test]
    fn the_last_word_on_a_key_and_the_oldest_cause_count() {
        let key = Key::Service(ServiceKey::new("a", "b"));
        let epoch = SystemTime::UNIX_EPOCH;
        let mut first = Changes::default();
        first.upsert(service("a", "b", 1));
        first.triggered(epoch + Duration::from_secs(2));
        let mut second = Changes::default();
        second.remove(key.clone());
        second.triggered(epoch + Duration::from_secs(1));
        first.merge(second);
        let Changes { resources, trigger, .. } = first;
        assert_eq!(resources.into_iter().collect::<Vec<_>>(), vec![(key, None)]);
        assert_eq!(trigger, Some(epoch + Duration::from_secs(1)));
    }
}
