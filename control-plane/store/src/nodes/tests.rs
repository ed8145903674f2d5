use std::num::NonZeroU64;

use lockstep_model::Key;

use super::*;
use crate::Changes;
use crate::store::tests::service;

struct World {
    store: Store,
    nodes: Nodes,
    start: Instant,
}

impl World {
    fn new() -> Self {
        let start = Instant::now();
        Self { store: Store::new(NonZeroU64::new(7).unwrap(), start), nodes: Nodes::default(), start }
    }

    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    fn publish(&mut self, variant: u8, seconds: u64) -> u64 {
        let mut changes = Changes::default();
        changes.upsert(service("a", "b", variant));
        let old = self.store.head().seq;
        let seq = self.store.apply(changes, self.at(seconds)).unwrap();
        self.nodes.published(old, self.at(seconds));
        seq
    }

    fn connect(&mut self, name: &str, instance: &str, seconds: u64) -> Result<Connected, ConnectError> {
        self.nodes.connect(facts(name, instance), self.start + Duration::from_secs(seconds))
    }

    fn ack(&mut self, stream: StreamId, verified: u64, seconds: u64) -> Result<(), AckError> {
        let now = self.at(seconds);
        self.nodes.ack(stream, report(verified), &self.store, now)
    }

    fn state(&self, name: &str) -> NodeState {
        self.nodes.get(name).unwrap().state(self.store.head().seq)
    }

    fn behind_for(&self, name: &str, seconds: u64) -> Option<u64> {
        let node = self.nodes.get(name).unwrap();
        let behind = self.nodes.behind_for(node, self.store.head().seq, self.at(seconds));
        behind.map(|behind| behind.as_secs())
    }
}

fn facts(name: &str, instance: &str) -> Facts {
    Facts {
        node_name: name.into(),
        instance_id: instance.into(),
        started: None,
        agent_version: "1".into(),
        backend: BackendFacts::default(),
        settings: None,
        peer: format!("192.0.2.1:{}", instance.len()),
        resume: Resume::Full,
    }
}

fn report(verified: u64) -> Report {
    Report {
        epoch: 7,
        levels: Levels { received: Some(verified), applied: Some(verified), verified: Some(verified) },
        digest: None,
        outcome: Outcome::Verified,
        failures: Vec::new(),
        failures_truncated: 0,
        backend_error: String::new(),
        pass: None,
        drift_repairs: 0,
    }
}

fn failure(namespace: &str, name: &str) -> Failure {
    Failure {
        key: Some(Key::Service(ServiceKey::new(namespace, name))),
        version: None,
        in_force: InForce::Nothing,
        class: FailureClass::Kernel,
        message: "no room".into(),
        retrying: true,
        attempts: 1,
        first_seen: None,
    }
}

#[test]
fn expected_are_node_objects_and_live_streams() {
    let mut world = World::new();
    world.publish(1, 0);
    let now = world.start;
    assert!(world.nodes.upsert_object(NodeContext::unknown("n1"), now));
    assert!(!world.nodes.upsert_object(NodeContext::unknown("n1"), now), "nothing new");
    assert_eq!(world.state("n1"), NodeState::NeverSeen);
    let stranger = world.connect("n2", "x", 1).unwrap();
    assert!(!stranger.has_node_object);
    assert_eq!(world.nodes.counts(1).expected, 2);
    world.nodes.disconnect(stranger.stream, now);
    assert!(world.nodes.get("n2").is_none(), "neither object nor stream");
    assert!(world.nodes.remove_object("n1", now));
    assert!(!world.nodes.remove_object("n1", now));
    assert_eq!(world.nodes.counts(1), Counts::default());
}

