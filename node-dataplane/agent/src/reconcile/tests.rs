//! The loop against a fake kernel, one event at a time, with the time as an argument.

mod fake;
mod honesty;
mod server;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use lockstep_client::cache::{Cache, Restored};
use lockstep_client::session::{Identity, Now};
use lockstep_client::transport::{self, Outbox};
use lockstep_model::{Family, ServiceKey};
use lockstep_view::ViewConfig;
use lockstep_wire::v1;
use tokio::sync::mpsc;

use super::{Event, Parts, Reconciler};
use crate::metrics::Metrics;
use crate::status::Status;
use fake::{FakeBackend, Kernel};
use server::{Server, key};

struct Bench {
    reconciler: Reconciler,
    kernel: Kernel,
    status: Arc<Status>,
    server: Server,
    sent: Option<mpsc::Receiver<v1::SyncRequest>>,
    start: Now,
}

fn parts(kernel: &Kernel, status: &Arc<Status>, cache: Option<Cache>, restored: Option<Restored>) -> Parts {
    let (metrics, _) = Metrics::new(&Family::ALL);
    Parts {
        backend: Box::new(FakeBackend(kernel.clone())),
        remove_others: Some(kernel.remove_others()),
        new_addresses: None,
        cache,
        restored,
        identity: Identity {
            node_name: "node-a".into(),
            instance_id: "one".to_owned(),
            started: SystemTime::now(),
            boot_id: String::new(),
            agent_version: "test".to_owned(),
            backend: v1::Backend::default(),
            features: Vec::new(),
            settings: None,
            kernel_adopted: false,
        },
        view_config: ViewConfig::new("node-a"),
        follow_ups: Vec::new(),
        status: status.clone(),
        metrics,
        stopping: Arc::new(AtomicBool::new(false)),
    }
}

impl Bench {
    fn new() -> Self {
        Self::with(Kernel::default(), None, None)
    }

    fn with(kernel: Kernel, cache: Option<Cache>, restored: Option<Restored>) -> Self {
        let status = Arc::new(Status::default());
        let start = Now { monotonic: Instant::now(), wall: SystemTime::now() };
        let reconciler = Reconciler::new(parts(&kernel, &status, cache, restored), start);
        Self { reconciler, kernel, status, server: Server::new(), sent: None, start }
    }

    fn at(&self, millis: u64) -> Now {
        let after = Duration::from_millis(millis);
        Now { monotonic: self.start.monotonic + after, wall: self.start.wall + after }
    }

    /// Takes events in and works, as the loop does.
    fn run(&mut self, millis: u64, events: Vec<Event>) {
        let now = self.at(millis);
        for event in events {
            self.reconciler.take(event, now);
        }
        self.reconciler.turn(now);
    }

    fn tick(&mut self, millis: u64) {
        self.run(millis, vec![Event::Tick]);
    }

    /// Connects, greets and brings the node to the server's head.
    fn connect(&mut self) {
        let (outbox, sent) = Outbox::pair();
        self.sent = Some(sent);
        self.run(0, vec![Event::Link(transport::Event::Connected(outbox))]);
        let Some(v1::sync_request::Kind::Hello(hello)) = self.requests().remove(0).kind else {
            panic!("no Hello")
        };
        let frames = self.server.welcome(&hello);
        self.run(0, frames.into_iter().map(frame).collect());
    }

    fn update(&mut self) {
        let event = frame(self.server.delta());
        self.run(0, vec![event]);
    }

    fn requests(&mut self) -> Vec<v1::SyncRequest> {
        let sent = self.sent.as_mut().expect("connected");
        std::iter::from_fn(|| sent.try_recv().ok()).collect()
    }

    fn acks(&mut self) -> Vec<v1::Ack> {
        let ack = |request: v1::SyncRequest| match request.kind {
            Some(v1::sync_request::Kind::Ack(ack)) => Some(ack),
            _ => None,
        };
        self.requests().into_iter().filter_map(ack).collect()
    }

