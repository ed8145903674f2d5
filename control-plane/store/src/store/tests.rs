use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;

use lockstep_model::{
    Conditions, Endpoint, EndpointPatch, EndpointPort, EndpointSet, Family, Protocol, Service, ServiceCidr,
    ServiceCidrKey, ServicePort, ServiceType, State, TrafficPolicy,
};
use proptest::prelude::*;

use super::*;

pub(crate) fn port(number: u16) -> lockstep_model::Port {
    NonZeroU16::new(number).unwrap()
}

/// A Service whose content depends on `variant`.
pub(crate) fn service(namespace: &str, name: &str, variant: u8) -> Service {
    Service {
        key: ServiceKey::new(namespace, name),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![IpAddr::V4(Ipv4Addr::new(10, 96, 0, variant))],
        external_ips: Vec::new(),
        load_balancer_ingress: Vec::new(),
        ports: vec![ServicePort {
            protocol: Protocol::Tcp,
            port: port(80),
            name: "http".into(),
            node_port: None,
            app_protocol: None,
        }],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        traffic_distribution: None,
        client_ip_affinity_seconds: None,
        load_balancer_source_ranges: Vec::new(),
        health_check_node_port: None,
        publish_not_ready_addresses: false,
    }
}

/// A ServiceCidr whose content depends on `variant`.
pub(crate) fn cidr(name: u8, variant: u8) -> ServiceCidr {
    let cidrs = vec![format!("10.{variant}.0.0/16").parse().unwrap()];
    ServiceCidr { key: ServiceCidrKey(format!("r{name}").into()), cidrs }
}

/// An endpoint set with these last address bytes; odd ones are not ready.
pub(crate) fn set(namespace: &str, name: &str, slice: &str, addresses: &[u8]) -> EndpointSet {
    let mut set = EndpointSet {
        key: EndpointSetKey::new(ServiceKey::new(namespace, name), slice),
        family: Family::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints: addresses
            .iter()
            .map(|last| Endpoint {
                address: IpAddr::V4(Ipv4Addr::new(10, 1, 0, *last)),
                node_name: Some("n1".into()),
                zone: None,
                conditions: Conditions { ready: last % 2 == 0, ..Conditions::READY },
                hints: None,
            })
            .collect(),
    };
    set.canonicalise();
    set
}

fn store() -> Store {
    Store::new(NonZeroU64::new(7).unwrap(), Instant::now())
}

fn upsert(resource: impl Into<Resource>) -> Changes {
    let mut changes = Changes::default();
    changes.upsert(resource);
    changes
}

fn remove(key: Key) -> Changes {
    let mut changes = Changes::default();
    changes.remove(key);
    changes
}

/// What a client does with a delta.
fn replay(state: &mut State, delta: &Delta, source: &HashMap<Version, Resource>) {
    for entry in &delta.upserts {
        state.upsert(entry.version, source[&entry.version].clone());
    }
    for key in &delta.removals {
        state.remove(key);
    }
    for patch in &delta.patches {
        let (base, old) = state.get(&Key::EndpointSet(patch.key.clone())).unwrap();
        assert_eq!(base, patch.base, "the patch of {} starts from what the client holds", patch.key);
        let Resource::EndpointSet(old) = old else { panic!("{} is an endpoint set", patch.key) };
        let new = Resource::from(old.patched(EndpointPatch::clone(&patch.patch)));
        assert_eq!(new.version(), patch.version);
        state.upsert(patch.version, new);
    }
}

#[test]
fn a_change_that_changes_nothing_publishes_nothing() {
    let mut store = store();
    assert_eq!(store.apply(Changes::default(), Instant::now()), None);
    assert_eq!(store.apply(upsert(service("a", "b", 1)), Instant::now()), Some(1));
    let head = store.head();
    assert_eq!(store.apply(upsert(service("a", "b", 1)), Instant::now()), None);
    assert_eq!(store.apply(remove(Key::Service(ServiceKey::new("x", "y"))), Instant::now()), None);
    assert_eq!(store.head(), head);
    assert_eq!(store.apply(upsert(service("a", "b", 2)), Instant::now()), Some(2));
}

#[test]
fn an_empty_state_is_published_once() {
    let mut store = store();
    assert_eq!((store.begin(Instant::now()), store.begin(Instant::now())), (1, 1));
    assert_eq!((store.head().digest, store.head().seq), (Digest::EMPTY, 1));
    assert_eq!(store.seq_of(Digest::EMPTY), Some(1));
    assert_eq!(store.apply(upsert(service("a", "b", 1)), Instant::now()), Some(2));
    assert_eq!(store.begin(Instant::now()), 2);
}