#[test]
fn a_node_goes_through_its_states() {
    let mut world = World::new();
    let now = world.start;
    world.nodes.upsert_object(NodeContext::unknown("n1"), now);
    world.publish(1, 0);
    let stream = world.connect("n1", "x", 1).unwrap().stream;
    assert_eq!(world.state("n1"), NodeState::Behind);
    world.ack(stream, 1, 2).unwrap();
    assert_eq!(world.state("n1"), NodeState::InSync);
    let degraded = Report { failures: vec![failure("a", "b")], ..report(1) };
    world.nodes.ack(stream, degraded, &world.store, now).unwrap();
    assert_eq!(world.state("n1"), NodeState::Degraded);
    assert_eq!(world.nodes.counts(1).degraded, 1);
    let failed = Report { backend_error: "no nf_tables".into(), ..report(1) };
    world.nodes.ack(stream, failed, &world.store, now).unwrap();
    assert_eq!(world.state("n1"), NodeState::Failed);
    world.nodes.disconnect(stream, now);
    assert_eq!(world.state("n1"), NodeState::Disconnected);
    assert_eq!(world.nodes.counts(1).disconnected, 1);
}

#[test]
fn the_empty_state_too_must_be_verified() {
    let mut world = World::new();
    let now = world.start;
    world.store.begin(now);
    let stream = world.connect("n1", "x", 0).unwrap().stream;
    assert_eq!(world.state("n1"), NodeState::Behind);
    assert_eq!(world.nodes.progress(1, Level::Verified, None, 20).done, 0);
    world.ack(stream, 1, 1).unwrap();
    assert_eq!(world.state("n1"), NodeState::InSync);
    assert_eq!(world.nodes.progress(1, Level::Verified, None, 20).done, 1);
}

#[test]
fn the_newest_process_has_the_stream_and_two_do_not_flap() {
    let mut world = World::new();
    let old = world.connect("n1", "old", 0).unwrap();
    let new = world.connect("n1", "new", 1).unwrap();
    assert_eq!(new.superseded, Some(old.stream));
    assert_eq!(world.ack(old.stream, 0, 2), Err(AckError::NotLive));
    let refused = world.connect("n1", "old", 3).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "node n1: instance \"old\" is older than instance \"new\" at 192.0.2.1:3, which is connected; \
         two agents with one node name?"
    );
    let again = world.connect("n1", "new", 4).unwrap();
    assert_eq!(again.superseded, Some(new.stream), "a process may replace its own stream");
    assert_eq!(world.nodes.get("n1").unwrap().superseded(), 1, "which is not counted");
    world.nodes.upsert_object(NodeContext::unknown("n1"), world.start);
    world.nodes.disconnect(new.stream, world.start);
    assert!(world.nodes.get("n1").unwrap().connected(), "a late end of an old stream ends nothing");
    world.nodes.disconnect(again.stream, world.start);
    assert!(world.connect("n1", "old", 5).is_ok(), "nobody else is there");
    assert!(world.connect("n1", "new", 6).is_ok(), "the newest started wins again");
    assert!(world.connect("n1", "old", 7).is_err());
}

#[test]
fn another_process_has_to_prove_itself_anew() {
    let mut world = World::new();
    world.publish(1, 0);
    let first = world.connect("n1", "x", 0).unwrap();
    world.ack(first.stream, 1, 0).unwrap();
    world.connect("n1", "x", 1).unwrap();
    assert_eq!(world.state("n1"), NodeState::InSync, "the same process, a new connection");
    world.connect("n1", "y", 2).unwrap();
    assert_eq!(world.state("n1"), NodeState::Behind);
}

#[test]
fn impossible_reports_are_refused() {
    let mut world = World::new();
    world.publish(1, 0);
    let stream = world.connect("n1", "x", 0).unwrap().stream;
    assert_eq!(world.ack(stream, 2, 1), Err(AckError::Future { seq: 2, head: 1 }));
    let elsewhere = Report { digest: Some(Digest::EMPTY), ..report(1) };
    let ours = world.store.head().digest;
    assert_eq!(
        world.nodes.ack(stream, elsewhere, &world.store, world.start),
        Err(AckError::OtherDigest { seq: 1, digest: Digest::EMPTY, ours })
    );
    let now = world.start;
    let other = Report { epoch: 8, ..report(1) };
    assert_eq!(
        world.nodes.ack(stream, other, &world.store, now),
        Err(AckError::OtherEpoch { epoch: 8, ours: 7 })
    );
    let levels = Levels { received: Some(0), applied: Some(1), verified: Some(0) };
    let unordered = Report { levels, ..report(1) };
    assert_eq!(world.nodes.ack(stream, unordered, &world.store, now), Err(AckError::Unordered));
    assert_eq!(world.state("n1"), NodeState::Behind);
}

