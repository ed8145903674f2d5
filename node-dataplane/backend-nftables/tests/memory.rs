//! What it takes to look at a hundred thousand elements. A program of its own, because it looks at
//! the memory of the whole process. Needs root.
#![allow(clippy::unwrap_used)] // a test states its expectations with unwrap

mod support;

use std::time::Duration;

use lockstep_backend_nftables::Nftables;
use lockstep_kernel::{memory, netns};
use lockstep_model::Protocol;
use lockstep_view::{Backend, ForwardingPlan};
use support::*;

const SERVICES: u16 = 10_000;
const MIB: u64 = 1024;

/// A field of the process's status, in KiB.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// How much more than before there was at the worst moment, in KiB.
fn peak_of(work: impl FnOnce()) -> u64 {
    memory::give_back();
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    work();
    status("VmHWM:").saturating_sub(before)
}

/// Services with a cluster IP and ten endpoints each, the first of which is `variant`.
fn plan_of(variant: u8) -> ForwardingPlan {
    plan((0..SERVICES).map(|n| {
        let [high, low] = n.to_be_bytes();
        let target = |pod: u8| target(&format!("10.{}.{low}.{pod}", 128 + high), 80);
        let targets = (1..10).map(target).chain([target(100 + variant)]).collect();
        let frontends = vec![cluster_ip(&format!("10.96.{high}.{low}"), 80)];
        service(&format!("s{n}"), vec![port_plan(Protocol::Tcp, 80, targets, frontends)])
    }))
}

#[test]
fn reading_back_takes_no_memory_and_adopting_less_than_the_elements_written_out() {
    // As the agent does it.
    memory::map_large_pieces();
    netns::run_in_new(|| {
        let mut plan = plan_of(0);
        let mut backend = Nftables::open().unwrap();
        assert!(backend.sync(&plan).unwrap().objects_changed > 120_000);
        let verified = peak_of(|| assert_eq!(backend.verify().unwrap(), []));
        assert!(verified < MIB, "reading back what was written first: {verified} KiB");
        let audited = peak_of(|| {
            let audit = backend.audit(Duration::from_secs(600)).unwrap();
            assert!(audit.completed && audit.drift.is_empty());
        });
        assert!(audited < MIB, "an audit: {audited} KiB");

        plan = plan_of(1);
        let all: Vec<_> = plan.services.keys().cloned().collect();
        assert_eq!(backend.apply(&plan, &all).unwrap().objects_changed, 2 * usize::from(SERVICES));
        let verified = peak_of(|| assert_eq!(backend.verify().unwrap(), []));
        assert!(verified < MIB, "reading back a change of everything: {verified} KiB");
        drop(backend);

        let mut backend = None;
        let adopted = peak_of(|| {
            let mut second = Nftables::open().unwrap();
            assert_eq!(second.sync(&plan).unwrap().objects_changed, 0);
            backend = Some(second);
        });
        // What is then in force is some of it.
        assert!(adopted < 12 * MIB, "adopting: {adopted} KiB");
    })
    .expect("this test needs root");
}