#[test]
fn a_patch_is_sent_only_to_who_holds_the_version_before() {
    let mut store = store();
    store.apply(upsert(set("a", "b", "s", &[2, 4, 6, 8])), Instant::now());
    store.apply(upsert(set("a", "b", "s", &[2, 4, 6, 10])), Instant::now());
    store.apply(upsert(service("a", "b", 1)), Instant::now());
    let kinds = |from, patches| {
        let delta = store.delta(from, patches).unwrap();
        (delta.upserts.len(), delta.patches.len())
    };
    assert_eq!(kinds(0, true), (2, 0), "held nothing");
    assert_eq!(kinds(1, true), (1, 1), "held the version before");
    assert_eq!(kinds(1, false), (2, 0), "does not understand patches");
    assert_eq!(kinds(2, true), (1, 0), "holds the version already");
    assert!(store.delta(4, true).is_none(), "has not happened");
}

#[test]
fn a_cursor_before_a_forgotten_removal_gets_no_delta() {
    let now = Instant::now();
    let mut store = Store::with_limits(NonZeroU64::new(7).unwrap(), now, 4, 2);
    for name in ["a", "b", "c"] {
        store.apply(upsert(service("n", name, 1)), now);
    }
    for name in ["a", "b", "c"] {
        store.apply(remove(Key::Service(ServiceKey::new("n", name))), now);
    }
    assert!(store.delta(3, true).is_none(), "may still hold n/a, whose removal (4) is forgotten");
    assert_eq!(store.delta(4, true).unwrap().removals.len(), 2);
    assert_eq!(store.apply(upsert(service("n", "d", 1)), now), Some(7), "its slot is used again");
    assert_eq!(store.delta(4, true).unwrap().upserts.len(), 1);
    assert_eq!(store.snapshot().entries.len(), 1);
}

#[test]
fn a_removal_can_be_waited_for_as_long_as_it_is_remembered() {
    let now = Instant::now();
    let mut store = Store::with_limits(NonZeroU64::new(7).unwrap(), now, 4, 2);
    let key = ServiceKey::new("n", "a");
    assert_eq!(store.last_changed(&key), None, "never heard of");
    store.apply(upsert(service("n", "a", 1)), now);
    store.apply(upsert(set("n", "a", "a-1", &[1])), now);
    store.apply(remove(Key::Service(key.clone())), now);
    let slice = Key::EndpointSet(EndpointSetKey::new(key.clone(), "a-1"));
    assert_eq!(store.apply(remove(slice), now), Some(4));
    assert_eq!(store.last_changed(&key), Some(4), "the last of it went");
    assert!(store.service(&key).is_none());
    assert_eq!((store.services(None, None).count(), store.snapshot().entries.len()), (0, 0));
    for name in ["b", "c"] {
        store.apply(upsert(service("n", name, 1)), now);
        store.apply(remove(Key::Service(ServiceKey::new("n", name))), now);
    }
    assert_eq!(store.last_changed(&key), None, "forgotten with its last removal");
    store.apply(upsert(service("n", "a", 1)), now);
    assert_eq!(store.last_changed(&key), Some(9), "and back again");
}

#[test]
fn a_removal_is_forgotten_when_the_key_comes_back() {
    let mut store = store();
    store.apply(upsert(service("a", "b", 1)), Instant::now());
    store.apply(remove(Key::Service(ServiceKey::new("a", "b"))), Instant::now());
    store.apply(upsert(service("a", "b", 1)), Instant::now());
    let delta = store.delta(0, true).unwrap();
    assert_eq!((delta.upserts.len(), delta.removals.len()), (1, 0));
    assert_eq!(store.seq_of(store.head().digest), Some(3), "of equal states the newest counts");
}

#[test]
fn digests_are_remembered_for_as_long_as_the_ring_is() {
    let now = Instant::now();
    let mut store = Store::with_limits(NonZeroU64::new(7).unwrap(), now, 4, 100);
    let digests: Vec<Digest> = (0..10)
        .map(|variant| {
            store.apply(upsert(service("a", "b", variant)), now);
            store.head().digest
        })
        .collect();
    let known: Vec<Option<u64>> = digests.iter().map(|digest| store.seq_of(*digest)).collect();
    assert_eq!(known[..6], [None; 6]);
    assert_eq!(known[6..], [Some(7), Some(8), Some(9), Some(10)]);
    assert_eq!(store.position_at(6), None);
    assert_eq!(store.position_at(10), Some(store.head()));
}

