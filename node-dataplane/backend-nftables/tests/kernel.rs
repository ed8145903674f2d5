//! The backend on the real kernel, each test in a network namespace of its own. Needs root.

#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::io::Write as _;
use std::time::Duration;

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::netns;
use lockstep_model::Protocol;
use lockstep_view::{Backend, ForwardingPlan};
use support::*;

fn in_namespace(test: impl FnOnce() + Send) {
    netns::run_in_new(test).expect("these tests need root");
}

fn synced(plan: &ForwardingPlan) -> Nftables {
    let mut backend = Nftables::open().unwrap();
    let applied = backend.sync(plan).unwrap();
    assert_eq!(applied.failures, []);
    assert_eq!(backend.verify().unwrap(), []);
    backend
}

/// Walks a whole audit.
fn audit(backend: &mut Nftables) -> Vec<String> {
    let mut found = Vec::new();
    loop {
        let step = backend.audit(Duration::from_millis(1)).unwrap();
        found.extend(step.drift.iter().map(ToString::to_string));
        if step.completed {
            return found;
        }
    }
}

#[test]
fn every_shape_is_written_and_read_back() {
    in_namespace(|| {
        let mut backend = synced(&every_shape());
        assert_eq!(audit(&mut backend), Vec::<String>::new());
    });
}

#[test]
fn the_probe_leaves_nothing_behind() {
    in_namespace(|| {
        Nftables::open().unwrap().probe().unwrap();
        assert_eq!(run("nft", &["list", "ruleset"]), "");
    });
}

#[test]
fn nft_lists_the_tables_and_loads_its_own_listing_and_our_text() {
    in_namespace(|| {
        let plan = every_shape();
        let backend = synced(&plan);
        let listing = run("nft", &["list", "ruleset"]);
        for text in [&listing, &backend.render()] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            write!(file, "table ip lockstep\ndelete table ip lockstep\ntable ip6 lockstep\ndelete table ip6 lockstep\n{text}").unwrap();
            run("nft", &["-f", file.path().to_str().unwrap()]);
            // What nft made of the text forwards the same packets; it may be declared a
            // little differently, but every element and chain is there.
            let again = run("nft", &["list", "ruleset"]);
            assert_eq!(sorted_lines(&again), sorted_lines(&listing));
        }
    });
}

fn sorted_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .replace(',', "\n")
        .lines()
        .map(|line| line.trim().trim_start_matches("elements = {").trim_end_matches('}').trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    lines.sort();
    lines
}

#[test]
fn a_restarted_process_adopts_what_is_there() {
    in_namespace(|| {
        let mut plan = every_shape();
        let mut first = synced(&plan);
        // Give the kernel indices that are not the plan's order.
        let changed = service(
            "plain",
            vec![port_plan(
                Protocol::Tcp,
                80,
                vec![target("10.244.0.9", 1), target("10.244.2.2", 8080)],
                vec![cluster_ip("10.96.0.1", 80)],
            )],
        );
        plan.services.insert(changed.key.clone(), changed);
        first.apply(&plan, &[key("plain")]).unwrap();
        assert_eq!(first.verify().unwrap(), []);
        let before = first.render();
        drop(first);

        let mut second = Nftables::open().unwrap();
        assert_eq!(second.sync(&plan).unwrap().objects_changed, 0);
        assert_eq!(second.render(), before, "the same indices");

        // A change made while nobody ran: only that difference.
        let moved = service(
            "plain",
            vec![port_plan(
                Protocol::Tcp,
                80,
                vec![target("10.244.0.10", 1), target("10.244.2.2", 8080)],
                vec![cluster_ip("10.96.0.1", 80)],
            )],
        );
        plan.services.insert(moved.key.clone(), moved);
        let mut third = Nftables::open().unwrap();
        assert_eq!(third.sync(&plan).unwrap().objects_changed, 2, "one element out, one in");
        assert_eq!(third.verify().unwrap(), []);
    });
}
