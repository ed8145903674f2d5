//! The backend on a kernel in memory: failures, isolation, histories. Needs no root.
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::collections::BTreeMap;

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::Errno;
use lockstep_kernel::nf_tables::fake::{FakeKernel, Fault};
use lockstep_kernel::nf_tables::{Batch, Chain, Family, Lifetime};
use lockstep_model::Protocol;
use lockstep_view::backend::FailureKind;
use lockstep_view::{Backend, ForwardingPlan};
use proptest::prelude::*;
use support::*;

fn synced(plan: &ForwardingPlan) -> Nftables<FakeKernel> {
    let mut backend = Nftables::new(FakeKernel::new());
    assert_eq!(backend.sync(plan).unwrap().failures, []);
    assert_eq!(backend.verify().unwrap(), []);
    backend
}

/// A Service with one cluster IP, 10.96.1.N, and these pods.
fn small(n: u8, pods: &[u8]) -> std::sync::Arc<lockstep_view::ServicePlan> {
    let targets = pods.iter().map(|pod| target(&format!("10.244.0.{pod}"), 80)).collect();
    let mut frontend = cluster_ip(&format!("10.96.1.{n}"), 80);
    if pods.is_empty() {
        let reject = lockstep_view::Action::Reject;
        (frontend.from_pod, frontend.from_node, frontend.from_elsewhere) = (reject, reject, reject);
    }
    service(&format!("s{n}"), vec![port_plan(Protocol::Tcp, 80, targets, vec![frontend])])
}

/// Key of the first endpoint of `small(n)` in the map of endpoints.
fn endpoint_key(n: u8, index: u32) -> Vec<u8> {
    [&[10, 96, 1, n, 6, 0, 0, 0, 0, 80, 0, 0][..], &index.to_ne_bytes()].concat()
}

#[test]
fn the_same_plan_again_writes_nothing() {
    let plan = every_shape();
    let mut backend = synced(&plan);
    let commits = backend.netfilter_mut().commits();
    assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
    let all: Vec<_> = plan.services.keys().cloned().collect();
    assert_eq!(backend.apply(&plan, &all).unwrap().objects_changed, 0);
    assert_eq!(backend.netfilter_mut().commits(), commits);
}

#[test]
fn a_replaced_endpoint_is_one_element_out_and_one_in() {
    let mut plan = plan([small(1, &[1, 2, 3]), small(2, &[4])]);
    let mut backend = synced(&plan);
    plan.services.insert(key("s1"), small(1, &[1, 3, 9]));
    assert_eq!(backend.apply(&plan, &[key("s1")]).unwrap().objects_changed, 2);
    assert_eq!(backend.verify().unwrap(), []);
}

#[test]
fn the_rest_of_a_cluster_ip_moves_with_one_element_out_and_one_in() {
    let with = |first: &[&str], second: &[&str]| {
        let mut services = [small(1, &[1]), small(2, &[2])];
        for (service, ips) in services.iter_mut().zip([first, second]) {
            std::sync::Arc::make_mut(service).cluster_ips = ips.iter().map(|address| ip(address)).collect();
        }
        plan(services)
    };
    let mut backend = synced(&with(&["10.96.1.1"], &["10.96.1.2"]));
    let both = [key("s1"), key("s2")];
    let taken = with(&["10.96.1.1", "10.96.1.2"], &[]);
    assert_eq!(backend.apply(&taken, &both).unwrap().objects_changed, 2);
    assert_eq!(backend.verify().unwrap(), []);
    let mut gone = with(&[], &["10.96.1.2"]);
    gone.services.remove(&key("s1"));
    backend.apply(&gone, &both).unwrap();
    let held = backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "cluster_ips");
    assert_eq!(held.keys().collect::<Vec<_>>(), [&vec![10, 96, 1, 2]]);
}

