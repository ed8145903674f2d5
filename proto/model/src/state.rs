use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::hash_map::EntryRef;
use hashbrown::{Equivalent, HashMap};

use crate::{Digest, EndpointSet, Key, Resource, Service, ServiceCidr, ServiceCidrKey, ServiceKey, Version};

/// A set of resources, most of them by Service, with its digest kept up to date: what a node holds and
/// what a view is made of. A change costs what it touches, never the size of the state.
#[derive(Debug, Clone, Default)]
pub struct State {
    entries: HashMap<ServiceKey, Entry>,
    service_cidrs: BTreeMap<ServiceCidrKey, (Version, Arc<ServiceCidr>)>,
    digest: Digest,
    resources: u64,
}

#[derive(Debug, Clone, Default)]
struct Entry {
    service: Option<(Version, Arc<Service>)>,
    /// Sorted by slice name.
    sets: Vec<(Version, Arc<EndpointSet>)>,
}

/// What a state holds of one Service.
#[derive(Debug, Clone, Copy, Default)]
pub struct Held<'a>(Option<&'a Entry>);

impl<'a> Held<'a> {
    /// The Service itself, if it is there: endpoints can be held without it.
    pub fn service(self) -> Option<&'a Arc<Service>> {
        Some(&self.0?.service.as_ref()?.1)
    }

    /// Its endpoint sets, sorted by slice name.
    pub fn endpoint_sets(self) -> impl Iterator<Item = &'a Arc<EndpointSet>> {
        self.0.into_iter().flat_map(|entry| &entry.sets).map(|(_, set)| set)
    }

    /// The set of a slice, with its version.
    pub fn endpoint_set(self, slice: &str) -> Option<(Version, &'a Arc<EndpointSet>)> {
        let entry = self.0?;
        let (version, set) = &entry.sets[entry.find(slice).ok()?];
        Some((*version, set))
    }
}

/// What putting a resource in did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// Nothing with its key was there.
    New,
    /// It is there in place of this one.
    Replaced(Version, Resource),
    /// The one with its key had the same version: nothing changed.
    Same,
}

/// A Service's key that is not made yet: looking up needs no allocation.
#[derive(Hash)]
struct Names<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl Equivalent<ServiceKey> for Names<'_> {
    fn equivalent(&self, key: &ServiceKey) -> bool {
        *key.name == *self.name && *key.namespace == *self.namespace
    }
}