#[test]
fn the_oldest_cause_is_named_only_where_all_are_known() {
    let now = Instant::now();
    let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let mut store = Store::with_limits(NonZeroU64::new(7).unwrap(), now, 3, 100);
    for (variant, cause) in [(1, 30), (2, 10), (3, 20), (4, 40)] {
        let mut changes = upsert(service("a", "b", variant));
        changes.triggered(at(cause));
        store.apply(changes, now);
    }
    assert_eq!(store.delta(3, true).unwrap().trigger, Some(at(40)));
    assert_eq!(store.delta(1, true).unwrap().trigger, Some(at(10)));
    assert_eq!(store.delta(0, true).unwrap().trigger, None, "transaction 1 is forgotten");
    assert_eq!(store.delta(4, true).unwrap().trigger, None, "nothing to be caused");
}

#[test]
fn services_are_counted_and_paged_in_order() {
    let mut store = store();
    for (namespace, name) in [("b", "x"), ("a", "z"), ("a", "y"), ("c", "w")] {
        store.apply(upsert(service(namespace, name, 1)), Instant::now());
    }
    store.apply(upsert(set("a", "z", "s1", &[2, 3])), Instant::now());
    store.apply(upsert(set("a", "z", "s2", &[2, 4])), Instant::now());
    store.apply(upsert(set("a", "orphan", "s", &[2])), Instant::now());
    let names = |namespace: Option<&str>, after: Option<&ServiceKey>| -> Vec<String> {
        store.services(namespace, after).map(|entry| entry.service.key.to_string()).collect()
    };
    assert_eq!(names(None, None), ["a/y", "a/z", "b/x", "c/w"]);
    assert_eq!(names(Some("a"), None), ["a/y", "a/z"]);
    assert_eq!(names(Some("b"), Some(&ServiceKey::new("a", "y"))), ["b/x"]);
    assert_eq!(names(None, Some(&ServiceKey::new("a", "z"))), ["b/x", "c/w"]);
    let view = store.service(&ServiceKey::new("a", "z")).unwrap();
    assert_eq!((view.summary.ready_endpoints, view.summary.total_endpoints), (2, 3));
    assert_eq!(view.summary.last_changed_seq, 6);
    assert_eq!(view.sets.len(), 2);
    assert!(store.service(&ServiceKey::new("a", "orphan")).is_none());
    let key = Key::parse(Kind::EndpointSet, "a/z/s1").unwrap();
    store.apply(remove(key), Instant::now());
    assert_eq!(store.last_changed(&ServiceKey::new("a", "z")), Some(8), "a removal is a change");
}

#[test]
fn what_belongs_to_no_service_is_served_and_counted_beside_the_rest() {
    let mut store = Store::new(NonZeroU64::new(7).unwrap(), Instant::now());
    store.apply(upsert(cidr(1, 1)), Instant::now());
    store.apply(upsert(service("a", "b", 1)), Instant::now());
    store.apply(upsert(cidr(0, 1)), Instant::now());
    let keys: Vec<_> = store.snapshot().entries.iter().map(|entry| entry.key.to_string()).collect();
    assert_eq!(keys, ["a/b", "r0", "r1"], "by kind and key");
    assert_eq!((store.resource_count(Kind::ServiceCidr), store.head().resources), (2, 3));
    let before = store.seq_of(store.head().digest).unwrap();
    store.apply(remove(Key::ServiceCidr(cidr(1, 1).key)), Instant::now());
    assert_eq!(store.delta(before, true).unwrap().removals, [Key::ServiceCidr(cidr(1, 1).key)]);
    assert_eq!(store.last_changed(&ServiceKey::new("a", "b")), Some(2), "no Service has changed");
    assert_eq!((store.resource_count(Kind::ServiceCidr), store.snapshot().entries.len()), (1, 2));
}

#[derive(Debug, Clone)]
enum Step {
    Service(u8, u8),
    Set(u8, u8, Vec<u8>),
    RemoveService(u8),
    RemoveSet(u8, u8),
    Cidr(u8, u8),
    RemoveCidr(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..5u8, 0..3u8).prop_map(|(name, variant)| Step::Service(name, variant)),
        (0..5u8, 0..2u8, prop::collection::vec(0..12u8, 0..10)).prop_map(|(n, s, a)| Step::Set(n, s, a)),
        (0..5u8).prop_map(Step::RemoveService),
        (0..5u8, 0..2u8).prop_map(|(name, slice)| Step::RemoveSet(name, slice)),
        (0..2u8, 0..3u8).prop_map(|(name, variant)| Step::Cidr(name, variant)),
        (0..2u8).prop_map(Step::RemoveCidr),
    ]
}