#[test]
fn a_change_of_the_service_cidrs_reads_nothing_and_writes_their_difference() {
    let mut plan = plan([small(1, &[1])]);
    let mut backend = synced(&plan);
    // It is there for the first dump, so a comparison would fail.
    backend.netfilter_mut().fail_once(Fault::Dump(Errno::NOMEM));
    plan.node.service_cidrs = ["10.96.0.0/13", "fd00:96::/112"].map(|cidr| cidr.parse().unwrap()).to_vec();
    plan.services.insert(key("s2"), small(2, &[2]));
    // A range out and a range in, of two elements each, and the three of a Service's.
    assert_eq!(backend.apply(&plan, &[key("s2")]).unwrap().objects_changed, 4 + 3);
    plan.node.service_cidrs.pop();
    assert_eq!(backend.apply(&plan, &[]).unwrap().objects_changed, 2);
    backend.verify().expect_err("the dump that fails");
    assert_eq!(backend.verify().unwrap(), []);
    assert_eq!(backend.apply(&plan, &[]).unwrap().objects_changed, 0);
    assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
}

#[test]
fn one_refused_service_keeps_its_version_and_hurts_nobody() {
    let mut plan = plan([small(1, &[1]), small(2, &[2])]);
    let mut backend = synced(&plan);
    backend.netfilter_mut().refuse_key(&endpoint_key(1, 1), Errno::NOMEM);
    plan.services.insert(key("s1"), small(1, &[1, 5]));
    plan.services.insert(key("s2"), small(2, &[2, 6]));
    plan.services.insert(key("s3"), small(3, &[3]));
    let applied = backend.apply(&plan, &[key("s1"), key("s2"), key("s3")]).unwrap();
    assert_eq!(applied.failures.len(), 1);
    let failure = &applied.failures[0];
    assert_eq!((&failure.service, failure.kind), (&key("s1"), FailureKind::Resources));
    assert!(failure.previous_in_force);
    assert_eq!(backend.verify().unwrap(), []);
    let endpoints = backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "endpoints");
    assert!(endpoints.contains_key(&endpoint_key(2, 1)) && endpoints.contains_key(&endpoint_key(3, 0)));
    assert!(endpoints.contains_key(&endpoint_key(1, 0)) && !endpoints.contains_key(&endpoint_key(1, 1)));

    // A full comparison reports it as well, and nothing else changes.
    let synced = backend.sync(&plan).unwrap();
    assert_eq!((synced.objects_changed, synced.failures.len()), (0, 1));
    // Once the kernel takes it, it is in force.
    backend.netfilter_mut().refuse_nothing();
    let healed = backend.sync(&plan).unwrap();
    assert_eq!(healed.failures, []);
    assert_eq!(backend.verify().unwrap(), []);
}

/// `small`, at 10.96.1.9, too.
fn with_nine(n: u8, pods: &[u8]) -> std::sync::Arc<lockstep_view::ServicePlan> {
    let mut service = (*small(n, pods)).clone();
    service.cluster_ips.push(ip("10.96.1.9"));
    service.ports[0].frontends.push(cluster_ip("10.96.1.9", 80));
    std::sync::Arc::new(service)
}