impl State {
    /// The Service, if the state has it. A state can hold endpoints of a Service it does not have.
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        Some(&self.entries.get(key)?.service.as_ref()?.1)
    }

    /// Endpoint sets of a Service, sorted by slice name.
    pub fn endpoint_sets(&self, key: &ServiceKey) -> impl Iterator<Item = &Arc<EndpointSet>> {
        self.entries.get(key).into_iter().flat_map(|entry| &entry.sets).map(|(_, set)| set)
    }

    /// Everything held of a Service, looked up once.
    pub fn held(&self, key: &ServiceKey) -> Held<'_> {
        Held(self.entries.get(key))
    }

    /// The same by its names.
    pub fn held_by_names(&self, namespace: &str, name: &str) -> Held<'_> {
        Held(self.entries.get(&Names { namespace, name }))
    }

    /// Every ServiceCidr with its version, sorted by name.
    pub fn service_cidrs(&self) -> impl Iterator<Item = (Version, &Arc<ServiceCidr>)> {
        self.service_cidrs.values().map(|(version, cidr)| (*version, cidr))
    }

    /// Every Service that has a resource of any kind, in no order.
    pub fn service_keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.entries.keys()
    }

    /// Every resource, in no order.
    pub fn resources(&self) -> impl Iterator<Item = (Version, Resource)> {
        let cidrs = self.service_cidrs.values();
        let cidrs = cidrs.map(|(version, it)| (*version, Resource::ServiceCidr(it.clone())));
        let of_services = self.entries.values().flat_map(|entry| {
            let service = entry.service.iter().map(|(version, it)| (*version, Resource::Service(it.clone())));
            service
                .chain(entry.sets.iter().map(|(version, it)| (*version, Resource::EndpointSet(it.clone()))))
        });
        of_services.chain(cidrs)
    }

    /// A resource with its version.
    pub fn get(&self, key: &Key) -> Option<(Version, Resource)> {
        match key {
            Key::Service(key) => {
                let (version, service) = self.entries.get(key)?.service.as_ref()?;
                Some((*version, Resource::Service(service.clone())))
            }
            Key::EndpointSet(key) => {
                let (version, set) = self.held(&key.service).endpoint_set(&key.slice)?;
                Some((version, Resource::EndpointSet(set.clone())))
            }
            Key::ServiceCidr(key) => {
                let (version, cidr) = self.service_cidrs.get(key)?;
                Some((*version, Resource::ServiceCidr(cidr.clone())))
            }
        }
    }

    /// Digest over everything held.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Number of resources.
    pub fn len(&self) -> u64 {
        self.resources
    }

    /// True where nothing is held.
    pub fn is_empty(&self) -> bool {
        self.resources == 0
    }

    /// Puts a resource in, in place of the one with its key. False where that one had the
    /// same version: nothing changed. `version` is that of the canonical bytes the resource
    /// was sent in, which this does not check.
    pub fn upsert(&mut self, version: Version, resource: Resource) -> bool {
        self.put(version, resource) != Put::Same
    }

    /// The same, and says what was there before.
    pub fn put(&mut self, version: Version, resource: Resource) -> Put {
        let key = resource.key();
        let old = match resource {
            Resource::Service(service) => self
                .entry(&service.key)
                .service
                .replace((version, service))
                .map(|(version, service)| (version, Resource::Service(service))),
            Resource::EndpointSet(set) => {
                let entry = self.entry(&set.key.service);
                match entry.find(&set.key.slice) {
                    Ok(at) => {
                        let (version, set) = std::mem::replace(&mut entry.sets[at], (version, set));
                        Some((version, Resource::EndpointSet(set)))
                    }
                    Err(at) => {
                        entry.sets.insert(at, (version, set));
                        None
                    }
                }
            }
            Resource::ServiceCidr(cidr) => self
                .service_cidrs
                .insert(cidr.key.clone(), (version, cidr))
                .map(|(version, cidr)| (version, Resource::ServiceCidr(cidr))),
        };
        if let Some((old, _)) = &old {
            if *old == version {
                return Put::Same;
            }
            self.digest.remove(&key, *old);
        } else {
            self.resources += 1;
        }
        self.digest.add(&key, version);
        old.map_or(Put::New, |(version, resource)| Put::Replaced(version, resource))
    }

    /// Takes a resource out. False where the state does not have it.
    pub fn remove(&mut self, key: &Key) -> bool {
        let old = match key {
            Key::Service(key) => self.take(key, |entry| entry.service.take().map(|(version, _)| version)),
            Key::EndpointSet(key) => {
                self.take(&key.service, |entry| entry.find(&key.slice).ok().map(|at| entry.sets.remove(at).0))
            }
            Key::ServiceCidr(key) => self.service_cidrs.remove(key).map(|(version, _)| version),
        };
        let Some(old) = old else { return false };
        self.digest.remove(key, old);
        self.resources -= 1;
        true
    }

    /// The entry of a Service, made where there is none.
    fn entry(&mut self, key: &ServiceKey) -> &mut Entry {
        match self.entries.entry_ref(key) {
            EntryRef::Occupied(occupied) => occupied.into_mut(),
            EntryRef::Vacant(vacant) => vacant.insert_with_key(key.clone(), Entry::default()),
        }
    }

    /// Takes something out of the entry of a Service, which goes with the last of it.
    fn take<T>(&mut self, key: &ServiceKey, out: impl FnOnce(&mut Entry) -> Option<T>) -> Option<T> {
        let EntryRef::Occupied(mut occupied) = self.entries.entry_ref(key) else { return None };
        let entry = occupied.get_mut();
        let taken = out(entry);
        if entry.service.is_none() && entry.sets.is_empty() {
            occupied.remove();
        }
        taken
    }
}