    fn last_ack(&mut self) -> v1::Ack {
        self.acks().pop().expect("an Ack")
    }

    fn programmed(&self) -> Vec<ServiceKey> {
        self.kernel.lock().services.keys().cloned().collect()
    }
}

fn frame(frame: lockstep_wire::frame::Frame) -> Event {
    let response = lockstep_wire::batch::decode_response(frame.into()).unwrap();
    Event::Link(transport::Event::Frame(Box::new(response)))
}

fn outcomes(acks: &[v1::Ack]) -> Vec<v1::Outcome> {
    acks.iter().map(v1::Ack::outcome).collect()
}

#[test]
fn nothing_is_written_before_the_first_complete_state() {
    let mut bench = Bench::new();
    bench.tick(0);
    bench.server.service(1, 1);
    let (outbox, sent) = Outbox::pair();
    bench.sent = Some(sent);
    bench.run(0, vec![Event::Link(transport::Event::Connected(outbox))]);
    let Some(v1::sync_request::Kind::Hello(hello)) = bench.requests().remove(0).kind else {
        panic!("no Hello")
    };
    let mut frames = bench.server.welcome(&hello);
    let snapshot = frames.split_off(1);
    bench.run(1, frames.into_iter().map(frame).collect());
    bench.tick(400);
    assert_eq!(bench.kernel.lock().calls, Vec::<&str>::new());
    assert!(bench.status.snapshot().programmed.is_none());
    bench.run(500, snapshot.into_iter().map(frame).collect());
    assert_eq!(bench.kernel.lock().calls, ["sync", "verify"]);
    assert_eq!(bench.programmed(), [key(1)]);
    assert!(bench.status.snapshot().programmed.is_some());
}

#[test]
fn a_change_is_applied_acknowledged_read_back_and_acknowledged() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.server.service(2, 1);
    bench.connect();
    assert_eq!(outcomes(&bench.acks()), [v1::Outcome::Applied, v1::Outcome::Verified]);
    bench.kernel.lock().calls.clear();
    bench.server.endpoints(2, &[1, 2, 3]);
    bench.update();
    assert_eq!(bench.kernel.lock().calls, ["apply shop/cart-2", "verify"]);
    let acks = bench.acks();
    assert_eq!(outcomes(&acks), [v1::Outcome::Applied, v1::Outcome::Verified]);
    assert_eq!((acks[1].applied_seq, acks[1].verified_seq), (bench.server.seq, bench.server.seq));
    assert!(acks[1].stats.as_ref().unwrap().verify.is_some());
}

#[test]
fn a_change_of_the_service_cidrs_is_no_full_comparison() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().calls.clear();
    bench.server.service_cidr("10.96.0.0/16");
    bench.update();
    assert_eq!(bench.kernel.lock().calls, ["apply ", "verify"]);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert!(!ack.stats.unwrap().full_sync);
    // Together with a Service it is one pass.
    bench.kernel.lock().calls.clear();
    bench.server.service_cidr("10.96.0.0/12");
    bench.server.service(1, 2);
    bench.update();
    assert_eq!(bench.kernel.lock().calls, ["apply shop/cart-1", "verify"]);
}

#[test]
fn what_arrives_together_is_programmed_once() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().calls.clear();
    let events = (2..7)
        .map(|index| {
            bench.server.service(index, 1);
            frame(bench.server.delta())
        })
        .collect();
    bench.run(10, events);
    assert_eq!(bench.kernel.lock().calls.iter().filter(|call| call.starts_with("apply")).count(), 1);
    let ack = bench.last_ack();
    assert_eq!((ack.stats.unwrap().coalesced, ack.verified_seq), (5, bench.server.seq));
}