#[test]
fn a_service_that_is_left_out_pushes_nobody_out_who_is_given_its_address() {
    let before = || plan([with_nine(1, &[1]), small(2, &[2])]);
    let mut after = plan([small(1, &[1, 5]), with_nine(2, &[2])]);
    for (full, steps) in [
        (true, &[][..]),
        (false, &[&["s1", "s2"][..]]),
        // The one that loses it fails, and the other one comes later.
        (false, &[&["s1"], &["s2"]]),
    ] {
        let mut backend = synced(&before());
        backend.netfilter_mut().refuse_key(&endpoint_key(1, 1), Errno::NOMEM);
        let mut failures = Vec::new();
        if full {
            failures = backend.sync(&after).unwrap().failures;
        } else {
            // None of it is a full comparison, which this would fail.
            backend.netfilter_mut().fail_once(Fault::Dump(Errno::NOMEM));
        }
        let mut now = before();
        for step in steps {
            for name in *step {
                now.services.insert(key(name), after.services[&key(name)].clone());
            }
            let changed: Vec<_> = step.iter().map(|name| key(name)).collect();
            failures = backend.apply(&now, &changed).unwrap().failures;
            assert_eq!(backend.verify().unwrap(), []);
        }
        if !full {
            backend.sync(&after).expect_err("the dump that fails");
        }
        let failed: Vec<_> =
            failures.iter().map(|failure| (&failure.service, failure.previous_in_force)).collect();
        assert_eq!(failed, [(&key("s1"), true)], "{steps:?}");
        assert_eq!(backend.verify().unwrap(), []);
        let mut elements = |set| backend.netfilter_mut().elements(Family::Ipv4, "lockstep", set);
        assert_eq!(elements("cluster_ips").keys().map(|key| key[3]).collect::<Vec<_>>(), [1, 2, 9]);
        let endpoints = elements("endpoints");
        assert!(endpoints[&endpoint_key(9, 0)].windows(4).any(|bytes| bytes == [10, 244, 0, 2]));
        assert!(endpoints.contains_key(&endpoint_key(1, 0)));
        backend.netfilter_mut().refuse_nothing();
        assert_eq!(backend.apply(&after, &[key("s1")]).unwrap().failures, []);
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(backend.sync(&after).unwrap().objects_changed, 0);
    }
    // Where all it had is somebody else's, nothing of it is in force.
    let mut backend = synced(&plan([small(1, &[1])]));
    let mut moved = (*small(1, &[1])).clone();
    moved.key = key("s2");
    after.services.insert(key("s2"), std::sync::Arc::new(moved));
    after.services.insert(key("s1"), small(3, &[3]));
    backend.netfilter_mut().refuse_key(&endpoint_key(3, 0), Errno::NOMEM);
    let failures = backend.apply(&after, &[key("s1"), key("s2")]).unwrap().failures;
    assert_eq!(failures.len(), 1);
    assert_eq!((&failures[0].service, failures[0].previous_in_force), (&key("s1"), false));
    assert_eq!(backend.verify().unwrap(), []);
}

#[test]
fn a_refused_service_among_many_is_found_in_a_full_programming_too() {
    let many = plan((0..100).map(|n| small(n, &[n])));
    let mut backend = Nftables::new(FakeKernel::new());
    backend.netfilter_mut().refuse_key(&endpoint_key(42, 0), Errno::INVAL);
    let applied = backend.sync(&many).unwrap();
    let failed: Vec<_> = applied.failures.iter().map(|failure| failure.service.clone()).collect();
    assert_eq!(failed, [key("s42")]);
    assert!(!applied.failures[0].previous_in_force);
    assert_eq!(backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "frontends").len(), 99);
}

#[test]
fn a_plan_that_cannot_be_programmed_is_refused_alone() {
    let mut odd = (*small(1, &[1])).clone();
    odd.ports[0].frontends[0].surface = lockstep_view::Surface::NodePort;
    odd.ports[0].frontends[0].allowed_sources = Some(vec!["10.0.0.0/8".parse().unwrap()].into());
    let mut crooked = (*small(2, &[2])).clone();
    crooked.ports[0].cluster = vec![target("fd00::1", 80)];
    let plan = plan([std::sync::Arc::new(odd), std::sync::Arc::new(crooked), small(3, &[3])]);
    let mut backend = Nftables::new(FakeKernel::new());
    let failures = backend.sync(&plan).unwrap().failures;
    let kinds: Vec<_> = failures.iter().map(|failure| (failure.service.clone(), failure.kind)).collect();
    assert_eq!(kinds, [(key("s1"), FailureKind::Unsupported), (key("s2"), FailureKind::Kernel)]);
    assert_eq!(backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "frontends").len(), 1);
}

#[test]
fn a_failed_transaction_changes_nothing_and_the_next_one_catches_up() {
    let mut plan = plan([small(1, &[1])]);
    let mut backend = synced(&plan);
    let before = backend.render();
    plan.services.insert(key("s1"), small(1, &[1, 2]));
    for fault in [Fault::Send(Errno(libc_enobufs())), Fault::Commit(Errno::NOMEM)] {
        backend.netfilter_mut().fail_once(fault);
        backend.apply(&plan, &[key("s1")]).unwrap_err();
        assert_eq!(backend.render(), before);
    }
    backend.apply(&plan, &[key("s1")]).unwrap();
    assert_eq!(backend.verify().unwrap(), []);
}