fn changes(steps: &[Step]) -> Changes {
    let mut changes = Changes::default();
    for step in steps {
        match step {
            Step::Service(name, variant) => changes.upsert(service("n", &format!("s{name}"), *variant)),
            Step::Set(name, slice, addresses) => {
                changes.upsert(set("n", &format!("s{name}"), &format!("e{slice}"), addresses));
            }
            Step::Cidr(name, variant) => changes.upsert(cidr(*name, *variant)),
            Step::RemoveCidr(name) => changes.remove(Key::ServiceCidr(cidr(*name, 0).key)),
            Step::RemoveService(name) => {
                changes.remove(Key::Service(ServiceKey::new("n", format!("s{name}"))))
            }
            Step::RemoveSet(name, slice) => changes.remove(Key::EndpointSet(EndpointSetKey::new(
                ServiceKey::new("n", format!("s{name}")),
                format!("e{slice}"),
            ))),
        }
    }
    changes
}

/// What every client could have stopped at, and every content ever published.
#[derive(Default)]
struct Seen {
    states: Vec<State>,
    resources: HashMap<Version, Resource>,
}

fn play(store: &mut Store, history: &[Vec<Step>]) -> Seen {
    let mut seen = Seen { states: vec![State::default()], ..Seen::default() };
    let mut state = State::default();
    for steps in history {
        let named = changes(steps).resources;
        for (key, resource) in named {
            match resource {
                Some(resource) => {
                    seen.resources.insert(resource.version(), resource.clone());
                    state.upsert(resource.version(), resource);
                }
                None => {
                    state.remove(&key);
                }
            }
        }
        if store.apply(changes(steps), Instant::now()).is_some() {
            seen.states.push(state.clone());
        }
    }
    seen
}

proptest! {
    #[test]
    fn a_delta_from_any_cursor_leads_to_the_head(
        history in prop::collection::vec(prop::collection::vec(step(), 1..5), 0..30),
        tombstones in 0..6usize,
        patches: bool,
    ) {
        let mut store = Store::with_limits(NonZeroU64::new(7).unwrap(), Instant::now(), 8, tombstones);
        let seen = play(&mut store, &history);
        let head = store.head();
        prop_assert_eq!(head.seq + 1, seen.states.len() as u64);
        let mut deltas = 0;
        for (from, held) in seen.states.iter().enumerate() {
            let Some(delta) = store.delta(from as u64, patches) else {
                prop_assert_eq!(deltas, 0, "a newer cursor never knows less");
                continue;
            };
            deltas += 1;
            let mut state = held.clone();
            replay(&mut state, &delta, &seen.resources);
            prop_assert_eq!(state.digest(), head.digest);
            prop_assert_eq!(state.len(), head.resources);
        }
        prop_assert!(deltas > 0, "the head itself is always a cursor");
    }

    #[test]
    fn a_remembered_digest_is_as_good_as_a_cursor(
        history in prop::collection::vec(prop::collection::vec(step(), 1..3), 1..30),
    ) {
        let mut store = Store::with_limits(NonZeroU64::new(7).unwrap(), Instant::now(), 1_024, 1_024);
        let seen = play(&mut store, &history);
        for held in &seen.states {
            let seq = store.seq_of(held.digest()).expect("every state of a short history is remembered");
            let mut state = held.clone();
            replay(&mut state, &store.delta(seq, true).unwrap(), &seen.resources);
            prop_assert_eq!(state.digest(), store.head().digest);
        }
    }

    #[test]
    fn the_state_does_not_depend_on_how_it_came_about(
        history in prop::collection::vec(prop::collection::vec(step(), 1..5), 0..30),
    ) {
        let mut first = Store::with_limits(NonZeroU64::new(7).unwrap(), Instant::now(), 8, 3);
        let seen = play(&mut first, &history);
        let last = seen.states.last().unwrap();
        let mut all: Vec<(Version, Resource)> = last.resources().collect();
        all.sort_by_key(|(version, _)| *version);
        let mut changes = Changes::default();
        all.into_iter().for_each(|(_, resource)| changes.upsert(resource));
        let mut second = Store::new(NonZeroU64::new(8).unwrap(), Instant::now());
        second.apply(changes, Instant::now());
        prop_assert_eq!(first.head().digest, second.head().digest);
        let listing = |store: &Store| -> Vec<(Key, Version, Bytes)> {
            store.snapshot().entries.into_iter().map(|entry| (entry.key, entry.version, entry.body)).collect()
        };
        prop_assert_eq!(listing(&first), listing(&second));
        for kind in Kind::ALL {
            prop_assert_eq!(first.resource_count(kind), second.resource_count(kind));
        }
        for (_, resource) in last.resources() {
            prop_assert_eq!(first.get(&resource.key()).unwrap().version, resource.version());
        }
    }
}