#[test]
fn a_change_without_effect_on_the_plan_is_acknowledged_and_touches_nothing() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().calls.clear();
    bench.server.seq += 1;
    let event = frame(bench.server.empty());
    bench.run(1, vec![event]);
    assert!(bench.kernel.lock().calls.is_empty());
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
}

#[test]
fn a_backend_that_refuses_is_retried_with_a_full_comparison() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().fail_next = 2;
    let before = bench.server.seq;
    bench.server.service(2, 1);
    bench.update();
    let ack = bench.last_ack();
    assert_eq!(ack.outcome(), v1::Outcome::Failed);
    assert!(ack.backend_error.contains("broken on purpose"), "{}", ack.backend_error);
    assert_eq!((ack.received_seq, ack.applied_seq), (bench.server.seq, before));
    assert_eq!(bench.programmed(), [key(1)], "the last good rules stay");
    // Not before the backoff, then with everything compared, without any new input.
    bench.kernel.lock().calls.clear();
    bench.run(1, vec![]);
    assert!(bench.kernel.lock().calls.is_empty());
    bench.tick(5_000);
    bench.tick(10_000);
    assert_eq!(bench.kernel.lock().calls[..2], ["sync", "sync"]);
    assert_eq!(bench.programmed(), [key(1), key(2)]);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.backend_error.as_str()), (v1::Outcome::Verified, ""));
}

#[test]
fn one_refused_service_is_reported_and_retried_alone() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.server.service(2, 1);
    bench.connect();
    bench.kernel.lock().refuse.insert(key(2));
    bench.server.service(1, 2);
    bench.server.endpoints(2, &[9]);
    bench.update();
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.failures.len()), (v1::Outcome::Partial, 1));
    let failure = &ack.failures[0];
    assert_eq!(failure.r#ref.as_ref().unwrap().key, "shop/cart-2");
    assert_eq!((failure.reason(), failure.in_force()), (v1::FailureReason::Kernel, v1::InForce::Previous));
    assert!(failure.retrying && failure.attempts == 1);
    assert_eq!((ack.applied_seq, ack.verified_seq), (bench.server.seq, bench.server.seq));
    bench.kernel.lock().calls.clear();
    bench.tick(20_000);
    assert_eq!(bench.kernel.lock().calls[0], "apply shop/cart-2");
    assert_eq!(bench.last_ack().failures[0].attempts, 2);
    bench.kernel.lock().refuse.clear();
    bench.tick(60_000);
    assert!(bench.last_ack().failures.is_empty());
}

#[test]
fn two_services_on_one_address_are_a_conflict_of_the_second() {
    let mut bench = Bench::new();
    bench.server.service(1, 7);
    bench.server.same_address(2, 1, 7);
    bench.connect();
    let ack = bench.last_ack();
    assert_eq!(ack.failures.len(), 1);
    let failure = &ack.failures[0];
    assert_eq!(failure.r#ref.as_ref().unwrap().key, "shop/cart-2");
    assert_eq!((failure.reason(), failure.in_force()), (v1::FailureReason::Conflict, v1::InForce::Part));
    assert!(failure.message.contains("shop/cart-1"), "{}", failure.message);
    // It ends when the owner goes.
    bench.server.remove(1);
    bench.update();
    assert!(bench.last_ack().failures.is_empty());
}

#[test]
fn a_foreign_change_is_repaired_counted_and_reported() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().disturb(&key(1));
    bench.tick(300);
    assert_eq!(bench.programmed(), [key(1)]);
    let ack = bench.last_ack();
    assert_eq!((ack.drift_repairs, ack.outcome()), (1, v1::Outcome::Verified));
    // A false alarm is none.
    bench.kernel.lock().disturbed = true;
    bench.tick(2_000);
    assert!(bench.acks().is_empty());
}