#[test]
fn behind_counts_from_when_the_head_left_the_node() {
    let mut world = World::new();
    let stream = world.connect("n1", "x", 5).unwrap().stream;
    world.publish(1, 10);
    assert_eq!(world.behind_for("n1", 20), Some(15), "never verified: since it is known");
    world.ack(stream, 1, 20).unwrap();
    assert_eq!(world.behind_for("n1", 25), None);
    for variant in 2..5 {
        world.publish(variant, 28 + u64::from(variant));
    }
    assert_eq!(world.behind_for("n1", 40), Some(10), "since seq 2, published at 30");
    world.ack(stream, 2, 41).unwrap();
    assert_eq!(world.behind_for("n1", 42), Some(12), "it was not the head when it was verified");
    assert_eq!(world.nodes.laggards(4, world.at(42), 20), vec![Arc::<str>::from("n1")]);
    world.ack(stream, 4, 43).unwrap();
    assert_eq!(world.behind_for("n1", 44), None);
}

#[test]
fn convergence_is_the_last_verification() {
    let mut world = World::new();
    let one = world.connect("n1", "x", 0).unwrap().stream;
    let two = world.connect("n2", "x", 0).unwrap().stream;
    world.publish(1, 10);
    world.ack(one, 1, 11).unwrap();
    assert_eq!(world.nodes.convergence(), None);
    assert_eq!(
        world.nodes.counts(1),
        Counts { expected: 2, received: 1, applied: 1, verified: 1, ..Counts::default() }
    );
    world.ack(two, 1, 13).unwrap();
    let expected = Convergence { seq: 1, took: Duration::from_secs(3) };
    assert_eq!(world.nodes.convergence(), Some(expected));
    world.ack(two, 1, 20).unwrap();
    assert_eq!(world.nodes.convergence(), Some(expected), "said again, nothing new");
}

#[test]
fn progress_leaves_no_node_out() {
    let mut world = World::new();
    world.publish(1, 0);
    let start = world.start;
    world.nodes.upsert_object(NodeContext::unknown("absent"), start);
    let one = world.connect("good", "x", 0).unwrap().stream;
    let two = world.connect("failing", "x", 0).unwrap().stream;
    world.ack(one, 1, 1).unwrap();
    let failing = Report { failures: vec![failure("a", "b")], ..report(1) };
    world.nodes.ack(two, failing, &world.store, start).unwrap();
    let names = |service: Option<&ServiceKey>, level| -> Vec<String> {
        let progress = world.nodes.progress(1, level, service, 20);
        assert_eq!(progress.expected, 3);
        assert_eq!(progress.done as usize + progress.laggards.len(), 3);
        progress.laggards.iter().map(|name| name.to_string()).collect()
    };
    assert_eq!(names(Some(&ServiceKey::new("a", "b")), Level::Verified), ["absent", "failing"]);
    assert_eq!(names(Some(&ServiceKey::new("a", "c")), Level::Verified), ["absent"]);
    assert_eq!(names(None, Level::Verified), ["absent", "failing"]);
    assert_eq!(names(None, Level::Received), ["absent"]);
}

#[test]
fn a_node_without_a_stream_is_not_done_whatever_it_reported() {
    let mut world = World::new();
    world.publish(1, 0);
    world.nodes.upsert_object(NodeContext::unknown("n1"), world.start);
    let stream = world.connect("n1", "x", 0).unwrap().stream;
    world.ack(stream, 1, 1).unwrap();
    assert_eq!(world.nodes.progress(1, Level::Verified, None, 9).done, 1);
    world.nodes.disconnect(stream, world.at(2));
    let progress = world.nodes.progress(1, Level::Verified, None, 9);
    assert_eq!((progress.done, progress.laggards), (0, vec!["n1".into()]));
    world.nodes.remove_object("n1", world.at(3));
    assert_eq!(world.nodes.progress(1, Level::Verified, None, 9).expected, 0);
}

