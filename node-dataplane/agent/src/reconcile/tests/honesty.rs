//! What an Ack may say while something is wrong, and that one thing wrong does not hold up the rest.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockstep_model::ServiceKey;
use lockstep_view::ForwardingPlan;
use lockstep_wire::v1;

use super::{Bench, frame, key};
use crate::follow_up::{Complaint, ComplaintKind, FollowUp};
use crate::reconcile::KEEP_OTHERS;

#[test]
fn a_repair_that_does_not_read_back_is_not_verified_and_holds_nobody_up() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    assert_eq!(bench.last_ack().outcome(), v1::Outcome::Verified);
    bench.kernel.lock().misread = 1;
    bench.kernel.lock().disturb(&key(1));
    bench.tick(150);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq, ack.drift_repairs), (v1::Outcome::Applied, 0, 1));
    // A change goes on at once, and its own read-back does not speak for the rest.
    bench.kernel.lock().calls.clear();
    bench.server.service(2, 1);
    let change = frame(bench.server.delta());
    bench.run(160, vec![change]);
    assert_eq!(bench.kernel.lock().calls, ["apply shop/cart-2", "verify"]);
    let ack = bench.last_ack();
    assert_eq!(
        (ack.outcome(), ack.applied_seq, ack.verified_seq),
        (v1::Outcome::Applied, bench.server.seq, 0)
    );
    // Everything is compared without anybody asking, and then it is verified.
    bench.tick(5_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
}

#[test]
fn drift_that_cannot_be_repaired_is_not_verified() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().disturb(&key(1));
    bench.kernel.lock().fail_next = 1;
    bench.tick(300);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Failed, 0));
    bench.tick(5_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert_eq!(bench.programmed(), [key(1)]);
}

#[test]
fn a_flood_of_changes_does_not_put_off_repairs_and_retries() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.server.service(2, 1);
    bench.kernel.lock().refuse.insert(key(2));
    bench.connect();
    assert_eq!(bench.last_ack().failures.len(), 1);
    bench.kernel.lock().refuse.clear();
    bench.kernel.lock().disturb(&key(1));
    // Never a tick, and never a turn without a change.
    for round in 1..5 {
        bench.server.service(3, u8::try_from(round).unwrap());
        let change = frame(bench.server.delta());
        bench.run(round * 1_000, vec![change]);
    }
    assert_eq!(bench.programmed(), [key(1), key(2), key(3)]);
    let ack = bench.last_ack();
    assert_eq!((ack.failures.len(), ack.drift_repairs), (0, 1));
}

#[test]
fn a_backend_that_refuses_for_long_costs_no_memory_and_no_honesty() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().fail_next = u32::MAX;
    let before = bench.server.seq;
    for variant in 2..102 {
        bench.server.service(1, variant);
        bench.update();
    }
    let pending = &bench.reconciler.pending;
    assert!(pending.committed.is_empty() && pending.services.len() <= 1, "{}", pending.services.len());
    bench.tick(150);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.received_seq), (v1::Outcome::Failed, bench.server.seq));
    assert_eq!(ack.applied_seq, before);
    bench.kernel.lock().fail_next = 0;
    bench.tick(100_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert_eq!(ack.stats.unwrap().coalesced, 100);
}

#[test]
fn a_node_name_that_the_cluster_does_not_know_is_said() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.server.node_uid = None;
    bench.connect();
    let snapshot = bench.status.snapshot();
    assert!(snapshot.node_unknown && snapshot.healthy(bench.at(0).monotonic));
}

#[test]
fn rules_of_another_mode_go_after_the_read_back_and_before_it_counts_as_verified() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.kernel.lock().others = 7;
    bench.kernel.lock().misread = 1;
    bench.connect();
    assert_eq!(
        bench.kernel.lock().calls,
        ["sync", "verify"],
        "what differs is no ground for removing anything"
    );
    bench.tick(1_000);
    assert_eq!(bench.kernel.lock().calls[2..], ["sync", "verify", "remove others"]);
    assert_eq!(bench.last_ack().outcome(), v1::Outcome::Verified);
    assert_eq!(bench.reconciler.metrics.other_modes_removed.get(), 7);
}