#[test]
fn the_audit_finds_what_nobody_announced() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.acks();
    bench.kernel.lock().disturb(&key(1));
    bench.kernel.lock().disturbed = false;
    bench.tick(1_000);
    assert!(bench.programmed().is_empty(), "no audit is due yet");
    bench.tick(120_000);
    assert_eq!(bench.programmed(), [key(1)]);
    assert_eq!(bench.reconciler.report.drift_repairs, 1);
}

#[test]
fn a_read_back_that_differs_is_never_acknowledged_as_verified() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.kernel.lock().misread = 4;
    bench.connect();
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Applied, 0));
    (1..4).for_each(|round| bench.tick(round * 1_000));
    let acks = bench.acks();
    assert!(acks.iter().all(|ack| ack.verified_seq == 0));
    assert!(acks.iter().any(|ack| ack.outcome() == v1::Outcome::Failed), "{:?}", outcomes(&acks));
    bench.tick(30_000);
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
}

#[test]
fn losing_the_control_plane_changes_nothing() {
    let mut bench = Bench::new();
    bench.server.service(1, 1);
    bench.connect();
    bench.kernel.lock().calls.clear();
    bench.run(100, vec![Event::Link(transport::Event::Lost("gone".to_owned()))]);
    bench.tick(300);
    assert_eq!(bench.programmed(), [key(1)]);
    let snapshot = bench.status.snapshot();
    assert!(!snapshot.connected && snapshot.healthy(bench.at(300).monotonic));
    assert!(bench.kernel.lock().calls.iter().all(|call| *call != "sync" && !call.starts_with("apply")));
    // It comes back with what the node holds: nothing to program, one ack.
    bench.connect();
    let ack = bench.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, bench.server.seq));
    assert!(bench.kernel.lock().calls.iter().all(|call| *call != "sync" && !call.starts_with("apply")));
}

#[test]
fn a_restart_without_control_plane_programs_the_cache_and_says_it_is_stale() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut first = Bench::with(Kernel::default(), Some(cache), restored);
    first.server.service(1, 1);
    first.server.service(2, 1);
    first.connect();
    first.server.remove(2);
    first.update();
    let server = first.server.clone();
    drop(first);

    // A rebooted machine: the kernel is empty, the control plane unreachable.
    let (cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut second = Bench::with(Kernel::default(), Some(cache), restored);
    second.run(0, vec![]);
    assert_eq!(second.programmed(), [key(1)]);
    let snapshot = second.status.snapshot();
    assert!(snapshot.stale && snapshot.healthy(second.at(0).monotonic));
    // The stream confirms it: not stale any more, nothing to program.
    second.server = server;
    second.kernel.lock().calls.clear();
    second.connect();
    assert!(!second.status.snapshot().stale);
    let ack = second.last_ack();
    assert_eq!((ack.outcome(), ack.verified_seq), (v1::Outcome::Verified, second.server.seq));
    assert!(second.kernel.lock().calls.iter().all(|call| !call.starts_with("apply")));
}

/// What a new process finds in the state directory, while the old one's writer still stands.
fn found(directory: &Path) -> (tempfile::TempDir, Option<Cache>, Option<Restored>) {
    let copy = tempfile::tempdir().unwrap();
    for name in ["held.log", "held.outdated"] {
        if directory.join(name).exists() {
            std::fs::copy(directory.join(name), copy.path().join(name)).unwrap();
        }
    }
    let (cache, restored) = Cache::open(copy.path(), "node-a").unwrap();
    (copy, Some(cache), restored)
}