fn libc_enobufs() -> i32 {
    105
}

#[test]
fn an_interrupted_dump_is_repeated() {
    let plan = every_shape();
    let mut backend = synced(&plan);
    for _ in 0..3 {
        backend.netfilter_mut().fail_once(Fault::InterruptedDump);
    }
    assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
}

#[test]
fn sets_grow_before_they_are_full() {
    let mut plan = plan([]);
    let mut backend = synced(&plan);
    for n in 0..20 {
        let pods: Vec<u8> = (0..=254).collect();
        plan.services.insert(key(&format!("s{n}")), small(n, &pods));
        assert_eq!(backend.apply(&plan, &[key(&format!("s{n}"))]).unwrap().failures, []);
    }
    assert_eq!(backend.verify().unwrap(), []);
    assert_eq!(backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "endpoints").len(), 20 * 255);
}

#[test]
fn foreign_changes_are_noticed_and_repaired_and_our_own_are_not() {
    let mut plan = every_shape();
    let mut backend = synced(&plan);
    assert!(!backend.disturbed().unwrap());
    plan.services.insert(key("s1"), small(1, &[1]));
    backend.apply(&plan, &[key("s1")]).unwrap();
    assert!(!backend.disturbed().unwrap(), "our own change");

    let mut theirs = Batch::new();
    theirs.add_table(Family::Ipv4, "theirs");
    backend.netfilter_mut().disturb(theirs.finish()).unwrap();
    assert!(!backend.disturbed().unwrap(), "another table");

    let mut ours = Batch::new();
    ours.add_chain(Family::Ipv4, "lockstep", &Chain { name: "odd".to_owned(), hook: None });
    backend.netfilter_mut().disturb(ours.finish()).unwrap();
    assert!(backend.disturbed().unwrap());
    assert!(!backend.disturbed().unwrap(), "said once");
    assert!(backend.sync(&plan).unwrap().objects_changed > 0);
    assert_eq!(backend.verify().unwrap(), []);
    assert!(!backend.disturbed().unwrap());

    backend.netfilter_mut().fail_once(Fault::LostNotifications);
    let mut theirs = Batch::new();
    theirs.delete_table(Family::Ipv4, "theirs");
    backend.netfilter_mut().disturb(theirs.finish()).unwrap();
    assert!(backend.disturbed().unwrap(), "what was lost may have been ours");
}

#[test]
fn tables_that_cannot_be_mended_are_made_anew() {
    let plan = every_shape();
    let mut backend = synced(&plan);
    let before = backend.render();
    // The second time refusals are attributed, and this one is nobody's.
    for refusals in [0, 2] {
        let mut damage = Batch::new();
        damage.flush_chain(Family::Ipv4, "lockstep", "services");
        backend.netfilter_mut().disturb(damage.finish()).unwrap();
        assert_ne!(backend.audit(std::time::Duration::MAX).unwrap().drift, []);
        (0..refusals).for_each(|_| backend.netfilter_mut().fail_once(Fault::Commit(Errno::BUSY)));
        let anew = backend.sync(&plan).unwrap().objects_changed > 100;
        assert_eq!(anew, refusals > 0);
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(backend.render(), before);
    }
}

#[test]
fn chains_are_made_when_first_used_and_removed_when_last_left() {
    let mut plan = plan([small(1, &[1, 2])]);
    let mut backend = synced(&plan);
    assert!(backend.render().contains("chain svc.c2 {"));
    plan.services.insert(key("s1"), small(1, &[1, 2, 3]));
    backend.apply(&plan, &[key("s1")]).unwrap();
    assert!(!backend.render().contains("chain svc.c2 {") && backend.render().contains("chain svc.c3 {"));
    plan.services.remove(&key("s1"));
    backend.apply(&plan, &[key("s1")]).unwrap();
    assert!(!backend.render().contains("chain svc"));
    assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
}