#[test]
fn rules_of_another_mode_stay_while_a_family_is_without_ours() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.kernel.lock().others = 7;
    bench.kernel.lock().in_part = true;
    bench.connect();
    assert_eq!(bench.kernel.lock().calls, ["sync", "verify"]);
    assert_eq!((bench.last_ack().outcome(), bench.kernel.lock().others), (v1::Outcome::Applied, 7));
    bench.kernel.lock().in_part = false;
    bench.tick(60_000);
    assert_eq!((bench.last_ack().outcome(), bench.kernel.lock().others), (v1::Outcome::Verified, 0));
    // A family that never can be must not cost the other one rules that are up to date.
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.kernel.lock().others = 7;
    bench.kernel.lock().in_part = true;
    bench.reconciler.others_kept_since = Instant::now().checked_sub(KEEP_OTHERS);
    bench.connect();
    assert_eq!(bench.kernel.lock().others, 0);
}

#[test]
fn rules_of_another_mode_that_stay_are_not_verified_and_are_tried_again() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.kernel.lock().others = 7;
    bench.kernel.lock().keep_others = 3;
    bench.connect();
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Applied, 0));
    (1..3).for_each(|round| bench.tick(round * 1_000));
    let ack = bench.last_ack();
    assert_eq!(ack.outcome(), v1::Outcome::Failed);
    assert!(ack.backend_error.contains("locked on purpose"), "{}", ack.backend_error);
    bench.tick(60_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert_eq!(bench.kernel.lock().others, 0);
}

#[test]
fn a_comparison_that_finds_nothing_does_not_cancel_a_read_back_that_is_owed() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.kernel.lock().others = 7;
    bench.kernel.lock().keep_others = 4;
    bench.connect();
    // Each attempt is put off for twice as long as the one before.
    (1..4).for_each(|round| bench.tick(round * 1_000));
    // Somebody else's transaction, before the next attempt is due.
    bench.reconciler.recheck_at = Some(bench.at(5_000).monotonic);
    bench.kernel.lock().disturbed = true;
    bench.tick(4_000);
    assert_eq!(bench.kernel.lock().calls.last().unwrap(), "sync", "compared, and nothing more");
    assert_eq!(bench.kernel.lock().others, 7);
    bench.tick(60_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert_eq!(bench.kernel.lock().others, 0);
}

/// Something that follows passes: what it was told, and what it will say.
#[derive(Clone, Default)]
struct Follower(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    passes: Vec<Option<Vec<ServiceKey>>>,
    failed: Vec<ServiceKey>,
    complaints: Option<Vec<Complaint>>,
}

impl FollowUp for Follower {
    fn committed(
        &mut self,
        plan: &ForwardingPlan,
        changed: Option<&[ServiceKey]>,
        failed: &dyn Fn(&ServiceKey) -> bool,
    ) {
        let mut told = self.0.lock().unwrap();
        told.passes.push(changed.map(<[_]>::to_vec));
        told.failed = plan.services.keys().filter(|key| failed(key)).cloned().collect();
    }

    fn complaints(&mut self) -> Option<Vec<Complaint>> {
        self.0.lock().unwrap().complaints.take()
    }
}

#[test]
fn what_follows_a_pass_hears_of_it_after_the_commit_and_is_heard_in_every_ack() {
    let mut bench = Bench::new();
    let follower = Follower::default();
    bench.reconciler.follow_ups.push(Box::new(follower.clone()));
    bench.server.service(1, 1);
    bench.server.service(2, 1);
    bench.kernel.lock().refuse.insert(key(2));
    bench.connect();
    {
        let told = follower.0.lock().unwrap();
        assert_eq!((&told.passes[..], &told.failed[..]), (&[None][..], &[key(2)][..]));
    }
    bench.kernel.lock().refuse.clear();
    bench.tick(5_000);
    assert_eq!(follower.0.lock().unwrap().passes[1], Some(vec![key(2)]));
    assert!(follower.0.lock().unwrap().failed.is_empty());
    assert_eq!(bench.last_ack().outcome(), v1::Outcome::Verified);
    // A pass that the kernel refuses is none.
    bench.kernel.lock().fail_next = 1;
    bench.server.endpoints(1, &[1, 2]);
    bench.update();
    assert_eq!(follower.0.lock().unwrap().passes.len(), 2);
    bench.tick(10_000);
    assert_eq!(follower.0.lock().unwrap().passes[2], None);
    bench.acks();

    let complaint =
        Complaint { service: key(1), kind: ComplaintKind::Conflict, message: "port 9 is taken".to_owned() };
    follower.0.lock().unwrap().complaints = Some(vec![complaint]);
    bench.tick(11_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Partial, bench.server.seq));
    let failure = &ack.failures[0];
    assert_eq!(failure.r#ref.as_ref().unwrap().key, "shop/cart-1");
    assert_eq!((failure.reason(), failure.in_force()), (v1::FailureReason::Conflict, v1::InForce::Part));
    assert!(failure.retrying && failure.message == "port 9 is taken");
    assert_eq!(bench.status.snapshot().failures, 1);
    // Every other Service goes on, and it stays in every ack until it is over.
    bench.server.endpoints(2, &[1, 2]);
    bench.update();
    bench.tick(12_000);
    assert_eq!(bench.last_ack().failures.len(), 1);
    follower.0.lock().unwrap().complaints = Some(Vec::new());
    bench.tick(13_000);
    assert_eq!(bench.last_ack().outcome(), v1::Outcome::Verified);
}

