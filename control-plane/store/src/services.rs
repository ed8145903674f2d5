//! What people ask about Services.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use lockstep_model::{Key, Resource, Service, ServiceKey, Version};

use crate::store::Store;

/// The slots of one Service in the store. Stays while the store remembers a removal of them, so
/// that a removal can be waited for.
#[derive(Debug, Default)]
pub(crate) struct Members {
    pub(crate) service: Option<u32>,
    /// Sorted by slice name.
    pub(crate) sets: Vec<u32>,
    /// seq of the last change to any of them, removals included.
    pub(crate) last_changed: u64,
}

/// One Service, counted.
#[derive(Debug, Clone)]
pub struct PageEntry {
    /// The Service.
    pub service: Arc<Service>,
    /// Ready endpoints: distinct addresses over all sets.
    pub ready_endpoints: u32,
    /// All endpoints, counted the same way.
    pub total_endpoints: u32,
    /// seq of the last change to the Service or one of its endpoint sets.
    pub last_changed_seq: u64,
}

/// One Service with everything that belongs to it.
#[derive(Debug, Clone)]
pub struct ServiceView {
    /// Version of the Service; the Service itself is in the summary.
    pub version: Version,
    /// Its endpoint sets, sorted by slice name.
    pub sets: Vec<(Version, Resource)>,
    /// The same, counted.
    pub summary: PageEntry,
}

impl Store {
    /// Services sorted by namespace and name, after `after`, of one namespace or of all.
    /// Costs what is taken from the iterator.
    pub fn services<'a>(
        &'a self,
        namespace: Option<&'a str>,
        after: Option<&ServiceKey>,
    ) -> impl Iterator<Item = PageEntry> + 'a {
        let from_namespace = namespace.map(|namespace| ServiceKey::new(namespace, ""));
        let start = match (after.cloned(), from_namespace) {
            (Some(after), Some(first)) if after < first => Bound::Included(first),
            (Some(after), _) => Bound::Excluded(after),
            (None, Some(first)) => Bound::Included(first),
            (None, None) => Bound::Unbounded,
        };
        self.by_service
            .range((start, Bound::Unbounded))
            .take_while(move |(key, _)| namespace.is_none_or(|namespace| &*key.namespace == namespace))
            .filter_map(|(_, members)| self.count(members))
    }

    /// One Service with its endpoint sets; `None` where the state does not have the Service
    /// itself.
    pub fn service(&self, key: &ServiceKey) -> Option<ServiceView> {
        let members = self.by_service.get(key)?;
        Some(ServiceView {
            version: self.versioned(members.service?)?.0,
            sets: members.sets.iter().filter_map(|slot| self.versioned(*slot)).collect(),
            summary: self.count(members)?,
        })
    }

    /// seq of the last change to a Service or its endpoint sets, their removal included; `None`
    /// where the state has none of them and remembers none.
    pub fn last_changed(&self, key: &ServiceKey) -> Option<u64> {
        self.by_service.get(key).map(|members| members.last_changed)
    }

    fn count(&self, members: &Members) -> Option<PageEntry> {
        let Some(Resource::Service(service)) = self.resource(members.service?) else { return None };
        let mut addresses: HashMap<IpAddr, bool> = HashMap::new();
        for slot in &members.sets {
            if let Some(Resource::EndpointSet(set)) = self.resource(*slot) {
                for endpoint in &set.endpoints {
                    *addresses.entry(endpoint.address).or_default() |= endpoint.conditions.ready;
                }
            }
        }
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Some(PageEntry {
            service: service.clone(),
            ready_endpoints: count(addresses.values().filter(|ready| **ready).count()),
            total_endpoints: count(addresses.len()),
            last_changed_seq: members.last_changed,
        })
    }

    /// Files a slot under its Service.
    pub(crate) fn join_service(&mut self, slot: u32, seq: u64) {
        let key = self.key(slot).clone();
        let Some(service) = key.service() else { return };
        let mut members = self.by_service.remove(service).unwrap_or_default();
        if matches!(key, Key::Service(_)) {
            members.service = Some(slot);
        } else if let Err(at) = members.sets.binary_search_by(|other| self.key(*other).cmp(&key)) {
            members.sets.insert(at, slot);
        }
        members.last_changed = seq;
        self.by_service.insert(service.clone(), members);
    }

    /// Takes a slot out again.
    pub(crate) fn leave_service(&mut self, slot: u32, seq: u64) {
        let key = self.key(slot).clone();
        let Some(members) = key.service().and_then(|service| self.by_service.get_mut(service)) else {
            return;
        };
        members.last_changed = seq;
        if matches!(key, Key::Service(_)) {
            members.service = None;
        } else {
            members.sets.retain(|other| *other != slot);
        }
    }

    /// The removal at `seq` of a key is not remembered any more. Removals are forgotten in their
    /// order, so where it was the last change, nothing of the Service is left.
    pub(crate) fn forget_in_service(&mut self, service: &ServiceKey, seq: u64) {
        let gone = |members: &Members| members.service.is_none() && members.sets.is_empty();
        if self.by_service.get(service).is_some_and(|members| gone(members) && members.last_changed <= seq) {
            self.by_service.remove(service);
        }
    }
}