/// `small`, with affinity.
fn sticky(n: u8, pods: &[u8]) -> std::sync::Arc<lockstep_view::ServicePlan> {
    let mut service = (*small(n, pods)).clone();
    service.ports[0].affinity_seconds = Some(60);
    std::sync::Arc::new(service)
}

#[test]
fn a_client_whose_time_was_made_longer_does_not_keep_tables_from_being_made_anew() {
    let mut plan = plan([sticky(1, &[1, 2])]);
    let mut backend = synced(&plan);
    let serial = serials(&mut backend, 1)[&1].to_ne_bytes();
    let client = [&[10, 9, 9, 9], &endpoint_key(1, 0)[..12]].concat();
    let lifetime = Lifetime { timeout: 60_000, left: 3_600_000 };
    backend.netfilter_mut().learn((Family::Ipv4, "lockstep", "affinity"), &client, &serial, lifetime);
    // More than the sets have room for.
    let many: Vec<u8> = (0..=255).collect();
    plan.services.extend((2..8).map(|n| small(n, &many)).map(|service| (service.key.clone(), service)));
    assert_eq!(backend.sync(&plan).unwrap().failures, []);
    let clients = backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "affinity");
    assert!(clients.contains_key(&client));
}

/// Serial numbers of a Service's endpoints, by pod.
fn serials(backend: &mut Nftables<FakeKernel>, n: u8) -> BTreeMap<u8, u32> {
    let elements = backend.netfilter_mut().elements(Family::Ipv4, "lockstep", "affine_endpoints");
    let of_service = elements.iter().filter(|(key, _)| key[..4] == [10, 96, 1, n]);
    let pod = |element: &Vec<u8>| {
        let at = element.windows(3).rposition(|bytes| bytes == [10, 244, 0]).unwrap();
        element[at + 3]
    };
    of_service.map(|(key, data)| (pod(data), u32::from_ne_bytes(*key.last_chunk().unwrap()))).collect()
}