impl Entry {
    fn find(&self, slice: &str) -> Result<usize, usize> {
        self.sets.binary_search_by(|(_, set)| (*set.key.slice).cmp(slice))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{EndpointSetKey, Family};

    fn set(service: u8, slice: u8) -> EndpointSet {
        let service = ServiceKey::new("default", format!("s{service}"));
        let key = EndpointSetKey::new(service, format!("x{slice}"));
        EndpointSet { key, family: Family::V4, ports: Vec::new(), endpoints: Vec::new() }
    }

    fn cidr(name: &str) -> ServiceCidr {
        let key = ServiceCidrKey(name.into());
        ServiceCidr { key, cidrs: vec!["10.96.0.0/12".parse().unwrap()] }
    }

    fn version(number: u8) -> Version {
        Version([number; 16])
    }

    #[test]
    fn a_state_knows_what_it_holds() {
        let mut state = State::default();
        assert!(state.is_empty());
        assert!(state.upsert(version(1), set(1, 2).into()));
        assert!(state.upsert(version(1), set(1, 1).into()));
        assert!(!state.upsert(version(1), set(1, 1).into()), "the same version again");
        let service = &set(1, 1).key.service;
        let slices: Vec<_> = state.endpoint_sets(service).map(|set| set.key.slice.to_string()).collect();
        assert_eq!(slices, ["x1", "x2"], "sorted");
        assert_eq!(state.held(service).endpoint_set("x1").map(|(version, _)| version), Some(version(1)));
        let by_names = state.held_by_names("default", "s1");
        assert!(by_names.endpoint_set("x2").is_some() && by_names.endpoint_set("x3").is_none());
        assert!(state.held_by_names("default", "s2").endpoint_sets().next().is_none());
        let again = state.clone().put(version(2), set(1, 1).into());
        assert_eq!(again, Put::Replaced(version(1), set(1, 1).into()));
        assert_eq!(state.service(service), None, "endpoints without their Service");
        assert_eq!((state.len(), state.service_keys().count(), state.resources().count()), (2, 1, 2));

        let key = Key::EndpointSet(set(1, 1).key);
        assert_eq!(state.get(&key).map(|(version, _)| version), Some(version(1)));
        assert!(state.remove(&key) && !state.remove(&key));
        assert!(!state.remove(&Key::Service(service.clone())), "not there, though its endpoints are");
        assert!(state.remove(&Key::EndpointSet(set(1, 2).key)));
        assert_eq!((state.digest(), state.service_keys().count()), (Digest::EMPTY, 0));
    }

    #[test]
    fn what_belongs_to_no_service_is_held_by_its_own_name() {
        let mut state = State::default();
        assert!(state.upsert(version(1), set(1, 1).into()));
        let before = state.digest();
        assert!(state.upsert(version(1), cidr("b").into()) && state.upsert(version(1), cidr("a").into()));
        let names: Vec<_> = state.service_cidrs().map(|(_, cidr)| cidr.key.0.to_string()).collect();
        assert_eq!(names, ["a", "b"], "sorted");
        assert_eq!((state.len(), state.resources().count(), state.service_keys().count()), (3, 3, 1));
        let key = Key::ServiceCidr(cidr("a").key);
        assert_eq!(state.get(&key), Some((version(1), cidr("a").into())));
        assert_eq!(state.put(version(2), cidr("a").into()), Put::Replaced(version(1), cidr("a").into()));
        assert!(state.remove(&key) && !state.remove(&key));
        assert!(state.remove(&Key::ServiceCidr(cidr("b").key)));
        assert_eq!((state.digest(), state.len()), (before, 1));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Upsert(u8, u8, u8),
        Remove(u8, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..4u8, 0..4u8, 0..3u8).prop_map(|(service, slice, version)| Step::Upsert(service, slice, version)),
            1 => (0..4u8, 0..4u8).prop_map(|(service, slice)| Step::Remove(service, slice)),
        ]
    }

    proptest! {
        #[test]
        fn digest_depends_on_the_content_alone(history in prop::collection::vec(step(), 0..60), seed: u64) {
            let mut lived = State::default();
            let mut expected = HashMap::new();
            for step in &history {
                match *step {
                    Step::Upsert(service, slice, number) => {
                        let before = expected.insert((service, slice), number);
                        let changed = lived.upsert(version(number), set(service, slice).into());
                        prop_assert_eq!(changed, before != Some(number));
                    }
                    Step::Remove(service, slice) => {
                        let there = expected.remove(&(service, slice)).is_some();
                        prop_assert_eq!(lived.remove(&Key::EndpointSet(set(service, slice).key)), there);
                    }
                }
            }
            let mut content: Vec<_> = expected.into_iter().collect();
            content.sort_by_key(|((service, slice), _)| seed.rotate_left(u32::from(service * 16 + slice)));
            let mut fresh = State::default();
            for ((service, slice), number) in content {
                fresh.upsert(version(number), set(service, slice).into());
            }
            prop_assert_eq!(lived.digest(), fresh.digest());
            prop_assert_eq!(lived.len(), fresh.len());
            prop_assert_eq!(lived.resources().count() as u64, lived.len());
        }
    }
}