#[test]
fn a_kill_after_verified_brings_no_removed_endpoint_back_however_slow_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut first = Bench::with(Kernel::default(), Some(cache), restored);
    first.server.service(1, 1);
    first.server.service(2, 1);
    first.connect();
    let (mut server, kernel) = (first.server.clone(), first.kernel.clone());
    drop(first);

    // Its disk hangs in the middle of writing the file anew: opening this waits for a reader.
    let temporary = directory.path().join("held.new");
    assert!(Command::new("mkfifo").arg(&temporary).status().unwrap().success());
    let (cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    let mut second = Bench::with(kernel.clone(), Some(cache), restored);
    server.remove(2);
    (3..30).for_each(|index| server.service(index, 1));
    second.server = server;
    second.connect();
    let verified = |bench: &mut Bench| bench.acks().iter().any(|ack| ack.verified_seq == bench.server.seq);
    let begun = Instant::now();
    let mut at = 0;
    while !verified(&mut second) {
        assert!(begun.elapsed() < Duration::from_secs(30), "the disk holds up the ack");
        at += 200;
        second.tick(at);
    }
    assert!(!second.programmed().contains(&key(2)));

    // kill -9, no control plane: the rules are newer than the disk, and stay.
    let (_copy, cache, restored) = found(directory.path());
    let mut third = Bench::with(kernel.clone(), cache, restored);
    kernel.lock().calls.clear();
    (0..10).for_each(|round| third.tick(round * 1_000));
    assert!(!third.programmed().contains(&key(2)) && third.programmed().contains(&key(29)));
    assert!(kernel.lock().calls.is_empty(), "{:?}", kernel.lock().calls);
    // After a reboot there are none, and what the disk has is better than nothing.
    let (_copy, cache, restored) = found(directory.path());
    let mut rebooted = Bench::with(Kernel::default(), cache, restored);
    rebooted.kernel.lock().others = 7;
    rebooted.tick(0);
    assert_eq!(rebooted.programmed(), [key(1), key(2)]);
    // Rules of another mode may be newer than that, so they do not go yet.
    assert_eq!(rebooted.kernel.lock().others, 7);
    rebooted.server = second.server.clone();
    rebooted.connect();
    rebooted.tick(20_000);
    assert_eq!(rebooted.last_ack().outcome(), v1::Outcome::Verified);
    assert_eq!(rebooted.kernel.lock().others, 0);
    // The control plane is back.
    third.server = second.server.clone();
    third.connect();
    assert_eq!(third.last_ack().verified_seq, third.server.seq);
    assert!(!third.programmed().contains(&key(2)));
    let reader = std::fs::File::options().read(true).write(true).open(&temporary).unwrap();
    drop(second);
    drop(reader);
}

#[test]
fn an_unreadable_cache_leaves_the_kernel_alone_until_the_stream_comes() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("held.log"), b"not a cache").unwrap();
    let (cache, restored) = Cache::open(directory.path(), "node-a").unwrap();
    assert!(restored.is_none());
    let mut bench = Bench::with(Kernel::default(), Some(cache), restored);
    bench.run(0, vec![]);
    bench.tick(200);
    assert!(bench.kernel.lock().calls.is_empty());
}

#[test]
fn a_request_to_end_is_heeded_after_the_pass_and_removes_nothing() {
    let kernel = Kernel::default();
    let status = Arc::new(Status::default());
    let mut server = Server::new();
    server.service(1, 1);
    let (outbox, mut sent) = Outbox::pair();
    let (events, queue) = mpsc::channel(8);
    let mut reconciler_parts = parts(&kernel, &status, None, None);
    reconciler_parts.stopping = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn(move || Reconciler::new(reconciler_parts, Now::read()).run(queue));
    events.blocking_send(Event::Link(transport::Event::Connected(outbox))).unwrap();
    let Some(v1::sync_request::Kind::Hello(hello)) = sent.blocking_recv().unwrap().kind else {
        panic!("no Hello")
    };
    for response in server.welcome(&hello) {
        events.blocking_send(frame(response)).unwrap();
    }
    events.blocking_send(Event::Shutdown).unwrap();
    thread.join().unwrap();
    assert!(kernel.lock().calls.iter().all(|call| *call != "cleanup"));
    // Whatever had been programmed by then was acknowledged, and the way to the server closed.
    let mut acks = 0;
    while sent.blocking_recv().is_some() {
        acks += 1;
    }
    assert!(acks >= 1);
}