#[test]
fn an_endpoint_keeps_its_serial_number_while_it_is_there_and_no_number_is_used_twice() {
    let mut plan = plan([sticky(1, &[1, 2, 3])]);
    let mut backend = synced(&plan);
    let first = serials(&mut backend, 1);
    assert_eq!(first.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    // The last endpoint moves to the index of the one that leaves: a number out, an index
    // rewritten, an index less, and the count.
    plan.services.insert(key("s1"), sticky(1, &[2, 3]));
    assert_eq!(backend.apply(&plan, &[key("s1")]).unwrap().objects_changed, 1 + 3 + 2 + 3);
    assert_eq!(backend.verify().unwrap(), []);
    let without = serials(&mut backend, 1);
    assert_eq!(without, BTreeMap::from([(2, first[&2]), (3, first[&3])]));
    // One that comes back has been away.
    plan.services.insert(key("s1"), sticky(1, &[1, 2, 3]));
    backend.apply(&plan, &[key("s1")]).unwrap();
    let again = serials(&mut backend, 1);
    assert_eq!((again[&2], again[&3]), (first[&2], first[&3]));
    assert!(!first.values().any(|serial| *serial == again[&1]));
    // Whoever starts now goes on with all of them.
    assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
    assert_eq!(serials(&mut backend, 1), again);
}

#[test]
fn affinity_comes_goes_and_changes_its_time_with_the_service() {
    let mut plan = plan([small(1, &[1, 2]), small(2, &[3])]);
    let mut backend = synced(&plan);
    let steps =
        [sticky(1, &[1, 2]), sticky(1, &[2, 4, 5]), small(1, &[2, 4]), sticky(1, &[]), sticky(1, &[6])];
    for step in steps {
        plan.services.insert(key("s1"), step);
        assert_eq!(backend.apply(&plan, &[key("s1")]).unwrap().failures, []);
        assert_eq!(backend.verify().unwrap(), []);
        assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
    }
    let before = serials(&mut backend, 1);
    let mut longer = (*sticky(1, &[6])).clone();
    longer.ports[0].affinity_seconds = Some(600);
    plan.services.insert(key("s1"), std::sync::Arc::new(longer));
    backend.apply(&plan, &[key("s1")]).unwrap();
    assert_eq!(serials(&mut backend, 1), before, "no client loses its endpoint");
    assert!(backend.render().contains("chain svc.c1s600 {") && !backend.render().contains("s60m"));
    plan.services.remove(&key("s1"));
    backend.apply(&plan, &[key("s1")]).unwrap();
    assert!(serials(&mut backend, 1).is_empty());
}

/// The elements of every map, with the endpoints of each frontend as a sorted list: what
/// is in force, whatever index and serial number an endpoint has.
fn logical(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut logical: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut section = String::new();
    for line in text.lines().map(|line| line.trim().trim_start_matches("elements = {").trim()) {
        if line.starts_with("map ") || line.starts_with("set ") || line.starts_with("chain ") {
            line.clone_into(&mut section);
        }
        let line = line.trim_end_matches(['}', ',', ' ']);
        let (name, value) = match (section.contains("endpoints {"), line.split_once(" : ")) {
            (true, Some((key, value))) if !section.contains("no_") && !line.starts_with("typeof") => {
                let frontend = key.rsplit_once(" . ").map_or(key, |(frontend, _)| frontend);
                (format!("{section} {frontend}"), value.to_owned())
            }
            (false, Some((index, _))) if section.contains("serials {") && !line.starts_with("typeof") => {
                (section.clone(), index.to_owned())
            }
            _ if line.starts_with("size ") => continue,
            _ => (section.clone(), line.to_owned()),
        };
        logical.entry(name).or_default().push(value);
    }
    logical.values_mut().for_each(|values| values.sort());
    logical
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the history, what is in force is what a fresh start would write, every
    /// map's indices are dense, and the kernel agrees.
    #[test]
    fn any_history_ends_where_a_fresh_start_ends(
        steps in proptest::collection::vec(
            (0_u8..6, proptest::option::of(proptest::collection::btree_set(0_u8..12, 0..9)), any::<bool>()), 1..30)
    ) {
        let mut plan = plan([]);
        let mut backend = synced(&plan);
        for chunk in steps.chunks(3) {
            let mut changed = Vec::new();
            for (n, pods, affine) in chunk {
                let name = key(&format!("s{n}"));
                match pods {
                    Some(pods) => {
                        let pods: Vec<u8> = pods.iter().copied().collect();
                        let service = if *affine { sticky(*n, &pods) } else { small(*n, &pods) };
                        plan.services.insert(name.clone(), service);
                    }
                    None => drop(plan.services.remove(&name)),
                }
                changed.push(name);
            }
            prop_assert_eq!(backend.apply(&plan, &changed).unwrap().failures, vec![]);
            prop_assert_eq!(backend.verify().unwrap(), vec![]);
        }
        let fresh = synced(&plan);
        prop_assert_eq!(logical(&backend.render()), logical(&fresh.render()));
        let mut elements = |map| backend.netfilter_mut().elements(Family::Ipv4, "lockstep", map);
        let (endpoints, serials) = (elements("endpoints"), elements("serials"));
        let mut expected = [0, 0];
        for service in plan.services.values() {
            let port = &service.ports[0];
            let n: u8 = service.key.name[1..].parse().unwrap();
            let affine = port.affinity_seconds.is_some();
            let indices = if affine { &serials } else { &endpoints };
            for index in 0..port.cluster.len() {
                prop_assert!(indices.contains_key(&endpoint_key(n, index.try_into().unwrap())));
            }
            expected[usize::from(affine)] += port.cluster.len();
        }
        prop_assert_eq!([endpoints.len(), serials.len()], expected);
        prop_assert_eq!(elements("affine_endpoints").len(), serials.len());
        // Somebody who starts now adopts all of it.
        prop_assert_eq!(backend.sync(&plan).unwrap().objects_changed, 0);
    }
}