#[test]
fn a_failure_that_is_not_listed_counts_all_the_same() {
    let mut world = World::new();
    world.publish(1, 0);
    let now = world.start;
    let stream = world.connect("n1", "x", 0).unwrap().stream;
    let failures: Vec<Failure> = (0..257).map(|index| failure("a", &format!("s{index:03}"))).collect();
    let many = Report { failures, ..report(1) };
    world.nodes.ack(stream, many, &world.store, now).unwrap();
    let node = world.nodes.get("n1").unwrap();
    assert_eq!((node.failures().len(), node.report().unwrap().failures_truncated), (256, 1));
    assert_eq!(node.failing_services().count(), 257);
    let done = |world: &World, name: &str| {
        world.nodes.progress(1, Level::Verified, Some(&ServiceKey::new("a", name)), 9).done
    };
    assert_eq!((done(&world, "s000"), done(&world, "s256")), (0, 0), "the last one is known, not listed");
    assert_eq!(done(&world, "fine"), 1, "all failures were told, and this is none of them");
    // A node that does not say what else fails: any Service may.
    let cut = Report { failures: vec![failure("a", "s000")], failures_truncated: 1, ..report(1) };
    world.nodes.ack(stream, cut, &world.store, now).unwrap();
    assert_eq!(done(&world, "fine"), 0);
    // More than is remembered comes to the same.
    let failures: Vec<Failure> = (0..6_000).map(|index| failure("a", &format!("s{index:04}"))).collect();
    world.nodes.ack(stream, Report { failures, ..report(1) }, &world.store, now).unwrap();
    assert_eq!((done(&world, "s5999"), done(&world, "fine")), (0, 0));
    world.ack(stream, 1, 3).unwrap();
    assert_eq!((done(&world, "s256"), done(&world, "fine")), (1, 1), "over");
}

#[test]
fn a_failure_without_a_key_may_be_of_any_service_but_for_an_unknown_kind() {
    let mut world = World::new();
    world.publish(1, 0);
    let now = world.start;
    let stream = world.connect("n1", "x", 0).unwrap().stream;
    let any = ServiceKey::new("a", "b");
    for (class, done) in [(FailureClass::Decode, 0), (FailureClass::Unsupported, 1)] {
        let nameless = Failure { key: None, class, ..failure("", "") };
        let nameless = Report { failures: vec![nameless], ..report(1) };
        world.nodes.ack(stream, nameless, &world.store, now).unwrap();
        assert_eq!(world.state("n1"), NodeState::Degraded);
        assert_eq!(world.nodes.progress(1, Level::Verified, Some(&any), 9).done, done, "{class:?}");
        assert_eq!(world.nodes.progress(1, Level::Verified, None, 9).done, 0, "{class:?}");
    }
}

#[test]
fn the_process_that_started_last_has_the_stream_whoever_connects_first() {
    let started = |instance: &str, seconds: u64| {
        let started = Some(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        Facts { started, ..facts("n1", instance) }
    };
    let mut world = World::new();
    let now = world.start;
    world.nodes.connect(started("old", 1), now).unwrap();
    let new = world.nodes.connect(started("new", 2), now).unwrap();
    assert!(new.superseded.is_some());
    // The control plane restarts: it remembers nothing, and the older one is the later to come.
    let mut world = World::new();
    let new = world.nodes.connect(started("new", 2), now).unwrap();
    let refused = world.nodes.connect(started("old", 1), now).unwrap_err().to_string();
    assert!(refused.starts_with("node n1: instance \"old\" is older than instance \"new\""), "{refused}");
    assert_eq!(world.nodes.stream_of("n1"), Some(new.stream));
    // One that was ousted by a claim without a time comes back with the later one.
    let silent = world.nodes.connect(facts("n1", "silent"), now).unwrap();
    assert_eq!(silent.superseded, Some(new.stream));
    assert!(world.nodes.connect(started("new", 2), now).is_err(), "nothing to compare: newest connected");
    world.nodes.connect(started("newest", 3), now).unwrap();
    let newer = world.nodes.connect(started("latest", 4), now).unwrap();
    assert!(world.nodes.connect(started("newest", 3), now).is_err());
    world.nodes.disconnect(newer.stream, now);
    assert!(world.nodes.connect(started("newest", 3), now).is_ok(), "nobody else is there");
}