#[test]
fn where_passes_are_dear_changes_wait_for_each_other_and_nothing_else_waits() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().calls.clear();
    // A pass that took half a second: the next may begin a second after it.
    let ended = bench.at(0).monotonic;
    bench.reconciler.pace.changed(Duration::from_millis(500), ended);
    let before = bench.server.seq;
    bench.server.service(2, 1);
    let first = frame(bench.server.delta());
    bench.run(100, vec![first]);
    bench.server.service(3, 1);
    let second = frame(bench.server.delta());
    bench.run(500, vec![second]);
    assert!(bench.kernel.lock().calls.is_empty());
    let ack = bench.last_ack();
    assert_eq!((ack.received_seq, ack.applied_seq), (bench.server.seq, before));
    assert!(bench.status.snapshot().healthy(bench.at(900).monotonic));
    // What somebody else does is repaired meanwhile, to what is in force.
    bench.kernel.lock().disturb(&key(1));
    bench.tick(700);
    assert_eq!(bench.programmed(), [key(1)]);
    assert_eq!(bench.last_ack().drift_repairs, 1);
    bench.kernel.lock().calls.clear();
    bench.tick(999);
    assert!(bench.kernel.lock().calls.is_empty());
    bench.tick(1_000);
    assert_eq!(bench.kernel.lock().calls, ["apply shop/cart-2 shop/cart-3", "verify"]);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert_eq!(ack.stats.unwrap().coalesced, 2);
}

#[test]
fn a_change_of_the_node_waits_for_no_other() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.kernel.lock().calls.clear();
    let ended = bench.at(0).monotonic;
    bench.reconciler.pace.changed(Duration::from_millis(500), ended);
    bench.server.service(2, 1);
    let change = frame(bench.server.delta());
    bench.run(100, vec![change]);
    assert!(bench.kernel.lock().calls.is_empty());
    bench.reconciler.node_changed(bench.at(200));
    bench.tick(200);
    assert_eq!(bench.kernel.lock().calls, ["apply shop/cart-2", "verify"]);
}

#[test]
fn a_read_back_that_is_put_off_is_not_verified_until_it_is_done() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    let before = bench.server.seq;
    // One that took so long that the next may begin after five seconds.
    let ended = bench.at(0).monotonic;
    bench.reconciler.pace.read_back(Duration::from_millis(300), ended);
    bench.kernel.lock().calls.clear();
    for (index, millis) in [(2, 100), (3, 200)] {
        bench.server.service(index, 1);
        let change = frame(bench.server.delta());
        bench.run(millis, vec![change]);
        let ack = bench.last_ack();
        assert_eq!(
            (ack.outcome(), ack.applied_seq, ack.verified_seq),
            (v1::Outcome::Applied, bench.server.seq, before)
        );
    }
    bench.tick(4_999);
    assert_eq!(
        bench.kernel.lock().calls,
        ["apply shop/cart-2", "read back later", "apply shop/cart-3", "read back later"]
    );
    assert!(bench.acks().is_empty());
    // No change has to come for it. It may differ, like any other.
    bench.kernel.lock().misread = 1;
    bench.tick(5_000);
    assert_eq!(bench.kernel.lock().calls[4..], ["verify"]);
    assert_eq!(bench.last_ack().verified_seq, 0);
    bench.tick(10_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
}

#[test]
fn a_retry_at_a_verified_version_is_read_back_at_once() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.server.service(2, 1);
    bench.kernel.lock().refuse.insert(key(2));
    bench.connect();
    let ack = bench.last_ack();
    assert_eq!((ack.failures.len(), ack.verified_seq), (1, bench.server.seq));
    bench.kernel.lock().refuse.clear();
    bench.kernel.lock().calls.clear();
    let ended = bench.at(19_000).monotonic;
    bench.reconciler.pace.read_back(Duration::from_millis(300), ended);
    bench.tick(20_000);
    assert_eq!(bench.kernel.lock().calls, ["apply shop/cart-2", "verify"]);
    assert!(bench.last_ack().failures.is_empty());
}
